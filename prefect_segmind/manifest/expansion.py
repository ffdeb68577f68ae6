"""The rules of a manifest: how its head and each of its assets become jobs, and what is a mistake.

It knows neither where the text is stored nor its format: an asset comes as a `Row` of plain values.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import Any

from prefect_segmind.api.resolutions import resolution_size
from prefect_segmind.errors import InvalidJobError
from prefect_segmind.jobs.job import Job, name_from_image, parse_job, shown, suffix_from_image
from prefect_segmind.manifest.model import (
    FIELDS,
    MAX_VARIANTS,
    TEXTS,
    FoundImage,
    Notes,
    Row,
    look_alike,
)
from prefect_segmind.manifest.schema import ASSET, MANIFEST, check
from prefect_segmind.manifest.templates import TemplateMistake, render, template_names
from prefect_segmind.text import Spelled, as_written, composed, spelled, stripped


class Expansion:
    """Makes jobs of assets, for one run of one manifest.

    Args:
        head: The manifest without its assets: defaults, vars, variants and templates, not checked yet.
        variables: The run's variables, which override the manifest's vars; an asset's vars override both.
        find: Finds the images for an asset's `image`; its second argument is whether wildcards are expanded. An
            InvalidJobError that it raises becomes a mistake of the asset.
        mistakes: Collects mistakes; may already hold some.
        warnings: Collects warnings; may already hold some.
        allow_unlisted_resolution: Whether to accept sizes other than the 78 listed ones.
        absent: Returns why an image cannot exist, where that is cheap to find out; called with the location and the
            place of the asset that names it.

    Attributes:
        mistakes: Mistakes in the head and in the assets so far.
        warnings: Warnings about them.
        unmatched: Patterns without a match, which are not mistakes by themselves.
        missing: Images that do not exist, with the asset that names them; not mistakes by themselves either.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        variables: Mapping[str, Any],
        find: Callable[[str, bool], Sequence[FoundImage]],
        *,
        mistakes: Notes | None = None,
        warnings: Notes | None = None,
        allow_unlisted_resolution: bool = False,
        absent: Callable[[str, str], str | None] = lambda location, where: None,
    ) -> None:
        self.unmatched, self.missing = Notes(), Notes()
        self._absent = absent
        self._find = find
        self.mistakes = Notes() if mistakes is None else mistakes
        self.warnings = Notes() if warnings is None else warnings
        self._run, self._unlisted = _variables(variables), allow_unlisted_resolution
        self._seen: dict[int, str] = {}  # the hash of each name, and the asset that has it
        self._used: set[str] = set()
        right, wrong = check(MANIFEST, {**head, "assets": []}, allow_unlisted_resolution=self._unlisted)
        self.mistakes.add(*wrong)
        self._templates = right.get("templates", True)
        self._vars: dict[str, Any] = {**_variables(right.get("vars")), **self._run}
        self._defaults: dict[str, Any] = right.get("defaults") or {}
        self._variants: dict[str, list[Any]] = right.get("variants") or {}
        self._note_names(self._defaults.values(), *self._variants.values())

    def jobs(self, row: Row) -> Iterator[Job]:
        """Yields the jobs of an asset and collects its mistakes.

        Args:
            row: The asset. Where it has mistakes, some of its jobs may still be yielded.
        """
        wrong: dict[str, None] = {}  # the lines, once each: many variants share a mistake
        yield from self._jobs(row, wrong)
        if wrong:
            name = f" ({shown(row.values['name'])})" if row.values.get("name") else ""
            self.mistakes.add(*(f"{row.where}{name}: {line}" for line in wrong))

    def warn_of_unused(self) -> None:
        """Adds a warning for each of the run's variables that no template so far has used."""
        for name in self._run:
            if name not in self._used:
                near = difflib.get_close_matches(name, sorted(self._used), n=1)
                why = "no template in the manifest uses it" if self._templates else "templates are switched off"
                self.warnings.add(f"variable {shown(name)}: {why}" + (f"; did you mean {near[0]}?" if near else ""))

    def _jobs(self, row: Row, wrong: dict[str, None]) -> Iterator[Job]:
        own = {field: value for field, value in row.values.items() if field in FIELDS}
        others = {field: value for field, value in row.values.items() if field not in own}
        shared, lines = check(ASSET, others, allow_unlisted_resolution=self._unlisted)
        wrong.update(dict.fromkeys(lines))
        variables: dict[str, Any] = {**self._vars, **_variables(shared.get("vars"))}
        axes = self._axes(shared.get("variants"), own, wrong)
        fields = {**self._defaults, **own}
        found: Sequence[FoundImage] = [FoundImage("")]
        if "image" in fields:
            fields["image"] = image = self._text("image", fields["image"], variables, wrong)
            if isinstance(image, str) and (image := stripped(image)):
                try:
                    found = self._find(image, bool(self._templates))
                except InvalidJobError as error:
                    wrong[f"image: {error}"] = None
            if not found:
                self.unmatched.add(f"{row.where}: nothing matches {shown(image)}")
                self.warnings.add(f"{row.where}: nothing matches {shown(image)}; no job is made")
            for each in found if not any(line.startswith("image:") for line in wrong) else ():
                # A pattern's match has a name, and exists.
                if each.location and not each.name and (why := self._absent(each.location, row.where)):
                    self.missing.add(f"{row.where}: {why}")
        # Whether `name` is each match's whole name, rather than their folder.
        names_each = self._templates and "stem" in template_names(str(fields.get("name")))
        first: dict[str, FoundImage] = {}  # the first match with each name
        alike: dict[str, None] = {}
        for each in found:
            if each.location:
                fields["image"] = each.location
            stem, suffix = name_from_image(each.location), suffix_from_image(each.location)
            scope = {"stem": stem, "suffix": suffix, **variables}
            texts: dict[str, Any] = {
                field: self._text(field, fields[field], scope, wrong)
                for field in ("name", "prompt", "negative_prompt")
                if field in fields and field not in axes
            }
            base = "/".join(filter(None, (texts.get("name"), "" if names_each else each.name)))
            other = first.setdefault(base, each)
            if other is not each and not any(line.startswith("name:") for line in wrong):
                alike[look_alike(base, other, each, names_each)] = None
                continue
            rendered = [[self._text(field, value, scope, wrong) for value in values] for field, values in axes.items()]
            labels = [_labels(field, values) for field, values in axes.items()]
            for picks, label in zip(product(*rendered), product(*labels), strict=True):
                name = f"{base or stem}/{'-'.join(label)}" if label else base
                picked = dict(zip(axes, picks, strict=True))
                yield from self._job(row, {**fields, **texts, **picked, "name": name}, wrong)
        wrong.update(alike)

    def _job(self, row: Row, values: Mapping[str, Any], wrong: dict[str, None]) -> Iterator[Job]:
        name = spelled(values["name"]) or (name_from_image(str(values["image"])) if "image" in values else "")
        if name and not any(line.startswith("name:") for line in wrong):
            if (key := hash(name)) in self._seen:
                wrong[f"name: {shown(name)} is already used by {self._seen[key]}"] = None
            self._seen.setdefault(key, row.where)
        try:
            job = parse_job(values, allow_unlisted_resolution=self._unlisted)
        except InvalidJobError as error:
            wrong.update(dict.fromkeys(str(error).split("\n  ")[1:]))
            return
        if not wrong:
            yield job

    def _axes(
        self, variants: dict[str, list[Any]] | None, own: Mapping[str, Any], wrong: dict[str, None]
    ) -> dict[str, list[Any]]:
        if variants is None:
            axes = {field: values for field, values in self._variants.items() if field not in own}
        else:
            axes = variants
            for field in (each for each in axes if each in own):
                wrong[f"variants.{field}: the asset gives {field} as well; keep one of the two"] = None
        if (many := math.prod(map(len, axes.values()))) > MAX_VARIANTS:
            wrong[f"variants: {many:,} jobs from one asset; at most {MAX_VARIANTS:,} are allowed"] = None
            return {}
        return axes

    def _text(self, field: str, value: Any, variables: Mapping[str, Any], wrong: dict[str, None]) -> Any:
        """A value, rendered where it may be a template; a valid text where that fails."""
        if field not in TEXTS:
            return value
        if value is not None and not isinstance(value, str):
            wrong[f"{field}: {shown(value)} is not text; put a number in quotes"] = None
            return "x"
        if value is None or not self._templates:
            return value
        self._note_names([value])
        template = composed(value) if field != "image" else value
        try:
            # A YAML block ends in an unintended line break.
            rendered = render(template, variables).rstrip("\r\n")
        except TemplateMistake as mistake:
            wrong.update(dict.fromkeys(f"{field}: {line}" for line in mistake.lines))
            return "x"
        if field in ("name", "image"):
            return stripped(rendered)
        if template == as_written(value) and not any(isinstance(each, Spelled) for each in variables.values()):
            return rendered
        with suppress(TemplateMistake):  # older versions sent it as written: it may be paid for
            was = {name: as_written(each) if isinstance(each, str) else each for name, each in variables.items()}
            return Spelled(spelled(rendered), render(as_written(value), was).rstrip("\r\n"))
        return rendered

    def _note_names(self, *values: Iterable[Any]) -> None:
        if self._run and self._templates:
            for text in (each for some in values for each in some if isinstance(each, str)):
                self._used |= template_names(composed(text))


def _labels(field: str, values: list[Any]) -> Iterator[str]:
    """The part of a job's name for each value of an axis."""
    prefix = {"image_weight": "w", "seed": "seed", "magic_prompt_option": "magic-"}.get(field, "")
    for number, value in enumerate(values, start=1):
        text = re.sub(r"[^a-z0-9_]+", "-", "auto" if value is None else str(value).lower())[:40]
        if field in ("prompt", "negative_prompt"):
            text = f"{field.partition('_')[0]}{number}"
        elif value == "random" and values.count(value) > 1:
            text += str(number)
        elif field == "resolution":
            with suppress(ValueError):  # AUTO, or an invalid one, which the job's validation reports
                text = "x".join(map(str, resolution_size(str(value))))
        yield prefix + text


def _variables(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables by their names in NFC, as templates use them."""
    return {composed(name): value for name, value in (given or {}).items()}
