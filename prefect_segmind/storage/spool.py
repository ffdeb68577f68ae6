"""A list of records on disk."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Generic, Self, TypeVar

from pydantic import BaseModel

from prefect_segmind.storage.disk_errors import disk_errors

M = TypeVar("M", bound=BaseModel)

_CHUNK = 1 << 16  # bytes read at a time; whole lines, so at least one record


class Spool(Generic[M]):
    """Records in a temporary file, in the order of appending: any number of them in little memory.

    Threads may share it. Each iteration starts at the first record; several may run at once, and while records are
    appended.

    Args:
        models: The classes of the records.

    Example:
        >>> from prefect_segmind.jobs.job import Job
        >>> with Spool(Job) as jobs:
        ...     jobs.append(Job(image="mug.jpg", prompt="a red mug"))
        ...     [job.name for job in jobs]
        ['mug']
    """

    def __init__(self, *models: type[M]) -> None:
        self._models = models
        self._numbers = {model: number for number, model in enumerate(models)}
        self._count = self._size = 0
        self._lock = threading.Lock()
        self._at_end = True
        with temporary_file():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the spool

    def append(self, record: M) -> None:
        """Append a record.

        Args:
            record: Of one of the classes.

        Raises:
            StoreError: The disk is full, or the temporary folder cannot be written.
        """
        line = b"%d %s\n" % (self._numbers[type(record)], record.model_dump_json().encode())
        with self._lock, temporary_file():
            if not self._at_end:
                self._file.seek(0, 2)
                self._at_end = True
            self._file.write(line)
            self._count += 1
            self._size += len(line)

    def __len__(self) -> int:
        return self._count

    @property
    def size(self) -> int:
        """About how many bytes of JSON it has."""
        return self._size

    def __iter__(self) -> Iterator[M]:
        for line in self._numbered_lines():
            number, _, text = line.partition(b" ")
            # The records were valid when appended; the context lets all of them through again.
            yield self._models[int(number)].model_validate_json(text, context={"allow_unlisted_resolution": True})

    def lines(self) -> Iterator[bytes]:
        """The records as JSON, a line each, read chunk by chunk while iterated."""
        for line in self._numbered_lines():
            yield line.partition(b" ")[2]

    def _numbered_lines(self) -> Iterator[bytes]:
        offset = 0
        while True:
            with self._lock, temporary_file():
                self._file.seek(offset)
                self._at_end = False
                lines = self._file.readlines(_CHUNK)
                offset = self._file.tell()
            if not lines:
                return
            yield from lines

    def close(self) -> None:
        """Remove the file with all records."""
        with suppress(OSError):  # a record that cannot be flushed is no longer needed
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def temporary_file() -> Iterator[None]:
    """Turn a failure of a temporary file into an error that names its folder.

    Raises:
        StoreError: The disk is full, or the folder is missing or cannot be written.
    """
    folder = "the folder for temporary files"
    with suppress(OSError):  # if no folder for temporary files can be written
        folder = tempfile.gettempdir()
    remedy = f"free some space in {folder}, or set TMPDIR to a folder that can be written and has some"
    with disk_errors("cannot use a temporary file", remedy=remedy):
        yield
