"""Failures of a disk as errors of this package, with the reason and what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from prefect_segmind.errors import SegmindError, StoreAccessError, StoreError

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def reason(error: Exception) -> str:
    """The system's message, such as `Permission denied`, without the error's number and path.

    Args:
        error: The failure.
    """
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def disk_errors(failure: str, kind: type[SegmindError] = StoreError, remedy: str = "") -> Iterator[None]:
    """Turn the system's errors into errors of this package.

    Args:
        failure: What failed, such as `cannot read /srv/pictures/hat.png`.
        kind: The class of the error; a plain `StoreError` becomes a `StoreAccessError` if permission is denied.
        remedy: What to do, instead of the usual advice.

    Raises:
        SegmindError: Of this kind, for each OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            advice = "the disk or a quota is full: free some space and run again"
        elif error.errno in _DENIED:
            advice = "check the owner and mode of the folder"
            kind = StoreAccessError if kind is StoreError else kind
        elif error.errno == errno.EXDEV:
            advice = "both places must be on one disk"
        else:
            advice = "check the folder and its disk"
        raise kind(f"{failure}: {reason(error)}; {remedy or advice}") from error
