"""Reading a source image: a local file, an `s3://` object, or an `http(s)://` address."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect_segmind.errors import SourceImageError, StoreError
from prefect_segmind.storage.disk_errors import reason
from prefect_segmind.storage.http import Destination, DownloadError, download_bytes
from prefect_segmind.storage.open_store import is_s3
from prefect_segmind.storage.paths import found_path, missing
from prefect_segmind.text import spellings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

REMOTE_LIMIT = 25_000_000
"""The most bytes of an `s3://` or `http(s)://` source that are read."""
LOCAL_LIMIT = 250_000_000
"""The most bytes of a local file that are read; no photo has more."""


_WAITS = (0.5, 2.0)
"""Seconds before an http source that did not answer is asked again."""
_PATIENCE = 20.0
"""Seconds after which it is not asked again."""


@dataclass(frozen=True)
class SourceReader:
    """Reads source images.

    Attributes:
        s3: Makes the S3 client, when one is needed.
        allow_private: Whether private and link-local addresses are allowed.
        allow_loopback: Whether loopback addresses are allowed, as with the sandbox.
    """

    s3: Callable[[], S3Client]
    allow_private: bool = False
    allow_loopback: bool = False

    def locate(self, image: str) -> str:
        """Finds a source whose name may be spelled in another Unicode form.

        Args:
            image: The location, as for `read`.

        Returns:
            The location as given or, if there is no such file, in another spelling of its name.

        Raises:
            StoreError: S3 does not answer.
        """
        if image.startswith(("http://", "https://")):
            return image
        if not is_s3(image):
            return str(found_path(image))
        if len(others := spellings(image)) == 1:
            return image
        from prefect_segmind.storage import s3

        return next((each for each in others if s3.exists(each, self.s3())), image)

    def read(self, image: str) -> bytes:
        """Reads a source.

        Args:
            image: A local path, `s3://bucket/key` or an `http(s)://` address.

        Raises:
            SourceImageError: It is missing, a folder, unreadable, too large, or at an address that is refused.
            StoreError: S3 refuses or does not answer, or an http source fails in a way that may pass.
        """
        if is_s3(image):
            from prefect_segmind.storage import s3

            try:
                return s3.read(image, self.s3(), limit=REMOTE_LIMIT)
            except StoreError as error:
                if type(error) is StoreError and error.status is None:  # it is missing or too large
                    raise SourceImageError(f"image: {error}") from None
                raise
        if image.startswith(("http://", "https://")):
            return self._read_http(image)
        return _read_file(image)

    def _read_http(self, url: str) -> bytes:
        """Reads an http source, again where a failure may pass: what a picture is must not depend on the weather."""
        destination = Destination(allow_private=self.allow_private, allow_loopback=self.allow_loopback)
        began = time.monotonic()
        for wait in (*_WAITS, None):
            try:
                return download_bytes(url, limit=REMOTE_LIMIT, destination=destination)
            except DownloadError as error:
                if error.refused:
                    raise SourceImageError(
                        f"image: {error} (set PREFECT_INTEGRATIONS_SEGMIND_ALLOW_PRIVATE_SOURCES=true to allow it)"
                    ) from None
                if error.too_large:
                    raise SourceImageError(f"image: {error}; the provider takes 10 MB, make it smaller") from None
                if not error.retryable:
                    raise SourceImageError(
                        f"image: {error}; the job is identified by the image's content, which must be readable from "
                        "here: check the address, or give the file or an s3:// address"
                    ) from None
                if wait is None or time.monotonic() - began > _PATIENCE:
                    raise StoreError(
                        f"image: {error}, asked more than once; run again later, or give the file or an s3:// address",
                        status=error.status,
                    ) from None
                time.sleep(wait)
        raise AssertionError  # the last round returns or raises


def _read_file(image: str) -> bytes:
    try:
        path = found_path(image).expanduser()
        if path.is_dir():
            raise SourceImageError(f"image: {image} is a folder; name one image in it")
        if not path.exists():
            raise SourceImageError(missing(image))
        if not path.is_file():
            raise SourceImageError(f"image: {image} is not a regular file")
        if path.stat().st_size > LOCAL_LIMIT:
            raise SourceImageError(f"image: {image} has more than {LOCAL_LIMIT // 1_000_000} MB; make it smaller")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the home of an unknown user, circular links
        raise SourceImageError(f"image: {image} cannot be read: {reason(error)}") from None
