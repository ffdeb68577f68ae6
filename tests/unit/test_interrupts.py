"""A run outlives whoever reads its log."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from prefect.logging.handlers import PrefectConsoleHandler

from prefect_segmind.tasks.interrupts import outlive_the_reader_of_the_log


@pytest.fixture
def unread() -> Iterator[logging.Logger]:
    """Prefect's logger of flow runs, whose lines go through a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    logger, handler = logging.getLogger("prefect.flow_runs"), PrefectConsoleHandler(stream=os.fdopen(writing, "w"))
    before, logger.handlers = logger.handlers, [handler]
    os.close(reading)
    yield logger
    logger.handlers = before
    with pytest.raises(BrokenPipeError):
        handler.console.file.close()


def test_a_log_that_nobody_reads_ends_a_run_unless_it_is_told_not_to(unread: logging.Logger) -> None:
    with pytest.raises(SystemExit):  # as rich does by default
        unread.warning("a picture is archived")


def test_a_run_goes_on_where_nobody_reads_its_log(unread: logging.Logger) -> None:
    outlive_the_reader_of_the_log()
    unread.warning("a picture is archived")
    unread.warning("another one is archived")
