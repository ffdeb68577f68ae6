"""A batch by `prefect-segmind refresh` beside other ways to make it: time, CPU, memory and S3 requests, as a table.

    .venv/bin/python -m benchmarks.bench                                        # as `make bench`: up to an hour
    .venv/bin/python -m benchmarks.bench --quick                                # as `make bench-quick`: three minutes
    .venv/bin/python -m benchmarks.bench --cell 640,64,2,folder --by ours       # one batch, one way

Everything runs on this machine against stubs; nothing is paid. Linux only: it reads /proc. `README.md`
explains the table.
"""

from __future__ import annotations

import argparse
import compileall
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.cells import FULL, QUICK, QUICK_NAIVE, S3_LATENCY, Cell
from benchmarks.measuring import Result, measure
from benchmarks.processes import BenchError
from benchmarks.strategies import ALL, NAIVE, Strategy
from benchmarks.stubs import ROOT
from benchmarks.table import page, write


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two small batches instead of a dozen")
    parser.add_argument(
        "--cell",
        dest="cells",
        action="append",
        type=Cell.parse,
        metavar="ASSETS,AT_ONCE,LATENCY,ARCHIVE",
        help="this batch instead, such as 640,64,2,s3 or 640,64,2,folder; may be repeated",
    )
    parser.add_argument("--by", action="append", choices=ALL, help="only in this way; may be repeated")
    parser.add_argument("--s3-latency", type=float, default=S3_LATENCY, help="seconds that S3 takes for a request")
    parser.add_argument("--minutes", type=float, default=60, help="begin no batch that would not end by then")
    parser.add_argument(
        "--output", type=Path, help="a file for the table, or a page with a place for it; after each batch"
    )
    given = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("it reads /proc, which only Linux has")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    load = os.getloadavg()[0]
    for folder in ("prefect_segmind", "flows", "tasks"):  # or the first batch alone would pay for it
        compileall.compile_dir(ROOT / folder, quiet=1)
    cells = given.cells or (QUICK if given.quick else FULL)
    strategies = [ALL[name] for name in given.by or ALL]
    results, failures = list[Result](), list[str]()
    end = time.monotonic() + 60 * given.minutes
    for cell, strategy in batches(cells, strategies, QUICK_NAIVE if given.quick else NAIVE.most):
        if time.monotonic() + strategy.seconds(cell) > end:
            found: Result | str = f"{label(cell, strategy)}: not tried, as it would not have ended in time."
        else:
            found = tried(cell, strategy, given.s3_latency)
        if isinstance(found, str):
            failures.append(found)
            print(found, file=sys.stderr, flush=True)
        else:
            results += shown(found, cells)
            took = f"{found.over_ideal:.3f} times the ideal, {found.wall:.1f} s in all"
            print(f"{label(cell, strategy)}: {took}", file=sys.stderr, flush=True)
        results.sort(key=lambda each: cells.index(each.cell))
        if given.output:
            write(given.output, page(results, failures, load))
    print(page(results, failures, load))
    sys.exit(bool(failures))


def batches(
    cells: Sequence[Cell], strategies: Sequence[Strategy], most_naive: int = NAIVE.most
) -> Iterator[tuple[Cell, Strategy]]:
    """What is to be measured, in this order: what takes longest for its worth comes last.

    Args:
        cells: The batches.
        strategies: The ways to make them.
        most_naive: The most pictures that the naive way is tried with.
    """
    for strategy in strategies:
        if strategy.extrapolated:  # pictures that are made one after the other take the same in each batch
            for latency in sorted({each.latency for each in cells}):
                yield Cell(strategy.extrapolated, 1, latency, "folder"), strategy
        else:
            most = min(strategy.most, most_naive) if strategy is NAIVE else strategy.most
            yield from ((cell, strategy) for cell in cells if cell.assets <= most)


def tried(cell: Cell, strategy: Strategy, s3_latency: float) -> Result | str:
    """The result of a batch, or what went wrong."""
    try:
        return measure(cell, strategy, s3_latency)
    except (BenchError, OSError) as error:
        return f"{label(cell, strategy)}: {error}"


def shown(result: Result, cells: Sequence[Cell]) -> list[Result]:
    """The rows of a result: one, or one for each batch to which it is extrapolated."""
    if not result.strategy.extrapolated:
        return [result]
    return [result.extrapolated(each) for each in cells if each.latency == result.cell.latency]


def label(cell: Cell, strategy: Strategy) -> str:
    """A batch in words."""
    return f"{strategy.name}, {cell.assets:,} assets, {cell.at_once} at once, {cell.latency:g} s, {cell.archive}"


if __name__ == "__main__":
    main()
