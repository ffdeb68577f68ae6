"""What a task knows of the run that it is in: who it is, in which try of which flow run, and the run's ledger."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple, cast
from uuid import UUID, uuid4

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger
from prefect.runtime import task_run

from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.record import FlowRuns, Run
from prefect_segmind.jobs.job import Job, name_from_image
from prefect_segmind.limits.ledger import Ledger, Reporters
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.pipeline.validate import with_drawn_seed

_warned_of: set[str] = set()
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


def this_run() -> Run:
    """The task run, which stays the same in its retries, and the flow run that it is in."""
    context = TaskRunContext.get()
    return Run(str(context.task_run.id) if context else uuid4().hex, flow_runs())


def run_logger() -> logging.Logger:
    """Prefect's logger of the run: an adapter, which has all of a logger that library code uses."""
    return cast(logging.Logger, get_run_logger())


def run_ledger() -> Ledger:
    """The ledger of the flow run that a task is in: one for all its tasks and, in this process, for all its tries."""
    run = this_run()
    call, tries = flow_call() or run.id, run.flow_runs
    # All that the last flow run calls that is in a later try share what the earlier ones have sent.
    again = tries[: max((depth for depth, (_, number) in enumerate(tries, 1) if number > 1), default=0)]
    with _opening:
        reporters = _reporters.setdefault(again, {}) if again else {}
        before, ledger = _ledgers.pop(call, (tries, Ledger(reporters=reporters)))
        if before != tries:
            ledger.begin_try(reporters)
        _ledgers[call] = tries, ledger
        if len(_ledgers) > LEDGERS:
            del _ledgers[next(iter(_ledgers))]
        if len(_reporters) > LEDGERS:
            del _reporters[next(iter(_reporters))]
        return ledger


LEDGERS = 64
"""Flow runs whose ledgers are kept, for another try."""
_ledgers: dict[str, tuple[FlowRuns, Ledger]] = {}
_reporters: dict[FlowRuns, Reporters] = {}
_opening = threading.Lock()


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
    run, runs = this_run()
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


def warn_once_without_conditional_writes(archive: Archive) -> None:
    """Says once for each archive that it ignores conditional writes, if it does."""
    if not archive.store.conditional and archive.url not in _warned_of:
        _warned_of.add(archive.url)
        get_run_logger().info(
            "%s ignores conditional writes: do not run the same job in two processes at a time", archive.url
        )
