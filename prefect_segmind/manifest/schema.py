"""Pydantic models that check a manifest, and the JSON Schema made from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, create_model
from typing_extensions import TypeAliasType

from prefect_segmind.api.resolutions import AUTO, Resolution
from prefect_segmind.jobs.job import ALLOWED, Job, describe_mistake, unknown
from prefect_segmind.manifest.model import AXES, MAX_ASSETS
from prefect_segmind.text import spelled

_MORE = {
    "name": " {{ stem }} is the image's name, {{ suffix }} its extension, such as jpg.",
    "image": " Relative to the manifest's folder; * ? and ** make a job of each match.",
}
_TEMPLATES = "Whether texts are Jinja2 templates, and images with * or ? in them patterns."
_ALLOWED = {"bool_type": "true or false"}
_ALLOWED |= dict.fromkeys(("dict_type", "model_type"), "a mapping of names to values")
_ALLOWED |= dict.fromkeys(("list_type", "too_short"), "a list of at least one value")
_named: Any = TypeAliasType  # which type checkers allow for a fixed name only


def _in_one_spelling(value: object) -> object:
    return (spelled(value) or value) if isinstance(value, str) else value


def _types() -> dict[str, Any]:
    """The fields of a job as types with names, so that the JSON Schema defines each once."""
    hints = get_type_hints(Job, include_extras=True)
    texts = dict(re.findall(r"(?m)^\s+(\w+): (.+)$", Job.__doc__ or ""))
    types: dict[str, Any] = {}
    for field, schema in Job.model_json_schema()["properties"].items():
        more = {key: value for key, value in schema.items() if key == "default"}
        if field == "resolution":
            more["enum"] = [AUTO, *(each.value for each in Resolution)]
        text = f"{texts[field]} Allowed is {ALLOWED[field]}.{_MORE.get(field, '')}"
        described = Field(description=text, json_schema_extra=more)
        types[field] = _named(field, Annotated[hints[field], BeforeValidator(_in_one_spelling), described])
    return types


def _model(name: str, description: str, /, **types: Any) -> type[BaseModel]:
    """A model whose fields may be left out, and that takes no others."""
    fields: dict[str, Any] = {field: (type_, Field(default_factory=dict)) for field, type_ in types.items()}
    return create_model(name, __config__=ConfigDict(extra="forbid"), __doc__=description, **fields)


_FIELDS: Any = _types()
_SECTIONS = {
    "defaults": _model(
        "Defaults",
        "Values for assets that do not give a field.",
        **{field: type_ for field, type_ in _FIELDS.items() if field != "name"},
    ),
    "variants": _model(
        "Variants",
        "Lists of values for fields; each combination makes a job.",
        **{field: Annotated[list[_FIELDS[field]], Field(min_length=1)] for field in AXES},
    ),
}
_SHARED = {
    "vars": Annotated[dict[str, Any] | None, Field(description="Variables for the templates.")],
    "variants": _SECTIONS["variants"] | None,
}
ASSET = _model("Asset", "One asset, a picture or several.", **_FIELDS, **_SHARED)
"""An asset."""
MANIFEST = _model(
    "Manifest",
    "The assets of a batch and what they share.",
    **{"$schema": Annotated[str, Field(description="The location of this schema, for editors.")]},
    defaults=_SECTIONS["defaults"] | None,
    **_SHARED,
    templates=Annotated[StrictBool, Field(description=_TEMPLATES, json_schema_extra={"default": True})],
    assets=Annotated[list[ASSET], Field(description="What is to be made.", max_length=MAX_ASSETS)],  # type: ignore[valid-type]
)
"""A whole manifest."""


def check(
    model: type[BaseModel], values: Mapping[str, Any], *, allow_unlisted_resolution: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Checks a manifest without its assets, or an asset without the fields of its jobs.

    Args:
        model: `MANIFEST` or `ASSET`.
        values: The values, as read.
        allow_unlisted_resolution: Whether to accept sizes other than the 78 listed ones.

    Returns:
        The valid values, as read, and a line for each mistake.

    Example:
        >>> check(ASSET, {"variants": {"seed": [100], "style_type": ["anime"]}, "vars": {"season": "summer"}})[0]
        {'variants': {'seed': [100]}, 'vars': {'season': 'summer'}}
    """
    right: dict[str, Any] = {key: {**value} if isinstance(value, Mapping) else value for key, value in values.items()}
    lines: dict[str, None] = {}  # each member of a union reports the same error
    try:
        model.model_validate(right, context={"allow_unlisted_resolution": allow_unlisted_resolution})
    except ValidationError as error:
        for mistake in error.errors(include_url=False):
            *within, field = map(str, mistake["loc"][:2])
            if mistake["type"] == "extra_forbidden":
                line = unknown(field, (_SECTIONS[within[0]] if within else model).model_fields)
            else:
                line = describe_mistake(field, mistake, _ALLOWED.get(mistake["type"]))
            lines[".".join([*within, line])] = None
            (right[within[0]] if within else right).pop(field, None)
    return right, list(lines)


def json_schema() -> dict[str, Any]:
    """The JSON Schema, draft 2020-12, of a manifest in YAML or JSON, for editors and other tools.

    What it cannot express, such as unique names, is checked when a manifest is read.
    """
    schema = MANIFEST.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "required": ["assets"]}
