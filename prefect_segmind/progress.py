"""The terminal while a batch runs: a bar, and the question whether it may cost what it will."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.logging.configuration import setup_logging
from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from prefect_segmind import batch
from prefect_segmind.approval import GO_ON, Answer, parse_answer
from prefect_segmind.asking import Question, asker
from prefect_segmind.console import print_facts
from prefect_segmind.errors import ConfigurationError
from prefect_segmind.price import usd


@contextmanager
def batch_progress(console: Console, *, hidden: bool = False) -> Iterator[Progress]:
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
            yield bar
    finally:
        batch.observer.reset(token)


@contextmanager
def asking(console: Console, bar: Progress, *, yes: bool) -> Iterator[None]:
    """Has a batch ask in the terminal before it pays for a plan that costs more than what needs no approval.

    Args:
        console: Where people read.
        bar: Makes room for the question.
        yes: Whether to go on without asking.
    """

    def ask(question: Question) -> Answer:
        if yes:
            return Answer(GO_ON)
        if not sys.stdin.isatty():
            raise ConfigurationError(
                f"approve_above_usd: the plan costs {usd(question.plan.planned_usd)} USD, more than "
                f"{usd(question.above_usd)} USD, and nobody can be asked here; run it in a terminal, or with --yes"
            )
        bar.stop()
        print_facts(console, question.plan.facts() | {f"asset {name}": prompt for name, prompt in question.prompts})
        told = f"More than {usd(question.above_usd)} USD needs a yes. Go on? yes, no, or an amount in USD to trim to: "
        answer = None
        while answer is None:
            answer = parse_answer(console.input(escape(told)))
        bar.start()
        return answer

    token = asker.set(ask)
    try:
        yield
    finally:
        asker.reset(token)


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
