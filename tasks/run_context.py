"""What a task that pays tells of itself: its run and flow run, its failed requests, and a store that cannot do all."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple
from uuid import UUID, uuid4

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger
from prefect.runtime import task_run

from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.record import FlowRuns
from prefect_segmind.errors import InsufficientCreditsError, NotStartedError, SegmindError
from prefect_segmind.jobs.job import Job, name_from_image
from prefect_segmind.limits.retry import RetryPolicy, holds_all
from prefect_segmind.pipeline.pipeline import shared
from prefect_segmind.pipeline.validate import with_drawn_seed
from prefect_segmind.reporting import events
from prefect_segmind.tasks.interrupts import end_run_on_hangup

STAGES = {
    "validate_job": "validate",
    "upload_image": "upload",
    "generate_image": "generate",
    "archive_image": "archive",
    "publish_image": "publish",
}
"""The stage that a task is; an asset of a batch has them all in one task."""

TOLD_AT_END = {"told_at_end": True}
"""Marks a line of the log that a command tells again at its end, so that people read it once."""

_told: set[str] = set()
"""Archives of which this process has said that they ignore conditional writes."""


def run_name() -> str:
    """`validate hero/summer`: the task and the job it works on."""
    first = next(iter(task_run.parameters.values()), None)
    return f"{str(task_run.task_name).partition('_')[0]} {job_name(first)}"


def job_name(job: object) -> str:
    """The name of a job that is a model, or fields that may be wrong."""
    if isinstance(job, Mapping):
        return str(job.get("name") or name_from_image(str(job.get("image"))))
    return str(getattr(job, "name", ""))


def run_id() -> str:
    """What identifies a run across its retries: the task run's id."""
    context = TaskRunContext.get()
    return str(context.task_run.id) if context else uuid4().hex


def flow_runs() -> FlowRuns:
    """The flow run that a task is in, and those around it: by them is counted what was sent and paid.

    The id of a flow run stays when it is retried or run again; that of one inside another does not, when it is the
    outer one that is retried.
    """
    return _place().flow_runs


def flow_call() -> str:
    """What names the flow run that a task is in, the same in all its tries and in those of the flow runs around it.

    That is its id, or where it is inside another, the outermost one's and which of the calls made there it is.
    """
    return _place().call


class _Place(NamedTuple):
    """Where a task is: `flow_runs` and `flow_call` say what."""

    flow_runs: FlowRuns
    call: str


def _place() -> _Place:
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None:
        return _Place((), "")
    inner = str(run.id), run.run_count
    around, call = _around(run.parent_task_run_id, inner)
    return _Place((*around, inner), call or inner[0])


@lru_cache(maxsize=256)
def _around(parent: UUID | None, _inner: tuple[str, int]) -> _Place:
    """The flow runs around one, which are read once for each of its tries, and which call it is; nothing for none."""
    found, calls = _Place((), ""), ""
    try:
        with get_client(sync_client=True) as client:
            while parent is not None:
                called = client.read_task_run(parent)
                if called.flow_run_id is None:
                    break
                outer = client.read_flow_run(called.flow_run_id)
                calls = f" {called.task_key} {called.dynamic_key}{calls}"
                found = _Place(((str(outer.id), outer.run_count), *found.flow_runs), f"{outer.id}{calls}")
                parent = outer.parent_task_run_id
    except Exception as error:  # noqa: BLE001 - whatever ails the server, the run itself is known
        get_run_logger().warning("the flow runs around this one are not known, nor what they have sent: %s", error)
    return found


_drawn: dict[tuple[FlowRuns, str], list[str]] = {}
_drawing = threading.Lock()
DRAWN = 10_000
"""Jobs with a random seed that are remembered."""


def with_seed(job: Job) -> Job:
    """The job with a random seed drawn: the same in each try of a flow run, another for each task that asks for it."""
    if job.seed != "random":
        return job
    runs, run = flow_runs(), run_id()
    if not runs:
        return with_drawn_seed(job, run)
    with _drawing:
        asking = _drawn.setdefault((runs, job.model_dump_json()), [])
        if run not in asking:
            asking.append(run)
        if len(_drawn) > DRAWN:
            del _drawn[next(iter(_drawn))]
        return with_drawn_seed(job, f"{flow_call()} {asking.index(run)}")


def refreshed_at() -> datetime:
    """When the refresh that a run is was due: what decides which of two runs publishes the newer picture."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return (run and (run.expected_start_time or run.created)) or datetime.now(UTC)


def task_policy() -> RetryPolicy:
    """How patient a task is: as many retries as it has in Prefect."""
    context = TaskRunContext.get()
    return RetryPolicy(retries=context.task.retries) if context else RetryPolicy()


def mention_conditions(archive: Archive) -> None:
    """Says once for each archive that it ignores conditional writes, if it does."""
    if not archive.store.conditional and archive.url not in _told:
        _told.add(archive.url)
        get_run_logger().info(
            "%s ignores conditional writes: do not run the same job in two processes at a time", archive.url
        )


@contextmanager
def failures_reported(job: object) -> Iterator[None]:
    """Makes what fails visible: a failed request is a WARNING in the run's log and an event, a failed job an event.

    A task that works in the main thread of its run is also ended in order by a terminal that goes away.

    Args:
        job: The `Job`, `ValidatedJob` or whatever else has its name; or its fields as a mapping.
    """
    end_run_on_hangup()
    try:
        yield
    except SegmindError as error:
        name = job_name(job)
        if error.decision:
            _warn(name, error)
            events.attempt_failed(name, error)
        started = not isinstance(error, NotStartedError) or error.possibly_billed_usd
        if started and not (error.decision and error.decision.retry):
            stage = error.stage or STAGES.get(str(task_run.task_name), "generate")
            events.asset_failed(name, error, stage)
            if isinstance(error, InsufficientCreditsError) and shared.get() is None:  # a batch tells it once
                events.credits_exhausted(error)
        raise


def _warn(name: str, error: SegmindError) -> None:
    assert error.decision is not None
    wait = error.decision.wait_seconds
    follows = f"next request in {wait:.1f} s" if wait is not None else "not sent again"
    # In a batch the gate has told once for all that the rate is limited, or the provider overloaded.
    told = logging.INFO if holds_all(error) and wait is not None and shared.get() else logging.WARNING
    get_run_logger().log(
        told,
        "request %s of %s failed%s: %s; %s: %s",
        error.requests_sent,
        name,
        " and may have been billed" if error.possibly_billed else " and was paid for" if error.answered else "",
        error,
        follows,
        error.decision.reason,
        extra=TOLD_AT_END if wait is None else None,
    )
