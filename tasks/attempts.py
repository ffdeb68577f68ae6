"""What a task that pays tells of itself: the name of its run, its failed requests, and a store that cannot do all."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from uuid import uuid4

from prefect.context import TaskRunContext
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.runtime import task_run

from prefect_segmind.archive import Archive
from prefect_segmind.errors import RateLimitError, SegmindError
from prefect_segmind.production import shared
from prefect_segmind.request import name_from_image
from prefect_segmind.retry import RetryPolicy

_told: set[str] = set()
"""Archives of which this process has said that they ignore conditional writes."""


def run_name() -> str:
    """`validate hero/summer`: the task and the job it works on."""
    first = next(iter(task_run.parameters.values()), None)
    if isinstance(first, Mapping):
        name = first.get("name") or name_from_image(str(first.get("image")))
    else:
        name = getattr(first, "name", "")
    return f"{str(task_run.task_name).partition('_')[0]} {name}"


def run_id() -> str:
    """What identifies a run across its retries: the task run's id."""
    context = TaskRunContext.get()
    return str(context.task_run.id) if context else uuid4().hex


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
def failed_attempts_reported(name: str) -> Iterator[None]:
    """Makes a failed request visible: a WARNING in the run's log, and an event `prefect-segmind.attempt.failed`.

    Args:
        name: The job's.
    """
    try:
        yield
    except SegmindError as error:
        if error.decision:
            _report(name, error)
        raise


def _report(name: str, error: SegmindError) -> None:
    assert error.decision is not None
    wait = error.decision.wait_seconds
    follows = f"next request in {wait:.1f} s" if wait is not None else "not sent again"
    # In a batch the gate has told once for all that the rate is limited.
    told = logging.INFO if isinstance(error, RateLimitError) and wait is not None and shared.get() else logging.WARNING
    get_run_logger().log(
        told,
        "request %s of %s failed%s: %s; %s: %s",
        error.requests_sent,
        name,
        " and may have been billed" if error.possibly_billed else "",
        error,
        follows,
        error.decision.reason,
    )
    emit_event(
        event="prefect-segmind.attempt.failed",
        resource={"prefect.resource.id": f"prefect-segmind.job.{error.fingerprint}", "prefect.resource.name": name},
        payload={
            "name": name,
            "fingerprint": error.fingerprint,
            "attempt": error.requests_sent,
            "status": error.status,
            "error": str(error),
            "reason": error.decision.reason,
            "wait_seconds": wait,
            "possibly_billed": error.possibly_billed,
            "request_id": error.request_id,
        },
    )
