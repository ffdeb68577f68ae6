"""What a manifest is made of: its fields, its rows, its mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from prefect_segmind.errors import ManifestError, redact
from prefect_segmind.jobs.job import Job, shown, suffix_from_image

FIELDS = tuple(Job.model_fields)
TEXTS = ("name", "image", "prompt", "negative_prompt")
"""The fields that may be templates."""
AXES = ("prompt", "negative_prompt", "image_weight", "magic_prompt_option", "resolution", "seed", "style_type")
"""The fields that may vary."""
HEAD = ("defaults", "vars", "variants", "templates")
"""What a manifest may say beside its assets."""
MAX_ASSETS = MAX_VARIANTS = 10_000
_SHOWN, _KEPT = 100, 10_000  # mistakes in a message, and in memory


class Row(NamedTuple):
    """An asset as it stands in the text: where, such as `line 12`, and its values, not checked yet."""

    where: str
    values: Mapping[str, Any]


class Found(NamedTuple):
    """An image: its absolute location and, where a pattern has found it, the name that it gets from its path."""

    location: str
    name: str = ""


class UnreadableManifest(Exception):
    """From some place on nothing can be read."""


class MistakenManifest(ManifestError):
    """A manifest has mistakes; `mistakes` holds a line for each of the first 10,000, with where it is."""

    mistakes: tuple[str, ...] = ()


class Notes:
    """Lines for a person: the first 10,000 of them, and how many there were."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._count = 0

    def add(self, line: str) -> None:
        """Notes a line, without keys and signed addresses."""
        self._count += 1
        if self._count <= _KEPT:
            self.lines.append(redact(line))

    def __len__(self) -> int:
        return self._count

    def first(self) -> list[str]:
        """The first 100, and how many more there are."""
        return self.lines[:_SHOWN] + [f"… and {len(self) - _SHOWN} more"] * (len(self) > _SHOWN)

    def error(self, place: str) -> MistakenManifest:
        """The error of a manifest with these mistakes."""
        first = f"{place}: {len(self)} mistake{'s' * (len(self) > 1)}; nothing was uploaded or paid."
        error = MistakenManifest("\n  ".join([first, *self.first()]))
        error.mistakes = tuple(self.lines)
        return error


def look_alike(name: str, one: Found, other: Found, names_each: bool) -> str:
    """The mistake of two matches of a pattern that get one name.

    Args:
        name: What both would be called.
        one: The first.
        other: The second.
        names_each: Whether the asset's `name` is all of their names, and not the folder that they go to.
    """
    if suffix_from_image(one.location) != suffix_from_image(other.location):
        remedy = "put {{ stem }}-{{ suffix }} into name" + ("" if names_each else ", or {{ suffix }} for a folder each")
    elif names_each and one.name != other.name:
        remedy = "leave {{ stem }} out of name, so that they keep their folders"
    else:
        remedy = "rename one of them"
    both = " and ".join(each if each.isprintable() else repr(each) for each in (one.location, other.location))
    return f"name: {shown(name)} would be both {both}; {remedy}"
