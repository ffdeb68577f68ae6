"""The account book of a run: every request for each picture, once, and what may still be spent.

Money is reserved before it is spent, so that a limit holds whatever the answers say. It is pure bookkeeping;
`admission` does the waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import NamedTuple

NOTHING = Decimal("0.00")


class Fit(Enum):
    """Whether the limit of a ledger has room for a price."""

    NOW = "it fits beside all that is spent and in flight"
    LATER = "it fits if what is in flight, or kept for others, turns out not to be billed"
    NEVER = "what is spent, or may have been, leaves too little: this is final"


class Totals(NamedTuple):
    """What requests came to.

    Attributes:
        requests_sent: How many there were.
        cost_usd: What was paid for certain.
        possibly_billed_usd: What those of unknown outcome may have cost.
    """

    requests_sent: int = 0
    cost_usd: Decimal = NOTHING
    possibly_billed_usd: Decimal = NOTHING

    def plus(self, other: Totals) -> Totals:
        """Both together."""
        return Totals(
            self.requests_sent + other.requests_sent,
            self.cost_usd + other.cost_usd,
            self.possibly_billed_usd + other.possibly_billed_usd,
        )

    def minus(self, other: Totals) -> Totals:
        """What is left without the other."""
        return Totals(
            self.requests_sent - other.requests_sent,
            self.cost_usd - other.cost_usd,
            self.possibly_billed_usd - other.possibly_billed_usd,
        )


class RequestId(NamedTuple):
    """What identifies a request for a picture, in a ledger as in the archive's record.

    Attributes:
        run: The task run that sent it.
        sent_at: When it was about to be sent, UTC.
    """

    run: str
    sent_at: datetime


class PastRequest(NamedTuple):
    """What the record of a picture says of a request that a run has to report.

    Attributes:
        request: Which it is.
        totals: What it came to, as far as this run reports it; no requests sent where its sender has reported that.
        charged: What counts of it against the limit: all that an earlier try of the run has sent, whoever reports it;
            nothing of what another run has sent that died and was taken over.
    """

    request: RequestId
    totals: Totals
    charged: Totals


class _Entry(NamedTuple):
    totals: Totals
    charged: Totals
    reported_by: str | None  # the task run; empty where none has taken it up; None where another ledger reports it
    is_own: bool


class Ledger:
    """What a run has spent, has in flight, and may have spent where an outcome is unknown. Threads may share it.

    What is spent, in flight and possibly billed never exceeds the limit together, as long as no answer costs more than
    was reserved for it. A price that rises is noticed with the first answer that names it; what is in flight at that
    moment may exceed the limit by the rise.

    Args:
        limit_usd: What the run may spend; None for no limit.
        reporters: Which ledger reports each request, shared by ledgers of flow runs that one flow run calls.

    Attributes:
        limit_usd: As above; it may be set later, before the first request.
        in_flight_usd: Reserved for requests that have no outcome yet.

    Example:
        >>> ledger = Ledger(Decimal("0.10"))
        >>> ledger.reserve(Decimal("0.05"))
        >>> ledger.fit(Decimal("0.05")).name, ledger.fit(Decimal("0.10")).name, ledger.fit(Decimal("0.15")).name
        ('NOW', 'LATER', 'NEVER')
        >>> request = RequestId("a task run", datetime(2026, 11, 26, tzinfo=UTC))
        >>> ledger.settle(Decimal("0.05"), "a fingerprint", request, Totals(1, Decimal("0.04")))
        >>> ledger.account("a fingerprint", "a task run").cost_usd, ledger.fit(Decimal("0.06")).name
        (Decimal('0.04'), 'NOW')
    """

    def __init__(self, limit_usd: Decimal | None = None, reporters: Reporters | None = None) -> None:
        self.limit_usd = limit_usd
        self.in_flight_usd = NOTHING
        self._reporters: Reporters = {} if reporters is None else reporters
        self._charged = Totals()
        self._reported = Totals()
        self._dearest = NOTHING
        self._pictures: dict[str, dict[RequestId, _Entry]] = {}
        self._lock = threading.RLock()

    @property
    def spent_usd(self) -> Decimal:
        """What the run, in all its tries, has paid for certain."""
        return self._charged.cost_usd

    @property
    def unknown_usd(self) -> Decimal:
        """What its requests of unknown outcome may have cost."""
        return self._charged.possibly_billed_usd

    @property
    def totals(self) -> Totals:
        """Everything that the run has to report; what is in flight may be billed."""
        with self._lock:
            return self._reported.plus(Totals(0, NOTHING, self.in_flight_usd))

    @property
    def pictures(self) -> frozenset[str]:
        """The fingerprints of the pictures that have entries."""
        with self._lock:
            return frozenset(self._pictures)

    def price_of(self, list_price: Decimal) -> Decimal:
        """What to reserve for a request, in USD: the list price, or the dearest answer so far where that cost more."""
        return max(list_price, self._dearest)

    def fit(self, price: Decimal, kept: Decimal = Decimal(0)) -> Fit:
        """Whether there is room for a price.

        Args:
            price: Of the next request, in USD.
            kept: USD that are kept for others, who come first and may yet need them or not.
        """
        with self._lock:
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
        with self._lock:
            if self.fit(price) is not Fit.NOW:
                raise ValueError(f"there is no room for {price} USD")
            self.in_flight_usd += price

    def release(self, price: Decimal) -> None:
        """Ends a reservation for a request that was never sent.

        Raises:
            ValueError: So much was never reserved.
        """
        with self._lock:
            if price > self.in_flight_usd:
                raise ValueError(f"{price} USD are not in flight")
            self.in_flight_usd -= price

    def settle(self, price: Decimal, picture: str, request: RequestId, outcome: Totals) -> None:
        """Ends a reservation with what its request came to.

        Args:
            price: What was reserved, in USD.
            picture: The fingerprint.
            request: Which request it was.
            outcome: What it cost, or may have cost.
        """
        with self._lock:
            self.release(price)
            self._reporters[request] = self
            self._enter(picture, request, _Entry(outcome, outcome, request.run, is_own=True))
            self._dearest = max(self._dearest, outcome.cost_usd)

    def carry(self, picture: str, past: Iterable[PastRequest], run: str) -> None:
        """Enters what the record of a picture says of requests that this run has to report; again corrects it.

        What the run knows of its own requests is never corrected by a record, which may not have been written.

        Args:
            picture: The fingerprint.
            past: The requests.
            run: The task run that reports them, unless another of this run does already; empty for the run itself,
                until a task run takes them up.
        """
        with self._lock:
            entries = self._pictures.get(picture, {})
            for request, totals, charged in past:
                known = entries.get(request) or _Entry(totals, charged, "", is_own=False)
                if not known.is_own:
                    known = known._replace(totals=totals, charged=charged)
                by = known.reported_by or run if self._reporters.setdefault(request, self) is self else None
                self._enter(picture, request, known._replace(reported_by=by))

    def begin_try(self, reporters: Reporters | None = None) -> None:
        """Begins another try of the run: what the earlier ones sent is reported by the task run that carries it first.

        Until then it is in the run's totals, for not every try comes to what an earlier one has paid for.

        Args:
            reporters: As for the ledger, of this try.
        """
        with self._lock:
            self._reporters = {} if reporters is None else reporters
            for picture, entries in self._pictures.items():
                for request, entry in list(entries.items()):
                    self._enter(picture, request, entry._replace(reported_by=""))

    def account(self, picture: str, run: str) -> Totals:
        """What the requests for a picture came to that a task run reports.

        Args:
            picture: The fingerprint.
            run: The task run.
        """
        with self._lock:
            totals = Totals()
            for entry in self._pictures.get(picture, {}).values():
                if entry.reported_by == run:
                    totals = totals.plus(entry.totals)
            return totals

    def reports(self, picture: str, request: RequestId, run: str) -> bool:
        """Whether it is this task run that reports a request."""
        with self._lock:
            entry = self._pictures.get(picture, {}).get(request)
            return entry is not None and entry.reported_by == run

    def _enter(self, picture: str, request: RequestId, entry: _Entry) -> None:
        entries = self._pictures.setdefault(picture, {})
        before = entries.get(request)
        for each, sign in ((before, Totals.minus), (entry, Totals.plus)):
            if each is not None:
                self._charged = sign(self._charged, each.charged)
            if each is not None and each.reported_by is not None:
                self._reported = sign(self._reported, each.totals)
        entries[request] = entry


Reporters = dict[RequestId, Ledger]
"""Which ledger reports a request."""


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
