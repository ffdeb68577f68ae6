"""Retry delays of tasks: Prefect waits as long as the decision on the failed request says.

Prefect reads a task's delays from a list, whatever the exception. So the condition function, which gets the exception,
puts the wait into a context variable, and the list returns it.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import Any, SupportsIndex

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from prefect_segmind.errors import SegmindError
from prefect_segmind.limits.retry import RetryPolicy, holds_all

BATCH_WAIT_SECONDS = 15.0
"""In a batch all assets wait in its gate for a rate limit or an overloaded provider. Prefect waits no longer than this,
because its waits cannot be interrupted when the run is."""

_wait: ContextVar[float] = ContextVar("segmind_wait", default=0.0)


class ServerPacedDelays(list[float]):
    """Delays in seconds for `retry_delay_seconds`: the wait that was decided on last, whatever the index."""

    def __init__(self) -> None:
        policy = RetryPolicy()
        super().__init__(policy.base_seconds * 2**each for each in range(policy.retries))

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        """The wait that was decided on, or the plain backoff where there is none."""
        return _wait.get() or super().__getitem__(index)


def retry_if_decided(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed request is sent again, for `retry_condition_fn`.

    It is a plain function because Prefect 3.8.8 silently retries nothing with any other callable; 3.9.1 takes all.
    """
    return _decided(state.result(raise_on_failure=False))


def retry_in_batch_if_decided(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """The same for an asset of a batch, whose gate waits for what concerns all assets."""
    error = state.result(raise_on_failure=False)
    return _decided(error, longest_seconds=BATCH_WAIT_SECONDS if holds_all(error) else math.inf)


def _decided(error: object, longest_seconds: float = math.inf) -> bool:
    decision = error.decision if isinstance(error, SegmindError) else None
    _wait.set(min(decision.wait_seconds or 0.0, longest_seconds) if decision else 0.0)
    return decision is not None and decision.retry
