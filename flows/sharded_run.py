"""A batch on several machines: its jobs are split into shards, and each is a run of the flow's own deployment.

Prefect starts these runs wherever the deployment's work pool has a worker. This run waits for them, has one that dies
run again, and takes their results over as if it had made the pictures itself.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import DeploymentStatus, FlowRun, WorkPoolStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling, Crashed
from prefect.utilities.urls import url_for

from prefect_segmind.archive.archive import READERS
from prefect_segmind.archive.record import Run, past_requests
from prefect_segmind.batch.results import Failure
from prefect_segmind.batch.shards import (
    ATTEMPTS,
    Fate,
    ShardFolder,
    ShardKey,
    ShardReport,
    added_up,
    fate,
    parse_result,
    shard_of,
    shares,
)
from prefect_segmind.batch.tally import BatchError, Tally, to_run_again
from prefect_segmind.errors import (
    AccountError,
    BudgetReachedError,
    ConfigurationError,
    RunCancelledError,
    SegmindError,
    StoreError,
)
from prefect_segmind.jobs.job import Job
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.services import Services
from prefect_segmind.storage.open_store import is_s3
from prefect_segmind.storage.spool import Spool
from prefect_segmind.tasks.run_context import current_flow_run, run_logger

SHARDED = "refresh-assets/sharded"
"""The deployment whose runs a sharded run starts, if it is not itself the run of a deployment."""
POLL_SECONDS = 5.0
"""Seconds between two looks at the shards."""
STILL_WAITING_SECONDS = 300.0
"""Seconds between two lines in the log about shards that nobody has begun."""
AT_END_SECONDS = 5.0
"""How much longer than their grace shards are waited for when a command is interrupted."""
NO_LIMIT_USD = Decimal(1_000_000)
"""The limit of an account that is there for a common rate alone."""

_PAGE = 200  # flow runs that Prefect's server gives at once


@dataclass(eq=False)
class _ShardRun:
    """One run of a shard, as last seen."""

    key: ShardKey
    id: UUID
    state: str = "SCHEDULED"
    message: str = ""
    report: ShardReport | None = None
    fate: Fate = Fate.WAITS
    _seen: object = None
    _changed: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        return self.fate not in (Fate.WAITS, Fate.WORKS)

    @property
    def has_ended(self) -> bool:
        return self.report is not None and self.report.ended

    @property
    def address(self) -> str:
        return url_for("flow-run", obj_id=self.id) or f"flow run {self.id}"

    def look(self, run: FlowRun, folder: ShardFolder) -> None:
        """Brings it up to date."""
        state, now = run.state, time.monotonic()
        if state is not None:
            self.state, self.message = state.type.value, state.message or ""
        try:
            self.report = folder.report(self.key) or self.report
        except StoreError:  # nothing is known of it at this moment
            self._changed = now
            return
        seen = (state and state.id, self.report and self.report.number)
        if seen != self._seen:
            self._seen, self._changed = seen, now
        self.fate = fate(self.state, now - self._changed, has_ended=self.has_ended)


class ShardedRun:
    """The shards of this flow run.

    Args:
        shards: Their number.
        services: Opens the archive.
        max_concurrency: The requests at once of all shards together.

    Raises:
        ConfigurationError: There is no server, no deployment or no worker for them, or the archive's store does not
            honour conditional writes. Nothing was paid.
    """

    def __init__(self, shards: int, services: Services, max_concurrency: int) -> None:
        if not PREFECT_API_URL.value():
            raise ConfigurationError(
                "shards: other machines take their runs from a Prefect server, and none is set; set PREFECT_API_URL, "
                "or leave shards out"
            )
        if caution := services.archive.store.conditions.caution:
            raise ConfigurationError(
                f"shards: the archive {services.archive.url} {caution}; use a store that honours conditional writes, "
                "such as S3, or leave shards out"
            )
        run = current_flow_run()
        if run is None:
            raise ConfigurationError("shards: they are runs of a flow's deployment; call the flow, not its function")
        self._run = run
        self._shards = shards
        self._services = services
        self._max_concurrency = max_concurrency
        self._folder = ShardFolder(services.archive.store, _folder_of(run))
        with get_client(sync_client=True) as client:
            self._deployment = _deployment(client, run)
            _require_room(client, self._deployment, own=run.deployment_id is not None)
        self._runs: list[_ShardRun] = []
        self._begun = dict.fromkeys(range(1, shards + 1), 0)  # the attempts of each shard in all tries of this run
        self._allowed = dict.fromkeys(range(1, shards + 1), ATTEMPTS)
        self._parameters: dict[int, dict[str, Any]] = {}
        self._is_cancelled = False
        self._told_waiting = time.monotonic()

    @property
    def folder(self) -> str:
        """The folder of this run below `.segmind/` of the archive, the same in all its tries."""
        return f"runs/{self._folder.run}"

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses of their runs in Prefect's UI, in the order in which they were started."""
        return tuple(each.address for each in self._runs)

    def await_earlier(self) -> None:
        """Waits for runs of shards that an earlier try of this flow run has started, and that are still under way."""
        earlier = self._earlier()
        for each in earlier:
            self._begun[each.key.number] = max(self._begun.get(each.key.number, 0), each.key.attempt)
        self._allowed = {number: begun + ATTEMPTS for number, begun in self._begun.items()}
        live = [each for each in earlier if not each.is_over]
        if not live:
            return
        run_logger().info(
            "%s shards of an earlier try are still under way, and are waited for: %s",
            *(len(live), ", ".join(each.address for each in live)),
        )
        self._runs = live
        try:
            self._wait(lambda: False, again=False)
        except BaseException:
            self._cancel()
            raise
        finally:
            self._runs = []

    def dispatch(
        self,
        wanted: Callable[[], Iterable[tuple[int, Job | ValidatedJob]]],
        pipeline: Pipeline,
        tally: Tally,
        limit_usd: Decimal | None,
        requests_per_minute: int | None,
    ) -> None:
        """Starts a run for each shard, waits for the last to end, and takes over their results.

        When this run is interrupted or cancelled, so are they: they send nothing new, and have their grace to archive
        what is in flight.

        Args:
            wanted: The assets in their order, each with its position.
            pipeline: Whose gate is stopped when the run is, and which reads what dead shards have left.
            tally: Counts the outcomes.
            limit_usd: What all shards together may spend; None for no limit.
            requests_per_minute: How many requests all shards together may send; None for the API's own limit.
        """
        manifests, counts = self._write_manifests(wanted, tally)
        self._make_parameters(manifests, counts, limit_usd, requests_per_minute)
        try:
            for number in self._parameters:
                self._start(number)
            self._wait(lambda: pipeline.gate.stopped is not None, tally=tally, pipeline=pipeline)
        except BaseException:
            self._cancel()
            with suppress(Exception):
                # A worker kills this run when its grace is over; in a terminal there is time for late reports.
                seconds = self._services.settings.grace_seconds + (0 if self._run.deployment_id else AT_END_SECONDS)
                self._wait(lambda: True, tally=tally, pipeline=pipeline, seconds=seconds)
            raise
        finally:
            self._add_up(wanted, pipeline, tally)

    # --- starting -----------------------------------------------------------------------------------------------------

    def _write_manifests(
        self, wanted: Callable[[], Iterable[tuple[int, Job | ValidatedJob]]], tally: Tally
    ) -> tuple[dict[int, str], dict[int, int]]:
        """Writes the manifest of each shard that has jobs; gives their addresses and the numbers of their jobs."""
        local, example = 0, ""
        with ExitStack() as stack:
            jobs = {number: stack.enter_context(Spool(Job)) for number in range(1, self._shards + 1)}
            for position, entry in wanted():
                if tally.has_ended(position):
                    continue
                job = to_run_again(entry)
                if "://" not in job.image:
                    job = job.model_copy(update={"image": str(Path(job.image).absolute())})
                    local, example = local + 1, example or job.image
                jobs[shard_of(entry, self._shards)].append(job)
            manifests = {
                number: self._folder.write_manifest(number, self._shards, each.lines())
                for number, each in jobs.items()
                if each
            }
            counts = {number: len(jobs[number]) for number in manifests}
        shared = [f"{local} images, such as {example}"] if local else []
        shared += [] if is_s3(self._services.archive.url) else [f"the archive {self._services.archive.url}"]
        if shared and manifests:
            run_logger().warning(
                "every worker must find under the same path: %s; what it does not find fails there, unpaid",
                " and ".join(shared),
            )
        return manifests, counts

    def _make_parameters(
        self,
        manifests: Mapping[int, str],
        counts: Mapping[int, int],
        limit_usd: Decimal | None,
        requests_per_minute: int | None,
    ) -> None:
        """What each shard is started with: the parameters of this run, but for its jobs and its part of the limits."""
        given = {name: _plain(value) for name, value in self._run.parameters.items()}
        given |= {
            "archive": self._services.archive.url,
            "variables": None,
            "defaults": None,
            "shards": 1,
            "dry_run": False,
            "fail_run_on_failures": False,
            "approve_above_usd": None,
        }
        has_campaign = any(each.kind == "campaign" for each in self._services.budgets)
        if not has_campaign and (limit_usd is not None or requests_per_minute is not None):
            limit = NO_LIMIT_USD if limit_usd is None else limit_usd
            given |= {"budget_name": f"run-{self._run.id}", "budget_usd": str(limit)}
        at_once = shares(self._max_concurrency, max(1, len(manifests)))
        price = self._services.settings.price_usd
        pictures = int(limit_usd / price) if limit_usd is not None and price else 0
        paid_for = shares(pictures, max(1, len(manifests)))
        for index, (number, manifest) in enumerate(manifests.items()):
            own = {"manifest": manifest, "max_concurrency": at_once[index]}
            if has_campaign and limit_usd is not None:  # a run draws from one campaign, so its own limit is divided
                own["approve_above_usd"] = str(price * paid_for[index])
            self._parameters[number] = given | own
        if manifests:
            run_logger().info(
                "%s assets in %s shards, run by %s", sum(counts.values()), len(manifests), self._deployment.name
            )

    def _start(self, number: int) -> None:
        key = ShardKey(str(self._run.id), number, self._begun[number] + 1)
        started = cast(
            FlowRun,
            run_deployment(
                self._deployment.id,
                parameters=self._parameters[number],
                timeout=0,
                as_subflow=True,
                idempotency_key=str(key),
            ),
        )
        self._begun[number] += 1
        run = _ShardRun(key, started.id)
        self._runs.append(run)
        run_logger().info("shard %s of %s: %s", number, self._shards, run.address)

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _wait(
        self,
        is_stopped: Callable[[], bool],
        *,
        again: bool = True,
        tally: Tally | None = None,
        pipeline: Pipeline | None = None,
        seconds: float | None = None,
    ) -> None:
        """Waits until all runs are over; starts a shard again whose run has died, unless the whole run is stopped."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            if is_stopped():
                self._cancel()
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - the shards work on without the server's answer
                run_logger().debug("Prefect's server does not answer: %s", error)
            for each in [run for run in self._runs if run.fate is Fate.DIED and self._is_last(run)]:
                self._bury(each)
                left = again and not self._is_cancelled and each.state != "CANCELLING"
                if left and not each.has_ended and self._begun[each.key.number] < self._allowed[each.key.number]:
                    self._start(each.key.number)
            if tally and pipeline:
                counts, totals = added_up([each.report for each in self._runs if each.report])
                pipeline.ledger.report_elsewhere(totals)
                tally.report_elsewhere(counts)
            if all(each.is_over for each in self._runs):
                return
            self._tell_who_waits()
            left_seconds = POLL_SECONDS if until is None else min(POLL_SECONDS, until - time.monotonic())
            if left_seconds <= 0:
                return
            time.sleep(left_seconds)

    def _look(self) -> None:
        live = {each.id: each for each in self._runs if not each.is_over}
        if not live:
            return
        with get_client(sync_client=True) as client:
            found = client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=list(live))))
        for run in found:
            live[run.id].look(run, self._folder)

    def _is_last(self, run: _ShardRun) -> bool:
        return run.key.attempt == self._begun[run.key.number] and run in self._runs

    def _bury(self, run: _ShardRun) -> None:
        """Has Prefect show a run as crashed whose worker is dead, and says so, once."""
        if run.message.startswith(_DEAD):
            return
        why = run.message or "no worker has it any more"
        if run.state != "CRASHED":
            why = f"{_DEAD}: nothing has been heard of it for too long"
            with suppress(Exception), get_client(sync_client=True) as client:
                client.set_flow_run_state(run.id, Crashed(message=why), force=True)
        run.message = f"{_DEAD}: {why.removeprefix(f'{_DEAD}: ')}"
        run_logger().warning("shard %s of %s: %s (%s)", run.key.number, self._shards, run.message, run.address)

    def _tell_who_waits(self) -> None:
        waiting = sum(each.fate is Fate.WAITS for each in self._runs)
        if waiting and time.monotonic() - self._told_waiting > STILL_WAITING_SECONDS:
            self._told_waiting = time.monotonic()
            run_logger().warning(
                "%s shards wait for a worker of the work pool %s; the pool's limit counts this run too",
                *(waiting, self._deployment.work_pool_name or "(none)"),
            )

    def _cancel(self) -> None:
        if self._is_cancelled:
            return
        self._is_cancelled = True
        for each in self._runs:
            if not each.is_over:
                with suppress(Exception), get_client(sync_client=True) as client:
                    client.set_flow_run_state(each.id, Cancelling(message="the run that has started it was ended"))

    def _earlier(self) -> list[_ShardRun]:
        """The runs of shards that were started by this flow run before."""
        found: list[_ShardRun] = []
        parent = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[self._run.id]))
        with get_client(sync_client=True) as client:
            while page := client.read_flow_runs(flow_run_filter=parent, limit=_PAGE, offset=len(found)):
                for run in page:
                    key = ShardKey.parse(run.idempotency_key) or ShardKey(str(self._run.id), 0, 0)
                    each = _ShardRun(key, run.id)
                    each.look(run, self._folder)
                    found.append(each)
                if len(page) < _PAGE:
                    break
        return [each for each in found if each.key.number]

    # --- adding up ----------------------------------------------------------------------------------------------------

    def _add_up(
        self, wanted: Callable[[], Iterable[tuple[int, Job | ValidatedJob]]], pipeline: Pipeline, tally: Tally
    ) -> None:
        """Takes over the shards' results; what one has done that did not end in order is read from the archive."""
        last = {each.key.number: each for each in self._runs}
        # By the records, once they are final; a run that is still under way is told by its own report.
        lines: dict[str, bytes] = {}
        dead: dict[int, list[_ShardRun]] = {number: [] for number in last}
        reports = list[ShardReport]()
        for each in self._runs:
            results = self._results(each)
            if results is not None:
                lines |= results
            # In a later try of both nobody can tell from the sums alone who reports which request; the records can.
            is_mixed = bool(each.report and each.report.tries > 1 and self._run.run_count > 1)
            if each.is_over and (results is None or is_mixed):
                dead[each.key.number].append(each)
            elif each.report:
                reports.append(each.report)
        pipeline.ledger.report_elsewhere(added_up(reports)[1])
        tally.report_elsewhere(Counter())
        open_ended: list[tuple[int, Job | ValidatedJob, bytes | None]] = []
        for position, entry in wanted():
            if tally.has_ended(position):
                continue
            line, number = lines.pop(entry.name, None), shard_of(entry, self._shards)
            if dead.get(number):
                open_ended.append((position, entry, line))
            elif line is not None:
                tally.take_over(position, entry, parse_result(line))
        with ThreadPoolExecutor(READERS, thread_name_prefix="segmind-shards") as pool:
            log = run_logger()  # a thread has no run of its own
            found = pool.map(lambda each: self._settled(each[1], each[2], dead, last, pipeline, log), open_ended)
            for (position, entry, _), result in zip(open_ended, found, strict=True):
                if result is not None:
                    tally.take_over(position, entry, result)
        for each in sorted(last.values(), key=_weight):
            if each.report and each.report.stopped and not self._is_cancelled:
                pipeline.gate.stop(self._stopped(each, each.report))

    def _results(self, run: _ShardRun) -> dict[str, bytes] | None:
        """The results of a run of a shard by the names of its jobs; None if it has not ended with them."""
        if run.report is None or not run.report.ended:
            return None
        try:
            return self._folder.results(run.report)
        except StoreError:
            return None

    def _settled(
        self,
        entry: Job | ValidatedJob,
        line: bytes | None,
        dead_runs: Mapping[int, Sequence[_ShardRun]],
        last_runs: Mapping[int, _ShardRun],
        pipeline: Pipeline,
        log: logging.Logger,
    ) -> ArchivedImage | Failure | None:
        """The result of an asset of a shard with runs that did not end in order, and what those have paid for it.

        None if it was not started.
        """
        archive = pipeline.archiving.archive
        number = shard_of(entry, self._shards)
        dead, last = dead_runs[number], last_runs[number]
        told = None if line is None else parse_result(line)
        is_new = isinstance(told, ArchivedImage) and told.status == "generated"
        # As a later try of theirs, which reports what they have sent.
        run = Run(uuid4().hex, tuple((str(each.id), _LATER) for each in dead))
        image: ArchivedImage | None = None
        if isinstance(entry, ValidatedJob):
            with suppress(SegmindError):
                for known in entry.known_as:
                    if found := archive.read(known.fingerprint):
                        past = past_requests(run, found.record.attempts, entry.price_usd)
                        pipeline.ledger.carry(known.fingerprint, past, run.id)
                if not is_new and not isinstance(told, Failure):
                    image = pipeline.reuse_in_place(entry, run, log)
        if image is not None or told is not None:
            return image or told
        if last.has_ended:
            return None
        why = last.message or "it has ended without its results"
        message = (
            f"shard {last.key.number} of {self._shards} did not come to it: {why} ({last.address}); run the same "
            "again: nothing is paid for twice that is known to be paid for"
        )
        return Failure(name=entry.name, stage="generate", error=message)

    def _stopped(self, run: _ShardRun, report: ShardReport) -> SegmindError:
        kind, why = _kind_of(report), f"shard {run.key.number} of {self._shards}: {report.stopped}"
        # Where a person has cancelled one shard, this run was not.
        return SegmindError(why) if issubclass(kind, RunCancelledError | BatchError) else kind(why)


_DEAD = "its run has died"
_LATER = 1_000_000  # the number of a try after all others


def _weight(run: _ShardRun) -> tuple[int, int]:
    """Which of several reasons to stop is told: first what the account says, then budgets, then the rest."""
    kind = _kind_of(run.report) if run.report else SegmindError
    return (0 if issubclass(kind, AccountError) else 1 if issubclass(kind, BudgetReachedError) else 2, run.key.number)


def _kind_of(report: ShardReport) -> type[SegmindError]:
    """The class of the error that has stopped a shard."""

    def below(kind: type[SegmindError]) -> Iterator[type[SegmindError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from below(each)

    return next((each for each in below(SegmindError) if each.__name__ == report.stopped_by), SegmindError)


def _plain(value: Any) -> Any:
    """A parameter as a JSON value."""
    return str(value) if isinstance(value, Decimal) else value


def _folder_of(run: FlowRun) -> str:
    """The folder of a flow run in `.segmind/runs/`, the same in all its tries."""
    created = f"{run.created:%Y%m%dT%H%M%SZ}-" if run.created else ""
    return f"{created}{str(run.id)[:8]}"


def _deployment(client: SyncPrefectClient, run: FlowRun) -> DeploymentResponse:
    if run.deployment_id is not None:
        return client.read_deployment(run.deployment_id)
    try:
        return client.read_deployment_by_name(SHARDED)
    except ObjectNotFound:
        raise ConfigurationError(
            f"shards: there is no deployment {SHARDED} on Prefect's server at {PREFECT_API_URL.value()}, whose runs "
            "they would be; deploy it with prefect deploy --all --prefect-file deployments/prefect.yaml, or leave "
            "shards out"
        ) from None


def _require_room(client: SyncPrefectClient, deployment: DeploymentResponse, *, own: bool) -> None:
    """Checks that somebody takes the runs of a deployment, and that there is a place for them beside this one.

    Args:
        client: Asks the server.
        deployment: The deployment.
        own: Whether this run is one of its runs, and takes a place itself.

    Raises:
        ConfigurationError: They would wait for ever.
    """
    name, limits = deployment.work_pool_name, [("the deployment", _limit_of(deployment))]
    if name is None:
        if not own and deployment.status != DeploymentStatus.READY:
            raise ConfigurationError(
                f"shards: nobody takes the runs of {SHARDED}: start python deployments/serve.py, or deploy it to a "
                "work pool, or leave shards out"
            )
    else:
        pool = client.read_work_pool(name)
        if pool.is_paused:
            raise ConfigurationError(f"shards: the work pool {name} is paused; resume it, or leave shards out")
        if pool.status == WorkPoolStatus.NOT_READY:
            raise ConfigurationError(
                f"shards: the work pool {name} has no worker that is alive; start one with prefect worker start "
                f"--pool {name}, or leave shards out"
            )
        limits.append((f"the work pool {name}", pool.concurrency_limit))
    for what, limit in limits:
        if limit is not None and limit < 1 + own:
            raise ConfigurationError(
                f"shards: {what} allows {limit} run{'s' * (limit != 1)} at a time, and this one takes a place: raise "
                "its limit, or leave shards out"
            )


def _limit_of(deployment: DeploymentResponse) -> int | None:
    limit = deployment.global_concurrency_limit
    return limit.limit if limit else None
