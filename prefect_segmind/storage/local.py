"""A store in a local folder."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import IO
from uuid import uuid4

from prefect_segmind.errors import StoreError
from prefect_segmind.storage.disk_errors import disk_errors, reason
from prefect_segmind.storage.store import Conditions, Facts, StoredObject, require

LOCK_KEY = ".segmind/.lock"
_DRAFT = ".part-"


class LocalStore:
    """A store in a folder; see `Store`.

    An object that `put` has written survives a power cut. `put` holds an exclusive lock on `.segmind/.lock` during the
    rename, so conditions hold between threads and processes; on a network folder only if its server supports `flock`.
    Symbolic links inside the folder are followed.

    Args:
        folder: Created by the first write; a relative path starts at the working directory.

    Attributes:
        folder: Its absolute path, as it was named.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()

    @property
    def url(self) -> str:
        """The absolute path of the folder, without symbolic links: one folder has one address."""
        return os.path.realpath(self.folder)

    @property
    def conditions(self) -> Conditions:
        """Always both, because of the lock."""
        return Conditions(if_absent=True, if_match=True)

    @property
    def conditional(self) -> bool:
        """Always True, because of the lock."""
        return True

    @property
    def checksums(self) -> bool:
        """Always True, because the disk verifies its blocks."""
        return True

    def uri(self, key: str) -> str:
        """The path of the file.

        Args:
            key: Its key.

        Raises:
            StoreError: The key leads out of the folder, or is not in its plain form.
        """
        return str(self._path(key))

    def get(self, key: str) -> StoredObject | None:
        """The file's content, with its SHA-256 as etag; None if the file does not exist. See `Store.get`."""
        path = self._path(key)
        with disk_errors(f"cannot read {path}"):
            try:
                with path.open("rb") as file:
                    # Of this content, even if another file gets the name now.
                    written = os.fstat(file.fileno()).st_mtime
                    data = file.read()
            except FileNotFoundError:
                return None
        return StoredObject(data, hashlib.sha256(data).hexdigest(), written, self._now)

    def stat(self, key: str) -> Facts | None:
        """The file's size and SHA-256, for which it is read; see `Store.stat`."""
        found = self.get(key)
        return Facts(len(found.data), found.etag) if found else None

    def put(
        self,
        key: str,
        data: bytes,
        content_type: str,
        *,
        if_absent: bool = False,
        if_match: str | None = None,
        cache_control: str | None = None,
    ) -> str:
        """Write a file atomically; see `Store.put`."""
        path = self._path(key)
        draft = path.with_name(f"{_DRAFT}{uuid4().hex}")
        with disk_errors(f"cannot write {path}"):
            above_new = [folder.parent for folder in takewhile(lambda each: not each.exists(), path.parents)]
            if above_new:
                path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with draft.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                with self._lock_file() as lock:
                    try:
                        _lock(lock.fileno())
                        if if_match is not None or (if_absent and path.exists()):
                            require(self.get(key), str(path), if_absent=if_absent, if_match=if_match)
                        _replace(draft, path)
                    finally:
                        _unlock(lock.fileno())  # a process forked meanwhile would keep the lock of a closed file
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
            for folder in (path.parent, *above_new):
                sync(folder)
        return hashlib.sha256(data).hexdigest()

    @property
    def folds_case(self) -> bool:
        """Whether the disk takes another spelling of a folder that is there for the same; see `Store.folds_case`."""
        folder = Path(self.url, LOCK_KEY).parent
        while not (folder.exists() and folder.name.swapcase() != folder.name) and folder.name:
            folder = folder.parent
        try:
            return bool(folder.name) and folder.with_name(folder.name.swapcase()).samefile(folder)
        except OSError:
            return False

    def in_the_way(self, key: str) -> str | None:
        """A file where the key needs a folder, a folder where it needs a file, or a name too long for the disk."""
        path = self._path(key)
        try:
            for above in path.parents:
                if os.path.lexists(above):
                    if not above.is_dir():
                        return f"{above} is no folder"
                    break
            return f"{path} is a folder" if path.is_dir() else None
        except OSError as error:
            return f"{path} cannot be used: {reason(error)}"

    def holds(self, key: str, data: bytes) -> bool:
        """Whether the file has this content; see `Store.holds`."""
        found = self.get(key)
        return found is not None and found.etag == hashlib.sha256(data).hexdigest()

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys that start with these characters, without the lock and unfinished files; see `Store.keys`."""
        root = self._path(start) if (start := prefix.rpartition("/")[0]) else self.folder
        for folder, _, names in os.walk(root, onerror=_unless_gone):
            for name in names:
                key = Path(folder, name).relative_to(self.folder).as_posix()
                if key.startswith(prefix) and not _is_ours(key):
                    yield key

    def dated_keys(self, prefix: str) -> Iterator[tuple[str, float]]:
        """The same with the times of the files; see `Store.dated_keys`."""
        for key in self.keys(prefix):
            path = self._path(key)
            with disk_errors(f"cannot read {path}"), suppress(FileNotFoundError):  # gone since it was listed
                yield key, path.stat().st_mtime

    def _now(self) -> float:
        """The time by the clock that dates the files, which may be a file server's: that of a file written just now.

        Where none can be written, no claim can be either, and this machine's clock will do.
        """
        draft = (self.folder / LOCK_KEY).with_name(f"{_DRAFT}{uuid4().hex}")
        try:
            with draft.open("xb") as file:
                file.write(b"\n")
                file.flush()
                os.fsync(file.fileno())
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return time.time()
        finally:
            with suppress(OSError):
                draft.unlink()

    def _path(self, key: str) -> Path:
        plain = {"", ".", ".."}.isdisjoint(key.split("/"))  # one key, one file: no `a//b`, no `./a`
        windows = sys.platform == "win32" and (":" in key or "\\" in key)
        if not plain or "\0" in key or windows or _is_ours(key):
            raise StoreError(f"{key!r} is not a key in the folder {self.folder}: use a plain relative path with '/'")
        return self.folder / key

    def _lock_file(self) -> IO[bytes]:
        """Opens the file that is locked. Its own `with` closes it, and so ends the lock, at whatever line an interrupt
        comes: whoever handles that may write here too, and would wait for the lock for ever.
        """
        path = self.folder / LOCK_KEY
        try:
            return path.open("a+b")
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a+b")


def _is_ours(key: str) -> bool:
    return key == LOCK_KEY or key.rpartition("/")[2].startswith(_DRAFT)


def _unless_gone(error: OSError) -> None:
    """Raise for a folder that os.walk cannot list and would silently skip."""
    if not isinstance(error, FileNotFoundError):
        with disk_errors(f"cannot list {error.filename}"):
            raise error


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk; a rename alone may not survive a crash.

    Args:
        path: The file or folder.

    Raises:
        OSError: The disk failed.
    """
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder:  # Windows cannot sync folders
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno != errno.EINVAL:  # some network and container mounts cannot sync folders
            raise
    finally:
        os.close(descriptor)


if sys.platform == "win32":  # pragma: no cover
    import msvcrt

    def _lock(descriptor: int) -> None:
        while True:
            try:
                return msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
            except OSError as error:  # it gives up after ten seconds
                if error.errno != errno.EDEADLK:
                    raise

    def _unlock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

    def _replace(source: Path, target: Path) -> None:
        for pause in (0.01, 0.05, 0.2, 1.0):  # Windows refuses while anybody has the target open, be it for reading
            with suppress(PermissionError):
                source.replace(target)
                return
            time.sleep(pause)
        source.replace(target)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _replace(source: Path, target: Path) -> None:
        source.replace(target)
