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
from typing import Literal, NamedTuple

NOTHING = Decimal("0.00")


class Fit(Enum):
    """Whether the limit of a ledger has room for a price."""

    NOW = "it fits beside all that is spent and in flight"
    ALONE = "no answer has named a cost yet, and a request is in flight that may bring one"
    LATER = "it fits if what is in flight, or kept for others, turns out not to be billed"
    NEVER = "what is spent, or may have been, leaves too little: this is final"


class Totals(NamedTuple):
    """The sums of some requests.

    Attributes:
        requests_sent: Their number.
        cost_usd: What was certainly paid.
        possibly_billed_usd: What those of unknown outcome may have cost.
    """

    requests_sent: int = 0
    cost_usd: Decimal = NOTHING
    possibly_billed_usd: Decimal = NOTHING

    def plus(self, other: Totals, sign: Literal[1, -1] = 1) -> Totals:
        """The sum with others, or with -1 the difference."""
        return Totals(
            self.requests_sent + sign * other.requests_sent,
            self.cost_usd + sign * other.cost_usd,
            self.possibly_billed_usd + sign * other.possibly_billed_usd,
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
    """A request in the record of a picture that a run has to report.

    Attributes:
        request: What identifies it.
        totals: Its cost and whether it counts as sent, as far as this run reports it; no requests sent where its sender
            has reported it.
        charged: What counts of it against the limit: everything that an earlier try of the run has sent, whichever run
            reports it; nothing of what another run sent that died and was taken over.
    """

    request: RequestId
    totals: Totals
    charged: Totals


class _Entry(NamedTuple):
    totals: Totals
    charged: Totals
    reported_by: str | None  # the task run; empty where none has taken it up; None where another ledger reports it
    is_own: bool


class _Sums(NamedTuple):
    charged: Totals = Totals()
    reported: Totals = Totals()
    in_flight_usd: Decimal = NOTHING
    dearest_usd: Decimal = NOTHING
    last: tuple[str, RequestId, _Entry] | None = None  # the entry that these sums were made with


class Ledger:
    """What a run has spent, has in flight, and may have spent where an outcome is unknown. Threads may share it.

    Whenever a request is admitted, what is spent, in flight and possibly billed is within the limit together. So the
    limit is exceeded only by what those that are in flight at the last admission cost more than was reserved for them:
    the price of the dearest answer so far, or the list price. Under a limit requests go one by one until an answer has
    named a cost, so that a list price that is too low costs the difference once, and not once for all that would be in
    flight. An answer without a cost counts as one at the list price.

    An interrupt at any line leaves it with sums that tell no less than what was sent.

    Args:
        limit_usd: What the run may spend; None for no limit.
        reporters: Which ledger reports each request, shared by ledgers of flow runs that one flow run calls.

    Attributes:
        limit_usd: As above; it may be set later, before the first request.

    Example:
        >>> ledger = Ledger(Decimal("0.10"))
        >>> ledger.reserve(Decimal("0.05"))
        >>> ledger.fit(Decimal("0.05")).name, ledger.fit(Decimal("0.10")).name, ledger.fit(Decimal("0.15")).name
        ('ALONE', 'LATER', 'NEVER')
        >>> request = RequestId("a task run", datetime(2026, 11, 26, tzinfo=UTC))
        >>> ledger.send(Decimal("0.05"), "a fingerprint", request)
        >>> ledger.totals.possibly_billed_usd
        Decimal('0.05')
        >>> ledger.settle(Decimal("0.05"), "a fingerprint", request, Totals(1, Decimal("0.04")))
        >>> ledger.account("a fingerprint", "a task run").cost_usd, ledger.fit(Decimal("0.06")).name
        (Decimal('0.04'), 'NOW')
    """

    def __init__(self, limit_usd: Decimal | None = None, reporters: Reporters | None = None) -> None:
        self.limit_usd = limit_usd
        self._reporters: Reporters = {} if reporters is None else reporters
        self._sums = _Sums()  # replaced as a whole: an interrupt finds the old ones or the new ones
        self._pictures: dict[str, dict[RequestId, _Entry]] = {}
        self._elsewhere = Totals()
        self._lock = threading.RLock()

    @property
    def spent_usd(self) -> Decimal:
        """What the run, in all its tries, has certainly paid."""
        return self._sums.charged.cost_usd + self._elsewhere.cost_usd

    @property
    def unknown_usd(self) -> Decimal:
        """What its requests of unknown outcome may have cost."""
        return self._sums.charged.possibly_billed_usd + self._elsewhere.possibly_billed_usd

    @property
    def in_flight_usd(self) -> Decimal:
        """What is reserved for requests that have no outcome yet."""
        return self._sums.in_flight_usd

    @property
    def totals(self) -> Totals:
        """Everything that the run has to report; what is sent and not answered may be billed."""
        return self._sums.reported.plus(self._elsewhere)

    @property
    def pictures(self) -> frozenset[str]:
        """The fingerprints of the pictures that have entries."""
        with self._lock:
            return frozenset(self._pictures)

    def price_of(self, list_price: Decimal) -> Decimal:
        """The amount to reserve for a request: the list price, or the price of the dearest answer so far if higher.

        Args:
            list_price: In USD.
        """
        return max(list_price, self._sums.dearest_usd)

    def fit(self, price: Decimal, kept: Decimal = Decimal(0)) -> Fit:
        """Whether there is room for a price.

        Args:
            price: The price of the next request, in USD.
            kept: USD kept for assets that come first and may or may not need them.
        """
        with self._lock:
            if self.limit_usd is None:
                return Fit.NOW
            left = self.limit_usd - self.spent_usd - self.unknown_usd
            if price > left:
                return Fit.NEVER
            if price > left - self.in_flight_usd - kept:
                return Fit.LATER
            return Fit.ALONE if self.in_flight_usd and not self._sums.dearest_usd else Fit.NOW

    def reserve(self, price: Decimal) -> None:
        """Sets an amount aside for a request that is about to be sent.

        Args:
            price: The amount in USD.

        Raises:
            ValueError: There is no room for it now.
        """
        with self._lock:
            if self.fit(price) is not Fit.NOW:
                raise ValueError(f"there is no room for {price} USD")
            self._sums = self._sums._replace(in_flight_usd=self.in_flight_usd + price)

    def release(self, price: Decimal) -> None:
        """Ends a reservation for a request that was never sent.

        Args:
            price: The reserved amount in USD.

        Raises:
            ValueError: So much was never reserved.
        """
        with self._lock:
            if price > self.in_flight_usd:
                raise ValueError(f"{price} USD are not in flight")
            self._sums = self._sums._replace(in_flight_usd=self.in_flight_usd - price)

    def send(self, price: Decimal, picture: str, request: RequestId) -> None:
        """Enters a request that is about to be sent: until it is settled it is reported as possibly billed.

        Args:
            price: The amount reserved for it in USD.
            picture: The fingerprint of the picture.
            request: What identifies the request.
        """
        with self._lock:
            self._reporters[request] = self
            sent = Totals(1, NOTHING, price)
            # Against the limit it counts as in flight.
            self._enter(picture, request, _Entry(sent, Totals(1), request.run, is_own=True))

    def settle(self, price: Decimal, picture: str, request: RequestId, outcome: Totals) -> None:
        """Ends a reservation with the outcome of its request.

        Args:
            price: The reserved amount in USD.
            picture: The fingerprint of the picture.
            request: What identifies the request.
            outcome: What it cost, or may have cost.

        Raises:
            ValueError: So much was never reserved.
        """
        with self._lock:
            if price > self.in_flight_usd:
                raise ValueError(f"{price} USD are not in flight")
            self._reporters[request] = self
            self._enter(picture, request, _Entry(outcome, outcome, request.run, is_own=True), ended_usd=price)

    def not_sent(self, picture: str, request: RequestId) -> None:
        """Enters that a request was never sent, whatever the record of the picture says of it.

        Args:
            picture: The fingerprint of the picture.
            request: What identifies the request.
        """
        with self._lock:
            self._reporters[request] = self
            self._enter(picture, request, _Entry(Totals(), Totals(), request.run, is_own=True))

    def carry(self, picture: str, past: Iterable[PastRequest], run: str) -> None:
        """Enters the requests in the record of a picture that this run has to report, or corrects their entries.

        The run's own requests are never corrected by a record, as writing that may have failed.

        Args:
            picture: The fingerprint of the picture.
            past: The requests.
            run: The task run that reports them, unless another of this run does already; empty for the run itself,
                until a task run takes them up.
        """
        with self._lock:
            self._complete()
            entries = self._pictures.get(picture, {})
            for request, totals, charged in past:
                known = entries.get(request) or _Entry(totals, charged, "", is_own=False)
                if not known.is_own:
                    known = known._replace(totals=totals, charged=charged)
                by = known.reported_by or run if self._reporters.setdefault(request, self) is self else None
                self._enter(picture, request, known._replace(reported_by=by))

    def correct(self, picture: str, request: RequestId, outcome: Totals) -> None:
        """Replaces what a request was entered with by what the provider says of it, if it was entered.

        Args:
            picture: The fingerprint of the picture.
            request: What identifies the request.
            outcome: What it has cost this run.
        """
        with self._lock:
            self._complete()
            known = self._pictures.get(picture, {}).get(request)
            if known is not None:
                self._enter(picture, request, known._replace(totals=outcome, charged=outcome))

    def report_elsewhere(self, totals: Totals) -> None:
        """Enters what other processes report of the requests that they send for this run.

        It replaces what they have reported before. In the next try of the run the records of the pictures tell it.

        Args:
            totals: The sums of all that they have sent in this try.
        """
        self._elsewhere = totals

    def begin_try(self, reporters: Reporters | None = None) -> None:
        """Begins another try of the run: earlier requests are reported by the task run that carries them first.

        Until then they are in the run's totals, as not every try asks for a picture that an earlier one has paid for.

        Args:
            reporters: As for the ledger, for this try.
        """
        with self._lock:
            self._elsewhere = Totals()
            self._reporters = {} if reporters is None else reporters
            for picture, entries in self._pictures.items():
                for request, entry in list(entries.items()):
                    self._enter(picture, request, entry._replace(reported_by=""))

    def account(self, picture: str, run: str) -> Totals:
        """The sums of the requests for a picture that a task run reports.

        Args:
            picture: The fingerprint of the picture.
            run: The task run.
        """
        with self._lock:
            totals = Totals()
            for entry in self._pictures.get(picture, {}).values():
                if entry.reported_by == run:
                    totals = totals.plus(entry.totals)
            return totals

    def reports(self, picture: str, request: RequestId, run: str) -> bool:
        """Whether a task run is the one that reports a request.

        Args:
            picture: The fingerprint of the picture.
            request: What identifies the request.
            run: The task run.
        """
        with self._lock:
            entry = self._pictures.get(picture, {}).get(request)
            return entry is not None and entry.reported_by == run

    def _enter(self, picture: str, request: RequestId, entry: _Entry, ended_usd: Decimal = NOTHING) -> None:
        """Replaces the entry of a request, and the sums with it; ends a reservation for it."""
        self._complete()
        charged, reported, in_flight, dearest, _ = self._sums
        before = self._pictures.get(picture, {}).get(request)
        changes: tuple[tuple[_Entry | None, Literal[1, -1]], ...] = ((before, -1), (entry, 1))
        for each, sign in changes:
            if each is not None:
                charged = charged.plus(each.charged, sign)
            if each is not None and each.reported_by is not None:
                reported = reported.plus(each.totals, sign)
        dearest = max(dearest, entry.charged.cost_usd)
        self._sums = _Sums(charged, reported, in_flight - ended_usd, dearest, (picture, request, entry))
        self._complete()

    def _complete(self) -> None:
        """Keeps the entry that the sums have, also where an interrupt came in between."""
        if self._sums.last is not None:
            picture, request, entry = self._sums.last
            self._pictures.setdefault(picture, {})[request] = entry


Reporters = dict[RequestId, Ledger]
"""Which ledger reports a request."""


class Unusable:
    """Counts the paid answers in a row that hold no picture, by the time of the answer and not of the verdict on it.

    Args:
        limit: The number that is too many; 0 for no limit.

    Example:
        >>> unusable, at = Unusable(2), datetime(2026, 11, 23, tzinfo=UTC)
        >>> unusable.answer(at)
        >>> unusable.answer(at)
        >>> unusable.too_many
        2
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._last_picture = datetime.min.replace(tzinfo=UTC)
        self._since: list[datetime] = []

    def picture(self, at: datetime) -> None:
        """Begins a new row after an answer that held a picture.

        Args:
            at: The time of the answer.
        """
        self._last_picture = max(self._last_picture, at)
        self._since = [each for each in self._since if each > self._last_picture]

    def answer(self, at: datetime) -> None:
        """Counts an answer that held no picture.

        Args:
            at: The time of the answer.
        """
        if at > self._last_picture:
            self._since.append(at)

    @property
    def too_many(self) -> int | None:
        """The number of answers in the row if it has reached the limit, else None."""
        return len(self._since) if 0 < self._limit <= len(self._since) else None
