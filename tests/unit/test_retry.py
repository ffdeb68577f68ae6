"""What passes by itself is tried again, patiently and not for ever; what may have been paid for, once at most."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_segmind import errors
from prefect_segmind.api.response import answer_error
from prefect_segmind.errors import (
    AnswerCutError,
    BadGatewayError,
    Decision,
    GatewayTimeoutError,
    OverloadedError,
    RateLimitError,
    SegmindError,
)
from prefect_segmind.limits.retry import RETRY, RetryPolicy, decide, holds_all

MAYBE_BILLED = {BadGatewayError, GatewayTimeoutError, AnswerCutError}
ASKED = st.none() | st.floats(0, 120)
ATTEMPTS = st.integers(1, 5)
JITTER = st.floats(0, 1)


def make(kind: type[SegmindError], retry_after: float | None = None) -> SegmindError:
    return kind("it failed", retry_after=retry_after, possibly_billed=kind in MAYBE_BILLED)


# One row for each error class and situation: (class, requests sent, possibly billed, wait or None to stop).
TABLE = [
    ("RateLimitError", 1, 0, 1.0),
    ("RateLimitError", 2, 0, 2.0),
    ("RateLimitError", 5, 0, 16.0),
    ("RateLimitError", 6, 0, None),
    ("RateLimitError", 2, 1, 2.0),  # after one possibly billed: this one was not
    ("RateLimitError", 3, 2, None),
    ("OverloadedError", 1, 0, 1.0),
    ("OverloadedError", 5, 0, 16.0),
    ("OverloadedError", 6, 0, None),
    ("OverloadedError", 2, 1, 2.0),
    ("ApiUnreachableError", 1, 0, 1.0),
    ("ApiUnreachableError", 5, 0, 16.0),
    ("ApiUnreachableError", 6, 0, None),
    ("ApiUnreachableError", 3, 2, None),
    ("BadGatewayError", 1, 1, 1.0),
    ("BadGatewayError", 4, 1, 8.0),
    ("BadGatewayError", 2, 2, None),
    ("BadGatewayError", 6, 1, None),
    ("GatewayTimeoutError", 1, 1, 1.0),
    ("GatewayTimeoutError", 2, 2, None),
    ("AnswerCutError", 1, 1, 1.0),
    ("AnswerCutError", 2, 2, None),
    *((name, 1, 0, None) for name in ("BadRequestError", "InvalidKeyError", "PermissionDeniedError")),
    *((name, 1, 0, None) for name in ("EndpointNotFoundError", "MethodNotAllowedError", "NotAcceptableError")),
    *((name, 1, 0, None) for name in ("InsufficientCreditsError", "ParameterRejectedError", "ModelRetiredError")),
    *((name, 1, 0, None) for name in ("ContentTypeRejectedError", "UnprocessableError", "InternalServerError")),
    *((name, 1, 0, None) for name in ("UnexpectedStatusError", "AccountError", "ApiError", "SegmindError")),
    *((name, 1, 1, None) for name in ("NotAnImageError", "UnsafeImageError", "ResultLinkError", "OutboxError")),
    *((name, 1, 0, None) for name in ("OutcomeUnknownError", "InputError", "InvalidJobError", "SourceImageError")),
    ("KeptElsewhereError", 1, 0, None),
    *((name, 1, 1, None) for name in ("SubmittedError", "ForgottenError", "SubmissionUnknownError", "HistoryError")),
    *((name, 1, 0, None) for name in ("ConfigurationError", "StoreError", "BucketNotFoundError", "StoreAccessError")),
    *((name, 1, 0, None) for name in ("StoreCredentialsError", "StoreUnreachableError", "PreconditionFailedError")),
    *(
        (name, 1, 0, None)
        for name in (
            "ArchiveError",
            "ManifestError",
            "BudgetReachedError",
            "SharedBudgetReachedError",
            "RunCancelledError",
        )
    ),
    *(
        (name, 1, 0, None)
        for name in ("NotStartedError", "NotApprovedError", "ApprovalTimeoutError", "UnusableAnswersError")
    ),
]


@pytest.mark.parametrize(("name", "attempts", "unknown", "wait"), TABLE)
def test_what_follows_a_failed_request(name, attempts, unknown, wait):
    decision = decide(make(getattr(errors, name)), attempts=attempts, unknown=unknown, elapsed=30.0)
    assert decision.wait_seconds == wait
    assert decision.retry is (wait is not None)
    assert decision.reason


def test_the_table_has_every_class():
    classes = {name for name, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, SegmindError)}
    assert classes == {row[0] for row in TABLE}


def test_rate_limits_may_be_counted_apart_for_they_are_no_fault_of_the_job():
    policy = RetryPolicy(retries=2, rate_limit_retries=4)
    limited, broken = make(errors.RateLimitError), make(errors.ApiUnreachableError)
    assert [decide(limited, attempts=n, unknown=0, elapsed=0.0, policy=policy).retry for n in (2, 4, 5)] == [1, 1, 0]
    assert [decide(broken, attempts=n, unknown=0, elapsed=0.0, policy=policy).retry for n in (2, 3)] == [1, 0]
    assert "after 4 retries" in decide(limited, attempts=5, unknown=0, elapsed=0.0, policy=policy).reason


@pytest.mark.parametrize("attempts", [1024, 1025, 1_000_000])
def test_a_backoff_has_its_limit_however_many_attempts_there_were(attempts):
    policy = RetryPolicy(retries=attempts)
    decision = decide(make(RateLimitError), attempts=attempts, unknown=0, elapsed=0.0, policy=policy)
    assert decision.wait_seconds == policy.longest_backoff_seconds


def test_of_all_statuses_five_are_retried():
    now = datetime(2025, 3, 1, tzinfo=UTC)
    answers = {status: answer_error(status, {}, b"", now=now, secret="") for status in range(201, 600)}
    retried = [
        status
        for status, error in answers.items()
        if decide(error, attempts=1, unknown=int(error.possibly_billed), elapsed=0.0).retry
    ]
    assert retried == [429, 502, 503, 504, 529]


@pytest.mark.parametrize(("asked", "retries"), [(None, 2), (0.0, 2), (3.0, 4)])
def test_an_overload_that_names_a_time_is_counted_as_a_rate_limit_is_and_another_as_a_failure(asked, retries):
    policy, error = RetryPolicy(retries=2, rate_limit_retries=4), make(OverloadedError, asked)
    assert holds_all(error) is (retries == 4)
    assert decide(error, attempts=retries, unknown=0, elapsed=0.0, policy=policy).retry
    assert not decide(error, attempts=retries + 1, unknown=0, elapsed=0.0, policy=policy).retry


@pytest.mark.parametrize(
    ("error", "situation", "reason"),
    [
        (make(errors.BadRequestError), {}, "trying again would not help"),
        (make(RateLimitError), {"attempts": 6}, "gave up after 5 retries"),
        (make(BadGatewayError), {"unknown": 2}, "2 requests may have been billed; another might pay once more"),
        (make(RateLimitError, 120.5), {}, "the server asks to wait 120 s, more than 120 s"),
        (make(RateLimitError), {"elapsed": 1800.0}, "1800 s have passed since the first request"),
        (make(RateLimitError, 7.0), {}, "the wait that the server asks for"),
        (make(RateLimitError, 0.5), {}, "exponential backoff"),
    ],
)
def test_a_decision_gives_its_reason(error, situation, reason):
    assert decide(error, **{"attempts": 1, "unknown": 0, "elapsed": 0.0, **situation}).reason == reason


@pytest.mark.parametrize("kind", get_args(RETRY))
@settings(deadline=None)
@given(st.data())
def test_a_wait_is_never_less_than_the_server_asks_nor_than_the_backoff(kind, data):
    asked, attempts, jitter = data.draw(ASKED), data.draw(ATTEMPTS), data.draw(JITTER)
    decision = decide(make(kind, asked), attempts=attempts, unknown=0, elapsed=0.0, jitter=jitter)
    assert decision.wait_seconds is not None
    assert decision.wait_seconds >= (asked or 0.0)
    assert decision.wait_seconds >= 2.0 ** (attempts - 1)


@settings(deadline=None)
@given(ASKED, ATTEMPTS, JITTER, JITTER)
def test_jitter_goes_upwards_only_and_by_a_quarter_of_the_backoff_at_most(asked, attempts, one, other):
    def wait(jitter: float) -> float:
        found = decide(make(RateLimitError, asked), attempts=attempts, unknown=0, elapsed=0.0, jitter=jitter)
        assert found.wait_seconds is not None
        return found.wait_seconds

    low, high = sorted((one, other))
    assert wait(0.0) <= wait(low) <= wait(high) <= wait(0.0) + 2.0 ** (attempts - 1) / 4


def test_jitter_is_spread_where_the_server_asks_all_to_come_at_once():
    waits = {
        decide(make(RateLimitError, 60.0), attempts=1, unknown=0, elapsed=0.0, jitter=j).wait_seconds for j in (0, 1)
    }
    assert waits == {60.0, 60.25}


@pytest.mark.parametrize(("asked", "retry"), [(119.9, True), (120.0, True), (120.1, False), (86_400.0, False)])
def test_a_server_that_asks_for_more_than_two_minutes_is_not_waited_for(asked, retry):
    assert decide(make(RateLimitError, asked), attempts=1, unknown=0, elapsed=0.0).retry is retry


@pytest.mark.parametrize(("elapsed", "retry"), [(0.0, True), (1799.0, True), (1799.1, False), (5000.0, False)])
def test_no_retry_begins_half_an_hour_after_the_first_request(elapsed, retry):
    assert decide(make(RateLimitError), attempts=1, unknown=0, elapsed=elapsed).retry is retry


def test_how_patient_a_run_is_can_be_set():
    policy = RetryPolicy(retries=1, base_seconds=4.0, longest_wait_seconds=10.0, longest_run_seconds=20.0)

    def wait(asked: float | None = None, attempts: int = 1, elapsed: float = 0.0) -> float | None:
        error = make(RateLimitError, asked)
        return decide(error, attempts=attempts, unknown=0, elapsed=elapsed, policy=policy).wait_seconds

    assert wait() == 4.0
    assert wait(asked=10.0) == 10.0
    assert wait(asked=11.0) is None
    assert wait(attempts=2) is None
    assert wait(elapsed=17.0) is None


def test_no_retries_means_one_request():
    assert not decide(make(RateLimitError), attempts=1, unknown=0, elapsed=0.0, policy=RetryPolicy(retries=0)).retry


KINDS = st.sampled_from([*get_args(RETRY), errors.InternalServerError, errors.NotAnImageError])


@settings(deadline=None)
@given(st.lists(st.tuples(KINDS, ASKED, JITTER), min_size=12, max_size=12))
def test_whatever_fails_a_picture_is_requested_six_times_and_paid_for_twice_at_the_very_worst(failures):
    sent, unknown, elapsed, waited = 0, 0, 0.0, 0
    for kind, asked, jitter in failures:
        sent += 1
        billed = kind in MAYBE_BILLED or kind is errors.NotAnImageError
        unknown += billed
        decision = decide(make(kind, asked), attempts=sent, unknown=unknown, elapsed=elapsed, jitter=jitter)
        if decision.wait_seconds is None:
            break
        elapsed += decision.wait_seconds
        waited += 1
    assert waited == sent - 1
    assert sent <= 6
    assert unknown <= 2
    assert elapsed <= 1800


def test_a_decision_to_stop_has_no_wait():
    assert not Decision(None, "why").retry
    assert Decision(0.0, "at once").retry
