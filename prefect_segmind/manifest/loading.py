"""Where a manifest lies, and where its images lie as seen from there: folders, buckets and patterns.

A manifest is read once, from a file or through a temporary copy of an object, and its jobs go to a spool on disk.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from prefect_segmind.api.request import LONGEST_NAME, Job, composed, name_from_image, spellings, stripped
from prefect_segmind.errors import ConfigurationError, InvalidJobError, SegmindError, StoreError, writable
from prefect_segmind.manifest.expansion import Expansion, Found, Notes, Row, UnreadableManifest
from prefect_segmind.manifest.formats import KINDS, MAX_TEXT, read_text
from prefect_segmind.pipeline.source import found_path, is_there, missing, on_windows
from prefect_segmind.storage.spool import Spool, temporary_file

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ASKED = 1000
"""Images in S3 that are looked for where a manifest has other mistakes; the run itself looks for all."""
ASKERS = 16
"""Threads that ask S3 for them."""


@dataclass(frozen=True)
class Manifest:
    """A manifest without mistakes. It is a context manager: at its end the jobs are gone.

    Attributes:
        place: Where it lies, as it was given.
        warnings: What is odd but no mistake, a line each.
        jobs: Its jobs, in its order.
    """

    place: str
    warnings: tuple[str, ...]
    jobs: Spool[Job]

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *_: object) -> None:
        self.jobs.close()


def load_manifest(
    place: str,
    variables: Mapping[str, Any] | None,
    *,
    s3: Callable[[], S3Client],
    defaults: Mapping[str, Any] | None = None,
    allow_unlisted_resolution: bool = False,
) -> Manifest:
    """Reads and checks a whole manifest; no image is opened.

    Args:
        place: A local path or `s3://bucket/key`, whose extension says how it is written: .yaml, .yml, .json, .jsonl,
            .ndjson or .csv.
        variables: For its templates; they win over the manifest's vars.
        s3: Makes the S3 client, when one is needed.
        defaults: Fields for assets that do not give them; they win over the manifest's own defaults.
        allow_unlisted_resolution: Whether other sizes than the 78 are let through.

    Raises:
        ManifestError: It has mistakes; the message has a line for each, `mistakes` holds them.
        StoreError: It, or a folder in which a pattern looks, cannot be read; or there is no room for the jobs.
        ConfigurationError: Its address is malformed, or the S3 client cannot be made.

    Example:
        >>> load_manifest("campaign.yaml", {"season": "late summer"}, s3=s3_client)
        Traceback (most recent call last):
        prefect_segmind.errors.ManifestError: campaign.yaml: 1 mistake; nothing was uploaded or paid.
          it does not exist
    """
    place, mistakes = stripped(place), Notes()
    with ExitStack() as stack:
        try:
            kind = _kind(place)
            head, rows = read_text(kind, _lines(stack.enter_context(_opened(place, s3))), mistakes)
        except UnreadableManifest as error:
            mistakes.add(str(error))
            raise mistakes.error(place) from None
        warnings = Notes()
        images = Images(place, s3, warnings.add)
        return expand(
            place,
            _with_defaults(head, defaults),
            rows,
            variables or {},
            images.find,
            mistakes=mistakes,
            warnings=warnings,
            allow_unlisted_resolution=allow_unlisted_resolution,
            images=images,
        )


def expand(
    place: str,
    head: Mapping[str, Any],
    rows: Iterable[Row],
    variables: Mapping[str, Any],
    find: Callable[[str, bool], Sequence[Found]],
    *,
    mistakes: Notes | None = None,
    warnings: Notes | None = None,
    allow_unlisted_resolution: bool = False,
    images: Images | None = None,
) -> Manifest:
    """Makes the jobs of assets that are read or made already; see `Expansion` for what it is given.

    An image that is not there, or a pattern without a match, is no mistake by itself: it fails its asset alone, or
    makes none. Where there are mistakes it is told with them, so that a person mends all at once.

    Args:
        place: What the manifest is called.
        head: As for `Expansion`.
        rows: The assets.
        variables: As for `Expansion`.
        find: As for `Expansion`.
        mistakes: Those that are known already.
        warnings: Those that are known already.
        allow_unlisted_resolution: As for `Expansion`.
        images: Tells which images are not there.

    Raises:
        ManifestError: There are mistakes, or there are patterns and nothing matches any; a line for each.
        StoreError: A folder in which a pattern looks cannot be read; or there is no room for the jobs.
    """
    mistakes, warnings = Notes() if mistakes is None else mistakes, Notes() if warnings is None else warnings
    with ExitStack() as stack:
        jobs = stack.enter_context(Spool(Job))
        expansion = Expansion(
            head,
            variables,
            find,
            mistakes=mistakes,
            warnings=warnings,
            allow_unlisted_resolution=allow_unlisted_resolution,
            **({"absent": images.absent} if images else {}),
        )
        try:
            for row in rows:
                for job in expansion.jobs(row):
                    if not mistakes:
                        jobs.append(job)
            expansion.warn_of_unused()
        except UnreadableManifest as error:
            mistakes.add(str(error))
        if mistakes:
            for line in (*expansion.missing.lines, *(images.missing_in_s3() if images else ())):
                mistakes.add(line)
        if mistakes or not jobs:
            why = images.skipped if images and expansion.unmatched else ()
            for line in (*expansion.unmatched.lines, *why):
                mistakes.add(line)
        if mistakes:
            raise mistakes.error(place)
        if not jobs and not warnings:
            warnings.add("the manifest has no assets")
        stack.pop_all()
    return Manifest(place, tuple(warnings.first()), jobs)


def _with_defaults(head: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The head of a manifest with the run's own defaults over its own; what is no mapping stays, to be told."""
    own = head.get("defaults") or {}
    return {**head, "defaults": {**own, **defaults}} if defaults and isinstance(own, Mapping) else head


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
        if _in_s3(manifest):
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
        if "\0" in image or ("://" in image and not _in_s3(image)):
            return [Found(image)]  # http(s), or what the check of the job refuses
        if os.name != "nt" and on_windows(image) and not is_there(self._folder / image):
            return [Found(image)]  # to be told when it is read
        slashed = image if _in_s3(image) else image.replace("\\", "/")
        location = self._absolute(image)
        if slashed != image and _in_s3(location) and not self._has(location):
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
        if _in_s3(location):
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
        if _in_s3(fixed):
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
        if _in_s3(image):
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
        from prefect_segmind.storage.s3 import S3Store, split_uri  # boto3 takes a second to import

        try:
            bucket, folder = split_uri(fixed)
        except ConfigurationError as error:
            raise InvalidJobError(str(error)) from None
        folder += "/" if folder and not folder.endswith("/") else ""
        store, wanted = S3Store(bucket, "", self._s3()), _wanted(pattern)
        keys = {key for start in spellings(re.split(r"[*?]", pattern)[0]) for key in store.keys(folder + start)}
        below = sorted(each for key in keys if wanted.fullmatch(composed(each := key[len(folder) :])))
        return [(f"s3://{bucket}/{folder}{each}", each) for each in below]


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


# --- the manifest's own text ------------------------------------------------------------------------------------------


def _in_s3(place: str) -> bool:
    return place.lower().startswith("s3://")


def _kind(place: str) -> str:
    if "://" in place and not _in_s3(place):
        raise UnreadableManifest("a manifest is a local path or s3://bucket/key")
    extension = PurePosixPath(place).suffix.lower()
    if extension not in KINDS:
        raise UnreadableManifest(f"a manifest's name ends in one of {', '.join(KINDS)}")
    return KINDS[extension]


def _opened(place: str, s3: Callable[[], S3Client]) -> IO[bytes]:
    if _in_s3(place):
        return _downloaded(place, s3())
    try:
        path = found_path(place).expanduser()
        if path.is_dir():
            raise UnreadableManifest("it is a folder; name one file in it")
        if not path.exists():
            names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
            near = difflib.get_close_matches(path.name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"looked in {path.parent.absolute()}"
            raise UnreadableManifest(f"it does not exist ({hint})")
        return path.open("rb")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nobody's home
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UnreadableManifest(f"it cannot be read: {why}") from None


def _downloaded(place: str, client: S3Client) -> IO[bytes]:
    """A copy of an object in a temporary file: a connection that is cut gives no half manifest."""
    from botocore.exceptions import ClientError

    from prefect_segmind.storage.s3 import split_uri
    from prefect_segmind.storage.s3_errors import error_code, explained

    bucket, key = split_uri(place)
    with ExitStack() as stack, explained(f"read {place}", client):
        try:
            body = client.get_object(Bucket=bucket, Key=key)["Body"]
        except ClientError as error:
            if error_code(error) == "NoSuchKey":
                raise UnreadableManifest("it does not exist; check the key") from None
            raise
        with temporary_file():
            copy = stack.enter_context(tempfile.TemporaryFile())
        with body:
            for chunk in body.iter_chunks(1 << 20):
                with temporary_file():
                    copy.write(chunk)
        with temporary_file():
            copy.seek(0)
        stack.pop_all()
    return copy


def _lines(file: IO[bytes]) -> Iterator[str]:
    """The lines of a UTF-8 text, with their line breaks and without a byte order mark."""
    number = 0
    while True:
        try:
            line = file.readline(MAX_TEXT + 1)
        except OSError as error:
            raise UnreadableManifest(f"it cannot be read: {error.strerror or error}") from None
        if not line:
            return
        number += 1
        if len(line) > MAX_TEXT:
            raise UnreadableManifest(f"line {number} has more than {MAX_TEXT // 1_000_000} MB")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            what = f"line {number}, byte {error.start + 1}: {line[error.start]:#x} is no UTF-8"
            raise UnreadableManifest(f"{what}; save the file as UTF-8") from None
        yield text.removeprefix("\ufeff") if number == 1 else text
