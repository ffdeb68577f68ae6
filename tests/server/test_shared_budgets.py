"""Budgets that runs share: what all of them are billed is within the limit, and each run ends as at its own budget."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import pytest

from prefect_segmind import BatchError, BatchResult, refresh_assets
from prefect_segmind.limits.account import Account
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from tests.support.manifests import mugs, write_campaign
from tests.support.moto_server import moto_server

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
