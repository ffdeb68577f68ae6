"""How a batch of jobs runs inside a flow: it is planned, approved, produced and, however it ends, reported.

Each flow of many pictures makes its jobs in its own way and passes them to `run_batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from io import BytesIO
from itertools import chain
from typing import NamedTuple, TypeVar, cast

from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled

from prefect_segmind.archive.record import OnKept, OnUnknown, Run, answers_of_earlier_tries, past_requests
from prefect_segmind.batch.approval import Approved
from prefect_segmind.batch.plan import Plan, earlier_tries, make_plan
from prefect_segmind.batch.results import Failure, Results
from prefect_segmind.batch.shards import MAX_SHARDS
from prefect_segmind.batch.tally import TO_FETCH, BatchError, BatchResult, Tally, planned
from prefect_segmind.errors import (
    ApiError,
    ApprovalTimeoutError,
    BudgetReachedError,
    ConfigurationError,
    InvalidKeyError,
    NotApprovedError,
    RunCancelledError,
    SegmindError,
    SharedBudgetReachedError,
    StoreError,
    redact,
)
from prefect_segmind.flows.approval_form import approve
from prefect_segmind.flows.dispatch import LAST_SECONDS, POLICY, dispatch, in_time
from prefect_segmind.flows.shard_report import reported_shard
from prefect_segmind.flows.sharded_run import ShardedRun
from prefect_segmind.jobs.job import Job
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import Ledger
from prefect_segmind.manifest.formats import MAX_TEXT, write_manifest
from prefect_segmind.manifest.model import MAX_ASSETS
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.reporting.artifacts import publish_batch, publish_plan
from prefect_segmind.reporting.events import budget_used, run_stopped
from prefect_segmind.reporting.listener import listener
from prefect_segmind.services import Services
from prefect_segmind.storage.spool import Spool
from prefect_segmind.tasks.failures import TOLD_AT_END
from prefect_segmind.tasks.interrupts import end_run_on_hangup, outlive_the_reader_of_the_log
from prefect_segmind.tasks.left_over import archive_what_is_left_over
from prefect_segmind.tasks.run_context import (
    flow_call,
    refreshed_at,
    run_ledger,
    run_logger,
    warn_once_without_conditional_writes,
)

R = TypeVar("R", bound=BatchResult)
SHOWN_VALUE, SHOWN_VALUES = 60, 120
"""Characters of one variable, and of all together, in the name of a run."""
RESULTS = "results.jsonl"
"""The file with the result of each asset of a run, beside `failed.yaml`."""
BYTES_A_SECOND = 5_000_000
"""How fast the archive is assumed to take that file where a run was interrupted."""
SHOWN_PROBLEMS = 20
"""How many of the jobs that will fail the run's log names."""


@dataclass(frozen=True)
class Terms:
    """The parameters that the flows of many pictures share, beside the jobs. They are checked when it is made.

    Attributes:
        services: Opens archive, upload place, publishing and credentials block.
        max_concurrency: Requests to the API at once, at most.
        requests_per_minute: Requests to the API in any minute, at most; None for the API's own limit.
        budget_usd: What the run may spend, or all runs that share the budget; None for no limit.
        approve_above_usd: A run that may cost more asks a person; the setting if None.
        on_unknown: Whether to send another request after one that may have been billed.
        on_kept: Whether to pay again for a picture that is paid for and lies in the outbox of another machine.
        fail_run_on_failures: Whether the run is Failed where assets failed or are only submitted, or the budget was
            reached.
        dry_run: Only plan.
        shards: In how many runs the assets are made, on other machines; 1 for this one.

    Raises:
        ConfigurationError: A parameter is out of range, or something is not configured; the message names the parameter
            or the setting.
    """

    services: Services
    max_concurrency: int
    requests_per_minute: int | None
    budget_usd: Decimal | None
    approve_above_usd: Decimal | None
    on_unknown: OnUnknown
    on_kept: OnKept
    fail_run_on_failures: bool
    dry_run: bool
    shards: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.max_concurrency <= 512:
            raise ConfigurationError(f"max_concurrency: {self.max_concurrency} is not allowed; allowed is 1 to 512")
        if self.requests_per_minute is not None and self.requests_per_minute < 1:
            raise ConfigurationError(
                f"requests_per_minute: {self.requests_per_minute} is not allowed; allowed is 1 or more"
            )
        if not 1 <= self.shards <= MAX_SHARDS:
            raise ConfigurationError(f"shards: {self.shards} is not allowed; allowed is 1 to {MAX_SHARDS}")
        if self.shards > self.max_concurrency:
            raise ConfigurationError(
                f"max_concurrency: {self.max_concurrency} requests at once are not enough for {self.shards} shards, "
                f"which share them; give {self.shards} or more"
            )
        for name in ("budget_usd", "approve_above_usd"):
            amount: Decimal | None = getattr(self, name)
            if amount is not None and not (amount.is_finite() and amount >= 0):
                raise ConfigurationError(f"{name}: {amount} is not allowed; allowed is 0 or more")
        if not self.dry_run:
            _ = self.services.credentials
        self.services.check()

    @property
    def own_budget_usd(self) -> Decimal | None:
        """What this run alone may spend; None for no limit, or where it shares the budget with others."""
        return None if any(each.kind == "campaign" for each in self.services.budgets) else self.budget_usd


def run_name(what: str) -> str:
    """The name of a flow run, in which people see its variables and whether it is a dry run.

    Args:
        what: The flow and its input, `refresh-assets campaign`.

    Returns:
        `refresh-assets campaign season=autumn (dry run)`, by the parameters `variables`, `defaults` and `dry_run`.
    """
    values = flow_run.parameters
    parts = [values[each] for each in ("variables", "defaults") if isinstance(values.get(each), Mapping)]
    given = (f" {name}={redact(' '.join(str(value).split()))}" for part in parts for name, value in part.items())
    shown = "".join(each[:SHOWN_VALUE] for each in given)[:SHOWN_VALUES]
    return what + shown + (" (dry run)" if values.get("dry_run") is True else "")


class Ended(NamedTuple):
    """A batch that has ended.

    Attributes:
        result: Its counts, its cost, and the first of its pictures and failures.
        stopped: What ended it early, if something did.
        trimmed: Whether a person had limited what it may spend.
        in_place: Names of jobs that were left out because their pictures are in the archive already.
        unusable: Names of jobs whose image cannot be used as it is, with the reason.
    """

    result: BatchResult
    stopped: SegmindError | None
    trimmed: bool
    in_place: frozenset[str]
    unusable: Mapping[str, str]


def run_batch(
    jobs: Spool[Job],
    title: str,
    terms: Terms,
    *,
    skip_archived: bool = False,
    skip_unusable: Collection[str] = (),
    keep_failed: bool = True,
    refused: Sequence[Failure] = (),
    observe: Callable[[ArchivedImage | Failure], None] = lambda _: None,
) -> Ended:
    """Plans a batch, asks whether its cost is approved, produces its assets, and reports.

    Args:
        jobs: The jobs; no two have the same name.
        title: The name of the batch for people: its manifest, its inbox.
        terms: The parameters of the run.
        skip_archived: Whether jobs whose picture is archived under the same name are left out, without a task run.
        skip_unusable: Names of jobs that are also left out if their image cannot be used: it was reported before.
        keep_failed: Whether the jobs that fail are written as a manifest to run again.
        refused: What failed before, for the pages in Prefect's UI and the file of all results.
        observe: Receives every result of a run that was not interrupted, of which `Ended` has the first ones only.

    Raises:
        SegmindError: Before anything was paid.
        BaseException: What has interrupted the run, after its totals were logged.
    """
    end_run_on_hangup()
    outlive_the_reader_of_the_log()
    services, ledger = terms.services, run_ledger()
    is_sharded = terms.shards > 1 and not terms.dry_run
    sharded = ShardedRun(terms.shards, services, terms.max_concurrency) if is_sharded else None
    with (
        Spool[Job | ValidatedJob](ValidatedJob, Job) as entries,
        Spool(Job) as failed_jobs,
        Results() as results,
        reported_shard(services, title) as shard,
    ):
        if sharded:
            sharded.await_earlier()
            archive_what_is_left_over(services)  # what a machine keeps, the others cannot archive
        batch = _plan(jobs, entries, terms, ledger, skip_archived, skip_unusable)
        tally = Tally(batch.plan, failed_jobs, results, ledger, listener().progressed)
        if shard:
            shard.follow(tally, ledger)
        if not batch.plan.total:
            if not terms.dry_run:
                archive_what_is_left_over(services)
            return batch.ended(planned(batch.plan) if terms.dry_run else tally.result())
        apart = [*refused, *batch.skipped_failures()]
        _log_plan(batch.plan)
        if not shard:  # the run that has started it reports, once for all
            publish_plan(batch.plan.with_failures((each.name, each.error) for each in apart), title)
        if terms.dry_run:
            return batch.ended(planned(batch.plan))
        spent_usd = ledger.spent_usd + ledger.unknown_usd
        try:
            wanted = (entry for _, entry in batch.wanted())
            approved = (
                Approved(terms.approve_above_usd)
                if shard
                else approve(batch.plan, wanted, title, terms.approve_above_usd, services, spent_usd)
            )
        except (NotApprovedError, RunCancelledError) as error:
            return batch.ended(tally.result(stopped=error, entries=batch.wanted()), error)
        ledger.limit_usd = approved.budget_usd
        pipeline = _open_pipeline(terms, ledger, batch)

        def report(result: BatchResult) -> None:
            if shard:
                shard.end(result, pipeline.gate.stopped, services.archive.store)
                return
            publish_batch(result.with_failures(apart), title, services.archive, services.reader)
            stopped = pipeline.gate.stopped
            if stopped and not (approved.trimmed and _is_by_own_budget(stopped)):
                run_stopped(stopped, result)

        kept = _Kept(services, results, apart, failed_jobs if keep_failed and not shard else None)
        if own := shard or sharded:
            kept = replace(kept, folder=own.folder)
        try:
            result = _produce(batch, pipeline, tally, kept, report, sharded, terms.requests_per_minute)
        finally:
            if pipeline.gate.purse:
                in_time(pipeline.gate.purse.close)
        archive_what_is_left_over(services)
        for each in results:
            observe(each)
        return batch.ended(result, pipeline.gate.stopped, trimmed=approved.trimmed)


def _is_by_own_budget(stopped: SegmindError) -> bool:
    """Whether a run has stopped at what it may spend itself, to which a person may have limited it."""
    return isinstance(stopped, BudgetReachedError) and not isinstance(stopped, SharedBudgetReachedError)


class _PlannedBatch(NamedTuple):
    """A batch with its plan.

    Attributes:
        plan: The plan, without the jobs that are left out.
        entries: All jobs in their order, each validated unless it will fail.
        in_place: For each of them, 1 if its picture is archived under its name, else 0.
        skip_archived: Whether those are left out.
        skipped: The names of jobs that are left out because their images cannot be used.
        unusable: The names of all jobs whose images cannot be used, with the reason.
        unseen: The fingerprints of the pictures to pay for of which neither archive nor outbox has anything.
        answers: When each paid request of earlier tries was sent, and whether its answer held a picture.
    """

    plan: Plan
    entries: Spool[Job | ValidatedJob]
    in_place: bytearray
    skip_archived: bool
    skipped: Collection[str]
    unusable: Mapping[str, str]
    unseen: set[str]
    answers: Sequence[tuple[datetime, bool]]

    def wanted(self) -> Iterator[tuple[int, Job | ValidatedJob]]:
        """The jobs that are not left out, each with its position among all jobs."""
        for position, each in enumerate(self.entries):
            if not (self.skip_archived and self.in_place[position]) and each.name not in self.skipped:
                yield position, each

    def skipped_failures(self) -> list[Failure]:
        """The failures of the jobs that are left out because their images cannot be used."""
        return [Failure(name=each, stage="validate", error=self.unusable[each]) for each in sorted(self.skipped)]

    def ended(self, result: BatchResult, stopped: SegmindError | None = None, *, trimmed: bool = False) -> Ended:
        """The batch when it has ended; see `Ended` for the arguments."""
        left_out = self.entries if self.skip_archived else ()
        names = frozenset(each.name for position, each in enumerate(left_out) if self.in_place[position])
        return Ended(result, stopped, trimmed, names, self.unusable)


def _plan(
    jobs: Spool[Job],
    entries: Spool[Job | ValidatedJob],
    terms: Terms,
    ledger: Ledger,
    skip_archived: bool,
    skip_unusable: Collection[str],
) -> _PlannedBatch:
    services, (runs, call) = terms.services, flow_call()
    in_place = bytearray()
    unusable: dict[str, str] = {}
    unseen: set[str] = set()
    plan = make_plan(
        jobs,
        entries,
        reader=services.reader,
        archive=services.archive,
        outbox=services.outbox,
        price_usd=services.settings.price_usd,
        on_unknown=terms.on_unknown,
        on_kept=terms.on_kept,
        can_ask=services.can_ask,
        in_place=in_place,
        leave_out=skip_archived,
        flow_runs=runs,
        call=call,
        unusable=unusable,
        folds_case=services.publishing is not None and services.publishing.store.folds_case,
        unseen=unseen,
    )
    left_out = in_place.count(1) if skip_archived else 0
    if left_out:
        run_logger().info("%s have their picture in the archive already", left_out)
    skipped = unusable.keys() & set(skip_unusable)
    answers = _carry_earlier_tries(ledger, entries, services)
    limits = {
        "budget_usd": terms.own_budget_usd,
        "credits_usd": _credits(services),
        "shared": tuple(services.budgets_left()),
    }
    plan = plan.without(left_out, skipped).model_copy(update=limits)
    return _PlannedBatch(plan, entries, in_place, skip_archived, skipped, unusable, unseen, answers)


def _produce(
    batch: _PlannedBatch,
    pipeline: Pipeline,
    tally: Tally,
    kept: _Kept,
    report: Callable[[BatchResult], None],
    sharded: ShardedRun | None,
    requests_per_minute: int | None,
) -> BatchResult:
    """Produces the assets of a batch; however that ends, the listener gets the result and the log the totals.

    They are told before anything else is tried that the archive or Prefect's server may keep waiting.
    """
    addresses: dict[str, str] = {}

    def end() -> BatchResult:
        tally.close()
        result = tally.result(None, pipeline.gate.stopped, batch.wanted())
        if sharded:
            result = result.model_copy(update={"shards": sharded.addresses})
        listener().ended(pipeline.ledger, result)
        return result

    def keep(result: BatchResult, field: str, write: Callable[[], str | None]) -> None:
        if address := write():
            addresses[field] = address
            listener().ended(pipeline.ledger, result.model_copy(update=addresses))

    def elsewhere() -> None:
        if sharded:
            sharded.dispatch(batch.wanted, pipeline, tally, pipeline.ledger.limit_usd, requests_per_minute)

    def finish(result: BatchResult, do: Callable[[Callable[[], object], float], object]) -> BatchResult:
        """Keeps and reports, step by step; `do` gets each, and the seconds that it may take in a run that was ended."""
        do(partial(keep, result, "failed_manifest", kept.keep_failed), LAST_SECONDS)
        do(partial(keep, result, "results", kept.keep_results), LAST_SECONDS + kept.results.size / BYTES_A_SECOND)
        do(lambda: report(result.model_copy(update=addresses)), LAST_SECONDS)
        return result.model_copy(update=addresses)

    ended: BatchResult | None = None
    try:
        in_place = () if batch.skip_archived else batch.in_place
        grace_seconds = kept.services.settings.grace_seconds
        dispatch(batch.wanted, in_place, pipeline, tally, grace_seconds, elsewhere if sharded else None)
        ended = end()
        return finish(ended, lambda step, _: step())
    except BaseException:
        told = ended or end()
        run_logger().warning(told.sentence(), extra=TOLD_AT_END)
        if ended is None:
            finish(told, in_time)
        raise


def _open_pipeline(terms: Terms, ledger: Ledger, batch: _PlannedBatch) -> Pipeline:
    """The pipeline of a batch, whose gate holds its terms."""
    services, plan = terms.services, batch.plan
    purse = services.purse(
        str(flow_run.id),
        pictures=plan.generate + plan.ask + plan.wait,
        requests_per_minute=terms.requests_per_minute,
        announce=budget_used,
        log=run_logger(),
    )
    gate = Gate(
        max_concurrency=terms.max_concurrency,
        requests_per_minute=terms.requests_per_minute,
        ledger=ledger,
        purse=purse,
        earlier_answers=batch.answers,
        stop_after_unusable=services.settings.stop_after_unusable,
        longest_wait_seconds=services.settings.longest_wait_seconds,
        log=run_logger(),
    )
    publisher = services.publisher(refreshed_at(), str(flow_run.id))
    pipeline = services.pipeline(
        gate,
        on_unknown=terms.on_unknown,
        on_kept=terms.on_kept,
        policy=POLICY,
        publisher=publisher,
        unseen=batch.unseen,
        log=run_logger(),
    )
    warn_once_without_conditional_writes(services.archive)
    return pipeline


def _carry_earlier_tries(
    ledger: Ledger, entries: Iterable[Job | ValidatedJob], services: Services
) -> list[tuple[datetime, bool]]:
    """Enters the requests of earlier tries of this flow run in the ledger.

    Pictures that the ledger knows are included: a try that has emptied an inbox leaves none of its jobs to the next.

    Returns:
        When each of those that were paid was sent, and whether its answer held a picture.
    """
    run, price_usd = Run("", flow_call().runs), services.settings.price_usd
    answers: list[tuple[datetime, bool]] = []
    wanted = (each.fingerprint for entry in entries if isinstance(entry, ValidatedJob) for each in entry.known_as)
    for picture, record in earlier_tries(services.archive, chain(wanted, ledger.pictures), run.flow_runs).items():
        ledger.carry(picture, past_requests(run, record.attempts, price_usd), run.id)
        answers += answers_of_earlier_tries(run, record)
    if ledger.spent_usd or ledger.unknown_usd:
        run_logger().info(
            "earlier tries of this run have paid %s USD and may have been billed %s USD more; both count",
            *(usd(ledger.spent_usd), usd(ledger.unknown_usd)),
        )
    return answers


def _credits(services: Services) -> Decimal | None:
    """The account's credits; None where there is no key yet, or the API does not give them.

    Raises:
        InvalidKeyError: The key is refused.
    """
    try:
        with services.credentials.get_client() as client:
            return client.credits()
    except InvalidKeyError:
        raise  # every request would be refused like this one
    except (ApiError, ConfigurationError) as error:
        get_run_logger().info("cannot read the account's credits: %s", error)
        return None


def _log_plan(plan: Plan) -> None:
    log = get_run_logger()
    log.info("%s", "; ".join(f"{title}: {text}" for title, text in plan.facts().items()))
    for warning, count in plan.warnings:
        log.warning("%s asset%s: %s", count, "s" * (count != 1), warning)
    for name, problem in plan.problems[:SHOWN_PROBLEMS]:
        log.warning("%s will fail, unpaid: %s", name, problem, extra=TOLD_AT_END)
    if (failing := plan.fail + plan.kept) > SHOWN_PROBLEMS:
        log.warning("and %s more will fail, unpaid", failing - SHOWN_PROBLEMS, extra=TOLD_AT_END)
    for shortfall in plan.shortfalls():
        log.warning(shortfall)


@dataclass(frozen=True)
class _Kept:
    """What is kept of a run beside its pictures: in the archive, or beside the outbox if the archive is down.

    Attributes:
        services: Opens the archive and the outbox.
        results: The results of the assets.
        refused: What failed before the run.
        failed_jobs: The jobs that failed; None if they are not kept.
        folder: Where it is in `.segmind` of the archive.
    """

    services: Services
    results: Results
    refused: Sequence[Failure]
    failed_jobs: Spool[Job] | None
    folder: str = field(default_factory=lambda: f"runs/{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{str(flow_run.id)[:8]}")

    def keep_failed(self) -> str | None:
        """Writes the failed jobs as a manifest to run again.

        Returns:
            Where it is; None if there are none, or it could not be written.
        """
        jobs = self.failed_jobs
        if not jobs:
            return None
        name, kind, data = "failed.yaml", "application/yaml", b""
        if len(jobs) <= MAX_ASSETS:
            data = "".join(write_manifest(job.model_dump(mode="json") for job in jobs)).encode()
        if not 0 < len(data) <= MAX_TEXT:  # more than is read of YAML
            lines = ('{"templates": false}', *(job.model_dump_json() for job in jobs))
            name, kind, data = "failed.jsonl", "application/jsonl", "\n".join(lines).encode()
        return self._keep(name, data, kind, "the failed jobs")

    def keep_results(self) -> str | None:
        """Writes the results of all assets, a line of JSON for each; see `keep_failed`."""
        if not self.results:
            return None
        if self.results.missing:
            run_logger().warning(
                "the file of results misses %s of them: %s", self.results.missing, self.results.why_missing
            )
        file = BytesIO()
        file.writelines(f"{each.model_dump_json()}\n".encode() for each in self.refused)
        file.writelines(self.results.lines())
        return self._keep(RESULTS, file.getvalue(), "application/jsonl", "the results")

    def _keep(self, name: str, data: bytes, kind: str, what: str) -> str | None:
        log, store, key = run_logger(), self.services.archive.store, f"{self.folder}/{name}"
        try:
            store.put(f".segmind/{key}", data, kind)
            return store.uri(f".segmind/{key}")
        except StoreError as failure:
            path = self.services.outbox.folder.parent / key
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            except OSError as error:
                log.warning("cannot write %s to the archive (%s) or to %s (%s)", what, failure, path, error)
                return None
            log.warning("%s are in %s, because the archive cannot be written: %s", what, path, failure)
            return str(path)


def finish_flow(ended: Ended, result: R, terms: Terms) -> R:
    """What a flow returns or raises, so that its run ends in the state that its batch calls for.

    Args:
        ended: The batch.
        result: Its result, or the flow's own, which may have more.
        terms: The parameters of the run.

    Returns:
        The result: the run is Completed. Where it was cancelled, or not approved, a Cancelled state, from which the
        caller of the flow gets the error.

    Raises:
        BatchError: The run is Failed.
    """
    stopped = ended.stopped
    listener().ended(run_ledger(), result)
    message = result.sentence() + (f"; {stopped}" if stopped else "")
    message += f"; {TO_FETCH}" if result.submitted else ""
    message += f"; the failed ones are in {result.failed_manifest}, to run again" if result.failed_manifest else ""
    error = BatchError(message, result, stopped)
    if isinstance(stopped, RunCancelledError | NotApprovedError) and not isinstance(stopped, ApprovalTimeoutError):
        return cast(R, Cancelled(message=message, data=error))
    by_budget = isinstance(stopped, BudgetReachedError)
    early = stopped and not (ended.trimmed and _is_by_own_budget(stopped))
    undone = result.failed or result.submitted
    failed = undone and not terms.dry_run  # a plan is done when it is made, even if assets will fail
    if (terms.fail_run_on_failures and (failed or early)) or (stopped and not by_budget):
        raise error
    get_run_logger().info(message)
    return result
