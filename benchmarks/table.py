"""The results as a page in Markdown: the machine, the table, and what is to be known of it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from benchmarks.cells import Cell
from benchmarks.measuring import Result
from benchmarks.strategies import OURS
from benchmarks.stubs import ROOT

HEADS = (
    "assets",
    "at once",
    "latency",
    "archive",
    "made by",
    "wall ÷ ideal",
    "assets a second",
    "start to first POST",
    "whole process",
    "CPU an asset",
    "without the start",
    "server's CPU an asset",
    "S3 requests an asset",
    "peak memory",
)
PLACE = ("<!-- measured -->", "<!-- end of measured -->")
"""The lines around the place for a table in a page."""
LATE, FOREIGN = 0.05, 0.05
"""From which share of the latency on the stub counts as late, and of the machine other work as a disturbance."""


def machine(load: float) -> str:
    """The machine, the versions and the date.

    Args:
        load: Its load before the first batch.
    """
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    memory = int(_field("/proc/meminfo", "MemTotal").split()[0]) / 1e6
    packages = ", ".join(f"{name} {version(name)}" for name in ("prefect", "boto3", "httpx", "prefect-segmind"))
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC · {_field('/proc/cpuinfo', 'model name')}, {os.cpu_count()} cores, "
        f"{memory:.0f} GB, {platform.system()} {platform.release()}, "
        f"load {load:.1f} before the start · Python {platform.python_version()}, {packages}"
        + (f" (commit {commit})" if commit else "")
    )


def _field(path: str, name: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "unknown")


def page(results: Sequence[Result], failures: Sequence[str], load: float) -> str:
    """All results as a page.

    Args:
        results: In the order of the table.
        failures: What could not be measured, and why.
        load: The machine's load before the first batch.
    """
    lines = [machine(load), "", f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    for cell, rows in groupby(results, key=lambda each: each.cell):
        for number, result in enumerate(rows):
            lines.append(f"| {' | '.join((*_batch(cell, first=number == 0), *_figures(result)))} |")
    notes = [*failures, *_notes(results)]
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)]) + "\n"


def write(path: Path, table: str) -> None:
    """Writes a page into a file.

    Args:
        path: The file. If it has a place for a table, that alone is replaced; else the whole file.
        table: The page.
    """
    present = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = present.partition(PLACE[0])
    _, end, after = rest.partition(PLACE[1])
    path.write_text(f"{before}{begin}\n\n{table}\n{end}{after}" if end else table, encoding="utf-8")


def _batch(cell: Cell, *, first: bool) -> tuple[str, ...]:
    return (f"{cell.assets:,}", str(cell.at_once), f"{cell.latency:g} s", cell.archive) if first else ("",) * 4


def _figures(result: Result) -> tuple[str, ...]:
    made, assets = result.strategy, result.cell.assets
    marks = "†" * (result.late > LATE * result.cell.latency) + "‡" * (result.foreign > FOREIGN)
    s3 = {method: number / assets for method, number in sorted(result.s3.items()) if number >= assets / 100}
    each = ", ".join(f"{number:.2f} {method}" for method, number in s3.items())
    return (
        f"{made.name}{f', from {made.extrapolated}' if made.extrapolated else ''}",
        f"{'≈ ' if made.extrapolated else ''}{result.over_ideal:.3f}{marks}",
        f"{assets / result.window:.1f}",
        f"{result.to_first_post:.1f} s",
        f"{result.wall:.1f} s",
        _ms(result.cpu, assets),
        _ms(result.cpu - result.cpu_before, assets),
        "–" if result.server_cpu is None else _ms(result.server_cpu, assets),
        f"{sum(result.s3.values()) / assets:.2f}{f' ({each})' if each else ''}" if result.s3 else "–",
        f"{result.peak_mb:.0f} MB",
    )


def _ms(seconds: float, assets: int) -> str:
    return f"{1000 * seconds / assets:.1f} ms"


def _notes(results: Sequence[Result]) -> list[str]:
    """What is to be known of the rows: the marks that occur in them, and how memory grows."""
    notes = []
    if any(each.strategy.extrapolated for each in results):
        notes.append("≈: extrapolated from 5 pictures, made one after the other.")
    if any(each.late > LATE * each.cell.latency for each in results):
        notes.append(f"†: answers of the stub were sent later than due by more than {LATE:.0%} of the latency.")
    if results:
        notes.append(f"The busier stub used at most {max(each.stub_busy for each in results):.0%} of a core.")
    notes += [
        f"{each.strategy.name} has paid {each.paid:,} times for {each.cell.assets:,} pictures."
        for each in results
        if each.paid > each.cell.assets
    ]
    if any(each.foreign > FOREIGN for each in results):
        notes.append(f"‡: other programs took more than {FOREIGN:.0%} of the machine's CPU at the time.")
    ours = sorted((each for each in results if each.strategy is OURS), key=lambda each: each.cell.assets)
    for at_once, archive in sorted({(each.cell.at_once, each.cell.archive) for each in ours}):
        alike = [each for each in ours if (each.cell.at_once, each.cell.archive) == (at_once, archive)]
        few, many = alike[0], alike[-1]
        if (more := many.cell.assets - few.cell.assets) >= 1000:
            slope = 1000 * (many.peak_mb - few.peak_mb) / more
            notes.append(
                f"Peak memory of {OURS.name}, {at_once} at once, {archive}: {slope:.1f} kB more for each asset from "
                f"{few.cell.assets:,} to {many.cell.assets:,}."
            )
    return notes
