"""An inbox in a bucket."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefect_segmind.errors import StoreError
from prefect_segmind.inbox.inbox import IMAGE_SUFFIX, Inbox, InboxFile, Listing, Seen, safe_names

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from prefect_segmind.storage.s3 import ObjectInfo


class BucketInbox(Inbox):
    """An inbox that is a prefix in a bucket.

    A server honours all conditions or some or none, and cannot be asked which: so each is also checked beforehand.
    """

    def __init__(self, place: str, s3: Callable[[], S3Client], done: str, failed: str) -> None:
        from prefect_segmind.storage import s3 as storage  # boto3 takes a second to import

        self._bucket, prefix = storage.split_uri(place)
        super().__init__(f"s3://{self._bucket}/{prefix.strip('/')}".rstrip("/"), done, failed)
        self._s3, self._client = storage, s3()

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
                self._s3.delete(file.location, self._client, etag=etag)
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
                    self._s3.copy(file.location, self._uri(target), self._client, etag=etag)
                    return target
                except StoreError:
                    if self._stat(target) is None:  # else another run was faster, or the answer to us was lost
                        raise
            if self._read(target) == self._read(file.below):
                return target

    def _list(self) -> Listing:
        listing = Listing(time.time())
        for found in self._s3.list_objects(f"{self.url}/", self._client):
            listing.now, seen = found.now, self._seen(found)
            below = seen.file.below
            if self._leaves_out(below):
                continue
            if IMAGE_SUFFIX.fullmatch(below):
                listing.images[below] = seen
            else:
                listing.skip(below)
        return listing

    def _seen(self, found: ObjectInfo) -> Seen:
        location = f"s3://{self._bucket}/{found.key}"
        below = location.removeprefix(f"{self.url}/")
        version = f"{found.size} {found.etag}"
        return Seen(InboxFile(location, below, version, found.modified), found.size, found.modified)

    def _stat(self, below: str) -> Seen | None:
        found = self._s3.stat(self._uri(below), self._client)
        return self._seen(found) if found else None

    def _read(self, below: str) -> bytes:
        return self._s3.read(self._uri(below), self._client)

    def _uri(self, below: str) -> str:
        return f"{self.url}/{below}"
