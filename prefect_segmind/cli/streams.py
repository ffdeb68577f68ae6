"""What a command prints and reads: whatever the terminal or the pipe can take, it never fails what was done."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)
"""Nobody reads any more: a pipe into `head`, a terminal that was closed."""


class UnfailingStream:
    """A text stream to which writing never fails: what cannot be encoded is replaced, what cannot be written is lost.

    A picture is paid for by the time it is told, and the exit code is that of the work.

    Args:
        stream: The stream.
        name: What people call it.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Writes a text, or loses it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flushes, or loses what is left."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        """Sends this and all that follows nowhere, and says so unless it is known that nobody reads."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()  # its buffer too, or it would fail again when the process ends
        if error.errno not in _GONE:
            print(f"{self._name} cannot be written: {error.strerror}", file=sys.stderr)


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Makes standard output and standard error unfailing; what is typed is never undecodable either."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    _open_what_was_closed()
    with ExitStack() as stack:
        # A stream that was closed before the command began is None, and takes nothing.
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
    """Gives standard streams that were closed (`>&-`) the null device.

    Else the next file that is opened gets their number, and what a child process prints; Prefect's temporary server
    does not even start.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one


def begin_in_utf8() -> None:
    """Begins the command anew in Python's UTF-8 mode where its locale knows ASCII only.

    Prompts and names of files would be unreadable there. The terminal goes on getting what it can show.
    """
    if sys.getfilesystemencoding() != "ascii":
        return
    os.environ["PYTHONUTF8"] = "1"
    encoding = sys.stdout.encoding if sys.stdout is not None else "ascii"
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:replace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def unreadable(arguments: Sequence[str]) -> str | None:
    """The first argument that is no text: bytes of another encoding than the locale's, which nothing could store."""
    for each in arguments:
        try:
            each.encode("utf-8")
        except UnicodeEncodeError:
            return each
    return None
