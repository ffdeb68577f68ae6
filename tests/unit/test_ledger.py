"""Money is reserved before it is spent: the limit holds, whatever the answers say and in whatever order they come."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_segmind.limits.ledger import Budget, Fit

PRICE = Decimal("0.05")
PRICES = st.decimals(0, 1, places=4)


def total(budget: Budget) -> Decimal:
    return budget.spent_usd + budget.in_flight_usd + budget.unknown_usd


def test_without_a_limit_everything_fits_and_is_counted_all_the_same():
    budget = Budget()
    for _ in range(3):
        assert budget.fit(PRICE) is Fit.NOW
        budget.reserve(PRICE)
    budget.settle(PRICE, PRICE)
    budget.lose(PRICE)
    assert (budget.spent_usd, budget.in_flight_usd, budget.unknown_usd) == (PRICE, PRICE, PRICE)


def test_a_budget_is_used_to_the_last_cent():
    budget = Budget(Decimal("0.10"))
    for _ in range(2):
        budget.reserve(PRICE)
        budget.settle(PRICE, PRICE)
    assert budget.spent_usd == budget.limit_usd
    assert budget.fit(PRICE) is Fit.NEVER


def test_what_is_in_flight_may_yet_come_back():
    budget = Budget(PRICE)
    budget.reserve(PRICE)
    assert budget.fit(PRICE) is Fit.LATER
    budget.release(PRICE)
    assert budget.fit(PRICE) is Fit.NOW


def test_what_may_have_been_billed_never_comes_back():
    budget = Budget(PRICE)
    budget.reserve(PRICE)
    budget.lose(PRICE)
    assert budget.unknown_usd == PRICE
    assert budget.fit(PRICE) is Fit.NEVER


def test_no_budget_has_room_for_nothing():
    assert Budget(Decimal(0)).fit(PRICE) is Fit.NEVER


def test_a_rise_of_the_price_is_noticed_and_a_fall_is_not_relied_on():
    budget = Budget(Decimal("1.00"))
    assert budget.price_of(PRICE) == PRICE
    for paid, price in (("0.04", "0.05"), ("0.08", "0.08"), ("0.05", "0.08")):
        budget.reserve(budget.price_of(PRICE))
        budget.settle(budget.price_of(PRICE), Decimal(paid))
        assert budget.price_of(PRICE) == Decimal(price)


def test_a_reservation_without_room_is_refused():
    budget = Budget(PRICE)
    budget.reserve(PRICE)
    with pytest.raises(ValueError, match=r"no room for 0\.05 USD"):
        budget.reserve(PRICE)
    assert total(budget) == PRICE


def test_what_was_never_reserved_cannot_come_back():
    budget = Budget(PRICE)
    with pytest.raises(ValueError, match="not in flight"):
        budget.release(PRICE)
    assert total(budget) == 0


@settings(deadline=None)
@given(limit=st.decimals(0, 3, places=4), data=st.data())
def test_the_limit_holds_in_any_order_of_events_and_never_is_final(limit, data):
    budget, reserved, refused_for_ever = Budget(limit), [], None
    for price in data.draw(st.lists(PRICES, max_size=40)):
        fit = budget.fit(price)
        if refused_for_ever is not None and price >= refused_for_ever:
            assert fit is Fit.NEVER
        if fit is Fit.NEVER:
            refused_for_ever = price if refused_for_ever is None else min(price, refused_for_ever)
        elif fit is Fit.LATER:
            assert reserved
        else:
            budget.reserve(price)
            reserved.append(price)
        assert total(budget) <= limit
        for _ in range(data.draw(st.integers(0, len(reserved)))):
            ended = reserved.pop(data.draw(st.integers(0, len(reserved) - 1)))
            how = data.draw(st.sampled_from(["settle", "release", "lose"]))
            if how == "settle":
                budget.settle(ended, data.draw(st.decimals(0, ended, places=4)))
            else:
                getattr(budget, how)(ended)
            assert total(budget) <= limit
        assert budget.in_flight_usd == sum(reserved)
