"""The JSON Schema of a manifest."""

from __future__ import annotations

import re
from typing import Any

from prefect_segmind.api.resolutions import AUTO, Resolution
from prefect_segmind.jobs.job import ALLOWED, Job
from prefect_segmind.manifest.model import AXES, FIELDS, MAX_ASSETS


def json_schema() -> dict[str, Any]:
    """The JSON Schema, draft 2020-12, of a manifest in YAML or JSON, for editors and other tools.

    What it cannot say, such as that names are unique, is checked when a manifest is read.
    """
    job = Job.model_json_schema()
    told = dict(re.findall(r"(?m)^ {4}(\w+): (.+)$", job["description"]))
    types = {field: _plain(schema) for field, schema in job["properties"].items()}
    for field, schema in types.items():
        schema["description"] = f"{told[field]} Allowed is {ALLOWED[field]}."
    types["name"]["description"] += " {{ stem }} is the image's name, {{ suffix }} its extension, such as jpg."
    types["image"]["description"] += " Relative to the manifest's folder; * ? and ** make a job of each match."
    types["resolution"]["enum"] = [AUTO, *(each.value for each in Resolution)]
    fields = {field: {"$ref": f"#/$defs/{field}"} for field in FIELDS}
    axes = {field: {"type": "array", "minItems": 1, "items": fields[field]} for field in AXES}
    variants = _object("Fields with the values they take in turn; each combination is a job of its own.", axes)
    free = {"type": "object", "description": "Variables for the templates."}
    more = {"vars": free, "variants": {"$ref": "#/$defs/variants"}}
    inherited = {field: reference for field, reference in fields.items() if field != "name"}
    shared = _object("What holds for each asset that does not say otherwise.", inherited)
    asset = _object("One asset, a picture or several.", {**fields, **more})
    templates = "Whether texts are Jinja2 templates, and images with * or ? in them patterns."
    manifest = {
        "$schema": {"type": "string", "description": "Where this schema lies, for an editor."},
        "defaults": shared,
        **more,
        "templates": {"type": "boolean", "default": True, "description": templates},
        "assets": {"type": "array", "maxItems": MAX_ASSETS, "items": asset, "description": "What is to be made."},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Manifest of prefect-segmind",
        **_object("The assets of a batch and what they share.", manifest),
        "required": ["assets"],
        "$defs": {**job["$defs"], **types, "variants": variants},
    }


def _object(description: str, properties: dict[str, Any]) -> dict[str, Any]:
    what = {"description": description, "type": "object"}
    return {**what, "properties": properties, "additionalProperties": False}


def _plain(schema: Any) -> Any:
    """Pydantic's schema of a field without the titles that it makes up."""
    if isinstance(schema, dict):
        return {key: _plain(value) for key, value in schema.items() if key != "title"}
    return [_plain(each) for each in schema] if isinstance(schema, list) else schema
