"""Waiting for what happens elsewhere, never for a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(look: Callable[[], T], seconds: float = 90, *, every: float = 0.05, why: Callable[[], object] = str) -> T:
    """Waits until something is there.

    Args:
        look: What to look at; waited for until it returns something that is true.
        seconds: How long at most.
        every: How long to wait between two looks, in seconds.
        why: What to show where it was waited for in vain, for example a log.

    Returns:
        What `look` has returned.
    """
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"waited {seconds:g} seconds in vain\n{why()}"
        time.sleep(every)
    return found
