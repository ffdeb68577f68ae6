"""The flow of an inbox: whatever images people put there become pictures, by one template."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from prefect_segmind.archive.record import OnUnknown
from prefect_segmind.batch.tally import BatchResult, Failure
from prefect_segmind.errors import ConfigurationError, InvalidJobError, StoreError
from prefect_segmind.flows.batch_run import Terms, finish_flow, run_batch, run_name
from prefect_segmind.flows.dispatch import task_runner
from prefect_segmind.flows.form_choices import MagicPromptChoice, ResolutionChoice, StyleChoice
from prefect_segmind.inbox.inbox import InboxFile, Memory
from prefect_segmind.inbox.open_inbox import open_inbox
from prefect_segmind.jobs.job import Job, parse_job, suffix_from_image
from prefect_segmind.manifest.expansion import Expansion
from prefect_segmind.manifest.image_paths import named
from prefect_segmind.manifest.model import FoundImage, Row
from prefect_segmind.reporting.events import asset_failed
from prefect_segmind.services import Services
from prefect_segmind.storage.spool import Spool

_EMPTY = "it has been empty for an hour; put it there again, or remove it"


class InboxResult(BatchResult):
    """What a visit to an inbox came to.

    Attributes:
        archived_before: Files whose picture was in the archive already, so that there was nothing to do.
        still_written: Files that were still being written; the next visit looks again.
        ignored: What is no image by its name, is a link, or cannot be read.
        unreadable: Files and folders that cannot be read, each with the reason.
        moved: Where done files are now.
        moved_failed: Where bad files are now.
    """

    archived_before: int = 0
    still_written: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    moved_failed: tuple[str, ...] = ()


class _Bad(NamedTuple):
    """A file of which nothing can be made.

    Attributes:
        file: The file.
        name: What its picture would be called.
        error: What is wrong, and what to do.
        movable: Whether the file is what is wrong, and not the template.
    """

    file: InboxFile
    name: str
    error: str
    movable: bool = True

    @property
    def failure(self) -> Failure:
        """What the result tells of it."""
        return Failure(name=self.name, stage="validate", error=self.error)


@flow(
    name="process-inbox",
    flow_run_name=lambda: run_name(f"process-inbox {flow_run.parameters.get('inbox')}"),
    task_runner=task_runner(),  # type: ignore[arg-type]
)
def process_inbox(
    inbox: str,
    prompt: str,
    name: str = "inbox",
    image_weight: int = 50,
    style_type: StyleChoice = "GENERAL",
    resolution: ResolutionChoice = "AUTO",
    seed: int | None = None,
    magic_prompt_option: MagicPromptChoice = "AUTO",
    negative_prompt: str | None = None,
    allow_extreme_ratio: bool = False,
    variables: dict[str, Any] | None = None,
    move_done: bool = False,
    move_failed: bool = False,
    settle_seconds: float = 10.0,
    archive: str | None = None,
    upload_to: str | None = None,
    publish_to: str | None = None,
    max_concurrency: int = 16,
    requests_per_minute: int | None = None,
    budget_usd: Decimal | None = None,
    approve_above_usd: Decimal | None = None,
    dry_run: bool = False,
    on_unknown: OnUnknown = "repay",
    fail_run_on_failures: bool = False,
    credentials_block: str | None = None,
) -> InboxResult:
    """Makes a picture of each new image in an inbox. What the archive has is skipped, and bad files are told.

    A file that is still being written is left for the next visit. Each version of a bad file is one event
    prefect-segmind.asset.failed, however often it is seen.

    Args:
        inbox: Where people put images: s3://bucket/prefix or a folder on the worker. Folders in it are looked into.
        prompt: What the pictures should show; a template, in which (stem) is the file's name: {{ (stem) }} on a table.
        name: The folder of the archive where the pictures go, each under the path of its file; a template too. Of two
            files with one name, such as cup.jpg and cup.png, the later one is passed over and told, unless (stem) and
            (suffix) tell them apart: {{ (stem) }}-{{ (suffix) }}.
        image_weight: 1 to 100; higher keeps more of the source image.
        style_type: The style of the pictures.
        resolution: Size of the pictures in pixels; AUTO chooses the one that crops each image least.
        seed: 100 to 999999, the same for all; derived from each job if left out. There is no random one here: every
            visit would pay again for the files that are still there.
        magic_prompt_option: Whether the model may rewrite the prompt; OFF is reproducible.
        negative_prompt: What the pictures should not show; the model may ignore it.
        allow_extreme_ratio: Whether an image wider or taller than 3 to 1 is taken.
        variables: Values for the templates, such as {"season": "autumn"}.
        move_done: Whether files are moved to done/ in the inbox when their picture is archived.
        move_failed: Whether bad files are moved to failed/ in the inbox; otherwise they stay, and each result tells.
        settle_seconds: A file counts as whole when it does not change for so long. Where no file is new nobody waits.
        archive: Where pictures go: s3://bucket/prefix or a folder; the worker's setting if left out.
        upload_to: Where source images go for the provider to read them: s3://bucket/prefix; the worker's setting if
            left out.
        publish_to: Where each finished picture is copied to, under an address that stays: s3://bucket/live gives
            live/{name}.png.
        max_concurrency: Requests to the API at once, at most.
        requests_per_minute: Requests to the API in any minute, at most; the API's own limit is kept in any case.
        budget_usd: What the run may spend; at the limit nothing new is sent, and the next visit goes on.
        approve_above_usd: A run that may cost more pauses and asks a person; the worker's setting if left out.
        dry_run: Only plan: what would be made, and what it would cost.
        on_unknown: Whether to send another request (repay) or not (fail) after one that may have been billed.
        fail_run_on_failures: Whether the run ends as Failed where files failed or the budget was reached; otherwise it
            is Completed, and the result tells.
        credentials_block: Name of a SegmindCredentials block; the worker's setting or environment if left out.

    Returns:
        The counts, the cost, and what came of each file.

    Raises:
        ConfigurationError: There is no such inbox, or a setting is missing.
        InvalidJobError: The template has mistakes; nothing was paid.
        BatchError: Not all pictures were made, if that is to be a failure.
    """
    services = Services(
        archive=archive, upload_to=upload_to, publish_to=publish_to, credentials_block=credentials_block
    )
    terms = Terms(
        services=services,
        max_concurrency=max_concurrency,
        requests_per_minute=requests_per_minute,
        budget_usd=budget_usd,
        approve_above_usd=approve_above_usd,
        on_unknown=on_unknown,
        fail_run_on_failures=fail_run_on_failures,
        dry_run=dry_run,
    )
    terms.check()
    if not 0 <= settle_seconds <= 3600:
        raise ConfigurationError(f"settle_seconds: {settle_seconds} is not allowed; allowed is 0 to 3600")
    log = get_run_logger()
    place = open_inbox(inbox, lambda: services.s3)
    memory = Memory(services.archive.store, place.url, name)
    look = place.look(settle_seconds, known=memory.settled)
    log.info(
        "%s: %s images, %s still being written, %s other files",
        *(inbox, len(look.settled), len(look.unsettled), len(look.ignored)),
    )
    for line in look.unreadable:
        log.warning("skipped: %s", line)
    template = {
        "image_weight": image_weight,
        "style_type": style_type,
        "resolution": resolution,
        "seed": seed,
        "magic_prompt_option": magic_prompt_option,
        "negative_prompt": negative_prompt,
        "allow_extreme_ratio": allow_extreme_ratio,
        "prompt": prompt,
    }
    unlisted = services.settings.allow_unlisted_resolution
    # A mistake of the template is told at once, whatever lies in the inbox.
    any_name = f"{name}/any" if "{" not in name else "any"
    parse_job({**template, "image": "any.jpg", "name": any_name}, allow_unlisted_resolution=unlisted)
    with Spool(Job) as jobs:
        files: dict[str, InboxFile] = {}
        names = (f"{name}/{each.name}" for each in named([(file.location, file.below) for file in look.empty]))
        bad = [_Bad(file, each, _EMPTY) for file, each in zip(look.empty, names, strict=True)]
        warnings: dict[str, None] = {}
        arrived = sorted(look.settled, key=lambda file: (file.arrived, file.below))
        found = named([(each.location, each.below) for each in arrived])
        for file, image in zip(arrived, found, strict=True):
            job, mistake = _job(image, {**template, "name": name}, variables or {}, unlisted, warnings)
            if job is None:
                bad.append(_Bad(file, f"{name}/{image.name}", mistake, movable=False))
            elif job.name in files:  # the first keeps the address that it has
                bad.append(_Bad(file, job.name, _taken(job.name, files[job.name], file)))
            else:
                files[job.name] = file
                jobs.append(job)
        for warning in warnings:
            log.warning(warning)
        known = {each for each, file in files.items() if memory.has_reported(file)}
        for each in bad:
            _report(each, memory, dry_run=dry_run)
        if not dry_run:
            _keep(memory, look.settled, [*(each.file for each in bad), *(files[each] for each in known)])
        # What is archived may still be unpublished, so then all of it is looked at again. What fails is still there.
        ended = run_batch(
            *(jobs, inbox, terms),
            skip_archived=publish_to is None,
            skip_unusable=known,
            keep_failed=False,
            refused=[each.failure for each in bad],
        )
    left_out = [_Bad(files[each], each, error) for each, error in ended.unusable.items() if each in known]
    for each in left_out:
        _report(each, memory, dry_run=dry_run)
    bad += left_out
    done = [*ended.in_place, *(each.name for each in ended.result.images)]
    whole = ended.result.with_failures([each.failure for each in bad])
    moved: dict[str, tuple[str, ...]] = {}
    if not dry_run:
        failed = [each.name for each in ended.result.failures if each.name in ended.unusable]
        bad += [_Bad(files[each], each, ended.unusable[each]) for each in failed]
        _keep(memory, look.settled, [each.file for each in bad])
        if move_done:
            moved["moved"] = tuple(_moved(place.move_done, [files[each] for each in done]))
        if move_failed:
            moved["moved_failed"] = tuple(_moved(place.move_failed, [each.file for each in bad if each.movable]))
    result = InboxResult(
        **dict(whole),
        **moved,
        archived_before=len(ended.in_place),
        still_written=look.unsettled,
        ignored=look.ignored,
        unreadable=look.unreadable,
    )
    return finish_flow(ended, result, terms)


def _job(
    found: FoundImage,
    template: Mapping[str, Any],
    variables: Mapping[str, Any],
    unlisted: bool,
    warnings: dict[str, None],
) -> tuple[Job | None, str]:
    """The job of one file by the template, or what is wrong with it; no file stands in the way of another."""
    expansion = Expansion({}, variables, lambda *_: [found], allow_unlisted_resolution=unlisted)
    jobs = list(expansion.jobs(Row("the template", {**template, "image": "*"})))
    expansion.warn_of_unused()
    warnings.update(dict.fromkeys(expansion.warnings.lines))
    return (jobs[0], "") if jobs else (None, "; ".join(expansion.mistakes.lines))


def _taken(name: str, first: InboxFile, later: InboxFile) -> str:
    """The mistake of a file whose picture would have the name of another one's."""
    apart = suffix_from_image(first.below) != suffix_from_image(later.below)
    remedy = ", or put {{ (stem) }}-{{ (suffix) }} into the flow's name" if apart else ""
    return f"name: {name} is the name of {first.below}, which came first; rename {later.below}{remedy}"


def _report(bad: _Bad, memory: Memory, *, dry_run: bool) -> None:
    """Tells of a bad file: whoever listens once, the log at each visit."""
    known = memory.has_reported(bad.file)
    get_run_logger().log(logging.INFO if known else logging.WARNING, "%s cannot be used: %s", bad.file.below, bad.error)
    if not known and not dry_run:
        asset_failed(bad.name, InvalidJobError(f"{bad.file.location}: {bad.error}"), "validate")


def _keep(memory: Memory, settled: Iterable[InboxFile], reported: Iterable[InboxFile]) -> None:
    """Keeps what was seen; where that fails the next visit waits, and tells of bad files, once more."""
    try:
        memory.keep(settled, reported)
    except StoreError as error:
        get_run_logger().warning("what this visit has seen is not remembered: %s", error)


def _moved(move: Callable[[InboxFile], str | None], files: Iterable[InboxFile]) -> Iterable[str]:
    """Moves files; one that cannot be moved stays, and the next visit sees it again."""
    log = get_run_logger()
    for file in files:
        try:
            moved = move(file)
        except StoreError as error:
            log.warning("%s stays in the inbox: %s", file.below, error)
            continue
        if moved is None:
            log.info("%s has changed meanwhile and stays for the next visit", file.below)
        else:
            yield moved


if __name__ == "__main__":
    process_inbox.serve(name="on-demand")
