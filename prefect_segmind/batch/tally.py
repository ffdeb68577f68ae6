"""A batch while it runs and when it has ended: the result of each asset, and the totals."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from prefect_segmind.batch.plan import Plan, PlannedJob, is_about_payment
from prefect_segmind.batch.results import NAMED, Failure, Results
from prefect_segmind.errors import NotStartedError, SegmindError, SubmittedError, redact
from prefect_segmind.jobs.job import Job
from prefect_segmind.limits.ledger import Ledger
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.storage.spool import Spool

TO_FETCH = "to fetch their pictures without another payment, run the same again, or prefect-segmind reconcile"
"""What to do about jobs whose request the provider has accepted and not finished."""


class BatchResult(BaseModel):
    """The result of a run of a batch, or the expected result of a dry run.

    Attributes:
        total: Jobs of the manifest.
        generated: Pictures that this run has paid for and archived.
        reused: Jobs whose picture was in the archive.
        recovered: Pictures that were paid for before and are archived now.
        failed: Jobs that failed.
        submitted: Jobs whose request the provider has accepted, and whose picture is still to be fetched.
        submitted_names: The names of the first `NAMED` of them.
        not_started: Jobs for which nothing was sent because the run had stopped.
        not_started_names: The names of the first `NAMED` of them.
        cost_usd: What this run has paid, in all tries of its flow run.
        possibly_billed_usd: What requests of unknown outcome may have cost in addition.
        planned_usd: The cost of the plan, before anything was paid.
        images: The first `NAMED` archived pictures, in the order in which they were finished; where there are more,
            those that are new in the archive rather than reused ones.
        failures: The first `NAMED` jobs that failed.
        results: The address of a JSON Lines file in the archive with every picture, as in `images`, and every failure;
            None if there are none, or it could not be written.
        failed_manifest: The address of a manifest of the failed jobs, to run again; None if none failed.
        stopped: Why the run stopped early; None if it did not.
        dry_run: Whether only the plan was made.
        shards: The addresses of the runs that have made a part of it each, in the order in which they were started.
        plan: The plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    total: int
    generated: int
    reused: int
    recovered: int
    failed: int
    not_started: int
    cost_usd: Decimal
    possibly_billed_usd: Decimal
    planned_usd: Decimal
    images: tuple[ArchivedImage, ...] = ()
    failures: tuple[Failure, ...] = ()
    results: str | None = None
    failed_manifest: str | None = None
    stopped: str | None = None
    not_started_names: tuple[str, ...] = ()
    submitted: int = 0
    submitted_names: tuple[str, ...] = ()
    dry_run: bool = False
    shards: tuple[str, ...] = ()
    plan: Plan

    @property
    def jobs(self) -> tuple[PlannedJob, ...]:
        """What each of the first 1000 jobs needed when the run was planned."""
        return self.plan.jobs

    def with_failures(self, failures: Sequence[Failure]) -> Self:
        """The result with jobs that had failed before the plan was made; they come first.

        Args:
            failures: Those jobs.
        """
        changes = {
            "total": self.total + len(failures),
            "failed": self.failed + len(failures),
            "failures": (*failures, *self.failures)[:NAMED],
            "plan": self.plan.with_failures((each.name, each.error) for each in failures),
        }
        return self.model_copy(update=changes)

    def sentence(self) -> str:
        """The counts and the cost in one line; for a dry run, the expected ones."""
        if self.dry_run:
            return self._expectation()
        counts = (
            *((self.generated, "generated"), (self.reused, "reused"), (self.recovered, "recovered")),
            *((self.failed, "failed"), (self.submitted, "submitted"), (self.not_started, "not started")),
        )
        counted = ", ".join(f"{count} {what}" for count, what in counts if count) or "nothing to do"
        possibly = f", possibly {usd(self.possibly_billed_usd)} USD more" if self.possibly_billed_usd else ""
        return f"{self.total} asset{'s' * (self.total != 1)}: {counted}; paid {usd(self.cost_usd)} USD{possibly}"

    def _expectation(self) -> str:
        counts = (
            *((self.generated - self.plan.ask, "generate"), (self.plan.ask, "ask about")),
            (self.reused - self.plan.wait, "reuse"),
            *((self.recovered, "recover"), (self.plan.wait, "wait for")),
        )
        counted = ", ".join(f"{what} {count}" for count, what in counts if count)
        parts = (f"would {counted}" if counted else "", f"{self.failed} would fail" if self.failed else "")
        cost = f"would cost {self.plan.planned}"
        return f"{self.total} asset{'s' * (self.total != 1)}: {'; '.join(filter(None, (*parts, cost)))}"


class BatchError(SegmindError):
    """A run of many assets ended without some of them.

    Attributes:
        result: The result of the run.
        stopped: The error that ended the run early; None if none did.
    """

    def __init__(self, message: str, result: BatchResult, stopped: SegmindError | None = None) -> None:
        super().__init__(message, cost_usd=result.cost_usd, possibly_billed_usd=result.possibly_billed_usd)
        self.result = result
        self.stopped = stopped

    def __reduce__(self) -> tuple[type[BatchError], tuple[str, BatchResult, SegmindError | None]]:
        return type(self), (str(self), self.result, self.stopped)


@dataclass(frozen=True)
class Progress:
    """The progress of a batch at one moment.

    Attributes:
        total: Jobs of the manifest.
        counts: The number of assets `generated`, `reused`, `recovered`, `failed`, `submitted` and `not_started`.
        cost_usd: What was paid so far.
        seconds: The time since the first job was started.
        in_place: The number of those whose picture was there, which says nothing of how long the others take.
    """

    total: int
    counts: Counter[str]
    cost_usd: Decimal
    seconds: float
    in_place: int = 0

    @property
    def done(self) -> int:
        """The number of jobs that have succeeded or failed."""
        return sum(self.counts.values()) - self.counts["not_started"] - self.counts["submitted"]

    def sentence(self) -> str:
        """The progress in one line."""
        made = self.done - self.in_place
        left = self.seconds / made * (self.total - self.done) if made else 0.0
        reused = self.counts["reused"] + self.counts["recovered"]
        submitted = f"{self.counts['submitted']} submitted, " if self.counts["submitted"] else ""
        return (
            f"{self.done} of {self.total} done, {reused} reused, {self.counts['failed']} failed, {submitted}"
            f"{usd(self.cost_usd)} USD" + (f", about {left:.0f} s left" if left else "")
        )


class Tally:
    """Counts the results of the assets of a run; their cost is in the run's ledger. Threads may share it.

    Args:
        plan: The plan of the run.
        failed_jobs: Receives the jobs that fail, for a manifest to run again.
        results: Receives the result of each asset.
        ledger: The ledger of the run.
        observe: Receives the progress whenever an asset begins or ends.
    """

    def __init__(
        self,
        plan: Plan,
        failed_jobs: Spool[Job],
        results: Results,
        ledger: Ledger,
        observe: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._plan = plan
        self._failed_jobs = failed_jobs
        self._ledger = ledger
        self._observe = observe
        self._counts: Counter[str] = Counter()
        self._results = results
        self._submitted: list[str] = []
        self._elsewhere: Counter[str] = Counter()
        self._under_way: dict[str, tuple[int, Job | ValidatedJob]] = {}
        self._ended = bytearray()  # 1 at the position of each asset that has ended: a name would take a hundred bytes
        self._in_place = 0
        self._closed = False
        self._started = time.monotonic()
        self._lock = threading.RLock()  # taken by itself: an interrupt cannot come between it and its `with`
        self._changed = threading.Condition(self._lock)

    def start(self, position: int, entry: Job | ValidatedJob) -> None:
        """Records that an asset is under way.

        Args:
            position: Its position among all jobs of the run, from 0.
            entry: The asset.
        """
        with self._lock:
            self._under_way[entry.name] = position, entry
            progress = self.progress
        self._report(progress)

    def end(self, entry: Job | ValidatedJob, result: object) -> None:
        """Records the result of an asset.

        Args:
            entry: The asset.
            result: An `ArchivedImage`, or the exception that it ended with.
        """
        with self._lock:
            if self._closed or entry.name not in self._under_way:
                return
            position, _ = self._under_way.pop(entry.name)
            if isinstance(result, ArchivedImage):
                self._finish(position, result.status, result)
            else:
                self._fail(position, entry, result)
            self._changed.notify_all()
            progress = self.progress
        self._report(progress)

    def count(self, position: int, reused: ArchivedImage) -> None:
        """Records the result of an asset that was never under way: its picture was there.

        Args:
            position: Its position among all jobs of the run.
            reused: The picture.
        """
        with self._lock:
            if self._closed:
                return
            self._in_place += 1
            self._finish(position, reused.status, reused)
            progress = self.progress
        self._report(progress)

    def take_over(self, position: int, entry: Job | ValidatedJob, result: ArchivedImage | Failure) -> None:
        """Records the result of an asset that another run has worked on.

        Args:
            position: Its position among all jobs of the run.
            entry: The asset.
            result: The picture, or why there is none.
        """
        with self._lock:
            if self._closed:
                return
            if isinstance(result, Failure):
                self._end_with(position, entry, result)
            else:
                self._finish(position, result.status, result)
            progress = self.progress
        self._report(progress)

    def report_elsewhere(self, counts: Counter[str]) -> None:
        """Shows what other runs have done of this one until their results are taken over.

        Args:
            counts: The number of their assets by status; it replaces what they have reported before.
        """
        with self._lock:
            self._elsewhere = counts
            progress = self.progress
        self._report(progress)

    def has_ended(self, position: int) -> bool:
        """Whether an asset has ended with a result; False if it was stopped before anything was sent.

        Args:
            position: Its position among all jobs of the run.
        """
        return position < len(self._ended) and bool(self._ended[position])

    def close(self) -> None:
        """Counts the assets that are still under way as failed, and nothing after that."""
        late = SegmindError("the run ended before this asset; run it again: a picture that still arrives is recovered")
        with self._lock:
            for position, entry in self._under_way.values():
                self._fail(position, entry, late)
            self._under_way.clear()
            self._closed = True

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until no asset is under way.

        Args:
            seconds: How long at most; None for no limit.

        Returns:
            Whether no asset is under way.
        """
        with self._lock:
            return self._changed.wait_for(lambda: not self._under_way, seconds)

    @property
    def progress(self) -> Progress:
        """The progress of the run now."""
        with self._lock:
            seconds = time.monotonic() - self._started
            counts = self._counts + self._elsewhere
            return Progress(self._plan.total, counts, self._ledger.spent_usd, seconds, self._in_place)

    def result(
        self,
        failed_manifest: str | None = None,
        stopped: SegmindError | None = None,
        entries: Iterable[tuple[int, Job | ValidatedJob]] = (),
    ) -> BatchResult:
        """The result of the run; jobs that were not begun count as not started.

        Args:
            failed_manifest: The address of the manifest of the failed jobs, if there is one.
            stopped: The error that ended the run early, if one did.
            entries: All jobs of the run with their positions, to name those that were not started.
        """
        with self._lock:
            counts, spent = self._counts, self._ledger.totals
            not_started = self._plan.total - self.progress.done - counts["submitted"]
            left = (each.name for position, each in (entries if not_started else ()) if not self.has_ended(position))
            return BatchResult(
                total=self._plan.total,
                generated=counts["generated"],
                reused=counts["reused"],
                recovered=counts["recovered"],
                failed=counts["failed"],
                not_started=not_started,
                cost_usd=spent.cost_usd,
                possibly_billed_usd=spent.possibly_billed_usd,
                planned_usd=self._plan.planned_usd,
                images=self._results.images,
                failures=tuple(self._results.failures),
                failed_manifest=failed_manifest,
                stopped=str(stopped) if stopped else None,
                not_started_names=tuple(islice(left, min(not_started, NAMED))),
                submitted=counts["submitted"],
                submitted_names=tuple(self._submitted),
                plan=self._plan,
            )

    def _report(self, progress: Progress) -> None:
        with suppress(Exception):  # an observer that fails does not affect the run
            self._observe(progress)

    def _finish(self, position: int, status: str, result: ArchivedImage | Failure) -> None:
        self._counts[status] += 1
        self._results.add(result)
        self._ended.extend(bytes(max(0, position + 1 - len(self._ended))))
        self._ended[position] = 1

    def _fail(self, position: int, entry: Job | ValidatedJob, error: object) -> None:
        if isinstance(error, NotStartedError) and not (error.cost_usd or error.possibly_billed_usd):
            self._counts["not_started"] += 1
            return
        message = str(error) if isinstance(error, SegmindError) else redact(f"{type(error).__name__}: {error}")
        stage = getattr(error, "stage", None) or "generate"
        status: Literal["failed", "submitted"] = "submitted" if isinstance(error, SubmittedError) else "failed"
        self._end_with(position, entry, Failure(status=status, name=entry.name, stage=stage, error=message))

    def _end_with(self, position: int, entry: Job | ValidatedJob, failure: Failure) -> None:
        if failure.status == "failed":
            try:
                self._failed_jobs.append(to_run_again(entry))
            except (SegmindError, ValueError) as broken:
                why = f"{failure.error} (it is missing from the manifest of failed jobs: {broken})"
                failure = failure.model_copy(update={"error": why})
        elif len(self._submitted) < NAMED:
            self._submitted.append(entry.name)
        self._finish(position, failure.status, failure)


def planned(plan: Plan) -> BatchResult:
    """The result of a dry run: the plan, counted as a run would count it.

    Args:
        plan: The plan.
    """
    return BatchResult(
        total=plan.total,
        generated=plan.generate + plan.ask,
        reused=plan.reuse + plan.wait,
        recovered=plan.recover,
        failed=plan.fail + plan.kept,
        not_started=0,
        cost_usd=Decimal("0.00"),
        possibly_billed_usd=Decimal("0.00"),
        planned_usd=plan.planned_usd,
        failures=tuple(
            Failure(name=name, stage="generate" if is_about_payment(problem) else "validate", error=problem)
            for name, problem in plan.problems
        ),
        dry_run=True,
        plan=plan,
    )


def to_run_again(entry: Job | ValidatedJob) -> Job:
    """The job of an asset, with the seed that was drawn for it, so that it is for the same picture.

    Args:
        entry: The asset.
    """
    if isinstance(entry, Job):
        return entry
    return entry.job.model_copy(update={"seed": entry.seed}) if entry.job.seed == "random" else entry.job
