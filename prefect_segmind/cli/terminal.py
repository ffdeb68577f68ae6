"""The terminal of a command: its log above one live line, and facts in two columns.

Prefect loads this module by name while it is imported itself, also in its server's process: so nothing here may import
flows or tasks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.text import Text

from prefect_segmind.text import visible

people = Console(stderr=True, markup=False, emoji=False, highlight=False)
"""Prints everything but the result, so that the live line stays below the other lines; texts as they are."""

_PACKAGE = Path(__file__).parents[1]


class CommandConsole(PrefectConsoleHandler):
    """Prefect's console handler, printing above the command's live line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a line of the log."""
        colour = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else ""
        try:
            people.print(self.format(record), style=colour, soft_wrap=True)
        except Exception:  # noqa: BLE001
            self.handleError(record)


class QuietConsole(CommandConsole):
    """The console handler without `--verbose`: only the warnings of this package.

    A command reports at its end what was done and what failed, each once. Prefect logs a failure four times, three of
    them with a traceback; its UI keeps everything. What the command reports at its end is logged with `told_at_end`.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a warning of this package that the command does not report at its end."""
        ours = Path(record.pathname).is_relative_to(_PACKAGE)
        if ours and record.levelno == logging.WARNING and not getattr(record, "told_at_end", False):
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """The time and the message, with the job's name where the message lacks it."""
        message = record.getMessage()
        job = (getattr(record, "task_run_name", None) or "").partition(" ")[2]
        text = message if job in message else f"{job}: {message}"
        return f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {text}"


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Prints a line for each fact, with its title in bold; long lines are not wrapped, so that paths can be copied.

    Args:
        console: Where to print.
        facts: The lines, by title.
    """
    width = max(map(len, facts))
    for title, text in facts.items():
        line = Text.assemble((visible(f"{title:>{width}}"), "bold"), "  ", visible(text))
        console.print(line, soft_wrap=True)
