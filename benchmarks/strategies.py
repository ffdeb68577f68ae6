"""The ways to make a batch that are compared, and how each is started: as a process of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cells import Cell


@dataclass(frozen=True)
class Strategy:
    """A way to make the pictures of a manifest.

    Attributes:
        name: Its name in the table.
        module: The module that is run, with a manifest, an archive and the number of requests at once.
        pace: Pictures a second that two cores make in this way, however short the API's latency is; a rough figure.
        prefect: Whether it needs Prefect's server.
        most: The most pictures with which it is tried.
        extrapolated: The number of pictures from which its figures are extrapolated; None if all are made.
    """

    name: str
    module: str
    pace: float
    prefect: bool = False
    most: int = 1_000_000
    extrapolated: int | None = None

    def command(self, manifest: Path, archive: str, cell: Cell) -> list[str]:
        """The command line that makes a batch.

        Args:
            manifest: The manifest, a CSV file.
            archive: The folder or `s3://` address of the archive.
            cell: The batch.
        """
        started = [sys.executable, "-m", self.module]
        if self is not OURS:
            return [*started, str(manifest), archive, str(cell.at_once)]
        return [
            *(*started, "refresh", str(manifest), "--archive", archive),
            *("--max-concurrency", str(cell.at_once), "--yes"),
        ]

    def seconds(self, cell: Cell) -> float:
        """About how long a batch takes to measure, its servers and their start included.

        Args:
            cell: The batch.
        """
        return max(cell.ideal, cell.assets / self.pace) + (40 if self.prefect else 5)


OURS = Strategy("prefect-segmind refresh", "prefect_segmind", 25, prefect=True)
FLOOR = Strategy("thread pool", "benchmarks.contenders.thread_pool", 100)
NAIVE = Strategy("naive Prefect", "benchmarks.contenders.naive_prefect", 5, prefect=True, most=1000)
SAMPLE = Strategy("provider's sample", "benchmarks.contenders.provider_sample", 100, extrapolated=5)
ALL = {"ours": OURS, "floor": FLOOR, "sample": SAMPLE, "naive": NAIVE}
"""By their names on the command line."""
