"""Opens a manifest on disk or in S3, and makes its jobs.

A manifest is read once, from a file or a temporary copy of an object, and its jobs go to a spool on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from prefect_segmind.jobs.job import Job
from prefect_segmind.manifest.expansion import Expansion
from prefect_segmind.manifest.formats import KINDS, MAX_TEXT, read_text
from prefect_segmind.manifest.image_paths import Images
from prefect_segmind.manifest.model import Notes, Row, UnreadableManifest
from prefect_segmind.storage.disk_errors import reason
from prefect_segmind.storage.open_store import is_s3
from prefect_segmind.storage.paths import found_path, missing_file
from prefect_segmind.storage.spool import Spool, temporary_file
from prefect_segmind.text import stripped

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True)
class Manifest:
    """A manifest without mistakes. As a context manager it deletes the jobs at its end.

    Attributes:
        place: Its path or address, as given.
        warnings: A line for each warning.
        jobs: Its jobs, in order.
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
        place: A local path or `s3://bucket/key` whose extension gives the format: .yaml, .yml, .json, .jsonl, .ndjson
            or .csv.
        variables: For its templates; they override the manifest's vars.
        s3: Makes the S3 client, when it is needed.
        defaults: Fields for assets that do not give them; they override the manifest's own defaults.
        allow_unlisted_resolution: Whether to accept sizes other than the 78 listed ones.

    Raises:
        ManifestError: It has mistakes: a line for each, also in `mistakes`.
        StoreError: The manifest, or a folder that a pattern searches, cannot be read; or the disk has no room for the
            jobs.
        ConfigurationError: Its address is malformed, or the S3 client cannot be made.

    Example:
        >>> import tempfile
        >>> from prefect_segmind.storage.s3 import s3_client
        >>> with tempfile.NamedTemporaryFile("w+", suffix=".jsonl") as file:
        ...     print('{"image": "s3://photos/mug.jpg", "prompt": "{{ season }} light"}', file=file, flush=True)
        ...     [job.prompt for job in load_manifest(file.name, {"season": "autumn"}, s3=s3_client).jobs]
        ['autumn light']
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
        expansion = Expansion(
            _with_defaults(head, defaults),
            variables or {},
            images.find,
            mistakes=mistakes,
            warnings=warnings,
            allow_unlisted_resolution=allow_unlisted_resolution,
            absent=images.absent,
        )
        return expand(place, expansion, rows, images)


def expand(place: str, expansion: Expansion, rows: Iterable[Row], images: Images | None = None) -> Manifest:
    """Makes the jobs of assets.

    A missing image, or a pattern without a match, is not a mistake by itself: its asset fails alone, or makes no job.
    Where there are mistakes it is listed with them, so that all can be fixed at once.

    Args:
        place: The manifest's path or address, for messages.
        expansion: Makes the jobs of each asset.
        rows: The assets.
        images: Finds their images, and which are missing.

    Returns:
        The manifest with its jobs.

    Raises:
        ManifestError: There are mistakes, or patterns of which none has a match: a line for each.
        StoreError: A folder that a pattern searches cannot be read, or the disk has no room for the jobs.
    """
    mistakes, warnings = expansion.mistakes, expansion.warnings
    with ExitStack() as stack:
        jobs = stack.enter_context(Spool(Job))
        try:
            for row in rows:
                for job in expansion.jobs(row):
                    if not mistakes:
                        jobs.append(job)
            expansion.warn_of_unused()
        except UnreadableManifest as error:
            mistakes.add(str(error))
        if mistakes:
            mistakes.add(*expansion.missing.lines, *(images.missing_in_s3() if images else ()))
        if mistakes or not jobs:
            skipped = images.skipped if images and expansion.unmatched else ()
            mistakes.add(*expansion.unmatched.lines, *skipped)
        if mistakes:
            raise mistakes.error(place)
        if not jobs and not warnings:
            warnings.add("the manifest has no assets")
        stack.pop_all()
    return Manifest(place, tuple(warnings.first()), jobs)


def _with_defaults(head: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The head of a manifest with the run's defaults over its own, unless those are not a mapping (a mistake)."""
    own = head.get("defaults") or {}
    return {**head, "defaults": {**own, **defaults}} if defaults and isinstance(own, Mapping) else head


# --- the manifest's own text ------------------------------------------------------------------------------------------


def _kind(place: str) -> str:
    if "://" in place and not is_s3(place):
        raise UnreadableManifest("a manifest is a local path or s3://bucket/key")
    extension = PurePosixPath(place).suffix.lower()
    if extension not in KINDS:
        raise UnreadableManifest(f"a manifest's name ends in one of {', '.join(KINDS)}")
    return KINDS[extension]


def _opened(place: str, s3: Callable[[], S3Client]) -> IO[bytes]:
    if is_s3(place):
        return _downloaded(place, s3())
    try:
        path = found_path(place).expanduser()
        if path.is_dir():
            raise UnreadableManifest("it is a folder; name one file in it")
        try:
            return path.open("rb")
        except FileNotFoundError:
            raise UnreadableManifest(f"it {missing_file(path)}") from None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        raise UnreadableManifest(f"it cannot be read: {reason(error)}") from None


def _downloaded(place: str, client: S3Client) -> IO[bytes]:
    """A copy of an object in a temporary file: a connection that is cut gives no half manifest."""
    from botocore.exceptions import ClientError

    from prefect_segmind.storage.s3 import split_uri
    from prefect_segmind.storage.s3_errors import error_code, s3_errors

    bucket, key = split_uri(place)
    with ExitStack() as stack, s3_errors(f"read {place}", client):
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
            raise UnreadableManifest(f"it cannot be read: {reason(error)}") from None
        if not line:
            return
        number += 1
        if len(line) > MAX_TEXT:
            raise UnreadableManifest(f"line {number} has more than {MAX_TEXT // 1_000_000} MB")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            what = f"line {number}, byte {error.start + 1}: {line[error.start]:#x} is not UTF-8"
            raise UnreadableManifest(f"{what}; save the file as UTF-8") from None
        yield text.removeprefix("\ufeff") if number == 1 else text
