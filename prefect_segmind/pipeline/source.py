"""Reading a source image from where it lies: a local file, an `s3://` object, or an `http(s)://` address."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefect_segmind.api.request import spellings
from prefect_segmind.errors import SourceImageError, StoreError, redact
from prefect_segmind.storage.http import Destination, DownloadError, download_bytes

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

REMOTE_LIMIT = 25_000_000
"""Bytes of an `s3://` or `http(s)://` source that are read."""
LOCAL_LIMIT = 250_000_000
"""Bytes of a local file that are read; more is no photo."""


class UnreadableSource(Exception):
    """An http source that does not answer us; the provider may still be able to GET it."""


@dataclass(frozen=True)
class SourceReader:
    """Reads source images.

    Attributes:
        s3: Makes the S3 client, when one is needed.
        allow_private: Whether private and link-local addresses may be read.
        allow_loopback: Whether this machine itself may be read, as with the sandbox.
    """

    s3: Callable[[], S3Client]
    allow_private: bool = False
    allow_loopback: bool = False

    def locate(self, image: str) -> str:
        """Where a source is: as it is given or, where nothing is there, under another spelling of its name.

        Args:
            image: As for `read`.

        Raises:
            StoreError: S3 does not answer.
        """
        if image.startswith(("http://", "https://")):
            return image
        if not image.startswith("s3://"):
            return str(found_path(image))
        if len(others := spellings(image)) == 1:
            return image
        from prefect_segmind.storage import s3

        return next((each for each in others if s3.exists(each, self.s3())), image)

    def read(self, image: str) -> bytes:
        """The whole content of a source.

        Args:
            image: A local path, `s3://bucket/key` or an `http(s)://` address.

        Raises:
            SourceImageError: It is missing, a folder, unreadable, too large, or at an address that is refused.
            UnreadableSource: An http source that does not answer as it should.
            StoreError: S3 refuses or does not answer.
        """
        if image.startswith("s3://"):
            from prefect_segmind.storage import s3

            try:
                return s3.read(image, self.s3(), limit=REMOTE_LIMIT)
            except StoreError as error:
                if type(error) is StoreError and error.status is None:  # it is not there, or too large
                    raise SourceImageError(f"image: {error}") from None
                raise
        if image.startswith(("http://", "https://")):
            return self._read_http(image)
        return _read_file(image)

    def _read_http(self, url: str) -> bytes:
        destination = Destination(allow_private=self.allow_private, allow_loopback=self.allow_loopback)
        try:
            return download_bytes(url, limit=REMOTE_LIMIT, destination=destination)
        except DownloadError as error:
            if error.refused:
                raise SourceImageError(
                    f"image: {error} (set PREFECT_INTEGRATIONS_SEGMIND_ALLOW_PRIVATE_SOURCES=true if it is meant)"
                ) from None
            if error.too_large:
                raise SourceImageError(f"image: {error}; the provider takes 10 MB, make it smaller") from None
            raise UnreadableSource(redact(str(error))) from None


def found_path(given: str | Path) -> Path:
    r"""The path of a file or folder, each part of it as it is given or, where that is not there, in another spelling.

    Other spellings are the other forms of Unicode, which look alike: macOS and some archives decompose names. And a
    path of Windows, `photos\mug.jpg`, is one with slashes. A path that is not found is returned as it is given.
    """
    path = Path(given)
    try:
        wanted = path.expanduser()
        if is_there(wanted) or (str(wanted).isascii() and "\\" not in str(wanted)):
            return path
        for each in dict.fromkeys((wanted, Path(str(wanted).replace("\\", "/")))):
            found = Path(each.anchor)
            for part in each.parts[bool(each.anchor) :]:
                found = next((there for form in spellings(part) if is_there(there := found / form)), found / part)
            if is_there(found):
                return found
        return path
    except RuntimeError:  # nobody's home
        return path


def is_there(path: Path) -> bool:
    """Whether a path leads to something."""
    try:
        return path.exists()
    except (OSError, ValueError):  # no name that this system takes, so no file either
        return False


def missing(image: str) -> str:
    """The mistake of a local image that is not there, with what may have been meant."""
    path = found_path(image).expanduser()
    if os.name != "nt" and on_windows(image):
        hint = "a path on a Windows disk, which this machine does not have; write one relative to the manifest"
    else:
        names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"looked in {path.parent.resolve()}"
    return f"image: {image} does not exist ({hint})"


def on_windows(image: str) -> bool:
    r"""Whether this is a whole path of Windows, `C:\photos\mug.jpg` or `\\server\photos\mug.jpg`."""
    return re.match(r"[A-Za-z]:[\\/]|\\\\\w", image) is not None


def _read_file(image: str) -> bytes:
    try:
        path = found_path(image).expanduser()
        if path.is_dir():
            raise SourceImageError(f"image: {image} is a folder; name one image in it")
        if not path.exists():
            raise SourceImageError(missing(image))
        if not path.is_file():
            raise SourceImageError(f"image: {image} is no ordinary file")
        if path.stat().st_size > LOCAL_LIMIT:
            raise SourceImageError(f"image: {image} has more than {LOCAL_LIMIT // 1_000_000} MB; make it smaller")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nobody's home, a circle of links
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SourceImageError(f"image: {image} cannot be read: {why}") from None
