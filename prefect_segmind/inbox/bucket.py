"""An inbox in a bucket. Importing this imports boto3."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefect_segmind.errors import StoreError
from prefect_segmind.inbox.inbox import IMAGE_SUFFIX, Inbox, InboxFile, Listing, Seen, safe_names
from prefect_segmind.storage import s3

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class BucketInbox(Inbox):
    """An inbox that is a prefix in a bucket.

    A server may honour all conditional requests, some or none, and does not declare which; so each condition is also
    checked beforehand.

    Args:
        place: `s3://bucket/prefix`.
        make_client: Makes the S3 client, once the address is known to be good.
        done: As for `Inbox`.
        failed: As for `Inbox`.
    """

    def __init__(self, place: str, make_client: Callable[[], S3Client], done: str, failed: str) -> None:
        self._bucket, prefix = s3.split_uri(place)
        super().__init__(f"s3://{self._bucket}/{prefix.strip('/')}".rstrip("/"), done, failed)
        self._client = make_client()

    def _move(self, file: InboxFile, into: str) -> str | None:
        before = self._stat(file.below)
        if before is None or before.file != file:
            return None
        etag = file.version.partition(" ")[2]
        try:
            target = self._copy(file, into, etag)
        except StoreError:
            if self._stat(file.below) != before:
                return None
            raise
        try:
            if self._stat(file.below) == before:
                s3.delete(file.location, self._client, etag=etag)
        except StoreError:
            if self._stat(file.below) == before:
                raise
        return self._uri(target)

    def _copy(self, file: InboxFile, into: str, etag: str) -> str:
        folder, _, name = file.below.rpartition("/")
        names = safe_names(name, lambda: self._read(file.below))
        while True:
            target = "/".join(filter(None, (into, folder, next(names))))
            if self._stat(target) is None:
                try:
                    s3.copy(file.location, self._uri(target), self._client, etag=etag)
                    return target
                except StoreError:
                    if self._stat(target) is None:  # otherwise another run was faster, or only the answer was lost
                        raise
            if self._read(target) == self._read(file.below):
                return target

    def _list(self) -> Listing:
        listing = Listing(time.time())
        for found in s3.list_objects(f"{self.url}/", self._client):
            listing.now, seen = found.now, self._seen(found)
            below = seen.file.below
            if self._leaves_out(below):
                continue
            if IMAGE_SUFFIX.fullmatch(below):
                listing.images[below] = seen
            else:
                listing.skip(below)
        return listing

    def _seen(self, found: s3.ObjectInfo) -> Seen:
        location = f"s3://{self._bucket}/{found.key}"
        below = location.removeprefix(f"{self.url}/")
        version = f"{found.size} {found.etag}"
        return Seen(InboxFile(location, below, version, found.modified), found.size, found.modified)

    def _stat(self, below: str) -> Seen | None:
        found = s3.stat(self._uri(below), self._client)
        return self._seen(found) if found else None

    def _read(self, below: str) -> bytes:
        return s3.read(self._uri(below), self._client)

    def _uri(self, below: str) -> str:
        return f"{self.url}/{below}"
