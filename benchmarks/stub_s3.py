"""S3 as a stub that honours conditions of writes: buckets in memory, answers after a given time.

    .venv/bin/python -m benchmarks.stub_s3 --latency 0.03 --bucket bench

It has PUT, GET, HEAD, DELETE and COPY of objects, ListObjectsV2 in pages of up to 1,000 keys, and PUT and HEAD of
buckets; `If-None-Match: *` and `If-Match` in one step with the write; SHA-256 checksums that are verified and kept. No
signature is checked. `GET /-stats` has the number of requests by method; a copy counts as COPY, a listing as LIST.

One process writes about 1,400 pictures of 0.2 MB a second with 0.7 ms of CPU each, most of it for MD5 and SHA-256; or
10,000 records of 1.5 kB with 0.1 ms; and it reads 23,000 of them (a core of two of an AMD EPYC with other work on them;
`python -m benchmarks.stub_load` measures it). At 40 pictures a second it is busy for a twentieth of the time.
"""

from __future__ import annotations

import base64
import hashlib
import time
from bisect import bisect_right
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

from benchmarks.stub_http import Answer, Request, Traffic, options, serve, unchunked

PAGE = 1000
"""The most keys of a listing's page."""
_KEPT = ("content-type", "cache-control", "content-disposition", "content-language", "expires")
"""The headers that are kept beside `x-amz-meta-…`, and given back."""
_MESSAGES = {
    "BadDigest": (400, "The checksum you specified did not match what we received."),
    "InvalidRequest": (400, "The request is not valid."),
    "NoSuchBucket": (404, "The specified bucket does not exist."),
    "NoSuchKey": (404, "The specified key does not exist."),
    "MethodNotAllowed": (405, "The specified method is not allowed against this resource."),
    "PreconditionFailed": (412, "At least one of the pre-conditions you specified did not hold."),
    "NotImplemented": (501, "A header or parameter you provided implies functionality that is not implemented."),
}
"""Status and message of each error code (https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html)."""


@dataclass(frozen=True)
class StoredContent:
    """An object as it was last written.

    Attributes:
        data: The content.
        etag: Its MD5 in quotes.
        sha256: The checksum that was sent with it, in base64; None without one.
        headers: What was said of it: type, metadata and the like.
        modified: When it was written, in seconds since 1970.
    """

    data: bytes
    etag: str
    sha256: str | None
    headers: tuple[tuple[str, str], ...]
    modified: float


@dataclass
class Bucket:
    """Objects by key.

    Attributes:
        objects: The objects.
        order: The keys in order, for listings; None when it has to be made anew.
    """

    objects: dict[str, StoredContent] = field(default_factory=dict)
    order: list[str] | None = None

    def put(self, key: str, content: StoredContent) -> None:
        """Writes an object."""
        if key not in self.objects:
            self.order = None
        self.objects[key] = content

    def delete(self, key: str) -> None:
        """Removes an object, if it is there."""
        if self.objects.pop(key, None):
            self.order = None

    def after(self, key: str) -> list[str]:
        """The keys behind a key, in order."""
        if self.order is None:
            self.order = sorted(self.objects, key=lambda each: each.encode())
        return self.order[bisect_right(self.order, key.encode(), key=lambda each: each.encode()) :]


class Refused(Exception):
    """A request that is answered with an error code of S3."""


class StubS3:
    """The endpoints of S3, by path: `/bucket/key`.

    Args:
        latency: Seconds from a request to its answer.
        buckets: The buckets that there are at the start.
        ignores_conditions: Whether conditions of writes are taken for nothing, as by some S3-compatible servers.

    Attributes:
        traffic: The requests by method.
    """

    def __init__(
        self, latency: float = 0.0, buckets: tuple[str, ...] = (), *, ignores_conditions: bool = False
    ) -> None:
        self.traffic = Traffic()
        self._latency = latency
        self._buckets = {name: Bucket() for name in buckets}
        self._ignores_conditions = ignores_conditions
        self._large: dict[str, bytes] = {}

    def answer(self, request: Request) -> Answer:
        """Answers a request.

        Args:
            request: The request.
        """
        if request.path == "/-stats":
            return self.traffic.as_json()
        bucket, _, key = request.path.removeprefix("/").partition("/")
        name = request.method
        if name == "GET" and not key:
            name = "LIST"
        elif name == "PUT" and "x-amz-copy-source" in request.headers:
            name = "COPY"
        try:
            answer = self._of_object(name, bucket, key, request) if key else self._of_bucket(name, bucket, request)
        except Refused as refused:
            answer = _error(str(refused), request.path)
        return answer._replace(delay=self._latency, counted=name)

    def _bucket(self, name: str) -> Bucket:
        if name not in self._buckets:
            raise Refused("NoSuchBucket")
        return self._buckets[name]

    def _of_bucket(self, name: str, bucket: str, request: Request) -> Answer:
        match name:
            case "PUT":
                self._buckets.setdefault(bucket, Bucket())
                return Answer()
            case "HEAD":
                self._bucket(bucket)
                return Answer()
            case "LIST":
                return _listing(bucket, self._bucket(bucket), request.query)
        raise Refused("MethodNotAllowed")

    def _of_object(self, name: str, bucket_name: str, key: str, request: Request) -> Answer:
        bucket = self._bucket(bucket_name)
        found = bucket.objects.get(key)
        match name:
            case "GET" | "HEAD":
                if found is None:
                    raise Refused("NoSuchKey")
                return _content(found, checked=request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED")
            case "PUT":
                self._check(found, request.headers)
                bucket.put(key, written := self._received(request))
                checksum = (("x-amz-checksum-sha256", written.sha256),) if written.sha256 else ()
                return Answer(headers=(("ETag", written.etag), *checksum))
            case "COPY":
                return self._copied(bucket, key, request.headers)
            case "DELETE":
                self._check(found, request.headers)
                bucket.delete(key)
                return Answer(204)
        raise Refused("MethodNotAllowed")

    def _check(self, found: StoredContent | None, headers: dict[str, str]) -> None:
        """Refuses a write whose condition does not hold."""
        if self._ignores_conditions:
            return
        if headers.get("if-none-match") == "*" and found is not None:
            raise Refused("PreconditionFailed")
        if "if-match" in headers and found is None:
            raise Refused("NoSuchKey")
        if "if-match" in headers and found is not None and headers["if-match"] not in ("*", found.etag):
            raise Refused("PreconditionFailed")

    def _received(self, request: Request) -> StoredContent:
        headers = request.headers
        data = unchunked(request.body) if "aws-chunked" in headers.get("content-encoding", "") else request.body
        sha256 = headers.get("x-amz-checksum-sha256")
        if sha256 and base64.b64encode(hashlib.sha256(data).digest()).decode() != sha256:
            raise Refused("BadDigest")
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if len(data) > 50_000:  # the pictures of a batch are all the same here, and kept once
            data = self._large.setdefault(etag, data)
        kept = tuple(
            (name, value) for name, value in headers.items() if name in _KEPT or name.startswith("x-amz-meta-")
        )
        return StoredContent(data, f'"{etag}"', sha256, kept, time.time())

    def _copied(self, bucket: Bucket, key: str, headers: dict[str, str]) -> Answer:
        from_bucket, _, from_key = unquote(headers["x-amz-copy-source"]).removeprefix("/").partition("/")
        source = self._bucket(from_bucket).objects.get(from_key)
        if source is None:
            raise Refused("NoSuchKey")
        if not self._ignores_conditions and headers.get("x-amz-copy-source-if-match", source.etag) != source.etag:
            raise Refused("PreconditionFailed")
        self._check(bucket.objects.get(key), headers)
        copy = StoredContent(source.data, source.etag, source.sha256, source.headers, time.time())
        bucket.put(key, copy)
        return _xml("CopyObjectResult", f"<ETag>{copy.etag}</ETag><LastModified>{_iso(copy.modified)}</LastModified>")


def _content(found: StoredContent, *, checked: bool) -> Answer:
    """An object; with the checksum that it was written with, if that is asked for."""
    headers = [("ETag", found.etag), ("Last-Modified", formatdate(int(found.modified), usegmt=True)), *found.headers]
    if checked and found.sha256:
        headers.append(("x-amz-checksum-sha256", found.sha256))
    return Answer(200, found.data, tuple(headers))


def _listing(name: str, bucket: Bucket, query: dict[str, str]) -> Answer:
    """A page of ListObjectsV2. Its token is the last key of the page."""
    if "delimiter" in query or query.get("list-type") != "2":
        raise Refused("NotImplemented")
    prefix, most = query.get("prefix", ""), min(int(query.get("max-keys", PAGE)), PAGE)
    shown = quote if query.get("encoding-type") == "url" else escape
    behind = bucket.after(unquote(query.get("continuation-token", "")) or query.get("start-after", ""))
    keys = [key for key in behind if key.startswith(prefix)][: most + 1]
    page, more = keys[:most], len(keys) > most
    parts = [f"<Name>{name}</Name><Prefix>{shown(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"]
    parts.append(f"<MaxKeys>{most}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>")
    if "encoding-type" in query:
        parts.append("<EncodingType>url</EncodingType>")
    if more:
        parts.append(f"<NextContinuationToken>{quote(page[-1])}</NextContinuationToken>")
    for key in page:
        each = bucket.objects[key]
        parts.append(
            f"<Contents><Key>{shown(key)}</Key><LastModified>{_iso(each.modified)}</LastModified>"
            f"<ETag>{escape(each.etag)}</ETag><Size>{len(each.data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )
    return _xml("ListBucketResult", "".join(parts))


def _xml(root: str, content: str, status: int = 200, namespace: bool = True) -> Answer:
    space = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"' if namespace else ""
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<{root}{space}>{content}</{root}>'
    return Answer(status, text.encode(), (("Content-Type", "application/xml"),))


def _error(code: str, path: str) -> Answer:
    status, message = _MESSAGES[code]
    content = f"<Code>{code}</Code><Message>{message}</Message><Resource>{escape(path)}</Resource>"
    return _xml("Error", content, status, namespace=False)


def _iso(seconds: float) -> str:
    """The form of S3's times in XML, whose fraction is zero like that of `Last-Modified`."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def main() -> None:
    """Serves until SIGTERM."""
    parser = options(__doc__)
    parser.add_argument("--bucket", action="append", help="a bucket that is there at the start; may be repeated")
    parser.add_argument("--ignore-conditions", action="store_true", help="write whatever the conditions are")
    given = parser.parse_args()
    stub = StubS3(given.latency, tuple(given.bucket or ["bench"]), ignores_conditions=given.ignore_conditions)
    serve(stub.answer, stub.traffic, given.port)


if __name__ == "__main__":
    main()
