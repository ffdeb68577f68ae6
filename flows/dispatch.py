"""How the assets of a batch are started, a bounded number at a time, and watched until the last one ends."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_segmind.batch.tally import Tally
from prefect_segmind.errors import RunCancelledError
from prefect_segmind.jobs.job import Job
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.tasks.interrupts import ended_by
from prefect_segmind.tasks.produce_asset import task_of_batch

WATCH_SECONDS = 10.0
"""Seconds between two lines of progress, and between two checks whether the run was cancelled in Prefect."""

POLICY = RetryPolicy(rate_limit_retries=20)
"""A rate limit concerns all assets of a batch, so those that it meets are retried more often."""
THREADS = 4096
"""More than are ever needed: threads are made on demand, and the gate bounds how many assets are under way."""


def task_runner() -> ThreadPoolTaskRunner[Any]:
    """The task runner of the flows of many pictures."""
    return ThreadPoolTaskRunner(max_workers=THREADS)


def dispatch(entries: Iterable[Job | ValidatedJob], pipeline: Pipeline, tally: Tally, grace_seconds: float) -> None:
    """Starts one task run for each asset, a bounded number at a time, and waits for the last.

    When interrupted, it sends nothing new, and waits for what is in flight to be archived.

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
                produce.submit(entry).add_done_callback(partial(_end, entry, gate, tally))
            tally.wait()
        except BaseException as error:
            gate.stop(RunCancelledError(f"the run was ended by {ended_by(error) or 'an error'}"))
            get_run_logger().warning(
                "nothing new is sent; %s in flight have %.0f s to end", gate.in_flight, grace_seconds
            )
            tally.wait(grace_seconds)
            raise


def _end(entry: Job | ValidatedJob, gate: Gate, tally: Tally, future: PrefectFuture[Any]) -> None:
    """Counts the outcome of an asset, in the thread that worked on it."""
    try:
        outcome = future.result(raise_on_failure=False)
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
    watch = threading.Thread(target=copy_context().run, args=(_watch, gate, tally, ended), name="segmind-watch")
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


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
                    key = f"{flow_run.flow_name}-{str(run_id)[:8]}"
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
