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
from prefect_segmind.batch.approval import GO_ON, Reply, parse_reply
from prefect_segmind.batch.tally import BatchResult
from prefect_segmind.cli.output import address_in_ui
from prefect_segmind.cli.terminal import print_facts
from prefect_segmind.errors import ConfigurationError
from prefect_segmind.limits.ledger import Ledger
from prefect_segmind.money import usd
from prefect_segmind.reporting.listener import Listener, Question


class _Left(TimeRemainingColumn):
    """The time that is left, once it is known how much there is to do."""

    def render(self, task: Task) -> Text:
        """The time, and what it means."""
        return Text() if task.total is None else super().render(task).append(" left")


@contextmanager
def live(console: Console, line: str, *columns: ProgressColumn) -> Iterator[Progress]:
    """Shows one live line while a command works, the last of the terminal; it goes when the command has ended.

    Args:
        console: Where people read; without a terminal nothing is drawn.
        line: What it says at first.
        columns: What stands right of that.
    """
    bar = Progress(
        SpinnerColumn("line"),
        TextColumn("{task.fields[line]}", markup=False),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bar.add_task("", total=None, line=line)
    with bar:
        yield bar


class Run(Listener):
    """The run that a command has started: where it is in Prefect's UI, how far it is, what it came to.

    Attributes:
        ledger: What its requests came to, once it has ended.
        result: What came of its assets, once it has ended, if it is a batch.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.result: BatchResult | None = None
        self._flow_run_id: str | None = None

    def began(self, flow_run_id: str) -> None:
        """Keeps which flow run it is."""
        self._flow_run_id = flow_run_id

    def ended(self, ledger: Ledger, result: BatchResult | None = None) -> None:
        """Keeps what it came to."""
        self.ledger, self.result = ledger, result

    def facts(self) -> dict[str, str]:
        """Where people see it."""
        return {"in the UI": address_in_ui(self._flow_run_id)} if self._flow_run_id else {}


class BatchRun(Run):
    """A batch that a command has started: it shows a bar, and asks in the terminal whether it may cost what it will.

    Args:
        console: Where people read; without a terminal nothing is drawn.
        yes: Whether to go on without asking.
    """

    def __init__(self, console: Console, *, yes: bool) -> None:
        super().__init__()
        self._console = console
        self._yes = yes
        self._bar: Progress | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows a bar while the batch runs: done, reused, failed, USD and the time left."""
        with live(self._console, "planning", BarColumn(), TimeElapsedColumn(), _Left()) as bar:
            self._bar = bar
            yield

    def progressed(self, progress: tally.Progress) -> None:
        """Moves the bar."""
        reused = progress.counts["reused"] + progress.counts["recovered"]
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                total=progress.total,
                completed=progress.done,
                line=f"{progress.done}/{progress.total}: {reused} reused, {progress.counts['failed']} failed, "
                f"{usd(progress.cost_usd)} USD",
            )

    def ask(self, question: Question) -> Reply:
        """Asks in the terminal.

        Raises:
            ConfigurationError: There is no terminal.
        """
        if self._yes:
            return Reply(GO_ON)
        if not sys.stdin.isatty():
            raise ConfigurationError(
                f"approve_above_usd: the plan costs {usd(question.plan.planned_usd)} USD, more than "
                f"{usd(question.above_usd)} USD, and nobody can be asked here; run it in a terminal, or with --yes"
            )
        if self._bar is not None:
            self._bar.stop()
        print_facts(
            self._console,
            question.plan.facts()
            | {"goes live": question.goes_live()}
            | {f"asset {name}": prompt for name, prompt in question.prompts},
        )
        line = f"This run may cost {usd(question.plan.planned_usd)} USD. Continue? [yes/no/limit in USD]: "
        answer = None
        while answer is None:
            answer = parse_reply(self._console.input(escape(line)))
        if self._bar is not None:
            self._bar.start()
        return answer
