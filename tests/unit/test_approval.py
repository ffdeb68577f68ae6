"""When a person is asked, and what the answers allow."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_segmind.batch.approval import GO_ON, STOP, TRIM, Approved, Reply, apply_reply, must_ask, parse_reply
from prefect_segmind.errors import NotApprovedError

money = st.decimals(min_value=0, max_value=10_000, places=2)


@pytest.mark.parametrize(
    ("planned", "above", "budget", "asks"),
    [
        ("5.00", None, None, False),
        ("5.00", "5.00", None, False),
        ("5.05", "5.00", None, True),
        ("5.05", "5.00", "10.00", True),
        ("5.05", "5.00", "5.00", False),  # the budget keeps it within what needs no approval
        ("0.05", "0", None, True),
        ("0.00", "0", None, False),
    ],
)
def test_a_person_is_asked_if_the_run_may_cost_more_than_what_needs_no_approval(
    planned: str, above: str | None, budget: str | None, asks: bool
) -> None:
    limits = [None if each is None else Decimal(each) for each in (above, budget)]
    assert must_ask(Decimal(planned), *limits) is asks


@given(above=money, budget=st.none() | money, up_to=st.none() | money)
def test_an_answer_never_raises_the_budget(above: Decimal, budget: Decimal | None, up_to: Decimal | None) -> None:
    approved = apply_reply(Reply(TRIM, up_to), planned_usd=Decimal(50), above_usd=above, budget_usd=budget)
    assert approved.budget_usd is not None
    assert approved.budget_usd == min(each for each in (budget, above if up_to is None else up_to) if each is not None)
    assert approved.trimmed is (budget is None or approved.budget_usd < budget)


@given(planned=money, budget=st.none() | money)
def test_to_go_on_allows_the_plan_and_a_second_request_for_each_of_its_pictures(
    planned: Decimal, budget: Decimal | None
) -> None:
    approved = apply_reply(Reply(GO_ON), planned_usd=planned, above_usd=Decimal(0), budget_usd=budget)
    assert approved == Approved(min(each for each in (2 * planned, budget) if each is not None), trimmed=False)


def test_to_stop_is_to_pay_nothing() -> None:
    with pytest.raises(NotApprovedError, match="nothing was paid"):
        apply_reply(Reply(STOP), planned_usd=Decimal(2), above_usd=Decimal(1), budget_usd=None)


@pytest.mark.parametrize("text", ["y", "yes", " YES ", "go on"])
def test_people_say_yes_in_several_ways(text: str) -> None:
    assert parse_reply(text) == Reply(GO_ON)


@pytest.mark.parametrize("text", ["n", "No", "stop"])
def test_and_no(text: str) -> None:
    assert parse_reply(text) == Reply(STOP)


@pytest.mark.parametrize("text", ["2.5", "$2.5", "2.5 USD", "2.50usd"])
def test_an_amount_trims(text: str) -> None:
    assert parse_reply(text) == Reply(TRIM, Decimal("2.5"))


@pytest.mark.parametrize("text", ["", "maybe", "-1", "nan", "inf", "1,5", "yes please"])
def test_what_is_no_answer_is_asked_again(text: str) -> None:
    assert parse_reply(text) is None


def test_what_earlier_tries_of_the_run_have_spent_is_not_approved_anew():
    known = {"planned_usd": Decimal("0.10"), "above_usd": Decimal("0.05"), "spent_usd": Decimal("0.30")}
    assert apply_reply(Reply(GO_ON), budget_usd=None, **known) == Approved(Decimal("0.50"))
    assert apply_reply(Reply(GO_ON), budget_usd=Decimal("0.40"), **known) == Approved(Decimal("0.40"))
    assert apply_reply(Reply(TRIM, Decimal("0.35")), budget_usd=None, **known) == Approved(
        Decimal("0.35"), trimmed=True
    )
