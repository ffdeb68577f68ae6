"""What one run may spend of the budgets that it shares with others, and how fast: its shares, and its permits.

A request is paid from a share of each budget at once, and takes a permit where the rate is shared too. A thread of the
purse draws ahead of need, so that no request waits for the archive; it renews the shares and tells what is spent. It
knows neither archive nor network: a `Book` keeps the accounts.
"""

from __future__ import annotations

import logging
import math
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from time import monotonic
from typing import Protocol
from uuid import uuid4

from prefect_segmind.errors import (
    BudgetReachedError,
    PreconditionFailedError,
    SegmindError,
    SharedBudgetReachedError,
    StoreError,
    redact,
)
from prefect_segmind.limits.account import BLOCK, LEASE_SECONDS, Account, Announcement, Budget, Share, Standing
from prefect_segmind.limits.ledger import NOTHING, Fit
from prefect_segmind.limits.permits import VALID_SECONDS, Draw, Permits
from prefect_segmind.money import usd

RENEW_SECONDS = 15.0
"""A share that was written longer ago is renewed."""
MARGIN_SECONDS = 10.0
"""So long before the end of its lease nothing more is sent from a share: clocks and answers may be late."""
LONGEST_WAIT_SECONDS = 2 * LEASE_SECONDS
"""How long a run waits for money that other runs hold; by then the share of a dead one has come back."""
POLL_SECONDS = 2.0
"""Seconds between two looks at an account that has nothing left, a half more or less."""
CLOSE_SECONDS = 5.0
"""How long the end of a run waits for the rest to be given back."""
AGAIN_SECONDS = 5.0
"""Seconds until what the archive has refused is tried again by itself."""


class Book(Protocol):
    """Keeps the accounts and permits of all runs. Every method may raise a `StoreError`."""

    def change(self, name: str, change: Callable[[Account, float], Account]) -> Account:
        """Changes an account in one step: nobody else's change is lost.

        Args:
            name: The account's.
            change: Makes the new account of the present one and the time; called again where another was faster.

        Returns:
            The new account, which is written.
        """
        ...

    def change_permits(self, change: Callable[[Permits, float], Permits]) -> None:
        """Changes the permits likewise."""
        ...

    def paid_from(self, share: Share) -> Decimal:
        """What was spent from a share by the records of the pictures, or may have been billed.

        Args:
            share: That of a run that is dead.
        """
        ...


@dataclass(eq=False)
class HeldShare:
    """A run's own share of one account.

    Attributes:
        budget: The budget.
        name: The account's.
        id: The share's.
        drawn_usd: What may be spent, by the last write that is known to have succeeded.
        spent_usd: What is spent, or may have been billed.
        in_flight_usd: What is reserved for requests without an outcome.
        until: Until when nobody else settles it, by the run's clock, with a margin.
        account: The account as last seen.
    """

    budget: Budget
    name: str
    id: str = field(default_factory=lambda: uuid4().hex)
    drawn_usd: Decimal = NOTHING
    spent_usd: Decimal = NOTHING
    in_flight_usd: Decimal = NOTHING
    until: float = -math.inf
    account: Account | None = None

    @property
    def free_usd(self) -> Decimal:
        """What may be spent on more requests; negative where answers were dearer than what was reserved."""
        return self.drawn_usd - self.spent_usd - self.in_flight_usd

    @property
    def dearest_usd(self) -> Decimal:
        """What the dearest answer to any run has cost; 0 if none has named a cost."""
        return self.account.dearest_usd if self.account else NOTHING


@dataclass(eq=False)
class _Batch:
    """Permits that were drawn together: how many are left, taken and not yet used, and used."""

    id: str
    left: int = 0
    taken: int = 0
    used: int = 0
    began: float = 0.0  # before they were drawn, by the run's clock
    at: float = 0.0  # when they were drawn, by the store's, which may count whole seconds
    last: float = 0.0  # when the last one was used, by the run's

    @property
    def until(self) -> float:
        return self.began + VALID_SECONDS - 1

    def is_over(self, now: float) -> bool:
        return not self.taken and (not self.left or now >= self.until)

    def told(self) -> Draw:
        return Draw(id=self.id, count=self.used, until=self.at + 1 + max(0.0, self.last - self.began))


@dataclass(eq=False)
class Hold:
    """Money and a permit for one request.

    Attributes:
        shares: The shares that it is paid from.
        price_usd: What is reserved in each.
    """

    shares: tuple[HeldShare, ...]
    price_usd: Decimal
    _batch: _Batch | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the shares, for the record of the picture."""
        return tuple(each.id for each in self.shares)


class _LostError(Exception):
    """The account has a run's share no more: another run has settled it."""


class Purse:
    """A run's shares of the budgets that it pays from, and its permits. Threads may share it.

    Whatever runs, machines and answers do, what is spent from an account in all, in flight and possibly billed, is
    within its limit together, but for answers that are dearer than what was reserved for them, as in a `Ledger`: until
    an answer has named a cost, one request at a time is sent over all runs; from then on the price of the dearest
    answer to any of them is reserved. A later, dearer answer exceeds the limit by the difference for each request that
    all runs then have in flight.

    Args:
        book: Keeps the accounts.
        budgets: The budgets, in the order in which they are drawn from.
        run: The flow run or task run, for people who read an account.
        pictures: How many pictures the run is going to pay for: no more is drawn ahead.
        requests_per_minute: The limit for all runs; None if it is not shared.
        announce: Called with each threshold of a budget that a write of this run has crossed, and the account.
        clock: Seconds on a clock that nobody sets and that goes on while the machine sleeps.
        today: What time it is, aware: which day or month a budget is for.
        log: Logs when the run waits for money that others hold.

    Attributes:
        wake: Called, without any lock, when those that wait should look again.
        reached: Why nothing more can be paid; None while that is possible.
        failures: How often the archive could not be reached for money or permits.
        failure: The last of these failures.
    """

    def __init__(
        self,
        book: Book,
        budgets: Sequence[Budget],
        *,
        run: str = "",
        pictures: int = 1,
        requests_per_minute: int | None = None,
        announce: Callable[[Budget, Account, Announcement], None] = lambda *_: None,
        clock: Callable[[], float] = monotonic,
        today: Callable[[], datetime] = lambda: datetime.now(UTC),
        log: logging.Logger | None = None,
    ) -> None:
        self.wake: Callable[[], None] = lambda: None
        self.reached: BudgetReachedError | None = None
        self.failures = 0
        self.failure: StoreError | None = None
        self._book = book
        self._budgets = tuple(budgets)
        self._run = run
        self._pictures = pictures
        self._requests_per_minute = requests_per_minute
        self._announce = announce
        self._clock = clock
        self._today = today
        self._log = log or logging.getLogger(__name__)
        self._lock = threading.RLock()
        self._due = threading.Condition(self._lock)
        self._working = threading.Lock()  # one turn at a time
        self._thread: threading.Thread | None = None
        self._held: list[HeldShare] = []  # those that are not given back yet
        self._price_usd = NOTHING  # of the last request that was asked for
        self._dearest_usd = NOTHING
        self._sent = 0
        self._waiting = 0
        self._need_usd: Decimal | None = None  # what a request waits for
        self._is_low = False
        self._not_before = -math.inf  # the next look at accounts that had too little
        self._gives_up_at: float | None = None
        self._is_patient = True
        self._renew_at = math.inf
        self._batches: list[_Batch] = []
        self._permits_wanted = 0
        self._no_permits_before = -math.inf
        self._announced: set[tuple[str, int, Decimal]] = set()
        self._unsettled: set[str] = set()  # shares of dead runs for which a record could not be read
        self._is_closing = False

    def price_of(self, price_usd: Decimal) -> Decimal:
        """The amount to reserve for a request: the price of the dearest answer to any run, if that is higher.

        Args:
            price_usd: What the run itself would reserve.
        """
        with self._lock:
            return max(price_usd, self._dearest_usd, *(each.dearest_usd for each in self._held), NOTHING)

    def take(self, price_usd: Decimal, kept_usd: Decimal = NOTHING, waiting: int = 1) -> Hold | Fit:
        """Money and a permit for one request, if they are at hand; if not, they are drawn, and `wake` is called.

        Args:
            price_usd: What to reserve.
            kept_usd: Money that others of the run come first for.
            waiting: How many requests wait, this one included.

        Returns:
            The money and the permit; or `LATER`, or `NEVER` if `reached` says why.
        """
        with self._lock:
            if self._is_closing:
                return Fit.LATER
            self._price_usd, self._waiting = price_usd, waiting
            shares, now = self._current(), self._clock()
            needed = price_usd + kept_usd
            money = all(each.until > now and each.free_usd >= needed for each in shares)
            # Until an answer names a cost, one request at a time.
            alone = any(each.in_flight_usd and not max(self._dearest_usd, each.dearest_usd) for each in shares)
            batch = self._permit(now)
            if money and not alone and (batch or self._requests_per_minute is None):
                for each in shares:
                    each.in_flight_usd += price_usd
                if batch:
                    batch.left, batch.taken = batch.left - 1, batch.taken + 1
                if min((each.free_usd for each in shares), default=NOTHING) < self._ahead_usd(BLOCK) / 2:
                    self._ask(low=True)
                return Hold(shares, price_usd, batch)
            if self.reached:
                return Fit.NEVER
            self._ask(None if money else needed, permits=waiting if money and not batch else 0)
            return Fit.LATER

    def confirm(self, hold: Hold) -> None:
        """Makes sure that money and permit may still be used; the request must be sent as soon as this returns.

        Args:
            hold: What `take` has returned.

        Raises:
            PreconditionFailedError: They may not: the run could not renew its shares, or the permit has run out.
        """
        with self._lock:
            now = self._clock()
            batch = hold._batch
            if any(each.until <= now for each in hold.shares) or (batch and batch.until <= now):
                raise PreconditionFailedError("the share of a budget, or the permit for a request, has run out")

    def sent(self, hold: Hold) -> None:
        """Records that a request is being sent.

        Args:
            hold: What it is paid from.
        """
        with self._lock:
            self._sent += 1
            if batch := hold._batch:
                batch.used, batch.taken, batch.last = batch.used + 1, batch.taken - 1, self._clock()
                hold._batch = None

    def end(self, hold: Hold, cost_usd: Decimal = NOTHING, possibly_billed_usd: Decimal = NOTHING) -> None:
        """Records what a request has cost, or that it was never sent.

        Args:
            hold: What it is paid from.
            cost_usd: What it has cost.
            possibly_billed_usd: What it may have cost.
        """
        with self._lock:
            self._dearest_usd = max(self._dearest_usd, cost_usd)
            for each in hold.shares:
                each.spent_usd += cost_usd + possibly_billed_usd
                each.in_flight_usd -= hold.price_usd
            if batch := hold._batch:
                batch.left, batch.taken = batch.left + 1, batch.taken - 1
                hold._batch = None
            self._not_before = -math.inf
            self._due.notify_all()

    def close(self) -> None:
        """Gives the rest back. What is still in flight stays drawn until its outcome is known.

        It waits a few seconds at most. Where the archive is out of reach, the purse tries on until the lease is over,
        while its process lives; then the shares come back by themselves, less what the records say was spent.
        """
        with self._lock:
            self._is_closing = True
            self._due.notify_all()
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            self.step()
        else:  # a store that does not answer keeps nobody waiting
            thread.join(CLOSE_SECONDS)

    def step(self) -> None:
        """One turn of the purse's thread: tells, renews and draws what is due."""
        with self._working:
            try:
                self._give_back_what_is_over()
                if not self._is_closing:
                    self._draw()
                    self._draw_permits()
            except StoreError as error:
                self._fail(error)
                self._log.info("a shared budget is out of reach: %s", error)
        with suppress(Exception):
            self.wake()

    def _fail(self, error: StoreError) -> None:
        """Lets those that wait hear why nothing was drawn; whoever still wants money asks again."""
        with self._lock:
            self.failures, self.failure = self.failures + 1, error
            self._need_usd, self._is_low, self._permits_wanted = None, False, 0
            now = self._clock()
            self._renew_at = min(self._renew_at, now + AGAIN_SECONDS)
            if self._is_closing:  # what is left to others by now needs no more tries
                self._held = [each for each in self._held if now < each.until + MARGIN_SECONDS]

    def _current(self) -> tuple[HeldShare, ...]:
        """The shares of the accounts of this moment, one for each budget, in their order."""
        today, shares = self._today(), []
        for budget in self._budgets:
            name = budget.account(today)
            found = next((each for each in self._held if each.budget is budget and each.name == name), None)
            if found is None:
                self._held.append(found := HeldShare(budget, name))
            shares.append(found)
        return tuple(shares)

    def _permit(self, now: float) -> _Batch | None:
        return next((each for each in self._batches if each.left and each.until > now), None)

    def _ahead_usd(self, pictures: int) -> Decimal:
        """What the run likes to have at hand: for so many pictures, but for no more than it is going to pay for."""
        return self._price_usd * max(1, min(pictures, self._pictures - self._sent))

    def _ask(self, need_usd: Decimal | None = None, *, low: bool = False, permits: int = 0) -> None:
        """Has the thread draw what is needed."""
        if need_usd is not None:
            self._need_usd = max(self._need_usd or NOTHING, need_usd)
        self._is_low |= low and self._pictures > self._sent + 1
        self._permits_wanted = max(self._permits_wanted, permits if self._requests_per_minute else 0)
        if self._thread is None:
            work = copy_context().run
            self._thread = threading.Thread(target=work, args=(self._work,), name="segmind-purse", daemon=True)
            self._thread.start()
        self._due.notify_all()

    def _work(self) -> None:
        while True:
            with self._lock:
                while (wait := self._until_due()) > 0:
                    self._due.wait(min(wait, RENEW_SECONDS))
                if self._is_closing and not self._held:
                    return
            try:
                self.step()
            except Exception as error:  # noqa: BLE001 - whatever it is, those that wait for money must hear of it
                self._fail(StoreError(f"a shared budget cannot be used ({type(error).__name__}: {redact(str(error))})"))
                self.wake()
            if self._is_closing:
                with self._lock:
                    self._due.wait(AGAIN_SECONDS if self._held else 0)

    def _until_due(self) -> float:
        """Seconds until there is something to do."""
        if self._is_closing:
            return 0.0
        now = self._clock()
        at = self._renew_at
        if self._need_usd is not None or self._is_low:
            at = min(at, max(now, self._not_before))
        if self._permits_wanted:
            at = min(at, max(now, self._no_permits_before))
        return at - now

    def _draw(self) -> None:
        """Renews the shares, and draws what is needed in each account or in none."""
        with self._lock:
            now, need, low = self._clock(), self._need_usd, self._is_low
            if now < self._not_before:
                need, low = None, False
            draws = low or need is not None
            if not draws and now < self._renew_at:
                return
            if draws:
                self._need_usd, self._is_low = None, False
            shares, price = self._current(), self._price_usd
            target = max(need or NOTHING, self._ahead_usd(self._waiting + BLOCK)) if draws else NOTHING
        granted = True
        for number, share in enumerate(shares):
            before = share.drawn_usd
            if not self._visit(share, target):
                return
            if not draws:
                continue
            if share.free_usd < price and self._settle_dead(share) and not self._visit(share, target):
                return
            granted &= share.drawn_usd > before
            target = max(NOTHING, min(target, share.free_usd))
            if target < price:
                shares = shares[: number + 1]
                break
        with self._lock:
            self._renew_at = self._clock() + RENEW_SECONDS
        if draws:
            for share in shares:
                if share.free_usd > target:
                    self._visit(share, target if target >= price else NOTHING, gives_back=True)
            self._wait_or_stop(shares[-1], price, need, granted=granted)

    def _wait_or_stop(self, share: HeldShare, price: Decimal, need: Decimal | None, *, granted: bool) -> None:
        """Decides, where the last account had too little, whether the run looks again or is over."""
        with self._lock:
            now, account = self._clock(), share.account
            if share.free_usd >= price:
                self._gives_up_at, self._is_patient = None, True
            if account is None or share.free_usd >= (price if need is None else need) or granted:
                return
            self._not_before = now + POLL_SECONDS * random.uniform(0.5, 1.5)
            if need is None or share.free_usd >= price or share.in_flight_usd:
                return
            others = account.may_come_back(share.id)
            if others and self._gives_up_at is None:
                self._gives_up_at = now + LONGEST_WAIT_SECONDS
                self._log.info(
                    "%s: other runs hold %s USD of what is left; this one waits for it, for up to %.0f s",
                    *(share.budget.title, usd(others), LONGEST_WAIT_SECONDS),
                )
            if others and self._gives_up_at is not None and now < self._gives_up_at:
                return
            if account.left_usd(share.budget.limit_usd) >= price and self._is_patient:
                self._is_patient = False  # the money is there, and for so long no answer has named a cost
                return
            self.reached = _reached(share, account)

    def _visit(self, share: HeldShare, wanted_usd: Decimal, *, gives_back: bool = False) -> bool:
        """Tells what is spent, renews the share, and draws up to what is wanted for more requests.

        Args:
            share: The share.
            wanted_usd: What is wanted.
            gives_back: Whether what is free beyond that is given back.

        Returns:
            Whether the run still had its share; otherwise it draws another.
        """
        with self._lock:
            if gives_back:  # first: meanwhile nobody spends it
                share.drawn_usd = min(share.drawn_usd, share.spent_usd + share.in_flight_usd + wanted_usd)
            standing = self._standing(share)._replace(wanted_usd=wanted_usd)
            began = self._clock()

        def change(account: Account, now: float) -> Account:
            if share.account is not None and account.share(share.id) is None:
                raise _LostError
            return account.visited(standing, share.budget.limit_usd, now)

        try:
            account = self._book.change(share.name, change)
        except _LostError:
            self._log.info("%s: the share of this run was not renewed in time; another is drawn", share.budget.title)
            with self._lock:
                share.until = -math.inf
                self._held.remove(share)
            return False
        mine = account.share(share.id)
        assert mine is not None
        with self._lock:
            share.account, share.drawn_usd = account, mine.drawn_usd
            share.until = began + LEASE_SECONDS - MARGIN_SECONDS
        self._announce_crossed(share, account)
        return True

    def _standing(self, share: HeldShare) -> Standing:
        return Standing(
            id=share.id,
            run=self._run,
            drawn_usd=share.drawn_usd,
            spent_usd=share.spent_usd,
            in_flight_usd=share.in_flight_usd,
            price_usd=max(self._price_usd, self._dearest_usd),
            dearest_usd=self._dearest_usd,
            is_patient=self._is_patient,
        )

    def _settle_dead(self, share: HeldShare) -> bool:
        """Settles the shares of dead runs in an account; returns whether there were any."""
        seen: list[Share] = []

        def look(account: Account, now: float) -> Account:
            seen[:] = account.dead(share.id, now)
            return account

        limit = share.budget.limit_usd
        self._book.change(share.name, look)
        settled = False
        for dead in seen:
            try:
                spent = self._book.paid_from(dead)
            except StoreError as error:
                if dead.id not in self._unsettled:
                    self._unsettled.add(dead.id)
                    self._log.warning("%s: what a dead run has spent stays unknown: %s", share.budget.title, error)
                continue

            def settle(account: Account, _: float, dead: Share = dead, spent: Decimal = spent) -> Account:
                return account.settled(dead, spent, share.id, limit)

            self._announce_crossed(share, self._book.change(share.name, settle))
            self._log.info("%s: a run has died and had spent %s USD of its share", share.budget.title, usd(spent))
            settled = True
        return settled

    def _give_back_what_is_over(self) -> None:
        """Gives back the rest of shares of past days and months and, when the purse is closed, of all."""
        with self._lock:
            current = () if self._is_closing else self._current()
            over = [each for each in self._held if each not in current]
        for share in over:
            with self._lock:
                standing = self._standing(share)
            if standing.in_flight_usd:
                if share.free_usd > 0 or share.until - self._clock() < LEASE_SECONDS - MARGIN_SECONDS - RENEW_SECONDS:
                    self._visit(share, NOTHING, gives_back=True)
                continue

            def change(account: Account, _: float, share: HeldShare = share, standing: Standing = standing) -> Account:
                return account.closed(standing, share.budget.limit_usd)

            if share.account is not None or self.failures:  # else nothing was drawn, not even by a lost answer
                self._announce_crossed(share, self._book.change(share.name, change))
            with self._lock, suppress(ValueError):
                self._held.remove(share)

    def _announce_crossed(self, share: HeldShare, account: Account) -> None:
        for each in account.announced:
            crossed = share.name, each.percent, each.limit_usd
            if each.by == share.id and crossed not in self._announced:
                self._announced.add(crossed)
                try:
                    self._announce(share.budget, account, each)
                except SegmindError as error:
                    self._log.warning("%s", error)

    def _draw_permits(self) -> None:
        limit = self._requests_per_minute
        with self._lock:
            now = self._clock()
            wanted, self._permits_wanted = self._permits_wanted, 0
            if limit is None or not wanted or now < self._no_permits_before:
                self._permits_wanted = wanted
                return
            over = [each for each in self._batches if each.is_over(now)]
            new = _Batch(uuid4().hex, began=now)
            self._batches.append(new)  # with no permits: what a lost answer has drawn is given back by the next
        granted, wait = 0, 0.0

        def change(permits: Permits, at: float) -> Permits:
            nonlocal granted, wait
            drawn = permits.drawn(
                new.id, wanted=wanted, requests_per_minute=limit, now=at, known=[each.told() for each in over]
            )
            granted, wait, new.at = drawn.number, drawn.wait_seconds, at
            return drawn.permits

        self._book.change_permits(change)
        with self._lock:
            new.left = granted
            self._batches = [each for each in self._batches if each not in over and (each is not new or granted)]
            self._no_permits_before = -math.inf if granted else now + min(wait, AGAIN_SECONDS)


def _reached(share: HeldShare, account: Account) -> BudgetReachedError:
    budget = share.budget
    held = account.may_come_back(share.id)
    kind = BudgetReachedError if budget.is_of_one_run else SharedBudgetReachedError
    return kind(
        f"the {budget.title} of {usd(budget.limit_usd)} USD ({budget.setting}, account {share.name}) is reached: "
        f"{usd(account.used_usd)} USD spent or possibly billed by all runs"
        + (f", {usd(held)} USD held by other runs" if held else "")
    )
