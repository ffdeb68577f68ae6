"""An inbox in a bucket."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from prefect_segmind.inbox.inbox import IMAGE_SUFFIX, Inbox, InboxFile, Listing, Seen, safe_names

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class BucketInbox(Inbox):
    """Servers honour all conditions or some or none, and do not say which: so each is also looked at beforehand."""

    def __init__(self, place: str, s3: Callable[[], S3Client], done: str, failed: str) -> None:
        from prefect_segmind.storage.s3 import split_uri  # boto3 takes a second to import

        self._bucket, prefix = split_uri(place)
        self._root = f"{prefix.strip('/')}/".lstrip("/")
        super().__init__(f"s3://{self._bucket}/{self._root}".rstrip("/"), done, failed)
        self._client = s3()

    def _move(self, file: InboxFile, into: str) -> str | None:
        from prefect_segmind.storage.s3_errors import explained

        etag = f'"{file.version.partition(" ")[2]}"'
        with explained(f"move {file.location} to {self.url}/{into}", self._client):
            before = self._head(file.below)
            if before is None or before.file != file:
                return None
            try:
                target = self._copy(file.below, into, etag)
            except self._client.exceptions.ClientError:
                if self._head(file.below) != before:
                    return None
                raise
            try:
                if self._head(file.below) == before:
                    self._ask(self._client.delete_object, {"IfMatch": etag}, Key=self._root + file.below)
            except self._client.exceptions.ClientError:
                if self._head(file.below) == before:
                    raise
        return f"{self.url}/{target}"

    def _copy(self, below: str, into: str, etag: str) -> str:
        source = {"Bucket": self._bucket, "Key": self._root + below}
        folder, _, name = below.rpartition("/")
        names = safe_names(name, lambda: self._read(below))
        while True:
            target = "/".join(filter(None, (into, folder, next(names))))
            if self._head(target) is None:
                copy = {"Key": self._root + target, "CopySource": source, "CopySourceIfMatch": etag}
                try:
                    self._ask(self._client.copy_object, {"IfNoneMatch": "*"}, **copy)
                    return target
                except self._client.exceptions.ClientError:
                    if self._head(target) is None:  # else somebody was faster, or the answer to us was lost
                        raise
            if self._read(target) == self._read(below):
                return target

    def _list(self) -> Listing:
        from prefect_segmind.storage.s3_errors import explained

        listing = Listing(time.time())
        with explained(f"read the inbox {self.url}", self._client):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._root):
                if date := page["ResponseMetadata"]["HTTPHeaders"].get("date"):
                    listing.now = parsedate_to_datetime(date).timestamp()
                for entry in page.get("Contents", ()):
                    below = entry.get("Key", "")[len(self._root) :]
                    if self._passes_over(below):
                        continue
                    if IMAGE_SUFFIX.fullmatch(below):
                        listing.images[below] = self._seen(below, entry, entry.get("Size", 0))
                    else:
                        listing.skip(below)
        return listing

    def _head(self, below: str) -> Seen | None:
        try:
            head = self._client.head_object(Bucket=self._bucket, Key=self._root + below)
        except self._client.exceptions.ClientError as error:
            if _status(error) == 404:
                return None
            raise
        return self._seen(below, head, head["ContentLength"])

    def _seen(self, below: str, entry: Any, size: int) -> Seen:
        etag = entry.get("ETag", "").strip('"')  # rclone quotes it for a HEAD and not in a list
        written = entry["LastModified"].timestamp()
        return Seen(InboxFile(f"{self.url}/{below}", below, f"{size} {etag}", written), size, written)

    def _ask(self, call: Callable[..., Any], condition: dict[str, str], **request: Any) -> None:
        """Calls with a condition; without it where this boto3 does not have it, or the server does not know it."""
        from botocore.exceptions import ParamValidationError

        try:
            call(Bucket=self._bucket, **request, **condition)
        except (ParamValidationError, self._client.exceptions.ClientError) as error:
            if _status(error) not in (400, 501):
                raise
            call(Bucket=self._bucket, **request)

    def _read(self, below: str) -> bytes:
        with self._client.get_object(Bucket=self._bucket, Key=self._root + below)["Body"] as body:
            return body.read()


def _status(error: Exception) -> int:
    """The status of a refusal; 501, not implemented, where boto3 itself does not know what it is asked."""
    return int(getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 501))
