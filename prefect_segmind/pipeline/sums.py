"""What requests of this process came to, for the reports of runs: the archive may be out of reach when one ends."""

from __future__ import annotations

import threading

from prefect_segmind.archive.record import FlowRuns, Run
from prefect_segmind.limits.ledger import Sums

KEPT = 10_000
"""Runs that are remembered; each is forgotten when it ends."""
TRIES = 64
"""Tries of flow runs whose heirs are remembered."""
FLOW_RUNS = 8
"""Flow runs whose pictures are remembered."""

_sums: dict[tuple[str, str, str], Sums] = {}
_heirs: dict[tuple[str, FlowRuns], dict[str, str]] = {}
_wanted: dict[str, frozenset[str]] = {}
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


def inherit(archive: str, fingerprint: str, run: Run) -> bool:
    """Whether a run reports what earlier tries of its flow run have sent for a picture: the first that asks does."""
    with _lock:
        heirs = _heirs.setdefault((archive, _tried_again(run.flow_runs)), {})
        if len(_heirs) > TRIES:
            del _heirs[next(iter(_heirs))]
        return heirs.setdefault(fingerprint, run.id) == run.id


def inherited(archive: str, flow_runs: FlowRuns) -> frozenset[str]:
    """The pictures of which a run in this try of a flow run reports what earlier tries have sent."""
    with _lock:
        return frozenset(_heirs.get((archive, _tried_again(flow_runs)), ()))


def _tried_again(flow_runs: FlowRuns) -> FlowRuns:
    """The flow runs down to the last that had a try before: all that they call share what those tries have sent."""
    return flow_runs[: max((depth for depth, (_, number) in enumerate(flow_runs, 1) if number > 1), default=0)]


def wanted_before(call: str, fingerprints: frozenset[str]) -> frozenset[str]:
    """The pictures that this try of a flow run wants, and those that earlier ones wanted in this process.

    An inbox is emptied as its pictures are made, so that a later try no longer asks for them.

    Args:
        call: What names the flow run in all its tries, and in those of the flow runs around it.
        fingerprints: What this try wants.
    """
    with _lock:
        before = _wanted.pop(call, frozenset())
        _wanted[call] = before | fingerprints
        if len(_wanted) > FLOW_RUNS:
            del _wanted[next(iter(_wanted))]
        return _wanted[call]
