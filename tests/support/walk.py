"""The walk of a job without Prefect, for tests of the stages: the same parts, put together from the same settings."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect_segmind import services
from prefect_segmind.archive.record import OnUnknown
from prefect_segmind.jobs.job import parse_job
from prefect_segmind.pipeline.archive import ArchivedImage, Archiving
from prefect_segmind.pipeline.look_up import GeneratedImage
from prefect_segmind.pipeline.upload import UploadedImage
from prefect_segmind.pipeline.validate import ValidatedJob, validate


def up_to_upload(image: str | Path, **fields: Any) -> tuple[ValidatedJob, UploadedImage]:
    fields = {"prompt": "a red mug", **fields}
    reader = services.source_reader()
    job = validate(parse_job({"image": str(image), **fields}), reader)
    return job, services.open_uploads(None).upload(job, reader)


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
    generation = services.open_generation(archive, None, None, on_unknown=on_unknown)
    say = (said if said is not None else []).append
    return replace(generation, say=say, warn=say).generate(job, lambda: uploaded, run or uuid.uuid4().hex)


def archive_picture(generated: GeneratedImage) -> ArchivedImage:
    archive = services.open_archive(generated.archive)
    return Archiving(archive, services.open_outbox(archive)).archive_picture(generated)


def walk(image: str | Path, *, on_unknown: OnUnknown = "repay", **fields: Any) -> ArchivedImage:
    return archive_picture(generate(*up_to_upload(image, **fields), on_unknown=on_unknown))
