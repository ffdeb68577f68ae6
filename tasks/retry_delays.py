"""How Prefect waits as long as the server asks: its task retries, paced by the decision on the failed request.

Prefect reads a task's delays from a list and has none for a single exception. So the condition function, which sees the
exception, leaves the wait in a context variable, and the list hands it out.
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
"""In a batch all assets wait for a rate limit or an overloaded provider, in its gate; Prefect waits no longer than
this, for its waits cannot be ended when the run is."""

_wait: ContextVar[float] = ContextVar("segmind_wait", default=0.0)


class ServerPacedDelays(list[float]):
    """Delays for `retry_delay_seconds`: whatever index is asked for, the wait that was decided on last, in seconds."""

    def __init__(self) -> None:
        policy = RetryPolicy()
        super().__init__(policy.base_seconds * 2**each for each in range(policy.retries))

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        """The wait that was decided on; the plain backoff where none was."""
        return _wait.get() or super().__getitem__(index)


def retry_if_decided(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed request is to be sent again, for `retry_condition_fn`.

    A plain function: Prefect 3.8.8 silently retries nothing with any other callable. 3.9.1 takes them all.
    """
    return _decided(state.result(raise_on_failure=False))


def retry_in_batch_if_decided(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """The same for an asset of a batch, whose gate waits for what concerns all."""
    error = state.result(raise_on_failure=False)
    return _decided(error, longest_seconds=BATCH_WAIT_SECONDS if holds_all(error) else math.inf)


def _decided(error: object, longest_seconds: float = math.inf) -> bool:
    decision = error.decision if isinstance(error, SegmindError) else None
    _wait.set(min(decision.wait_seconds or 0.0, longest_seconds) if decision else 0.0)
    return decision is not None and decision.retry
