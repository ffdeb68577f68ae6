"""The walk of a job without Prefect, for tests of the stages: the same parts, put together from the same settings."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect_segmind import configuration
from prefect_segmind.archiving import ArchivedImage, Archiving
from prefect_segmind.generation import GeneratedImage
from prefect_segmind.record import OnUnknown
from prefect_segmind.request import parse_job
from prefect_segmind.upload import UploadedImage
from prefect_segmind.validation import ValidatedJob, validate


def up_to_upload(image: str | Path, **fields: Any) -> tuple[ValidatedJob, UploadedImage]:
    fields = {"prompt": "a red mug", **fields}
    reader = configuration.source_reader()
    job = validate(parse_job({"image": str(image), **fields}), reader)
    return job, configuration.open_uploads(None).upload(job, reader)


def generate(
    job: ValidatedJob,
    uploaded: UploadedImage,
    *,
    run: str | None = None,
    archive: str | None = None,
    on_unknown: OnUnknown = "repay",
    said: list[str] | None = None,
) -> GeneratedImage:
    """One request; a failed one is raised as it is."""
    generation = configuration.open_generation(archive, None, None, on_unknown=on_unknown)
    say = (said if said is not None else []).append
    return replace(generation, say=say, warn=say).generate(job, lambda: uploaded, run or uuid.uuid4().hex)


def archive_picture(generated: GeneratedImage) -> ArchivedImage:
    archive = configuration.open_archive(generated.archive)
    return Archiving(archive, configuration.open_outbox(archive)).archive_picture(generated)


def walk(image: str | Path, *, on_unknown: OnUnknown = "repay", **fields: Any) -> ArchivedImage:
    return archive_picture(generate(*up_to_upload(image, **fields), on_unknown=on_unknown))
