"""An interrupt may come at any line: what was paid is told, and the next run pays only for what has not arrived.

Where the provider's history may be asked, it pays only for what the provider has not made. A sample of the lines runs
with all tests; two of seven with `make test-faults`, and one of 21 of the walks with the history.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Literal

import pytest
from prefect.exceptions import TerminationSignal

from prefect_segmind.api import listing
from prefect_segmind.archive import leases
from prefect_segmind.archive.record import Run
from prefect_segmind.errors import RunCancelledError, SegmindError
from prefect_segmind.jobs.job import Job, parse_job
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import Ledger
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services
from tests.support.stepping import Point, interrupted_at

EVERYTHING = os.environ.get("FAULTS") == "all"
PRICE = Decimal("0.05")
Kind = Literal["v1", "v1 with history", "v2"]
LOG = logging.Logger("interrupts", logging.CRITICAL)
INTERRUPTS: tuple[Callable[[], BaseException], ...] = (
    KeyboardInterrupt,
    lambda: TerminationSignal(signal.SIGTERM),
)


@pytest.fixture(scope="module")
def quick_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with Sandbox(tmp_path_factory.mktemp("sandbox"), latency=0, credits="1000.00", sketch=True) as sandbox:
        yield sandbox


class Walk:
    """One picture in an archive of its own, asked for by one run after another."""

    def __init__(
        self, sandbox: Sandbox, photo: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
    ) -> None:
        sandbox.reset()
        for name, value in sandbox.environment().items():
            monkeypatch.setenv(name, value)
        if kind == "v2":
            monkeypatch.setenv("SEGMIND_BASE_URL", sandbox.base_url_v2)
        if kind != "v1":
            monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_HISTORY_URL", sandbox.history_url)
        # Waits for the provider take next to no time, and every question is asked anew.
        monkeypatch.setattr(Gate, "rest", lambda _, seconds: threading.Event().wait(min(seconds, 0.01)) or True)
        monkeypatch.setattr(listing, "REUSED_SECONDS", 0.0)
        self.has_history = kind != "v1"
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO", "s3://segmind/uploads")
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX", str(folder / "outbox"))
        self.sandbox = sandbox
        self.outbox = folder / "outbox"
        self.archive = folder / "archive"
        self.job: Job = parse_job({"name": "mug", "image": str(photo), "prompt": "a red mug"})

    def run(self) -> Pipeline:
        return Services(archive=str(self.archive)).pipeline(Gate(ledger=Ledger()))

    def check(self, number: int, interrupt: Callable[[], BaseException]) -> Point | None:
        """Interrupts a run at a line, runs the job again, and compares what both tell with what was billed."""
        first, second = self.run(), self.run()
        at = interrupted_at(number, interrupt, lambda: first.produce(self.job, Run("first"), LOG))
        if at is None:
            return None
        where = f"line {number}, {at}"
        leases._claims.clear()  # its process has ended
        told = first.ledger.totals
        stuck = threading.Timer(30, second.gate.stop, [RunCancelledError("it waits for a run that has ended")])
        stuck.start()
        try:
            archived = second.produce(self.job, Run("second"), LOG)
        except SegmindError as error:
            pytest.fail(f"{where}: the next run failed: {error}")
        finally:
            stuck.cancel()
        billed, requests = self.sandbox.ledger.billed_usd, len(self.sandbox.ledger.requests)
        both = told.plus(second.ledger.totals)
        found = second.look_up.archive.read(archived.fingerprint)
        assert found is not None, where
        record = found.record
        sums = f"{where}: {told}, then {second.ledger.totals}; billed {billed}; {record.attempts}"
        assert both.cost_usd <= billed <= both.cost_usd + both.possibly_billed_usd, sums
        assert both.possibly_billed_usd <= PRICE, sums
        assert billed <= PRICE or (both.possibly_billed_usd and not self.has_history), sums
        assert both.requests_sent == len(record.attempts) <= 2, sums
        assert requests <= both.requests_sent, sums
        assert (archived.status == "generated") == bool(second.ledger.spent_usd), sums
        known = sum((each.cost_usd or Decimal(0) for each in record.attempts), Decimal(0))
        unknown = PRICE * sum(each.possibly_billed is True for each in record.attempts)
        assert record.state == "done", where
        assert known <= billed <= known + unknown, sums
        assert known == billed or not (told.cost_usd or self.has_history), sums
        assert [each.name for each in self.outbox.rglob("*") if each.is_file()] == [], where
        return at


def walk_through(
    first: int,
    step: int,
    quick_sandbox: Sandbox,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind = "v1",
) -> int:
    """Interrupts a walk at every so many lines; returns at how many."""
    for tried, number in enumerate(count(first, step)):
        walk = Walk(quick_sandbox, photo, tmp_path / str(number), monkeypatch, kind)
        if walk.check(number, INTERRUPTS[tried % len(INTERRUPTS)]) is None:
            return tried
    raise AssertionError


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(2 if EVERYTHING else 1))
def test_an_interrupt_at_any_line_of_a_walk_leaves_sums_that_are_true_and_nothing_paid_twice(
    part: int, quick_sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = walk_through(3 * part, 7 if EVERYTHING else 61, quick_sandbox, photo, tmp_path, monkeypatch)
    assert lines > (300 if EVERYTHING else 30)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["v1 with history", "v2"])
def test_an_interrupt_at_any_line_leaves_a_picture_that_is_billed_once_where_the_provider_tells(
    kind: Kind, quick_sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = walk_through(2, 21 if EVERYTHING else 127, quick_sandbox, photo, tmp_path, monkeypatch, kind)
    assert lines > (100 if EVERYTHING else 15)
