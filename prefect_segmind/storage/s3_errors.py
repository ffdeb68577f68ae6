"""Failures of S3 as errors of this package, with the reason and what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import TYPE_CHECKING

from botocore import exceptions as aws

from prefect_segmind.errors import (
    BucketNotFoundError,
    ConfigurationError,
    PreconditionFailedError,
    SegmindError,
    StoreAccessError,
    StoreCredentialsError,
    StoreError,
    StoreUnreachableError,
)
from prefect_segmind.storage.disk_errors import reason

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}\b")
_OURS = {"GetObject", "PutObject", "HeadObject", "ListObjectsV2", "CopyObject", "DeleteObject"}
LOST = {"PreconditionFailed", "ConditionalRequestConflict"}
"""Error codes for a condition that does not hold."""
_ENCRYPTION = "PREFECT_INTEGRATIONS_SEGMIND_S3_ENCRYPTION"

_READ = "s3:GetObject, s3:PutObject and s3:ListBucket (without it, S3 answers 403 for a missing object)"
_WRITE = f"{_READ}; if the bucket's policy requires encryption, set {_ENCRYPTION}=AES256, aws:kms or aws:kms:KEY-ID"
_RIGHTS = {"DeleteObject": "s3:DeleteObject, to move finished files", "PutObject": _WRITE, "CopyObject": _WRITE}

# Codes from https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_BAD_CREDENTIALS = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "NotSignedUp",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_BAD_REGION = {
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "IncorrectEndpoint",
    "PermanentRedirect",
    "TemporaryRedirect",
}
_NO_CREDENTIALS = (
    aws.CredentialRetrievalError,
    aws.MetadataRetrievalError,
    aws.MissingDependencyException,
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.ProfileNotFound,
    aws.RefreshWithMFAUnsupportedError,
    aws.SSOError,
    aws.TokenRetrievalError,
    aws.UnknownCredentialError,
    getattr(aws, "LoginError", aws.SSOError),  # `aws login`, younger than the oldest boto3 that we take
    JSONDecodeError,  # a credential_process that prints something else
)
_UNUSABLE_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Raised by botocore if a credential_process cannot be started or a file of its configuration cannot be read."""
_BAD_SETTINGS = (
    aws.ConfigNotFound,
    aws.ConfigParseError,
    aws.InvalidConfigError,
    aws.NoRegionError,
    aws.ParamValidationError,
    aws.ValidationError,
)
_UNREACHABLE = (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError, ConnectionError, TimeoutError)
_RENEW = "check AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or log in again"


def error_code(error: aws.ClientError) -> str:
    """The S3 error code of a refused call, such as `NoSuchKey`.

    Args:
        error: The refusal.
    """
    return error.response.get("Error", {}).get("Code", "")


def status_of(error: aws.ClientError) -> int | None:
    """The HTTP status of a refused call, if it has one.

    Args:
        error: The refusal.
    """
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def may_be_the_checksum(error: aws.ClientError) -> bool:
    """Whether a write may have been refused because of a checksum header, for which servers have many codes.

    Args:
        error: The refusal.
    """
    code, status = error_code(error), status_of(error)
    known = code in _BAD_CREDENTIALS | _BAD_REGION
    return code == "SignatureDoesNotMatch" or (status in (400, 411, 501) and not known)


@contextmanager
def s3_errors(doing: str, client: S3Client | None = None) -> Iterator[None]:
    """Turn the errors of botocore into errors of this package, without keys in their messages.

    Args:
        doing: What is done and to what, such as `read s3://bucket/key`.
        client: The client, whose endpoint is named.

    Raises:
        StoreError: S3 refused, failed or did not answer; the subclass says which.
        ConfigurationError: An address or the AWS configuration is malformed.
    """
    try:
        yield
    except (aws.BotoCoreError, aws.ClientError, OSError, RuntimeError, ValueError) as error:
        where = f"cannot {doing}" + (f" at {client.meta.endpoint_url}" if client else "")
        kind, words = _refusal(error) if isinstance(error, aws.ClientError) else _failure(error)
        status = status_of(error) if isinstance(error, aws.ClientError) else None
        raise kind(_KEY_ID.sub("…", f"{where}: {words}"), status=status) from None  # botocore's text may hold a key


def _refusal(error: aws.ClientError) -> tuple[type[SegmindError], str]:
    """The class and the message for a refusal by the server."""
    code, status, operation = error_code(error), status_of(error), error.operation_name
    answer = f"{code}: {error.response.get('Error', {}).get('Message', '')}".strip(": ")
    if operation not in _OURS:  # STS or SSO, on the way to credentials
        return StoreCredentialsError, f"{operation} was refused ({answer}); {_RENEW}"
    if code in _BAD_CREDENTIALS:  # some servers put the key into the message
        return StoreCredentialsError, f"the S3 credentials are wrong or have expired ({code}); {_RENEW}"
    if code == "RequestTimeTooSkewed":
        return StoreCredentialsError, f"the signature's date is wrong ({code}); set this machine's clock"
    if code == "NoSuchBucket":
        return BucketNotFoundError, "the bucket does not exist there; create it, or check AWS_ENDPOINT_URL_S3"
    if code in _BAD_REGION or status in (301, 307):
        return BucketNotFoundError, f"the region is wrong; set AWS_DEFAULT_REGION to the bucket's ({answer})"
    if status == 412 or code in LOST or (code == "NoSuchKey" and operation == "PutObject"):
        return PreconditionFailedError, f"somebody else has written or removed it since it was read ({code})"
    if status == 403:
        rights = _RIGHTS.get(operation, _READ)
        return StoreAccessError, f"access denied ({answer}); allow {rights}"
    words = f"the server answered {status} {answer}; check AWS_ENDPOINT_URL_S3 and the address"
    if code.startswith("KMS."):
        words = f"the encryption key cannot be used ({answer}); check {_ENCRYPTION} and the key"
    elif status == 501:
        words = f"the server cannot do this ({answer}); unset {_ENCRYPTION} if it is set, or use another store"
    elif status is not None and status >= 500:
        words = f"the server failed ({status} {answer}); run again later"
    return StoreError, words


def _failure(error: Exception) -> tuple[type[SegmindError], str]:
    """The class and the message for a failure without an answer; botocore's own text only where it holds no secret."""
    name = type(error).__name__
    if isinstance(error, aws.SSLError):
        return StoreUnreachableError, f"no answer ({name}); check AWS_ENDPOINT_URL_S3, AWS_CA_BUNDLE and any proxy"
    if _lacks_files(error):
        remedy = "allow more (ulimit -n), or run fewer assets at once"
        return StoreError, f"this process has too many files open ({name}); {remedy}"
    if isinstance(error, _UNREACHABLE):
        return StoreUnreachableError, f"no answer ({name}); check the network, AWS_ENDPOINT_URL_S3 and any proxy"
    if isinstance(error, _BAD_SETTINGS) or str(error).startswith("Invalid endpoint"):
        return ConfigurationError, f"the address or the AWS configuration is malformed ({error})"
    if isinstance(error, _UNUSABLE_FILE):
        what = f"a file or program of the AWS configuration cannot be used ({name}: {error.filename})"
        return StoreCredentialsError, f"{what}; {_RENEW}"
    if isinstance(error, OSError):
        return StoreError, f"this machine failed ({name}: {reason(error)}); check its disk and memory"
    if isinstance(error, _NO_CREDENTIALS) or type(error) is RuntimeError:  # botocore's for "refreshed, still expired"
        detail = f": {error}" if isinstance(error, (aws.ProfileNotFound, aws.PartialCredentialsError)) else ""
        return StoreCredentialsError, f"there are no usable S3 credentials ({name}{detail}); {_RENEW}"
    if isinstance(error, ValueError):  # its text may be a header with a key in it
        return ConfigurationError, f"the address or the AWS configuration is malformed ({name})"
    if isinstance(error, (aws.ChecksumError, aws.FlexibleChecksumError)):
        return StoreError, "the content does not match its checksum: damaged in the store or in transfer; run again"
    return StoreError, f"botocore failed ({name}: {error})"


def _lacks_files(error: BaseException | None) -> bool:
    """Whether a failure was caused by the limit of open files and connections."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        error = error.__cause__ or error.__context__
    return False
