"""Budgets that runs share: what all of them are billed is within the limit, and each run ends as at its own budget."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import pytest

from prefect_segmind import (
    BatchError,
    BatchResult,
    explore_variations,
    image_to_image,
    process_inbox,
    produce_asset,
    refresh_assets,
)
from prefect_segmind.batch.approval import Approved
from prefect_segmind.cli import commands, output
from prefect_segmind.errors import BudgetReachedError, ConfigurationError
from prefect_segmind.limits.account import Account, Share
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from tests.support.manifests import mugs, write_campaign
from tests.support.moto_server import moto_server
from tests.support.waiting import until

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.many]

PREFIX = "PREFECT_INTEGRATIONS_SEGMIND_"


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture(params=["folder", "moto"])
def shop(request: pytest.FixtureRequest, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The sandbox, with an archive whose store honours conditions."""
    place = str(tmp_path / "archive")
    if request.param == "moto":
        endpoint = request.getfixturevalue("moto")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        bucket = f"shared-{tmp_path.parent.name}-{tmp_path.name}".replace("_", "-").lower()[-60:].strip("-")
        boto3.session.Session(region_name="us-east-1").client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
        place = f"s3://{bucket}/archive"
        monkeypatch.setenv(f"{PREFIX}UPLOAD_TO", f"s3://{bucket}/uploads")
    monkeypatch.setenv(f"{PREFIX}ARCHIVE", place)
    return sandbox


@pytest.fixture
def folder(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    monkeypatch.setenv(f"{PREFIX}ARCHIVE", str(tmp_path / "archive"))
    return sandbox


def campaign(photo: Path, count: int, name: str = "mug") -> str:
    folder = photo.parent / name
    folder.mkdir(exist_ok=True)
    (folder / photo.name).write_bytes(photo.read_bytes())
    return write_campaign(folder / photo.name, mugs(photo, count, f"a {name}, number {{}}", name=f"{name}/{{}}"))


def run(manifest: str, **parameters: Any) -> BatchResult:
    """The result, however the run ends."""
    try:
        return refresh_assets(manifest, **parameters)
    except BatchError as error:
        return error.result


def account(name: str) -> Account:
    found = Services().archive.store.get(f".segmind/budgets/{name}.json")
    assert found is not None
    return Account.model_validate_json(found.data)


def the_day() -> Account:
    (key,) = Services().archive.store.keys(".segmind/budgets/daily-")
    return account(key.rpartition("/")[2].removesuffix(".json"))


def test_two_runs_at_once_spend_a_days_budget_to_the_last_picture_and_no_more(
    shop: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}DAILY_BUDGET_USD", "0.52")
    shop.play(*[Answer(delay=0.2)] * 10)
    manifests = [campaign(photo, 8, name) for name in ("mug", "cup")]
    with ThreadPoolExecutor(2) as pool:
        results = [each.result() for each in [pool.submit(copy_context().run, run, path) for path in manifests]]
    assert shop.ledger.billed_usd == Decimal("0.50")
    assert sum(each.cost_usd for each in results) == Decimal("0.50")
    assert sum(each.generated for each in results) == 10
    assert sum(each.not_started for each in results) == 6
    for each in results:
        assert each.failed == 0
        if each.not_started:
            assert "daily budget of 0.52 USD (PREFECT_INTEGRATIONS_SEGMIND_DAILY_BUDGET_USD" in (each.stopped or "")
    assert (the_day().spent_usd, the_day().shares) == (Decimal("0.50"), ())


def test_a_campaign_over_two_runs_one_after_the_other_spends_its_budget_once(shop: Sandbox, photo: Path) -> None:
    shared = {"budget_name": "summer", "budget_usd": Decimal("0.20")}
    first = run(campaign(photo, 3), **shared)
    assert (first.generated, first.stopped) == (3, None)
    second = run(campaign(photo, 4, "cup"), **shared)
    assert (second.generated, second.not_started) == (1, 3)
    assert "the budget summer of 0.20 USD (budget_name, account summer) is reached: 0.20 USD" in (second.stopped or "")
    assert shop.ledger.billed_usd == Decimal("0.20")
    again = run(campaign(photo, 4, "cup"), **shared | {"budget_usd": Decimal("0.25")})
    assert (again.reused, again.generated, again.not_started) == (1, 1, 2), "a raised limit counts from then on"


def test_single_pictures_and_tasks_count_too_and_end_with_the_budgets_own_error(
    folder: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}DAILY_BUDGET_USD", "0.10")
    job: dict[str, Any] = {"image": str(photo), "prompt": "a red mug"}
    assert image_to_image(**job, name="one").cost_usd == Decimal("0.05")
    assert produce_asset({**job, "name": "two", "seed": 1002}).cost_usd == Decimal("0.05")
    with pytest.raises(
        BudgetReachedError, match=r"the daily budget of 0.10 USD \(PREFECT_.*_DAILY_BUDGET_USD, account"
    ):
        produce_asset({**job, "name": "three", "seed": 1003})
    assert image_to_image(**job, name="one").status == "reused", "what is there costs nothing"
    assert folder.ledger.billed_usd == Decimal("0.10")
    assert (the_day().spent_usd, the_day().shares) == (Decimal("0.10"), ())


@pytest.mark.parametrize(
    ("code", "variable", "options", "told"),
    [
        (output.NO_MONEY, ("DAILY_BUDGET_USD", "0.04"), (), "the daily budget of 0.04 USD"),
        (output.NO_MONEY, ("MONTHLY_BUDGET_USD", "0.04"), (), "the monthly budget of 0.04 USD"),
        (output.NO_MONEY, None, ("--budget-name", "summer", "--budget-usd", "0.04"), "the budget summer of 0.04 USD"),
        (output.BAD_INPUT, None, ("--budget-name", "summer"), "budget_name: a shared budget needs its limit"),
        (output.BAD_INPUT, None, ("--budget-name", "a/b", "--budget-usd", "1"), "budget_name: 'a/b' is not allowed"),
        (output.BAD_INPUT, ("BUDGET_TIMEZONE", "Mars/Olympus"), (), "BUDGET_TIMEZONE: 'Mars/Olympus': "),
    ],
)
def test_a_command_ends_with_the_code_of_no_money_or_of_bad_input_and_names_the_budget(
    code: int,
    variable: tuple[str, str] | None,
    options: tuple[str, ...],
    told: str,
    folder: Sandbox,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if variable:
        monkeypatch.setenv(PREFIX + variable[0], variable[1])
    assert commands.run(["refresh", campaign(photo, 2), "--json", *options]) == code
    found = json.loads(capsys.readouterr().out)
    assert told in str(found["error"])
    assert folder.ledger.billed == 0


def test_a_single_picture_for_which_the_budget_has_no_room_ends_with_the_code_of_no_money(
    folder: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"{PREFIX}MONTHLY_BUDGET_USD", "0.04")
    assert commands.run(["generate", str(photo), "a red mug", "--json"]) == output.NO_MONEY
    assert "the monthly budget of 0.04 USD" in json.loads(capsys.readouterr().out)["error"]
    assert folder.ledger.billed == 0


@pytest.mark.parametrize("command", ["refresh", "generate"])
def test_on_a_store_that_ignores_conditions_a_shared_budget_is_refused_before_anything_is_paid(
    command: str,
    sandbox: Sandbox,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"{PREFIX}DAILY_BUDGET_USD", "5")
    what = [campaign(photo, 2)] if command == "refresh" else [str(photo), "a red mug"]
    assert commands.run([command, *what, "--json"]) == output.BAD_INPUT
    error = json.loads(capsys.readouterr().out)["error"]
    assert f"{PREFIX}DAILY_BUDGET_USD: a shared budget needs an archive whose store honours conditional writes" in error
    with pytest.raises(ConfigurationError, match="DAILY_BUDGET_USD: a shared budget needs"):
        produce_asset({"image": str(photo), "prompt": "a red mug", "name": "mug"})
    assert not sandbox.ledger.requests


def test_plan_question_and_check_tell_what_is_left(
    folder: Sandbox,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(f"{PREFIX}DAILY_BUDGET_USD", "0.12")
    image_to_image(str(photo), "a red mug", name="one")
    capsys.readouterr()
    assert commands.run(["refresh", campaign(photo, 3), "--dry-run"]) == output.DONE
    assert "daily budget: 0.07 of 0.12 USD left" in caplog.text
    assert "the daily budget has 0.07 USD left, which pays for 1 of 3 pictures: the run stops there" in caplog.text
    assert commands.run(["check"]) == output.DONE
    assert "shared budgets: daily budget: 0.07 of 0.12 USD left" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setenv(f"{PREFIX}DAILY_BUDGET_USD", "")
    assert commands.run(["check"]) == output.DONE
    assert "shared budgets: none" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_is_killed_leaves_what_it_has_not_spent_to_the_next(
    shop: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}DAILY_BUDGET_USD", "0.30")
    shop.play(*[Answer()] * 2, *[Answer(delay=600)] * 2)
    command = [sys.executable, "-m", "prefect_segmind", "refresh", campaign(photo, 20), "--max-concurrency", "2"]
    killed = subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: shop.ledger.billed == 4)  # two of them without an answer
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    (left,) = the_day().shares
    assert left.drawn_usd > Decimal("0.20")
    monkeypatch.setattr("prefect_segmind.limits.account.LEASE_SECONDS", 1.0)
    result = run(campaign(photo, 20, "cup"), max_concurrency=2)
    assert result.generated == 2
    assert "the daily budget of 0.30 USD" in (result.stopped or "")
    assert shop.ledger.billed_usd == Decimal("0.30")
    assert (the_day().spent_usd, the_day().shares) == (Decimal("0.30"), ())


def test_runs_that_share_a_budget_share_the_rate_too(folder: Sandbox, photo: Path) -> None:
    shared: dict[str, Any] = {"budget_name": "summer", "budget_usd": Decimal(5), "requests_per_minute": 600}
    assert run(campaign(photo, 3), **shared).generated == 3
    found = Services().archive.store.get(".segmind/requests-per-minute.json")
    assert found is not None
    assert sum(each["count"] for each in json.loads(found.data)["draws"]) >= 3


def test_the_records_name_the_shares_that_their_requests_were_paid_from(
    folder: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}DAILY_BUDGET_USD", "5")
    monkeypatch.setenv(f"{PREFIX}MONTHLY_BUDGET_USD", "50")
    made = image_to_image(str(photo), "a red mug", name="one")
    found = Services().archive.read(made.fingerprint)
    assert found is not None
    assert len(found.record.attempts[0].shares) == 2


def held_by_another(limit: str) -> None:
    """Lets another run, which lives, hold all of the campaign's budget."""
    share = Share(id="another", drawn_usd=Decimal(limit), price_usd=Decimal("0.05"), since=0.0, renewed=1e12)
    held = Account(name="summer", dearest_usd=Decimal("0.05"), shares=(share,))
    Services().archive.store.put(".segmind/budgets/summer.json", held.model_dump_json().encode(), "application/json")


def test_a_run_that_waits_for_money_that_others_hold_stops_in_the_end(
    folder: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("prefect_segmind.limits.purse.LONGEST_WAIT_SECONDS", 1.0)
    monkeypatch.setattr("prefect_segmind.limits.purse.POLL_SECONDS", 0.2)
    held_by_another("0.20")
    result = run(campaign(photo, 3), budget_name="summer", budget_usd=Decimal("0.20"))
    assert (result.generated, result.not_started) == (0, 3)
    assert "0.00 USD spent or possibly billed by all runs, 0.20 USD held by other runs" in (result.stopped or "")
    assert "budget summer: other runs hold 0.20 USD of what is left; this one waits for it" in caplog.text


def test_ctrl_c_ends_a_run_that_waits_for_money_and_gives_back_what_it_has_drawn(
    folder: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}DAILY_BUDGET_USD", "5")
    held_by_another("0.20")
    options = ["--budget-name", "summer", "--budget-usd", "0.20"]
    command = [sys.executable, "-m", "prefect_segmind", "refresh", campaign(photo, 3), "--json", *options]
    waits = subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: len(account("summer").shares) == 2, why=lambda: waits.poll())
    waits.send_signal(signal.SIGINT)
    out, told = waits.communicate(timeout=60)
    assert waits.returncode == output.INTERRUPTED, told
    assert json.loads(out)["generated"] == 0
    assert [each.id for each in account("summer").shares] == ["another"]
    assert (the_day().spent_usd, the_day().shares) == (0, ())


def test_variations_and_an_inbox_draw_from_a_campaigns_budget_too(folder: Sandbox, photo: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"budget_name": "summer", "budget_usd": Decimal("0.10")}
    with pytest.raises(BatchError, match=r"the budget summer of 0.10 USD"):
        explore_variations(str(photo), "a red mug", styles=["ANIME"], weights=[25, 50, 75], **shared)
    (inbox := tmp_path / "inbox").mkdir()
    (inbox / "cup.jpg").write_bytes(photo.read_bytes())
    visit = process_inbox(str(inbox), "a cup", settle_seconds=0, **shared)
    assert (visit.generated, visit.not_started) == (0, 1)
    assert folder.ledger.billed_usd == account("summer").spent_usd == Decimal("0.10")


def test_a_run_that_a_person_has_limited_has_failed_where_a_shared_budget_stops_it_first(
    folder: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}DAILY_BUDGET_USD", "0.10")
    limited = Approved(Decimal("1.00"), trimmed=True)
    monkeypatch.setattr("prefect_segmind.flows.batch_run.approve", lambda *_, **__: limited)
    with pytest.raises(BatchError, match=r"the daily budget of 0\.10 USD") as caught:
        refresh_assets(campaign(photo, 4))
    assert (caught.value.result.generated, folder.ledger.billed_usd) == (2, Decimal("0.10"))


def test_a_dear_answer_to_another_run_leaves_a_runs_own_budget_alone(
    folder: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}MONTHLY_BUDGET_USD", "100")
    name = Services().budgets[0].account(datetime.now(UTC))
    dear = Account(name=name, dearest_usd=Decimal("0.30"))
    Services().archive.store.put(f".segmind/budgets/{name}.json", dear.model_dump_json().encode(), "application/json")
    result = refresh_assets(campaign(photo, 3), budget_usd=Decimal("0.25"))
    assert (result.generated, result.cost_usd, result.stopped) == (3, Decimal("0.15"), None)


def test_nobody_is_asked_where_a_campaigns_budget_keeps_a_run_below_what_needs_no_approval(
    folder: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> None:
        pytest.fail("somebody was asked")

    monkeypatch.setattr("prefect_segmind.flows.approval_form._ask_in_prefect", ask)
    limits = {"budget_name": "summer", "budget_usd": Decimal("0.10"), "approve_above_usd": Decimal("0.12")}
    result = run(campaign(photo, 4), **limits)
    assert (result.generated, result.not_started) == (2, 2)
