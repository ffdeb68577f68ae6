"""The end of a command: its exit code, its JSON, and its output for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL

from prefect_segmind.batch.plan import Plan
from prefect_segmind.batch.results import NAMED
from prefect_segmind.batch.tally import TO_FETCH, BatchError, BatchResult, planned
from prefect_segmind.cli.terminal import people
from prefect_segmind.errors import (
    AccountError,
    BudgetReachedError,
    HistoryError,
    InputError,
    InsufficientCreditsError,
    NotApprovedError,
    RunCancelledError,
    SegmindError,
    redact,
)
from prefect_segmind.limits.ledger import NOTHING, Ledger, Totals
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.unsettled import Reconciled
from prefect_segmind.tasks.interrupts import ended_by
from prefect_segmind.text import visible

DONE, FAILED, BAD_INPUT, ACCOUNT_REFUSED, NO_MONEY = range(5)
INTERRUPTED = 130
INTERRUPTS = (KeyboardInterrupt, TerminationSignal)
"""Interrupts of a command; Prefect may raise another error on top."""

NOTHING_SENT = Totals()

SHOWN_JOBS = 20
"""Jobs of a plan that the terminal shows."""
SHOWN_FAILURES = 10
"""Failures that the terminal shows; the file of all results has all of them."""


def address_in_ui(flow_run_id: str) -> str:
    """The address of a flow run in Prefect's UI; without a configured server, also how to start one.

    Args:
        flow_run_id: The id of the flow run.
    """
    api = PREFECT_API_URL.value()
    if api:
        ui = PREFECT_UI_URL.value() or api.removesuffix("/api")
        return f"{ui}/runs/flow-run/{flow_run_id}"
    prefect = Path(sys.executable).with_name("prefect")
    if prefect.is_relative_to(Path.cwd()):
        prefect = prefect.relative_to(Path.cwd())
    return f"{prefect} --no-prompt server start, then http://127.0.0.1:4200/runs/flow-run/{flow_run_id} (tab Artifacts)"


def exit_code(error: BaseException) -> int:
    """The exit code for an error.

    Args:
        error: The error that ended the command.
    """
    table: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], int], ...] = (
        (InputError, BAD_INPUT),
        (AccountError, ACCOUNT_REFUSED),
        ((InsufficientCreditsError, BudgetReachedError, NotApprovedError), NO_MONEY),
        ((CancelledRun, RunCancelledError), INTERRUPTED),
    )
    if interrupted_by(error):
        return INTERRUPTED
    cause = error.stopped or error if isinstance(error, BatchError) else error
    if isinstance(cause, HistoryError) and cause.status in (401, 403):
        return ACCOUNT_REFUSED
    return next((code for kind, code in table if isinstance(cause, kind)), FAILED)


def print_json(result: Mapping[str, Any]) -> None:
    """Prints what a command did as one JSON object; amounts become text.

    Args:
        result: The fields of the object.
    """
    print(json.dumps(result, default=usd))


def failure(
    name: str, error: BaseException, ledger: Ledger | None = None, *, submitted: bool = False
) -> dict[str, Any]:
    """The fields of `generate --json` for a failure.

    Args:
        name: The job's name.
        error: The error that ended the command.
        ledger: The ledger of its requests, if it sent any.
        submitted: Whether the provider has accepted a request and not finished it.
    """
    ledger = ledger or Ledger()
    totals = ledger.totals
    return {
        **dict.fromkeys(ArchivedImage.model_fields),
        "status": "submitted" if submitted else "failed",
        "name": name,
        "fingerprint": getattr(error, "fingerprint", None) or next(iter(ledger.pictures), None),
        "cost_usd": totals.cost_usd,
        "possibly_billed_usd": totals.possibly_billed_usd,
        "attempts": totals.requests_sent,
        "error": message(error, totals, submitted=submitted),
    }


def picture_facts(archived: ArchivedImage) -> dict[str, str]:
    """The lines that the terminal shows for a picture, by title.

    Args:
        archived: The picture.
    """
    facts = {
        archived.status: archived.name,
        "picture": archived.image,
        "sidecar": archived.sidecar,
        "size, seed": f"{archived.width}×{archived.height}, {archived.seed}",
        "paid": f"{usd(archived.cost_usd)} USD in {archived.attempts} request{'s' * (archived.attempts != 1)}",
    }
    if archived.published:
        facts["published"] = archived.published
    if archived.possibly_billed_usd:
        facts["possibly paid"] = f"{usd(archived.possibly_billed_usd)} USD more"
    return facts


def show_failure(
    error: BaseException,
    verbose: bool,
    totals: Totals = NOTHING_SENT,
    facts: Mapping[str, str] = MappingProxyType({}),
    *,
    submitted: bool = False,
) -> int:
    """Prints an error in a few lines.

    Args:
        error: The error that ended the command.
        verbose: Whether to print its traceback too.
        totals: The totals of the run's requests.
        facts: Further lines, by title.
        submitted: Whether the provider has accepted a request and not finished it.

    Returns:
        The exit code.
    """
    if verbose:
        people.print_exception()
    people.print(visible(message(error, totals, submitted=submitted)), style="red", soft_wrap=True)
    if isinstance(error, SegmindError) and error.decision:
        people.print(f"Not sent again: {error.decision.reason}.")
    if totals.cost_usd or totals.possibly_billed_usd:
        paid, possibly = usd(totals.cost_usd), usd(totals.possibly_billed_usd)
        people.print(f"Paid: {paid} USD; possibly billed: {possibly} USD.")
    elif isinstance(error, SegmindError):
        people.print("This run paid nothing.")
    for title, text in facts.items():
        people.print(f"{title}: {text}", soft_wrap=True)
    return exit_code(error)


def batch(result: BatchResult) -> dict[str, Any]:
    """The fields of `refresh --json` for a run or a plan.

    Args:
        result: The result of the run.
    """
    planned_jobs = result.jobs if result.dry_run else ()
    return {
        **result.model_dump(exclude={"plan"}),
        "waiting": result.plan.wait,
        "jobs": [each.model_dump() for each in planned_jobs],
        "jobs_left_out": result.total - len(planned_jobs) if result.dry_run else 0,
    }


def batch_failure(error: BaseException) -> dict[str, Any]:
    """The fields of `refresh --json` for a run that failed before it had a plan.

    Args:
        error: The error that ended the command.
    """
    no_plan = Plan(total=0, generate=0, reuse=0, recover=0, wait=0, fail=0, price_usd=NOTHING)
    return batch(planned(no_plan).model_copy(update={"dry_run": False})) | {"error": message(error)}


def reconcile_failure(error: BaseException) -> dict[str, Any]:
    """The fields of `reconcile --json` for a failure.

    Args:
        error: The error that ended the command.
    """
    return Reconciled().model_dump(mode="json") | {"error": message(error)}


def dry_run_facts(result: BatchResult) -> dict[str, str]:
    """The lines that the terminal shows for a dry run, by title: the plan, its first jobs, and others that will fail.

    Args:
        result: The result of the dry run.
    """
    facts = {"dry run": result.sentence(), **result.plan.facts()}
    shown = result.jobs[:SHOWN_JOBS]
    facts |= {f"job {number}": each.sentence() for number, each in enumerate(shown, start=1)}
    if result.total > len(shown):
        facts["and"] = f"{result.total - len(shown)} more"
    listed = sum(each.needs in ("fail", "kept elsewhere") for each in shown)
    failing = [each for each in result.failures if each.name not in {job.name for job in shown}]
    for number, failure in enumerate(failing[:SHOWN_FAILURES], start=1):
        facts[f"fails {number}"] = f"{failure.name}: {failure.error}"
    if (left := result.failed - listed - SHOWN_FAILURES) > 0:
        facts["and fail"] = f"{left} more"
    return facts


def batch_facts(result: BatchResult) -> dict[str, str]:
    """The lines that the terminal shows for a run, by title.

    Args:
        result: The result of the run.
    """
    facts = {"result": result.sentence()}
    if result.images:
        first = result.images[0]
        facts["archive"] = first.image[: first.image.replace("\\", "/").rindex(f"/{first.name}/")]
    for number, each in enumerate(result.failures[:SHOWN_FAILURES], start=1):
        facts[f"failed {number}"] = f"{each.name} ({each.stage}): {each.error}"
    if result.failed > SHOWN_FAILURES:
        facts["and"] = f"{result.failed - SHOWN_FAILURES} more failed"
    if result.submitted:
        names = ", ".join(result.submitted_names[:SHOWN_FAILURES])
        more = f" and {result.submitted - SHOWN_FAILURES} more" if result.submitted > SHOWN_FAILURES else ""
        facts["submitted"] = f"{names}{more}; {TO_FETCH}"
    if result.stopped:
        facts["stopped"] = f"{result.stopped}; the same command again goes on from here"
    if result.results and (result.failed > SHOWN_FAILURES or result.total > NAMED):
        facts["all results"] = result.results
    if result.failed_manifest:
        facts["to run again"] = result.failed_manifest
    return facts


def message(error: BaseException, totals: Totals = NOTHING_SENT, *, submitted: bool = False) -> str:
    """The message of an error, for people.

    Args:
        error: The error that ended the command.
        totals: The totals of the run's requests.
        submitted: Whether the provider has accepted a request and not finished it.
    """
    if by := interrupted_by(error):
        ended = "" if by == "Ctrl-C" else f" (it was ended by {by})"
        if submitted:
            return (
                "interrupted; the provider has accepted what was under way: the same command again, or prefect-segmind "
                f"reconcile, fetches it without another payment{ended}"
            )
        if any(totals):
            return (
                "interrupted; a request that was under way may be billed, and the same command again recovers its "
                f"picture if it had arrived{ended}"
            )
        return f"interrupted; the same command again goes on from here{ended}"
    if isinstance(error, RuntimeError) and str(error).startswith("Failed to reach API"):  # Prefect's words
        return redact(
            f"PREFECT_API_URL: Prefect's server at {PREFECT_API_URL.value()} does not answer: start it, or go on "
            "without one: prefect config unset PREFECT_API_URL"
        )
    return str(error) if isinstance(error, SegmindError) else redact(f"{type(error).__name__}: {error}")


def interrupted_by(error: BaseException) -> str | None:
    """The interrupt behind an error, `Ctrl-C` or the name of a signal; None if there was none.

    Args:
        error: The error that ended the command.
    """
    return next(filter(None, map(ended_by, _chain(error))), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error with all its causes and contexts."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        inner = left.pop()
        if inner is not None and id(inner) not in seen:
            seen.add(id(inner))
            yield inner
            left += inner.__context__, inner.__cause__
