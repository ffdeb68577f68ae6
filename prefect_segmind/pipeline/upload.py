"""Uploading: the source image gets an address that the provider can GET."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from prefect_segmind.errors import ConfigurationError, SourceImageError
from prefect_segmind.images.conversion import prepare
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.storage.open_store import is_s3, open_store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class UploadedImage(BaseModel):
    """A source image at an address that the provider can GET.

    Attributes:
        uri: `s3://bucket/prefix/{sha256}.{ext}`, or the source's own `s3://` or `http(s)://` address.
        sha256: The SHA-256 of the file there.
        size_bytes: The size of the file there.
        uploaded: Whether it was written just now; False if the same content was there already.
        warnings: What people should know before a picture of it is paid for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    sha256: str
    size_bytes: int
    uploaded: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Uploads:
    """Uploads source images and signs addresses for them.

    Attributes:
        s3: Makes the S3 client, when one is needed.
        place: `s3://bucket/prefix` for uploads; None if none is set.
        presigned_seconds: How long a signed address is valid.
        public_base_url: The address under which `place` can be read without a signature; None if it cannot.
    """

    s3: Callable[[], S3Client]
    place: str | None = None
    presigned_seconds: int = 3600
    public_base_url: str | None = None

    def upload(self, job: ValidatedJob, reader: SourceReader) -> UploadedImage:
        """Uploads a job's source image under its content's hash, unless the same content is there already.

        A remote source that needs no change is not uploaded.

        Args:
            job: The job.
            reader: Reads the source image.

        Raises:
            ConfigurationError: No place for uploads is set, or it is not in S3.
            SourceImageError: The source has changed since it was validated.
            StoreError: S3 refuses or does not answer.
        """
        image, source = job.job.image, job.source
        remote = is_s3(image) or image.startswith(("http://", "https://"))
        if remote and not source.changes:
            return UploadedImage(
                uri=image,
                sha256=source.sha256,
                size_bytes=source.size_bytes,
                uploaded=False,
                warnings=self._short_lived(image),
            )
        place = self.checked_place()
        data = reader.read(image)
        if hashlib.sha256(data).hexdigest() != source.sha256:
            raise SourceImageError(f"image: {image} has changed since it was validated; run the job again")
        prepared = prepare(data, source)
        store = open_store(place, self.s3())
        key = f"{prepared.sha256}.{prepared.extension}"
        new = not store.holds(key, prepared.data)
        if new:
            store.put(key, prepared.data, prepared.content_type)
        uri = store.uri(key)
        return UploadedImage(
            uri=uri,
            sha256=prepared.sha256,
            size_bytes=len(prepared.data),
            uploaded=new,
            warnings=self._short_lived(uri),
        )

    def address(self, uri: str) -> str:
        """An address that the provider can GET, signed just now: call this for each request, and never store it.

        Args:
            uri: The URI of an uploaded image.
        """
        if not is_s3(uri):
            return uri
        if public := self._public_address(uri):
            return public
        from prefect_segmind.storage.s3 import presign_uri

        return presign_uri(uri, self.s3(), self.presigned_seconds)

    def _public_address(self, uri: str) -> str | None:
        """The address of an upload that can be read without a signature; None if it cannot."""
        prefix = f"s3://{(self.place or '')[5:].rstrip('/')}/"  # with the scheme as a store writes it
        if not self.public_base_url or not self.place or not uri.startswith(prefix):
            return None
        return f"{self.public_base_url.rstrip('/')}/{quote(uri.removeprefix(prefix))}"

    def checked_place(self) -> str:
        """The place for uploads, if it is one that the provider can read.

        Raises:
            ConfigurationError: None is set, or it is not in S3.
        """
        if self.place is None:
            raise ConfigurationError(
                "upload_to: a local image must be uploaded for the provider to read it; name a place such as "
                "s3://bucket/uploads with --upload-to, the flow's upload_to or PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO"
            )
        if not is_s3(self.place):
            raise ConfigurationError(
                f"upload_to: {self.place} is not in S3, so the provider cannot read it; name s3://bucket/prefix"
            )
        return self.place

    def _short_lived(self, uri: str) -> tuple[str, ...]:
        """A warning if a signed address will expire early, together with the credentials that sign it."""
        if not is_s3(uri) or self._public_address(uri):
            return ()
        from prefect_segmind.storage.s3 import credentials_expire_in

        left = credentials_expire_in(self.s3())
        if left is None or left >= self.presigned_seconds:
            return ()
        return (
            f"the credentials that sign the image's address expire in {left:.0f} s, sooner than the "
            f"{self.presigned_seconds} s for which the address should be valid",
        )
