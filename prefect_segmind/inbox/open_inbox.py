"""An inbox: a folder or a prefix in a bucket, into which people put images, and where they move: `done/`, `failed/`.

What lies there is to be done, what lies in `done/` is done. What a visit remembers for the next one (`Memory`) spares
waiting and telling the same thing twice; nothing is lost where it is.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from prefect_segmind.errors import ConfigurationError, StoreError, writable
from prefect_segmind.pipeline.source import found_path
from prefect_segmind.storage.open_store import given_text, open_store
from prefect_segmind.storage.store import FULL, Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_IMAGE = re.compile(r"(?is).+\.(jpe?g|jfif|png|webp|tiff?|bmp|gif|avif|jp2|hei[cf])")
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


class _Listing:
    """What one look shows, by the paths below the inbox: the images, what is ignored, and why if it is unreadable.

    Args:
        now: The time of the look, in seconds since 1970, by the clock that dates the files.
    """

    def __init__(self, now: float) -> None:
        self.now = now
        self.images: dict[str, _Seen] = {}
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


class _Seen(NamedTuple):
    file: InboxFile
    size: int
    written: float


def open_inbox(place: str, s3: Callable[[], S3Client], *, done: str = "done", failed: str = "failed") -> Inbox:
    """The inbox at a place.

    Args:
        place: An existing folder (`~` is the home) or `s3://bucket/prefix`, where nothing has to be yet.
        s3: Makes the S3 client, when one is needed.
        done: The folder in it for what is done.
        failed: The folder in it for what cannot be done.

    Raises:
        ConfigurationError: The place is of no such kind, or there is no such folder.
    """
    for folder, what in ((done, "done"), (failed, "failed")):
        if not folder.strip(". ") or re.search(r"[/\\\0]", folder):
            told = f"inbox: {folder!r} cannot be the folder for what is {what}; write one name, such as {what}"
            raise ConfigurationError(told)
    place = given_text("inbox", place) or ""
    try:
        if place.lower().startswith("s3:"):
            return _Bucket(place, s3, done, failed)
        return _Folder(place, found_path(open_store(place).url), done, failed)
    except ConfigurationError as error:
        raise ConfigurationError(f"inbox: {error}") from None


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
    def _list(self) -> _Listing:
        """What lies there now."""

    def _is_young(self, seen: _Seen, now: float, seconds: float) -> bool:
        return False

    def _passes_over(self, below: str) -> bool:
        segments = below.split("/")
        return (
            not segments[-1] or segments[0] in (self._done, self._failed) or any(map(_PASSED_OVER.fullmatch, segments))
        )


def _names(name: str, content: Callable[[], bytes]) -> Iterator[str]:
    """`cup.jpg`, `cup-1a2b3c4d.jpg`, `cup-1a2b3c4d-2.jpg` and so on, short enough for any disk."""
    yield name
    stem, _, extension = name.rpartition(".")
    stem = f"{stem[:50]}-{hashlib.sha256(content()).hexdigest()[:8]}"
    yield f"{stem}.{extension}"
    yield from (f"{stem}-{number}.{extension}" for number in count(2))


class _Folder(Inbox):
    def __init__(self, place: str, folder: Path, done: str, failed: str) -> None:
        _require_folder(place, folder)
        super().__init__(str(folder), done, failed)
        self._folder = folder

    def _move(self, file: InboxFile, into: str) -> str | None:
        source, target = Path(file.location), self._folder / into / file.below
        held = target.with_name(f"moving-{uuid4().hex}{target.suffix}")
        with _told(f"move {source} to {target}"):
            try:
                if _version(source.lstat()) != file.version:
                    return None
                target.parent.mkdir(parents=True, exist_ok=True)
                # What has that name at this moment is taken in one step to where only this run writes, then judged.
                source.replace(held)
            except FileNotFoundError:
                return None
        with _told(f"move {held} to {target}"):
            if _version(held.lstat()) == file.version:
                return str(_give_name(held, target))
            _give_name(held, source, plain=False)  # a new upload goes back, beside one that may be even newer
        return None

    def _list(self) -> _Listing:
        listing = _Listing(time.time())

        def skip(error: OSError) -> None:
            if error.filename == self.url:
                raise error
            if not isinstance(error, FileNotFoundError):
                listing.skip(Path(error.filename).relative_to(self._folder).as_posix(), _reason(error))

        with _told(f"read the inbox {self.url}"):
            for here, folders, names in os.walk(self._folder, onerror=skip):
                paths = {Path(here, name): name for name in (*folders, *names)}
                folders.clear()
                for path, name in paths.items():
                    below = path.relative_to(self._folder).as_posix()
                    if self._passes_over(below):
                        continue
                    try:
                        facts = path.lstat()
                    except OSError as error:
                        if not isinstance(error, FileNotFoundError):
                            listing.skip(below, _reason(error))
                        continue
                    if stat.S_ISDIR(facts.st_mode):  # no link: they lead in circles and anywhere
                        folders.append(name)
                    elif not stat.S_ISREG(facts.st_mode) or not _IMAGE.fullmatch(writable(below)):
                        listing.skip(below)
                    elif writable(below) != below:
                        listing.skip(below, "its name is no UTF-8; rename it")
                    else:
                        file = InboxFile(str(path), below, _version(facts), facts.st_ctime)
                        listing.images[below] = _Seen(file, facts.st_size, facts.st_mtime)
        return listing

    def _is_young(self, seen: _Seen, now: float, seconds: float) -> bool:
        return 0 <= now - seen.written < seconds


def _require_folder(place: str, folder: Path) -> None:
    above = folder.parent
    try:
        if folder.is_dir():
            return
        if folder.exists():
            raise ConfigurationError(f"{place} is a file; name the folder that it lies in")
        names = [each.name for each in above.iterdir() if each.is_dir()] if above.is_dir() else []
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{place} cannot be read: {error}") from None
    near = difflib.get_close_matches(folder.name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"looked in {above}"
    raise ConfigurationError(f"{place} does not exist ({hint}); create the folder or correct its path")


def _version(facts: os.stat_result) -> str:
    return f"{facts.st_size} {facts.st_mtime_ns}"


def _give_name(held: Path, wanted: Path, *, plain: bool = True) -> Path:
    """Gives a file that only this run knows the wanted name or, where that is taken or not to be had, the next."""
    names = islice(_names(wanted.name, held.read_bytes), 0 if plain else 1, None)
    while True:
        path = wanted.with_name(next(names))
        try:
            path.open("xb").close()  # from here on the name is ours; of several runs one gets it
        except FileExistsError:
            if path.is_file() and path.read_bytes() == held.read_bytes():
                held.unlink()
                return path
        else:
            return held.replace(path)


def _reason(error: OSError) -> str:
    return f"it cannot be read: {error.strerror or error}; check its owner and mode"


@contextmanager
def _told(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "check the owner and mode of the folders"
        if error.errno in FULL:
            advice = "free some space there"
        elif error.errno == errno.EXDEV:
            advice = "the inbox and its folder for what is done must be on one disk"
        raise StoreError(f"cannot {doing}: {error.strerror or error}; {advice}") from error


class _Bucket(Inbox):
    """Servers honour all conditions or some or none, and do not say which: so each is also looked at beforehand."""

    def __init__(self, place: str, s3: Callable[[], S3Client], done: str, failed: str) -> None:
        from prefect_segmind.storage.s3 import split_uri  # boto3 takes a second to import

        self._bucket, prefix = split_uri(place)
        self._root = f"{prefix.strip('/')}/".lstrip("/")
        super().__init__(f"s3://{self._bucket}/{self._root}".rstrip("/"), done, failed)
        self._client = s3()

    def _move(self, file: InboxFile, into: str) -> str | None:
        from prefect_segmind.storage.s3_errors import explained

        etag = f'"{file.version.partition(" ")[2]}"'
        with explained(f"move {file.location} to {self.url}/{into}", self._client):
            before = self._head(file.below)
            if before is None or before.file != file:
                return None
            try:
                target = self._copy(file.below, into, etag)
            except self._client.exceptions.ClientError:
                if self._head(file.below) != before:
                    return None
                raise
            try:
                if self._head(file.below) == before:
                    self._ask(self._client.delete_object, {"IfMatch": etag}, Key=self._root + file.below)
            except self._client.exceptions.ClientError:
                if self._head(file.below) == before:
                    raise
        return f"{self.url}/{target}"

    def _copy(self, below: str, into: str, etag: str) -> str:
        source = {"Bucket": self._bucket, "Key": self._root + below}
        folder, _, name = below.rpartition("/")
        names = _names(name, lambda: self._read(below))
        while True:
            target = "/".join(filter(None, (into, folder, next(names))))
            if self._head(target) is None:
                copy = {"Key": self._root + target, "CopySource": source, "CopySourceIfMatch": etag}
                try:
                    self._ask(self._client.copy_object, {"IfNoneMatch": "*"}, **copy)
                    return target
                except self._client.exceptions.ClientError:
                    if self._head(target) is None:  # else somebody was faster, or the answer to us was lost
                        raise
            if self._read(target) == self._read(below):
                return target

    def _list(self) -> _Listing:
        from prefect_segmind.storage.s3_errors import explained

        listing = _Listing(time.time())
        with explained(f"read the inbox {self.url}", self._client):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._root):
                if date := page["ResponseMetadata"]["HTTPHeaders"].get("date"):
                    listing.now = parsedate_to_datetime(date).timestamp()
                for entry in page.get("Contents", ()):
                    below = entry.get("Key", "")[len(self._root) :]
                    if self._passes_over(below):
                        continue
                    if _IMAGE.fullmatch(below):
                        listing.images[below] = self._seen(below, entry, entry.get("Size", 0))
                    else:
                        listing.skip(below)
        return listing

    def _head(self, below: str) -> _Seen | None:
        try:
            head = self._client.head_object(Bucket=self._bucket, Key=self._root + below)
        except self._client.exceptions.ClientError as error:
            if _status(error) == 404:
                return None
            raise
        return self._seen(below, head, head["ContentLength"])

    def _seen(self, below: str, entry: Any, size: int) -> _Seen:
        etag = entry.get("ETag", "").strip('"')  # rclone quotes it for a HEAD and not in a list
        written = entry["LastModified"].timestamp()
        return _Seen(InboxFile(f"{self.url}/{below}", below, f"{size} {etag}", written), size, written)

    def _ask(self, call: Callable[..., Any], condition: dict[str, str], **request: Any) -> None:
        """Calls with a condition; without it where this boto3 does not have it, or the server does not know it."""
        from botocore.exceptions import ParamValidationError

        try:
            call(Bucket=self._bucket, **request, **condition)
        except (ParamValidationError, self._client.exceptions.ClientError) as error:
            if _status(error) not in (400, 501):
                raise
            call(Bucket=self._bucket, **request)

    def _read(self, below: str) -> bytes:
        with self._client.get_object(Bucket=self._bucket, Key=self._root + below)["Body"] as body:
            return body.read()


def _status(error: Exception) -> int:
    """The status of a refusal; 501, not implemented, where boto3 itself does not know what it is asked."""
    return int(getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 501))
