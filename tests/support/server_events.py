"""What the Prefect server knows of events."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events import emit_event

from tests.support.waiting import until


def all_events(tag: str, prefix: str) -> list[dict[str, Any]]:
    """All events of runs with a tag whose names begin so, once they are on the server, a moment after the runs."""
    resource = {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}
    last = emit_event("end-of-test", {"prefect.resource.id": tag}, related=[resource])
    assert last
    with get_client(sync_client=True) as client:
        until(lambda: str(last.id) in [each["id"] for each in _events(client, tag, "end-of-test")])  # arrive in order
        return _events(client, tag, prefix)


def _events(client: SyncPrefectClient, tag: str, prefix: str) -> list[dict[str, Any]]:
    wanted = {
        "occurred": {"since": (datetime.now(UTC) - timedelta(hours=1)).isoformat()},
        "event": {"prefix": [prefix]},
        "related": {"id": [f"prefect.tag.{tag}"]},
    }
    return list(client.request("POST", "/events/filter", json={"filter": wanted}).json()["events"])
