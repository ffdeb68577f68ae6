"""The money of a run: reserved before it is spent, so that the limit holds whatever the answers say, and not spent on
and on where nothing comes of it.

It is pure arithmetic; `gate` does the waiting.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import NamedTuple


class Fit(Enum):
    """Whether a budget has room for a price."""

    NOW = "it fits beside all that is spent and in flight"
    LATER = "it fits if what is in flight, or kept for others, turns out not to be billed"
    NEVER = "what is spent, or may have been, leaves too little: this is final"


class Budget:
    """What a run has spent, has in flight, and may have spent where an outcome is unknown, all in USD.

    Their sum never exceeds the limit, as long as no answer costs more than was reserved for it. A price that rises is
    noticed with the first answer that names it; what is in flight at that moment may exceed the limit by the rise.

    Args:
        limit_usd: The limit; None for none.
        spent_usd: What was paid before.
        unknown_usd: What may have been billed before.

    Attributes:
        limit_usd: The limit; None for none.
        spent_usd: Paid for certain.
        in_flight_usd: Reserved for requests that are not answered yet.
        unknown_usd: What requests of unknown outcome may have cost.

    Example:
        >>> budget = Budget(Decimal("0.10"))
        >>> budget.reserve(Decimal("0.05"))
        >>> budget.fit(Decimal("0.05")).name, budget.fit(Decimal("0.10")).name, budget.fit(Decimal("0.15")).name
        ('NOW', 'LATER', 'NEVER')
        >>> budget.settle(Decimal("0.05"), paid=Decimal("0.04"))
        >>> budget.spent_usd, budget.in_flight_usd
        (Decimal('0.04'), Decimal('0.00'))
    """

    def __init__(
        self,
        limit_usd: Decimal | None = None,
        *,
        spent_usd: Decimal = Decimal("0.00"),
        unknown_usd: Decimal = Decimal("0.00"),
    ) -> None:
        self.limit_usd = limit_usd
        self.spent_usd = spent_usd
        self.in_flight_usd = Decimal("0.00")
        self.unknown_usd = unknown_usd
        self._dearest = Decimal("0.00")

    def price_of(self, list_price: Decimal) -> Decimal:
        """What to reserve for a request, in USD: the list price, or the dearest answer so far where that cost more."""
        return max(list_price, self._dearest)

    def fit(self, price: Decimal, kept: Decimal = Decimal(0)) -> Fit:
        """Whether there is room for a price.

        Args:
            price: Of the next request, in USD.
            kept: USD that are kept for others, who come first and may yet need them or not.
        """
        if self.limit_usd is None:
            return Fit.NOW
        left = self.limit_usd - self.spent_usd - self.unknown_usd
        if price > left:
            return Fit.NEVER
        return Fit.NOW if price <= left - self.in_flight_usd - kept else Fit.LATER

    def reserve(self, price: Decimal) -> None:
        """Sets a price in USD aside for a request that is about to be sent.

        Raises:
            ValueError: There is no room for it now.
        """
        if self.fit(price) is not Fit.NOW:
            raise ValueError(f"there is no room for {price} USD")
        self.in_flight_usd += price

    def settle(self, price: Decimal, paid: Decimal) -> None:
        """Ends a reservation that was paid for, with what the answer cost in USD."""
        self.release(price)
        self.spent_usd += paid
        self._dearest = max(self._dearest, paid)

    def release(self, price: Decimal) -> None:
        """Ends a reservation that is known not to be billed.

        Raises:
            ValueError: So much was never reserved.
        """
        if price > self.in_flight_usd:
            raise ValueError(f"{price} USD are not in flight")
        self.in_flight_usd -= price

    def lose(self, price: Decimal) -> None:
        """Ends a reservation that may have been billed: it stays counted for good."""
        self.release(price)
        self.unknown_usd += price


class Unusable:
    """Counts the paid answers in a row that hold no picture, by the time of the answer and not of when it was judged.

    Args:
        limit: So many are too many; 0 for never.

    Example:
        >>> unusable, at = Unusable(2), datetime(2026, 11, 23, tzinfo=UTC)
        >>> unusable.answer(at), unusable.answer(at)
        (None, 2)
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._last_picture = datetime.min.replace(tzinfo=UTC)
        self._since: list[datetime] = []

    def picture(self, at: datetime) -> None:
        """Counts an answer that held a picture: the row begins anew behind it."""
        self._last_picture = max(self._last_picture, at)
        self._since = [each for each in self._since if each > self._last_picture]

    def answer(self, at: datetime) -> int | None:
        """Counts an answer that held none; returns how many there were in a row where that is too many."""
        if self._limit and at > self._last_picture:
            self._since.append(at)
            return self.too_many
        return None

    @property
    def too_many(self) -> int | None:
        """How many there are in a row, where that is too many."""
        return len(self._since) if self._limit and len(self._since) >= self._limit else None


class Sums(NamedTuple):
    """What requests came to.

    Attributes:
        requests_sent: How many there were.
        cost_usd: What was paid for certain.
        possibly_billed_usd: What those of unknown outcome may have cost.
    """

    requests_sent: int = 0
    cost_usd: Decimal = Decimal("0.00")
    possibly_billed_usd: Decimal = Decimal("0.00")

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        return Sums(
            self.requests_sent + other.requests_sent,
            self.cost_usd + other.cost_usd,
            self.possibly_billed_usd + other.possibly_billed_usd,
        )
