"""Opening the store at an address: a bucket or a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import url2pathname

from prefect_segmind.errors import ConfigurationError
from prefect_segmind.storage.local import LocalStore
from prefect_segmind.storage.store import Store
from prefect_segmind.text import QUOTED

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def path_of_file_url(url: str) -> str:
    """The path of a local `file:` URL, in which `#` and `?` are part of the path; any other address unchanged.

    Args:
        url: The address.

    Example:
        >>> path_of_file_url("file:///srv/live#1"), path_of_file_url("s3://bucket/live")
        ('/srv/live#1', 's3://bucket/live')
    """
    found = re.match(r"(?i)file:(//(localhost)?(?=/)|(?=/(?!/)))", url)
    return url2pathname(url[found.end() :]) if found else url


def is_s3(url: str) -> bool:
    """Whether an address is in S3, in any case of its scheme.

    Args:
        url: The address.

    Example:
        >>> is_s3("S3://bucket/mug.jpg"), is_s3("s3/mug.jpg")
        (True, False)
    """
    return url[:5].lower() == "s3://"


def open_store(url: str, client: S3Client | None = None) -> Store:
    """The store at an address.

    Args:
        url: `s3://bucket[/prefix]`, a folder (`~` is the home), or `file:///folder`.
        client: A boto3 S3 client for an `s3://` address; without one, `prefect_segmind.storage.s3.s3_client()`.

    Raises:
        ConfigurationError: The address is of another kind, or the S3 client cannot be created.

    Example:
        >>> open_store("~/pictures").conditional
        True
    """
    if is_s3(url):
        from prefect_segmind.storage.s3 import S3Store, s3_client, split_uri  # boto3 takes a second to import

        bucket, prefix = split_uri(url)
        return S3Store(bucket, prefix, client or s3_client())
    if QUOTED.fullmatch(url):
        raise ConfigurationError(f"unsupported location {url}: remove the quotes")
    allowed = "use s3://bucket/prefix, a folder, or file:///folder"
    url = path_of_file_url(url)
    if re.match(r"(?i)[a-z][a-z0-9+.-]+://|file:|s3:", url) or not url.strip():
        raise ConfigurationError(f"unsupported location {url!r}: {allowed}")
    try:
        return LocalStore(Path(url).expanduser())
    except RuntimeError as error:  # the home of an unknown user
        raise ConfigurationError(f"unsupported location {url!r} ({error}): {allowed}") from error


def is_relative(url: str) -> bool:
    """Whether an address is a folder that depends on the working directory; `~` and a `file:` URL do not.

    Args:
        url: The address.

    Example:
        >>> is_relative("pictures"), is_relative("~/pictures"), is_relative("s3://bucket/pictures")
        (True, False, False)
    """
    url = url.strip()
    return bool(url) and not re.match(r"(?i)s3:|file:|[a-z][a-z0-9+.-]+://|~", url) and not Path(url).is_absolute()
