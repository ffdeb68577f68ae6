"""Keeps secrets out of the log lines of HTTP and S3 libraries, which print whole addresses and headers."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from prefect_segmind.redaction import redact

LIBRARIES: Final = frozenset({"boto3", "botocore", "h11", "h2", "hpack", "httpcore", "httpx", "s3transfer", "urllib3"})
"""The libraries whose lines are redacted, by the first part of a logger's name."""


@dataclass(frozen=True)
class _Redacting:
    """A factory of log records. What is in a record is redacted before any filter, handler or formatter sees it.

    Attributes:
        made: The factory that was there before.
    """

    made: Callable[..., logging.LogRecord]

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self.made(*args, **kwargs)
        if record.name.partition(".")[0] not in LIBRARIES:
            return record
        try:
            record.msg = redact(record.getMessage())
        except Exception as error:  # noqa: BLE001 - logging would print the arguments that it cannot format
            record.msg = f"a line that cannot be formatted ({type(error).__name__})"
        record.args = None
        if record.exc_info:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info))).rstrip()
            record.exc_info = None
        return record


def guard_logs() -> None:
    """Redacts what the libraries log from now on, at every level and in every configuration of logging.

    Called whenever a client is made. A factory of log records that was set before stays in use.
    """
    if not isinstance(made := logging.getLogRecordFactory(), _Redacting):
        logging.setLogRecordFactory(_Redacting(made))
