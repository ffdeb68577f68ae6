"""The rules of a manifest: how its head and each of its assets become jobs, and what is a mistake.

Where the text lies and how it is written is not known here: an asset comes as a `Row` of plain values.
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
    Found,
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
        head: What the manifest says beside its assets: defaults, vars, variants and templates, not checked yet.
        variables: The run's own, which win over the manifest's vars and give way to an asset's.
        find: The images for what an asset says; its second argument tells whether wildcards count. An InvalidJobError
            of it is a mistake of the asset.
        mistakes: Those that are known already.
        warnings: Those that are known already.
        allow_unlisted_resolution: Whether other sizes than the 78 are let through.
        absent: Says why nothing can be at a location, if that is known at little cost; it is told of each location.

    Attributes:
        mistakes: What is wrong with the head and the assets so far.
        warnings: What is odd about them.
        unmatched: What is no mistake by itself: patterns that nothing matches.
        missing: And images that are not there, with where they are asked for.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        variables: Mapping[str, Any],
        find: Callable[[str, bool], Sequence[Found]],
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
        self._seen: dict[int, str] = {}  # the hash of each name and where it stands
        self._used: set[str] = set()
        right, wrong = check(MANIFEST, {**head, "assets": []}, allow_unlisted_resolution=self._unlisted)
        for line in wrong:
            self.mistakes.add(line)
        self._templates = right.get("templates", True)
        self._vars: dict[str, Any] = {**_variables(right.get("vars")), **self._run}
        self._defaults: dict[str, Any] = right.get("defaults") or {}
        self._variants: dict[str, list[Any]] = right.get("variants") or {}
        self._note_names(self._defaults.values(), *self._variants.values())

    def jobs(self, row: Row) -> Iterator[Job]:
        """The jobs of an asset; every mistake in it is noted, and none of a wrong asset's jobs is promised."""
        told: dict[str, None] = {}  # a mistake of many variants is one
        yield from self._jobs(row, told)
        if told:
            name = f" ({shown(row.values['name'])})" if row.values.get("name") else ""
            for line in told:
                self.mistakes.add(f"{row.where}{name}: {line}")

    def warn_of_unused(self) -> None:
        """Notes each variable of the run that no template of the assets so far has named."""
        for name in self._run:
            if name not in self._used:
                near = difflib.get_close_matches(name, sorted(self._used), n=1)
                why = "no template of the manifest names it" if self._templates else "its templates are switched off"
                self.warnings.add(f"variable {shown(name)}: {why}" + (f"; did you mean {near[0]}?" if near else ""))

    def _jobs(self, row: Row, told: dict[str, None]) -> Iterator[Job]:
        own = {field: value for field, value in row.values.items() if field in FIELDS}
        others = {field: value for field, value in row.values.items() if field not in own}
        shared, wrong = check(ASSET, others, allow_unlisted_resolution=self._unlisted)
        told.update(dict.fromkeys(wrong))
        variables: dict[str, Any] = {**self._vars, **_variables(shared.get("vars"))}
        axes = self._axes(shared.get("variants"), own, told)
        fields = {**self._defaults, **own}
        found: Sequence[Found] = [Found("")]
        if "image" in fields:
            fields["image"] = image = self._text("image", fields["image"], variables, told)
            if isinstance(image, str) and (image := stripped(image)):
                try:
                    found = self._find(image, bool(self._templates))
                except InvalidJobError as error:
                    told[f"image: {error}"] = None
            if not found:
                self.unmatched.add(f"{row.where}: nothing matches {shown(image)}")
                self.warnings.add(f"{row.where}: nothing matches {shown(image)}; there is no job for it")
            for each in found if not any(line.startswith("image:") for line in told) else ():
                # A match of a pattern has a name and is there.
                if each.location and not each.name and (why := self._absent(each.location, row.where)):
                    self.missing.add(f"{row.where}: {why}")
        names_each = self._templates and "stem" in template_names(str(fields.get("name")))  # else it names their folder
        first: dict[str, Found] = {}  # of the matches, by the name that it gets
        alike: dict[str, None] = {}
        for each in found:
            if each.location:
                fields["image"] = each.location
            stem, suffix = name_from_image(each.location), suffix_from_image(each.location)
            scope = {"stem": stem, "suffix": suffix, **variables}
            texts: dict[str, Any] = {
                field: self._text(field, fields[field], scope, told)
                for field in ("name", "prompt", "negative_prompt")
                if field in fields and field not in axes
            }
            base = "/".join(filter(None, (texts.get("name"), "" if names_each else each.name)))
            other = first.setdefault(base, each)
            if other is not each and not any(line.startswith("name:") for line in told):
                alike[look_alike(base, other, each, names_each)] = None
                continue
            rendered = [[self._text(field, value, scope, told) for value in values] for field, values in axes.items()]
            labels = [_labels(field, values) for field, values in axes.items()]
            for picks, label in zip(product(*rendered), product(*labels), strict=True):
                name = f"{base or stem}/{'-'.join(label)}" if label else base
                picked = dict(zip(axes, picks, strict=True))
                yield from self._job(row, {**fields, **texts, **picked, "name": name}, told)
        told.update(alike)

    def _job(self, row: Row, values: Mapping[str, Any], told: dict[str, None]) -> Iterator[Job]:
        name = spelled(values["name"]) or (name_from_image(str(values["image"])) if "image" in values else "")
        if name and not any(line.startswith("name:") for line in told):
            if (key := hash(name)) in self._seen:
                told[f"name: {shown(name)} is taken already, by {self._seen[key]}"] = None
            self._seen.setdefault(key, row.where)
        try:
            job = parse_job(values, allow_unlisted_resolution=self._unlisted)
        except InvalidJobError as error:
            told.update(dict.fromkeys(str(error).split("\n  ")[1:]))
            return
        if not told:
            yield job

    def _axes(
        self, variants: dict[str, list[Any]] | None, own: Mapping[str, Any], told: dict[str, None]
    ) -> dict[str, list[Any]]:
        if variants is None:
            axes = {field: values for field, values in self._variants.items() if field not in own}
        else:
            axes = variants
            for field in (each for each in axes if each in own):
                told[f"variants.{field}: the asset gives {field} as well; keep one of the two"] = None
        if (many := math.prod(map(len, axes.values()))) > MAX_VARIANTS:
            told[f"variants: they make {many:,} jobs of one asset; at most {MAX_VARIANTS:,} are made"] = None
            return {}
        return axes

    def _text(self, field: str, value: Any, variables: Mapping[str, Any], told: dict[str, None]) -> Any:
        """A value, rendered if it is a text that may be a template; where that fails, a text that is right."""
        if field not in TEXTS:
            return value
        if value is not None and not isinstance(value, str):
            told[f"{field}: {shown(value)} is no text; a number must stand in quotes"] = None
            return "x"
        if value is None or not self._templates:
            return value
        self._note_names([value])
        template = composed(value) if field != "image" else value
        try:
            # A block of YAML ends in a line break that nobody means.
            rendered = render(template, variables).rstrip("\r\n")
        except TemplateMistake as mistake:
            told.update(dict.fromkeys(f"{field}: {line}" for line in mistake.lines))
            return "x"
        if field in ("name", "image"):
            return stripped(rendered)
        if template == as_written(value) and not any(isinstance(each, Spelled) for each in variables.values()):
            return rendered
        with suppress(TemplateMistake):  # the text of before all had one spelling: it may be paid for
            was = {name: as_written(each) if isinstance(each, str) else each for name, each in variables.items()}
            return Spelled(spelled(rendered), render(as_written(value), was).rstrip("\r\n"))
        return rendered

    def _note_names(self, *values: Iterable[Any]) -> None:
        if self._run and self._templates:
            for text in (each for some in values for each in some if isinstance(each, str)):
                self._used |= template_names(composed(text))


def _labels(field: str, values: list[Any]) -> Iterator[str]:
    """What each value of an axis is called in a name."""
    prefix = {"image_weight": "w", "seed": "seed", "magic_prompt_option": "magic-"}.get(field, "")
    for number, value in enumerate(values, start=1):
        text = re.sub(r"[^a-z0-9_]+", "-", "auto" if value is None else str(value).lower())[:40]
        if field in ("prompt", "negative_prompt"):
            text = f"{field.partition('_')[0]}{number}"
        elif value == "random" and values.count(value) > 1:
            text += str(number)
        elif field == "resolution":
            with suppress(ValueError):  # AUTO, or a wrong one, which the check of the job tells
                text = "x".join(map(str, resolution_size(str(value))))
        yield prefix + text


def _variables(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables by their names in one spelling, as templates name them."""
    return {composed(name): value for name, value in (given or {}).items()}
