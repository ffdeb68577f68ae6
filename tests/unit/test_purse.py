"""Runs that share budgets never spend more than these allow, whatever becomes of runs, answers and writes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefect_segmind.errors import PreconditionFailedError, StoreUnreachableError
from prefect_segmind.limits.account import Account, Announcement, Budget, Share
from prefect_segmind.limits.ledger import Fit
from prefect_segmind.limits.permits import Permits
from prefect_segmind.limits.purse import POLL_SECONDS, Hold, Purse

PRICE = Decimal("0.05")
BEGIN = datetime(2026, 11, 27, 23, 59, tzinfo=UTC)
Fault = Literal["none", "not written", "answer lost"]


@dataclass(eq=False)
class Request:
    """A request as the provider and the archive's records know it: what it costs, None while that is open."""

    shares: tuple[str, ...]
    accounts: tuple[str, ...]
    hold: Hold
    cost_usd: Decimal | None = None
    recorded_usd: Decimal | None = None

    @property
    def most_usd(self) -> Decimal:
        return self.hold.price_usd if self.cost_usd is None else self.cost_usd


@dataclass(eq=False)
class World:
    """An archive, its clock, and all requests that were ever recorded and sent."""

    seconds: float = 0.0
    accounts: dict[str, Account] = field(default_factory=dict)
    permits: Permits = field(default_factory=Permits)
    recorded: list[Request] = field(default_factory=list)
    sent: list[Request] = field(default_factory=list)
    sent_at: list[float] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    announced: list[tuple[str, int]] = field(default_factory=list)
    meanwhile: list[Callable[[], Any]] = field(default_factory=list)
    """What others do between reading and writing."""

    def clock(self) -> float:
        return self.seconds

    def today(self) -> datetime:
        return BEGIN + timedelta(seconds=self.seconds)

    def wait(self, seconds: float) -> None:
        self.seconds += seconds

    def _fault(self) -> Fault:
        return self.faults.pop(0) if self.faults else "none"

    # The book, whose clock counts whole seconds, as S3's does.

    def change(self, name: str, change: Callable[[Account, float], Account]) -> Account:
        before = self.accounts.get(name, Account(name=name))
        fault, changed = self._fault(), change(before, float(int(self.seconds)))
        self._do_meanwhile()
        if self.accounts.get(name, Account(name=name)) != before:  # another was faster
            return self.change(name, change)
        if fault != "not written":
            self.accounts[name] = Account.model_validate_json(changed.model_dump_json())
        if fault != "none":
            raise StoreUnreachableError(f"the archive does not answer ({fault})")
        return changed

    def change_permits(self, change: Callable[[Permits, float], Permits]) -> None:
        fault, changed = self._fault(), change(self.permits, float(int(self.seconds)))
        if fault != "not written":
            self.permits = changed
        if fault != "none":
            raise StoreUnreachableError(f"the archive does not answer ({fault})")

    def _do_meanwhile(self) -> None:
        if self.meanwhile:
            first, *later = self.meanwhile
            self.meanwhile = []  # what is done meanwhile is not interrupted itself
            first()
            self.meanwhile = later

    def paid_from(self, share: Share) -> Decimal:
        self._do_meanwhile()
        return sum(
            (each.hold.price_usd if each.recorded_usd is None else each.recorded_usd)
            for each in self.recorded
            if share.id in each.shares
        ) or Decimal(0)

    def spent(self, account: str) -> Decimal:
        return sum((each.most_usd for each in self.sent if account in each.accounts), Decimal(0))

    def announce(self, budget: Budget, account: Account, crossed: Announcement) -> None:
        self.announced.append((account.name, crossed.percent))


def budget(limit: str, kind: Literal["daily", "monthly", "campaign"] = "campaign", name: str = "summer") -> Budget:
    return Budget(kind, Decimal(limit), f"{kind.upper()}_BUDGET_USD", name if kind == "campaign" else "")


class Run:
    """A run whose purse works when it is told to, and in no thread of its own."""

    def __init__(self, world: World, *budgets: Budget, pictures: int = 100, rate: int | None = None) -> None:
        self.world = world
        self.purse = Purse(
            world,
            budgets,
            run="a run",
            pictures=pictures,
            requests_per_minute=rate,
            announce=world.announce,
            clock=world.clock,
            today=world.today,
        )
        self.purse._thread = threading.current_thread()

    def take(self, kept: Decimal = Decimal(0)) -> Request | Fit:
        """Takes money for a request."""
        hold = self.purse.take(self.purse.price_of(PRICE), kept, waiting=5)
        if isinstance(hold, Fit):
            return hold
        return Request(hold.ids, tuple(each.name for each in hold.shares), hold)

    def record(self, request: Request) -> None:
        """Writes it into the record of its picture."""
        if request not in self.world.recorded:
            self.world.recorded.append(request)

    def send(self, request: Request) -> bool:
        """Records and sends it, if its money may still be used; otherwise it is taken out of the record."""
        self.record(request)
        try:
            self.purse.confirm(request.hold)
        except PreconditionFailedError:
            self.purse.end(request.hold)
            self.world.recorded.remove(request)
            return False
        self.purse.sent(request.hold)
        self.world.sent.append(request)
        self.world.sent_at.append(self.world.seconds)
        return True

    def answer(self, request: Request, cost: Decimal | None, *, tells: bool = True) -> None:
        """The provider bills it, or does not; unless it tells, nobody knows which."""
        request.cost_usd = cost
        if tells:
            request.recorded_usd = cost
            self.purse.end(request.hold, cost or Decimal(0))
        else:
            self.purse.end(request.hold, possibly_billed_usd=request.hold.price_usd)

    def pay(self, cost: Decimal = PRICE) -> Request | Fit:
        """One picture: money is drawn for it if there is none at hand."""
        found = self.take()
        if isinstance(found, Fit):
            self.purse.step()
            found = self.take()
        if isinstance(found, Request):
            assert self.send(found)
            self.answer(found, cost)
        return found

    def pay_all(self) -> int:
        """Pays until its budgets have no room, and waits where others may give back; the number of pictures."""
        paid = 0
        while self.purse.reached is None:
            if isinstance(self.pay(), Request):
                paid += 1
            else:
                self.world.wait(2 * POLL_SECONDS)
                self.purse.step()
        return paid


class SharedBudgets(RuleBasedStateMachine):
    """Any order of steps of several runs: some crash, some sleep, and writes are lost or their answers are."""

    @initialize(
        daily=st.integers(0, 6),
        campaign=st.integers(1, 9),
        rest=st.sampled_from(["0", "0.01", "0.049"]),
        known=st.booleans(),
    )
    def begin(self, daily: int, campaign: int, rest: str, known: bool) -> None:
        self.world = World()
        self.limits = {"daily": daily * PRICE + Decimal(rest), "summer": campaign * PRICE}
        if known:  # what a picture costs
            self.world.accounts["summer"] = Account(name="summer", dearest_usd=PRICE)
        self.open: list[tuple[Run, Request]] = []
        self.runs = [self.new() for _ in range(3)]

    def new(self) -> Run:
        both = budget(str(self.limits["daily"]), "daily"), budget(str(self.limits["summer"]))
        return Run(self.world, *both, pictures=10)

    which = st.integers(0, 2)
    faults = st.lists(st.sampled_from(["none", "none", "not written", "answer lost"]), max_size=4)

    @rule(
        which=which,
        faults=faults,
        count=st.integers(1, 4),
        then=st.sampled_from(["waits", "records", "sends", "sends"]),
    )
    def take_some(self, which: int, faults: list[Fault], count: int, then: str) -> None:
        run = self.runs[which]
        for _ in range(count):
            found = run.take()
            if isinstance(found, Fit):
                self.world.faults = [*faults]
                run.purse.step()
                self.world.faults = []
                found = run.take()
            self.begin_one(run, found, then)

    def begin_one(self, run: Run, found: Request | Fit, then: str) -> None:
        if isinstance(found, Fit):
            return
        if then == "records":
            run.record(found)
        if then != "sends" or run.send(found):
            self.open.append((run, found))

    @rule(which=which, others=st.lists(st.tuples(which, st.booleans()), max_size=3))
    def step(self, which: int, others: list[tuple[int, bool]]) -> None:
        """One that others are faster than: threads of the same run take money, or another run changes the account."""

        def meanwhile(other: int, steps: bool) -> Callable[[], None]:
            run = self.runs[other]
            if steps and other != which:
                return run.purse.step
            return lambda: self.begin_one(run, run.take(), "sends")

        self.begin_one(self.runs[which], self.runs[which].take(), "waits")
        self.world.meanwhile = [meanwhile(*each) for each in others]
        self.runs[which].purse.step()
        self.world.meanwhile = []

    @precondition(lambda self: self.open)
    @rule(number=st.integers(0, 99))
    def send_one(self, number: int) -> None:
        run, request = self.open[number % len(self.open)]
        if request not in self.world.sent and not run.send(request):
            self.open.remove((run, request))

    @precondition(lambda self: self.open)
    @rule(number=st.integers(0, 99), outcome=st.sampled_from(["billed", "billed", "not billed", "unknown"]))
    def answer_one(self, number: int, outcome: str) -> None:
        run, request = self.open[number % len(self.open)]
        if request in self.world.sent:
            self.open.remove((run, request))
            run.answer(request, Decimal(0) if outcome == "not billed" else PRICE, tells=outcome != "unknown")

    @rule(which=which)
    def crash(self, which: int) -> None:
        gone = self.runs[which]
        self.open = [each for each in self.open if each[0] is not gone]
        self.runs[which] = self.new()

    @rule(which=which, faults=faults)
    def end(self, which: int, faults: list[Fault]) -> None:
        if not any(run is self.runs[which] for run, _ in self.open):
            self.world.faults = [*faults]
            self.runs[which].purse.close()
            self.world.faults = []
            self.runs[which] = self.new()

    @rule(seconds=st.sampled_from([5, 49, 61, 61]))
    def pass_time(self, seconds: int) -> None:
        self.world.wait(seconds)

    @invariant()
    def never_more_than_its_limit_is_spent_from_any_account(self) -> None:
        for name in self.world.accounts:
            limit = self.limits["summer" if name == "summer" else "daily"]
            assert self.world.spent(name) <= limit, name

    @invariant()
    def no_account_has_given_out_more_than_its_limit(self) -> None:
        for name, account in self.world.accounts.items():
            assert account.left_usd(self.limits["summer" if name == "summer" else "daily"]) >= 0

    @invariant()
    def each_threshold_is_announced_once_at_most(self) -> None:
        assert max(Counter(self.world.announced).values(), default=0) <= 1


SharedBudgets.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestInAnyOrder = SharedBudgets.TestCase
