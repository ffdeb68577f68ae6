"""A shared rate: no minute has more requests over all runs than the limit, however they use their permits."""

from __future__ import annotations

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from prefect_segmind.limits.permits import VALID_SECONDS, Draw, Permits
from prefect_segmind.limits.rate_limiter import SLACK_SECONDS, WINDOW_SECONDS


def test_a_draw_is_for_a_few_seconds_worth_of_the_limit_at_most() -> None:
    assert Permits().drawn("a", wanted=500, requests_per_minute=1000, now=0).number == 50
    assert Permits().drawn("a", wanted=500, requests_per_minute=1, now=0).number == 1


def test_unused_permits_come_back_when_their_run_tells_and_count_for_a_minute_if_it_does_not() -> None:
    full = Permits().drawn("a", wanted=1, requests_per_minute=1, now=100)
    refused = full.permits.drawn("b", wanted=1, requests_per_minute=1, now=105)
    assert (refused.number, refused.permits) == (0, full.permits)
    ends = 100 + VALID_SECONDS + WINDOW_SECONDS + SLACK_SECONDS
    assert refused.wait_seconds == ends - 105
    assert full.permits.drawn("b", wanted=1, requests_per_minute=1, now=ends).number == 1
    told = full.permits.drawn("c", wanted=1, requests_per_minute=1, now=105, known=[Draw(id="a", count=0, until=101)])
    assert told.number == 1


def test_what_a_run_tells_is_kept_even_where_it_gets_none() -> None:
    full = Permits().drawn("a", wanted=1, requests_per_minute=1, now=100).permits
    told = full.drawn("b", wanted=1, requests_per_minute=1, now=105, known=[Draw(id="a", count=1, until=101)])
    assert (told.number, told.permits.draws[0].until) == (0, 101)


steps = st.lists(
    st.tuples(
        st.floats(0, 30),  # until the next draw
        st.integers(1, 9),  # wanted
        st.lists(st.floats(0, VALID_SECONDS), max_size=9),  # when each is used, after the draw
        st.booleans(),  # whether the run tells before the next draw
    ),
    max_size=40,
)


@given(steps, st.integers(1, 12))
def test_no_minute_has_more_requests_than_the_limit(
    steps: list[tuple[float, int, list[float], bool]], limit: int
) -> None:
    permits, now, sent, numbers = Permits(), 0.0, list[float](), count()
    known: list[tuple[float, Draw]] = []  # told once its last permit is used
    for wait, wanted, uses, tells in steps:
        now += wait
        ready = [draw for at, draw in known if at <= now]
        known = [each for each in known if each[0] > now]
        id = str(next(numbers))
        granted = permits.drawn(id, wanted=wanted, requests_per_minute=limit, now=now, known=ready)
        permits = granted.permits
        used = [now + each for each in uses[: granted.number]]
        sent += used
        last = max(used, default=now)
        if granted.number and tells:
            known.append((last, Draw(id=id, count=len(used), until=last)))
    sent.sort()
    for at in sent:
        assert sum(at <= each < at + WINDOW_SECONDS for each in sent) <= limit
