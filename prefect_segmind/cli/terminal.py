"""The terminal of a command: its warnings above one live line, and facts in two columns."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console

people = Console(stderr=True)
"""Where people read, besides the result itself: all of it, so that a live line stays below the other lines."""

_PACKAGE = Path(__file__).parents[1]


class CommandConsole(PrefectConsoleHandler):
    """Prefect's console handler, printing where the rest of the command does: above its live line, never into it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Shows a line of the log."""
        colour = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else ""
        try:
            people.print(self.format(record), style=colour, markup=False, highlight=False, soft_wrap=True)
        except Exception:  # noqa: BLE001
            self.handleError(record)


class QuietConsole(CommandConsole):
    """The terminal of a command without `--verbose`: the warnings of this package, and nothing of Prefect's own.

    A command tells at its end what was done and what failed, each once. Prefect logs a failure four times, three of
    them with a traceback; its UI keeps it all. What the end tells again is logged with `told_at_end`.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Shows a warning of this package that nothing else tells."""
        ours = Path(record.pathname).is_relative_to(_PACKAGE)
        if ours and record.levelno == logging.WARNING and not getattr(record, "told_at_end", False):
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """The time and the message, with the job where the message does not name it: a command has one run."""
        message = record.getMessage()
        job = (getattr(record, "task_run_name", None) or "").partition(" ")[2]
        told = message if job in message else f"{job}: {message}"
        return f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {told}"


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Prints a line for each fact, its title in bold; long lines are left to the terminal, so that paths stay whole."""
    width = max(map(len, facts))
    for title, text in facts.items():
        console.print(f"[bold]{title:>{width}}[/]  ", end="")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
