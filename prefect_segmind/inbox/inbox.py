"""An inbox: a folder or a prefix in a bucket, into which people put images, and its folders `done/` and `failed/`.

An image in the inbox is to be done, one in `done/` is done. `Memory` keeps what one visit has seen for the next one, so
that nothing is waited for or reported twice; losing it does no harm.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from prefect_segmind.errors import writable
from prefect_segmind.storage.store import Store

IMAGE_SUFFIX = re.compile(r"(?is).+\.(jpe?g|jfif|png|webp|tiff?|bmp|gif|avif|jp2|hei[cf]|hif)")
EMPTY_SECONDS = 3600.0
"""Seconds for which an empty image may still be filled."""
_LEFT_OUT = re.compile(
    r"(?is)[.~].*|.*~|.*\.(part|partial|filepart|tmp|crdownload|download)"  # hidden, or still on its way
    r"|@eadir|@recycle|#recycle|#snapshot|\$recycle\.bin|system volume information|lost\+found|__macosx"  # a system's
    r"|thumbs\.db|desktop\.ini"
)


@dataclass(frozen=True)
class InboxFile:
    """An image in an inbox, in one version.

    Attributes:
        location: An absolute path or `s3://bucket/key`.
        below: Its path below the inbox.
        version: Changes with the file: its size and, on disk, the time of its last change or, in a bucket, its ETag.
        arrived: When it arrived as it is, in seconds since 1970. On disk a copy does not bring that date along from
            its source. A bucket may round it in different ways, so two are equal without it.
    """

    location: str
    below: str
    version: str
    arrived: float = field(default=0.0, compare=False)


class Look(NamedTuple):
    """What one visit has found, each sorted by the paths below the inbox.

    Attributes:
        settled: Images that are whole.
        unsettled: Images that are still being written.
        ignored: Visible files that are not images by their names, links, and what cannot be read.
        unreadable: What cannot be read, with the reason.
        empty: Images that have been empty for an hour.
    """

    settled: tuple[InboxFile, ...]
    unsettled: tuple[str, ...]
    ignored: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    empty: tuple[InboxFile, ...] = ()


class Listing:
    """The contents of an inbox at one moment, by the paths below it.

    Args:
        now: That moment, in seconds since 1970, by the clock that dates the files.

    Attributes:
        images: The images.
        ignored: Everything else that is visible.
    """

    def __init__(self, now: float) -> None:
        self.now = now
        self.images: dict[str, Seen] = {}
        self.ignored: set[str] = set()
        self._unreadable: dict[str, str] = {}

    def skip(self, below: str, why: str = "") -> None:
        """Ignore a path, with the reason if it may be an image."""
        self.ignored.add(writable(below))
        if why:
            self._unreadable[writable(below)] = why

    def look(
        self, settled: Iterable[InboxFile] = (), unsettled: Iterable[str] = (), empty: Iterable[InboxFile] = ()
    ) -> Look:
        """The result of the visit that ends with this listing."""
        unreadable = tuple(f"{below}: {why}" for below, why in sorted(self._unreadable.items()))
        return Look(tuple(settled), tuple(unsettled), tuple(sorted(self.ignored)), unreadable, tuple(empty))


class _Visit(BaseModel):
    """What is kept of a visit: versions of files by their paths below the inbox."""

    settled: dict[str, str] = {}
    reported: dict[str, str] = {}


class Memory:
    """What the last visit to an inbox has seen. It is kept in the archive, so that every machine has it.

    Args:
        store: The archive's.
        inbox: The address of the inbox.
        name: What the pictures are made with: two templates for one inbox have a memory each.
    """

    def __init__(self, store: Store, inbox: str, name: str) -> None:
        self._store = store
        self._key = f".segmind/inbox/{hashlib.sha256(json.dumps([inbox, name]).encode()).hexdigest()}.json"

    @cached_property
    def _last(self) -> _Visit:
        found = self._store.get(self._key)
        try:
            return _Visit.model_validate_json(found.data) if found else _Visit()
        except ValidationError:  # of another version, or half written: this visit counts as the first one
            return _Visit()

    def settled(self) -> Mapping[str, str]:
        """The versions of files that were whole, by their paths below the inbox.

        Raises:
            StoreError: The archive cannot be read.
        """
        return self._last.settled

    def has_reported(self, file: InboxFile) -> bool:
        """Whether this version of a file has been reported as bad.

        Raises:
            StoreError: The archive cannot be read.
        """
        return self._last.reported.get(file.below) == file.version

    def keep(self, settled: Iterable[InboxFile], reported: Iterable[InboxFile]) -> None:
        """Replace what the last visit has seen, if this one differs.

        Args:
            settled: Files that are whole.
            reported: Bad files that have been reported.

        Raises:
            StoreError: The archive cannot be written.
        """
        visit = _Visit(
            settled={file.below: file.version for file in settled},
            reported={file.below: file.version for file in reported},
        )
        if visit != self._last:
            self._store.put(self._key, visit.model_dump_json().encode(), "application/json")
            self._last = visit


class Seen(NamedTuple):
    """An image in one listing.

    Attributes:
        file: The image.
        size: Its length in bytes.
        written: When it was last written, in seconds since 1970.
    """

    file: InboxFile
    size: int
    written: float


class Inbox(ABC):
    """A folder or a prefix in a bucket for images, with its subfolders.

    Hidden and temporary names and all of `done/` and `failed/` are left out.

    Attributes:
        url: The absolute path of the folder, or `s3://bucket/prefix`.
    """

    def __init__(self, url: str, done: str, failed: str) -> None:
        self.url = url
        self._done, self._failed = done, failed

    def look(
        self,
        settle_seconds: float,
        pause: Callable[[float], object] = time.sleep,
        known: Callable[[], Mapping[str, str]] = dict,
    ) -> Look:
        """List the inbox twice, so that no image is taken that somebody is still writing.

        An image is settled if it is not empty and the same in both listings. On disk it must also be older than the
        time between them by this machine's clock; a date in the future, by another machine's clock, does not count.
        An image that was settled in an earlier visit and is the same needs no second listing. An empty one may still
        be filled for an hour.

        Args:
            settle_seconds: How long nothing may change.
            pause: Waits that long; not called if nothing is new.
            known: The versions of files that were settled before, by their paths below the inbox; not called if there
                is no image.

        Raises:
            StoreError: The inbox cannot be listed.
        """
        first = second = self._list()
        if not first.images:
            return first.look()
        before = known()
        if any(seen.size and before.get(below) != seen.file.version for below, seen in first.images.items()):
            pause(settle_seconds)
            second = self._list()
        settled: list[InboxFile] = []
        unsettled: list[str] = []
        empty: list[InboxFile] = []
        for below, seen in sorted(second.images.items()):
            same = first.images.get(below) == seen
            whole = same and not self._is_young(seen, second.now, settle_seconds)
            if seen.size and (whole or before.get(below) == seen.file.version):
                settled.append(seen.file)
            elif not seen.size and same and second.now - min(seen.written, seen.file.arrived) >= EMPTY_SECONDS:
                empty.append(seen.file)
            else:
                unsettled.append(below)
        return second.look(settled, unsettled, empty)

    def move_done(self, file: InboxFile) -> str | None:
        """Move a file into `done/`, with its subfolders; nothing is ever replaced.

        If its name is taken, the start of its SHA-256 is appended: `cup-1a2b3c4d.jpg`. If the file of that name has the
        same content, this one is just removed.

        Returns:
            Where it is now; None if it is gone or has changed since it was listed, and then what is there stays.

        Raises:
            StoreError: It cannot be moved.
        """
        return self._move(file, self._done)

    def move_failed(self, file: InboxFile) -> str | None:
        """Move a file into `failed/`, as `move_done` does into `done/`.

        Raises:
            StoreError: It cannot be moved.
        """
        return self._move(file, self._failed)

    @abstractmethod
    def _move(self, file: InboxFile, into: str) -> str | None:
        """Move a file into a folder of the inbox."""

    @abstractmethod
    def _list(self) -> Listing:
        """List the inbox."""

    def _is_young(self, seen: Seen, now: float, seconds: float) -> bool:
        return False

    def _leaves_out(self, below: str) -> bool:
        segments = below.split("/")
        return not segments[-1] or segments[0] in (self._done, self._failed) or any(map(_LEFT_OUT.fullmatch, segments))


def safe_names(name: str, content: Callable[[], bytes]) -> Iterator[str]:
    """`cup.jpg`, `cup-1a2b3c4d.jpg`, `cup-1a2b3c4d-2.jpg` and so on, short enough for any disk."""
    yield name
    stem, _, extension = name.rpartition(".")
    stem = f"{stem[:50]}-{hashlib.sha256(content()).hexdigest()[:8]}"
    yield f"{stem}.{extension}"
    yield from (f"{stem}-{number}.{extension}" for number in count(2))
