"""Every request of a run passes one gate: not too many, not too fast, within the budget, and none after a stop."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count
from time import monotonic, sleep
from typing import Any, Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_segmind.api.picture import Answered
from prefect_segmind.errors import (
    AnswerCutError,
    ApiUnreachableError,
    BadGatewayError,
    BudgetReachedError,
    GatewayTimeoutError,
    InsufficientCreditsError,
    InvalidKeyError,
    NotAnImageError,
    NotStartedError,
    OutboxError,
    OverloadedError,
    RateLimitError,
    RunCancelledError,
    SegmindError,
    StoreUnreachableError,
    UnprocessableError,
    UnusableAnswersError,
)
from prefect_segmind.limits import admission as module
from prefect_segmind.limits.account import Account, Budget, Share
from prefect_segmind.limits.admission import PARKED, Admission, Gate
from prefect_segmind.limits.ledger import NOTHING, Fit, Ledger, PastRequest, RequestId, Totals
from prefect_segmind.limits.permits import Permits
from prefect_segmind.limits.purse import Purse
from tests.support.logs import listening
from tests.support.waiting import until

PRICE = Decimal("0.05")
NUMBERS = count()
STOP = RunCancelledError("the run was cancelled")


class Clock:
    """The gate's clock, moved by hand: what a test asserts depends on no real time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)
    return clock


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Runs something in a thread of its own, which must have ended when the test ends."""
    with ThreadPoolExecutor(600) as pool:
        yield pool.submit


def sent(admission: Admission) -> None:
    admission.sent("a picture", RequestId(f"run {next(NUMBERS)}", datetime(2026, 1, 2, tzinfo=UTC)))


def pay(gate: Gate, cost: Decimal = PRICE) -> None:
    with gate.admit(PRICE) as admission:
        sent(admission)
        admission.paid(cost)


def send(gate: Gate, error: BaseException, meanwhile: Callable[[Admission], Any] = lambda admission: None) -> None:
    with gate.admit(PRICE) as admission:
        sent(admission)
        meanwhile(admission)
        raise error


def too_many(retry_after: float) -> RateLimitError:
    return RateLimitError("too many", status=429, retry_after=retry_after)


def unusable(cost: str = "0.05", at: float = 0.0, kind: type[SegmindError] = NotAnImageError) -> SegmindError:
    """A 200 without a picture, read to its end so many seconds after the first."""
    error = kind("a page of HTML", status=200, possibly_billed=kind is AnswerCutError)
    time = datetime(2026, 1, 2, tzinfo=UTC) + timedelta(seconds=at)
    error.answered = Answered(cost_usd=Decimal(cost), cost_source="x-cost", at=time)
    return error


def waste(gate: Gate, error: SegmindError) -> None:
    with pytest.raises(type(error)):
        send(gate, error, lambda admission: admission.unusable(error))


def fail(gate: Gate, error: BaseException) -> None:
    with pytest.raises(type(error)):
        send(gate, error)


def money(gate: Gate) -> tuple[Decimal, Decimal, Decimal]:
    return gate.ledger.spent_usd, gate.ledger.in_flight_usd, gate.ledger.unknown_usd


def waiting(gate: Gate, count: int) -> None:
    until(lambda: len(gate._queue) == count, every=0.001)


# What becomes of an admission.


@pytest.mark.parametrize(
    ("error", "unknown"),
    [
        (UnprocessableError("refused"), "0.00"),
        (too_many(0.0), "0.00"),
        (BadGatewayError("no answer", possibly_billed=True), "0.05"),
        (KeyboardInterrupt(), "0.05"),
        (ZeroDivisionError(), "0.05"),
    ],
)
def test_a_failed_request_is_counted_by_whether_it_may_have_been_billed(error, unknown):
    gate = Gate()
    fail(gate, error)
    assert money(gate) == (0, 0, Decimal(unknown))
    assert gate.in_flight == 0
    assert gate.stopped is None


def test_a_picture_that_was_paid_for_is_spent_whatever_happens_afterwards():
    gate = Gate()
    with pytest.raises(SegmindError):
        send(gate, SegmindError("the disk is full", possibly_billed=True), lambda each: each.paid(Decimal("0.07")))
    assert money(gate) == (Decimal("0.07"), 0, 0)


def test_a_cost_that_is_entered_just_as_a_request_is_let_in_takes_no_place_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(max_concurrency=1, ledger=Ledger(Decimal("0.10")))
    delay = gate._pace.delay

    def entered(now: float) -> float:
        """A look at the history says, between two lines of the gate's, that an earlier request has cost 0.06."""
        monkeypatch.setattr(gate._pace, "delay", delay)
        earlier, cost = RequestId("a dead run", datetime(2026, 1, 2, tzinfo=UTC)), Totals(1, Decimal("0.06"))
        gate.ledger.carry("a picture", [PastRequest(earlier, cost, cost)], "this run")
        return delay(now)

    monkeypatch.setattr(gate._pace, "delay", entered)
    with pytest.raises(NotStartedError, match=r"the budget of 0\.10 USD is reached"), gate.admit(PRICE):
        pass
    assert (gate._admitted, gate.ledger.in_flight_usd) == (0, NOTHING)


def test_once_an_answer_has_been_read_the_next_request_may_go_while_the_picture_is_put_away(start):
    gate = Gate(max_concurrency=1)
    with gate.admit(PRICE) as admission:
        sent(admission)
        admission.paid(PRICE)
        assert gate.in_flight == 0
        start(pay, gate).result(timeout=30)
    assert money(gate) == (2 * PRICE, 0, 0)


def test_a_request_that_ends_without_a_word_may_have_been_billed():
    gate = Gate()
    with gate.admit(PRICE) as admission:
        sent(admission)
    assert money(gate) == (0, 0, PRICE)


def test_an_answer_without_a_picture_is_spent_at_what_it_has_cost_and_one_that_was_cut_stays_unknown() -> None:
    gate = Gate(ledger=Ledger(Decimal("1.00")))
    waste(gate, unusable("0.07"))
    assert money(gate) == (Decimal("0.07"), 0, 0)
    waste(gate, unusable("0.07", kind=AnswerCutError))
    assert money(gate) == (Decimal("0.07"), 0, Decimal("0.07")), "what was reserved: the dearest answer so far"


@pytest.mark.parametrize(("answers", "stops"), [("--", True), ("+--", True), ("-+-", False), ("---+", False)])
def test_answers_without_a_picture_in_earlier_tries_count_and_nothing_more_is_paid_for(
    answers: str, stops: bool
) -> None:
    start = datetime(2026, 11, 23, tzinfo=UTC)
    earlier = [(start + timedelta(seconds=number), each == "+") for number, each in enumerate(answers)]
    gate = Gate(stop_after_unusable=2, earlier_answers=reversed(earlier))
    assert gate.stopped is None, "what is paid for already may still be taken"
    if not stops:
        pay(gate)
        return
    with pytest.raises(NotStartedError, match="2 paid answers in a row held no picture"):
        pay(gate)
    assert isinstance(gate.stopped, UnusableAnswersError)


def test_an_answer_that_can_be_read_by_now_is_none_of_those_without_a_picture() -> None:
    start = datetime(2026, 11, 23, tzinfo=UTC)
    gate = Gate(stop_after_unusable=2, earlier_answers=[(start, False), (start, False)])
    gate.picture(start + timedelta(seconds=1))
    pay(gate)


def test_so_many_paid_answers_in_a_row_without_a_picture_stop_the_run_and_say_why() -> None:
    gate = Gate(stop_after_unusable=3)
    for at in range(3):
        assert gate.stopped is None
        waste(gate, unusable(at=at))
    assert isinstance(gate.stopped, UnusableAnswersError)
    told = str(gate.stopped)
    assert told.startswith("3 paid answers in a row held no picture: check their content")
    assert told.endswith("the last one: a page of HTML")
    assert "PREFECT_INTEGRATIONS_SEGMIND_STOP_AFTER_UNUSABLE" in told
    with pytest.raises(NotStartedError, match="3 paid answers in a row"):
        pay(gate)


def test_a_picture_begins_the_row_anew_and_what_was_not_paid_neither_lengthens_nor_ends_it() -> None:
    gate = Gate(stop_after_unusable=3)
    for at in range(20):
        if at % 3 == 2:
            with gate.admit(PRICE) as admission:
                sent(admission)
                admission.paid(PRICE, datetime(2026, 1, 2, tzinfo=UTC) + timedelta(seconds=at))
        else:
            waste(gate, unusable(at=at))
        fail(gate, BadGatewayError("no answer", possibly_billed=True))
        fail(gate, AnswerCutError("cut", possibly_billed=True))
    assert gate.stopped is None
    waste(gate, unusable(at=30))
    assert gate.stopped is not None


def test_the_row_is_by_the_time_of_the_answers_and_not_of_when_they_were_judged() -> None:
    gate = Gate(stop_after_unusable=3)
    waste(gate, unusable(at=1))
    waste(gate, unusable(at=3))
    with gate.admit(PRICE) as admission:
        sent(admission)
        admission.paid(PRICE, datetime(2026, 1, 2, tzinfo=UTC) + timedelta(seconds=2))
    waste(gate, unusable(at=0))  # its link was followed for a while
    waste(gate, unusable(at=4))
    assert gate.stopped is None
    waste(gate, unusable(at=5))
    assert gate.stopped is not None


def test_neither_a_single_job_nor_a_run_that_says_never_is_stopped_and_a_full_disk_does_not_count() -> None:
    for gate in (Gate(), Gate(stop_after_unusable=0)):
        for at in range(9):
            waste(gate, unusable(at=at))
        assert gate.stopped is None
    gate = Gate(stop_after_unusable=1)
    waste(gate, unusable(kind=OutboxError))
    assert (gate.stopped, gate.ledger.spent_usd) == (None, PRICE)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), BadGatewayError("…", possibly_billed=True)])
def test_an_admission_that_is_not_used_leaves_no_trace(clock, error):
    gate = Gate(max_concurrency=1, requests_per_minute=1, ledger=Ledger(PRICE))
    for _ in range(3):
        with ExitStack() as stack:
            if error:
                stack.enter_context(pytest.raises(type(error)))
            stack.enter_context(gate.admit(PRICE))
            assert gate.in_flight == 0
            if error:
                raise error
    assert money(gate) == (0, 0, 0)
    pay(gate)
    assert gate.ledger.spent_usd == PRICE


def test_a_request_is_sent_once():
    gate = Gate()
    with gate.admit(PRICE) as admission:
        sent(admission)
        sent(admission)
        assert gate.in_flight == 1
        admission.paid(PRICE)
    assert gate.in_flight == 0


# The budget.


def run(gate: Gate, outcome: Callable[[int], SegmindError | None], assets: int = 100) -> int:
    """Sends one request for each asset from sixteen threads; returns how many were let go."""
    numbers, lock = iter(range(assets)), threading.Lock()
    let_go = 0

    def work(_: int) -> None:
        nonlocal let_go
        with gate.admit(PRICE) as admission:
            with lock:
                let_go += 1
                error = outcome(next(numbers))
            sent(admission)
            if error:
                raise error
            admission.paid(PRICE)

    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(work, asset) for asset in range(assets)]
        wait(futures)
    refused = [each for each in futures if isinstance(each.exception(), NotStartedError)]
    assert len(refused) == assets - let_go
    return let_go


def test_a_budget_pays_for_as_many_pictures_as_it_has_room_for():
    gate = Gate(ledger=Ledger(Decimal("1.00")))
    assert run(gate, lambda number: None) == 20
    assert money(gate) == (Decimal("1.00"), 0, 0)
    assert isinstance(gate.stopped, BudgetReachedError)
    assert str(gate.stopped) == "the budget of 1.00 USD is reached: 1.00 USD spent, 0.00 USD possibly billed"


def test_what_may_have_been_billed_uses_the_budget_up():
    gate = Gate(ledger=Ledger(Decimal("1.00")))
    lost = GatewayTimeoutError("timed out", possibly_billed=True)
    assert run(gate, lambda number: lost if number % 4 == 0 else None) == 20
    assert money(gate) == (Decimal("0.75"), 0, Decimal("0.25"))
    assert str(gate.stopped).endswith("0.75 USD spent, 0.25 USD possibly billed")


def test_what_was_not_billed_is_spent_on_others():
    gate = Gate(ledger=Ledger(Decimal("1.00")))
    assert run(gate, lambda number: UnprocessableError("refused") if number < 7 else None) == 27
    assert money(gate) == (Decimal("1.00"), 0, 0)


def test_a_budget_that_may_yet_have_room_is_waited_for(start):
    gate = Gate(ledger=Ledger(PRICE))
    others = []

    def another_comes(_: Admission) -> None:
        others.append(start(pay, gate))
        waiting(gate, 1)
        assert gate.stopped is None

    with pytest.raises(UnprocessableError):
        send(gate, UnprocessableError("refused"), another_comes)
    others[0].result()
    assert money(gate) == (PRICE, 0, 0)


@pytest.mark.parametrize("unpaid", [UnprocessableError("refused"), GatewayTimeoutError("late", possibly_billed=True)])
def test_a_budget_with_a_list_price_below_the_real_one_is_not_overspent(start, unpaid):
    said: list[str] = []
    gate = Gate(ledger=Ledger(Decimal("0.48")), log=listening(said))
    sixteen: list[Any] = []

    def others_come(_: Admission) -> None:
        sixteen.extend(start(pay, gate, Decimal("0.10")) for _ in range(16))
        waiting(gate, 16)
        assert gate.in_flight == 1

    with pytest.raises(type(unpaid)):
        send(gate, unpaid, others_come)
    wait(sixteen)
    assert gate.ledger.spent_usd == Decimal("0.40")
    assert gate.ledger.spent_usd + gate.ledger.unknown_usd <= Decimal("0.48")
    assert len([line for line in said if "one by one" in line]) == 1


def test_without_a_budget_nothing_waits_for_the_first_cost(start):
    gate, together = Gate(max_concurrency=8), threading.Barrier(8)

    def work() -> None:
        with gate.admit(PRICE) as admission:
            sent(admission)
            together.wait(30)
            admission.paid(PRICE)

    for each in [start(work) for _ in range(8)]:
        each.result()


def test_a_price_that_rises_is_reserved_from_then_on():
    gate = Gate(ledger=Ledger(Decimal("0.20")))
    pay(gate, Decimal("0.15"))
    with pytest.raises(NotStartedError, match=r"not started: the budget of 0\.20 USD is reached: 0\.15 USD spent"):
        pay(gate)


Fate = Literal["made", "refused", "reused", "later", "limited", "parked"]
"""What becomes of an asset: a picture; an error that is not billed; nothing to pay; a picture after one request that is
not billed, or after three; a picture after waiting for another run."""
UNBILLED: dict[Fate, int] = {"later": 1, "limited": 3}


def produce(gate: Gate, fates: list[Fate], dice: random.Random) -> set[int]:
    """Works on assets as a run does, in threads that dawdle; returns those that a picture was paid for."""
    delays = [[dice.choice((0, 0, dice.uniform(0, 0.004))) for _ in range(8)] for _ in fates]
    made: set[int] = set()

    def request(asset: int, error: SegmindError | None = None) -> None:
        with gate.admit(PRICE, str(asset)) as admission:
            sent(admission)
            sleep(delays[asset].pop())
            if error:
                raise error
            admission.paid(PRICE)
            made.add(asset)

    def work(asset: int, fate: Fate) -> None:
        try:
            sleep(delays[asset].pop())
            if fate == "parked":
                with gate.parked(str(asset)):
                    sleep(delays[asset].pop())
            for _ in range(UNBILLED.get(fate, 0)):
                with suppress(UnreachableByChance):
                    request(asset, UnreachableByChance("no connection"))
                sleep(delays[asset].pop())
            if fate != "reused":
                request(asset, UnprocessableError("refused") if fate == "refused" else None)
        except (NotStartedError, UnprocessableError):
            pass
        finally:
            gate.leave(str(asset))

    with ThreadPoolExecutor(len(fates)) as pool:
        for asset, fate in enumerate(fates):
            if not gate.enter(str(asset)):
                break
            pool.submit(work, asset, fate)
    return made


class UnreachableByChance(ApiUnreachableError):
    """A request that was never sent, and is tried again."""


@settings(deadline=None, max_examples=40)
@given(
    fates=st.lists(st.sampled_from(get_args(Fate)), min_size=1, max_size=24).filter(lambda each: "parked" not in each),
    budget=st.integers(0, 12),
    concurrency=st.integers(1, 8),
    dice=st.randoms(use_true_random=True),
)
def test_a_budget_is_spent_on_the_first_assets_whatever_the_threads_do(fates, budget, concurrency, dice):
    gate = Gate(max_concurrency=concurrency, ledger=Ledger(budget * PRICE))
    wanted = [asset for asset, fate in enumerate(fates) if fate not in ("refused", "reused")]
    assert produce(gate, fates, dice) == set(wanted[:budget])
    assert gate.ledger.spent_usd == PRICE * min(budget, len(wanted))
    assert (gate._numbers, gate._may_pay, gate._entered) == ({}, set(), 0)


@settings(deadline=None, max_examples=20)
@given(
    fates=st.lists(st.sampled_from(get_args(Fate)), min_size=1, max_size=24),
    budget=st.integers(0, 12),
    dice=st.randoms(use_true_random=True),
)
def test_an_asset_that_waits_for_another_run_keeps_nobody_from_the_budget(fates, budget, dice):
    gate = Gate(max_concurrency=4, ledger=Ledger(budget * PRICE))
    made = produce(gate, fates, dice)
    wanted = [fate for fate in fates if fate not in ("refused", "reused")]
    assert len(made) == min(budget, len(wanted)), "nothing of it is left while there is something to make"


def test_a_budget_that_has_room_is_spent_at_once_by_all_that_it_has_room_for(start):
    gate = Gate(max_concurrency=8, ledger=Ledger(4 * PRICE))
    pay(gate)  # its cost is known from here on
    together = threading.Barrier(4)

    def work(asset: str) -> None:
        with gate.admit(PRICE, asset) as admission:
            sent(admission)
            together.wait(30)
            admission.paid(PRICE)

    assets = ["0", "1", "2", "3"]
    assert all(gate.enter(each) for each in assets)
    futures = [start(work, each) for each in reversed(assets)]
    together.wait(30)
    for each in futures[1:]:
        each.result()
    assert isinstance(futures[0].exception(), NotStartedError)


def test_without_a_budget_an_asset_waits_for_no_other(start):
    gate = Gate(max_concurrency=2)
    assert gate.enter("slow")
    assert gate.enter("fast")
    with gate.admit(PRICE, "fast") as admission:
        sent(admission)
        admission.paid(PRICE)
    assert gate.ledger.spent_usd == PRICE


def test_an_asset_that_waits_for_the_claim_of_a_later_one_does_not_keep_it_waiting(start):
    gate = Gate(ledger=Ledger(PRICE))
    assert gate.enter("first")
    assert gate.enter("second")
    later = start(lambda: gate.admit(PRICE, "second").__enter__())
    waiting(gate, 1)
    with gate.parked("first"):
        later.result(timeout=30)


# How many at once.


def test_there_are_never_more_at_once_than_allowed_and_the_first_comes_first(start):
    gate, lock, most, now = Gate(max_concurrency=3), threading.Lock(), 0, 0
    order: list[int] = []
    full = threading.Barrier(3, timeout=60)

    def work(number: int) -> None:
        nonlocal most, now
        with gate.admit(PRICE) as admission:
            with lock:
                order.append(number)
                now += 1
                most = max(most, now)
            sent(admission)
            full.wait()
            with lock:
                now -= 1
            admission.paid(PRICE)

    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(gate.admit(PRICE))
        futures = []
        for number in range(30):
            futures.append(start(work, number))
            waiting(gate, number + 1)
    for future in futures:
        future.result()
    assert most == 3
    assert [number // 3 for number in order] == [number // 3 for number in range(30)]


def test_a_thread_that_is_interrupted_while_it_waits_lets_the_next_one_go(start, monkeypatch):
    gate = Gate(max_concurrency=1)
    with gate.admit(PRICE):
        first = start(pay, gate)
        waiting(gate, 1)
        second = start(pay, gate)
        waiting(gate, 2)
        times = iter((KeyboardInterrupt(),))

        def interrupted_once() -> float:
            for error in times:
                raise error
            return 0.0

        monkeypatch.setattr(module, "monotonic", interrupted_once)
    assert isinstance(first.exception(), KeyboardInterrupt)
    second.result()
    assert gate.ledger.spent_usd == PRICE


# The pace.


def test_a_known_limit_is_kept(clock, start):
    gate = Gate(requests_per_minute=2)
    pay(gate)
    pay(gate)
    third = start(pay, gate)
    waiting(gate, 1)
    clock.now += 59.9
    gate.stop(STOP)
    assert isinstance(third.exception(), NotStartedError)
    assert gate.ledger.spent_usd == 2 * PRICE


def test_a_place_at_the_pace_comes_free_by_time(clock, start):
    gate = Gate(requests_per_minute=1)
    pay(gate)
    clock.now += 59.99
    second = start(pay, gate)
    waiting(gate, 1)
    clock.now += 0.02
    second.result()
    assert gate.ledger.spent_usd == 2 * PRICE


def test_one_429_holds_all_and_then_one_goes_ahead(clock, start):
    said: list[str] = []
    gate = Gate(max_concurrency=8, log=listening(said))
    admitted: list[Admission] = []
    ahead, answer = threading.Event(), threading.Event()

    def work() -> None:
        with gate.admit(PRICE) as admission:
            sent(admission)
            admitted.append(admission)
            ahead.set()
            answer.wait()
            admission.paid(PRICE)

    with pytest.raises(RateLimitError):  # two of one burst: one hold, said once
        send(gate, too_many(0.1), lambda _: fail(gate, too_many(0.2)))
    futures = [start(work) for _ in range(5)]
    waiting(gate, 5)
    assert admitted == []
    clock.now += 0.25  # the hold is over: a waiting thread finds out by itself
    ahead.wait()
    waiting(gate, 4)
    assert len(admitted) == 1
    answer.set()
    clock.now += 100
    for future in futures:
        future.result()
    assert len(admitted) == 5
    assert said == ["the provider limits the rate: all workers wait 1 s, then one goes ahead; no retry is spent on it"]
    assert gate.stopped is None


def test_a_limit_that_lasts_too_long_stops_the_run():
    said: list[str] = []
    gate = Gate(longest_wait_seconds=120.0, log=listening(said))
    error = too_many(3600.0)
    fail(gate, error)
    assert gate.stopped is error
    assert said == []
    with pytest.raises(NotStartedError, match="not started: too many") as caught:
        pay(gate)
    assert caught.value.__cause__ is error


def test_an_overloaded_provider_that_names_a_time_holds_all_and_is_told_once(clock, start):
    said: list[str] = []
    gate = Gate(log=listening(said))
    overloaded = OverloadedError("busy", status=529, retry_after=7.0)
    with pytest.raises(OverloadedError):
        send(gate, overloaded, lambda _: fail(gate, overloaded))
    waits = start(pay, gate)
    waiting(gate, 1)
    assert money(gate) == (0, 0, 0)
    clock.now += 6.9
    another = start(pay, gate)
    waiting(gate, 2)
    gate.stop(STOP)
    assert all(isinstance(each.exception(), NotStartedError) for each in (waits, another))
    assert said == ["the provider is overloaded: all workers wait 7 s, then one goes ahead; no retry is spent on it"]


@pytest.mark.parametrize("asked", [None, 0.0])
def test_an_overloaded_provider_that_names_no_time_holds_nobody(clock, asked):
    said: list[str] = []
    gate = Gate(log=listening(said))
    for _ in range(20):
        fail(gate, OverloadedError("busy", status=503, retry_after=asked))
        pay(gate)
    assert said == []
    assert money(gate) == (20 * PRICE, 0, 0)


def test_an_overload_that_lasts_too_long_stops_the_run():
    gate, error = Gate(longest_wait_seconds=120.0), OverloadedError("busy", status=503, retry_after=121.0)
    fail(gate, error)
    assert gate.stopped is error


# Stopping.


@pytest.mark.parametrize("error", [InvalidKeyError("wrong key"), InsufficientCreditsError("no credits")])
def test_an_account_that_is_refused_stops_the_run(error):
    gate = Gate()
    fail(gate, error)
    assert gate.stopped is error
    assert not gate.enter()


def test_the_first_reason_to_stop_wins():
    gate = Gate()
    gate.stop(STOP)
    gate.stop(SegmindError("later"))
    fail_later = InvalidKeyError("wrong key")
    gate.stop(fail_later)
    assert gate.stopped is STOP


def test_a_stop_wakes_all_that_wait_and_leaves_alone_what_is_under_way(start):
    gate = Gate(max_concurrency=1, look_ahead=0)
    assert gate.enter()
    dispatcher = start(gate.enter)
    with gate.admit(PRICE) as admission:
        sent(admission)
        waiters = [start(pay, gate) for _ in range(20)]
        waiters.append(start(gate.pause, 3600.0))
        waiting(gate, 20)
        gate.stop(STOP)
        for waiter in waiters:
            assert isinstance(waiter.exception(), NotStartedError)
            assert str(waiter.exception()) == "not started: the run was cancelled"
            assert waiter.exception().__cause__ is STOP
        assert dispatcher.result() is False
        assert gate.in_flight == 1
        admission.paid(PRICE)
    assert money(gate) == (PRICE, 0, 0)
    assert gate.in_flight == 0


def test_a_pause_ends_by_itself():
    began = monotonic()
    Gate().pause(0.001)
    assert monotonic() - began >= 0.001


@pytest.mark.parametrize(("look_ahead", "window"), [(None, 4), (0, 2), (5, 7)])
def test_only_so_many_assets_are_under_way(start, look_ahead, window):
    gate = Gate(max_concurrency=2, look_ahead=look_ahead)
    assert all(gate.enter() for _ in range(window))
    one_more = start(gate.enter)
    assert gate._entered == window
    gate.leave()
    assert one_more.result() is True
    assert gate._entered == window


def test_an_asset_that_waits_for_another_run_gives_its_place_and_takes_it_back_at_once():
    gate = Gate(max_concurrency=1, look_ahead=0)
    assert gate.enter()
    with gate.parked():
        assert gate.enter()
    assert gate._entered == 2
    gate.leave()
    gate.leave()
    assert gate._entered == 0


def test_a_parked_asset_that_fails_takes_its_place_back_too():
    gate = Gate()
    gate.enter()
    gate.stop(STOP)
    with pytest.raises(NotStartedError), gate.parked():
        gate.pause(3600.0)
    assert (gate._entered, gate._parked) == (1, 0)


def test_not_too_many_assets_are_parked():
    gate = Gate(max_concurrency=PARKED + 10, look_ahead=0)
    with ExitStack() as stack:
        for _ in range(PARKED + 3):
            assert gate.enter()
            stack.enter_context(gate.parked())
        assert gate._entered == 3
    assert gate._entered == PARKED + 3
    assert gate._parked == 0


# Budgets and rates that are shared with other runs.


class Book:
    """Accounts in memory, which can be out of reach."""

    def __init__(self) -> None:
        self.account = Account(name="summer")
        self.failures = 0

    def change(self, name: str, change: Callable[[Account, float], Account]) -> Account:
        if self.failures:
            self.failures -= 1
            raise StoreUnreachableError("the archive does not answer")
        self.account = change(self.account, 0.0)
        return self.account

    def change_permits(self, change: Callable[[Permits, float], Permits]) -> None:
        change(Permits(), 0.0)

    def paid_from(self, share: Share) -> Decimal:
        return NOTHING


def sharing(book: Book, limit: str = "0.10", **terms: Any) -> Gate:
    return Gate(purse=Purse(book, [Budget("campaign", Decimal(limit), "budget_name", "summer")], pictures=5), **terms)


def test_a_shared_budget_stops_a_run_as_its_own_does_and_is_named(start):
    gate = sharing(Book())
    wait([start(pay, gate) for _ in range(5)])
    assert money(gate) == (Decimal("0.10"), 0, 0)
    assert isinstance(gate.stopped, BudgetReachedError)
    assert "the budget summer of 0.10 USD (budget_name, account summer) is reached: 0.10 USD" in str(gate.stopped)


def test_money_of_a_shared_budget_is_put_back_where_nothing_was_sent_or_billed():
    book = Book()
    gate = sharing(book)
    with gate.admit(PRICE) as admission:
        admission.confirm()
        assert admission.shares == (book.account.shares[0].id,)
    fail(gate, UnprocessableError("refused"))
    pay(gate)
    fail(gate, BadGatewayError("no answer", possibly_billed=True))
    assert gate.purse is not None
    gate.purse.close()
    assert (book.account.spent_usd, book.account.shares) == (Decimal("0.10"), ())


def test_an_account_out_of_reach_fails_the_request_that_waits_for_money_and_not_the_run():
    book = Book()
    book.failures = 1
    gate = sharing(book)
    with pytest.raises(StoreUnreachableError, match="a shared budget could not be drawn from, and nothing was sent"):
        pay(gate)
    assert gate.stopped is None
    pay(gate)
    assert money(gate) == (PRICE, 0, 0)


def test_a_run_that_is_cancelled_waits_for_no_shared_money(start):
    book = Book()
    other = Purse(book, [Budget("campaign", PRICE, "budget_name", "summer")])
    while other.take(PRICE) is Fit.LATER:
        sleep(0.01)
    gate = sharing(book, "0.05")
    waits = start(pay, gate)
    waiting(gate, 1)
    gate.stop(STOP)
    with pytest.raises(NotStartedError):
        waits.result(30)


def test_without_a_shared_budget_nothing_has_to_be_confirmed():
    with Gate().admit(PRICE) as admission:
        admission.confirm()
        assert admission.shares == ()
