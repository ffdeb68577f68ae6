"""How a batch of jobs runs inside a flow: planned, approved, produced, reported, whatever ends it.

Each flow of many pictures makes its jobs in its own way and hands them over here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import reduce
from types import MappingProxyType
from typing import NamedTuple, TypeVar, cast

from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled

from prefect_segmind import services
from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.archive.record import OnUnknown, Run, answers_of_earlier_tries, sums_of_earlier_tries
from prefect_segmind.batch.plan import Plan, earlier_tries, make_plan
from prefect_segmind.batch.tally import BatchError, BatchResult, Failure, Tally, planned
from prefect_segmind.credentials import load_credentials
from prefect_segmind.errors import (
    ApiError,
    ApprovalTimeoutError,
    BudgetReachedError,
    ConfigurationError,
    InvalidKeyError,
    NotApprovedError,
    RunCancelledError,
    SegmindError,
    StoreError,
    redact,
)
from prefect_segmind.flows.approval_form import approve
from prefect_segmind.flows.dispatch import POLICY, dispatch
from prefect_segmind.jobs.job import Job
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import Sums
from prefect_segmind.manifest.formats import MAX_TEXT, write_manifest
from prefect_segmind.manifest.model import MAX_ASSETS
from prefect_segmind.money import usd
from prefect_segmind.pipeline.pipeline import shared
from prefect_segmind.pipeline.sums import inherited, wanted_before
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.reporting.artifacts import publish_batch, publish_plan
from prefect_segmind.reporting.events import run_stopped
from prefect_segmind.settings import load_settings
from prefect_segmind.storage.spool import Spool
from prefect_segmind.tasks.interrupts import end_run_on_hangup
from prefect_segmind.tasks.run_context import TOLD_AT_END, flow_call, flow_runs, mention_conditions, refreshed_at

R = TypeVar("R", bound=BatchResult)
SHOWN_VALUE, SHOWN_VALUES = 60, 120
"""Characters of a variable, and of all of them, in the name of a run."""
SHOWN_PROBLEMS = 20
"""Jobs that will fail which the run's log names."""


@dataclass(frozen=True)
class Terms:
    """On what terms a batch runs: the parameters that its flows share; they are explained there."""

    archive: str | None
    upload_to: str | None
    publish_to: str | None
    credentials_block: str | None
    max_concurrency: int
    requests_per_minute: int | None
    budget_usd: Decimal | None
    approve_above_usd: Decimal | None
    on_unknown: OnUnknown
    fail_run_on_failures: bool
    dry_run: bool

    def check(self) -> None:
        """Refuses terms that make no sense, and what is not configured, before anything is read or done.

        Raises:
            ConfigurationError: The message names the parameter or the setting.
        """
        if not 1 <= self.max_concurrency <= 512:
            raise ConfigurationError(f"max_concurrency: {self.max_concurrency} is not allowed; allowed is 1 to 512")
        if self.requests_per_minute is not None and self.requests_per_minute < 1:
            told = f"requests_per_minute: {self.requests_per_minute} is not allowed; allowed is 1 or more"
            raise ConfigurationError(told)
        for name in ("budget_usd", "approve_above_usd"):
            amount: Decimal | None = getattr(self, name)
            if amount is not None and not (amount.is_finite() and amount >= 0):
                raise ConfigurationError(f"{name}: {amount} is not allowed; allowed is 0 or more")
        if not self.dry_run:
            load_credentials(self.credentials_block)
        services.open_outbox(services.open_archive(self.archive))
        services.open_publisher(self.publish_to)


def run_name(what: str) -> str:
    """The name of a flow run, by which people tell seasons and dry runs apart.

    Args:
        what: What the flow is and what it works on.

    Returns:
        `refresh-assets campaign season=autumn (dry run)`, by the parameters `variables`, `defaults` and `dry_run`.
    """
    values = flow_run.parameters
    parts = [values[each] for each in ("variables", "defaults") if isinstance(values.get(each), Mapping)]
    given = (f" {name}={redact(' '.join(str(value).split()))}" for part in parts for name, value in part.items())
    told = "".join(each[:SHOWN_VALUE] for each in given)[:SHOWN_VALUES]
    return what + told + (" (dry run)" if values.get("dry_run") is True else "")


class Ended(NamedTuple):
    """A batch that has ended.

    Attributes:
        result: What it came to.
        stopped: What ended it early, if something did.
        trimmed: Whether a person had limited what it may spend.
        in_place: Names of jobs that were left out, for their pictures are in the archive already.
        unusable: Names of jobs whose image cannot be used as it is, with the reason.
    """

    result: BatchResult
    stopped: SegmindError | None = None
    trimmed: bool = False
    in_place: frozenset[str] = frozenset()
    unusable: Mapping[str, str] = MappingProxyType({})


def run_batch(
    jobs: Spool[Job],
    title: str,
    terms: Terms,
    *,
    skip_archived: bool = False,
    skip_unusable: Collection[str] = (),
    keep_failed: bool = True,
    refused: Sequence[Failure] = (),
) -> Ended:
    """Plans a batch, asks if its cost must be approved, produces it, and reports.

    Args:
        jobs: What is asked for, no name twice.
        title: What people call it: the manifest, the inbox.
        terms: How it runs.
        skip_archived: Whether jobs whose picture is archived under their very name are left out, without a task run.
        skip_unusable: Names of jobs that are left out too if their image cannot be used: somebody knows already.
        keep_failed: Whether the jobs that fail are written as a manifest to run again.
        refused: What had failed before, for the pages in Prefect's UI.

    Raises:
        SegmindError: Before anything was paid.
        BaseException: What has interrupted it, with the sums so far in its `batch`.
    """
    end_run_on_hangup()
    opened, settings, log = services.open_archive(terms.archive), load_settings(), get_run_logger()
    places: set[str] = set()
    runs = flow_runs()
    unusable: dict[str, str] = {}
    with Spool[Job | ValidatedJob](ValidatedJob, Job) as entries, Spool(Job) as failed_jobs:
        plan = make_plan(
            jobs,
            entries,
            reader=services.source_reader(terms.credentials_block),
            archive=opened,
            outbox=services.open_outbox(opened),
            price_usd=settings.price_usd,
            on_unknown=terms.on_unknown,
            in_place=places if skip_archived else None,
            flow_runs=runs,
            call=flow_call(),
            unusable=unusable,
        )
        skipped = unusable.keys() & set(skip_unusable)
        known_as = (each.fingerprint for entry in entries if isinstance(entry, ValidatedJob) for each in entry.known_as)
        wanted_ever = wanted_before(flow_call(), frozenset(known_as))
        before, this_try = earlier_tries(opened, wanted_ever, runs), Run("", runs)
        earlier = {
            each: sums_of_earlier_tries(this_try, record.attempts, settings.price_usd)
            for each, record in before.items()
        }
        spent_before = reduce(Sums.plus, earlier.values(), Sums())
        if spent_before.requests_sent:
            log.info(
                "earlier tries of this run have paid %s USD and may have been billed %s USD more, which counts",
                *(usd(spent_before.cost_usd), usd(spent_before.possibly_billed_usd)),
            )
        limits = {"budget_usd": terms.budget_usd, "credits_usd": _credits(terms.credentials_block)}
        left_out = {
            "total": plan.total - len(places) - len(skipped),
            "reuse": plan.reuse - len(places),
            "fail": plan.fail - len(skipped),
            "problems": tuple(each for each in plan.problems if each[0] not in skipped),
            "jobs": tuple(each for each in plan.jobs if each.name not in skipped),
        }
        plan = plan.model_copy(update=limits | left_out)
        in_place = frozenset(place.rpartition("/")[0] for place in places)
        if in_place:
            log.info("%s have their picture in the archive already", len(in_place))
        tally = Tally(plan, failed_jobs)
        tally.carry(spent_before)
        if not plan.total:
            nothing = planned(plan) if terms.dry_run else tally.result()
            return Ended(nothing, in_place=in_place, unusable=unusable)
        _tell(plan)
        apart = [*refused, *(Failure(name=each, stage="validate", error=unusable[each]) for each in sorted(skipped))]
        publish_plan(plan.with_failures((each.name, each.error) for each in apart), title)
        if terms.dry_run:
            return Ended(planned(plan), in_place=in_place, unusable=unusable)

        def is_left_out(entry: Job | ValidatedJob) -> bool:
            return entry.place in places if isinstance(entry, ValidatedJob) else entry.name in skipped

        def wanted() -> Iterator[Job | ValidatedJob]:
            return (each for each in entries if not is_left_out(each))

        try:
            approved = approve(
                *(plan, wanted(), title, terms.approve_above_usd, terms.credentials_block, terms.publish_to),
                spent_usd=spent_before.cost_usd + spent_before.possibly_billed_usd,
            )
        except (NotApprovedError, RunCancelledError) as error:
            result = tally.result(stopped=error, entries=wanted())
            return Ended(result, error, in_place=in_place, unusable=unusable)
        gate = Gate(
            max_concurrency=terms.max_concurrency,
            requests_per_minute=terms.requests_per_minute,
            budget_usd=approved.budget_usd,
            earlier=spent_before,
            earlier_answers=(each for record in before.values() for each in answers_of_earlier_tries(this_try, record)),
            stop_after_unusable=settings.stop_after_unusable,
            longest_wait_seconds=settings.longest_wait_seconds,
            say=log.warning,
        )
        generation = services.open_generation(
            *(terms.archive, terms.upload_to, terms.credentials_block),
            on_unknown=terms.on_unknown,
            policy=POLICY,
            gate=gate,
        )
        mention_conditions(opened)
        publisher = services.open_publisher(terms.publish_to, refreshed_at(), flow_run.id)
        production = services.open_production(generation, terms.upload_to, terms.credentials_block, publisher)
        token = shared.set(production)

        def carry() -> None:
            told = inherited(opened.url, runs)
            tally.carry(reduce(Sums.plus, (sent for each, sent in earlier.items() if each not in told), Sums()))

        def summed() -> BatchResult:
            failed = _keep_failed(failed_jobs, opened, generation.outbox) if keep_failed else None
            return tally.result(failed, gate.stopped, wanted())

        try:
            dispatch(wanted(), gate, tally, settings.grace_seconds)
            carry()
            result = summed()
            publish_batch(result.with_failures(apart), title, opened, terms.credentials_block)
            if gate.stopped and not (approved.trimmed and isinstance(gate.stopped, BudgetReachedError)):
                run_stopped(gate.stopped, result)
        except BaseException as error:
            # Whatever ends the run, what it has paid is told.
            carry()
            tally.close(gate.budget)
            result = summed()
            log.warning(result.sentence(), extra=TOLD_AT_END)
            vars(error)["batch"] = BatchError(result.sentence(), result, gate.stopped)
            raise
        finally:
            shared.reset(token)
        return Ended(result, gate.stopped, approved.trimmed, in_place, unusable)


def _credits(credentials_block: str | None) -> Decimal | None:
    """What the account has; None where there is no key yet, or the API does not tell.

    Raises:
        InvalidKeyError: The key is refused.
    """
    try:
        with load_credentials(credentials_block).get_client() as client:
            return client.credits()
    except InvalidKeyError:
        raise  # every request would be refused like this one
    except (ApiError, ConfigurationError) as error:
        get_run_logger().info("the account's credits are not known: %s", error)
        return None


def _tell(plan: Plan) -> None:
    """Puts the plan into the run's log."""
    log = get_run_logger()
    log.info("%s", "; ".join(f"{title}: {text}" for title, text in plan.facts().items()))
    for warning, count in plan.warnings:
        log.warning("%s asset%s: %s", count, "s" * (count != 1), warning)
    for name, problem in plan.problems[:SHOWN_PROBLEMS]:
        log.warning("%s will fail, unpaid: %s", name, problem, extra=TOLD_AT_END)
    if plan.fail > SHOWN_PROBLEMS:
        log.warning("and %s more will fail, unpaid", plan.fail - SHOWN_PROBLEMS, extra=TOLD_AT_END)
    for shortfall in plan.shortfalls():
        log.warning(shortfall)


def _keep_failed(jobs: Spool[Job], archive: Archive, outbox: Outbox) -> str | None:
    """Writes the failed jobs as a manifest to run again, into the archive, or beside the outbox if that is down."""
    log = get_run_logger()
    if not len(jobs):
        return None
    name, kind, data = "failed.yaml", "application/yaml", b""
    if len(jobs) <= MAX_ASSETS:
        data = "".join(write_manifest(job.model_dump(mode="json") for job in jobs)).encode()
    if not 0 < len(data) <= MAX_TEXT:  # more than is read of YAML
        lines = ('{"templates": false}', *(job.model_dump_json() for job in jobs))
        name, kind, data = "failed.jsonl", "application/jsonl", "\n".join(lines).encode()
    key = f"runs/{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{str(flow_run.id)[:8]}/{name}"
    try:
        archive.store.put(f".segmind/{key}", data, kind, if_absent=True)
        return archive.store.uri(f".segmind/{key}")
    except StoreError as refused:
        path = outbox.folder.parent / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            log.warning("the failed jobs cannot be written, neither to the archive (%s) nor here (%s)", refused, error)
            return None
        log.warning("the failed jobs are written to %s, for the archive says: %s", path, refused)
        return str(path)


def conclude(ended: Ended, result: R, terms: Terms) -> R:
    """Ends the flow run as its batch deserves: what a flow returns.

    Args:
        ended: The batch.
        result: Its result, or that of the flow, which may tell more.
        terms: How it ran.

    Returns:
        The result: the run is Completed. Where it was cancelled, or not approved, a Cancelled state, from which the
        caller of the flow gets the error.

    Raises:
        BatchError: The run is Failed.
    """
    stopped = ended.stopped
    told = result.sentence() + (f"; {stopped}" if stopped else "")
    told += f"; the failed ones are in {result.failed_manifest}, to run again" if result.failed_manifest else ""
    error = BatchError(told, result, stopped)
    if isinstance(stopped, RunCancelledError | NotApprovedError) and not isinstance(stopped, ApprovalTimeoutError):
        return cast(R, Cancelled(message=told, data=error))
    by_budget = isinstance(stopped, BudgetReachedError)
    early = stopped and not (by_budget and ended.trimmed)
    failed = result.failed and not terms.dry_run  # a plan is done when it is made, whatever it says
    if (terms.fail_run_on_failures and (failed or early)) or (stopped and not by_budget):
        raise error
    get_run_logger().info(told)
    return result
