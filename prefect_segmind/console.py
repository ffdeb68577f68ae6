"""The terminal of a command: Prefect's log without its tracebacks, and facts in two columns."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console


class QuietConsole(PrefectConsoleHandler):
    """Prefect's console handler without errors: a command says once, at its end, what failed and what to do.

    Prefect itself logs a failure four times, three of them with a traceback. `--verbose` brings that back, and the
    log in Prefect's UI keeps it all.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Shows what is no error."""
        if record.levelno < logging.ERROR:
            super().emit(record)


class BatchConsole(QuietConsole):
    """The terminal of a batch: of its task runs only what is about money or failure, for there are many of them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Shows what is no error, and of task runs what is at least a warning."""
        if record.levelno >= logging.WARNING or "task_runs" not in record.name:
            super().emit(record)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Prints a line for each fact, its title in bold; long lines are left to the terminal, so that paths stay whole."""
    width = max(map(len, facts))
    for title, text in facts.items():
        console.print(f"[bold]{title:>{width}}[/]  ", end="")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
