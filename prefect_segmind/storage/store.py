"""A store: a place for objects by key, in an S3 bucket or in a local folder, with conditional writes.

The archive's promises stand on two of its properties: an object is there whole or not at all, and of several writers
who all say `if_absent` one wins. "Cannot read" is always an error and never looks like "not there".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from prefect_segmind.errors import PreconditionFailedError


@dataclass(frozen=True)
class StoredObject:
    """An object as a store gave it.

    Attributes:
        data: The content.
        etag: What `put(if_match=…)` takes to replace exactly this content.
        age: Seconds since it was last written, by the store's own clock; never negative. S3 counts whole seconds.
    """

    data: bytes
    etag: str
    age: float


class Store(Protocol):
    """Objects by key, such as `summer/hat.png`. Any method may raise a `StoreError` naming the place and a remedy."""

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`, or the absolute path of the folder."""
        ...

    @property
    def conditional(self) -> bool:
        """Whether the conditions of `put` are honoured; where they are not, they are checked first as best effort."""
        ...

    @property
    def checksums(self) -> bool:
        """Whether the store checks what it is given by a checksum, as far as it is known by now."""
        ...

    def uri(self, key: str) -> str:
        """`s3://bucket/prefix/key`, or the path of the file."""
        ...

    def get(self, key: str) -> StoredObject | None:
        """The object, or None if there is none; a store that cannot tell raises."""
        ...

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
        """Write an object, whole or not at all, and return its new etag.

        Args:
            key: Where to.
            data: The content. Where it matters who won, no two writers may write the same bytes.
            content_type: Such as `image/png`; a folder does not keep it.
            if_absent: Only if there is no such object.
            if_match: Only if the object still has this etag; not together with `if_absent`.
            cache_control: The `Cache-Control` that caches are told, such as `no-cache`; a folder does not keep it.

        Raises:
            PreconditionFailedError: The condition does not hold; nothing was written.
        """
        ...

    def holds(self, key: str, data: bytes) -> bool:
        """Whether the object is there with this content, as far as the store can tell without sending it."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys that start with these characters, in no promised order, read page by page while iterated."""
        ...


def require(found: StoredObject | None, uri: str, *, if_absent: bool, if_match: str | None) -> None:
    """Raise PreconditionFailedError unless the conditions hold for what was found at an address."""
    if if_absent and found is not None:
        raise PreconditionFailedError(f"{uri} is there already; somebody else has written it")
    if if_match is not None and (found is None or found.etag != if_match):
        raise PreconditionFailedError(f"{uri} is no longer what was read; somebody else has changed it")
