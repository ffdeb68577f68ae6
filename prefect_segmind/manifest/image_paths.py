"""The images that a manifest names: files, folders, globs, prefixes of a bucket."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from prefect_segmind.errors import ConfigurationError, InvalidJobError, SegmindError, StoreError, writable
from prefect_segmind.jobs.job import LONGEST_NAME, name_from_image
from prefect_segmind.manifest.model import FoundImage
from prefect_segmind.storage.disk_errors import reason
from prefect_segmind.storage.open_store import is_s3
from prefect_segmind.storage.paths import found_path, is_there, missing, on_windows
from prefect_segmind.text import composed, spellings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ASKED = 1000
"""Images in S3 that are looked up where a manifest has other mistakes; the run itself looks up all of them."""
ASKERS = 16
"""Threads that look them up."""


class Images:
    """Finds a manifest's images, without opening them. Relative locations start at the manifest's folder.

    Args:
        manifest: The manifest's path or address.
        s3: Makes the S3 client, when it is needed.
        warn: Called once with a line for each file or folder that a pattern skips.
    """

    def __init__(
        self, manifest: str, s3: Callable[[], S3Client], warn: Callable[[str], object] = lambda _: None
    ) -> None:
        self._s3 = s3
        self._warn, self._warned = warn, set[str]()
        self._to_ask: dict[str, str] = {}
        self._bucket, self._prefix = "", ""
        self._folder = Path()
        if is_s3(manifest):
            self._bucket, _, key = manifest[5:].partition("/")
            self._prefix = key.rpartition("/")[0]
        else:
            self._folder = Path(manifest).expanduser().absolute().parent

    def find(self, image: str, wildcards: bool) -> Sequence[FoundImage]:
        """The absolute location of an image, or of each match of a pattern, sorted.

        Args:
            image: The asset's `image`.
            wildcards: Whether to expand `*`, `?` and `**`; a file or key with exactly this name takes precedence.

        Raises:
            InvalidJobError: It is not a valid location.
            StoreError: A folder or bucket cannot be listed.
        """
        if "\0" in image or ("://" in image and not is_s3(image)):
            return [FoundImage(image)]  # http(s), or an address that the job's validation refuses
        if os.name != "nt" and on_windows(image) and not is_there(self._folder / image):
            return [FoundImage(image)]  # the mistake is reported when it is read
        slashed = image if is_s3(image) else image.replace("\\", "/")
        location = self._absolute(image)
        if slashed != image and is_s3(location) and not self._has(location):
            location, image = self._absolute(slashed), slashed
        if not wildcards or not re.search(r"[*?]", image):
            return [FoundImage(location)]
        found = self._matches(image, location)
        return found if found or slashed == image else self._matches(slashed, location)

    @property
    def skipped(self) -> list[str]:
        """A line for each file or folder that patterns have skipped so far."""
        return sorted(self._warned)

    def absent(self, location: str, where: str) -> str | None:
        """Why a local image does not exist; the first 1,000 in S3 are kept for `missing_in_s3`.

        Args:
            location: As `find` returns it.
            where: The asset that names it, such as `line 12`.

        Returns:
            The mistake; None if the image exists, or may exist.
        """
        if is_s3(location):
            if len(self._to_ask) < ASKED:
                self._to_ask.setdefault(location, where)
        elif "://" not in location and "\0" not in location and not is_there(found_path(location).expanduser()):
            return missing(location)
        return None

    def missing_in_s3(self) -> list[str]:
        """A line for each image in S3 that `absent` was asked about and that does not exist."""

        def look(location: str) -> str | None:
            with suppress(SegmindError):  # the run reports what cannot be looked up now
                if not any(map(self._has, spellings(location))):
                    return f"{self._to_ask[location]}: image: {location} does not exist: check the key"
            return None

        with ThreadPoolExecutor(ASKERS, thread_name_prefix="segmind-manifest") as pool:
            return list(filter(None, pool.map(look, self._to_ask)))

    def _has(self, uri: str) -> bool:
        from prefect_segmind.storage.s3 import exists  # boto3 takes a second to import

        return exists(uri, self._s3())

    def _matches(self, image: str, location: str) -> Sequence[FoundImage]:
        start = image.rfind("/", 0, len(re.split(r"[*?]", image)[0])) + 1
        fixed, pattern = self._absolute(image[:start]), image[start:]
        if is_s3(fixed):
            matches = next(filter(None, (self._in_bucket(each, pattern) for each in spellings(fixed))), [])
            return [FoundImage(location)] if any(each == location for each, _ in matches) else named(matches)
        if is_there(found_path(location)):
            return [FoundImage(location)]
        skipped: list[str] = []
        matches = _in_folder(found_path(fixed), pattern, skipped)
        for line in skipped:
            if line not in self._warned:
                self._warned.add(line)
                self._warn(line)
        return named(matches)

    def _absolute(self, image: str) -> str:
        if is_s3(image):
            return f"s3://{image[5:]}"
        if image.startswith("~"):
            try:
                return str(Path(image).expanduser())
            except (RuntimeError, ValueError) as error:  # the home of an unknown user, or of no user's name
                raise InvalidJobError(f"{image!r} is not a path: {error}") from None
        if not self._bucket or Path(image).is_absolute():
            return str(self._folder / image)
        segments = self._prefix.split("/") if self._prefix else []
        for segment in image.split("/"):
            if segment == "..":
                if not segments:
                    raise InvalidJobError(f"{image!r} points outside the bucket {self._bucket}")
                segments.pop()
            elif segment != ".":
                segments.append(segment)  # an empty one too: a key may hold `//`
        return f"s3://{self._bucket}/{'/'.join(segments)}"

    def _in_bucket(self, fixed: str, pattern: str) -> list[tuple[str, str]]:
        from prefect_segmind.storage.s3 import list_objects, split_uri  # boto3 takes a second to import

        try:
            _, folder = split_uri(fixed)
        except ConfigurationError as error:
            raise InvalidJobError(str(error)) from None
        wanted, client = _wanted(pattern), self._s3()
        found = (list_objects(fixed + start, client) for start in spellings(re.split(r"[*?]", pattern)[0]))
        below = {each.key.removeprefix(folder) for each in chain.from_iterable(found)}
        return [(fixed + each, each) for each in sorted(below) if wanted.fullmatch(composed(each))]


def _in_folder(fixed: Path, pattern: str, skipped: list[str]) -> list[tuple[str, str]]:
    """The files that match, each with its path below the folder.

    Args:
        fixed: The folder in which the pattern begins.
        pattern: A path below it, with wildcards.
        skipped: Gets a line for each folder that cannot be listed, and each match whose name is not UTF-8.

    Raises:
        StoreError: The folder in which the pattern begins cannot be listed.
    """
    wanted, everywhere = _wanted(pattern), "**" in pattern.split("/")
    matches: list[str] = []

    def skip(error: OSError) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        what = f"cannot list {error.filename}: {reason(error)}; check its owner and mode"
        if Path(error.filename) == fixed:
            raise StoreError(what) from error
        skipped.append(f"{what}; its contents are skipped")

    # Links to folders are followed only where the pattern has a fixed depth, as they may form a cycle.
    for folder, folders, files in os.walk(fixed, onerror=skip, followlinks=not everywhere):
        here = Path(folder).relative_to(fixed)
        deepest = not everywhere and len(here.parts) == pattern.count("/")
        folders[:] = [] if deepest else [each for each in folders if not each.startswith(".")]
        matches += [each for name in files if wanted.fullmatch(composed(each := (here / name).as_posix()))]
    unwritable = [each for each in matches if writable(each) != each]
    skipped += [f"{fixed / each} is skipped: its name is not UTF-8; rename it" for each in sorted(unwritable)]
    return [(str(fixed / each), each) for each in sorted(set(matches) - set(unwritable))]


def named(matches: Sequence[tuple[str, str]]) -> list[FoundImage]:
    """Each match with its name: its path without the extension, each segment made safe.

    A name depends only on its own path, so that adding or removing other files never moves a picture. Two matches may
    get the same name; the caller reports that.

    Args:
        matches: The location of each match, and its path below the pattern's fixed folder.
    """
    return [
        FoundImage(location, "/".join(_safe_segment(each) for each in _segments(below))) for location, below in matches
    ]


def _segments(below: str) -> list[str]:
    *folders, file = (segment for segment in below.replace("\\", "-").split("/") if segment)
    return [
        *(f"{folder}.x" for folder in folders),
        file,
    ]  # keeps the dots of a folder's name: only the last extension is cut off


def _safe_segment(segment: str) -> str:
    """A segment without its extension, made safe; a long one is cut, and ends in the start of its SHA-256."""
    name, stem = name_from_image(segment), PurePosixPath(composed(segment)).stem.encode(errors="replace")
    return name if len(stem) <= LONGEST_NAME else f"{name}-{hashlib.sha256(stem).hexdigest()[:8]}"


def _wanted(pattern: str) -> re.Pattern[str]:
    """A regular expression for a pattern, to match NFC names.

    `*` and `?` match within a segment, `**` any number of segments; hidden names never match. It never backtracks over
    more than one star: what stands between two of them may as well match where it first does, as what follows then has
    all the rest. So a match takes time in proportion to the name, however many stars there are.
    """
    segments = composed(pattern).split("/")
    parts = [list(group) for deep, group in groupby(segments, lambda each: each == "**") if not deep]
    if "**" not in segments:
        return re.compile("/".join(map(_segment, segments)), re.DOTALL)
    folders = r"(?:(?!\.)[^/]*/)"
    first, last = segments[0] != "**", segments[-1] != "**"
    text = "".join(f"{_segment(each)}/" for each in parts.pop(0)) if first else ""
    end = "/".join(map(_segment, parts.pop())) if last and parts else r"(?!\.)[^/]*"
    text += "".join(f"(?>{folders}*?{''.join(f'{_segment(each)}/' for each in part)})" for part in parts)
    return re.compile(f"{text}{folders}*{end}", re.DOTALL)


def _segment(pattern: str) -> str:
    """A regular expression for one segment of a path."""
    first, *between = (re.escape(each).replace(r"\?", "[^/]") for each in re.split(r"\*+", pattern))
    if not between:
        return rf"(?!\.){first}"
    return rf"(?!\.){first}{''.join(f'(?>[^/]*?{each})' for each in between[:-1])}[^/]*{between[-1]}"
