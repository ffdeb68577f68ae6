"""The bar in the terminal while a batch runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.logging.configuration import setup_logging
from prefect.logging.handlers import PrefectConsoleHandler
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
        TextColumn("·"),
        TimeRemainingColumn(),
        TextColumn("left"),
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
        with bar, _log_above(bar):
            yield
    finally:
        batch.observer.reset(token)


@contextmanager
def _log_above(bar: Progress) -> Iterator[None]:
    """Has Prefect's log printed above the bar; its own console would print into it."""
    setup_logging()  # which Prefect does later by itself, and only once
    handlers = [each for each in logging.getLogger("prefect").handlers if isinstance(each, PrefectConsoleHandler)]
    before = [each.console for each in handlers]
    for each in handlers if not bar.disable else ():
        each.console = bar.console
    try:
        yield
    finally:
        for each, console in zip(handlers, before, strict=True):
            each.console = console
