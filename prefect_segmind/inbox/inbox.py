"""An inbox: a folder or a prefix in a bucket for new images, and its folders `done/` and `failed/`.

`Memory` keeps the state of one visit for the next, so that no file is waited for or reported twice; its loss does no
harm.
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
    r"(?is)[.~].*|.*~|.*\.(part|partial|filepart|tmp|crdownload|download)"  # hidden or incomplete
    r"|@eadir|@recycle|#recycle|#snapshot|\$recycle\.bin|system volume information|lost\+found|__macosx"  # of a system
    r"|thumbs\.db|desktop\.ini"
)


@dataclass(frozen=True)
class InboxFile:
    """An image in an inbox, in one version.

    Attributes:
        location: An absolute path or `s3://bucket/key`.
        below: Its path below the inbox.
        version: Changes with the file: its size and, on disk, the time of its last change or, in a bucket, its ETag.
        arrived: When this version arrived, in seconds since 1970; on disk not the date that a copy takes from its
            source. Ignored in comparisons, since a bucket may round it in different ways.
    """

    location: str
    below: str
    version: str
    arrived: float = field(default=0.0, compare=False)


class Look(NamedTuple):
    """The result of one visit, sorted by the paths below the inbox.

    Attributes:
        settled: Images that are complete.
        unsettled: Images that are still being written.
        ignored: Visible files without an image's extension, links, and unreadable paths.
        unreadable: The unreadable paths, with the reason.
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
        now: That moment.
        images: The images.
        skipped: All other visible paths; with the reason if one may be an image.
    """

    def __init__(self, now: float) -> None:
        self.now = now
        self.images: dict[str, Seen] = {}
        self.skipped: dict[str, str] = {}

    def skip(self, below: str, why: str = "") -> None:
        """Skip a path.

        Args:
            below: The path below the inbox.
            why: The reason, if it may be an image.
        """
        self.skipped[writable(below)] = why


class _Visit(BaseModel):
    """The state of a visit: versions of files by their paths below the inbox."""

    settled: dict[str, str] = {}
    reported: dict[str, str] = {}


class Memory:
    """The state of the last visit to an inbox, kept in the archive for every machine.

    Args:
        store: The archive's.
        inbox: The address of the inbox.
        name: The template of the pictures: two templates for one inbox have separate memories.
    """

    def __init__(self, store: Store, inbox: str, name: str) -> None:
        self._store = store
        self._key = f".segmind/inbox/{hashlib.sha256(json.dumps([inbox, name]).encode()).hexdigest()}.json"

    @cached_property
    def _last(self) -> _Visit:
        found = self._store.get(self._key)
        try:
            return _Visit.model_validate_json(found.data) if found else _Visit()
        except ValidationError:  # of another version, or half written: as before the first visit
            return _Visit()

    def settled(self) -> Mapping[str, str]:
        """The versions of files that were complete, by their paths below the inbox.

        Raises:
            StoreError: The archive cannot be read.
        """
        return self._last.settled

    def has_reported(self, file: InboxFile) -> bool:
        """Whether this version of a file has been reported as bad.

        Args:
            file: The file.

        Raises:
            StoreError: The archive cannot be read.
        """
        return self._last.reported.get(file.below) == file.version

    def keep(self, settled: Iterable[InboxFile], reported: Iterable[InboxFile]) -> None:
        """Replace the state of the last visit, if this one differs.

        Args:
            settled: Complete files.
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

    Args:
        url: The absolute path of the folder, or `s3://bucket/prefix`.
        done: The name of its folder for images whose picture is archived.
        failed: The name of its folder for images that cannot be used.

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
        """List the inbox twice, so that no image is taken while it is being written.

        An image is settled if it is not empty and the same in both listings. On disk it must also be older than the
        time between them by this machine's clock; a date in the future, by another machine's clock, does not count.
        An image that was settled in an earlier visit and has not changed needs no second listing. An empty image may
        still be filled for an hour.

        Args:
            settle_seconds: How long a file must not change.
            pause: Waits that long; not called without new images.
            known: The versions of files that were settled before, by their paths below the inbox; not called without
                images.

        Raises:
            StoreError: The inbox cannot be listed.
        """
        first = second = self._list()
        before = known() if first.images else {}
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
        skipped = sorted(second.skipped.items())
        unreadable = tuple(f"{below}: {why}" for below, why in skipped if why)
        return Look(tuple(settled), tuple(unsettled), tuple(below for below, _ in skipped), unreadable, tuple(empty))

    def move_done(self, file: InboxFile) -> str | None:
        """Move a file into `done/`, with its subfolders, without replacing another file.

        If its name is taken, the start of its SHA-256 is appended: `cup-1a2b3c4d.jpg`. If the file of that name has the
        same content, this one is removed.

        Args:
            file: The file as listed.

        Returns:
            Its new address; None if it is gone or has changed since it was listed, and a changed file stays.

        Raises:
            StoreError: It cannot be moved.
        """
        return self._move(file, self._done)

    def move_failed(self, file: InboxFile) -> str | None:
        """Move a file into `failed/`, as `move_done` does into `done/`.

        Args:
            file: The file as listed.

        Returns:
            As for `move_done`.

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
    """Names for a file: `cup.jpg`, `cup-1a2b3c4d.jpg`, `cup-1a2b3c4d-2.jpg` and so on, short enough for any disk.

    Args:
        name: Its present name.
        content: Reads its content.
    """
    yield name
    stem, _, extension = name.rpartition(".")
    stem = f"{stem[:50]}-{hashlib.sha256(content()).hexdigest()[:8]}"
    yield f"{stem}.{extension}"
    yield from (f"{stem}-{number}.{extension}" for number in count(2))
