"""Runs that share budgets never spend more than these allow, whatever becomes of runs, answers and writes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefect_segmind.errors import PreconditionFailedError, StoreUnreachableError
from prefect_segmind.limits.account import LEASE_SECONDS, Account, Announcement, Budget, Share
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import Fit
from prefect_segmind.limits.permits import Permits
from prefect_segmind.limits.purse import LONGEST_WAIT_SECONDS, POLL_SECONDS, Hold, Purse
from tests.support.waiting import until

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
    unreadable: bool = False
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
        if self.unreadable:
            raise StoreUnreachableError("a record cannot be read")
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

    def drawn(self) -> Request:
        """The same, once money and a permit are drawn."""
        while isinstance(found := self.take(), Fit):
            assert self.purse.reached is None
            self.purse.step()
        return found

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
TestNoLimitIsExceededInAnyOrderOfSteps = SharedBudgets.TestCase


SUMMER = budget("1.00")


def world() -> World:
    """One in which it is known what a picture costs."""
    return World(accounts={name: Account(name=name, dearest_usd=PRICE) for name in ("summer", "monthly-2026-11")})


def test_one_run_alone_spends_its_budget_to_the_last_picture_and_then_is_told_which_is_reached() -> None:
    run = Run(world(), SUMMER)
    assert run.pay_all() == 20
    assert str(run.purse.reached) == (
        "the budget summer of 1.00 USD (CAMPAIGN_BUDGET_USD, account summer) is reached: 1.00 USD spent or possibly "
        "billed by all runs"
    )
    assert run.world.announced == [("summer", 80), ("summer", 100)]


def test_what_one_run_gives_back_another_that_waits_for_it_spends() -> None:
    shop = world()
    first, second = Run(shop, SUMMER), Run(shop, SUMMER)
    assert isinstance(first.pay(), Request), "and all the rest is drawn with it"
    assert second.pay() is Fit.LATER
    shop.wait(2 * POLL_SECONDS)
    assert second.pay() is Fit.LATER
    assert second.purse.reached is None
    first.purse.close()
    shop.wait(2 * POLL_SECONDS)
    assert second.pay_all() == 19


def test_a_run_waits_no_longer_than_two_minutes_for_what_others_hold(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    shop = world()
    first, second = Run(shop, SUMMER), Run(shop, SUMMER)
    first.pay()
    while second.pay() is Fit.LATER:
        shop.wait(POLL_SECONDS)
        first.purse.step()  # it lives, and renews
    assert LONGEST_WAIT_SECONDS <= shop.seconds < LONGEST_WAIT_SECONDS + 3 * POLL_SECONDS
    assert "0.95 USD held by other runs" in str(second.purse.reached)
    assert caplog.text.count("other runs hold 1.00 USD of what is left; this one waits for it, for up to 120 s") == 1


def test_the_share_of_a_dead_run_is_there_again_after_its_lease_less_what_may_have_been_spent() -> None:
    shop = world()
    dead, alive = Run(shop, SUMMER), Run(shop, SUMMER)
    dead.pay()
    sent, recorded, _ = dead.drawn(), dead.drawn(), dead.drawn()
    assert dead.send(sent)
    dead.record(recorded)
    assert alive.pay() is Fit.LATER
    shop.wait(LEASE_SECONDS + 2)
    assert alive.pay_all() == 17, "one was paid, one may be, and of one nobody knows that it was not sent"


def test_a_run_that_has_slept_too_long_sends_nothing_from_a_share_that_was_settled() -> None:
    shop = world()
    slept, other = Run(shop, SUMMER), Run(shop, SUMMER)
    late = slept.drawn()
    shop.wait(LEASE_SECONDS + 2)
    assert other.pay_all() == 20
    assert not slept.send(late)
    assert slept.pay_all() == 0
    assert shop.spent("summer") == SUMMER.limit_usd


def test_a_run_that_slept_and_was_not_settled_goes_on_with_its_share() -> None:
    shop = world()
    run = Run(shop, SUMMER)
    run.pay()
    (before,) = shop.accounts["summer"].shares
    shop.wait(10 * LEASE_SECONDS)
    assert isinstance(run.pay(), Request)
    assert [each.id for each in shop.accounts["summer"].shares] == [before.id]


def test_a_run_that_wakes_while_another_settles_its_share_keeps_it() -> None:
    shop = world()
    slept, other = Run(shop, SUMMER), Run(shop, SUMMER)
    slept.pay()
    shop.wait(LEASE_SECONDS + 2)
    shop.meanwhile = [lambda: None, lambda: None, slept.purse.step]  # once the other has looked who is dead
    assert other.pay() is Fit.LATER
    assert slept.pay_all() + other.pay_all() <= 19
    assert shop.spent("summer") <= SUMMER.limit_usd


def test_money_that_a_later_budget_has_not_is_given_back_to_the_earlier_ones() -> None:
    shop = world()
    run = Run(shop, budget("5.00", "monthly"), SUMMER, pictures=10)
    Run(shop, SUMMER).pay_all()
    assert run.pay() is Fit.NEVER
    (share,) = shop.accounts["monthly-2026-11"].shares
    assert share.drawn_usd == 0
    assert "the budget summer of 1.00 USD" in str(run.purse.reached)


def test_a_run_over_midnight_draws_from_the_new_days_account_and_gives_the_rest_of_the_old_one_back() -> None:
    shop = World()
    run = Run(shop, budget("0.10", "daily"), pictures=3)
    old = run.drawn()
    assert run.send(old)
    shop.wait(120)
    run.purse.step()
    run.answer(old, PRICE)
    assert run.pay_all() == 2
    assert "account daily-2026-11-28" in str(run.purse.reached)
    run.purse.close()
    spent = {name: (each.spent_usd, each.shares) for name, each in shop.accounts.items()}
    assert spent == {"daily-2026-11-27": (PRICE, ()), "daily-2026-11-28": (2 * PRICE, ())}


def test_before_any_answer_has_named_a_cost_one_request_is_sent_over_all_runs() -> None:
    shop = World()
    runs = [Run(shop, SUMMER) for _ in range(3)]
    first = runs[0].drawn()
    assert runs[0].send(first)
    assert [run.pay() for run in runs] == [Fit.LATER] * 3
    runs[0].answer(first, PRICE)
    assert isinstance(runs[0].pay(), Request)
    shop.wait(2 * POLL_SECONDS)
    assert isinstance(runs[1].pay(), Request), "it knows the cost by the account"


def test_a_run_that_keeps_the_first_request_to_itself_is_not_waited_for_for_ever() -> None:
    shop = World()
    idle, other = Run(shop, SUMMER), Run(shop, SUMMER)
    idle.drawn()
    while other.pay() is Fit.LATER:
        shop.wait(POLL_SECONDS)
        idle.purse.step()
    assert LONGEST_WAIT_SECONDS <= shop.seconds < LONGEST_WAIT_SECONDS + 5 * POLL_SECONDS
    assert other.purse.reached is None


def test_an_answer_that_is_dearer_than_the_list_price_costs_the_difference_once() -> None:
    shop = World()
    runs = [Run(shop, budget("0.12")) for _ in range(3)]
    while not all(run.purse.reached for run in runs):
        for run in runs:
            if run.purse.reached is None:
                run.pay(Decimal("0.08"))
        shop.wait(POLL_SECONDS)
    assert shop.spent("summer") == Decimal("0.08"), "for a second one of 0.08 there is no room"


def test_while_the_archive_is_out_of_reach_those_that_wait_are_told_and_nothing_is_sent() -> None:
    shop = world()
    run = Run(shop, SUMMER)
    assert run.take() is Fit.LATER
    shop.faults = ["not written"]
    run.purse.step()
    assert run.purse.failures == 1
    assert "does not answer" in str(run.purse.failure)
    assert run.take() is Fit.LATER
    run.purse.step()
    assert isinstance(run.take(), Request), "it is there again"


def test_a_share_that_cannot_be_given_back_is_settled_by_the_records() -> None:
    shop = world()
    run = Run(shop, SUMMER)
    run.pay()
    shop.faults = ["not written"]
    run.purse.close()
    assert len(shop.accounts["summer"].shares) == 1
    shop.wait(LEASE_SECONDS + 2)
    assert Run(shop, SUMMER).pay_all() == 19


def test_a_purse_that_cannot_give_back_tries_until_its_lease_is_over() -> None:
    shop = world()
    run = Run(shop, SUMMER)
    run.pay()
    for seconds, held in ((0, 1), (LEASE_SECONDS - 5, 1), (10, 0)):
        shop.wait(seconds)
        shop.faults = ["not written"]
        run.purse.close()
        assert len(run.purse._held) == held


def test_a_dead_run_whose_records_cannot_be_read_keeps_its_share(caplog: pytest.LogCaptureFixture) -> None:
    shop = world()
    Run(shop, SUMMER).pay()
    shop.wait(LEASE_SECONDS + 2)
    shop.unreadable = True
    other = Run(shop, SUMMER)
    assert other.pay_all() == 0
    assert caplog.text.count("what a dead run has spent stays unknown") == 1
    assert "1.00 USD held by other runs" in str(other.purse.reached)


def test_what_is_in_flight_when_a_run_is_over_stays_drawn_until_its_outcome_is_known() -> None:
    shop = world()
    run = Run(shop, SUMMER)
    run.pay()
    late = run.drawn()
    assert run.send(late)
    run.purse.close()
    (share,) = shop.accounts["summer"].shares
    assert (share.drawn_usd, share.in_flight_usd) == (2 * PRICE, PRICE)
    run.answer(late, Decimal(0))
    run.purse.close()
    assert (shop.accounts["summer"].shares, shop.accounts["summer"].spent_usd) == ((), PRICE)


def test_threads_that_take_money_while_it_is_given_back_take_nothing_of_it() -> None:
    shop = world()
    run = Run(shop, budget("5.00", "monthly"), SUMMER)
    run.pay()
    taken: list[Request | Fit] = []
    shop.meanwhile = [lambda: taken.extend(run.take() for _ in range(30))]
    for share in list(run.purse._held):
        run.purse._visit(share, Decimal(0), gives_back=True)
    assert taken == [Fit.LATER] * 30
    assert [each.shares[0].drawn_usd for each in shop.accounts.values()] == [PRICE, PRICE]


def test_money_kept_for_assets_that_come_first_is_not_taken() -> None:
    run = Run(world(), budget("0.10"))
    run.pay()
    assert run.take(kept=PRICE) is Fit.LATER
    run.purse.step()
    assert run.take(kept=PRICE) is Fit.LATER, "no more can be drawn"
    assert isinstance(run.take(), Request)


def test_a_run_draws_no_more_ahead_than_it_has_pictures_to_pay_for() -> None:
    shop = world()
    Run(shop, SUMMER, pictures=1).pay()
    (share,) = shop.accounts["summer"].shares
    assert share.drawn_usd == PRICE


def test_a_shared_rate_lets_no_more_requests_through_in_a_minute_than_its_limit_over_all_runs() -> None:
    shop = world()
    runs = [Run(shop, budget("50.00"), pictures=1000, rate=12) for _ in range(3)]
    while shop.seconds < 300:
        for run in runs:
            run.pay()
        shop.wait(0.5)
    assert len(shop.sent_at) > 40, "about a dozen a minute"
    for at in shop.sent_at:
        assert sum(at <= each < at + 60 for each in shop.sent_at) <= 12


def test_a_permit_that_has_run_out_is_not_sent_with() -> None:
    shop = world()
    run = Run(shop, SUMMER, rate=10)
    late = run.drawn()
    shop.wait(20)
    assert not run.send(late)


def test_its_thread_draws_renews_and_ends_with_the_purse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_segmind.limits.purse.RENEW_SECONDS", 0.05)
    shop = World()
    purse = Purse(shop, [SUMMER], run="a run", pictures=3)
    woken = threading.Event()
    purse.wake = woken.set
    assert purse.take(PRICE) is Fit.LATER
    assert woken.wait(30)
    hold = purse.take(PRICE)
    assert isinstance(hold, Hold)
    before = shop.accounts["summer"]
    shop.seconds = 5.0
    until(lambda: shop.accounts["summer"] != before)
    purse.sent(hold)
    purse.end(hold, PRICE)
    purse.close()
    until(lambda: not (purse._thread and purse._thread.is_alive()))
    assert (shop.accounts["summer"].spent_usd, shop.accounts["summer"].shares) == (PRICE, ())


class Hung(World):
    """An archive that hangs with each request until it is told to fail it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.failing = threading.Event(), [threading.Event(), threading.Event()]

    def change(self, name: str, change: Callable[[Account, float], Account]) -> Account:
        self.asked.set()
        first = self.failing.pop(0) if len(self.failing) > 1 else self.failing[0]
        first.wait(30)
        raise StoreUnreachableError("the archive does not answer")


def test_the_end_of_a_run_does_not_wait_for_an_archive_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_segmind.limits.purse.CLOSE_SECONDS", 0.1)
    world = Hung()
    answer, later = world.failing
    purse = Purse(world, [budget("1.00")])
    assert purse.take(PRICE) is Fit.LATER
    assert world.asked.wait(30)
    purse.close()
    assert not answer.is_set(), "it has not waited for the answer"
    answer.set()
    later.set()


def test_an_archive_out_of_reach_is_told_to_all_that_wait_for_money_at_once() -> None:
    world, told = Hung(), list[str]()
    first, later = world.failing
    gate = Gate(purse=Purse(world, [budget("1.00")]))

    def wait(name: str) -> None:
        try:
            with gate.admit(PRICE, name):
                pytest.fail("nothing may be sent")
        except StoreUnreachableError as error:
            told.append(str(error))

    threads = [threading.Thread(target=wait, args=(name,)) for name in "abcde"]
    for thread in threads:
        thread.start()
    until(lambda: len(gate._queue) == len(threads))
    first.set()
    for thread in threads:
        thread.join(20)
    assert len(told) == len(threads), "by the first failure: the next request still hangs"
    assert all("nothing was sent" in each for each in told)
    later.set()
    assert gate.purse is not None
    gate.purse.close()
