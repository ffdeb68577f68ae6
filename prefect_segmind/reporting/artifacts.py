"""What people see of a finished run in Prefect's UI: before and after, side by side.

The pictures are small JPEGs inside the artifact itself, so that it never expires and holds no signed address.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger

from prefect_segmind.archive.archive import Archive
from prefect_segmind.batch.plan import Plan
from prefect_segmind.batch.tally import BatchResult
from prefect_segmind.errors import redact
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.pay import GeneratedImage
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.reporting.markdown import before_and_after, cell, listing, table

THUMBNAIL_WIDTH = 320
"""Pixels; two of them fit beside each other in Prefect's UI on a screen of 1300."""
SHOWN_PICTURES = 12
"""Pictures of a batch that its report shows; each takes about 40 kB in Prefect's database."""
SHOWN_NAMES = 500
"""Assets that were not started which a report names."""
SHOWN_JOBS = 100
"""Jobs that a plan lists."""
SHOWN_FAILURES = 100
"""Failures that it lists; the manifest of the failed ones has them all."""


def before_after(
    job: ValidatedJob, archived: ArchivedImage, generated: GeneratedImage, before: bytes | None, after: bytes
) -> str:
    """A markdown page with both pictures side by side and the facts below.

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
        **({"published": archived.published} if archived.published else {}),
    }
    lines = [
        f"### {cell(archived.name)}",
        "",
        *before_and_after(before, after, THUMBNAIL_WIDTH),
        "",
        *listing(facts),
        *(f"- {cell(warning)}" for warning in (*job.warnings, *generated.picture.notices)),
    ]
    return "\n".join(lines)


def publish_before_after(
    job: ValidatedJob, archived: ArchivedImage, generated: GeneratedImage, archive: Archive, reader: SourceReader
) -> None:
    """Puts before and after into an artifact of the flow run, under a key made of the job's name.

    The picture is paid and archived by now, so nothing that fails here fails the run: it is a warning.
    """
    try:
        before = reader.read(job.job.image) if job.source else None
        after = archive.content(archived.image)
        if after is None:
            raise FileNotFoundError(archived.image)
        create_markdown_artifact(
            markdown=before_after(job, archived, generated, before, after),
            key=artifact_key(archived.name),
            description=f"{archived.name}, before and after",
        )
    except Exception as error:  # noqa: BLE001
        get_run_logger().warning("no before and after in the UI: %s", redact(str(error)))


def publish_plan(plan: Plan, title: str) -> None:
    """Puts the plan of a batch into an artifact of its flow run, for whoever wants to know the cost beforehand."""
    shown = plan.jobs[:SHOWN_JOBS]
    named = {each.name for each in shown}
    failing = [(name, problem) for name, problem in plan.problems if name not in named]
    lines = (
        f"### Plan for {cell(title)}",
        "",
        *table(plan.facts()),
        *(f"\n- {cell(each)}" for each in plan.shortfalls()),
        *(f"\n- {count} assets: {cell(warning)}" for warning, count in plan.warnings),
        "",
        "#### Jobs",
        "",
        *(f"- {cell(each.sentence())}" for each in shown),
        *([f"- and {plan.total - len(shown)} more"] if plan.total > len(shown) else ()),
        *(f"- {cell(name)} will fail, unpaid: {cell(problem)}" for name, problem in failing[:SHOWN_FAILURES]),
    )
    _publish(lambda: lines, artifact_key(title, "plan"), "what the run is going to do and to cost")


def publish_batch(result: BatchResult, title: str, archive: Archive, reader: SourceReader) -> None:
    """Puts a batch's counts, its failures, and before and after of its first pictures into an artifact.

    Args:
        result: What came of the batch.
        title: What it is of: its manifest, its inbox.
        archive: Has the pictures.
        reader: Reads the source images.
    """
    _publish(
        lambda: _batch(result, title, archive, reader),
        artifact_key(title, "batch"),
        "what came of the run, before and after",
    )


def _batch(result: BatchResult, title: str, archive: Archive, reader: SourceReader) -> list[str]:
    new = [each for each in result.images if each.status != "reused"] or list(result.images)
    new.sort(key=lambda each: each.name)
    waiting = result.not_started_names[:SHOWN_NAMES]
    more = result.not_started - len(waiting)
    return [
        f"### {cell(title)}",
        "",
        cell(result.sentence()),
        *([f"\nThe run stopped early: {cell(result.stopped)}"] if result.stopped else ()),
        *([f"\nThe failed assets, to run again: {cell(result.failed_manifest)}"] if result.failed_manifest else ()),
        *(["", f"#### Failed: {result.failed}", ""] if result.failures else ()),
        *(f"- **{cell(each.name)}** ({each.stage}): {cell(each.error)}" for each in result.failures[:SHOWN_FAILURES]),
        *([f"- and {result.failed - SHOWN_FAILURES} more"] if result.failed > SHOWN_FAILURES else ()),
        *(["", f"#### Not started: {result.not_started}", ""] if result.not_started else ()),
        *([", ".join(map(cell, waiting)) + (f" and {more} more" if more else "")] if waiting else ()),
        *(line for each in new[:SHOWN_PICTURES] for line in _picture(each, archive, reader)),
        *([f"\n{len(new) - SHOWN_PICTURES} more are in {cell(archive.url)}"] if len(new) > SHOWN_PICTURES else ()),
    ]


def _picture(archived: ArchivedImage, archive: Archive, reader: SourceReader) -> Iterator[str]:
    """A picture of a batch: its name, source and itself, as far as they can be read now, and the facts below."""
    job: dict[str, str] = {}
    before: bytes | None = None
    after: bytes | None = None
    with suppress(Exception):  # what cannot be read now is said to be so
        job = json.loads(archive.content(archived.sidecar) or b"{}")["job"]
        before = reader.read(job["image"])
    with suppress(Exception):
        after = archive.content(archived.image)
    facts = {
        "prompt": job.get("prompt", "cannot be read now"),
        "picture": archived.image,
        **({"published": archived.published} if archived.published else {}),
    }
    yield from ("", f"#### {cell(archived.name)}: {archived.status}, {usd(archived.cost_usd)} USD", "")
    yield from before_and_after(before, after, THUMBNAIL_WIDTH)
    yield from ("", *listing(facts))


def _publish(lines: Callable[[], Sequence[str]], key: str, description: str) -> None:
    """Makes an artifact; what is paid is archived by now, so nothing that fails here fails the run."""
    try:
        create_markdown_artifact(markdown="\n".join(lines()), key=key, description=description)
    except Exception as error:  # noqa: BLE001
        get_run_logger().warning("no report in the UI: %s", redact(str(error)))


def artifact_key(name: str, kind: str = "before-after") -> str:
    """An artifact's key: lower case, digits and dashes, and different for different names.

    Example:
        >>> artifact_key("Hero/Summer")
        'before-after-hero-summer-ac13c71f'
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[-60:].strip("-")
    return f"{kind}-{slug}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
