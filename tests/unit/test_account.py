"""The arithmetic of a shared account: what a run may draw, what it gives back, and what a dead one leaves."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_segmind.errors import ConfigurationError
from prefect_segmind.limits.account import (
    LEASE_SECONDS,
    Account,
    Budget,
    BudgetLeft,
    Share,
    Standing,
    checked_name,
)

PRICE, LIMIT = Decimal("0.05"), Decimal("1.00")
KNOWN = Account(name="summer", dearest_usd=PRICE)
NOTHING = Decimal(0)


def standing(id: str = "a", *, drawn: str = "0", spent: str = "0", flies: str = "0", wants: str = "0") -> Standing:
    amounts = (Decimal(drawn), Decimal(spent), Decimal(flies), PRICE, NOTHING, Decimal(wants))
    return Standing(id, f"run {id}", *amounts)


def drawn(account: Account, id: str) -> Decimal:
    share = account.share(id)
    assert share is not None
    return share.drawn_usd


@pytest.mark.parametrize(
    ("budget", "names"),
    [
        (Budget("daily", LIMIT, "a setting"), ("daily-2026-11-30", "daily-2026-11-30")),
        (Budget("daily", LIMIT, "a setting", zone=ZoneInfo("Asia/Tokyo")), ("daily-2026-11-30", "daily-2026-12-01")),
        (Budget("monthly", LIMIT, "a setting"), ("monthly-2026-11", "monthly-2026-11")),
        (Budget("monthly", LIMIT, "a setting", zone=ZoneInfo("Asia/Tokyo")), ("monthly-2026-11", "monthly-2026-12")),
        (Budget("campaign", LIMIT, "budget_name", "summer"), ("summer", "summer")),
    ],
)
def test_a_day_and_a_month_have_an_account_of_their_own_in_the_calendar_of_their_time_zone(
    budget: Budget, names: tuple[str, str]
) -> None:
    morning, evening = (datetime(2026, 11, 30, hour, tzinfo=UTC) for hour in (3, 16))
    assert (budget.account(morning), budget.account(evening)) == names


def test_people_are_told_which_budget_it_is() -> None:
    assert Budget("daily", LIMIT, "a setting").title == "daily budget"
    assert Budget("campaign", LIMIT, "budget_name", checked_name("summer")).title == "budget summer"


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", ".hidden", "a b", "ü", "a\n", "x" * 101, "daily-x", "Monthly-2026-11"]
)
def test_a_name_that_is_no_safe_segment_or_looks_like_a_periods_is_refused_with_the_parameter(name: str) -> None:
    with pytest.raises(ConfigurationError, match="budget_name: "):
        checked_name(name)


def test_a_run_draws_an_equal_part_of_what_is_left_and_at_least_one_picture() -> None:
    account = KNOWN
    for id, part in (("a", "1.00"), ("b", "0"), ("c", "0")):
        account = account.visited(standing(id, wants="1.00"), LIMIT, now=0)
        assert drawn(account, id) == Decimal(part)
    account = KNOWN.visited(standing("a", wants="0.40"), LIMIT, now=0)
    account = account.visited(standing("b", wants="1.00"), LIMIT, now=0)
    assert drawn(account, "b") == Decimal("0.30"), "of 0.60 for two"
    account = account.visited(standing("c", wants="1.00"), LIMIT, now=0)
    assert drawn(account, "c") == Decimal("0.10"), "of 0.30 for three"
    account = account.visited(standing("a", drawn="0.40", spent="0.35", wants="1.00"), LIMIT, now=0)
    assert drawn(account, "a") == Decimal("0.45"), "of 0.20 for three one picture and a bit: one"


def test_what_is_wanted_is_rounded_up_to_pictures() -> None:
    assert drawn(KNOWN.visited(standing(wants="0.07"), LIMIT, now=0), "a") == Decimal("0.10")
    assert drawn(KNOWN.visited(standing(wants="0.07"), Decimal("0.09"), now=0), "a") == PRICE


def test_until_an_answer_has_named_a_cost_one_run_draws_one_picture() -> None:
    account = Account(name="summer").visited(standing("a", wants="1.00"), LIMIT, now=0)
    assert drawn(account, "a") == PRICE
    waits = account.visited(standing("b", wants="1.00"), LIMIT, now=0)
    assert drawn(waits, "b") == 0
    impatient = standing("b", wants="1.00")._replace(is_patient=False)
    assert drawn(account.visited(impatient, LIMIT, now=0), "b") == PRICE
    told = standing("a", drawn="0.05", spent="0.05")._replace(dearest_usd=PRICE)
    account = account.visited(told, LIMIT, now=0).visited(standing("b", wants="0.50"), LIMIT, now=0)
    assert drawn(account, "b") == Decimal("0.45")


def test_a_draw_whose_answer_was_lost_is_made_again_and_not_added() -> None:
    lost = KNOWN.visited(standing(wants="0.50"), LIMIT, now=0)
    assert drawn(lost.visited(standing(wants="0.50"), LIMIT, now=1), "a") == Decimal("0.50")
    assert drawn(lost.visited(standing(), LIMIT, now=1), "a") == 0, "or given back"


def test_a_share_that_is_spent_dearer_than_it_was_drawn_counts_with_what_is_spent() -> None:
    account = KNOWN.visited(standing(drawn="0.05", spent="0.08"), LIMIT, now=0)
    assert account.left_usd(LIMIT) == Decimal("0.92")
    assert account.used_usd == Decimal("0.08")


def test_what_a_dead_run_has_spent_by_the_records_stays_and_the_rest_comes_back_when_its_lease_is_over() -> None:
    account = KNOWN.visited(standing("dead", drawn="0", wants="0.50"), LIMIT, now=100)
    (share,) = account.shares
    assert account.dead("me", 100 + LEASE_SECONDS) == ()
    assert account.dead("me", 101 + LEASE_SECONDS) == (share,)
    assert account.dead("dead", 101 + LEASE_SECONDS) == (), "one's own is renewed"
    settled = account.settled(share, Decimal("0.10"), "me", LIMIT)
    assert (settled.spent_usd, settled.shares) == (Decimal("0.10"), ())
    assert settled.settled(share, Decimal("0.10"), "me", LIMIT) == settled, "once"
    assert settled.closed(standing("dead", spent="0.10"), LIMIT) == settled, "its run is late"


def test_a_share_that_was_renewed_meanwhile_is_not_settled() -> None:
    account = KNOWN.visited(standing("slow", wants="0.50"), LIMIT, now=100)
    (before,) = account.shares
    renewed = account.visited(standing("slow", drawn="0.50"), LIMIT, now=200)
    assert renewed.settled(before, Decimal(0), "me", LIMIT) == renewed


def test_what_a_dead_run_has_told_counts_where_its_records_are_gone() -> None:
    account = KNOWN.visited(standing("dead", drawn="0.50", spent="0.20"), LIMIT, now=0)
    assert account.settled(account.shares[0], Decimal(0), "me", LIMIT).spent_usd == Decimal("0.20")


def crossed(account: Account) -> list[tuple[int, str]]:
    return [(each.percent, each.by) for each in account.announced]


def test_each_threshold_is_crossed_once_by_the_write_that_crosses_it() -> None:
    account = KNOWN.visited(standing("a", drawn="0.75", spent="0.75"), LIMIT, now=0)
    assert crossed(account) == []
    account = account.visited(standing("b", drawn="0.05", spent="0.05"), LIMIT, now=0)
    assert crossed(account) == [(80, "b")]
    account = account.visited(standing("a", drawn="0.90", spent="0.90"), LIMIT, now=0)
    assert crossed(account) == [(80, "b")], "0.95: one more can be paid for"
    account = account.closed(standing("b", spent="0.06"), LIMIT)
    assert crossed(account) == [(80, "b"), (100, "b")], "0.96: none can"
    account = account.visited(standing("a", drawn="0.94", spent="0.94"), LIMIT, now=0)
    assert len(account.announced) == 2
    raised = account.visited(standing("a", drawn="0.94", spent="0.94"), Decimal("1.20"), now=0)
    assert crossed(raised)[2:] == [(80, "a")], "a raised limit has thresholds of its own"


def test_what_is_in_flight_has_crossed_nothing_yet() -> None:
    assert crossed(KNOWN.visited(standing(drawn="1.00", flies="1.00"), LIMIT, now=0)) == []


def test_pictures_that_cost_nothing_need_no_money() -> None:
    free = standing(wants="0")._replace(price_usd=NOTHING)
    assert drawn(Account(name="x").visited(free, NOTHING, now=0), "a") == 0


def test_what_a_newer_version_has_added_to_an_account_is_kept() -> None:
    text = Account(name="x").model_dump_json().removesuffix("}") + ',"colour":"red"}'
    assert '"colour":"red"' in Account.model_validate_json(text).visited(standing(), LIMIT, now=0).model_dump_json()


def test_what_is_left_is_told_with_what_may_come_back() -> None:
    left = BudgetLeft(title="daily budget", limit_usd=LIMIT, left_usd=PRICE, held_usd=NOTHING)
    assert left.sentence() == "0.05 of 1.00 USD left"


amounts = st.integers(0, 40).map(lambda cents: Decimal(cents) / 100)
shares = st.builds(
    Share,
    id=st.uuids().map(str),
    drawn_usd=amounts,
    spent_usd=amounts,
    in_flight_usd=amounts,
    price_usd=st.just(PRICE),
    since=st.just(0.0),
    renewed=st.floats(0, 100),
)


@given(
    st.builds(Account, name=st.just("x"), spent_usd=amounts, shares=st.lists(shares, max_size=4).map(tuple)),
    st.tuples(amounts, amounts, amounts, st.sampled_from([PRICE, NOTHING, Decimal("0.07")]), amounts, amounts),
    amounts,
)
def test_no_draw_takes_what_is_not_left_and_none_takes_from_its_run(
    account: Account, mine: tuple[Decimal, ...], limit: Decimal
) -> None:
    spent, flies, held, price, dearest, wanted = mine
    me = Standing("me", "my run", held, spent, flies, price, dearest, wanted)
    after = account.visited(me, limit, now=0)
    assert drawn(after, "me") >= me.taken_usd
    if drawn(after, "me") > me.taken_usd:
        assert after.left_usd(limit) >= 0
        assert drawn(after, "me") - me.taken_usd < me.wanted_usd + me.price_usd
    assert after.others("me") == account.shares
