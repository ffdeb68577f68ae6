"""What a task knows of its run: its id, the flow runs around it and their tries, and the run's ledger and logger."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple, cast
from uuid import UUID, uuid4

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run

from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.record import FlowRuns, OnKept, OnUnknown, Run
from prefect_segmind.errors import BudgetReachedError, NotStartedError
from prefect_segmind.jobs.job import Job, name_from_image
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import Ledger, Reporters
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.validate import with_drawn_seed
from prefect_segmind.reporting.events import budget_used
from prefect_segmind.services import Services

_warned_of: set[str] = set()
"""Archives for which this process has logged which conditions of writes they do not honour."""


def run_name() -> str:
    """The name of a task run: its task and its job, as in `validate hero/summer`."""
    first = next(iter(task_run.parameters.values()), None)
    return f"{str(task_run.task_name).partition('_')[0]} {job_name(first)}"


def job_name(job: object) -> str:
    """The name of a job.

    Args:
        job: A `Job`, a `ValidatedJob` or another model with its name; or its fields as a mapping, which may be wrong.
    """
    if isinstance(job, Mapping):
        return str(job.get("name") or name_from_image(str(job.get("image"))))
    return str(getattr(job, "name", ""))


def current_flow_run() -> FlowRun | None:
    """The flow run of this code; None outside of a flow run."""
    context = FlowRunContext.get()
    return context.flow_run if context else None


def this_run() -> Run:
    """The task run, whose id stays the same in its retries, with the flow runs around it."""
    context = TaskRunContext.get()
    return Run(str(context.task_run.id) if context else uuid4().hex, flow_call().runs)


def run_logger() -> logging.Logger:
    """Prefect's logger of the run: an adapter with every method of a logger that library code uses."""
    return cast(logging.Logger, get_run_logger())


def run_ledger() -> Ledger:
    """The ledger of the flow run: one for all its tasks and, in this process, for all its tries."""
    tries, call = flow_call()
    call = call or this_run().id
    # Flow runs called by one that is in a later try share who reports what its earlier tries have sent.
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
"""Flow runs whose ledgers are kept for another try."""
_ledgers: dict[str, tuple[FlowRuns, Ledger]] = {}
_reporters: dict[FlowRuns, Reporters] = {}
_opening = threading.Lock()


class FlowCall(NamedTuple):
    """Which call of a flow a task belongs to.

    Attributes:
        runs: The flow run and those around it, the outermost first, each with the number of its try. Requests and
            payments are counted by them: the id of a flow run stays when it is retried or run again, but that of one
            inside another changes when the outer one is retried.
        key: The same in all tries of the flow run and of those around it: its id or, inside another flow run, the
            outermost one's id and which of the calls made there it is. Empty outside of a flow run.
    """

    runs: FlowRuns = ()
    key: str = ""


def flow_call() -> FlowCall:
    """The call of a flow that this code belongs to."""
    run = current_flow_run()
    if run is None:
        return FlowCall()
    inner = str(run.id), run.run_count
    around = _calls_around(run.parent_task_run_id, inner)
    return FlowCall((*around.runs, inner), around.key or inner[0])


@lru_cache(maxsize=256)
def _calls_around(parent: UUID | None, _inner: tuple[str, int]) -> FlowCall:
    """The flow runs around one and the key of its call, read once for each of its tries; empty if there are none."""
    found, calls = FlowCall(), ""
    try:
        with get_client(sync_client=True) as client:
            while parent is not None:
                called = client.read_task_run(parent)
                if called.flow_run_id is None:
                    break
                outer = client.read_flow_run(called.flow_run_id)
                calls = f" {called.task_key} {called.dynamic_key}{calls}"
                found = FlowCall(((str(outer.id), outer.run_count), *found.runs), f"{outer.id}{calls}")
                parent = outer.parent_task_run_id
    except Exception as error:  # noqa: BLE001 - whatever fails on the server, the run itself is known
        get_run_logger().warning(
            "cannot read the flow runs around this one; what their earlier tries sent is not counted: %s", error
        )
    return found


_drawn: dict[tuple[FlowRuns, str], list[str]] = {}
_drawing = threading.Lock()
DRAWN = 10_000
"""Jobs with a random seed that are remembered."""


def with_seed(job: Job) -> Job:
    """The job with its random seed drawn: the same in each try of a flow run, but another for each task of one try.

    Args:
        job: The job; one whose seed is not random is returned as it is.
    """
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
        return with_drawn_seed(job, f"{flow_call().key} {asking.index(run)}")


def refreshed_at() -> datetime:
    """When the flow run was due, which decides which of two runs publishes the newer picture."""
    run = current_flow_run()
    return (run and (run.expected_start_time or run.created)) or datetime.now(UTC)


@contextmanager
def open_pipeline(services: Services, on_unknown: OnUnknown, on_kept: OnKept) -> Iterator[Pipeline]:
    """The pipeline of one task: with a gate of its own, the run's ledger, and as many retries as the task has.

    What it has drawn from shared budgets and not spent is given back at the end.

    Args:
        services: The services of the task.
        on_unknown: Whether to send another request after one that may have been billed.
        on_kept: Whether to pay again for a picture that lies in an outbox out of reach.

    Yields:
        The pipeline.

    Raises:
        BudgetReachedError: A shared budget has no room for another picture.
        ConfigurationError: There is no key or no archive, or no such place to publish to.
    """
    context = TaskRunContext.get()
    policy = RetryPolicy(retries=context.task.retries) if context else RetryPolicy()
    publisher = services.publisher(refreshed_at(), flow_run.id)
    purse = services.purse(str(flow_run.id or task_run.id), announce=budget_used, log=run_logger())
    gate = Gate(ledger=run_ledger(), purse=purse)
    pipeline = services.pipeline(
        gate, on_unknown=on_unknown, on_kept=on_kept, policy=policy, publisher=publisher, log=run_logger()
    )
    warn_once_without_conditional_writes(services.archive)
    try:
        yield pipeline
    except NotStartedError as stopped:
        if not isinstance(stopped.__cause__, BudgetReachedError):
            raise
        known = {each.name: getattr(stopped, each.name) for each in fields(stopped)}
        raise stopped.__cause__.with_facts(**known) from None
    finally:
        if purse:
            purse.close()


def warn_once_without_conditional_writes(archive: Archive) -> None:
    """Logs, once for each archive, which conditions of writes it does not honour, and what not to do with it."""
    if (caution := archive.store.conditions.caution) and archive.url not in _warned_of:
        _warned_of.add(archive.url)
        get_run_logger().info("%s %s", archive.url, caution)
