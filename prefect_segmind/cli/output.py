"""How a command ends: its exit code, its JSON, and what people read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL

from prefect_segmind.batch.tally import BatchError, BatchResult
from prefect_segmind.cli.terminal import people
from prefect_segmind.errors import (
    AccountError,
    BudgetReachedError,
    InputError,
    InsufficientCreditsError,
    NotApprovedError,
    RunCancelledError,
    SegmindError,
    redact,
)
from prefect_segmind.limits.ledger import Ledger, Totals
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.tasks.interrupts import ended_by

DONE, FAILED, BAD_INPUT, ACCOUNT_REFUSED, NO_MONEY = range(5)
INTERRUPTED = 130
INTERRUPTS = (KeyboardInterrupt, TerminationSignal)
"""What ends a command from without; Prefect may raise another error on top of it."""

NOTHING_SENT = Totals()

SHOWN_JOBS = 20
"""Jobs of a plan that people see."""
SHOWN_FAILURES = 10
"""Failures that people see; the JSON and the manifest of failures have them all."""


def address_in_ui(flow_run_id: str) -> str:
    """Where a flow run is in Prefect's UI; where no server is configured, with how to start one that has it."""
    api = PREFECT_API_URL.value()
    if api:
        ui = PREFECT_UI_URL.value() or api.removesuffix("/api")
        return f"{ui}/runs/flow-run/{flow_run_id}"
    prefect = Path(sys.executable).with_name("prefect")
    if prefect.is_relative_to(Path.cwd()):
        prefect = prefect.relative_to(Path.cwd())
    return f"{prefect} --no-prompt server start, then http://127.0.0.1:4200/runs/flow-run/{flow_run_id} (tab Artifacts)"


def exit_code(error: BaseException) -> int:
    """The exit code for an error."""
    table: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], int], ...] = (
        (InputError, BAD_INPUT),
        (AccountError, ACCOUNT_REFUSED),
        ((InsufficientCreditsError, BudgetReachedError, NotApprovedError), NO_MONEY),
        ((CancelledRun, RunCancelledError), INTERRUPTED),
    )
    if interrupted(error):
        return INTERRUPTED
    cause = error.stopped or error if isinstance(error, BatchError) else error
    return next((code for kind, code in table if isinstance(cause, kind)), FAILED)


def success(archived: ArchivedImage) -> dict[str, Any]:
    """What `generate --json` prints of a picture: money as text, all else as it is."""
    return {
        **archived.model_dump(mode="json"),
        "cost_usd": usd(archived.cost_usd),
        "possibly_billed_usd": usd(archived.possibly_billed_usd),
    }


def failure(name: str, error: BaseException, ledger: Ledger | None = None) -> dict[str, Any]:
    """What `generate --json` prints of a failure.

    Args:
        name: The job's.
        error: What it ended with.
        ledger: What its requests came to.
    """
    ledger = ledger or Ledger()
    totals, asked_for = ledger.totals, next(iter(ledger.pictures), None)
    return {
        "status": "failed",
        "name": name,
        **dict.fromkeys(("image", "sidecar", "fingerprint", "sha256", "width", "height", "seed", "published")),
        "fingerprint": getattr(error, "fingerprint", None) or asked_for,
        "cost_usd": usd(totals.cost_usd),
        "possibly_billed_usd": usd(totals.possibly_billed_usd),
        "attempts": totals.requests_sent,
        "error": message(error, totals),
    }


def outcome(archived: ArchivedImage) -> dict[str, str]:
    """What people see of a picture in the terminal."""
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
    error: BaseException, verbose: bool, totals: Totals = NOTHING_SENT, facts: Mapping[str, str] = MappingProxyType({})
) -> int:
    """Says what went wrong in a few lines, with a traceback only for those who ask.

    Args:
        error: What a command ended with.
        verbose: Whether to show the traceback.
        totals: What the requests of its run came to.
        facts: Where the run is, a title and a text for each line.

    Returns:
        The exit code.
    """
    if verbose:
        people.print_exception()
    people.print(message(error, totals), style="red", markup=False, highlight=False, soft_wrap=True)
    if isinstance(error, SegmindError) and error.decision:
        people.print(f"Not sent again: {error.decision.reason}.", markup=False, highlight=False)
    if totals.cost_usd or totals.possibly_billed_usd:
        paid, possibly = usd(totals.cost_usd), usd(totals.possibly_billed_usd)
        people.print(f"Paid: {paid} USD; possibly billed: {possibly} USD.", highlight=False)
    elif isinstance(error, SegmindError):
        people.print("This run paid nothing.")
    for title, text in facts.items():
        people.print(f"{title}: {text}", markup=False, highlight=False, soft_wrap=True)
    return exit_code(error)


def batch(result: BatchResult) -> dict[str, Any]:
    """What `refresh --json` prints of a run, or of a plan."""
    money = ("cost_usd", "possibly_billed_usd", "planned_usd")
    planned = result.jobs if result.dry_run else ()
    return {
        **result.model_dump(mode="json", exclude={"images", "plan"}),
        **{each: usd(getattr(result, each)) for each in money},
        "waiting": result.plan.wait,
        "images": [success(each) for each in result.images],
        "jobs": [{**each.model_dump(), "usd": usd(each.usd)} for each in planned],
        "jobs_left_out": result.total - len(planned) if result.dry_run else 0,
    }


def batch_failure(error: BaseException) -> dict[str, Any]:
    """What `refresh --json` prints of a run that failed before anything was done."""
    counts = dict.fromkeys(("total", "generated", "reused", "recovered", "failed", "not_started"), 0)
    money = dict.fromkeys(("cost_usd", "possibly_billed_usd", "planned_usd"), "0.00")
    rest: dict[str, Any] = {"images": [], "failures": [], "failed_manifest": None, "stopped": None}
    rest |= {"not_started_names": [], "waiting": 0, "dry_run": False, "jobs": [], "jobs_left_out": 0}
    return {**counts, **money, **rest, "error": message(error)}


def dry_run_facts(result: BatchResult) -> dict[str, str]:
    """What people see of a dry run in the terminal: the plan, its first jobs, and the first of the others that fail."""
    facts = {"dry run": result.sentence(), **result.plan.facts()}
    shown = result.jobs[:SHOWN_JOBS]
    facts |= {f"job {number}": each.sentence() for number, each in enumerate(shown, start=1)}
    if result.total > len(shown):
        facts["and"] = f"{result.total - len(shown)} more"
    listed = sum(each.needs == "fail" for each in shown)
    failing = [each for each in result.failures if each.name not in {job.name for job in shown}]
    for number, failure in enumerate(failing[:SHOWN_FAILURES], start=1):
        facts[f"fails {number}"] = f"{failure.name}: {failure.error}"
    if (left := result.failed - listed - SHOWN_FAILURES) > 0:
        facts["and fail"] = f"{left} more"
    return facts


def batch_facts(result: BatchResult) -> dict[str, str]:
    """What people see of a run in the terminal."""
    facts = {"result": result.sentence()}
    if result.images:
        first = result.images[0]
        facts["archive"] = first.image[: first.image.replace("\\", "/").rindex(f"/{first.name}/")]
    for number, each in enumerate(result.failures[:SHOWN_FAILURES], start=1):
        facts[f"failed {number}"] = f"{each.name} ({each.stage}): {each.error}"
    if len(result.failures) > SHOWN_FAILURES:
        facts["and"] = f"{len(result.failures) - SHOWN_FAILURES} more failed"
    if result.stopped:
        facts["stopped"] = f"{result.stopped}; the same command again goes on from here"
    if result.failed_manifest:
        facts["to run again"] = result.failed_manifest
    return facts


def interrupted(error: BaseException) -> bool:
    """Whether an error comes of an interrupt."""
    return any(isinstance(each, INTERRUPTS) for each in _chain(error))


def message(error: BaseException, totals: Totals = NOTHING_SENT) -> str:
    """An error in words for people.

    Args:
        error: It.
        totals: What the requests of its run came to.
    """
    if interrupted(error):
        by = next(filter(None, map(ended_by, _chain(error))))
        ended = "" if by == "Ctrl-C" else f" (it was ended by {by})"
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


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all those that it came of."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        inner = left.pop()
        if inner is not None and id(inner) not in seen:
            seen.add(id(inner))
            yield inner
            left += inner.__context__, inner.__cause__
