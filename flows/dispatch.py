"""How the assets of a batch are started, a bounded number at a time, and watched until the last one ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from prefect_segmind.batch.tally import Tally
from prefect_segmind.errors import RunCancelledError
from prefect_segmind.jobs.job import Job
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.reporting.artifacts import artifact_key
from prefect_segmind.tasks.interrupts import ended_by
from prefect_segmind.tasks.produce_asset import task_of_batch

WATCH_SECONDS = 10.0
"""Seconds between two lines of progress, and between two checks whether the run was cancelled in Prefect."""

POLICY = RetryPolicy(rate_limit_retries=20)
"""A rate limit concerns all assets of a batch, so those that it meets are retried more often."""
LAST_SECONDS = 2.0
"""How long the end of a run waits for each thing that Prefect's server or the archive may be slow to take."""


def dispatch(entries: Iterable[Job | ValidatedJob], pipeline: Pipeline, tally: Tally, grace_seconds: float) -> None:
    """Starts one task run for each asset, a bounded number at a time, and waits for the last.

    When interrupted, it sends nothing new, and waits for what is in flight to be archived, no longer than the grace.
    Each asset has a thread of its own, which does not keep the process from ending after that. (Prefect's task runners
    join theirs, however long a request takes.) Where the process goes on, so do they.

    Args:
        entries: The assets, in their order.
        pipeline: Takes them through their stages.
        tally: Counts their outcomes.
        grace_seconds: How long to wait for what is in flight when the run is interrupted.
    """
    gate, produce = pipeline.gate, task_of_batch(pipeline, POLICY)
    with _watched(gate, tally):
        try:
            for entry in entries:
                if not gate.enter(entry.name):
                    break
                tally.start(entry)
                _start(partial(_produce, entry, produce, gate, tally), f"segmind-{entry.name}")
            tally.wait()
        except BaseException as error:
            gate.stop(RunCancelledError(f"the run was ended by {ended_by(error) or 'an error'}"))
            get_run_logger().warning(
                "nothing new is sent; requests in flight: %s, with %.0f s to end", gate.in_flight, grace_seconds
            )
            tally.wait(grace_seconds)
            raise


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
        outcome = produce(entry)
    except BaseException as error:  # noqa: BLE001
        outcome = error
    try:
        tally.end(entry, outcome)
    finally:
        gate.leave(entry.name)


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
