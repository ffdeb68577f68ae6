"""How the assets of a batch are started, a bounded number at a time, and watched until the last one ends."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from prefect_segmind.archive.archive import READERS
from prefect_segmind.batch.tally import Tally
from prefect_segmind.errors import RunCancelledError, SegmindError
from prefect_segmind.jobs.job import Job
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.reporting.artifacts import artifact_key
from prefect_segmind.tasks.interrupts import ended_by
from prefect_segmind.tasks.produce_asset import task_of_batch
from prefect_segmind.tasks.run_context import run_logger, this_run

WATCH_SECONDS = 10.0
"""Seconds between two lines of progress, and between two checks whether the run was cancelled in Prefect."""

POLICY = RetryPolicy(rate_limit_retries=20)
"""A rate limit concerns all assets of a batch, so those that it meets are retried more often."""
SWITCH_SECONDS = 0.0005
"""How long one thread of a batch may keep the interpreter from the others."""
LAST_SECONDS = 2.0
"""How long the end of a run waits for each thing that Prefect's server or the archive may be slow to take."""


def dispatch(
    wanted: Callable[[], Iterable[tuple[int, Job | ValidatedJob]]],
    in_place: Sequence[int],
    pipeline: Pipeline,
    tally: Tally,
    grace_seconds: float,
    elsewhere: Callable[[], None] | None = None,
) -> None:
    """Starts one task run for each asset, a bounded number at a time, and waits for the last.

    First those whose picture is in place are reused without one.

    When interrupted, it sends nothing new, and waits for what is in flight to be archived, no longer than the grace.
    Each asset has a thread of its own, which does not keep the process from ending after that. (Prefect's task runners
    join theirs, however long a request takes.) Where the process goes on, so do they.

    Args:
        wanted: The assets in their order, each with its position.
        in_place: At the position of each asset whose picture is archived under its name 1, else 0.
        pipeline: Takes them through their stages.
        tally: Counts their outcomes.
        grace_seconds: How long to wait for what is in flight when the run is interrupted.
        elsewhere: Has others work on the assets that are not in place, and waits for them, instead of task runs here.
    """
    gate, produce = pipeline.gate, task_of_batch(pipeline, POLICY)
    with _watched(gate, tally), _switching_often():
        try:
            if there := sum(in_place):
                entries = (each for each in wanted() if in_place[each[0]])
                _reuse_in_place(entries, min(there, READERS), pipeline, tally)
            if elsewhere:
                return elsewhere()
            for position, entry in wanted():
                if tally.has_ended(position):
                    continue
                if not gate.enter(entry.name):
                    break
                tally.start(position, entry)
                _start(partial(_produce, entry, produce, gate, tally), f"segmind-{entry.name}")
            tally.wait()
        except BaseException as error:
            gate.stop(RunCancelledError(f"the run was ended by {ended_by(error) or 'an error'}"))
            get_run_logger().warning(
                "nothing new is sent; requests in flight: %s, with %.0f s to end", gate.in_flight, grace_seconds
            )
            tally.wait(grace_seconds)
            raise


def _reuse_in_place(
    entries: Iterator[tuple[int, Job | ValidatedJob]], at_once: int, pipeline: Pipeline, tally: Tally
) -> None:
    """Checks and publishes pictures that are archived under the names of their assets, some at once, and counts them.

    Where that fails, or more is left to do, the asset is left to a task run, which tells what is wrong with it.
    """
    run, log, gate, taking = this_run(), run_logger(), pipeline.gate, threading.Lock()

    def work() -> None:
        while not gate.stopped:
            try:
                with taking:
                    position, entry = next(entries)
            except (StopIteration, SegmindError):  # what cannot be read of them now is read again for the task runs
                return
            with suppress(Exception):
                if isinstance(entry, ValidatedJob) and (reused := pipeline.reuse_in_place(entry, run, log)):
                    tally.count(position, reused)

    workers = [_start(work, f"segmind-in-place-{number}") for number in range(at_once)]
    for worker in workers:
        worker.join()
    if reused := tally.progress.done:
        log.info("pictures that are in the archive already, nothing to pay: %s", reused)


def in_time(work: Callable[[], object], seconds: float = LAST_SECONDS) -> None:
    """Does something that is not worth waiting for longer; where it fails, the run does not.

    Args:
        work: What to do; it goes on in a thread of its own after that, until the process ends.
        seconds: How long to wait at most.
    """

    def attempt() -> None:
        with suppress(Exception):
            work()

    _start(attempt, "segmind-end").join(seconds)


def _start(work: Callable[[], object], name: str) -> threading.Thread:
    thread = threading.Thread(target=copy_context().run, args=(work,), name=name, daemon=True)
    thread.start()
    return thread


def _produce(
    entry: Job | ValidatedJob, produce: Callable[[Job | ValidatedJob], ArchivedImage], gate: Gate, tally: Tally
) -> None:
    """Works on an asset, and counts its outcome."""
    outcome: object
    try:
        with _forgotten_by_prefect():
            outcome = produce(entry)
    except BaseException as error:  # noqa: BLE001
        outcome = error
    try:
        tally.end(entry, outcome)
    finally:
        gate.leave(entry.name)


@contextmanager
def _forgotten_by_prefect() -> Iterator[None]:
    """Has a flow run not keep what it notes of its task runs, for those that others depend on: some kB for each."""
    context = FlowRunContext.get()
    if context is None:
        yield
        return
    with context.model_copy(update={"run_results": {}, "task_run_assets": {}}):
        yield


@contextmanager
def _switching_often() -> Iterator[None]:
    """Has Python switch between threads every half a millisecond instead of every five.

    An asset gives up the interpreter some hundred times, at each call of the system, and may wait so long each time for
    another one that is busy.
    """
    before = sys.getswitchinterval()
    if before <= SWITCH_SECONDS:  # as in another batch of this process
        yield
        return
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def _watched(gate: Gate, tally: Tally) -> Iterator[None]:
    """Reports the progress of the run in the log and in an artifact, and stops the gate when it is cancelled."""
    ended = threading.Event()
    watch = _start(partial(_watch, gate, tally, ended), "segmind-watch")
    try:
        yield
    finally:
        ended.set()
        watch.join(LAST_SECONDS)


def _watch(gate: Gate, tally: Tally, ended: threading.Event) -> None:
    log, run_id, last = get_run_logger(), UUID(str(flow_run.id)), ""
    artifact: UUID | None = None
    over = False
    while not over:
        over = ended.wait(WATCH_SECONDS)
        try:
            progress = tally.progress
            if progress.sentence() != last and (not over or artifact):
                last, percent = progress.sentence(), 100 * progress.done / max(1, progress.total)
                if artifact is None:
                    key = artifact_key(f"{flow_run.flow_name} {str(run_id)[:8]}", "progress")
                    artifact = cast(UUID, create_progress_artifact(percent, key, last))
                else:
                    update_progress_artifact(artifact, percent, description=last)
                log.info(last)
            if over:
                break
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(run_id).state
            if state is not None and (state.is_cancelling() or state.is_cancelled()):
                gate.stop(RunCancelledError("the run was cancelled in Prefect"))
        except Exception as error:  # noqa: BLE001
            log.debug("Prefect's server does not answer: %s", error)  # what is paid for does not depend on it
