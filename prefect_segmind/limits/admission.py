"""The gate that every paid request of a run passes: it limits concurrency, rate and spending.

It handles the threads and the clock; the rate limiter and the ledger decide.
"""

from __future__ import annotations

import logging
import math
import threading
from bisect import insort
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    RunCancelledError,
    SegmindError,
    UnusableAnswersError,
)
from prefect_segmind.limits.ledger import NOTHING, Fit, Ledger, RequestId, Totals, Unusable
from prefect_segmind.limits.purse import Hold, Purse
from prefect_segmind.limits.rate_limiter import Pace
from prefect_segmind.limits.retry import holds_all
from prefect_segmind.money import usd

NOTHING_SENT = Totals()
PARKED = 256
"""The most assets that wait outside the window at once; each of them keeps a thread."""


@dataclass(eq=False)
class Admission:
    """The permission to send one request, granted by `Gate.admit`.

    Attributes:
        gate: The gate that granted it.
        asset: The asset that the request is for, by the name given to `Gate.enter`.
        ticket: The rate limiter's ticket.
        reserved_usd: The amount that is reserved in the ledger.
        hold: What it takes from budgets and a rate that are shared with other runs; None where none are.
        picture: The fingerprint of the picture; empty until the request is sent.
        request: The request; None until it is sent.
        cost_usd: What the answer has cost; None until that is known.
        is_over: Whether another request may take its place, and its outcome is entered.
        is_aside: Whether another request may take its place, though its outcome is not known yet.
    """

    gate: Gate
    asset: str
    ticket: int
    reserved_usd: Decimal
    hold: Hold | None = None
    picture: str = ""
    request: RequestId | None = None
    cost_usd: Decimal | None = None
    is_over: bool = False
    is_aside: bool = False

    @property
    def shares(self) -> tuple[str, ...]:
        """The ids of the shares of shared budgets that the request is paid from, for the record of the picture."""
        return self.hold.ids if self.hold else ()

    def confirm(self) -> None:
        """Makes sure that shared money may still be spent; the request must be sent as soon as this returns.

        Raises:
            PreconditionFailedError: It may not, as the run could not renew its shares. Nothing may be sent.
        """
        if self.hold and self.gate.purse:
            self.gate.purse.confirm(self.hold)

    def sent(self, picture: str, request: RequestId) -> None:
        """Records, once, that the request is being sent: from here on it may be billed.

        Args:
            picture: The fingerprint of the picture that it asks for.
            request: What identifies it in the ledger.
        """
        if self.request is None:
            self.picture = picture
            self.gate._record_sent(self, request)

    def paid(self, cost_usd: Decimal, at: datetime | None = None) -> None:
        """Records that the answer holds a picture, and lets another request take this one's place.

        Args:
            cost_usd: The cost of the picture.
            at: When the answer had been read, aware; now if None.
        """
        self.cost_usd = cost_usd
        self.gate.picture(at or datetime.now(UTC))
        self.gate._let_out(self, None)

    def stand_aside(self, error: SegmindError) -> None:
        """Lets another request take this one's place while the provider is asked what became of it.

        Its price stays reserved until that is known.

        Args:
            error: What the request has ended with.
        """
        self.gate._stand_aside(self, error)

    def unusable(self, error: SegmindError) -> None:
        """Records that a 200 was read to its end and holds no picture.

        Args:
            error: The failure; its `answered` has the cost and the time of the answer.
        """
        assert error.answered is not None
        if not error.possibly_billed:
            self.cost_usd = error.answered.cost_usd
        if isinstance(error, ApiError):  # a full disk here says nothing about the provider
            self.gate._count_unusable(error, error.answered.at)

    def _totals(self, error: BaseException | None) -> Totals:
        """The entry for the ledger once the request has ended, with an error or without."""
        if self.cost_usd is not None:
            return Totals(1, cost_usd=self.cost_usd)
        unknown = not isinstance(error, SegmindError) or error.possibly_billed
        return Totals(1, possibly_billed_usd=self.reserved_usd if unknown else NOTHING)


class Gate:
    """Admits the requests of a run one by one, and none after it is stopped.

    The first reason to stop wins: the budget is reached, the account is refused, the provider asks for a longer wait
    than is allowed, paid answers hold no pictures, or `stop` is called. Requests under way then continue; those that
    wait are refused.

    Assets go in the order in which they were begun. Where the budget is too small for all of them, no asset is admitted
    on money that one begun earlier may still need because it is uploading or waiting for a retry.

    Args:
        max_concurrency: The most requests under way at once.
        look_ahead: Assets under way beyond those, so that uploads and archiving overlap; `max_concurrency` if None.
        requests_per_minute: The account's limit; if None it is unknown, and learned from the answers.
        ledger: The run's ledger; a request for which its limit has no room waits, or stops the run.
        purse: What the run may spend of the budgets that it shares with others; None where it shares none.
        earlier_answers: When earlier tries of the run received each paid answer, and whether it held a picture.
        stop_after_unusable: The number of paid answers in a row without a picture that stops the run; 0 for never.
        longest_wait_seconds: A rate limit or an overload that lasts longer stops the run.
        log: Logs when the whole run waits.

    Attributes:
        ledger: As above.
        purse: As above.

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
        purse: Purse | None = None,
        earlier_answers: Iterable[tuple[datetime, bool]] = (),
        stop_after_unusable: int = 0,
        longest_wait_seconds: float = 120.0,
        log: logging.Logger | None = None,
    ) -> None:
        self.ledger = ledger or Ledger()
        self.purse = purse
        if purse is not None:
            purse.wake = self.corrected
        self._pace = Pace(requests_per_minute)
        self._unusable = Unusable(stop_after_unusable)
        for at, is_picture in sorted(earlier_answers):
            (self._unusable.picture if is_picture else self._unusable.answer)(at)
        self._max_concurrency = max_concurrency
        self._window = max_concurrency + (max_concurrency if look_ahead is None else look_ahead)
        self._longest_wait_seconds = longest_wait_seconds
        self._log = log or logging.getLogger(__name__)
        # One lock for everything, and a condition for each thing that is waited for, to avoid needless waking.
        self._lock = threading.RLock()
        self._queue: list[tuple[int, threading.Condition]] = []  # waiting for admission, by number of the asset
        self._room = threading.Condition(self._lock)
        self._stopping = threading.Condition(self._lock)
        self._stopped: SegmindError | None = None
        self._is_ending = False
        self._admitted = 0
        self._in_flight = 0
        self._entered = 0
        self._begun = 0
        self._numbers: dict[str, int] = {}  # of the assets under way
        self._may_pay: set[int] = set()  # numbers of the assets for which money is kept
        self._parked = 0
        self._wanted: set[str] = set()  # pictures that an asset of the run is about to pay for
        self._held_until = -math.inf
        self._said_alone = False

    @property
    def stopped(self) -> SegmindError | None:
        """The error that stopped the run; None while it goes on."""
        return self._stopped

    @property
    def in_flight(self) -> int:
        """The number of requests that are sent and not answered."""
        return self._in_flight

    @property
    def is_ending(self) -> bool:
        """Whether the run is being ended from outside, so that nothing is waited for any more."""
        return self._is_ending

    def stop(self, error: SegmindError) -> None:
        """Refuses all that wait, and everything new; requests under way continue.

        Args:
            error: Why; the first one wins.
        """
        with self._lock:
            self._stopped = self._stopped or error
            self._is_ending |= isinstance(error, RunCancelledError)
            for waiting in (*(turn for _, turn in self._queue), self._room, self._stopping):
                waiting.notify_all()

    @contextmanager
    def admit(self, price_usd: Decimal, asset: str = "") -> Iterator[Admission]:
        """Waits until one more request may be sent, and enters its outcome in the ledger.

        Without `Admission.sent` nothing is entered. Otherwise the request counts as paid once `Admission.paid` was
        called, as not billed if it fails with an error that is not `possibly_billed`, and else as possibly billed.

        Args:
            price_usd: The list price; the price of the dearest answer of the run is reserved if that is higher.
            asset: The name given to `enter`; an asset that was never begun goes before all others.

        Raises:
            NotStartedError: The run is stopped; the cause is the error that stopped it.
            StoreError: The account of a shared budget is out of reach.
        """
        admission = self._let_in(price_usd, asset)
        try:
            yield admission
        except BaseException as error:
            self._let_out(admission, error)
            raise
        self._let_out(admission, None)

    def enter(self, asset: str = "") -> bool:
        """Waits until one more asset may be begun.

        Args:
            asset: Its name, unique among the assets under way; without a name it has no place in the order.

        Returns:
            True; False, at once, when the run is stopped and nothing more is to be begun.
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
        """Ends an asset that was begun.

        Args:
            asset: The name given to `enter`.
        """
        with self._lock:
            self._keep_money(asset, False)
            self._numbers.pop(asset, None)
            self._give_up_place()

    @contextmanager
    def parked(self, asset: str = "") -> Iterator[None]:
        """Gives an asset's place to another while it waits for something outside the run, and keeps no money for it.

        Afterwards it goes on at once, even if the window is full. At most `PARKED` assets give up their places at a
        time; any more keep theirs.

        Args:
            asset: The name given to `enter`.
        """
        with self._lock:
            self._keep_money(asset, False)
            gives = self._parked < PARKED
            if gives:
                self._parked += 1
                self._give_up_place()
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
        """Tells apart the first asset of the run that is about to pay for a picture from others that want the same one.

        Args:
            picture: The fingerprint of the picture.

        Yields:
            Whether this is the first one; the others need no money.
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
        """Waits.

        Args:
            seconds: How long.

        Raises:
            NotStartedError: The run is stopped, before or meanwhile; the cause is the error that stopped it.
        """
        with self._lock:
            self._stopping.wait_for(lambda: self._stopped, seconds)
            self._raise_if_stopped()

    def rest(self, seconds: float) -> bool:
        """Waits for something that is paid for, which goes on unless the run is being ended from outside.

        Args:
            seconds: How long.

        Returns:
            Whether the time has passed; False, at once, when the run is being ended.
        """
        with self._lock:
            return not self._stopping.wait_for(lambda: self._is_ending, seconds)

    def corrected(self) -> None:
        """Lets those that wait look again, as the ledger may have more room."""
        with self._lock:
            self._next()

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise NotStartedError(f"not started: {self._stopped}") from self._stopped

    def _give_up_place(self) -> None:
        self._entered -= 1
        self._room.notify_all()

    def _keep_money(self, asset: str, keep: bool) -> None:
        """Begins or ends keeping the price of a request for an asset under way."""
        number = self._numbers.get(asset)
        if number is not None and keep:
            self._may_pay.add(number)
        elif number in self._may_pay:
            self._may_pay.remove(number)
            self._next()

    def _let_in(self, price_usd: Decimal, asset: str) -> Admission:
        with self._lock:
            failures = self.purse.failures if self.purse else 0  # one more is told to all that wait by then
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
                    if self._unusable.too_many:
                        self._stop_if_unusable("earlier tries of this run got them; a new run begins anew")
                    elif fit is Fit.NEVER:
                        self._stop_by_budget()
                    elif fit is not Fit.NOW or self._admitted >= self._max_concurrency:
                        self._say_why(fit)
                        turn.wait()
                    elif delay > 0:
                        turn.wait(min(delay, threading.TIMEOUT_MAX))
                    else:
                        hold = self._take(price, kept, failures)
                        if hold is Fit.NEVER:
                            continue  # the run is stopped
                        if isinstance(hold, Fit):
                            turn.wait()
                            continue
                        try:
                            self.ledger.reserve(price)
                        except ValueError:  # what a request of another run has cost was entered just now
                            self._put_back(hold)
                            continue
                        except BaseException:
                            self._put_back(hold)
                            raise
                        self._admitted += 1
                        self._keep_money(asset, False)
                        return Admission(self, asset, self._pace.reserve(now), price, hold)
            finally:
                self._queue.remove(waiting)
                self._next()

    def _take(self, price: Decimal, kept: Decimal, failures: int) -> Hold | Fit | None:
        """Takes shared money and a permit, if the run shares any.

        Args:
            price: What the run itself reserves; from shared money as much is taken as the dearest answer to any run.
            kept: What is kept for assets that come first.
            failures: How often the accounts had been out of reach when the asset began to wait.

        Raises:
            StoreError: They have been out of reach once more.
        """
        if self.purse is None:
            return None
        hold = self.purse.take(self.purse.price_of(price), kept, len(self._queue))
        if hold is Fit.NEVER and self.purse.reached:
            self.stop(self.purse.reached)
        elif hold is Fit.LATER and self.purse.failures > failures and self.purse.failure:
            failure = self.purse.failure
            raise failure.with_facts(f"{failure}; a shared budget could not be drawn from, and nothing was sent")
        return hold

    def _put_back(self, hold: Hold | None, totals: Totals = NOTHING_SENT) -> None:
        if hold and self.purse:
            unknown_usd = max(hold.price_usd, totals.possibly_billed_usd) if totals.possibly_billed_usd else NOTHING
            self.purse.end(hold, totals.cost_usd, unknown_usd)

    def _say_why(self, fit: Fit) -> None:
        """Logs, once, that a budget has the requests go one by one at first."""
        if fit is Fit.ALONE and not self._said_alone:
            self._said_alone = True
            self._log.info("the budget needs the cost of a picture: requests go one by one until an answer names it")

    def _next(self) -> None:
        """Wakes the first in the queue."""
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
        """Records that an answer held a picture: unusable answers before it no longer count.

        Args:
            at: When it had been read, aware.
        """
        with self._lock:
            self._unusable.picture(at)

    def _count_unusable(self, error: ApiError, at: datetime) -> None:
        with self._lock:
            self._unusable.answer(at)
            self._stop_if_unusable(f"the last one: {error}")

    def _stop_if_unusable(self, which: str) -> None:
        if in_a_row := self._unusable.too_many:
            self.stop(
                UnusableAnswersError(
                    f"{in_a_row} paid answers in a row held no picture: check their content and the provider's usage "
                    "page before running again (PREFECT_INTEGRATIONS_SEGMIND_STOP_AFTER_UNUSABLE sets after how many a "
                    f"run stops, 0 for never); {which}"
                )
            )

    def _record_sent(self, admission: Admission, request: RequestId) -> None:
        with self._lock:
            self._in_flight += 1
            admission.request = request  # first: with an interrupt from here on it counts as sent, in record and ledger
            if admission.hold and self.purse:
                self.purse.sent(admission.hold)
            self.ledger.send(admission.reserved_usd, admission.picture, request)
            self._pace.sent(admission.ticket, monotonic())
            self._next()

    def _stand_aside(self, admission: Admission, error: SegmindError) -> None:
        with self._lock:
            hold = self._give_up_slot(admission, error)
            self._next()
        if hold is not None:
            self._log.warning(hold)

    def _let_out(self, admission: Admission, error: BaseException | None) -> None:
        with self._lock:
            if admission.is_over:
                return
            admission.is_over = True
            hold = self._give_up_slot(admission, error)
            if admission.request is None:
                self.ledger.release(admission.reserved_usd)
                self._put_back(admission.hold)
            else:
                totals = admission._totals(error)
                self._put_back(admission.hold, totals)
                self.ledger.settle(admission.reserved_usd, admission.picture, admission.request, totals)
            self._keep_money(admission.asset, admission.cost_usd is None)
            if isinstance(error, (AccountError, InsufficientCreditsError)):
                self.stop(error)
            self._room.notify_all()
            self._next()
        if hold is not None:
            self._log.warning(hold)

    def _give_up_slot(self, admission: Admission, error: BaseException | None) -> str | None:
        """Lets another request be sent; returns the message to log if the answer makes all wait."""
        if admission.is_aside:
            return None
        admission.is_aside = True
        self._admitted -= 1
        if admission.request is None:
            self._pace.release(admission.ticket)
            return None
        self._in_flight -= 1
        return self._update_pace(admission, error)

    def _update_pace(self, admission: Admission, error: BaseException | None) -> str | None:
        """Passes an answer to the rate limiter; returns the message to log if it makes all wait."""
        if not isinstance(error, SegmindError) or not holds_all(error):
            self._pace.answered(admission.ticket)
            return None
        now, asked = monotonic(), error.retry_after or 0.0
        if isinstance(error, RateLimitError):
            why, seconds = "limits the rate", self._pace.limited(admission.ticket, now, error.retry_after)
        else:
            why, seconds = "is overloaded", self._pace.hold(now, asked)
        begins = seconds > 0 and now >= self._held_until
        self._held_until = now + seconds
        if asked > self._longest_wait_seconds:
            self.stop(error)
        if not begins or self._stopped:
            return None
        return (
            f"the provider {why}: all workers wait {math.ceil(seconds)} s, then one goes ahead; no retry is spent on it"
        )
