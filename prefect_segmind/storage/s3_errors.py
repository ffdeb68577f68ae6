"""Every failure of S3 in plain words: which of our errors it is, what was wrong and what to do."""

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

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}\b")
_OURS = {"GetObject", "PutObject", "HeadObject", "ListObjectsV2", "CopyObject", "DeleteObject"}
LOST = {"PreconditionFailed", "ConditionalRequestConflict"}
"""Codes of a condition that does not hold."""
_ENCRYPTION = "PREFECT_INTEGRATIONS_SEGMIND_S3_ENCRYPTION"

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
"""What botocore lets through where a credential_process cannot be started, or a file of its configuration be read."""
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
    """The S3 error code of a refused call, such as `NoSuchKey`."""
    return error.response.get("Error", {}).get("Code", "")


def status_of(error: aws.ClientError) -> int | None:
    """The HTTP status of a refused call."""
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def may_be_the_checksum(error: aws.ClientError) -> bool:
    """Whether a write may have been refused because of a checksum header, for which servers have many codes."""
    code, status = error_code(error), status_of(error)
    known = code in _BAD_CREDENTIALS | _BAD_REGION
    return code == "SignatureDoesNotMatch" or (status in (400, 411, 501) and not known)


@contextmanager
def explained(doing: str, client: S3Client | None = None) -> Iterator[None]:
    """Turn whatever botocore raises into our errors, with the address and what to do, and no key in the text."""
    try:
        yield
    except (aws.BotoCoreError, aws.ClientError, OSError, RuntimeError, ValueError) as error:
        where = f"cannot {doing}" + (f" at {client.meta.endpoint_url}" if client else "")
        kind, words, status = _refusal(error) if isinstance(error, aws.ClientError) else _failure(error)
        raise kind(_KEY_ID.sub("…", f"{where}: {words}"), status=status) from None  # botocore's text may hold a key


def _refusal(error: aws.ClientError) -> tuple[type[SegmindError], str, int | None]:
    """The class, the message and the status for a refusal by the server."""
    code, status = error_code(error), status_of(error)
    answer = f"{code}: {error.response.get('Error', {}).get('Message', '')}".strip(": ")
    kind: type[SegmindError] = StoreError
    words = f"the server answered {status} {answer}; check AWS_ENDPOINT_URL_S3 and the address"
    if error.operation_name not in _OURS:  # STS or SSO, on the way to credentials
        kind, words = StoreCredentialsError, f"{error.operation_name} was refused ({answer}); {_RENEW}"
    elif code in _BAD_CREDENTIALS:  # some servers put the key into the message
        kind, words = StoreCredentialsError, f"the S3 credentials are wrong or have expired ({code}); {_RENEW}"
    elif code == "RequestTimeTooSkewed":
        kind, words = StoreCredentialsError, f"the signature's date is wrong ({code}); set this machine's clock"
    elif code == "NoSuchBucket":
        kind, words = BucketNotFoundError, "the bucket does not exist there; create it, or check AWS_ENDPOINT_URL_S3"
    elif code in _BAD_REGION or status in (301, 307):
        kind, words = BucketNotFoundError, f"the region is wrong; set AWS_DEFAULT_REGION to the bucket's ({answer})"
    elif status == 412 or code in LOST or (code == "NoSuchKey" and error.operation_name == "PutObject"):
        kind, words = PreconditionFailedError, f"somebody else has written or removed it since it was read ({code})"
    elif status == 403:
        rights = "s3:GetObject, s3:PutObject and s3:ListBucket (without it, S3 says 403 for what is not there)"
        if error.operation_name == "DeleteObject":
            rights = "s3:DeleteObject, to move what is done"
        elif error.operation_name in ("PutObject", "CopyObject"):
            rights += (
                f"; where the bucket's policy demands encryption, set {_ENCRYPTION}=AES256, aws:kms or aws:kms:KEY-ID"
            )
        kind, words = StoreAccessError, f"access denied ({answer}); allow {rights}"
    elif code.startswith("KMS."):
        words = f"the encryption key cannot be used ({answer}); check {_ENCRYPTION} and the key"
    elif status == 501:
        words = f"the server cannot do this ({answer}); unset {_ENCRYPTION} if it is set, or use another store"
    elif status is not None and status >= 500:
        words = f"the server failed ({status} {answer}); run again later"
    return kind, words, status


def _failure(error: Exception) -> tuple[type[SegmindError], str, None]:
    """The class and the message for a failure without an answer; botocore's own text only where it holds no secret."""
    name = type(error).__name__
    kind: type[SegmindError] = StoreError
    words = f"botocore failed ({name}: {error})"
    if isinstance(error, aws.SSLError):
        words = f"no answer ({name}); check AWS_ENDPOINT_URL_S3, AWS_CA_BUNDLE and any proxy"
        kind = StoreUnreachableError
    elif _lacks_files(error):
        words = f"this process has too many files open ({name}); allow more (ulimit -n), or run fewer assets at once"
    elif isinstance(error, _UNREACHABLE):
        kind, words = StoreUnreachableError, f"no answer ({name}); check the network, AWS_ENDPOINT_URL_S3 and any proxy"
    elif isinstance(error, _BAD_SETTINGS) or str(error).startswith("Invalid endpoint"):
        kind, words = ConfigurationError, f"the address or the AWS configuration is malformed ({error})"
    elif isinstance(error, _UNUSABLE_FILE):
        kind = StoreCredentialsError
        words = f"a file or program of the AWS configuration cannot be used ({name}: {error.filename}); {_RENEW}"
    elif isinstance(error, OSError):
        words = f"this machine failed ({name}: {error.strerror or error}); check its disk and memory"
    elif isinstance(error, _NO_CREDENTIALS) or type(error) is RuntimeError:  # botocore's for "refreshed, still expired"
        detail = f": {error}" if isinstance(error, (aws.ProfileNotFound, aws.PartialCredentialsError)) else ""
        kind, words = StoreCredentialsError, f"there are no usable S3 credentials ({name}{detail}); {_RENEW}"
    elif isinstance(error, ValueError):  # its text may be a header with a key in it
        kind, words = ConfigurationError, f"the address or the AWS configuration is malformed ({name})"
    elif isinstance(error, (aws.ChecksumError, aws.FlexibleChecksumError)):
        words = "the content does not match its checksum: it was damaged in the store or on the way; run again"
    return kind, words, None


def _lacks_files(error: BaseException | None) -> bool:
    """Whether a failure was caused by the limit of open files and connections."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        error = error.__cause__ or error.__context__
    return False
