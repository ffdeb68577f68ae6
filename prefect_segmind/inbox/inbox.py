"""An inbox: a folder or a prefix in a bucket, into which people put images, and where they move: `done/`, `failed/`.

What lies there is to be done, what lies in `done/` is done. What a visit remembers for the next one (`Memory`) spares
waiting and telling the same thing twice; nothing is lost where it is.
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
"""For so long an empty image may still be filled."""
_PASSED_OVER = re.compile(
    r"(?is)[.~].*|.*~|.*\.(part|partial|filepart|tmp|crdownload|download)"  # hidden, or still on its way
    r"|@eadir|@recycle|#recycle|#snapshot|\$recycle\.bin|system volume information|lost\+found|__macosx"  # a system's
    r"|thumbs\.db|desktop\.ini"
)


@dataclass(frozen=True)
class InboxFile:
    """An image as it was looked at.

    Attributes:
        location: An absolute path or `s3://bucket/key`.
        below: Its path below the inbox.
        version: Changes with the file: the size, with the time of its last change on disk, with its ETag in a bucket.
        arrived: When it came there as it is, in seconds since 1970. On disk that is no date that a copy takes along
            from where it was before. How finely a bucket tells it differs, so it is no part of what a file is.
    """

    location: str
    below: str
    version: str
    arrived: float = field(default=0.0, compare=False)


class Look(NamedTuple):
    """What one visit has found, each in the order of the paths below the inbox.

    `unsettled` are images that are still being written; `ignored` what is visible and no image by its name, a link, or
    cannot be read; `unreadable` the last of these, each with the reason; `empty` images that nobody fills any more.
    """

    settled: tuple[InboxFile, ...]
    unsettled: tuple[str, ...]
    ignored: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    empty: tuple[InboxFile, ...] = ()


class Listing:
    """What one look shows, by the paths below the inbox: the images, what is ignored, and why if it is unreadable.

    Args:
        now: The time of the look, in seconds since 1970, by the clock that dates the files.
    """

    def __init__(self, now: float) -> None:
        self.now = now
        self.images: dict[str, Seen] = {}
        self.ignored: set[str] = set()
        self._unreadable: dict[str, str] = {}

    def skip(self, below: str, why: str = "") -> None:
        """Notes what is passed over, and says so if it may be an image."""
        self.ignored.add(writable(below))
        if why:
            self._unreadable[writable(below)] = why

    def look(
        self, settled: Iterable[InboxFile] = (), unsettled: Iterable[str] = (), empty: Iterable[InboxFile] = ()
    ) -> Look:
        """The look, where this is the last listing of it."""
        unreadable = tuple(f"{below}: {why}" for below, why in sorted(self._unreadable.items()))
        return Look(tuple(settled), tuple(unsettled), tuple(sorted(self.ignored)), unreadable, tuple(empty))


class _Note(BaseModel):
    """What is kept of a visit: versions of files by their paths below the inbox."""

    settled: dict[str, str] = {}
    reported: dict[str, str] = {}


class Memory:
    """What the last visit to an inbox has seen. It lies in the archive, so that it is there on any machine.

    Args:
        store: The archive's.
        inbox: Address of the inbox.
        name: What the visits make of it: two templates for one inbox have a memory each.
    """

    def __init__(self, store: Store, inbox: str, name: str) -> None:
        self._store = store
        self._key = f".segmind/inbox/{hashlib.sha256(json.dumps([inbox, name]).encode()).hexdigest()}.json"

    @cached_property
    def _note(self) -> _Note:
        found = self._store.get(self._key)
        try:
            return _Note.model_validate_json(found.data) if found else _Note()
        except ValidationError:  # of another version, or half written; then this visit is as the first one
            return _Note()

    def settled(self) -> Mapping[str, str]:
        """The versions of files that were seen whole, by their paths below the inbox.

        Raises:
            StoreError: The archive cannot be read.
        """
        return self._note.settled

    def has_reported(self, file: InboxFile) -> bool:
        """Whether somebody has been told that this very version of a file is bad.

        Raises:
            StoreError: The archive cannot be read.
        """
        return self._note.reported.get(file.below) == file.version

    def keep(self, settled: Iterable[InboxFile], reported: Iterable[InboxFile]) -> None:
        """Keeps what this visit has seen in the place of what the last one had, if it differs.

        Args:
            settled: Files that were seen whole.
            reported: Bad files of which somebody has been told.

        Raises:
            StoreError: The archive cannot be written.
        """
        note = _Note(
            settled={file.below: file.version for file in settled},
            reported={file.below: file.version for file in reported},
        )
        if note != self._note:
            self._store.put(self._key, note.model_dump_json().encode(), "application/json")
            self._note = note


class Seen(NamedTuple):
    """An image as one listing shows it."""

    file: InboxFile
    size: int
    written: float


class Inbox(ABC):
    """A place for images, subfolders included.

    Hidden and temporary names and all of `done/` and `failed/` are passed over.
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
        """Looks twice, so that nothing is taken that somebody is still writing.

        Settled is what is not empty and the same in both looks. On disk it is also older than the time between them,
        by this machine's clock; a date in the future, as of another machine's clock, says nothing and does not count.
        What was settled in an earlier visit and is the same needs no second look. An empty image may still be filled;
        after an hour nobody does.

        Args:
            settle_seconds: How long nothing may change.
            pause: Waits that long; not called where nothing is new.
            known: The versions of files that were settled before, by their paths below the inbox; not called where
                there is no image.

        Raises:
            StoreError: The place cannot be listed.
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
        """Moves a file into `done/`, there as deep as it was in the inbox; nothing is ever replaced.

        Where its name is taken it gets the start of its SHA-256 as well, `cup-1a2b3c4d.jpg`; where that very content
        lies there already, the file is just removed.

        Returns:
            Where it is now; None if it is gone or no longer what was looked at, and then what is there stays.

        Raises:
            StoreError: It cannot be moved.
        """
        return self._move(file, self._done)

    def move_failed(self, file: InboxFile) -> str | None:
        """Moves a file into `failed/`, as `move_done` does into `done/`.

        Raises:
            StoreError: It cannot be moved.
        """
        return self._move(file, self._failed)

    @abstractmethod
    def _move(self, file: InboxFile, into: str) -> str | None:
        """Moves a file into a folder of the inbox."""

    @abstractmethod
    def _list(self) -> Listing:
        """What lies there now."""

    def _is_young(self, seen: Seen, now: float, seconds: float) -> bool:
        return False

    def _passes_over(self, below: str) -> bool:
        segments = below.split("/")
        return (
            not segments[-1] or segments[0] in (self._done, self._failed) or any(map(_PASSED_OVER.fullmatch, segments))
        )


def safe_names(name: str, content: Callable[[], bytes]) -> Iterator[str]:
    """`cup.jpg`, `cup-1a2b3c4d.jpg`, `cup-1a2b3c4d-2.jpg` and so on, short enough for any disk."""
    yield name
    stem, _, extension = name.rpartition(".")
    stem = f"{stem[:50]}-{hashlib.sha256(content()).hexdigest()[:8]}"
    yield f"{stem}.{extension}"
    yield from (f"{stem}-{number}.{extension}" for number in count(2))
