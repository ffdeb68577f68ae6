"""The terminal while a command runs: one live line, and the approval of a batch's cost."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from prefect_segmind.batch import tally
from prefect_segmind.batch.approval import GO_ON, Reply, parse_reply, within_budget
from prefect_segmind.batch.tally import BatchResult
from prefect_segmind.cli.output import address_in_ui
from prefect_segmind.cli.terminal import print_facts
from prefect_segmind.errors import ConfigurationError
from prefect_segmind.limits.ledger import Ledger
from prefect_segmind.money import usd
from prefect_segmind.reporting.listener import Listener, Question
from prefect_segmind.text import visible


class _Left(TimeRemainingColumn):
    """The time left, once the total is known."""

    def render(self, task: Task) -> Text:
        """The time with the word `left`; nothing before the total is known."""
        return Text() if task.total is None else super().render(task).append(" left")


class _Line(ProgressColumn):
    """The text of the line, as it is."""

    def render(self, task: Task) -> Text:
        """The text."""
        return Text(visible(task.fields["line"]))


def live(console: Console, line: str, *columns: ProgressColumn) -> Progress:
    """A live line at the bottom of the terminal, shown inside a `with`.

    Args:
        console: Where to draw it; nothing is drawn without a terminal.
        line: Its text at first.
        columns: The columns right of the text.
    """
    bar = Progress(
        SpinnerColumn("line"),
        _Line(),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bar.add_task("", total=None, line=line)
    return bar


class Run(Listener):
    """The flow run of a command.

    Attributes:
        ledger: The ledger of its requests, once it has ended; empty until then.
        result: The result of a batch, once it has ended.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.result: BatchResult | None = None
        self._flow_run_id: str | None = None

    def began(self, flow_run_id: str) -> None:
        """Keeps the id of the flow run."""
        self._flow_run_id = flow_run_id

    def ended(self, ledger: Ledger, result: BatchResult | None = None) -> None:
        """Keeps the ledger and the result."""
        self.ledger, self.result = ledger, result

    def facts(self) -> dict[str, str]:
        """The line that the terminal shows for its address in Prefect's UI, by title."""
        return {"in the UI": address_in_ui(self._flow_run_id)} if self._flow_run_id else {}


class BatchRun(Run):
    """The flow run of a batch: shows a progress bar, and asks in the terminal for approval.

    Args:
        console: Where to draw and to ask; nothing is drawn without a terminal.
        yes: Whether to approve any cost without asking.

    Attributes:
        bar: A progress bar: done, reused, failed, USD and the time left; to be entered while the batch runs.
    """

    def __init__(self, console: Console, *, yes: bool) -> None:
        super().__init__()
        self._console = console
        self._yes = yes
        self.bar = live(console, "planning", BarColumn(), TimeElapsedColumn(), _Left())

    def progressed(self, progress: tally.Progress) -> None:
        """Updates the bar."""
        reused = progress.counts["reused"] + progress.counts["recovered"]
        submitted = f"{progress.counts['submitted']} submitted, " if progress.counts["submitted"] else ""
        self.bar.update(
            self.bar.task_ids[0],
            total=progress.total,
            completed=progress.done,
            line=f"{progress.done}/{progress.total}: {reused} reused, {progress.counts['failed']} failed, {submitted}"
            f"{usd(progress.cost_usd)} USD",
        )

    def ask(self, question: Question) -> Reply:
        """Asks in the terminal.

        Raises:
            ConfigurationError: Standard input is not a terminal.
        """
        if self._yes:
            return Reply(GO_ON)
        if not sys.stdin.isatty():
            unpaid = "; prefect-segmind reconcile fetches what is paid for already" if question.plan.ask else ""
            raise ConfigurationError(
                f"approve_above_usd: the plan costs {question.plan.planned}, more than {usd(question.above_usd)} USD, "
                f"and this is not a terminal; run it in a terminal, or with --yes{unpaid}"
            )
        self.bar.stop()
        print_facts(
            self._console,
            question.plan.facts()
            | {"goes live": question.goes_live()}
            | {f"asset {name}": prompt for name, prompt in question.prompts},
        )
        may_cost = usd(within_budget(question.plan.planned_usd, question.plan.budget_usd))
        line = f"This run may cost {may_cost} USD. Continue? [yes/no/limit in USD]: "
        answer = None
        while answer is None:
            answer = parse_reply(self._console.input(escape(line)))
        self.bar.start()
        return answer
