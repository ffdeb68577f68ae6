"""Accounts in an archive: no change of one run is lost to another, and a dead run is settled by the records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import pytest

from prefect_segmind.archive import budgets as module
from prefect_segmind.archive.archive import Archive, record_key
from prefect_segmind.archive.budgets import PERMITS_KEY, Budgets, account_key
from prefect_segmind.archive.record import Attempt, Record
from prefect_segmind.errors import PreconditionFailedError, StoreError
from prefect_segmind.limits.account import Account, Budget, Share, Standing
from prefect_segmind.limits.ledger import NOTHING, Fit
from prefect_segmind.limits.permits import Permits
from prefect_segmind.limits.purse import Purse
from prefect_segmind.storage.local import LocalStore
from prefect_segmind.storage.s3 import S3Store, s3_client
from tests.support.moto_server import moto_server
from tests.support.waiting import until

PRICE = Decimal("0.05")


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as endpoint:
        boto3.session.Session(region_name="us-east-1").client(
            "s3", endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b"
        ).create_bucket(Bucket="budgets")
        yield endpoint


@pytest.fixture(params=["folder", "moto"])
def archive(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    if request.param == "folder":
        return Archive(LocalStore(tmp_path / "archive"))
    settings = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", request.getfixturevalue("moto"))
    return Archive(S3Store("budgets", tmp_path.name, s3_client()))


def come(number: int) -> Callable[[Account, float], Account]:
    """The change of one run: it has spent the price of a picture."""
    standing = Standing(f"share {number}", "a run", PRICE, PRICE, NOTHING, PRICE)
    return lambda account, now: account.visited(standing, Decimal(100), now)


def test_no_change_is_lost_however_many_runs_make_one_at_once(archive: Archive) -> None:
    book = Budgets(archive)
    with ThreadPoolExecutor(8) as pool:
        for number in range(24):
            pool.submit(book.change, "summer", come(number))
    assert book.read("summer").used_usd == 24 * PRICE


def test_a_change_knows_the_stores_time_from_the_first_on_and_one_that_changes_nothing_writes_nothing(
    archive: Archive,
) -> None:
    book, times = Budgets(archive), list[float]()

    def look(account: Account, now: float) -> Account:
        times.append(now)
        return account

    assert book.read("summer") == Account(name="summer"), "nothing was drawn from it yet"
    assert book.change("summer", look) == Account(name="summer")
    before = archive.store.get(account_key("summer"))
    book.change("summer", look)
    assert before == archive.store.get(account_key("summer"))
    assert all(abs(each - datetime.now(UTC).timestamp()) < 100 for each in times)


def test_permits_have_one_object_for_all_runs_of_the_archive(archive: Archive) -> None:
    Budgets(archive).change_permits(
        lambda permits, now: permits.drawn("a", wanted=1, requests_per_minute=9, now=now).permits
    )
    found = archive.store.get(PERMITS_KEY)
    assert found is not None
    assert [each.id for each in Permits.model_validate_json(found.data).draws] == ["a"]


def test_an_account_that_cannot_be_read_is_never_taken_for_an_empty_one(archive: Archive) -> None:
    archive.store.put(account_key("summer"), b'{"schema_version": 2}', "application/json")
    with pytest.raises(StoreError, match=r"summer.json cannot be read by this version; .* nothing is paid"):
        Budgets(archive).change("summer", lambda account, _: account)


def test_the_account_of_another_name_is_left_alone_where_a_disk_takes_the_two_for_one(archive: Archive) -> None:
    summer = Account(name="Summer").model_dump_json().encode()
    archive.store.put(account_key("summer"), summer, "application/json")
    with pytest.raises(StoreError, match="is the account of the budget Summer: choose another budget_name"):
        Budgets(archive).change("summer", lambda account, _: account)


def test_runs_that_are_faster_each_time_are_not_fought_for_ever(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_CHANGE_SECONDS", 0.1)
    book, numbers = Budgets(archive), count()

    def slow(account: Account, now: float) -> Account:
        book.change("summer", come(next(numbers)))
        return come(-1)(account, now)

    with pytest.raises(StoreError, match=r"could not be changed for 0 s, as other runs were faster") as caught:
        book.change("summer", slow)
    assert not isinstance(caught.value, PreconditionFailedError)


def attempt(*shares: str, **outcome: Any) -> Attempt:
    return Attempt(run="a task run", sent_at=datetime(2026, 1, 2, tzinfo=UTC), shares=shares, **outcome)


def test_a_share_has_paid_what_the_records_say_and_may_have_paid_what_they_do_not_know(archive: Archive) -> None:
    attempts = (
        attempt("mine", possibly_billed=False, cost_usd=Decimal("0.04"), status=200),
        attempt("mine", "of the month", possibly_billed=False, cost_usd=Decimal("0.30")),
        attempt("mine", possibly_billed=False, status=422, reason="refused"),
        attempt("mine", possibly_billed=True, status=504, reason="no answer"),
        attempt("mine", request_id="submitted"),
        attempt("another's", possibly_billed=False, cost_usd=Decimal("1.00")),
        attempt(possibly_billed=False, cost_usd=Decimal("1.00")),
    )
    for number, each in enumerate(attempts):
        archive.write(Record(fingerprint=f"{number:064x}", attempts=(each,)), None)
    share = Share(id="mine", drawn_usd=Decimal(1), price_usd=Decimal("0.06"), since=0.0, renewed=0.0)
    assert Budgets(archive).paid_from(share) == Decimal("0.46")
    with_time = archive.store.get(record_key("0" * 64))
    assert with_time is not None
    later = share.model_copy(update={"since": with_time.written + 3600})
    assert Budgets(archive).paid_from(later) == 0, "records that were written before it was drawn are not read"


def test_a_record_that_cannot_be_read_keeps_a_share_from_being_settled(archive: Archive) -> None:
    archive.store.put(record_key("ab" * 32), b"{}", "application/json")
    share = Share(id="mine", drawn_usd=Decimal(1), price_usd=PRICE, since=0.0, renewed=0.0)
    with pytest.raises(StoreError, match="cannot be read by this version"):
        Budgets(archive).paid_from(share)


def test_a_purse_over_a_real_archive_draws_pays_and_gives_back(archive: Archive) -> None:
    budget = Budget("campaign", Decimal("0.12"), "budget_name", "summer")
    purse = Purse(Budgets(archive), [budget], pictures=5, requests_per_minute=100)

    def taken() -> Any:
        found = purse.take(PRICE)
        return None if found is Fit.LATER else found

    for _ in range(2):
        hold = until(taken)
        purse.confirm(hold)
        purse.sent(hold)
        purse.end(hold, PRICE)
    assert until(taken) is Fit.NEVER
    purse.close()
    after = Budgets(archive).read("summer")
    assert (after.spent_usd, after.shares, after.left_usd(budget.limit_usd)) == (2 * PRICE, (), Decimal("0.02"))


def test_keys_are_listed_with_when_they_were_written(archive: Archive) -> None:
    archive.store.put("a/b.json", b"x", "application/json")
    ((key, written),) = archive.store.dated_keys("a/")
    found = archive.store.get("a/b.json")
    assert found is not None
    assert (key, int(written)) == ("a/b.json", int(found.written))


def test_a_standing_and_a_share_agree_on_what_is_taken() -> None:
    standing = Standing("a", "run", PRICE, PRICE, PRICE, PRICE)
    share = Account(name="x").visited(standing, Decimal(1), now=0).share("a")
    assert share is not None
    assert share.taken_usd == standing.taken_usd == 2 * PRICE
