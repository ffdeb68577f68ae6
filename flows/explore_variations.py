"""The flow of one image in many variations: a grid of styles, weights and seeds, and a contact sheet of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from itertools import product
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from prefect_segmind.archive.record import OnKept, OnUnknown
from prefect_segmind.batch.results import Failure
from prefect_segmind.batch.tally import BatchResult
from prefect_segmind.errors import ConfigurationError, PreconditionFailedError, SegmindError, redact
from prefect_segmind.flows.batch_run import Terms, finish_flow, run_batch, run_name
from prefect_segmind.flows.form_choices import MagicPromptChoice, ResolutionChoice, StyleChoice
from prefect_segmind.images.contact_sheet import MAX_LABELS, contact_sheet
from prefect_segmind.jobs.job import name_from_image, parse_job
from prefect_segmind.manifest.expansion import Expansion
from prefect_segmind.manifest.loading import expand
from prefect_segmind.manifest.model import FoundImage, Row
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.validate import validate
from prefect_segmind.reporting.artifacts import artifact_key
from prefect_segmind.reporting.markdown import cell, picture
from prefect_segmind.services import Services

SHEET_WIDTH = 1200
"""Pixels of the contact sheet in Prefect's UI; the archive has it in full size."""


class Exploration(BatchResult):
    """The result of a grid of variations: that of a batch, and the contact sheet.

    Attributes:
        contact_sheet: Address of the contact sheet; None if nothing was made.
    """

    contact_sheet: str | None = None


def _flow_run_name() -> str:
    values = flow_run.parameters
    return run_name(f"explore-variations {values.get('name') or name_from_image(str(values.get('image')))}")


@flow(name="explore-variations", flow_run_name=_flow_run_name)
def explore_variations(
    image: str,
    prompt: str,
    name: str | None = None,
    styles: list[StyleChoice] = ["GENERAL", "REALISTIC", "DESIGN", "RENDER_3D", "ANIME"],  # noqa: B006
    weights: list[int] = [25, 50, 75],  # noqa: B006
    seeds: list[int] | None = None,
    resolution: ResolutionChoice = "AUTO",
    magic_prompt_option: MagicPromptChoice = "AUTO",
    negative_prompt: str | None = None,
    allow_extreme_ratio: bool = False,
    archive: str | None = None,
    upload_to: str | None = None,
    max_concurrency: int = 16,
    requests_per_minute: int | None = None,
    budget_usd: Decimal | None = None,
    budget_name: str | None = None,
    approve_above_usd: Decimal | None = None,
    dry_run: bool = False,
    on_unknown: OnUnknown = "repay",
    on_kept: OnKept = "wait",
    credentials_block: str | None = None,
) -> Exploration:
    """Makes one image in every combination of styles, weights and seeds, and a contact sheet of them.

    The plan, with its price, is shown before anything is paid; dry_run shows it and stops there.

    Args:
        image: The source image: a path on the worker, s3://bucket/key, or an http(s):// address.
        prompt: What the pictures should show.
        name: Where the pictures go in the archive; the image's name if left out.
        styles: The styles to try, one row of the contact sheet each.
        weights: The image weights to try, 1 to 100, one column each; higher keeps more of the source image.
        seeds: The seeds to try, 100 to 999999. Left out, it is one, derived from image and prompt and the same for all.
        resolution: Size of the pictures in pixels; AUTO chooses the one that crops the image least.
        magic_prompt_option: Whether the model may rewrite the prompt; OFF makes variations that differ in nothing else.
        negative_prompt: What the pictures should not show; the model may ignore it.
        allow_extreme_ratio: Whether an image wider or taller than 3 to 1 is taken.
        archive: Where pictures go: s3://bucket/prefix or a folder; the worker's setting if left out.
        upload_to: Where the source image goes for the provider to read it: s3://bucket/prefix; the worker's setting if
            left out.
        max_concurrency: Requests to the API at once, at most.
        requests_per_minute: Requests to the API in any minute, at most; the API's own limit is kept in any case.
        budget_usd: What the run may spend.
        budget_name: A name for the budget, which all runs share then that give it and have this archive: budget_usd is
            what they may spend in all.
        approve_above_usd: A run that may cost more pauses and asks a person; the worker's setting if left out.
        dry_run: Only plan: what would be made, and what it would cost.
        on_unknown: Whether to send another request (repay) or not (fail) after one that may have been billed.
        on_kept: Whether to wait or to pay once more (repay) for a picture that is paid for and lies in the outbox of
            another machine.
        credentials_block: Name of a SegmindCredentials block; the worker's setting or environment if left out.

    Returns:
        The counts, the cost, every picture, and where the contact sheet is.

    Raises:
        InvalidJobError: A parameter is wrong; nothing was paid.
        SourceImageError: The image cannot be used; nothing was paid.
        BatchError: Not all pictures were made; its `result` has the contact sheet of those that were.
    """
    services = Services(
        archive=archive,
        upload_to=upload_to,
        credentials_block=credentials_block,
        budget_name=budget_name,
        budget_usd=budget_usd,
    )
    services.check_event_source(image)
    limits = max_concurrency, requests_per_minute, budget_usd, approve_above_usd
    terms = Terms(services, *limits, on_unknown, on_kept, fail_run_on_failures=True, dry_run=dry_run)
    title = name or name_from_image(image)
    unlisted = services.settings.allow_unlisted_resolution
    base = {
        "name": title,
        "image": image,
        "prompt": prompt,
        "resolution": resolution,
        "magic_prompt_option": magic_prompt_option,
        "negative_prompt": negative_prompt,
        "allow_extreme_ratio": allow_extreme_ratio,
    }
    # One seed for all: a seed derived from each job would change the pictures in more than style and weight.
    derived = validate(parse_job(base, allow_unlisted_resolution=unlisted), services.reader).seed
    axes: dict[str, list[Any]] = {
        "style_type": list(dict.fromkeys(styles)),
        "image_weight": list(dict.fromkeys(weights)),
        "seed": list(dict.fromkeys(seeds or [derived])),
    }
    if max(len(axes["style_type"]) * len(axes["seed"]), len(axes["image_weight"])) > MAX_LABELS:
        raise ConfigurationError(f"the contact sheet has room for {MAX_LABELS} rows and columns; give fewer variations")
    head = {"templates": False, "variants": axes}
    expansion = Expansion(head, {}, lambda *_: [FoundImage(image)], allow_unlisted_resolution=unlisted)
    with expand(title, expansion, [Row("the grid", base)]) as grid:
        made: dict[str, str] = {}

        def observe(result: ArchivedImage | Failure) -> None:
            if isinstance(result, ArchivedImage):
                made[result.name] = result.image

        ended = run_batch(grid.jobs, title, terms, observe=observe)
        pictures = {
            (job.style_type.value, job.image_weight, job.seed): made[job.name] for job in grid.jobs if job.name in made
        }
    sheet = _publish_sheet(title, image, prompt, axes, pictures, services) if pictures else None
    return finish_flow(ended, Exploration(**dict(ended.result), contact_sheet=sheet), terms)


def _publish_sheet(
    title: str,
    image: str,
    prompt: str,
    axes: Mapping[str, list[Any]],
    pictures: Mapping[tuple[Any, ...], str],
    services: Services,
) -> str | None:
    """Puts the contact sheet beside the pictures and into an artifact; a failure costs no more than the sheet.

    Args:
        title: The folder of the pictures in the archive.
        image: The source image.
        prompt: The prompt, for the title of the sheet.
        axes: The styles, weights and seeds.
        pictures: The address of each picture by its style, weight and seed.
        services: Opens the archive and reads the source image.

    Returns:
        The address of the sheet; None if it could not be made.
    """
    archive, log = services.archive, get_run_logger()
    rows = list(product(axes["style_type"], axes["seed"]))

    def read(row: int, column: int) -> bytes | None:
        style, seed = rows[row]
        uri = pictures.get((style, axes["image_weight"][column], seed))
        return archive.content(uri) if uri else None

    source = None
    try:
        with suppress(SegmindError):
            source = services.reader.read(image)
        sheet = contact_sheet(
            [style if len(axes["seed"]) == 1 else f"{style}, seed {seed}" for style, seed in rows],
            [f"weight {weight}" for weight in axes["image_weight"]],
            read,
            source=source,
            title=f"{title}: {prompt}",
        )
        key = f"{title}/contact-sheet-{hashlib.sha256(sheet).hexdigest()[:16]}.jpg"
        with suppress(PreconditionFailedError):  # the same sheet is there already
            archive.store.put(key, sheet, "image/jpeg", if_absent=True)
        uri = archive.store.uri(key)
        lines = (f"### {cell(title)}", "", cell(uri), "", picture("contact sheet", sheet, SHEET_WIDTH))
        create_markdown_artifact(
            markdown="\n".join(lines), key=artifact_key(title, "contact-sheet"), description="all variations"
        )
    except Exception as error:  # noqa: BLE001
        log.warning("cannot make the contact sheet: %s", redact(str(error)))
        return None
    log.info("contact sheet: %s", uri)
    return uri


if __name__ == "__main__":
    explore_variations.serve(name="on-demand")
