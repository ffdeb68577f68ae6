"""What people see of a finished run in Prefect's UI: before and after, side by side.

The pictures are small JPEGs inside the artifact itself, so that it never expires and holds no signed address.
"""

from __future__ import annotations

import base64
import hashlib
import re

from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger

from prefect_segmind import configuration
from prefect_segmind.archiving import ArchivedImage
from prefect_segmind.errors import redact
from prefect_segmind.generation import GeneratedImage
from prefect_segmind.normalisation import thumbnail
from prefect_segmind.price import usd
from prefect_segmind.validation import ValidatedJob

THUMBNAIL_WIDTH = 320
"""Pixels; two of them fit beside each other in Prefect's UI on a screen of 1300."""


def before_after(
    job: ValidatedJob, archived: ArchivedImage, generated: GeneratedImage, before: bytes | None, after: bytes
) -> str:
    """A markdown page with both pictures in a table and the facts below.

    Args:
        job: What was asked for.
        archived: Where the picture lies.
        generated: How it came about.
        before: The source image; None where it could not be read.
        after: The picture.
    """
    facts = {
        "result": archived.status,
        "paid by this run": f"{usd(archived.cost_usd)} USD"
        + (f", possibly {usd(archived.possibly_billed_usd)} USD more" if archived.possibly_billed_usd else ""),
        "requests": str(archived.attempts),
        "prompt": job.job.prompt,
        "style, weight": f"{job.job.style_type.value}, {job.job.image_weight}",
        "resolution, seed": f"{job.parameters['resolution']}, {archived.seed}",
        "source": generated.source_uri,
        "picture": archived.image,
        "sidecar": archived.sidecar,
    }
    left = f"![before]({_data_uri(before)})" if before else "the source could not be read"
    lines = [
        f"### {_cell(archived.name)}",
        "",
        "| before | after |",
        "| --- | --- |",
        f"| {left} | ![after]({_data_uri(after)}) |",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {_cell(value)} |" for name, value in facts.items()),
        *(f"\n- {_cell(warning)}" for warning in (*job.warnings, *generated.picture.notices)),
    ]
    return "\n".join(lines)


def publish_before_after(
    job: ValidatedJob, archived: ArchivedImage, generated: GeneratedImage, credentials_block: str | None
) -> None:
    """Puts before and after into an artifact of the flow run, under a key made of the job's name.

    The picture is paid and archived by now, so nothing that fails here fails the run: it is a warning.
    """
    try:
        before = configuration.source_reader(credentials_block).read(job.job.image) if job.source else None
        found = configuration.open_archive(generated.archive).store.get(_key_in(generated.archive, archived.image))
        if found is None:
            raise FileNotFoundError(archived.image)
        create_markdown_artifact(
            markdown=before_after(job, archived, generated, before, found.data),
            key=artifact_key(archived.name),
            description=f"{archived.name}, before and after",
        )
    except Exception as error:  # noqa: BLE001
        get_run_logger().warning("no before and after in the UI: %s", redact(str(error)))


def artifact_key(name: str) -> str:
    """The artifact's key for a job: lower case, digits and dashes, and different for different names.

    Example:
        >>> artifact_key("Hero/Summer")
        'before-after-hero-summer-8cb7bd3d'
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    return f"before-after-{slug}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _key_in(archive: str, uri: str) -> str:
    return uri.removeprefix(archive).lstrip("/\\").replace("\\", "/")


def _data_uri(image: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(thumbnail(image, THUMBNAIL_WIDTH)).decode()


def _cell(text: str) -> str:
    """Text that stays text in a table of markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", " ".join(text.split()))
