"""The artifacts of a run in Prefect's UI: before and after, plan and result.

Pictures are small JPEGs inside the artifact itself, so that it never expires and holds no signed address.
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
from prefect_segmind.batch.tally import TO_FETCH, BatchResult
from prefect_segmind.errors import redact
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.pay import GeneratedImage
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.unsettled import TITLES, Reconciled
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.reporting.markdown import before_and_after, cell, listing, rows, table

THUMBNAIL_WIDTH = 320
"""Pixels; two thumbnails fit side by side in Prefect's UI on a screen of 1300."""
SHOWN_PICTURES = 12
"""Pictures in the report of a batch; each takes about 40 kB in Prefect's database."""
SHOWN_NAMES = 500
"""Assets in the report's list of those that were not started."""
SHOWN_JOBS = 100
"""Jobs in the list of a plan."""
SHOWN_FAILURES = 100
"""Failures in the list of a plan or report; the file of all results has all of them."""


def publish_before_after(
    job: ValidatedJob, archived: ArchivedImage, generated: GeneratedImage, archive: Archive, reader: SourceReader
) -> None:
    """Creates an artifact of the flow run with both pictures, under a key made from the job's name.

    Args:
        job: The job.
        archived: Its picture in the archive.
        generated: Its picture as it was generated.
        archive: Holds the picture.
        reader: Reads the source image.
    """

    def page() -> list[str]:
        before = reader.read(job.job.image)
        after = archive.content(archived.image)
        if after is None:
            raise FileNotFoundError(archived.image)
        return _before_after(job, archived, generated, before, after)

    _publish(page, artifact_key(archived.name), f"{cell(archived.name)}, before and after")


def _before_after(
    job: ValidatedJob, archived: ArchivedImage, generated: GeneratedImage, before: bytes | None, after: bytes
) -> list[str]:
    """The lines of a page with both pictures side by side and the facts below."""
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
    return [
        f"### {cell(archived.name)}",
        "",
        *before_and_after(before, after, THUMBNAIL_WIDTH),
        "",
        *listing(facts),
        *(f"- {cell(warning)}" for warning in (*job.warnings, *generated.picture.notices)),
    ]


def publish_plan(plan: Plan, title: str) -> None:
    """Creates an artifact of the flow run with the plan of a batch.

    Args:
        plan: The plan.
        title: The manifest or inbox.
    """
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
    _publish(lambda: lines, artifact_key(title, "plan"), "what the run will do and cost")


def publish_batch(result: BatchResult, title: str, archive: Archive, reader: SourceReader) -> None:
    """Creates an artifact of the flow run with a batch's counts, failures and first pictures, before and after.

    Args:
        result: The result of the batch.
        title: The manifest or inbox.
        archive: Holds the pictures.
        reader: Reads the source images.
    """
    key, description = artifact_key(title, "batch"), "the result of the run, before and after"
    _publish(lambda: _batch(result, title, archive, reader), key, description)


def _batch(result: BatchResult, title: str, archive: Archive, reader: SourceReader) -> list[str]:
    new = [each for each in result.images if each.status != "reused"] or list(result.images)
    new.sort(key=lambda each: each.name)
    waiting = result.not_started_names[:SHOWN_NAMES]
    more = result.not_started - len(waiting)
    made = result.generated + result.recovered or result.reused
    return [
        f"### {cell(title)}",
        "",
        cell(result.sentence()),
        *([f"\nThe run stopped early: {cell(result.stopped)}"] if result.stopped else ()),
        *([f"\nThe result of each asset: {cell(result.results)}"] if result.results else ()),
        *([f"\nThe failed assets, to run again: {cell(result.failed_manifest)}"] if result.failed_manifest else ()),
        *(
            ["", f"#### Shards: {len(result.shards)}", "", *(f"- <{each}>" for each in result.shards)]
            if result.shards
            else ()
        ),
        *(["", f"#### Failed: {result.failed}", ""] if result.failures else ()),
        *(f"- **{cell(each.name)}** ({each.stage}): {cell(each.error)}" for each in result.failures[:SHOWN_FAILURES]),
        *([f"- and {result.failed - SHOWN_FAILURES} more"] if result.failed > SHOWN_FAILURES else ()),
        *_submitted(result),
        *(["", f"#### Not started: {result.not_started}", ""] if result.not_started else ()),
        *([", ".join(map(cell, waiting)) + (f" and {more} more" if more else "")] if waiting else ()),
        *(line for each in new[:SHOWN_PICTURES] for line in _picture(each, archive, reader)),
        *([f"\n{made - SHOWN_PICTURES} more are in {cell(archive.url)}"] if made > SHOWN_PICTURES else ()),
    ]


def _submitted(result: BatchResult) -> Iterator[str]:
    """The lines about assets whose pictures are still to be fetched."""
    if not result.submitted:
        return
    shown = result.submitted_names[:SHOWN_NAMES]
    more = f" and {result.submitted - len(shown)} more" if result.submitted > len(shown) else ""
    yield from ("", f"#### Submitted: {result.submitted}", "")
    yield f"The provider has accepted their requests and not finished them: {TO_FETCH}."
    yield from ("", ", ".join(map(cell, shown)) + more)


def publish_reconciled(result: Reconciled) -> None:
    """Creates an artifact of the flow run with what has become known of each request that was looked up.

    Args:
        result: The requests.
    """
    shown = result.pictures[:SHOWN_NAMES]
    lines = (
        f"### {cell(result.archive)}",
        "",
        cell(result.sentence()),
        "",
        *(rows(TITLES, [each.cells() for each in shown]) if shown else ()),
        *([f"\n{len(result.pictures) - len(shown)} more"] if len(result.pictures) > len(shown) else ()),
        "",
        *(f"- **{cell(each.title)}**: {cell(each.image or each.reason or '')}" for each in shown),
        *(f"- {cell(each)}" for each in result.problems[:SHOWN_FAILURES]),
    )
    _publish(lambda: lines, artifact_key(result.archive, "reconcile"), "what became of requests of unknown outcome")


def _picture(archived: ArchivedImage, archive: Archive, reader: SourceReader) -> Iterator[str]:
    """The lines for a picture of a batch: before and after, as far as they can be read now, and the facts below."""
    job: dict[str, str] = {}
    before: bytes | None = None
    after: bytes | None = None
    with suppress(Exception):  # the page shows that it cannot be read now
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
    """Creates an artifact; a failure is only a warning, as the pictures are paid and archived by now."""
    try:
        create_markdown_artifact(markdown="\n".join(lines()), key=key, description=description)
    except Exception as error:  # noqa: BLE001
        get_run_logger().warning("no report in the UI: %s", redact(str(error)))


def artifact_key(name: str, kind: str = "before-after") -> str:
    """The key of an artifact: lower case, digits and dashes, and unique for each name.

    Args:
        name: The name of the job, manifest or inbox.
        kind: The kind of artifact, which the key begins with.

    Example:
        >>> artifact_key("Hero/Summer")
        'before-after-hero-summer-ac13c71f'
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[-60:].strip("-")
    return f"{kind}-{slug}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
