"""The images that a manifest names: files, folders, globs, prefixes of a bucket."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from prefect_segmind.errors import ConfigurationError, InvalidJobError, SegmindError, StoreError, writable
from prefect_segmind.jobs.job import LONGEST_NAME, name_from_image
from prefect_segmind.manifest.model import Found
from prefect_segmind.storage.open_store import is_s3
from prefect_segmind.storage.paths import found_path, is_there, missing, on_windows
from prefect_segmind.text import composed, spellings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ASKED = 1000
"""Images in S3 that are looked for where a manifest has other mistakes; the run itself looks for all."""
ASKERS = 16
"""Threads that ask S3 for them."""


class Images:
    """Finds a manifest's images. Relative ones lie beside the manifest; nothing is opened.

    Args:
        manifest: Where the manifest lies.
        s3: Makes the S3 client, when a pattern in a bucket needs one.
        warn: Takes a line for each thing that a pattern has to skip, once.
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

    def find(self, image: str, wildcards: bool) -> Sequence[Found]:
        """The absolute location of an image; of each match, in order, where it is a pattern.

        Args:
            image: What the manifest says.
            wildcards: Whether `*`, `?` and `**` stand for others; a file or key of that very name comes first.

        Raises:
            InvalidJobError: It cannot be a location.
            StoreError: A folder or bucket cannot be listed.
        """
        if "\0" in image or ("://" in image and not is_s3(image)):
            return [Found(image)]  # http(s), or what the check of the job refuses
        if os.name != "nt" and on_windows(image) and not is_there(self._folder / image):
            return [Found(image)]  # to be told when it is read
        slashed = image if is_s3(image) else image.replace("\\", "/")
        location = self._absolute(image)
        if slashed != image and is_s3(location) and not self._has(location):
            location, image = self._absolute(slashed), slashed
        if not wildcards or not re.search(r"[*?]", image):
            return [Found(location)]
        found = self._matches(image, location)
        return found if found or slashed == image else self._matches(slashed, location)

    @property
    def skipped(self) -> list[str]:
        """A line for each thing that patterns had to skip so far."""
        return sorted(self._warned)

    def absent(self, location: str, where: str) -> str | None:
        """Why there is no image, by a look at the disk; those in S3 are kept for `missing_in_s3`, the first 1,000.

        Args:
            location: As `find` gives it.
            where: Who asks for it, such as `line 12`.
        """
        if is_s3(location):
            if len(self._to_ask) < ASKED:
                self._to_ask.setdefault(location, where)
        elif "://" not in location and "\0" not in location and not is_there(found_path(location).expanduser()):
            return missing(location)
        return None

    def missing_in_s3(self) -> list[str]:
        """A line for each image in S3 that was asked for and is not there, as far as S3 tells."""

        def look(location: str) -> str | None:
            with suppress(SegmindError):  # what cannot be asked now is told by the run
                if not any(map(self._has, spellings(location))):
                    return f"{self._to_ask[location]}: image: {location} does not exist: check the key"
            return None

        with ThreadPoolExecutor(ASKERS, thread_name_prefix="segmind-manifest") as pool:
            return list(filter(None, pool.map(look, self._to_ask)))

    def _has(self, uri: str) -> bool:
        from prefect_segmind.storage.s3 import exists  # boto3 takes a second to import

        return exists(uri, self._s3())

    def _matches(self, image: str, location: str) -> Sequence[Found]:
        start = image.rfind("/", 0, len(re.split(r"[*?]", image)[0])) + 1
        fixed, pattern = self._absolute(image[:start]), image[start:]
        if is_s3(fixed):
            matches = next(filter(None, (self._in_bucket(each, pattern) for each in spellings(fixed))), [])
            return [Found(location)] if any(each == location for each, _ in matches) else named(matches)
        if is_there(found_path(location)):
            return [Found(location)]
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
            except RuntimeError as error:  # nobody's home
                raise InvalidJobError(f"{image!r} is no path: {error}") from None
        if not self._bucket or Path(image).is_absolute():
            return str(self._folder / image)
        segments = self._prefix.split("/") if self._prefix else []
        for segment in image.split("/"):
            if segment == "..":
                if not segments:
                    raise InvalidJobError(f"{image!r} leads out of the bucket {self._bucket}")
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
        fixed: The folder in which the pattern begins; that it can be listed is needed.
        pattern: Names of what lies in it, with wildcards.
        skipped: Takes a line for each folder that cannot be listed, and each match whose name is no UTF-8.

    Raises:
        StoreError: The folder in which the pattern begins cannot be listed.
    """
    wanted, everywhere = _wanted(pattern), "**" in pattern.split("/")
    matches: list[str] = []

    def skip(error: OSError) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        what = f"cannot list {error.filename}: {error.strerror or error}; check its owner and mode"
        if Path(error.filename) == fixed:
            raise StoreError(what) from error
        skipped.append(f"{what}; what lies in it is skipped")

    # Links to folders are followed where the pattern says how deep; else a circle of them would have no end.
    for folder, folders, files in os.walk(fixed, onerror=skip, followlinks=not everywhere):
        here = Path(folder).relative_to(fixed)
        deepest = not everywhere and len(here.parts) == pattern.count("/")
        folders[:] = [] if deepest else [each for each in folders if not each.startswith(".")]
        matches += [each for name in files if wanted.fullmatch(composed(each := (here / name).as_posix()))]
    unwritable = [each for each in matches if writable(each) != each]
    skipped += [f"{fixed / each} is skipped: its name is no UTF-8; rename it" for each in sorted(unwritable)]
    return [(str(fixed / each), each) for each in sorted(set(matches) - set(unwritable))]


def named(matches: Sequence[tuple[str, str]]) -> list[Found]:
    """Each match with its name: its path without the extension, each segment made safe.

    A name depends on nothing but its own path, so that no neighbour that comes or goes moves the address of a picture.
    Two matches may get one name, which is then the mistake of whoever asks for both.
    """
    return [Found(location, "/".join(_safe_segment(each) for each in _segments(below))) for location, below in matches]


def _segments(below: str) -> list[str]:
    *folders, file = (segment for segment in below.replace("\\", "-").split("/") if segment)
    return [*(f"{folder}.x" for folder in folders), file]  # a folder has no extension to be taken off


def _safe_segment(segment: str) -> str:
    """A segment without its extension, made safe; a long one is cut, and ends in the start of its SHA-256."""
    name, stem = name_from_image(segment), PurePosixPath(composed(segment)).stem.encode(errors="replace")
    return name if len(stem) <= LONGEST_NAME else f"{name}-{hashlib.sha256(stem).hexdigest()[:8]}"


def _wanted(pattern: str) -> re.Pattern[str]:
    """`*` and `?` within a segment, `**` for any number of segments; nothing hidden. It matches composed names."""
    parts: list[str] = []
    segments = composed(pattern).split("/")
    for number, segment in enumerate(segments, start=1):
        last = number == len(segments)
        if segment == "**":
            parts.append(r"(?!\.)[^/]*(?:/(?!\.)[^/]*)*" if last else r"(?:(?!\.)[^/]*/)*")
        else:
            text = re.escape(segment).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
            parts.append(rf"(?!\.){text}" + ("" if last else "/"))
    return re.compile("".join(parts), re.DOTALL)
