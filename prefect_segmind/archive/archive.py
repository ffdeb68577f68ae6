"""The archive: pictures and their sidecars, and the record of each picture, in one store.

{archive}/{job name}/{fingerprint[:16]}.{ext}     the picture
{archive}/{job name}/{fingerprint[:16]}.json      its sidecar
{archive}/.segmind/{fingerprint}.json             its record
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic_core import to_json

from prefect_segmind.api.picture import PaidPicture
from prefect_segmind.archive.record import Record
from prefect_segmind.errors import InvalidJobError, PreconditionFailedError, StoreError
from prefect_segmind.images.inspection import file_type
from prefect_segmind.storage.store import Store, StoredObject, read_model

READERS = 32
"""Threads that read records."""
_EXTENSIONS = ("jpg", "png", "webp")
"""Those of the pictures that the API returns."""
_RECORD = re.compile(r"\.segmind/([0-9a-f]{64})\.json")
_SIDECAR = re.compile(r"(.+/([0-9a-f]{16}))(?:-[0-9a-f]{16})?\.json")


@dataclass(frozen=True)
class RecordRead:
    """A record as it was read.

    Attributes:
        record: The record.
        stored: The object that holds it.
    """

    record: Record
    stored: StoredObject

    @property
    def etag(self) -> str:
        """Its version, for a conditional write."""
        return self.stored.etag

    @property
    def age(self) -> float:
        """Seconds since it was written, by the store's own clock, which is asked now."""
        return self.stored.age


class Survey(NamedTuple):
    """The pictures in an archive, by one listing.

    Attributes:
        recorded: Fingerprints that have a record.
        archived: Those with a sidecar too, which is written just before the record is done: paid and archived.
        places: Their keys without the extension: `{name}/{fingerprint[:16]}`.
    """

    recorded: set[str]
    archived: set[str]
    places: set[str]


class Archive:
    """Reads and writes an archive.

    Args:
        store: The store that has it.

    Attributes:
        store: The store that has it.
        url: The store's address.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.url = store.url

    def read(self, fingerprint: str) -> RecordRead | None:
        """The record of a picture; None only where the store is certain that there is none.

        Args:
            fingerprint: The picture's.

        Raises:
            StoreError: The record cannot be read, which is never taken for "not there".
        """
        remedy = (
            "it records whether a picture is paid, so nothing is paid until it is restored (or removed, if the picture "
            "may be paid once more)"
        )
        found = read_model(self.store, record_key(fingerprint), Record, remedy)
        if found and found[0].fingerprint != fingerprint:
            raise StoreError(f"{self.store.uri(record_key(fingerprint))} is the record of another picture; {remedy}")
        return RecordRead(*found) if found else None

    def records(self, since: float | None = None) -> Iterator[tuple[str, RecordRead | StoreError]]:
        """All records, read by several threads.

        Args:
            since: Only those that were written then or later, in seconds since 1970 by the store's clock.

        Yields:
            The fingerprint of each picture that has a record, and the record, or why it cannot be read.

        Raises:
            StoreError: The archive cannot be listed.
        """

        def read(fingerprint: str) -> tuple[str, RecordRead | StoreError | None]:
            try:
                return fingerprint, self.read(fingerprint)
            except StoreError as error:
                return fingerprint, error

        keys: Iterable[str] = self.store.keys(".segmind/")
        if since is not None:
            keys = (key for key, written in self.store.dated_keys(".segmind/") if written >= since)
        found = [match[1] for match in map(_RECORD.fullmatch, keys) if match]
        with ThreadPoolExecutor(READERS, thread_name_prefix="segmind-records") as pool:
            for fingerprint, record in pool.map(read, found):
                if record is not None:
                    yield fingerprint, record

    def write(self, record: Record, etag: str | None) -> str:
        """Write a record over the version that was read, or as the first one.

        Args:
            record: The record.
            etag: The version that it replaces; None if there was none.

        Returns:
            The new version.

        Raises:
            PreconditionFailedError: Somebody else has written it meanwhile.
            StoreError: It cannot be written.
        """
        data = record.model_dump_json(indent=2).encode()
        key = record_key(record.fingerprint)
        return self.store.put(key, data, "application/json", if_absent=etag is None, if_match=etag)

    def content(self, uri: str) -> bytes | None:
        """The content at an address of this archive; None if there is none.

        Args:
            uri: The address of a picture or sidecar, as `ArchivedImage` has it.

        Raises:
            StoreError: The address is not in this archive, or cannot be read.
        """
        root = self.store.uri("x")[:-1]
        if not uri.startswith(root):
            raise StoreError(f"{uri} is not in the archive {self.url}; open the archive that it is in")
        found = self.store.get(uri.removeprefix(root).replace(os.sep, "/"))
        return found.data if found else None

    def survey(self, fingerprints: Collection[str]) -> Survey:
        """Which of these pictures are recorded and archived, by one listing of the archive.

        Args:
            fingerprints: The pictures; the listing has every picture ever made.

        Raises:
            StoreError: The archive cannot be listed.
        """
        short = {each[:16] for each in fingerprints}
        recorded: set[str] = set()
        places: set[str] = set()
        for key in self.store.keys("") if fingerprints else ():
            if found := _RECORD.fullmatch(key):
                if found[1] in fingerprints:
                    recorded.add(found[1])
            elif (found := _SIDECAR.fullmatch(key)) and found[2] in short:
                places.add(found[1])
        beside = {each[-16:] for each in places}
        return Survey(recorded, {each for each in recorded if each[:16] in beside}, places)

    def check_name(self, name: str, fingerprint: str) -> None:
        """Check, before anything is paid, that a picture can be stored under a job's name.

        Args:
            name: The job's.
            fingerprint: The job's.

        Raises:
            InvalidJobError: Something else has the place.
        """
        for extension in ("json", *_EXTENSIONS):
            if why := self.store.in_the_way(f"{name}/{fingerprint[:16]}.{extension}"):
                raise InvalidJobError(
                    f"name: no picture can be stored as {name!r} in this archive: {why}; choose another name, "
                    "or move away what is there"
                )

    def by_sidecar(self, record: Record, name: str) -> Record | None:
        """A record finished from the sidecar of its picture, if the archive has one: it is written before the record.

        Args:
            record: The record, which is not done.
            name: Where to look first: the name of the picture's job. If it is not there, the archive is listed.

        Raises:
            StoreError: The archive cannot be listed or read, or the picture beside the sidecar is gone.
        """
        fingerprint = record.fingerprint
        copy: Record | None = None
        gone: StoreError | None = None
        for prefix in (f"{name}/{fingerprint[:16]}", ""):
            keys = (key for key in self.store.keys(prefix) if fingerprint[:16] in key and _SIDECAR.fullmatch(key))
            for key in keys:
                if (found := self.store.get(key)) and (read := _picture_of(found.data, fingerprint)):
                    picture, copied = read
                    done = record.archived(picture, f"{key.removesuffix('json')}{picture.extension}", key)
                    try:
                        self.get_picture(done)
                    except StoreError as error:  # another one may be there
                        gone = gone or error
                        continue
                    if not copied:
                        return done
                    copy = done  # which says nothing of the cost
        if gone and not copy:
            raise gone
        return copy

    def put_picture(
        self, name: str, fingerprint: str, picture: PaidPicture, data: bytes, *, is_new: bool = False
    ) -> str:
        """Store a picture under a job's name and never over a different one, nor beside the sidecar of a different one.

        Args:
            name: The job's.
            fingerprint: The job's.
            picture: The picture's facts.
            data: The picture.
            is_new: Whether the archive is known to have no sidecar of the job, so that none is looked for.

        Returns:
            Its key: `{name}/{fingerprint[:16]}.{ext}`, with the picture's own hash if that is another one's.

        Raises:
            StoreError: It cannot be written, or both keys are taken.
        """
        for key in _picture_keys(name, fingerprint, picture):
            beside = None if is_new else self.store.get(sidecar_key(key))
            if beside is not None and not _describes(beside.data, picture):
                continue
            try:
                self.store.put(key, data, picture.content_type, if_absent=True)
            except PreconditionFailedError:
                if not self.store.holds(key, data):
                    is_new = False
                    continue
            return key
        taken = self.store.uri(f"{name}/{fingerprint[:16]}")
        raise StoreError(f"{taken} is taken by other pictures; choose another name for the job")

    def put_sidecar(self, image_key: str, sidecar: Mapping[str, Any]) -> str:
        """Store a picture's sidecar beside it; an existing one stays.

        Args:
            image_key: The picture's key.
            sidecar: The sidecar, as JSON values.

        Returns:
            Its key.

        Raises:
            StoreError: It cannot be written.
        """
        key = sidecar_key(image_key)
        data = to_json(sidecar, indent=2)
        try:
            self.store.put(key, data, "application/json", if_absent=True)
        except PreconditionFailedError:
            if self.store.get(key) is None:  # whoever was there first has not written it, or removed it
                raise
        return key

    def get_picture(self, record: Record) -> bytes:
        """The picture of a record that is done.

        Args:
            record: The record.

        Raises:
            StoreError: The picture is gone or has changed, though it was paid for.
        """
        found = self.store.get(record.image or "")
        if found is None or record.picture is None or hashlib.sha256(found.data).hexdigest() != record.picture.sha256:
            raise self._lost(record, is_gone=found is None)
        return found.data

    def check_picture(self, record: Record) -> None:
        """Check that the picture of a record that is done is there, without reading it.

        Its size must agree, and its SHA-256 if the store has kept that.

        Args:
            record: The record.

        Raises:
            StoreError: The picture is gone or has changed, though it was paid for.
        """
        facts, picture = self.store.stat(record.image or ""), record.picture
        if facts is None or picture is None or not facts.are_of(picture.size_bytes, picture.sha256):
            raise self._lost(record, is_gone=facts is None)

    def key_for(self, name: str, record: Record) -> str | None:
        """The key under which a picture is archived for a job, checked as by `check_picture`; it may be a copy's.

        Args:
            name: The job's.
            record: The record of the picture.

        Returns:
            The key; None if the record is not done, or the picture is not there.
        """
        picture, image = record.picture, record.image
        if record.state != "done" or picture is None or not image:
            return None
        own = image.rpartition("/")[0] == name
        for key in (image,) if own else _picture_keys(name, record.fingerprint, picture):
            facts = self.store.stat(key)
            if facts is not None and facts.are_of(picture.size_bytes, picture.sha256):
                return key
        return None

    def _lost(self, record: Record, *, is_gone: bool) -> StoreError:
        what = "is gone from the archive" if is_gone else "is no longer the one that was archived"
        return StoreError(
            f"{self.store.uri(record.image or '')} {what}, though it was paid for; restore it, or remove "
            f"{self.store.uri(record_key(record.fingerprint))} to pay once more"
        )


def _picture_keys(name: str, fingerprint: str, picture: PaidPicture) -> tuple[str, str]:
    """The key of a picture, and the one that it has if that is another picture's."""
    stem = f"{name}/{fingerprint[:16]}"
    return f"{stem}.{picture.extension}", f"{stem}-{picture.sha256[:16]}.{picture.extension}"


def _picture_of(sidecar: bytes, fingerprint: str) -> tuple[PaidPicture, bool] | None:
    """The facts in the sidecar of a picture, and whether it is a copy; None for another picture's or any other file."""
    try:
        held = json.loads(sidecar)
        if held["fingerprint"] != fingerprint:
            return None
        facts = {name: held[name] for name in ("seed", "cost_usd", "cost_source", "request_id", "paid_at")}
        extension = file_type(held["output"]["format"])[1]
        picture = PaidPicture.model_validate({**held["output"], **facts, "extension": extension})
        return picture, bool(held["copied_from"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _describes(sidecar: bytes, picture: PaidPicture) -> bool:
    """Whether a sidecar is that of a picture, or of a copy."""
    try:
        return bool(json.loads(sidecar)["output"]["sha256"] == picture.sha256)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def sidecar_key(image_key: str) -> str:
    """The key of a picture's sidecar.

    Args:
        image_key: The picture's key.
    """
    return image_key.rpartition(".")[0] + ".json"


def record_key(fingerprint: str) -> str:
    """The key of a picture's record.

    Args:
        fingerprint: The picture's.
    """
    return f".segmind/{fingerprint}.json"
