"""Standard streams of a command: an output that cannot be encoded or written never fails the work."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)
"""The reader is gone: a pipe into `head`, a closed terminal."""


class UnfailingStream:
    """A text stream that never fails: what cannot be encoded is replaced, what cannot be written is dropped.

    A picture is paid for by the time it is printed, and the exit code is that of the work.

    Args:
        stream: The stream.
        name: Its name in messages, such as `standard output`.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Writes a text, or drops it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Flushes, or drops what is left."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        """Redirects the stream to the null device, and reports that unless the reader is gone."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()  # its buffer too, or it would fail again when the process ends
        if error.errno not in _GONE:
            print(f"{self._name} cannot be written: {error.strerror}", file=sys.stderr)


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Makes standard output and standard error unfailing, and standard input replace what it cannot decode."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    _open_what_was_closed()
    with ExitStack() as stack:
        # A stream that was closed before the command began is None.
        for stream, name, redirect in (
            (sys.stdout, "standard output", redirect_stdout),
            (sys.stderr, "standard error", redirect_stderr),
        ):
            if stream is not None:
                unfailing: Any = UnfailingStream(stream, name)
                stack.callback(unfailing.flush)
                stack.enter_context(redirect(unfailing))
        yield


def _open_what_was_closed() -> None:
    """Opens the null device for standard streams that were closed (`>&-`).

    Otherwise the next opened file gets their number, and the output of child processes; Prefect's temporary server does
    not even start.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number, which is this one


def restart_in_utf8() -> None:
    """Restarts the command in Python's UTF-8 mode where its locale is ASCII only.

    Prompts and file names would be unreadable there. Output still uses the terminal's encoding.
    """
    if sys.getfilesystemencoding() != "ascii":
        return
    os.environ["PYTHONUTF8"] = "1"
    encoding = sys.stdout.encoding if sys.stdout is not None else "ascii"
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:replace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def unreadable(arguments: Sequence[str]) -> str | None:
    """The first argument that is not text: bytes in another encoding than the locale's."""
    for each in arguments:
        try:
            each.encode("utf-8")
        except UnicodeEncodeError:
            return each
    return None
