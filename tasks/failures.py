"""How a task makes visible what fails: in the run's log and by events."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.logging import get_run_logger
from prefect.runtime import task_run

from prefect_segmind.errors import InsufficientCreditsError, NotStartedError, SegmindError
from prefect_segmind.limits.retry import holds_all
from prefect_segmind.reporting import events
from prefect_segmind.tasks.interrupts import end_run_on_hangup
from prefect_segmind.tasks.run_context import job_name

STAGES = {
    "validate_job": "validate",
    "upload_image": "upload",
    "generate_image": "generate",
    "archive_image": "archive",
    "publish_image": "publish",
}
"""The stage that a task is; an asset of a batch has them all in one task."""

TOLD_AT_END = {"told_at_end": True}
"""Marks a line of the log that a command shows again at its end, so that people read it once."""


@contextmanager
def failures_reported(job: object, *, in_batch: bool = False) -> Iterator[None]:
    """Makes what fails visible: a failed request is a WARNING in the run's log and an event, a failed job an event.

    A task that works in the main thread of its run is also ended in order by a terminal that goes away.

    Args:
        job: The `Job`, `ValidatedJob` or whatever else has its name; or its fields as a mapping.
        in_batch: Whether the batch says once for all its assets what concerns the account or the provider.
    """
    end_run_on_hangup()
    try:
        yield
    except SegmindError as error:
        name = job_name(job)
        if error.decision:
            _warn(name, error, in_batch)
            events.attempt_failed(name, error)
        started = not isinstance(error, NotStartedError) or error.possibly_billed_usd
        if started and not (error.decision and error.decision.retry):
            stage = error.stage or STAGES.get(str(task_run.task_name), "generate")
            events.asset_failed(name, error, stage)
            if isinstance(error, InsufficientCreditsError) and not in_batch:
                events.credits_exhausted(error)
        raise


def _warn(name: str, error: SegmindError, in_batch: bool) -> None:
    assert error.decision is not None
    wait = error.decision.wait_seconds
    follows = f"next request in {wait:.1f} s" if wait is not None else "not sent again"
    # In a batch the gate has said once for all that the rate is limited, or the provider overloaded.
    level = logging.INFO if in_batch and holds_all(error) and wait is not None else logging.WARNING
    get_run_logger().log(
        level,
        "request %s of %s failed%s: %s; %s: %s",
        error.requests_sent,
        name,
        " and may have been billed" if error.possibly_billed else " and was paid for" if error.answered else "",
        error,
        follows,
        error.decision.reason,
        extra=TOLD_AT_END if wait is None else None,
    )
