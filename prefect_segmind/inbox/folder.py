"""An inbox in a folder of this machine."""

from __future__ import annotations

import os
import stat
import time
from itertools import islice
from pathlib import Path
from uuid import uuid4

from prefect_segmind.errors import ConfigurationError, writable
from prefect_segmind.inbox.inbox import IMAGE_SUFFIX, Inbox, InboxFile, Listing, Seen, safe_names
from prefect_segmind.storage.disk_errors import disk_errors, reason
from prefect_segmind.storage.paths import missing_file


class FolderInbox(Inbox):
    """An inbox that is a folder.

    Args:
        place: Its path as given, for messages.
        folder: Its path.
        done: As for `Inbox`.
        failed: As for `Inbox`.

    Raises:
        ConfigurationError: The folder does not exist or cannot be read.
    """

    def __init__(self, place: str, folder: Path, done: str, failed: str) -> None:
        _require_folder(place, folder)
        super().__init__(str(folder), done, failed)
        self._folder = folder

    def _move(self, file: InboxFile, into: str) -> str | None:
        source, target = Path(file.location), self._folder / into / file.below
        held = target.with_name(f"moving-{uuid4().hex}{target.suffix}")
        with disk_errors(f"cannot move {source} to {target}"):
            try:
                if _version(source.lstat()) != file.version:
                    return None
                target.parent.mkdir(parents=True, exist_ok=True)
                # The file is moved in one step to a name that only this run knows, and compared after that.
                source.replace(held)
            except FileNotFoundError:
                return None
        with disk_errors(f"cannot move {held} to {target}"):
            if _version(held.lstat()) == file.version:
                return str(_give_name(held, target))
            _give_name(held, source, plain=False)  # a new upload goes back, beside an even newer one
        return None

    def _list(self) -> Listing:
        listing = Listing(time.time())

        def skip(error: OSError) -> None:
            if error.filename == self.url:
                raise error
            if not isinstance(error, FileNotFoundError):
                why = f"it cannot be read: {reason(error)}; check its owner and mode"
                listing.skip(Path(error.filename).relative_to(self._folder).as_posix(), why)

        with disk_errors(f"cannot read the inbox {self.url}"):
            for here, folders, names in os.walk(self._folder, onerror=skip):
                paths = {Path(here, name): name for name in (*folders, *names)}
                folders.clear()
                for path, name in paths.items():
                    below = path.relative_to(self._folder).as_posix()
                    if self._leaves_out(below):
                        continue
                    try:
                        facts = path.lstat()
                    except OSError as error:
                        skip(error)
                        continue
                    if stat.S_ISDIR(facts.st_mode):  # not a link, which may lead anywhere and in circles
                        folders.append(name)
                    elif not stat.S_ISREG(facts.st_mode) or not IMAGE_SUFFIX.fullmatch(writable(below)):
                        listing.skip(below)
                    elif writable(below) != below:
                        listing.skip(below, "its name is not UTF-8; rename it")
                    else:
                        file = InboxFile(str(path), below, _version(facts), facts.st_ctime)
                        listing.images[below] = Seen(file, facts.st_size, facts.st_mtime)
        return listing

    def _is_young(self, seen: Seen, now: float, seconds: float) -> bool:
        return 0 <= now - seen.written < seconds


def _require_folder(place: str, folder: Path) -> None:
    try:
        if folder.is_dir():
            return
        mistake = f"{missing_file(folder, folders=True)}; create the folder or correct its path"
        if folder.exists():
            mistake = "is a file; name the folder that it is in"
    except (OSError, ValueError) as error:
        mistake = f"cannot be read: {reason(error)}"
    raise ConfigurationError(f"{place} {mistake}")


def _version(facts: os.stat_result) -> str:
    return f"{facts.st_size} {facts.st_mtime_ns}"


def _give_name(held: Path, wanted: Path, *, plain: bool = True) -> Path:
    """Give a file that only this run knows the wanted name, or the next free one; always the next if not `plain`."""
    names = islice(safe_names(wanted.name, held.read_bytes), 0 if plain else 1, None)
    while True:
        path = wanted.with_name(next(names))
        try:
            path.open("xb").close()  # reserves the name: only one of several runs gets it
        except FileExistsError:
            if path.is_file() and path.read_bytes() == held.read_bytes():
                held.unlink()
                return path
        else:
            return held.replace(path)
