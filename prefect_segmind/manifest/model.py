"""The parts of a manifest: fields, rows, mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from prefect_segmind.errors import ManifestError, redact
from prefect_segmind.jobs.job import Job, shown, suffix_from_image

FIELDS = tuple(Job.model_fields)
TEXTS = ("name", "image", "prompt", "negative_prompt")
"""Fields that may be templates."""
AXES = ("prompt", "negative_prompt", "image_weight", "magic_prompt_option", "resolution", "seed", "style_type")
"""Fields that `variants` may vary."""
HEAD = ("defaults", "vars", "variants", "templates")
"""Keys of a manifest beside `assets`."""
MAX_ASSETS = MAX_VARIANTS = 10_000
"""Assets of a YAML or JSON manifest, and jobs of one asset."""
_SHOWN, _KEPT = 100, 10_000  # mistakes in a message, and in memory


class Row(NamedTuple):
    """An asset as the manifest has it.

    Attributes:
        where: Its place, such as `line 12`.
        values: Its values, not checked yet.
    """

    where: str
    values: Mapping[str, Any]


class FoundImage(NamedTuple):
    """An image that an asset names.

    Attributes:
        location: Its absolute path or address.
        name: Where a pattern matched it, the job name made from its path; else empty.
    """

    location: str
    name: str = ""


class UnreadableManifest(Exception):
    """The rest of a manifest cannot be read."""


class MistakenManifest(ManifestError):
    """A manifest has mistakes.

    Attributes:
        mistakes: A line for each of the first 10,000, with its place.
    """

    mistakes: tuple[str, ...] = ()


class Notes:
    """Lines for a person: keeps the first 10,000 and counts all.

    Attributes:
        lines: The first 10,000 lines.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._count = 0

    def add(self, *lines: str) -> None:
        """Adds lines; keys and signed addresses are redacted."""
        self._count += len(lines)
        self.lines += map(redact, lines[: max(0, _KEPT - len(self.lines))])

    def __len__(self) -> int:
        return self._count

    def first(self) -> list[str]:
        """The first 100 lines, and a last one with the number of the others."""
        return self.lines[:_SHOWN] + [f"… and {len(self) - _SHOWN} more"] * (len(self) > _SHOWN)

    def error(self, place: str) -> MistakenManifest:
        """The error for a manifest with these mistakes.

        Args:
            place: The manifest's path or address.
        """
        first = f"{place}: {len(self)} mistake{'s' * (len(self) > 1)}; nothing was uploaded or paid."
        error = MistakenManifest("\n  ".join([first, *self.first()]))
        error.mistakes = tuple(self.lines)
        return error


def look_alike(name: str, one: FoundImage, other: FoundImage, names_each: bool) -> str:
    """The mistake of two matches of a pattern with the same name.

    Args:
        name: The name.
        one: The first match.
        other: The second match.
        names_each: Whether the asset's `name` is each match's whole name rather than their folder.
    """
    if suffix_from_image(one.location) != suffix_from_image(other.location):
        remedy = "put {{ stem }}-{{ suffix }} into name" + ("" if names_each else ", or {{ suffix }} for a folder each")
    elif names_each and one.name != other.name:
        remedy = "leave {{ stem }} out of name, so that they keep their folders"
    else:
        remedy = "rename one of them"
    both = " and ".join(each if each.isprintable() else repr(each) for each in (one.location, other.location))
    return f"name: {shown(name)} would be both {both}; {remedy}"
