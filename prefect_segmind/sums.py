"""What failed requests of runs that go on came to, for their reports: the archive may be out of reach when one ends."""

from __future__ import annotations

import threading
from decimal import Decimal
from typing import NamedTuple

KEPT = 10_000
"""Runs that are remembered; each is forgotten when it ends."""


class Sums(NamedTuple):
    """What the requests of a run for one picture came to.

    Attributes:
        requests_sent: How many there were.
        possibly_billed_usd: What those of unknown outcome may have cost, as far as the run has to report them.
    """

    requests_sent: int = 0
    possibly_billed_usd: Decimal = Decimal("0.00")


_sums: dict[tuple[str, str, str], Sums] = {}
_lock = threading.Lock()


def remember(archive: str, fingerprint: str, run: str, sums: Sums) -> None:
    """Remembers what the requests of a run came to so far; it goes on.

    Args:
        archive: The archive's URL.
        fingerprint: The picture's.
        run: The run.
        sums: What they came to, the earlier ones included.
    """
    with _lock:
        _sums[archive, fingerprint, run] = sums
        if len(_sums) > KEPT:
            del _sums[next(iter(_sums))]


def forget(archive: str, fingerprint: str, run: str) -> Sums:
    """What the requests of a run came to, for the last time: it has ended."""
    with _lock:
        return _sums.pop((archive, fingerprint, run), Sums())
