"""The terminal while a command works: one live line, and the question whether a batch may cost what it will."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from prefect_segmind.batch import tally
from prefect_segmind.batch.approval import GO_ON, Answer, parse_answer
from prefect_segmind.cli.terminal import print_facts
from prefect_segmind.errors import ConfigurationError
from prefect_segmind.flows.approval_form import Question, asker
from prefect_segmind.money import usd


class _Left(TimeRemainingColumn):
    """The time that is left, once it is known how much there is to do."""

    def render(self, task: Task) -> Text:
        """The time, and what it means."""
        return Text() if task.total is None else super().render(task).append(" left")


@contextmanager
def live(console: Console, told: str, *columns: ProgressColumn) -> Iterator[Progress]:
    """Shows one live line while a command works, the last of the terminal; it goes when the command has ended.

    Args:
        console: Where people read; without a terminal nothing is drawn.
        told: What the line says at first.
        columns: What stands right of that.
    """
    bar = Progress(
        SpinnerColumn("line"),
        TextColumn("{task.fields[told]}", markup=False),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bar.add_task("", total=None, told=told)
    with bar:
        yield bar


@contextmanager
def batch_progress(console: Console) -> Iterator[Progress]:
    """Shows a bar while a batch runs: done, reused, failed, USD and the time left.

    Args:
        console: Where people read; without a terminal nothing is drawn.
    """
    with live(console, "planning", BarColumn(), TimeElapsedColumn(), _Left()) as bar:

        def show(progress: tally.Progress) -> None:
            reused = progress.counts["reused"] + progress.counts["recovered"]
            bar.update(
                bar.task_ids[0],
                total=progress.total,
                completed=progress.done,
                told=f"{progress.done}/{progress.total}: {reused} reused, {progress.counts['failed']} failed, "
                f"{usd(progress.cost_usd)} USD",
            )

        token = tally.observer.set(show)
        try:
            yield bar
        finally:
            tally.observer.reset(token)


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
        print_facts(
            console,
            question.plan.facts()
            | {"goes live": question.goes_live()}
            | {f"asset {name}": prompt for name, prompt in question.prompts},
        )
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
