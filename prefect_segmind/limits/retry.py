"""The decision about a failed request: wait and try again, or stop. It is pure; Prefect does the waiting."""

from __future__ import annotations

from dataclasses import dataclass

from prefect_segmind.errors import (
    AnswerCutError,
    ApiUnreachableError,
    BadGatewayError,
    Decision,
    GatewayTimeoutError,
    OverloadedError,
    RateLimitError,
    SegmindError,
)

UNKNOWN_RETRIES = 1
"""The most requests that a flow run sends for a picture after one of its own that may have been billed."""

RETRY = RateLimitError | OverloadedError | BadGatewayError | GatewayTimeoutError | ApiUnreachableError | AnswerCutError
"""The errors that pass by themselves. All others would fail again, or would pay again."""


def holds_all(error: BaseException | None) -> bool:
    """Whether an error concerns every request of a run: a rate limit, or an overload with a time to wait.

    Args:
        error: What a request ended with; None if it succeeded.

    Example:
        >>> holds_all(OverloadedError("…", status=503, retry_after=5.0)), holds_all(OverloadedError("…", status=503))
        (True, False)
    """
    return isinstance(error, RateLimitError) or (isinstance(error, OverloadedError) and bool(error.retry_after))


@dataclass(frozen=True)
class RetryPolicy:
    """The limits of a run's retries.

    Attributes:
        retries: The most requests after the first one.
        rate_limit_retries: The most requests after failures for which `holds_all` is true, if these are counted
            separately; None if they are not.
        base_seconds: The first wait; it doubles with each attempt.
        longest_backoff_seconds: The limit of that doubling.
        unknown_retries: The most requests after one that may have been billed.
        longest_wait_seconds: If a server asks for a longer wait, no request follows.
        longest_run_seconds: No retry begins later than this after the first request that did not hold all.
    """

    retries: int = 5
    rate_limit_retries: int | None = None
    base_seconds: float = 1.0
    longest_backoff_seconds: float = 60.0
    unknown_retries: int = UNKNOWN_RETRIES
    longest_wait_seconds: float = 120.0
    longest_run_seconds: float = 1800.0


def decide(
    error: SegmindError,
    *,
    attempts: int,
    unknown: int,
    elapsed: float,
    jitter: float = 0.0,
    policy: RetryPolicy | None = None,
) -> Decision:
    """Decides what follows a failed request.

    A wait is never less than what the server asks for. After a request that may have been billed there is at most one
    more that may be billed too (none with `unknown_retries=0`), so that a picture is paid for twice at the very worst.

    Args:
        error: What the last request ended with.
        attempts: The number of requests that this run has sent for the job, the failed one included; only those for
            which `holds_all` is true, or only the others, if the policy counts them separately.
        unknown: The number of them that may have been billed, the failed one included.
        elapsed: Seconds since the first of them that did not hold all: waits that all share do not count.
        jitter: A number from 0 to 1 that lengthens the wait by up to a quarter of the backoff, and never shortens it.
        policy: The limits; the defaults if None.

    Returns:
        The wait before the next request, or that there is none, with the reason.

    Example:
        >>> decide(RateLimitError("…", status=429, retry_after=3.0), attempts=1, unknown=0, elapsed=0.1).wait_seconds
        3.0
    """
    policy = policy or RetryPolicy()
    if not isinstance(error, RETRY):
        return Decision(None, "trying again would not help")
    apart = policy.rate_limit_retries if holds_all(error) else None
    retries = policy.retries if apart is None else apart
    if attempts > retries:
        return Decision(None, f"gave up after {retries} {'retry' if retries == 1 else 'retries'}")
    if unknown > policy.unknown_retries:
        return Decision(
            None, f"{unknown} request{'s' * (unknown > 1)} may have been billed; another might pay once more"
        )
    asked = error.retry_after or 0.0
    if asked > policy.longest_wait_seconds:
        return Decision(None, f"the server asks to wait {asked:.0f} s, more than {policy.longest_wait_seconds:.0f} s")
    doublings = min(attempts - 1, 1000)  # a float has room for no more
    backoff = min(policy.base_seconds * 2.0**doublings, policy.longest_backoff_seconds)
    wait = max(backoff, asked) + backoff * jitter / 4
    if elapsed + wait > policy.longest_run_seconds:
        return Decision(None, f"{policy.longest_run_seconds:.0f} s have passed since the first request")
    return Decision(wait, "the wait that the server asks for" if asked > backoff else "exponential backoff")
