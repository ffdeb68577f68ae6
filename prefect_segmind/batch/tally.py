"""A batch while it runs and when it has ended: what came of each asset, and the sums."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Self

from pydantic import BaseModel, ConfigDict

from prefect_segmind.batch.plan import REFUSED, Plan, PlannedJob
from prefect_segmind.errors import NotStartedError, SegmindError, redact
from prefect_segmind.jobs.job import Job
from prefect_segmind.limits.ledger import Ledger
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.storage.spool import Spool

NAMED = 1_000
"""Jobs that were not started which a result names; it counts them all."""


class Failure(BaseModel):
    """An asset that failed.

    Attributes:
        name: The job's.
        stage: `validate`, `upload`, `generate`, `archive` or `publish`.
        error: What was wrong and what to do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    stage: str
    error: str


class BatchResult(BaseModel):
    """What a run of a batch came to; of a dry run, what it would come to.

    Attributes:
        total: Jobs of the manifest.
        generated: Pictures that this run has paid for and archived.
        reused: Jobs whose picture was in the archive.
        recovered: Pictures that were paid for before and are archived now.
        failed: Jobs that failed.
        not_started: Jobs for which nothing was sent because the run had stopped.
        not_started_names: Which they are, the first `NAMED` of them.
        cost_usd: What this run has paid, in all tries of its flow run.
        possibly_billed_usd: What requests of unknown outcome may have cost besides.
        planned_usd: What the plan came to before anything was paid.
        images: The archived pictures, as they were finished.
        failures: The jobs that failed.
        failed_manifest: Where a manifest of the failed jobs lies, to run again; None if none failed.
        stopped: Why the run stopped early, if it did.
        dry_run: Whether nothing was done but the plan.
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
    failed_manifest: str | None = None
    stopped: str | None = None
    not_started_names: tuple[str, ...] = ()
    dry_run: bool = False
    plan: Plan

    @property
    def jobs(self) -> tuple[PlannedJob, ...]:
        """What each job needed when the run was planned, the first 1000 of them."""
        return self.plan.jobs

    def with_failures(self, failures: Sequence[Failure]) -> Self:
        """The result with jobs that had failed before there was a plan; they come first."""
        changes = {
            "total": self.total + len(failures),
            "failed": self.failed + len(failures),
            "failures": (*failures, *self.failures),
            "plan": self.plan.with_failures((each.name, each.error) for each in failures),
        }
        return self.model_copy(update=changes)

    def sentence(self) -> str:
        """The counts and the cost in one line; of a dry run, what they would be."""
        if self.dry_run:
            return self._conditional_sentence()
        counts = (
            *((self.generated, "generated"), (self.reused, "reused"), (self.recovered, "recovered")),
            *((self.failed, "failed"), (self.not_started, "not started")),
        )
        told = ", ".join(f"{count} {what}" for count, what in counts if count) or "nothing to do"
        possibly = f", possibly {usd(self.possibly_billed_usd)} USD more" if self.possibly_billed_usd else ""
        return f"{self.total} asset{'s' * (self.total != 1)}: {told}; paid {usd(self.cost_usd)} USD{possibly}"

    def _conditional_sentence(self) -> str:
        counts = (
            *((self.generated, "generate"), (self.reused - self.plan.wait, "reuse")),
            *((self.recovered, "recover"), (self.plan.wait, "wait for")),
        )
        told = ", ".join(f"{what} {count}" for count, what in counts if count)
        parts = (
            *([f"would {told}"] if told else ()),
            *([f"{self.failed} would fail"] if self.failed else ()),
            f"would cost {usd(self.planned_usd)} USD",
        )
        return f"{self.total} asset{'s' * (self.total != 1)}: {'; '.join(parts)}"


class BatchError(SegmindError):
    """A run of many assets ended without all of them.

    Attributes:
        result: The `BatchResult` of the run.
        stopped: What ended the run early, if something did.
    """

    def __init__(self, message: str, result: BatchResult, stopped: SegmindError | None = None) -> None:
        super().__init__(message, cost_usd=result.cost_usd, possibly_billed_usd=result.possibly_billed_usd)
        self.result = result
        self.stopped = stopped

    def __reduce__(self) -> tuple[type[BatchError], tuple[str, BatchResult, SegmindError | None]]:
        return type(self), (str(self), self.result, self.stopped)


@dataclass(frozen=True)
class Progress:
    """How far a batch is, at one moment.

    Attributes:
        total: Jobs of the manifest.
        counts: How many have ended, by `generated`, `reused`, `recovered`, `failed`, `not_started`.
        cost_usd: Paid so far.
        seconds: Since the first job was started.
    """

    total: int
    counts: Counter[str]
    cost_usd: Decimal
    seconds: float

    @property
    def done(self) -> int:
        """Jobs that have been done, well or not."""
        return sum(self.counts.values()) - self.counts["not_started"]

    def sentence(self) -> str:
        """The progress in one line."""
        left = self.seconds / self.done * (self.total - self.done) if self.done else 0.0
        reused = self.counts["reused"] + self.counts["recovered"]
        return (
            f"{self.done} of {self.total} done, {reused} reused, {self.counts['failed']} failed, "
            f"{usd(self.cost_usd)} USD" + (f", about {left:.0f} s left" if left else "")
        )


class Tally:
    """Counts what comes of the assets of a run; what they cost is in the run's ledger. Threads may share it.

    Args:
        plan: The run's.
        failed_jobs: Takes the jobs that fail, for a manifest to run again.
        ledger: The run's.
        observe: Takes the progress whenever an asset begins or ends.
    """

    def __init__(
        self,
        plan: Plan,
        failed_jobs: Spool[Job],
        ledger: Ledger,
        observe: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._plan = plan
        self._failed_jobs = failed_jobs
        self._ledger = ledger
        self._observe = observe
        self._counts: Counter[str] = Counter()
        self._images: list[ArchivedImage] = []
        self._failures: list[Failure] = []
        self._under_way: dict[str, Job | ValidatedJob] = {}
        self._closed = False
        self._started = time.monotonic()
        self._changed = threading.Condition()

    def start(self, entry: Job | ValidatedJob) -> None:
        """Notes that an asset is under way."""
        with self._changed:
            self._under_way[entry.name] = entry
            progress = self._progress()
        self._tell(progress)

    def end(self, entry: Job | ValidatedJob, outcome: object) -> None:
        """Notes what came of an asset.

        Args:
            entry: The asset.
            outcome: An `ArchivedImage`, or the exception that it ended with.
        """
        with self._changed:
            if self._closed or self._under_way.pop(entry.name, None) is None:
                return
            if isinstance(outcome, ArchivedImage):
                self._counts[outcome.status] += 1
                self._images.append(outcome)
            else:
                self._fail(entry, outcome)
            self._changed.notify_all()
            progress = self._progress()
        self._tell(progress)

    def close(self) -> None:
        """Counts what is still under way as failed, and counts nothing more."""
        late = SegmindError(
            "the run was ended before this was; run it again: a picture that still arrives is recovered"
        )
        with self._changed:
            for entry in self._under_way.values():
                self._fail(entry, late)
            self._under_way.clear()
            self._closed = True

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until no asset is under way, or the time is over.

        Returns:
            Whether none is.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not self._under_way, seconds)

    @property
    def progress(self) -> Progress:
        """How far the run is now."""
        with self._changed:
            return self._progress()

    def result(
        self,
        failed_manifest: str | None = None,
        stopped: SegmindError | None = None,
        entries: Iterable[Job | ValidatedJob] = (),
    ) -> BatchResult:
        """The sums; what was not begun counts as not started.

        Args:
            failed_manifest: Where the failed jobs are written to, to run again.
            stopped: What ended the run early, if something did.
            entries: All its jobs, to name those that were not started.
        """
        with self._changed:
            counts, spent = self._counts, self._ledger.totals
            not_started = self._plan.total - self._progress().done
            ended = {each.name for each in self._images} | {each.name for each in self._failures}
            left = (each.name for each in (entries if not_started else ()) if each.name not in ended)
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
                images=tuple(self._images),
                failures=tuple(self._failures),
                failed_manifest=failed_manifest,
                stopped=str(stopped) if stopped else None,
                not_started_names=tuple(islice(left, min(not_started, NAMED))),
                plan=self._plan,
            )

    def _tell(self, progress: Progress) -> None:
        with suppress(Exception):  # whoever watches does not change what is counted
            self._observe(progress)

    def _progress(self) -> Progress:
        seconds = time.monotonic() - self._started
        return Progress(self._plan.total, self._counts.copy(), self._ledger.spent_usd, seconds)

    def _fail(self, entry: Job | ValidatedJob, outcome: object) -> None:
        if isinstance(outcome, NotStartedError) and not (outcome.cost_usd or outcome.possibly_billed_usd):
            self._counts["not_started"] += 1
            return
        self._counts["failed"] += 1
        error = str(outcome) if isinstance(outcome, SegmindError) else redact(f"{type(outcome).__name__}: {outcome}")
        try:
            self._failed_jobs.append(_again(entry))
        except (SegmindError, ValueError) as broken:
            error += f" (nor is it in the manifest of failures: {broken})"
        stage = getattr(outcome, "stage", None) or "generate"
        self._failures.append(Failure(name=entry.name, stage=stage, error=error))


def planned(plan: Plan) -> BatchResult:
    """What a dry run gives: the plan, counted as a run would count it."""
    return BatchResult(
        total=plan.total,
        generated=plan.generate,
        reused=plan.reuse + plan.wait,
        recovered=plan.recover,
        failed=plan.fail,
        not_started=0,
        cost_usd=Decimal("0.00"),
        possibly_billed_usd=Decimal("0.00"),
        planned_usd=plan.planned_usd,
        failures=tuple(
            Failure(name=name, stage="generate" if problem == REFUSED else "validate", error=problem)
            for name, problem in plan.problems
        ),
        dry_run=True,
        plan=plan,
    )


def _again(entry: Job | ValidatedJob) -> Job:
    """A failed job as it is to be run again: with the seed that was drawn for it, so that it is the same picture."""
    if isinstance(entry, Job) or entry.job.seed != "random":
        return entry if isinstance(entry, Job) else entry.job
    return entry.job.model_copy(update={"seed": entry.seed})
