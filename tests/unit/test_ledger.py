"""Money is reserved before it is spent: the limit holds, whatever the answers say and in whatever order they come."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import reduce
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_segmind.archive.record import FlowRuns, Holder, Record, Run, past_requests
from prefect_segmind.limits.ledger import Fit, Ledger, PastRequest, Reporters, RequestId, Totals

PRICE = Decimal("0.05")
PRICES = st.decimals(0, 1, places=4)


NUMBERS = count()


def request(run: str = "a run") -> RequestId:
    return RequestId(run, datetime(2026, 11, 26, tzinfo=UTC) + timedelta(seconds=next(NUMBERS)))


def settle(ledger: Ledger, price: Decimal, paid: Decimal = Decimal(0), unknown: Decimal = Decimal(0)) -> None:
    """Ends a reservation with a request of its own."""
    ledger.settle(price, "a picture", request(), Totals(1, paid, unknown))


def total(ledger: Ledger) -> Decimal:
    return ledger.spent_usd + ledger.in_flight_usd + ledger.unknown_usd


def test_without_a_limit_everything_fits_and_is_counted_all_the_same():
    ledger = Ledger()
    for _ in range(3):
        assert ledger.fit(PRICE) is Fit.NOW
        ledger.reserve(PRICE)
    settle(ledger, PRICE, paid=PRICE)
    settle(ledger, PRICE, unknown=PRICE)
    assert (ledger.spent_usd, ledger.in_flight_usd, ledger.unknown_usd) == (PRICE, PRICE, PRICE)


def test_a_budget_is_used_to_the_last_cent():
    ledger = Ledger(Decimal("0.10"))
    for _ in range(2):
        ledger.reserve(PRICE)
        settle(ledger, PRICE, paid=PRICE)
    assert ledger.spent_usd == ledger.limit_usd
    assert ledger.fit(PRICE) is Fit.NEVER


def test_what_is_in_flight_may_yet_come_back():
    ledger = Ledger(PRICE)
    ledger.reserve(PRICE)
    assert ledger.fit(PRICE) is Fit.LATER
    ledger.release(PRICE)
    assert ledger.fit(PRICE) is Fit.NOW


def test_what_may_have_been_billed_never_comes_back():
    ledger = Ledger(PRICE)
    ledger.reserve(PRICE)
    settle(ledger, PRICE, unknown=PRICE)
    assert ledger.unknown_usd == PRICE
    assert ledger.fit(PRICE) is Fit.NEVER


def test_no_budget_has_room_for_nothing():
    assert Ledger(Decimal(0)).fit(PRICE) is Fit.NEVER


def test_a_rise_of_the_price_is_noticed_and_a_fall_is_not_relied_on():
    ledger = Ledger(Decimal("1.00"))
    assert ledger.price_of(PRICE) == PRICE
    for paid, price in (("0.04", "0.05"), ("0.08", "0.08"), ("0.05", "0.08")):
        ledger.reserve(ledger.price_of(PRICE))
        settle(ledger, ledger.price_of(PRICE), paid=Decimal(paid))
        assert ledger.price_of(PRICE) == Decimal(price)


def test_a_reservation_without_room_is_refused():
    ledger = Ledger(PRICE)
    ledger.reserve(PRICE)
    with pytest.raises(ValueError, match=r"no room for 0\.05 USD"):
        ledger.reserve(PRICE)
    assert total(ledger) == PRICE


def test_what_was_never_reserved_cannot_come_back():
    ledger = Ledger(PRICE)
    with pytest.raises(ValueError, match="not in flight"):
        ledger.release(PRICE)
    assert total(ledger) == 0


@settings(deadline=None)
@given(limit=st.decimals(0, 3, places=4), data=st.data())
def test_the_limit_holds_in_any_order_of_events_and_never_is_final(limit, data):
    ledger, refused_for_ever = Ledger(limit), None
    reserved: list[Decimal] = []
    for price in data.draw(st.lists(PRICES, max_size=40)):
        fit = ledger.fit(price)
        if refused_for_ever is not None and price >= refused_for_ever:
            assert fit is Fit.NEVER
        if fit is Fit.NEVER:
            refused_for_ever = price if refused_for_ever is None else min(price, refused_for_ever)
        elif fit is not Fit.NOW:
            assert reserved
        else:
            ledger.reserve(price)
            reserved.append(price)
        assert total(ledger) <= limit
        for _ in range(data.draw(st.integers(0, len(reserved)))):
            ended = reserved.pop(data.draw(st.integers(0, len(reserved) - 1)))
            how = data.draw(st.sampled_from(["settle", "release", "lose"]))
            if how == "settle":
                settle(ledger, ended, paid=data.draw(st.decimals(0, ended, places=4)))
            else:
                ledger.release(ended) if how == "release" else settle(ledger, ended, unknown=ended)
            assert total(ledger) <= limit
        assert ledger.in_flight_usd == sum(reserved)


def test_under_a_limit_requests_go_one_by_one_until_an_answer_names_a_cost():
    ledger = Ledger(Decimal("1.00"))
    for unpaid in (Totals(1), Totals(1, possibly_billed_usd=PRICE)):
        ledger.reserve(PRICE)
        assert ledger.fit(PRICE) is Fit.ALONE
        ledger.settle(PRICE, "a picture", request(), unpaid)
        assert ledger.fit(PRICE) is Fit.NOW, "its end lets the next one go, which may tell more"
    ledger.reserve(PRICE)
    settle(ledger, PRICE, paid=Decimal("0.08"))
    ledger.reserve(ledger.price_of(PRICE))
    assert ledger.fit(ledger.price_of(PRICE)) is Fit.NOW


def test_a_cost_that_an_earlier_try_has_seen_need_not_be_found_out_again():
    ledger, paid = Ledger(Decimal("1.00")), Totals(1, cost_usd=Decimal("0.08"))
    ledger.carry("a picture", [PastRequest(request(), paid, paid)], "a run")
    ledger.reserve(ledger.price_of(PRICE))
    assert ledger.fit(ledger.price_of(PRICE)) is Fit.NOW
    assert ledger.price_of(PRICE) == Decimal("0.08")


def spend(ledger: Ledger, costs: Iterable[Decimal | None], concurrency: int, data: st.DataObject) -> Decimal:
    """Sends as much as the ledger lets go; of each request the cost is given, or that its outcome stays unknown.

    Returns:
        What those in flight at the last admission cost more than was reserved for them.
    """
    in_flight: list[tuple[Decimal, Decimal | None]] = []
    rise = Decimal(0)

    def end() -> None:
        reserved, cost = in_flight.pop(data.draw(st.integers(0, len(in_flight) - 1)))
        if cost is None:
            settle(ledger, reserved, unknown=reserved)
        else:
            settle(ledger, reserved, paid=cost)

    for cost in costs:
        while in_flight and (len(in_flight) >= concurrency or ledger.fit(ledger.price_of(PRICE)) is not Fit.NOW):
            end()
        price = ledger.price_of(PRICE)
        if ledger.fit(price) is not Fit.NOW:
            break
        ledger.reserve(price)
        in_flight.append((price, cost))
        rise = sum((max(Decimal(0), (each or Decimal(0)) - reserved) for reserved, each in in_flight), Decimal(0))
    while in_flight:
        end()
    return rise


OUTCOMES = st.none() | st.decimals(0, "0.2", places=4)


@settings(deadline=None)
@given(
    limit=st.decimals(0, 2, places=4),
    costs=st.lists(OUTCOMES, max_size=40),
    concurrency=st.integers(1, 16),
    data=st.data(),
)
def test_a_limit_is_exceeded_by_no_more_than_the_rise_of_what_was_in_flight_at_the_last_admission(
    limit, costs, concurrency, data
):
    ledger = Ledger(limit)
    rise = spend(ledger, costs, concurrency, data)
    assert ledger.spent_usd + ledger.unknown_usd <= limit + rise


@settings(deadline=None)
@given(
    limit=st.decimals(0, 2, places=4),
    cost=st.decimals("0.0501", "0.5", places=4),
    unknown=st.lists(st.booleans(), min_size=60, max_size=60),
    concurrency=st.integers(1, 16),
    data=st.data(),
)
def test_a_list_price_below_the_real_one_costs_the_difference_once(limit, cost, unknown, concurrency, data):
    ledger = Ledger(limit)
    spend(ledger, (None if each else cost for each in unknown), concurrency, data)
    assert ledger.spent_usd + ledger.unknown_usd <= max(limit, limit + cost - PRICE)
    assert ledger.totals.requests_sent == 60 or ledger.fit(ledger.price_of(PRICE)) is Fit.NEVER


# What is reported, and by whom.


def carried(*runs: str, unknown: str = "0.05") -> list[PastRequest]:
    sent = Totals(1, possibly_billed_usd=Decimal(unknown))
    return [PastRequest(request(run), sent, sent) for run in runs]


def test_a_record_that_is_read_again_counts_once():
    ledger, past = Ledger(), carried("an earlier try")
    for run in ("first", "first", "second"):
        ledger.carry("a picture", past, run)
    assert ledger.totals == Totals(1, possibly_billed_usd=PRICE)
    assert (ledger.account("a picture", "first"), ledger.account("a picture", "second")) == (ledger.totals, Totals())


def test_a_record_that_knows_more_by_now_corrects_what_it_said():
    ledger, (past,) = Ledger(), carried("an earlier try")
    ledger.carry("a picture", [past], "a run")
    paid = Totals(1, cost_usd=PRICE)
    ledger.carry("a picture", [past._replace(totals=paid, charged=paid)], "a run")
    assert ledger.totals == ledger.account("a picture", "a run") == Totals(1, cost_usd=PRICE)


def test_what_a_run_knows_of_its_own_request_is_not_corrected_by_a_record_that_was_not_written():
    ledger, mine = Ledger(), request()
    ledger.reserve(PRICE)
    ledger.settle(PRICE, "a picture", mine, Totals(1, cost_usd=PRICE))
    ledger.carry("a picture", [PastRequest(mine, *[Totals(1, possibly_billed_usd=PRICE)] * 2)], "a run")
    assert ledger.totals == Totals(1, cost_usd=PRICE)


def test_what_a_dead_run_may_have_been_billed_is_reported_and_leaves_the_budget_whole():
    ledger = Ledger(PRICE)
    ledger.carry("a picture", [each._replace(charged=Totals()) for each in carried("a dead run")], "a run")
    assert ledger.fit(PRICE) is Fit.NOW
    assert ledger.account("a picture", "a run").possibly_billed_usd == PRICE


def test_another_try_reports_what_the_earlier_ones_have_sent_and_the_budget_stays_spent():
    ledger, past, paid = Ledger(PRICE), request("task run 1"), Totals(1, cost_usd=PRICE)
    ledger.reserve(PRICE)
    ledger.settle(PRICE, "a picture", past, paid)
    ledger.begin_try()
    ledger.carry("a picture", [PastRequest(past, paid, paid)], "task run 2")
    assert (ledger.account("a picture", "task run 1"), ledger.fit(PRICE)) == (Totals(), Fit.NEVER)
    assert ledger.account("a picture", "task run 2") == ledger.totals == Totals(1, cost_usd=PRICE)


def test_what_no_task_has_taken_up_is_reported_by_the_run_itself_and_once():
    ledger, past = Ledger(), carried("an earlier try")
    ledger.carry("a picture", past, "")
    assert ledger.totals == Totals(1, possibly_billed_usd=PRICE)
    ledger.carry("a picture", past, "a task run")
    assert ledger.account("a picture", "a task run") == ledger.totals == Totals(1, possibly_billed_usd=PRICE)


def test_what_another_try_never_asks_for_is_reported_too():
    ledger, past, paid = Ledger(), request("task run 1"), Totals(1, cost_usd=PRICE)
    ledger.reserve(PRICE)
    ledger.settle(PRICE, "a picture", past, paid)
    reporters: Reporters = {}
    ledger.begin_try(reporters)
    assert ledger.totals == paid
    another = Ledger(reporters=reporters)
    another.carry("a picture", [PastRequest(past, paid, paid)], "task run 2")
    ledger.carry("a picture", [PastRequest(past, paid, paid)], "")
    assert (another.totals, ledger.totals, ledger.spent_usd) == (paid, Totals(), PRICE)


def test_what_is_in_flight_may_be_billed_and_what_is_only_reserved_may_not():
    ledger, mine = Ledger(PRICE), request()
    ledger.reserve(PRICE)
    assert ledger.totals == Totals()
    ledger.send(PRICE, "a picture", mine)
    assert ledger.totals == ledger.account("a picture", mine.run) == Totals(1, possibly_billed_usd=PRICE)
    assert (ledger.unknown_usd, ledger.in_flight_usd) == (0, PRICE), "it may yet come back"
    ledger.settle(PRICE, "a picture", mine, Totals(1))
    assert ledger.totals == Totals(1)
    assert ledger.fit(PRICE) is Fit.NOW


def test_a_request_that_was_never_sent_counts_nothing_though_the_record_tells_of_it():
    ledger, mine = Ledger(PRICE), request("a task run")
    maybe = Totals(1, possibly_billed_usd=PRICE)
    ledger.carry("a picture", [PastRequest(mine, maybe, maybe)], "a task run")
    assert ledger.totals == maybe
    ledger.not_sent("a picture", mine)
    assert ledger.totals == ledger.account("a picture", "a task run") == Totals()
    assert ledger.unknown_usd == 0


def test_what_was_never_reserved_cannot_be_settled():
    ledger = Ledger()
    ledger.reserve(PRICE)
    with pytest.raises(ValueError, match=r"^0\.06 USD are not in flight$"):
        ledger.settle(Decimal("0.06"), "a picture", request(), Totals(1))
    assert (ledger.in_flight_usd, ledger.totals) == (PRICE, Totals())


# Ledger and records together: a flow that calls two others is retried, in the same process or in another.


class Calls:
    """A retried flow that calls two batches in each try, against records as they would lie in an archive."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.sent: list[Totals] = []
        self.tasks = count()

    def batch(self, ledger: Ledger, flow_runs: FlowRuns, outcomes: dict[str, list[str]]) -> list[Totals]:
        """What its tasks report: one for each picture, with what becomes of its requests, one after the other."""
        carry(ledger, ledger.pictures | outcomes.keys(), self.records, Run("", flow_runs), only_earlier=True)
        accounts = []
        for picture, ends in outcomes.items():
            run = Run(f"task {next(self.tasks)}", flow_runs)
            carry(ledger, {picture}, self.records, run)
            for end in ends:
                if self.is_paid(picture):
                    break
                self.request(ledger, picture, run, end)
            if picture in self.records:
                self.records[picture] = self.records[picture].given_up()
            carry(ledger, {picture}, self.records, run)
            accounts.append(ledger.account(picture, run.id))
        return accounts

    def is_paid(self, picture: str) -> bool:
        return picture in self.records and any(each.cost_usd for each in self.records[picture].attempts)

    def request(self, ledger: Ledger, picture: str, run: Run, end: str) -> None:
        before = self.records.get(picture, Record(fingerprint=picture))
        claimed = before.claimed_by(Holder(run=run.id, host="h", pid=1, started="", flow_runs=run.flow_runs), now())
        paid, lost = PRICE * (end == "paid"), PRICE * (end == "lost")
        self.sent.append(Totals(1, paid, lost))
        ledger.reserve(PRICE)
        ledger.settle(PRICE, picture, claimed.attempts[-1].request, self.sent[-1])
        self.records[picture] = claimed.with_outcome(
            status=200 if paid else 502,
            reason=None if paid else end,
            wait_seconds=1.0,
            possibly_billed=bool(lost),
            cost_usd=paid or None,
        )


def now() -> datetime:
    return request().sent_at


def carry(
    ledger: Ledger, pictures: Iterable[str], records: dict[str, Record], run: Run, *, only_earlier: bool = False
) -> None:
    for picture in pictures:
        attempts = records[picture].attempts if picture in records else ()
        if not only_earlier or any(run.follows(each.flow_runs) for each in attempts):
            ledger.carry(picture, past_requests(run, attempts, PRICE), run.id)


ENDS = st.lists(st.sampled_from(["paid", "lost", "refused"]), max_size=3)
BATCHES = st.fixed_dictionaries({"p": ENDS, "q": ENDS})


@given(st.lists(st.tuples(st.booleans(), BATCHES, BATCHES), min_size=1, max_size=4))
def test_in_the_last_try_the_flows_inside_report_each_request_of_all_tries_once(tries):
    flow, ledgers = Calls(), [Ledger(), Ledger()]
    for number, (in_another_process, *batches) in enumerate(tries, start=1):
        reporters: list[Reporters] = [{}] * 2 if number > 1 else [{}, {}]
        if in_another_process:
            ledgers = [Ledger(reporters=each) for each in reporters]
        accounts = []
        for call, outcomes in enumerate(batches):
            if not in_another_process and number > 1:
                ledgers[call].begin_try(reporters[call])
            flow_runs = (("outer", number), (f"inner {call} {number}", 1))
            accounts.append(flow.batch(ledgers[call], flow_runs, outcomes))
    everything = reduce(Totals.plus, flow.sent, Totals())
    assert reduce(Totals.plus, [each.totals for each in ledgers]) == everything
    assert reduce(Totals.plus, [each for batch in accounts for each in batch]) == everything


def test_a_request_is_reported_by_one_task_run_and_by_none_where_it_is_unknown() -> None:
    ledger, (past,) = Ledger(), carried("an earlier try")
    ledger.carry("a picture", [past], "first")
    ledger.carry("a picture", [past], "second")
    assert [ledger.reports("a picture", past.request, run) for run in ("first", "second")] == [True, False]
    assert not ledger.reports("another picture", past.request, "first")
