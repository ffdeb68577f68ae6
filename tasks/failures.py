"""How a task reports what fails: in the run's log and by events."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.logging import get_run_logger

from prefect_segmind.errors import InsufficientCreditsError, NotStartedError, SegmindError, SubmittedError
from prefect_segmind.limits.retry import holds_all
from prefect_segmind.money import usd
from prefect_segmind.reporting import events
from prefect_segmind.tasks.interrupts import end_run_on_hangup, ended_by
from prefect_segmind.tasks.run_context import job_name, run_ledger

TOLD_AT_END = {"told_at_end": True}
"""Marks a log line that a command repeats at its end, so that its terminal shows it only there."""


@contextmanager
def totals_of_interrupts_told() -> Iterator[None]:
    """Logs what the run has paid, and what it may have been billed, if it is interrupted inside."""
    try:
        yield
    except BaseException as error:
        by, totals = ended_by(error), run_ledger().totals
        if by and totals.requests_sent:
            get_run_logger().warning(
                "ended by %s: this run has paid %s USD, and may have been billed %s USD more; the same job run again "
                "finds what had arrived, unpaid",
                *(by, usd(totals.cost_usd), usd(totals.possibly_billed_usd)),
                extra=TOLD_AT_END,
            )
        raise


@contextmanager
def failures_reported(job: object, stage: str = "generate", *, in_batch: bool = False) -> Iterator[None]:
    """Reports what fails inside: a failed request as a WARNING in the run's log and an event, a failed job as an event.

    A request that the provider has accepted and not finished has not failed: it is a WARNING alone.

    It also has a terminal that goes away end a run in order, where the task works in the main thread of its run.

    Args:
        job: A `Job`, a `ValidatedJob` or another model with its name; or its fields as a mapping.
        stage: The stage that failed, unless the error names one.
        in_batch: Whether the batch itself reports, once for all its assets, what concerns the account or the provider.
    """
    end_run_on_hangup()
    try:
        if in_batch:
            yield
        else:
            with totals_of_interrupts_told():
                yield
    except SubmittedError as error:
        get_run_logger().warning("%s: %s", job_name(job), error, extra=TOLD_AT_END)
        raise
    except SegmindError as error:
        name = job_name(job)
        if error.decision:
            _warn(name, error, in_batch)
            events.attempt_failed(name, error)
        started = not isinstance(error, NotStartedError) or error.possibly_billed_usd
        if started and not (error.decision and error.decision.retry):
            events.asset_failed(name, error, error.stage or stage)
            if isinstance(error, InsufficientCreditsError) and not in_batch:
                events.credits_exhausted(error)
        raise


def _warn(name: str, error: SegmindError, in_batch: bool) -> None:
    assert error.decision is not None
    wait = error.decision.wait_seconds
    follows = f"next request in {wait:.1f} s" if wait is not None else "not sent again"
    # In a batch the gate has already logged, once for all, that the rate is limited or the provider overloaded.
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
