"""Loggers whose lines a test reads."""

from __future__ import annotations

import logging


def listening(said: list[str], level: int = logging.INFO) -> logging.Logger:
    """A logger whose lines go to a list."""

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log = logging.Logger("tests.walk", level)
    log.addHandler(Heard())
    return log
