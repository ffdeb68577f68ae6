"""S3 through boto3: the store in a bucket, single objects, presigned addresses.

Importing this costs about a second of boto3, so it is imported where an `s3://` address turns up.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import boto3
from botocore import exceptions as aws
from botocore.config import Config

from prefect_segmind._version import __version__
from prefect_segmind.errors import ConfigurationError, PreconditionFailedError, StoreError
from prefect_segmind.log_guard import guard_logs
from prefect_segmind.storage.s3_errors import LOST, error_code, may_be_the_checksum, s3_errors, status_of
from prefect_segmind.storage.store import Conditions, Facts, StoredObject, require

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        GetObjectOutputTypeDef,
        HeadObjectOutputTypeDef,
        HeadObjectRequestTypeDef,
        PutObjectRequestTypeDef,
    )

_CONFLICT_WAITS = (0.1, 0.3, 1.0, 2.0)
"""Seconds before a write is tried again that the server refused because of another one in progress."""
_CUT_WAITS = (0.1, 0.3, 1.0)
"""Seconds before an object is read again whose content broke off: botocore repeats a request, but not the reading of
its answer, and servers that write in place break it off when the object is written meanwhile."""
PROBE_KEY = ".segmind/conditional-writes"
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_creating = threading.Lock()
_trying_without = threading.Lock()
_log = logging.getLogger("prefect.segmind")


def s3_client() -> S3Client:
    """A client by the AWS configuration: profile, role, region, `AWS_ENDPOINT_URL_S3`. Threads may share it.

    It signs with SigV4, times out after 10 s for a connection and 60 s for an answer, and sends a request up to three
    times. Custom endpoints get path-style addresses, as botocore chooses by itself. At AWS the bucket becomes part of
    the regional host name, unless the AWS configuration says otherwise: by default a presigned address names the global
    host, which redirects for young buckets in other regions, and a redirected signature is refused
    (https://github.com/boto/boto3/issues/3015).

    Raises:
        StoreCredentialsError: The profile is unknown, or its credentials cannot be loaded.
        ConfigurationError: The endpoint or the AWS configuration is malformed.
    """
    settings = Config(
        signature_version="s3v4",
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": 3},
        max_pool_connections=512,  # as many as a batch may have threads: any more would be opened anew for each request
        # botocore's own is put together for each request, which takes an eighth of the request's CPU.
        user_agent=f"prefect-segmind/{__version__} Boto3/{boto3.__version__}",
        response_checksum_validation="when_required",  # see `ask_for_no_checksums`
    )
    guard_logs()
    with _creating, s3_errors("make an S3 client"):
        session = boto3.session.Session()  # sessions, unlike clients, are not thread-safe
        client = session.client("s3", config=settings)
        at_aws = re.search(r"\.amazonaws\.com(\.cn)?$", client.meta.endpoint_url)
        if at_aws and not getattr(client.meta.config, "s3", None):
            client = session.client("s3", config=settings.merge(Config(s3={"addressing_style": "virtual"})))
        return client


def ask_for_no_checksums(client: S3Client) -> None:
    """Make a client read without asking for checksums: our own hashes verify what it reads.

    botocore's check breaks on a 5xx with a checksum header (AttributeError: 'StreamingChecksumBody' object has no
    attribute 'strip'), which S3-compatible servers send, and some servers refuse requests that ask for checksums.

    Args:
        client: The client to change.
    """
    config: Any = client.meta.config
    config.response_checksum_validation = "when_required"


def encrypt_writes(client: S3Client, encryption: str | None) -> None:
    """Make a client ask for server-side encryption with each write, copies included.

    Args:
        client: The client to change.
        encryption: `AES256`, `aws:kms` for the account's own key, `aws:kms:` and the id or ARN of a key, or None.
    """
    headers = {"ServerSideEncryption": encryption} if encryption else {}
    if encryption and encryption.startswith("aws:kms:"):
        headers = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": encryption.removeprefix("aws:kms:")}

    def add(params: dict[str, Any], **_: Any) -> None:
        params.update(headers)

    for operation in ("PutObject", "CopyObject"):
        event = f"before-parameter-build.s3.{operation}"
        client.meta.events.unregister(event, unique_id="segmind-encryption")
        client.meta.events.register(event, add, unique_id="segmind-encryption")


def sign_where_buckets_are(client: S3Client) -> None:
    """Make a client presign addresses for the region to which a bucket's requests were redirected.

    botocore remembers a redirect for its next requests and for the host of a presigned address, but signs that address
    for the client's own region, which is refused.

    Args:
        client: The client to change.
    """
    regions: dict[str, str] = {}

    def before_sign(request: Any, region_name: str, **_: Any) -> None:
        bucket = request.context.get("s3_redirect", {}).get("bucket")
        signing = request.context.setdefault("signing", {})
        if request.context.get("is_presign_request"):
            if bucket in regions:
                signing["region"] = regions[bucket]
        elif signing.get("region", region_name) != region_name:
            regions[bucket] = signing["region"]

    client.meta.events.register("before-sign.s3", before_sign, unique_id="segmind-regions")


def split_uri(uri: str) -> tuple[str, str]:
    """The bucket and the key of an address.

    Args:
        uri: `s3://bucket/key`, the key not encoded, or `s3://bucket`.

    Returns:
        The bucket, and the key or an empty text.

    Raises:
        ConfigurationError: The address has another form.

    Example:
        >>> split_uri("s3://pictures/summer/hat 1.png")
        ('pictures', 'summer/hat 1.png')
    """
    found = re.fullmatch(r"(?is)s3://([a-z0-9][a-z0-9._-]{1,254})(?:/(.*))?", uri)
    if not found:
        raise ConfigurationError(f"{uri!r} is not an S3 address: write s3://bucket/key, the key not encoded")
    return found[1], found[2] or ""


@dataclass(frozen=True)
class ObjectInfo:
    """An object's metadata.

    Attributes:
        key: Its key in the bucket.
        size: Its length in bytes.
        etag: Its ETag without the quotes, which some servers leave out in a listing.
        modified: When it was last written, in seconds since 1970; a listing and a HEAD may round it differently.
        now: The time of the answer by the server's clock; ignored in comparisons.
    """

    key: str
    size: int
    etag: str
    modified: float
    now: float = field(compare=False)


def read(uri: str, client: S3Client, limit: int | None = None) -> bytes:
    """The content of any object.

    Args:
        uri: `s3://bucket/key`.
        client: As of `s3_client()`.
        limit: The most bytes that it may have; any number if None.

    Raises:
        ConfigurationError: The address is malformed or names no object.
        StoreError: The object does not exist, is larger, or cannot be read.
    """
    bucket, key = _object(uri)
    sign_where_buckets_are(client)
    with s3_errors(f"read {uri}", client):
        found = _read(client, bucket, key, limit)
    if found is None:
        raise StoreError(f"{uri} does not exist: check the key", status=404)
    answer, data = found
    if data is None:
        raise StoreError(f"{uri} has {answer['ContentLength']} bytes, more than the {limit} that are read")
    return data


def list_objects(uri: str, client: S3Client) -> Iterator[ObjectInfo]:
    """The objects whose keys start with that of an address, without "folder" markers, read page by page.

    Args:
        uri: `s3://bucket`, or `s3://bucket/` and the first characters of the keys.
        client: As of `s3_client()`.

    Raises:
        ConfigurationError: The address is malformed.
        StoreError: The bucket cannot be listed.
    """
    bucket, prefix = split_uri(uri)
    with s3_errors(f"list {uri}", client):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                if not entry.get("Key", "/").endswith("/"):
                    yield _info(entry.get("Key", ""), entry, entry.get("Size", 0), page)


def stat(uri: str, client: S3Client) -> ObjectInfo | None:
    """An object's metadata, by HEAD; None if the object does not exist.

    Args:
        uri: `s3://bucket/key`.
        client: As of `s3_client()`.

    Raises:
        ConfigurationError: The address is malformed or names no object.
        StoreError: S3 refuses or does not answer.
    """
    bucket, key = _object(uri)
    with s3_errors(f"read {uri}", client):
        try:
            head = client.head_object(Bucket=bucket, Key=key)
        except aws.ClientError as error:
            if status_of(error) == 404:
                return None
            raise
        return _info(key, head, head["ContentLength"], head)


def exists(uri: str, client: S3Client) -> bool:
    """Whether an object exists, by HEAD; also True if the HEAD is refused, so that reading the object raises.

    Args:
        uri: `s3://bucket/key`.
        client: As of `s3_client()`.

    Raises:
        ConfigurationError: The address is malformed or names no object.
        StoreError: S3 does not answer.
    """
    try:
        return stat(uri, client) is not None
    except StoreError as error:
        if error.status is None:
            raise
        return True


def copy(source: str, target: str, client: S3Client, *, etag: str) -> None:
    """Copy an object within S3, if it still has this ETag, to a key that does not exist yet.

    A condition that boto3 or the server does not know is left out, and some servers ignore it: so check both before.

    Args:
        source: `s3://bucket/key` of the object.
        target: `s3://bucket/key` of the copy.
        client: As of `s3_client()`.
        etag: As in `ObjectInfo`.

    Raises:
        ConfigurationError: An address is malformed or names no object.
        PreconditionFailedError: The source has changed, or the target exists.
        StoreError: S3 refuses or does not answer.
    """
    (bucket, key), (to_bucket, to_key) = _object(source), _object(target)
    request = {
        "Bucket": to_bucket,
        "Key": to_key,
        "CopySource": {"Bucket": bucket, "Key": key},
        "CopySourceIfMatch": f'"{etag}"',
    }
    with s3_errors(f"copy {source} to {target}", client):
        _call_if(client.copy_object, request, {"IfNoneMatch": "*"})


def delete(uri: str, client: S3Client, *, etag: str) -> None:
    """Delete an object if it still has this ETag, as far as boto3 and the server know that condition.

    Args:
        uri: `s3://bucket/key`.
        client: As of `s3_client()`.
        etag: As in `ObjectInfo`.

    Raises:
        ConfigurationError: The address is malformed or names no object.
        PreconditionFailedError: The object has changed.
        StoreError: S3 refuses or does not answer.
    """
    bucket, key = _object(uri)
    with s3_errors(f"delete {uri}", client):
        _call_if(client.delete_object, {"Bucket": bucket, "Key": key}, {"IfMatch": f'"{etag}"'})


def presign_uri(uri: str, client: S3Client, seconds: int) -> str:
    """An https address by which anybody can GET the object until it, or the credentials that signed it, expire.

    It is a bearer secret: never log, store or show it. No request is sent. It is signed for the region to which this
    client's earlier requests to the bucket were redirected.

    Args:
        uri: `s3://bucket/key`.
        client: One that signs with SigV4, as `s3_client()` does.
        seconds: How long it is valid, up to 604800: seven days, the most that SigV4 allows
            (https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html).

    Raises:
        ConfigurationError: The address is malformed, or the client signs with the old SigV2.
        StoreCredentialsError: There are no credentials to sign with.
    """
    bucket, key = _object(uri)
    with s3_errors(f"sign an address for {uri}", client):
        url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=seconds)
    if "X-Amz-Signature=" not in url:
        raise ConfigurationError("the S3 client signs with SigV2: make it with Config(signature_version='s3v4')")
    return url


def credentials_expire_in(client: S3Client) -> float | None:
    """Seconds until the current credentials expire, refreshed first if due; None if they do not, or that is unknown.

    Args:
        client: As of `s3_client()`.

    Raises:
        StoreCredentialsError: They have to be refreshed and cannot be.
    """
    # botocore has no public access to a client's credentials and their expiry; a test pins these private names.
    credentials: Any = getattr(getattr(client, "_request_signer", None), "_credentials", None)
    if credentials is None:
        return None
    with s3_errors("refresh the S3 credentials", client):
        credentials.get_frozen_credentials()
    expiry = getattr(credentials, "_expiry_time", None)
    return (expiry - datetime.now(UTC)).total_seconds() if isinstance(expiry, datetime) else None


class S3Store:
    """A store in a bucket.

    Args:
        bucket: It must exist.
        prefix: The start of all keys; slashes around it are ignored.
        client: As of `s3_client()`; threads may share it.
    """

    def __init__(self, bucket: str, prefix: str, client: S3Client) -> None:
        self._bucket = bucket
        self._root = f"{prefix.strip('/')}/".lstrip("/")
        self._client = client
        self._probing = threading.Lock()
        self._conditions: Conditions | None = None
        sign_where_buckets_are(client)

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self._bucket}/{self._root}".rstrip("/")

    @property
    def conditions(self) -> Conditions:
        """Whether the server honours `If-None-Match: *` and `If-Match`; probed once, by `.segmind/conditional-writes`.

        Some servers accept a header and ignore it, hence writes that must be refused; some refuse it always, hence one
        that must not be.

        Raises:
            StoreError: The server does not answer, or refuses a write for another reason.
        """
        with self._probing:
            if self._conditions is None:
                self._conditions = Conditions(self._probe_if_absent(), self._probe_if_match())
            return self._conditions

    @property
    def conditional(self) -> bool:
        """Whether it honours both."""
        return all(self.conditions)

    @property
    def checksums(self) -> bool:
        """Whether writes send checksums: yes, unless the server or the AWS configuration refuses them."""
        config: Any = self._client.meta.config
        return bool(config.request_checksum_calculation != "when_required")

    def uri(self, key: str) -> str:
        """`s3://bucket/prefix/key`.

        Args:
            key: The object's key.
        """
        return f"{self.url}/{key}"

    def get(self, key: str) -> StoredObject | None:
        """The object; None only for a `NoSuchKey`. Without the right s3:ListBucket, S3 answers 403: an error.

        Args:
            key: Its key.

        Raises:
            StoreError: It cannot be read; the subclass says why.
        """
        with s3_errors(f"read {self.uri(key)}", self._client):
            found = _read(self._client, self._bucket, self._root + key)
            if found is None:
                return None
            answer, data = found
            now, written = _date(answer), answer["LastModified"].timestamp()
            return StoredObject(data or b"", answer["ETag"], written, lambda: now)

    def stat(self, key: str) -> Facts | None:
        """The object's facts, by HEAD; see `Store.stat`.

        Raises:
            StoreError: It cannot be read; the subclass says why.
        """
        head = self._head(key)
        if head is None:
            found = self.get(key)
            return Facts(len(found.data), hashlib.sha256(found.data).hexdigest()) if found else None
        checksum = head.get("ChecksumSHA256", "-")  # with a dash: of a multipart upload
        return Facts(head["ContentLength"], None if "-" in checksum else base64.b64decode(checksum).hex())

    def put(
        self,
        key: str,
        data: bytes,
        content_type: str,
        *,
        if_absent: bool = False,
        if_match: str | None = None,
        cache_control: str | None = None,
    ) -> str:
        """Write an object, with its SHA-256 for the server to check; see `Store.put`.

        A condition that the server ignores is checked beforehand, and another writer may get in between. The checksum
        is left out once the server has refused it, and under `AWS_REQUEST_CHECKSUM_CALCULATION=when_required`.

        Raises:
            PreconditionFailedError: The condition does not hold.
            StoreError: It cannot be written; the subclass says why.
        """
        headers = {} if cache_control is None else {"CacheControl": cache_control}
        if if_absent or if_match is not None:
            if self.conditions.if_absent if if_match is None else self.conditions.if_match:
                headers |= {"IfNoneMatch": "*"} if if_match is None else {"IfMatch": if_match}
            else:
                require(self.get(key), self.uri(key), if_absent=if_absent, if_match=if_match)
        for wait in (*_CONFLICT_WAITS, None):
            try:
                return self._put(key, data, content_type, **headers)
            except PreconditionFailedError as error:
                # botocore repeats a put whose answer was lost, and the repeat is refused because of our own object.
                found = self.get(key)
                if found is not None and found.data == data:
                    return found.etag
                # A 409 says only that another write was in progress, which may have come to nothing.
                holds = found is None if if_match is None else found is not None and found.etag == if_match
                if error.status != 409 or not holds:
                    raise
                if wait is None:
                    raise StoreError(f"{error}, again and again; run again later", status=409) from None
                time.sleep(wait)
        raise AssertionError  # the last round returns or raises

    @property
    def folds_case(self) -> bool:
        """Never: the keys of a bucket are taken byte by byte."""
        return False

    def in_the_way(self, key: str) -> str | None:
        """Nothing is: a bucket has no folders."""
        return None

    def holds(self, key: str, data: bytes) -> bool:
        """Whether the object has this content, by HEAD: the size must agree, and the SHA-256 and ETag if known.

        The ETag is the MD5 of the content only if it looks like one and no KMS key is in use (https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html).

        Args:
            key: Its key.
            data: The content to compare with.

        Raises:
            StoreError: It cannot be read; the subclass says why.
        """
        head = self._head(key)
        if head is None:
            found = self.get(key)
            return found is not None and found.data == data
        checksum, etag = head.get("ChecksumSHA256"), _MD5.fullmatch(head["ETag"])
        plain = not head.get("ServerSideEncryption", "").startswith("aws:kms")
        return (
            head["ContentLength"] == len(data)
            and (not checksum or "-" in checksum or checksum == _sha256(data))  # with a dash: of a multipart upload
            and (not etag or not plain or etag[1] == hashlib.md5(data, usedforsecurity=False).hexdigest())
        )

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys that start with these characters, without "folder" markers; see `Store.keys`."""
        for each in list_objects(f"s3://{self._bucket}/{self._root}{prefix}", self._client):
            yield each.key.removeprefix(self._root)

    def dated_keys(self, prefix: str) -> Iterator[tuple[str, float]]:
        """The same with their times, which S3 counts in whole seconds; see `Store.dated_keys`."""
        for each in list_objects(f"s3://{self._bucket}/{self._root}{prefix}", self._client):
            yield each.key.removeprefix(self._root), each.modified

    def _head(self, key: str) -> HeadObjectOutputTypeDef | None:
        """The answer to a HEAD; None if S3 refuses it, which may mean the key or the bucket: a GET has to tell."""
        where: HeadObjectRequestTypeDef = {"Bucket": self._bucket, "Key": self._root + key}
        if self.checksums:
            where["ChecksumMode"] = "ENABLED"
        with s3_errors(f"read {self.uri(key)}", self._client):
            try:
                return self._client.head_object(**where)
            except aws.ClientError:
                return None

    def _put(self, key: str, data: bytes, content_type: str, **more: Any) -> str:
        request: PutObjectRequestTypeDef = {
            "Bucket": self._bucket,
            "Key": self._root + key,
            "Body": data,
            "ContentType": content_type,
            **more,  # type: ignore[typeddict-item]
        }
        # Both: a server may keep the checksum only if the algorithm is named as well, as moto does.
        checked: PutObjectRequestTypeDef = {**request, "ChecksumAlgorithm": "SHA256", "ChecksumSHA256": _sha256(data)}
        with s3_errors(f"write {self.uri(key)}", self._client):
            if not self.checksums:
                return self._client.put_object(**request)["ETag"]
            try:
                return self._client.put_object(**checked)["ETag"]
            except aws.ClientError as error:
                if not may_be_the_checksum(error):
                    raise
            return _put_without_checksum(self._client, request)

    def _probe_if_absent(self) -> bool:
        return any(self._probe(IfNoneMatch="*") is False for _ in range(2))

    def _probe_if_match(self) -> bool:
        for _ in range(3):  # another process may probe at the same time
            found = self.get(PROBE_KEY)
            if found is None:
                self._probe()
            elif self._probe(IfMatch=found.etag):
                return self._probe(IfMatch=f'"{"0" * 32}"') is False
        return False

    def _probe(self, **condition: str) -> bool | None:
        """Whether the server writes the object of the probe under a condition; None if it does not know the header."""
        try:
            self._put(PROBE_KEY, b"asked whether conditions of writes are honoured\n", "text/plain", **condition)
        except PreconditionFailedError:
            return False
        except StoreError as error:
            if condition and type(error) is StoreError and error.status in (400, 501):
                return None
            raise
        return True


def _object(uri: str) -> tuple[str, str]:
    bucket, key = split_uri(uri)
    if not key:
        raise ConfigurationError(f"{uri!r} names a bucket, not an object: write s3://bucket/key")
    return bucket, key


def _info(key: str, facts: Any, size: int, answer: Any) -> ObjectInfo:
    return ObjectInfo(key, size, facts.get("ETag", "").strip('"'), facts["LastModified"].timestamp(), _date(answer))


def _date(answer: Any) -> float:
    """The time of an answer in seconds since 1970, by the server's clock or, without a date, by this machine's."""
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return (parsedate_to_datetime(date) if date else datetime.now(UTC)).timestamp()


def _call_if(call: Callable[..., object], request: dict[str, Any], condition: dict[str, str]) -> None:
    """Call with a condition, or without it if this boto3 or the server does not know it."""
    try:
        call(**request, **condition)
    except (aws.ParamValidationError, aws.ClientError) as error:
        if isinstance(error, aws.ClientError) and status_of(error) not in (400, 501):
            raise
        call(**request)


def _sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _put_without_checksum(client: S3Client, request: PutObjectRequestTypeDef) -> str:
    """Write an object without a checksum, and all later ones unless this fails too; returns the ETag."""
    config: Any = client.meta.config  # botocore reads it for each request; otherwise it adds a checksum of its own
    with _trying_without:
        before = config.request_checksum_calculation
        config.request_checksum_calculation = "when_required"
        try:
            return client.put_object(**request)["ETag"]
        except Exception as error:
            if not (isinstance(error, aws.ClientError) and error_code(error) in LOST):  # it was not the checksum
                config.request_checksum_calculation = before
            raise
        finally:
            if config.request_checksum_calculation != before:
                ask_for_no_checksums(client)
                _log.info("%s refuses checksum headers: objects are written without", client.meta.endpoint_url)


def _read(
    client: S3Client, bucket: str, key: str, limit: int | None = None
) -> tuple[GetObjectOutputTypeDef, bytes | None] | None:
    """An object's answer and its content, None where it has more bytes than the limit; None if there is no object."""
    for wait in (*_CUT_WAITS, None):
        answer = _get(client, bucket, key)
        if answer is None:
            return None
        with closing(answer["Body"]) as body:
            if limit is not None and answer["ContentLength"] > limit:
                return answer, None
            try:
                return answer, body.read()
            except (aws.ResponseStreamingError, aws.IncompleteReadError):
                if wait is None:
                    raise
        time.sleep(wait)
    raise AssertionError("the last round returns or raises")


def _get(client: S3Client, bucket: str, key: str) -> GetObjectOutputTypeDef | None:
    try:
        return client.get_object(Bucket=bucket, Key=key)
    except aws.ClientError as error:
        if error_code(error) == "NoSuchKey":
            return None
        raise
