"""The flow of an inbox: each image that people put there becomes a picture, by one template."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from prefect_segmind.archive.record import OnKept, OnUnknown
from prefect_segmind.batch.results import Failure
from prefect_segmind.batch.tally import BatchResult
from prefect_segmind.errors import ConfigurationError, InvalidJobError, StoreError
from prefect_segmind.flows.batch_run import Terms, finish_flow, run_batch, run_name
from prefect_segmind.flows.form_choices import MagicPromptChoice, ResolutionChoice, StyleChoice
from prefect_segmind.inbox.inbox import InboxFile, Look, Memory
from prefect_segmind.inbox.open_inbox import open_inbox
from prefect_segmind.jobs.job import Job, parse_job, suffix_from_image
from prefect_segmind.manifest.expansion import Expansion
from prefect_segmind.manifest.image_paths import named
from prefect_segmind.manifest.model import FoundImage, Row
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.reporting.events import asset_failed
from prefect_segmind.services import Services
from prefect_segmind.storage.spool import Spool

_EMPTY = "it has been empty for an hour; put it there again, or remove it"


class InboxResult(BatchResult):
    """The result of a visit to an inbox: that of a batch, and what became of the files.

    Attributes:
        archived_before: Files whose picture was in the archive already, so that there was nothing to do.
        still_written: Files that were still being written; the next visit checks them again.
        ignored: Files that are not images by their names, links, and files that cannot be read.
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
    """A file that cannot become a picture.

    Attributes:
        file: The file.
        name: The name that its picture would have.
        error: What is wrong, and what to do.
        movable: Whether it is the file that is wrong, and not the template.
    """

    file: InboxFile
    name: str
    error: str
    movable: bool = True

    @property
    def failure(self) -> Failure:
        """The failure in the result of the visit."""
        return Failure(name=self.name, stage="validate", error=self.error)


@flow(
    name="process-inbox",
    flow_run_name=lambda: run_name(f"process-inbox {flow_run.parameters.get('inbox')}"),
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
    budget_name: str | None = None,
    approve_above_usd: Decimal | None = None,
    dry_run: bool = False,
    on_unknown: OnUnknown = "repay",
    on_kept: OnKept = "wait",
    fail_run_on_failures: bool = False,
    credentials_block: str | None = None,
) -> InboxResult:
    """Makes a picture of each new image in an inbox. What the archive has is skipped, and bad files are reported.

    A file that is still being written is left for the next visit. Each version of a bad file is one event
    prefect-segmind.asset.failed, however often it is seen.

    Args:
        inbox: Where people put images: s3://bucket/prefix or a folder on the worker. Folders in it are looked into.
        prompt: What the pictures should show; a template, in which (stem) is the file's name: {{ (stem) }} on a table.
        name: The folder of the archive where the pictures go, each under the path of its file; a template too. Of two
            files with one name, such as cup.jpg and cup.png, the later one is skipped and reported, unless (stem) and
            (suffix) distinguish them: {{ (stem) }}-{{ (suffix) }}.
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
        move_failed: Whether bad files are moved to failed/ in the inbox; otherwise they stay, named in each result.
        settle_seconds: A file counts as whole when it has not changed for so long. Where no file is new nothing waits.
        archive: Where pictures go: s3://bucket/prefix or a folder; the worker's setting if left out.
        upload_to: Where source images go for the provider to read them: s3://bucket/prefix; the worker's setting if
            left out.
        publish_to: Where each finished picture is copied to, under an address that stays: s3://bucket/live gives
            live/{name}.png.
        max_concurrency: Requests to the API at once, at most.
        requests_per_minute: Requests to the API in any minute, at most; the API's own limit is kept in any case.
        budget_usd: What the run may spend; at the limit nothing new is sent, and the next visit goes on.
        budget_name: A name for the budget, which all runs share then that give it and have this archive: budget_usd is
            what they may spend in all.
        approve_above_usd: A run that may cost more pauses and asks a person; the worker's setting if left out.
        dry_run: Only plan: what would be made, and what it would cost.
        on_unknown: Whether to send another request (repay) or not (fail) after one that may have been billed.
        on_kept: Whether to wait or to pay once more (repay) for a picture that is paid for and lies in the outbox of
            another machine.
        fail_run_on_failures: Whether the run ends as Failed where files failed or are only submitted, or the budget was
            reached; otherwise it is Completed, and the result names them.
        credentials_block: Name of a SegmindCredentials block; the worker's setting or environment if left out.

    Returns:
        The counts, the cost, the first pictures and failures, the address of a file with all of them, and what was
        moved.

    Raises:
        ConfigurationError: The inbox does not exist, or a setting is missing.
        InvalidJobError: The template has mistakes; nothing was paid.
        BatchError: Not all pictures were made, and `fail_run_on_failures` is set.
    """
    services = Services(
        archive=archive,
        upload_to=upload_to,
        publish_to=publish_to,
        credentials_block=credentials_block,
        budget_name=budget_name,
        budget_usd=budget_usd,
    )
    limits = max_concurrency, requests_per_minute, budget_usd, approve_above_usd
    terms = Terms(services, *limits, on_unknown, on_kept, fail_run_on_failures, dry_run)
    if not 0 <= settle_seconds <= 3600:
        raise ConfigurationError(f"settle_seconds: {settle_seconds} is not allowed; allowed is 0 to 3600")
    template = {
        "name": name,
        "image_weight": image_weight,
        "style_type": style_type,
        "resolution": resolution,
        "seed": seed,
        "magic_prompt_option": magic_prompt_option,
        "negative_prompt": negative_prompt,
        "allow_extreme_ratio": allow_extreme_ratio,
        "prompt": prompt,
    }
    place = open_inbox(inbox, lambda: services.s3)
    memory = Memory(services.archive.store, place.url, name)
    look = place.look(settle_seconds, known=memory.settled)
    _log_look(look, inbox)
    unlisted = services.settings.allow_unlisted_resolution
    # A mistake in the template fails the run even if there is no file.
    any_name = f"{name}/any" if "{" not in name else "any"
    parse_job({**template, "image": "any.jpg", "name": any_name}, allow_unlisted_resolution=unlisted)
    with Spool(Job) as jobs:
        files, bad = _make_jobs(look, template, variables or {}, jobs, unlisted)
        known = {each for each, file in files.items() if memory.has_reported(file)}
        for each in bad:
            _report(each, memory, dry_run)
        if not dry_run:
            _remember(memory, look, [*(each.file for each in bad), *(files[each] for each in known)])
        made: list[str] = []
        failed: list[str] = []

        def observe(result: ArchivedImage | Failure) -> None:
            (made if isinstance(result, ArchivedImage) else failed).append(result.name)

        # A picture that is archived may still be unpublished, so where pictures are published none is skipped.
        ended = run_batch(
            jobs,
            inbox,
            terms,
            skip_archived=publish_to is None,
            skip_unusable=known,
            keep_failed=False,  # the files are still in the inbox
            refused=[each.failure for each in bad],
            observe=observe,
        )
    for job_name, error in ended.unusable.items():
        if job_name in known:
            bad.append(_Bad(files[job_name], job_name, error))
            _report(bad[-1], memory, dry_run)
    whole = ended.result.with_failures([each.failure for each in bad])
    moved: dict[str, tuple[str, ...]] = {}
    if not dry_run:
        bad += [_Bad(files[each], each, ended.unusable[each]) for each in failed if each in ended.unusable]
        _remember(memory, look, [each.file for each in bad])
        if move_done:
            moved["moved"] = tuple(_moved(place.move_done, [files[each] for each in (*ended.in_place, *made)]))
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


def _log_look(look: Look, inbox: str) -> None:
    log = get_run_logger()
    counts = len(look.settled), len(look.unsettled), len(look.ignored)
    log.info("%s: %s images, %s still being written, %s other files", inbox, *counts)
    for line in look.unreadable:
        log.warning("skipped: %s", line)


def _make_jobs(
    look: Look, template: Mapping[str, Any], variables: Mapping[str, Any], jobs: Spool[Job], unlisted: bool
) -> tuple[dict[str, InboxFile], list[_Bad]]:
    """Makes the jobs of a visit, in the order in which their files arrived.

    Args:
        look: The files.
        template: The fields that all jobs share.
        variables: For the template.
        jobs: Takes the jobs.
        unlisted: Whether other resolutions than the documented ones are allowed.

    Returns:
        The file of each job, by the job's name; and the files that cannot become a picture.
    """
    files: dict[str, InboxFile] = {}
    bad = [_Bad(file, f"{template['name']}/{_found(file).name}", _EMPTY) for file in look.empty]
    warnings: dict[str, None] = {}
    for file in sorted(look.settled, key=lambda file: (file.arrived, file.below)):
        # One expansion for each file, so that a wrong one does not stop the others.
        found = _found(file)
        expansion = Expansion({}, variables, lambda *_, found=found: [found], allow_unlisted_resolution=unlisted)
        made = list(expansion.jobs(Row("the template", {**template, "image": "*"})))
        expansion.warn_of_unused()
        warnings.update(dict.fromkeys(expansion.warnings.lines))
        if not made:
            mistakes = "; ".join(expansion.mistakes.lines)
            bad.append(_Bad(file, f"{template['name']}/{found.name}", mistakes, movable=False))
        elif made[0].name in files:  # the first one keeps the address that it has
            bad.append(_Bad(file, made[0].name, _taken(made[0].name, files[made[0].name], file)))
        else:
            files[made[0].name] = file
            jobs.append(made[0])
    for warning in warnings:
        get_run_logger().warning(warning)
    return files, bad


def _found(file: InboxFile) -> FoundImage:
    return named([(file.location, file.below)])[0]


def _taken(name: str, first: InboxFile, later: InboxFile) -> str:
    """The mistake of a file whose picture would have the name of another one's."""
    apart = suffix_from_image(first.below) != suffix_from_image(later.below)
    remedy = ", or put {{ (stem) }}-{{ (suffix) }} into the flow's name" if apart else ""
    return f"name: {name} is the name of {first.below}, which came first; rename {later.below}{remedy}"


def _report(bad: _Bad, memory: Memory, dry_run: bool) -> None:
    """Reports a bad file: by an event once, in the log at each visit."""
    known = memory.has_reported(bad.file)
    get_run_logger().log(logging.INFO if known else logging.WARNING, "%s cannot be used: %s", bad.file.below, bad.error)
    if not known and not dry_run:
        asset_failed(bad.name, InvalidJobError(f"{bad.file.location}: {bad.error}"), "validate")


def _remember(memory: Memory, look: Look, reported: Iterable[InboxFile]) -> None:
    """Keeps what was seen for the next visit; where that fails it waits, and reports bad files, once more."""
    try:
        memory.keep(look.settled, reported)
    except StoreError as error:
        get_run_logger().warning("cannot keep what this visit has seen for the next one: %s", error)


def _moved(move: Callable[[InboxFile], str | None], files: Iterable[InboxFile]) -> Iterable[str]:
    """Moves files; one that cannot be moved stays, and the next visit finds it again."""
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
