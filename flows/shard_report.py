"""How the run of a shard tells the run that has started it what it does: by a report in the archive."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context

from prefect_segmind.batch.shards import REPORT_SECONDS, ShardFolder, ShardKey, ShardReport
from prefect_segmind.batch.tally import BatchResult, Tally
from prefect_segmind.errors import SegmindError, StoreError
from prefect_segmind.limits.ledger import Ledger, Totals
from prefect_segmind.services import Services
from prefect_segmind.storage.store import Store
from prefect_segmind.tasks.run_context import current_flow_run, flow_call, run_logger


class ReportedShard:
    """The shard that this flow run works on.

    Args:
        key: Its key.
        folder: Has its manifest, and gets its report.
    """

    def __init__(self, key: ShardKey, folder: ShardFolder) -> None:
        self._key = key
        self._place = folder
        self._tally: Tally | None = None
        self._ledger = Ledger()
        self._earlier = Totals()
        self._number = 0
        self._tries = 1
        self._ended = threading.Event()
        self._writing = threading.Lock()

    @property
    def folder(self) -> str:
        """Where its results are kept, below `.segmind/` of the archive."""
        return self._place.results_of(self._key)

    def follow(self, tally: Tally, ledger: Ledger) -> None:
        """Has the reports tell how far the run is.

        Args:
            tally: Its tally.
            ledger: Its ledger. What it has by now was sent in earlier tries: of this run, or of the one that has
                started it, which reports that itself.
        """
        (*around, (_, tries)) = flow_call().runs
        if tries == 1 and any(number > 1 for _, number in around):
            self._earlier = ledger.totals
        self._tries = tries
        self._tally, self._ledger = tally, ledger

    def end(self, result: BatchResult, stopped: SegmindError | None, store: Store) -> None:
        """Writes the last report.

        Args:
            result: The result of the run.
            stopped: What ended it early, if something did.
            store: The store of the archive.

        Raises:
            StoreError: It cannot be written.
        """
        self._ended.set()
        key = f".segmind/{self.folder}/results.jsonl"
        self._write(
            ended=True,
            stopped=str(stopped) if stopped else None,
            stopped_by=type(stopped).__name__ if stopped else None,
            results=key if result.results == store.uri(key) else None,
        )

    def go_on(self) -> None:
        """Writes a report now and then until the run ends."""
        while True:
            try:
                self._write()
            except StoreError as error:
                run_logger().debug("no report of the shard: %s", error)
            if self._ended.wait(REPORT_SECONDS):
                return

    def close(self) -> None:
        """Ends the reports."""
        self._ended.set()

    def _write(self, *, ended: bool = False, **more: str | None) -> None:
        with self._writing:
            if self._ended.is_set() and not ended:
                return
            counts = self._tally.progress.counts if self._tally else {}
            spent = self._ledger.totals.plus(self._earlier, -1)
            numbers = {"number": self._number, "tries": self._tries}
            report = ShardReport(**numbers, counts=counts, **spent._asdict(), ended=ended, **more)
            self._number += 1
            self._place.write_report(self._key, report)


@contextmanager
def reported_shard(services: Services, manifest: str) -> Iterator[ReportedShard | None]:
    """The shard that this flow run works on, which is reported while inside; None if it works on none.

    Args:
        services: Opens the archive.
        manifest: The manifest of the run.
    """
    run = current_flow_run()
    key = ShardKey.parse(run.idempotency_key) if run and run.deployment_id else None
    if key is None:
        yield None
        return
    shard = ReportedShard(key, ShardFolder.of(services.archive.store, manifest))
    threading.Thread(target=copy_context().run, args=(shard.go_on,), name="segmind-shard-report", daemon=True).start()
    try:
        yield shard
    finally:
        shard.close()
