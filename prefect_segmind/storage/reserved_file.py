"""A file for bytes that are still to come, with space on the disk reserved for them.

The space is a file beside it, `….space.part`: so the file itself is exactly as long as what has come, whatever ends the
process. When the disk is full, the space is given up for the bytes that it was reserved for.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

SPACE_SUFFIX: Final = ".space.part"
"""Of the file that holds the space. Earlier versions have it in the `.part` itself, and ignore one of that size."""
_FULL: Final = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_CANNOT_RESERVE: Final = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


class Writer(Protocol):
    """Writes bytes behind those that were written before."""

    def __call__(self, data: bytes) -> None:
        """Write them; they are with the system when it returns, and survive the end of the process."""


def reserve(file: Path, size: int) -> None:
    """Create an empty file that only this user can read, and reserve space for it where the system supports that.

    Args:
        file: Its path; a file there loses its content.
        size: The number of bytes.

    Raises:
        OSError: The file cannot be created, or there is not enough space.
    """
    with file.open("wb"):
        file.chmod(0o600)
    if sys.platform == "linux":
        with _space(file).open("wb") as space:
            try:
                os.posix_fallocate(space.fileno(), 0, size)
            except OSError as error:  # some file systems cannot
                if error.errno not in _CANNOT_RESERVE:
                    raise


def release(file: Path) -> bool:
    """Give up the space reserved for a file.

    Args:
        file: Its path.

    Returns:
        Whether there was any.
    """
    with suppress(OSError):
        _space(file).unlink()
        return True
    return False


@contextmanager
def replacing(file: Path) -> Iterator[Writer]:
    """Replace the content of a file, piece by piece and without a buffer; at the end its reserved space is given up.

    Args:
        file: Its path; it is created, for this user alone, if there is none.

    Raises:
        OSError: It cannot be written; when the disk is full, only after its reserved space was used up too.
    """
    at = 0

    def write(data: bytes) -> None:
        nonlocal at
        rest = memoryview(data)
        while rest:
            try:
                written = raw.write(rest)  # of a disk that gets full, a part fits
            except OSError as error:
                if error.errno not in _FULL or not release(file):
                    raise
                raw.seek(at)  # wherever the failure has left it
            else:
                rest = rest[written:]
                at += written

    try:
        file.touch(0o600)
        with file.open("wb", buffering=0) as raw:
            yield write
    finally:
        release(file)


def _space(file: Path) -> Path:
    return file.with_suffix(SPACE_SUFFIX)
