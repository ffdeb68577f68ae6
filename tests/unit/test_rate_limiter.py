"""A known limit is kept, an unknown one is found out with few refusals, and nobody waits for ever."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_segmind.limits.rate_limiter import Pace


def send(pace: Pace, now: float) -> int:
    assert pace.delay(now) == 0.0
    ticket = pace.reserve(now)
    pace.sent(ticket, now)
    return ticket


def as_many_as_may(pace: Pace, now: float, most: int = 1000) -> list[int]:
    tickets: list[int] = []
    while len(tickets) < most and pace.delay(now) == 0.0:
        tickets.append(send(pace, now))
    return tickets


def learned(count: int, reset: float) -> Pace:
    """A pace that has seen so many accepted at 0.0 and one more refused, and whose probe after the reset has passed."""
    pace = Pace()
    tickets = [send(pace, 0.0) for _ in range(count + 1)]
    for ticket in tickets[:-1]:
        pace.answered(ticket)
    pace.limited(tickets[-1], 0.0, reset)
    pace.answered(send(pace, reset))
    return pace


def test_without_a_limit_nobody_waits():
    assert len(as_many_as_may(Pace(), 0.0)) == 1000


def test_a_configured_limit_counts_from_when_a_request_is_sent_refused_ones_too():
    pace = Pace(2)
    first, second = pace.reserve(0.0), pace.reserve(0.0)
    assert pace.delay(30.0) == 60.0  # both may be sent this very moment
    pace.sent(first, 30.0)
    pace.sent(second, 50.0)
    assert pace.delay(60.0) == 30.0
    pace.limited(first, 60.0, None)
    assert pace.delay(61.0) == 29.0
    assert pace.delay(90.0) == 0.0


def test_what_is_not_sent_leaves_no_trace():
    pace = Pace(1)
    pace.release(pace.reserve(0.0))
    assert pace.delay(0.0) == 0.0


def test_after_a_429_all_wait_until_the_reset_the_latest_of_a_burst():
    pace = Pace()
    a, b, c = (send(pace, 0.0) for _ in range(3))
    assert pace.limited(a, 1.0, 10.0) == 10.0
    assert pace.limited(b, 2.0, 20.0) == 20.0
    assert pace.limited(c, 3.0, 5.0) == 19.0
    assert pace.delay(3.0) == 19.0
    assert pace.delay(21.5) == 0.5
    assert pace.delay(22.0) == 0.0


@pytest.mark.parametrize("untold", [None, 0.0])
def test_without_a_reset_the_wait_doubles_up_to_a_minute_and_begins_anew_when_one_is_accepted(untold):
    pace, now, holds = Pace(), 0.0, []
    for _ in range(9):
        holds.append(pace.limited(send(pace, now), now, untold))
        now += holds[-1]
    assert holds == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    pace.answered(send(pace, now))
    assert pace.limited(send(pace, now), now, untold) == 1.0


def test_refusals_of_one_burst_do_not_double_the_wait():
    pace = Pace()
    burst = [send(pace, 0.0) for _ in range(16)]
    assert [pace.limited(ticket, 0.5, None) for ticket in burst] == [1.0] * 16
    late = Pace()
    burst = [send(late, 0.0) for _ in range(3)]
    assert late.limited(burst[0], 0.0, None) == 1.0
    assert late.limited(burst[1], 5.0, None) == 0.0  # sent before the hold, refused long after
    assert late.limited(send(late, 5.0), 5.0, None) == 2.0


def test_a_late_refusal_that_tells_a_reset_holds_all_again():
    pace = Pace()
    slow, quick = send(pace, 0.0), send(pace, 0.0)
    pace.limited(quick, 0.0, 1.0)
    pace.answered(send(pace, 1.0))
    assert pace.delay(2.0) == 0.0
    assert pace.limited(slow, 2.0, 7.0) == 7.0
    assert pace.delay(2.0) == 7.0
    assert len(as_many_as_may(pace, 9.0)) == 1


def test_a_late_refusal_does_not_count_what_was_accepted_anew():
    pace = Pace()
    slow, quick = send(pace, 0.0), send(pace, 0.0)
    pace.limited(quick, 0.0, 1.0)
    pace.answered(send(pace, 1.0))
    assert pace.limited(slow, 2.0, None) == 0.0
    assert pace.delay(2.0) == 0.0


def test_after_the_wait_one_goes_ahead_and_the_others_follow_its_answer():
    pace = Pace()
    pace.limited(send(pace, 0.0), 0.0, 10.0)
    probe = send(pace, 10.0)
    assert pace.delay(10.5) == 1.5
    pace.answered(probe)
    assert pace.delay(10.5) == 0.0


def test_a_probe_that_is_not_refused_for_two_seconds_is_not_waited_for():
    pace = Pace()
    pace.limited(send(pace, 0.0), 0.0, 10.0)
    probe = pace.reserve(10.0)
    assert pace.delay(15.0) == 2.0  # it is not even sent
    pace.sent(probe, 15.0)
    assert pace.delay(16.0) == 1.0
    assert pace.delay(17.0) == 0.0


def test_a_probe_that_is_not_sent_makes_room_for_another():
    pace = Pace()
    pace.limited(send(pace, 0.0), 0.0, 10.0)
    pace.release(pace.reserve(10.0))
    assert len(as_many_as_may(pace, 10.0)) == 1


def test_a_refused_probe_holds_all_again():
    pace = Pace()
    pace.limited(send(pace, 0.0), 0.0, 10.0)
    assert pace.limited(send(pace, 10.0), 10.1, 30.0) == 30.0
    assert pace.delay(20.1) == pytest.approx(20.0)


def test_the_answer_to_an_older_request_is_not_taken_for_the_probe_s():
    pace = Pace()
    old, *_, refused = (send(pace, 0.0) for _ in range(5))
    pace.limited(refused, 0.0, 10.0)
    send(pace, 10.0)
    pace.answered(old)
    assert pace.delay(10.5) == 1.5


def test_the_rate_that_was_seen_is_kept():
    pace = learned(20, reset=30.0)
    assert len(as_many_as_may(pace, 30.0)) == 19  # and the probe
    assert pace.delay(30.0) == 30.0
    assert pace.delay(50.0) == 10.0


def test_what_is_refused_later_in_the_burst_was_not_accepted():
    pace = Pace()
    burst = [send(pace, 0.0) for _ in range(36)]
    for ticket in burst[20:]:
        pace.limited(ticket, 0.1, 59.9)
    pace.answered(send(pace, 60.0))
    assert len(as_many_as_may(pace, 60.0)) == 19


def test_a_limit_learned_too_low_recovers():
    pace = learned(4, reset=10.0)
    assert [len(as_many_as_may(pace, 10.0 * n)) for n in range(1, 6)] == [3, 5, 6, 7, 8]
    fast = learned(100, reset=10.0)
    as_many_as_may(fast, 10.0)
    assert len(as_many_as_may(fast, 20.0)) == 110


def test_where_others_have_used_the_limit_up_nothing_is_learned_from_it():
    pace = Pace()
    for ticket in [send(pace, 0.0) for _ in range(16)]:
        pace.limited(ticket, 0.1, 30.0)
    pace.answered(send(pace, 30.1))
    assert len(as_many_as_may(pace, 30.1)) == 1000


def test_a_refused_probe_does_not_shrink_what_was_seen():
    pace, now = Pace(), 0.0
    tickets = [send(pace, 0.0) for _ in range(21)]
    hold = pace.limited(tickets[-1], 0.0, None)
    for _ in range(5):
        now += hold
        hold = pace.limited(send(pace, now), now, None)
    now += hold
    assert now == 63.0
    pace.answered(send(pace, now))
    assert len(as_many_as_may(pace, now)) == 19
    assert pace.delay(now) == 60.0


def test_an_overloaded_provider_is_waited_for_by_all_and_one_goes_ahead():
    pace = Pace()
    first, second = send(pace, 0.0), send(pace, 0.0)
    assert pace.hold(1.0, 10.0) == 10.0
    assert pace.hold(2.0, 3.0) == 9.0, "the longer of two waits holds"
    pace.answered(first)
    pace.answered(second)
    assert pace.delay(10.9) == pytest.approx(0.1)
    probe = send(pace, 11.0)
    assert pace.delay(11.0) == 2.0
    pace.answered(probe)
    assert len(as_many_as_may(pace, 11.0)) == 1000


def test_an_overload_teaches_no_rate_and_forgets_none():
    pace = Pace()
    for now in (0.0, 100.0):
        for ticket in as_many_as_may(pace, now, most=3):
            pace.answered(ticket)
        send(pace, now)
        pace.hold(now, 5.0)
        pace.answered(send(pace, now + 5.0))
        assert len(as_many_as_may(pace, now + 5.0)) == 1000
    pace = learned(count=4, reset=60.0)
    pace.hold(61.0, 1.0)
    pace.answered(send(pace, 62.0))
    assert len(as_many_as_may(pace, 62.0)) == 2, "of four a minute two have gone since the reset"


def test_a_rate_limit_met_while_the_provider_is_overloaded_is_learned_once_for_its_burst():
    pace = Pace()
    tickets = [send(pace, 0.0) for _ in range(4)]
    pace.answered(tickets[0])
    pace.hold(0.0, 2.0)
    assert pace.limited(tickets[2], 0.0, 30.0) == 30.0
    assert pace.limited(tickets[3], 0.0, None) == 30.0
    pace.answered(send(pace, 30.0))
    assert len(as_many_as_may(pace, 30.0)) == 1, "two were accepted in those thirty seconds, one has gone since"


def test_only_the_last_minute_is_remembered():
    pace = Pace(10)
    for second in range(0, 6000, 6):
        pace.answered(send(pace, float(second)))
    assert len(pace._accepted) <= 11
    assert len(pace._recent) == 10
    assert not pace._unsent


# Simulation: workers on a virtual clock against model servers.


@dataclass
class Sliding:
    """At most so many in any window of so many seconds."""

    limit: int
    seconds: float
    times: list[float] = field(default_factory=list)

    def refuses_until(self, now: float) -> float | None:
        self.times = [each for each in self.times if each > now - self.seconds]
        if len(self.times) >= self.limit:
            return self.times[0] + self.seconds
        self.times.append(now)
        return None

    def ideal(self, total: int) -> float:
        return (total - 1) // self.limit * self.seconds


@dataclass
class Fixed:
    """At most so many in each window of so many seconds, the first of which began before the run."""

    limit: int
    seconds: float
    began: float
    window: float = -1.0
    used: int = 0

    def refuses_until(self, now: float) -> float | None:
        window = (now + self.began) // self.seconds
        if window != self.window:
            self.window, self.used = window, 0
        self.used += 1
        return (window + 1) * self.seconds - self.began if self.used > self.limit else None

    def ideal(self, total: int) -> float:
        return max(0.0, (total - 1) // self.limit * self.seconds - self.began)


@dataclass
class Outcome:
    seconds: float
    refused: int
    sent: list[float]


def simulate(
    server: Sliding | Fixed,
    *,
    total: int,
    workers: int,
    latency: tuple[float, float],
    tells: bool = True,
    whole_seconds: bool = False,
    refusal: float = 0.05,
    way: float = 0.0,
    requests_per_minute: int | None = None,
    seed: int = 0,
) -> Outcome:
    """Has workers send until all is accepted; a request is on its way for up to `way` seconds."""
    rng, numbers = random.Random(seed), itertools.count()
    pace, now, told = Pace(requests_per_minute), 0.0, -math.inf
    events: list[tuple[float, int, str, int, float]] = []
    free, todo, accepted, outcome = workers, total, 0, Outcome(0.0, 0, [])
    for _ in range(200_000):
        if accepted == total:
            outcome.seconds = now
            return outcome
        while free and todo and pace.delay(now) == 0.0:
            assert now >= told - 1e-6, "sent before the reset that the server told"
            ticket, free, todo = send(pace, now), free - 1, todo - 1
            outcome.sent.append(now)
            heapq.heappush(events, (now + rng.random() * way, next(numbers), "arrives", ticket, 0.0))
        wait = pace.delay(now) if free and todo else math.inf
        now = min(now + wait, events[0][0] if events else math.inf)
        assert now < math.inf, "all wait for nothing"
        while events and events[0][0] <= now:
            _, _, what, ticket, reset = heapq.heappop(events)
            if what == "arrives":
                until = server.refuses_until(now)
                answer = ("accepted", 0.0) if until is None else ("refused", until)
                takes = rng.uniform(*latency) if until is None else refusal
                heapq.heappush(events, (now + takes, next(numbers), answer[0], ticket, answer[1]))
                continue
            free += 1
            if what == "accepted":
                pace.answered(ticket)
                accepted += 1
                continue
            todo += 1
            outcome.refused += 1
            retry_after = max(0.0, reset - now)
            retry_after = math.ceil(retry_after) if whole_seconds else retry_after
            pace.limited(ticket, now, retry_after if tells else None)
            told = max(told, now + retry_after) if tells else told
    raise AssertionError("it does not come to an end")


LATENCIES = [(0.05, 0.05), (2.0, 2.0), (0.05, 10.0), (10.0, 10.0)]
LOADS = list(itertools.product((60, 300), (16, 64), LATENCIES))


def ideal(server: Sliding | Fixed, total: int, workers: int, latency: tuple[float, float]) -> float:
    """The least time: by the server's limit, or by the workers where they are too few."""
    return max(server.ideal(total), math.ceil(total / workers) * sum(latency) / 2) + latency[1]


@pytest.mark.parametrize(("total", "workers", "latency"), LOADS)
@pytest.mark.parametrize("make", [lambda: Sliding(20, 60.0), lambda: Fixed(20, 60.0, 40.0)], ids=["sliding", "fixed"])
@pytest.mark.parametrize("tells", [True, False])
def test_a_limit_per_minute_is_found_out_in_nearly_the_ideal_time(make, tells, total, workers, latency):
    outcome = simulate(make(), total=total, workers=workers, latency=latency, tells=tells)
    assert outcome.seconds <= 1.05 * ideal(make(), total, workers, latency) + (15 if tells else 40)
    assert outcome.refused <= workers + total // (5 if tells else 3) + 10


@pytest.mark.parametrize(("total", "workers", "latency"), LOADS)
def test_a_limit_per_second_is_found_out_too(total, workers, latency):
    outcome = simulate(Sliding(5, 1.0), total=total, workers=workers, latency=latency)
    # Each refusal costs a second of waiting and one of probing, in which ten might have gone.
    assert outcome.seconds <= 2.5 * ideal(Sliding(5, 1.0), total, workers, latency)
    assert outcome.refused <= workers + total // 5 + 10


def test_the_second_and_third_batch_go_right_after_their_resets():
    outcome = simulate(Sliding(20, 60.0), total=60, workers=16, latency=(2.0, 2.0))
    assert outcome.seconds < 135
    for batch in (60, 120):
        assert sum(batch <= each <= batch + 5 for each in outcome.sent) >= 20


@pytest.mark.parametrize("make", [lambda: Sliding(20, 60.0), lambda: Fixed(20, 60.0, 40.0)], ids=["sliding", "fixed"])
def test_who_configures_the_limit_is_never_refused(make):
    outcome = simulate(make(), total=100, workers=64, latency=(0.05, 10.0), requests_per_minute=20)
    assert outcome.refused == 0
    assert outcome.seconds <= 250
    assert all(later >= earlier + 60 for earlier, later in zip(outcome.sent, outcome.sent[20:], strict=False))


SERVERS = st.builds(Sliding, st.integers(5, 120), st.sampled_from([1.0, 10.0, 60.0])) | st.builds(
    Fixed, st.integers(5, 120), st.sampled_from([1.0, 10.0, 60.0]), st.floats(0, 60)
)


@settings(deadline=None)
@given(
    SERVERS,
    st.sampled_from([1, 4, 16, 64]),
    st.sampled_from(LATENCIES),
    st.booleans(),
    st.booleans(),
    st.floats(0.01, 1.5),
    st.floats(0, 0.5),
    st.integers(0, 2**32),
)
def test_whatever_the_server_all_is_accepted_in_the_end_and_no_told_reset_is_broken(
    server, workers, latency, tells, whole_seconds, refusal, way, seed
):
    outcome = simulate(
        server,
        total=60,
        workers=workers,
        latency=latency,
        tells=tells,
        whole_seconds=whole_seconds,
        refusal=refusal,
        way=way,
        seed=seed,
    )
    assert len(outcome.sent) == 60 + outcome.refused


@settings(deadline=None)
@given(limit=st.none() | st.integers(1, 5), data=st.data())
def test_in_any_order_of_events_the_limit_and_the_resets_hold_and_nobody_waits_for_ever(limit, data):
    pace, now, told = Pace(limit), 0.0, -math.inf
    unsent: list[int] = []
    out: list[int] = []
    sent: list[float] = []
    for what in data.draw(
        st.lists(st.sampled_from(["reserve", "send", "drop", "answer", "refuse", "overload", "wait"]))
    ):
        tickets = unsent if what in ("send", "drop") else out
        if what == "wait":
            now += data.draw(st.floats(0, 100) | st.just(pace.delay(now)))
        elif what == "reserve":
            if pace.delay(now) == 0.0:
                assert now >= told
                unsent.append(pace.reserve(now))
        elif tickets:
            ticket = tickets.pop(data.draw(st.integers(0, len(tickets) - 1)))
            if what == "send":
                pace.sent(ticket, now)
                sent.append(now)
                out.append(ticket)
            elif what == "drop":
                pace.release(ticket)
            elif what == "answer":
                pace.answered(ticket)
            elif what == "overload":
                wait = data.draw(st.floats(0.1, 120))
                told = max(told, now + wait)
                assert pace.hold(now, wait) >= wait - 1e-9
            else:
                retry_after = data.draw(st.none() | st.floats(0, 120))
                held = pace.limited(ticket, now, retry_after)
                told = max(told, now + retry_after if retry_after else told)
                assert held >= (retry_after or 0.0) - 1e-9
        assert 0.0 <= pace.delay(now) < math.inf
    if limit:
        assert all(later >= earlier + 60 for earlier, later in zip(sent, sent[limit:], strict=False))
    for ticket in unsent:
        pace.release(ticket)
    for _ in range(10):
        now += pace.delay(now)
    assert pace.delay(now) == 0.0, "all wait, whatever they have waited for"
