"""A store: objects by key, in an S3 bucket or a local folder, with conditional writes.

The archive relies on two properties: an object is there whole or not at all, and of several writers with `if_absent`
one wins. "Cannot read" is always an error and never looks like "not there".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from prefect_segmind.errors import PreconditionFailedError, StoreError

M = TypeVar("M", bound=BaseModel)

_WAITS_FOR_A_WRITER = (0.05, 0.2, 0.5)
"""Seconds before unreadable JSON is read again: some servers write in place, and show half of an object."""


@dataclass(frozen=True)
class StoredObject:
    """An object as it was read.

    Attributes:
        data: The content.
        etag: Its version, with which `put(if_match=…)` replaces exactly this content.
        written: When it was last written, in seconds since 1970, by the store's own clock. S3 counts whole seconds.
        clock: What time it is by that clock; a folder is asked when this is called.
    """

    data: bytes
    etag: str
    written: float = 0.0
    clock: Callable[[], float] = field(default=time.time, compare=False)

    @property
    def age(self) -> float:
        """Seconds since it was last written, by the store's own clock; never negative."""
        return max(0.0, self.clock() - self.written)


class Facts(NamedTuple):
    """What a store tells of an object without sending its content.

    Attributes:
        size: Its length in bytes.
        sha256: The SHA-256 of the content, in hexadecimal; None if the store has not kept it.
    """

    size: int
    sha256: str | None

    def are_of(self, size: int, sha256: str) -> bool:
        """Whether they are those of a content, as far as they tell.

        Args:
            size: Its length in bytes.
            sha256: Its SHA-256, in hexadecimal.

        Example:
            >>> Facts(3, None).are_of(3, "ab" * 32), Facts(3, "cd" * 32).are_of(3, "ab" * 32)
            (True, False)
        """
        return self.size == size and self.sha256 in (None, sha256)


class Conditions(NamedTuple):
    """Which conditions of `put` a store checks itself, in one step with the write.

    Attributes:
        if_absent: Whether it does so for `if_absent`.
        if_match: Whether it does so for `if_match`.
    """

    if_absent: bool
    if_match: bool

    @property
    def caution(self) -> str | None:
        """What such a store does not do, and what not to do with it; None if it checks both conditions.

        Example:
            >>> Conditions(if_absent=False, if_match=False).caution
            'ignores conditional writes: do not run one job in two processes at once'
        """
        if all(self):
            return None
        if self.if_absent:
            return (
                "honours If-None-Match but not If-Match: a new job is paid for once, also if two processes run it at "
                "once; but do not run one that has failed, or whose run has died, in two processes at once"
            )
        if self.if_match:
            return "honours If-Match but not If-None-Match: do not run a new job in two processes at once"
        return "ignores conditional writes: do not run one job in two processes at once"


class Store(Protocol):
    """Objects by key, such as `summer/hat.png`. Any method may raise a `StoreError` with the address and a remedy."""

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`, or the absolute path of the folder: the same however the place was named."""
        ...

    @property
    def conditions(self) -> Conditions:
        """Which conditions of `put` are atomic; the others are checked beforehand."""
        ...

    @property
    def conditional(self) -> bool:
        """Whether both are."""
        ...

    @property
    def checksums(self) -> bool:
        """Whether the store verifies writes by a checksum, as far as known by now."""
        ...

    def uri(self, key: str) -> str:
        """The address of an object: `s3://bucket/prefix/key`, or the path of the file.

        Args:
            key: Its key.
        """
        ...

    def get(self, key: str) -> StoredObject | None:
        """The object, or None if it does not exist; a store that cannot tell raises.

        Args:
            key: Its key.
        """
        ...

    def stat(self, key: str) -> Facts | None:
        """The facts of an object, without its content where the store is remote; None if it does not exist.

        Args:
            key: Its key.
        """
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
        """Write an object, whole or not at all.

        Args:
            key: Its key.
            data: The content. Where it matters who won, no two writers may write the same bytes.
            content_type: Such as `image/png`; a folder does not keep it.
            if_absent: Only if the object does not exist.
            if_match: Only if the object still has this etag; not together with `if_absent`.
            cache_control: The `Cache-Control` header, such as `no-cache`; a folder does not keep it.

        Returns:
            The new etag.

        Raises:
            PreconditionFailedError: The condition does not hold; nothing was written.
        """
        ...

    @property
    def folds_case(self) -> bool:
        """Whether keys that differ only in upper and lower case are one, as on the disks of some systems."""
        ...

    def in_the_way(self, key: str) -> str | None:
        """What keeps an object from being written under a key: in a folder, a file whose name has to be a folder's.

        Args:
            key: The key.

        Returns:
            The obstacle in words, such as `/srv/pictures/hero is a file`; None if there is none.
        """
        ...

    def holds(self, key: str, data: bytes) -> bool:
        """Whether the object has this content, as far as the store can tell without sending it.

        Args:
            key: Its key.
            data: The content to compare with.
        """
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys that start with these characters, in any order, read page by page while iterated.

        Args:
            prefix: The characters; a folder's name ends with `/`.
        """
        ...

    def dated_keys(self, prefix: str) -> Iterator[tuple[str, float]]:
        """The same, each with when it was last written, in seconds since 1970 by the store's own clock.

        Args:
            prefix: The characters.
        """
        ...


def read_model(store: Store, key: str, model: type[M], remedy: str) -> tuple[M, StoredObject] | None:
    """A JSON object as a model, and as it was read; None only if the store is certain that it does not exist.

    Args:
        store: The store.
        key: The object's key.
        model: The class of the model.
        remedy: The consequence of an object that cannot be read, and what to do.

    Raises:
        StoreError: It cannot be read, or is of another version; neither is ever taken for "not there".
    """
    for wait in (*_WAITS_FOR_A_WRITER, 0.0):
        found = store.get(key)
        if found is None:
            return None
        with suppress(ValidationError):
            return model.model_validate_json(found.data), found
        time.sleep(wait)
    raise StoreError(f"{store.uri(key)} cannot be read by this version; {remedy}")


def require(found: StoredObject | None, uri: str, *, if_absent: bool, if_match: str | None) -> None:
    """Check the conditions of a write.

    Args:
        found: The present object, if there is one.
        uri: Its address.
        if_absent: As for `Store.put`.
        if_match: As for `Store.put`.

    Raises:
        PreconditionFailedError: A condition does not hold.
    """
    if if_absent and found is not None:
        raise PreconditionFailedError(f"{uri} already exists; somebody else has written it")
    if if_match is not None and (found is None or found.etag != if_match):
        raise PreconditionFailedError(f"{uri} has changed since it was read; somebody else has written it")
