"""Opening the inbox at an address: a folder or a prefix in a bucket."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prefect_segmind.errors import ConfigurationError
from prefect_segmind.inbox.folder import FolderInbox
from prefect_segmind.inbox.inbox import Inbox
from prefect_segmind.storage.open_store import is_s3, open_store
from prefect_segmind.storage.paths import found_path
from prefect_segmind.text import given_text

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def open_inbox(place: str, s3: Callable[[], S3Client], *, done: str = "done", failed: str = "failed") -> Inbox:
    """The inbox at an address.

    Args:
        place: An existing folder (`~` is the home), or `s3://bucket/prefix`, which may be empty.
        s3: Makes the S3 client, if one is needed.
        done: The name of its folder for images whose picture is archived.
        failed: The name of its folder for images that cannot be used.

    Raises:
        ConfigurationError: The address is of another kind, or the folder does not exist.
    """
    for folder, what in ((done, "done"), (failed, "failed")):
        if not folder.strip(". ") or re.search(r"[/\\\0]", folder):
            raise ConfigurationError(f"inbox: {folder!r} cannot be the folder `{what}`; write one name, such as {what}")
    place = given_text("inbox", place) or ""
    try:
        if is_s3(place):
            from prefect_segmind.inbox.bucket import BucketInbox  # boto3 takes a second to import

            return BucketInbox(place, s3, done, failed)
        return FolderInbox(place, found_path(str(Path(open_store(place).uri("x")).parent)), done, failed)
    except ConfigurationError as error:
        raise ConfigurationError(f"inbox: {error}") from None
