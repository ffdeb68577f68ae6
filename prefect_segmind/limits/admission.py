"""The one gate of a run that every paid request passes: so many at once, at this pace, within this budget.

It knows threads and the clock; what to decide is the rate limiter's and the ledger's.
"""

from __future__ import annotations

import logging
import math
import threading
from bisect import insort
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from time import monotonic

from prefect_segmind.errors import (
    AccountError,
    ApiError,
    BudgetReachedError,
    InsufficientCreditsError,
    NotStartedError,
    RateLimitError,
    SegmindError,
    UnusableAnswersError,
)
from prefect_segmind.limits.ledger import Fit, Ledger, RequestId, Totals, Unusable
from prefect_segmind.limits.rate_limiter import Pace
from prefect_segmind.limits.retry import holds_all
from prefect_segmind.money import usd

PARKED = 256
"""Assets that may wait outside the window at once; each of them keeps a thread."""


class Admission:
    """The leave to send one request. Made by `Gate.admit` only."""

    def __init__(self, gate: Gate, asset: str, ticket: int, reserved_usd: Decimal) -> None:
        self._gate = gate
        self.asset = asset
        self.ticket = ticket
        self.reserved_usd = reserved_usd
        self.picture = ""
        self.request: RequestId | None = None
        self.is_over = False
        self.cost_usd: Decimal | None = None

    def sent(self, picture: str, request: RequestId) -> None:
        """Says that the request is sent now: from here on it may be billed.

        Args:
            picture: The fingerprint of what it asks for.
            request: What identifies it in the ledger.
        """
        self._gate._note_sent(self, picture, request)

    def paid(self, cost_usd: Decimal, at: datetime | None = None) -> None:
        """Says that a picture came of it. From here on another request may go.

        Args:
            cost_usd: What it cost, in USD.
            at: When its answer had been read, aware; now if left out.
        """
        self.cost_usd = cost_usd
        self._gate.picture(at or datetime.now(UTC))
        self._gate._let_out(self, None)

    def unusable(self, error: SegmindError) -> None:
        """Says that a 200 came of it that was read to its end and could not be used.

        Args:
            error: It; its `answered` tells what that has cost, and when.
        """
        assert error.answered is not None
        if not error.possibly_billed:
            self.cost_usd = error.answered.cost_usd
        self._gate._note_unusable(error, error.answered.at)


class Gate:
    """Lets the requests of a run go, one by one, and none any more once it is stopped.

    The first reason to stop wins: the budget is reached, the account is refused, the provider asks for a longer wait
    than is allowed, answers that are paid for hold no pictures, or somebody calls `stop`. What is under way then goes
    on undisturbed; what waits is stopped.

    Assets go in the order in which they were begun. Where a budget has not room for all, nobody is let in on money that
    an asset begun earlier may still need: one that is uploading, or that waits for a retry.

    Args:
        max_concurrency: Requests under way at once, at most.
        look_ahead: Assets under way beyond those, so that uploads and archiving overlap; `max_concurrency` if None.
        requests_per_minute: The account's limit; None if unknown: it is then learned from the answers.
        ledger: The run's; a request that has no room in its limit waits, or stops the run.
        earlier_answers: When earlier tries of the run have paid for an answer, and whether it held a picture.
        stop_after_unusable: So many paid answers in a row without a picture stop the run; 0 for never.
        longest_wait_seconds: A rate limit or an overload that lasts longer stops the run.
        log: Where to say that the whole run waits.

    Example:
        >>> gate = Gate(ledger=Ledger(Decimal("1.00")))
        >>> with gate.admit(Decimal("0.05")) as admission:
        ...     admission.sent("a fingerprint", RequestId("a task run", datetime(2026, 11, 26, tzinfo=UTC)))
        ...     admission.paid(Decimal("0.05"))
        >>> gate.ledger.spent_usd
        Decimal('0.05')
    """

    def __init__(
        self,
        *,
        max_concurrency: int = 16,
        look_ahead: int | None = None,
        requests_per_minute: int | None = None,
        ledger: Ledger | None = None,
        earlier_answers: Iterable[tuple[datetime, bool]] = (),
        stop_after_unusable: int = 0,
        longest_wait_seconds: float = 120.0,
        log: logging.Logger | None = None,
    ) -> None:
        self.ledger = ledger or Ledger()
        self._pace = Pace(requests_per_minute)
        self._unusable = Unusable(stop_after_unusable)
        for at, is_picture in sorted(earlier_answers):
            (self._unusable.picture if is_picture else self._unusable.answer)(at)
        self._max_concurrency = max_concurrency
        self._window = max_concurrency + (max_concurrency if look_ahead is None else look_ahead)
        self._longest_wait_seconds = longest_wait_seconds
        self._log = log or logging.getLogger(__name__)
        # One lock for everything, and a condition of its own for all that wait for the same: no needless waking.
        self._lock = threading.RLock()
        self._queue: list[tuple[int, threading.Condition]] = []  # who waits for admission, by number of the asset
        self._room = threading.Condition(self._lock)
        self._stopping = threading.Condition(self._lock)
        self._stopped: SegmindError | None = None
        self._admitted = 0
        self._in_flight = 0
        self._entered = 0
        self._begun = 0
        self._numbers: dict[str, int] = {}  # of the assets under way
        self._may_pay: set[int] = set()  # numbers of those for which money is kept
        self._parked = 0
        self._wanted: set[str] = set()  # pictures that somebody is about to pay for
        self._held_until = -math.inf

    @property
    def stopped(self) -> SegmindError | None:
        """What the run was stopped by; None while it goes on."""
        return self._stopped

    @property
    def in_flight(self) -> int:
        """Requests that are sent and not answered."""
        return self._in_flight

    def stop(self, error: SegmindError) -> None:
        """Lets nothing new go: all that wait are stopped at once, what is under way goes on. The first error wins."""
        with self._lock:
            self._stopped = self._stopped or error
            for waiting in (*(turn for _, turn in self._queue), self._room, self._stopping):
                waiting.notify_all()

    @contextmanager
    def admit(self, price_usd: Decimal, asset: str = "") -> Iterator[Admission]:
        """Waits until one more request may go, and takes down what becomes of it.

        Left before `Admission.sent`, it is as if it had never been. Otherwise the request counts as paid once
        `Admission.paid` was called, as not billed where it fails with an error that says so, and as possibly billed
        in all other cases.

        Args:
            price_usd: The list price; the dearest answer of the run is reserved where that is more.
            asset: For whom, by the name given to `enter`; one that was never begun goes before all others.

        Raises:
            NotStartedError: The run is stopped; the cause says by what.
        """
        admission = self._let_in(price_usd, asset)
        error: BaseException | None = None
        try:
            yield admission
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._let_out(admission, error)

    def enter(self, asset: str = "") -> bool:
        """Waits until one more asset may be begun.

        Args:
            asset: Its name, which no other asset under way has; without one it has no place in the order.

        Returns:
            False, at once, when the run is stopped: nothing more is to be begun.
        """
        with self._lock:
            self._room.wait_for(lambda: self._stopped or self._entered < self._window)
            if self._stopped:
                return False
            self._entered += 1
            if asset:
                self._numbers[asset] = self._begun
                self._may_pay.add(self._begun)
                self._begun += 1
            return True

    def leave(self, asset: str = "") -> None:
        """Says that an asset that was begun has ended."""
        with self._lock:
            self._keep_money(asset, False)
            self._numbers.pop(asset, None)
            self._give_place()

    @contextmanager
    def parked(self, asset: str = "") -> Iterator[None]:
        """Gives an asset's place to another while it waits for something that is not ours, and keeps no money for it.

        Afterwards it goes on at once, even if the window is full. Not more than `PARKED` do so at a time; one more
        keeps its place.
        """
        with self._lock:
            self._keep_money(asset, False)
            gives = self._parked < PARKED
            if gives:
                self._parked += 1
                self._give_place()
        try:
            yield
        finally:
            with self._lock:
                self._keep_money(asset, True)
                if gives:
                    self._parked -= 1
                    self._entered += 1

    @contextmanager
    def first(self, picture: str) -> Iterator[bool]:
        """Whether nobody else of the run is about to pay for the same picture: whoever is not needs no money for it.

        Args:
            picture: Its fingerprint.
        """
        with self._lock:
            first = picture not in self._wanted
            self._wanted.add(picture)
        try:
            yield first
        finally:
            if first:
                with self._lock:
                    self._wanted.remove(picture)

    def pause(self, seconds: float) -> None:
        """Waits for so many seconds.

        Raises:
            NotStartedError: The run is stopped, before or meanwhile; the cause says by what.
        """
        with self._lock:
            self._stopping.wait_for(lambda: self._stopped, seconds)
            self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise NotStartedError(f"not started: {self._stopped}") from self._stopped

    def _give_place(self) -> None:
        self._entered -= 1
        self._room.notify_all()

    def _keep_money(self, asset: str, keep: bool) -> None:
        """Keeps the price of a request for an asset under way, or no longer."""
        number = self._numbers.get(asset)
        if number is not None and keep:
            self._may_pay.add(number)
        elif number in self._may_pay:
            self._may_pay.remove(number)
            self._next()

    def _let_in(self, price_usd: Decimal, asset: str) -> Admission:
        with self._lock:
            turn = threading.Condition(self._lock)
            number = self._numbers.get(asset, -1)
            waiting = number, turn
            insort(self._queue, waiting, key=lambda each: each[0])
            try:
                while True:
                    self._raise_if_stopped()
                    if self._queue[0] is not waiting:
                        turn.wait()
                        continue
                    price, now = self.ledger.price_of(price_usd), monotonic()
                    kept = price * sum(each < number for each in self._may_pay)
                    fit, delay = self.ledger.fit(price, kept), self._pace.delay(now)
                    if in_a_row := self._unusable.too_many:
                        self._stop_by_unusable(in_a_row, "earlier tries of this run got them; a new run begins anew")
                    elif fit is Fit.NEVER:
                        self._stop_by_budget()
                    elif fit is Fit.LATER or self._admitted >= self._max_concurrency:
                        turn.wait()
                    elif delay > 0:
                        turn.wait(min(delay, threading.TIMEOUT_MAX))
                    else:
                        self._admitted += 1
                        self.ledger.reserve(price)
                        self._keep_money(asset, False)
                        return Admission(self, asset, self._pace.reserve(now), price)
            finally:
                self._queue.remove(waiting)
                self._next()

    def _next(self) -> None:
        """Has the first in the queue look again."""
        if self._queue:
            self._queue[0][1].notify()

    def _stop_by_budget(self) -> None:
        ledger = self.ledger
        self.stop(
            BudgetReachedError(
                f"the budget of {usd(ledger.limit_usd or Decimal(0))} USD is reached: {usd(ledger.spent_usd)} USD "
                f"spent, {usd(ledger.unknown_usd)} USD possibly billed"
            )
        )

    def picture(self, at: datetime) -> None:
        """Notes that an answer held a picture: those that come before it in time count no more as unusable.

        Args:
            at: When it had been read, aware.
        """
        with self._lock:
            self._unusable.picture(at)

    def _note_unusable(self, error: SegmindError, at: datetime) -> None:
        if not isinstance(error, ApiError):
            return  # a full disk here says nothing about the provider
        with self._lock:
            in_a_row = self._unusable.answer(at)
            if in_a_row is not None:
                self._stop_by_unusable(in_a_row, f"the last one: {error}")

    def _stop_by_unusable(self, in_a_row: int, which: str) -> None:
        self.stop(
            UnusableAnswersError(
                f"{in_a_row} paid answers in a row held no picture: look at what they hold and at the provider's usage "
                "page before running again (after how many a run stops is "
                f"PREFECT_INTEGRATIONS_SEGMIND_STOP_AFTER_UNUSABLE, 0 for never); {which}"
            )
        )

    def _note_sent(self, admission: Admission, picture: str, request: RequestId) -> None:
        with self._lock:
            if admission.request is None:
                admission.picture, admission.request = picture, request
                self._in_flight += 1
                self._pace.sent(admission.ticket, monotonic())
                self._next()

    def _let_out(self, admission: Admission, error: BaseException | None) -> None:
        hold: str | None = None
        with self._lock:
            if admission.is_over:
                return
            admission.is_over = True
            self._admitted -= 1
            if admission.request is not None:
                self._in_flight -= 1
                hold = self._answered(admission, error)
            else:
                self._pace.release(admission.ticket)
            self._settle(admission, error)
            self._keep_money(admission.asset, admission.cost_usd is None)
            if isinstance(error, (AccountError, InsufficientCreditsError)):
                self.stop(error)
            self._room.notify_all()
            self._next()
        if hold is not None:
            self._log.warning(hold)

    def _answered(self, admission: Admission, error: BaseException | None) -> str | None:
        """Tells the pace; returns what is to be said where a hold begins with this answer."""
        if not isinstance(error, SegmindError) or not holds_all(error):
            self._pace.answered(admission.ticket)
            return None
        now, asked = monotonic(), error.retry_after or 0.0
        if isinstance(error, RateLimitError):
            why, seconds = "limits the rate", self._pace.limited(admission.ticket, now, error.retry_after)
        else:
            why, seconds = "is overloaded", self._pace.overloaded(now, asked)
        begins = seconds > 0 and now >= self._held_until
        self._held_until = now + seconds
        if asked > self._longest_wait_seconds:
            self.stop(error)
        if not begins or self._stopped:
            return None
        return (
            f"the provider {why}: all workers wait {math.ceil(seconds)} s, then one goes ahead; no retry is spent on it"
        )

    def _settle(self, admission: Admission, error: BaseException | None) -> None:
        price, request = admission.reserved_usd, admission.request
        if request is None:
            self.ledger.release(price)
            return
        outcome = Totals(1)
        if admission.cost_usd is not None:
            outcome = Totals(1, cost_usd=admission.cost_usd)
        elif not isinstance(error, SegmindError) or error.possibly_billed:
            outcome = Totals(1, possibly_billed_usd=price)
        self.ledger.settle(price, admission.picture, request, outcome)
