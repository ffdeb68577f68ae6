"""Amounts of money, in USD."""

from __future__ import annotations

from decimal import Decimal

LIST_PRICE_USD = Decimal("0.05")
"""Price of one generation, from the provider's page for this endpoint; an answer's `x-cost` overrides it."""


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
