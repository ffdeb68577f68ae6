"""Amounts of money, in USD."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import AfterValidator

LIST_PRICE_USD = Decimal("0.05")
"""Price of one generation, from the provider's page for this endpoint; an answer's `x-cost` overrides it."""


def is_plausible(amount: Decimal) -> bool:
    """Whether a number of unknown origin may be an amount of money: any other would fail in sums or fill pages.

    Args:
        amount: The number.

    Example:
        >>> [is_plausible(Decimal(each)) for each in ("0.0500", "NaN", "1e-999999", "1e999999")]
        [True, False, False, False]
    """
    return amount.is_finite() and amount.adjusted() < 12 and int(amount.as_tuple().exponent) > -100


def _require_plausible(amount: Decimal) -> Decimal:
    if not is_plausible(amount):
        raise ValueError("not an amount of money")
    return amount


Usd = Annotated[Decimal, AfterValidator(_require_plausible)]
"""An amount of unknown origin."""


def usd(amount: Decimal) -> str:
    """An amount as text with two decimals, or more if it has more.

    Args:
        amount: The amount.

    Example:
        >>> usd(Decimal("0.1")), usd(Decimal("0.0525")), usd(Decimal("0"))
        ('0.10', '0.0525', '0.00')
    """
    text = f"{amount.normalize():f}"
    _, _, decimals = text.partition(".")
    return text if len(decimals) >= 2 else f"{amount:.2f}"
