"""Events out: what a real Prefect server has been told, for automations and other people's tools."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from prefect_segmind import image_to_image, refresh_assets
from prefect_segmind.batch.approval import Reply
from prefect_segmind.batch.tally import BatchError
from prefect_segmind.errors import InsufficientCreditsError, InvalidJobError
from prefect_segmind.reporting import events as our_events
from prefect_segmind.sandbox import Answer, Sandbox
from tests.support.answering import answering
from tests.support.manifests import mugs, write_campaign
from tests.support.server_events import all_events

pytestmark = pytest.mark.usefixtures("prefect_server")
DOCUMENTED = {
    event: set(re.findall(r"`(\w+)`", payload))
    for event, payload in re.findall(
        r"^\| `(prefect-segmind\..*?)` \|.*\| (.*) \|$",
        (Path(__file__).parents[2] / "docs" / "schedules-and-events.md").read_text(encoding="utf-8"),
        re.M,
    )
}
Events = Callable[[int], list[dict[str, Any]]]


@pytest.fixture
def events(own_tag: str) -> Events:
    """Our events of this test's runs: so many, and no more behind them."""

    def told(count: int) -> list[dict[str, Any]]:
        found = all_events(own_tag, "prefect-segmind.")
        assert len(found) == count, [each["event"] for each in found]
        for each in found:
            assert each["payload"].keys() == DOCUMENTED[each["event"]]
        return sorted(found, key=lambda each: str(each["occurred"]))

    return told


@pytest.fixture
def manifest(photo: Path) -> str:
    return write_campaign(photo, mugs(photo, 4, "a red mug, {}", first_seed=1000))


def test_an_archived_picture_says_where_it_is_and_what_it_cost(
    sandbox: Sandbox, photo: Path, events: Events, tmp_path: Path
) -> None:
    archived = image_to_image(str(photo), "a red mug", name="hero", publish_to=str(tmp_path / "live"))
    (event,) = events(1)
    assert event["event"] == "prefect-segmind.asset.archived"
    assert event["resource"] == {
        "prefect.resource.id": f"prefect-segmind.job.{archived.fingerprint}",
        "prefect.resource.name": "hero",
        "prefect-segmind.status": "generated",
    }
    payload = event["payload"]
    assert (payload["status"], payload["image"], payload["cost_usd"]) == ("generated", archived.image, "0.05")
    assert (payload["published"], archived.published) == (None, str(tmp_path / "live" / "hero.png"))
    assert {"flow-run", "flow"} <= {each.get("prefect.resource.role") for each in event["related"]}


def test_a_picture_that_is_in_place_when_a_batch_begins_is_no_event(
    sandbox: Sandbox, manifest: str, events: Events
) -> None:
    refresh_assets(manifest)
    assert refresh_assets(manifest).reused == 4
    assert {each["resource"]["prefect-segmind.status"] for each in events(4)} == {"generated"}


def test_a_failed_job_says_where_and_why(sandbox: Sandbox, photo: Path, events: Events) -> None:
    with pytest.raises(InvalidJobError):
        image_to_image(str(photo), "a red mug", name="hero", style_type="realistic")
    (event,) = events(1)
    assert event["event"] == "prefect-segmind.asset.failed"
    assert event["resource"]["prefect.resource.name"] == "hero"
    assert (event["payload"]["name"], event["payload"]["stage"]) == ("hero", "validate")
    assert "Did you mean REALISTIC?" in event["payload"]["error"]


def test_a_request_that_is_sent_again_is_no_failed_job(sandbox: Sandbox, photo: Path, events: Events) -> None:
    sandbox.play(Answer(status=429, reset_in=0.1))
    image_to_image(str(photo), "a red mug")
    assert [each["event"] for each in events(2)] == ["prefect-segmind.attempt.failed", "prefect-segmind.asset.archived"]


def test_no_credits_are_told_of_the_account(sandbox: Sandbox, photo: Path, events: Events) -> None:
    sandbox.play(Answer(status=406, body='{"error": "Insufficient credits: balance 0.01, need 0.05"}'))
    with pytest.raises(InsufficientCreditsError):
        image_to_image(str(photo), "a red mug")
    told = events(3)
    assert [each["event"].removeprefix("prefect-segmind.") for each in told] == [
        *("attempt.failed", "asset.failed", "credits.exhausted")
    ]
    assert told[-1]["resource"] == {"prefect.resource.id": "prefect-segmind.account"}
    assert "Insufficient credits" in told[-1]["payload"]["error"]


def test_a_batch_without_credits_tells_it_once(sandbox: Sandbox, manifest: str, events: Events) -> None:
    sandbox.play(*[Answer(status=406, body='{"error": "Insufficient credits: balance 0.01, need 0.05"}')] * 4)
    with pytest.raises(BatchError) as error:
        refresh_assets(manifest, max_concurrency=1)
    told = events(3)
    assert [each["event"].removeprefix("prefect-segmind.") for each in told] == [
        *("attempt.failed", "asset.failed", "credits.exhausted")
    ]
    assert told[-1]["payload"]["not_started"] == error.value.result.not_started == 3


def test_credits_that_end_a_trimmed_batch_are_told_too(
    sandbox: Sandbox, manifest: str, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.play(Answer(status=406, body='{"error": "Insufficient credits: balance 0.01, need 0.05"}'))
    with answering(Reply("trim", Decimal("0.10"))), pytest.raises(BatchError):
        refresh_assets(manifest, max_concurrency=1, approve_above_usd=Decimal(0))
    assert events(3)[-1]["event"] == "prefect-segmind.credits.exhausted"


def test_a_picture_that_is_archived_and_not_published_is_told_as_both(
    sandbox: Sandbox, manifest: str, events: Events, tmp_path: Path
) -> None:
    (tmp_path / "live" / "mug" / "0.png").mkdir(parents=True)  # in the way
    with pytest.raises(BatchError):
        refresh_assets(manifest, publish_to=str(tmp_path / "live"))
    told = events(5)
    assert Counter(each["event"].removeprefix("prefect-segmind.") for each in told) == {
        **{"asset.archived": 4, "asset.failed": 1}
    }
    (failed,) = (each for each in told if each["event"].endswith("failed"))
    assert (failed["payload"]["stage"], failed["payload"]["cost_usd"]) == ("publish", "0.05")
    assert "is archived, but not published" in failed["payload"]["error"]


def test_a_budget_that_is_reached_is_told_of_the_run(sandbox: Sandbox, manifest: str, events: Events) -> None:
    with pytest.raises(BatchError):
        refresh_assets(manifest, max_concurrency=1, budget_usd=Decimal("0.10"))
    *archived, reached = events(3)
    assert {each["event"] for each in archived} == {"prefect-segmind.asset.archived"}
    assert reached["event"] == "prefect-segmind.budget.exhausted"
    assert reached["resource"]["prefect.resource.id"].startswith("prefect-segmind.run.")
    assert (reached["payload"]["cost_usd"], reached["payload"]["not_started"]) == ("0.10", 2)


def test_a_shared_budget_is_told_once_at_80_percent_and_once_when_it_is_spent(
    sandbox: Sandbox, photo: Path, events: Events, tmp_path: Path
) -> None:
    for number in range(5):
        manifest = write_campaign(photo, mugs(photo, 1, f"a red mug, {number}", name=f"mug/{number}"))
        refresh_assets(manifest, archive=str(tmp_path / "archive"), budget_name="summer", budget_usd=Decimal("0.25"))
    told = [each for each in events(7) if each["event"] == "prefect-segmind.budget.used"]
    assert [each["payload"] for each in told] == [
        {"budget": "summer", "percent": 80, "limit_usd": "0.25", "used_usd": "0.20"},
        {"budget": "summer", "percent": 100, "limit_usd": "0.25", "used_usd": "0.25"},
    ]
    assert {each["resource"]["prefect.resource.id"] for each in told} == {"prefect-segmind.budget.summer"}
    assert [each["resource"]["prefect-segmind.percent"] for each in told] == ["80", "100"]


def test_every_event_is_documented() -> None:
    ours = {value for name, value in vars(our_events).items() if name.isupper() and isinstance(value, str)}
    assert DOCUMENTED.keys() == ours
