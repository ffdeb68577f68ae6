"""The plugin's events in Prefect, for automations and other tools.

| event | about | when |
| --- | --- | --- |
| `prefect-segmind.asset.archived` | a job | its picture is in the archive; for one that a batch finds in place, none |
| `prefect-segmind.asset.failed` | a job | it has failed and is not retried in this run; for a bad inbox file, once |
| `prefect-segmind.attempt.failed` | a job | a request has failed, retried or not |
| `prefect-segmind.budget.exhausted` | a run | a batch has stopped at its budget |
| `prefect-segmind.budget.used` | a shared budget | 80 % of it are spent, or 100 %, each once |
| `prefect-segmind.credits.exhausted` | the account | the provider refuses for lack of credits |

The `prefect.resource.id` is `prefect-segmind.job.{fingerprint}`, with the name instead for a job too invalid to have a
fingerprint; `prefect-segmind.run.{flow run}`; `prefect-segmind.budget.{name}`; or `prefect-segmind.account`. Amounts
are texts such as `"0.05"`. Prefect adds the flow run, its flow, deployment and tags as related resources.
"""

from __future__ import annotations

from typing import Any

from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from prefect_segmind.batch.tally import BatchResult
from prefect_segmind.errors import BudgetReachedError, InsufficientCreditsError, SegmindError, redact
from prefect_segmind.limits.account import Account, Announcement, Budget
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage

ASSET_ARCHIVED = "prefect-segmind.asset.archived"
ASSET_FAILED = "prefect-segmind.asset.failed"
ATTEMPT_FAILED = "prefect-segmind.attempt.failed"
BUDGET_EXHAUSTED = "prefect-segmind.budget.exhausted"
BUDGET_USED = "prefect-segmind.budget.used"
CREDITS_EXHAUSTED = "prefect-segmind.credits.exhausted"


def asset_archived(archived: ArchivedImage) -> None:
    """Emits that a picture is in the archive; its status is the resource's label `prefect-segmind.status`.

    Args:
        archived: The picture.
    """
    payload = archived.model_dump(mode="json") | _costs(archived)
    _emit(ASSET_ARCHIVED, _job(archived.name, archived.fingerprint, status=archived.status), payload)


def asset_failed(name: str, error: SegmindError, stage: str) -> None:
    """Emits that a job has failed.

    Args:
        name: The job's name.
        error: The error that it ended with.
        stage: `validate`, `upload`, `generate`, `archive` or `publish`.
    """
    payload = {
        "name": name,
        "fingerprint": error.fingerprint,
        "stage": stage,
        "error": str(error),
        "status": error.status,
        **_costs(error),
        "attempts": error.requests_sent,
    }
    _emit(ASSET_FAILED, _job(name, error.fingerprint, stage=stage), payload)


def attempt_failed(name: str, error: SegmindError) -> None:
    """Emits that a request has failed, with the decision on a retry.

    Args:
        name: The job's name.
        error: The error of the request, with a decision.
    """
    assert error.decision is not None
    payload = {
        "name": name,
        "fingerprint": error.fingerprint,
        "attempt": error.requests_sent,
        "status": error.status,
        "error": str(error),
        "reason": error.decision.reason,
        "wait_seconds": error.decision.wait_seconds,
        "possibly_billed": error.possibly_billed,
        "request_id": error.request_id,
    }
    _emit(ATTEMPT_FAILED, _job(name, error.fingerprint), payload)


def run_stopped(stopped: SegmindError, result: BatchResult) -> None:
    """Emits that a batch has stopped at its budget or without credits; nothing for other errors.

    Args:
        stopped: The error that stopped it.
        result: The result of the batch.
    """
    payload = {"error": str(stopped), **_costs(result), "not_started": result.not_started}
    if isinstance(stopped, BudgetReachedError):
        _emit(BUDGET_EXHAUSTED, {"prefect.resource.id": f"prefect-segmind.run.{flow_run.id}"}, payload)
    elif isinstance(stopped, InsufficientCreditsError):
        _emit(CREDITS_EXHAUSTED, _ACCOUNT, payload)


def budget_used(budget: Budget, account: Account, crossed: Announcement) -> None:
    """Emits that so many percent of a shared budget are spent; at 100 it pays for no further picture.

    Args:
        budget: The budget.
        account: Its account.
        crossed: The threshold that is crossed.
    """
    payload = {
        "budget": account.name,
        "percent": crossed.percent,
        "limit_usd": usd(crossed.limit_usd),
        "used_usd": usd(account.used_usd),
    }
    resource = {
        "prefect.resource.id": f"prefect-segmind.budget.{account.name}",
        "prefect.resource.name": budget.title,
        "prefect-segmind.percent": str(crossed.percent),
    }
    _emit(BUDGET_USED, resource, payload)


def credits_exhausted(error: InsufficientCreditsError) -> None:
    """Emits that a single job was refused for lack of credits.

    Args:
        error: The error that it ended with.
    """
    _emit(CREDITS_EXHAUSTED, _ACCOUNT, {"error": str(error), **_costs(error), "not_started": 0})


_ACCOUNT = {"prefect.resource.id": "prefect-segmind.account"}


def _job(name: str, fingerprint: str | None, **labels: str) -> dict[str, str]:
    resource = {"prefect.resource.id": f"prefect-segmind.job.{fingerprint or name}", "prefect.resource.name": name}
    return resource | {f"prefect-segmind.{label}": value for label, value in labels.items()}


def _costs(of: ArchivedImage | BatchResult | SegmindError) -> dict[str, str]:
    return {"cost_usd": usd(of.cost_usd), "possibly_billed_usd": usd(of.possibly_billed_usd)}


def _emit(event: str, resource: dict[str, str], payload: dict[str, Any]) -> None:
    try:
        emit_event(event=event, resource=resource, payload=payload)
    except Exception as error:  # noqa: BLE001 - an event must not fail a paid job
        get_run_logger().warning("no event %s: %s", event, redact(str(error)))
