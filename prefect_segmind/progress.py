"""The bar in the terminal while a batch runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from prefect_segmind import batch
from prefect_segmind.price import usd


@contextmanager
def batch_progress(console: Console, *, hidden: bool = False) -> Iterator[None]:
    """Shows a bar while a batch runs: done, reused, failed, USD and the time left.

    Args:
        console: Where people read; without a terminal nothing is drawn.
        hidden: Whether to show none.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=hidden or not console.is_terminal,
    )
    row = bar.add_task("pictures", total=None, told="planning")

    def show(progress: batch.Progress) -> None:
        reused = progress.counts["reused"] + progress.counts["recovered"]
        told = f"{reused} reused, {progress.counts['failed']} failed, {usd(progress.cost_usd)} USD"
        bar.update(row, total=progress.total, completed=progress.done, told=told)

    token = batch.observer.set(show)
    try:
        with bar:
            yield
    finally:
        batch.observer.reset(token)
