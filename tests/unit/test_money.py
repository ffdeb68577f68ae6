"""A cost is a sensible amount of USD or none at all, and amounts read as people write them."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_segmind.api.response import read_cost
from prefect_segmind.money import LIST_PRICE_USD, usd


def test_the_list_price_is_the_provider_s():
    assert Decimal("0.05") == LIST_PRICE_USD


@pytest.mark.parametrize(
    ("text", "cost"),
    [
        ("0.05", "0.05"),
        ("0.0500", "0.0500"),
        (" 0.05 ", "0.05"),
        ("0", "0"),
        ("5e-05", "0.00005"),
        ("0.05000000000000001", "0.05000000000000001"),
        ("999.99", "999.99"),
    ],
)
def test_a_cost_is_read_as_it_stands(text, cost):
    assert str(read_cost(text)) == str(Decimal(cost))


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "  ",
        "free",
        "$0.05",
        "0,05",
        "NaN",
        "sNaN",
        "Infinity",
        "-Infinity",
        "-0.05",
        "-0",
        "1000",
        "1e999999",
    ],
)
def test_what_is_no_sensible_cost_is_none(text):
    assert read_cost(text) is None


@settings(deadline=None)
@given(st.text(max_size=12) | st.floats().map(str) | st.decimals().map(str))
def test_no_text_of_a_server_breaks_the_reading_of_a_cost(text):
    cost = read_cost(text)
    assert cost is None or 0 <= cost < 1000


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("0", "0.00"),
        ("0.00", "0.00"),
        ("0.05", "0.05"),
        ("0.1", "0.10"),
        ("0.0525", "0.0525"),
        ("0.05000", "0.05"),
        ("1", "1.00"),
        ("1E+3", "1000.00"),
        ("100", "100.00"),
        ("5E-5", "0.00005"),
    ],
)
def test_amounts_have_two_decimals_and_no_more_than_they_need(amount, text):
    assert usd(Decimal(amount)) == text


@settings(deadline=None)
@given(st.decimals(0, 100_000, places=6))
def test_an_amount_is_told_exactly(amount):
    text = usd(amount)
    assert Decimal(text) == amount
    decimals = text.partition(".")[2]
    assert len(decimals) == 2 or (len(decimals) > 2 and not decimals.endswith("0"))
