"""Publishing: a finished picture is copied to a permanent address, where a CDN or a CMS reads it.

{place}/{pattern with the job's name}     the picture, such as live/hero/summer.png
{place}/.segmind/live/{key}.json          a note: which refresh that picture is from, or is about to be from

A picture of an older refresh does not replace that of a newer one. A run reads the picture and then the note; it writes
the note and then the picture, each on the condition that it is still what was read. So a slow older run loses, and its
result says why. A run that dies on the way leaves a note that keeps older ones out, and the next refresh does the rest.
A run whose picture is there already writes the note all the same: it is by the note that older runs stay out. It reads
the note, writes it, and then checks the picture by its SHA-256, without reading that or the one in the archive.

The condition on a picture is one on its content, and a newer refresh may have left or brought back the very content
that an older run has read. So every run checks once more: one that left the picture as it was checks the picture, one
that wrote it checks the note, and one that has overwritten what a newer note names restores that. In this one case the
older picture is seen for a moment, or until the next refresh if the run dies in that moment. On a store that ignores
conditions all of this is best effort.

The note is an object of its own and not metadata of the picture. A folder has no metadata, and `rclone serve s3` keeps
it in memory only. Nor would it save the second check where it is kept: an ETag is one of the content, so `If-Match`
cannot tell two refreshes with the same picture apart, and an older run would replace the newer one unseen.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Final, Literal, TypedDict

from pydantic import AwareDatetime, BaseModel, ConfigDict

from prefect_segmind.archive.archive import Archive
from prefect_segmind.errors import ConfigurationError, PreconditionFailedError, SegmindError, StoreError, redact
from prefect_segmind.images.conversion import encoded, on_white, upright_srgb
from prefect_segmind.images.inspection import BrokenPicture, decoding, file_type, load_picture, open_picture
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.storage.open_store import is_s3, path_of_file_url
from prefect_segmind.storage.store import Store, StoredObject, read_model

DEFAULT_CACHE_CONTROL: Final = "public, max-age=300"
"""Short, because the same address gets new content."""

_NAME: Final = "{name}"
_FORMATS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 92, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 92, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 90}),
}
_ROUNDS: Final = 20  # another run has won each one that is lost


class Published(BaseModel):
    """The result of publishing a picture.

    Attributes:
        uri: The address.
        published: Whether the picture is there; False if that of a newer refresh is, or is about to be.
        changed: Whether this call has written it; False if it was there already.
        why: Why it is not published; empty if it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    published: bool
    changed: bool
    why: str = ""


class Note(BaseModel):
    """The refresh that a published picture is from, or is about to be from.

    Attributes:
        schema_version: The version of this format.
        refreshed_at: When the run was due.
        run: The run.
        fingerprint: The fingerprint of the job.
        sha256: The SHA-256 of the picture as published.
        cache_control: Its Cache-Control header; None for none.
        archived_sha256: The SHA-256 of the picture in the archive, of which it may be a conversion; None in notes of
            earlier versions.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    refreshed_at: AwareDatetime
    run: str
    fingerprint: str
    sha256: str
    cache_control: str | None = None
    archived_sha256: str | None = None


@dataclass(frozen=True)
class Publishing:
    """Copies pictures to permanent addresses. Threads may share it.

    Attributes:
        store: The place.
        pattern: The pattern of the keys, such as `{name}.png`, from `split_publish_to`; its extension is the format.
        cache_control: The Cache-Control header; empty for none. A folder does not keep it.
    """

    store: Store
    pattern: str
    cache_control: str = DEFAULT_CACHE_CONTROL
    _without_sha256: threading.Event = field(default_factory=threading.Event, init=False, repr=False, compare=False)
    """Set once the store has kept no SHA-256 of a picture; from then on pictures are read to be compared."""

    def publish(self, name: str, picture: bytes, *, fingerprint: str, refreshed_at: datetime, run: str) -> Published:
        """Writes a picture to its address, unless that of a newer refresh is there.

        Of two refreshes of the same time, the later call wins.
        A picture of the format that the address asks for is copied as it is; any other is converted: upright, sRGB, 8
        bits a channel, on white where the format has no transparency.

        Args:
            name: The name of the job, which replaces `{name}`.
            picture: The picture as archived: PNG, JPEG, WebP or any other format that the API answers with.
            fingerprint: The fingerprint of the job, for the note.
            refreshed_at: When the run was due, with its time zone; the same in each try of a run.
            run: The run, for the note.

        Raises:
            ConfigurationError: The address is among the plugin's own records.
            StoreError: The picture cannot be decoded or converted, or the place cannot be read or written.
        """
        key = self._key(name)
        note = self._note(fingerprint, refreshed_at, run, _sha256(picture))
        return self._published(key, picture, note)

    def publish_archived(
        self,
        name: str,
        read: Callable[[], bytes],
        sha256: str,
        extension: str,
        *,
        fingerprint: str,
        refreshed_at: datetime,
        run: str,
    ) -> Published:
        """As `publish`, for a picture that is read only if it is not at its address already.

        Args:
            name: The name of the job.
            read: Reads the picture as archived.
            sha256: Its SHA-256, in hexadecimal.
            extension: Of its file, such as `.jpg`.
            fingerprint: The fingerprint of the job.
            refreshed_at: When the run was due.
            run: The run.

        Raises:
            ConfigurationError: As for `publish`.
            StoreError: As for `publish`.
        """
        key, note = self._key(name), self._note(fingerprint, refreshed_at, run, sha256)
        written: Note | None = None
        if not self._without_sha256.is_set():
            with suppress(PreconditionFailedError):  # another run came in between
                current, version = self._read_note(key)
                if current and (there := self._told_by(current, key, note, extension)):
                    if current != there and current.refreshed_at > there.refreshed_at:
                        return self._outcome(key, there, current)
                    if current != there:
                        self._write_note(key, there, version)
                    written = there
                    facts = self.store.stat(key)
                    if facts and facts.sha256 == there.sha256:
                        return self._outcome(key, there, there)
                    if facts and facts.sha256 is None:
                        self._without_sha256.set()
        return self._published(key, read(), note, written=written)

    def _told_by(self, current: Note, key: str, note: Note, extension: str) -> Note | None:
        """The note of a picture if the present one tells its SHA-256 as published, and that nothing else differs.

        Args:
            current: The note that is there.
            key: The key of the picture.
            note: Its note, without its SHA-256 as published.
            extension: The extension of the picture as archived.
        """
        sha256 = None
        if current.archived_sha256 == note.archived_sha256:
            sha256 = current.sha256
        elif _FORMATS.get(extension.lower(), ("",))[0] == _FORMATS[_extension(key)][0]:
            sha256 = note.archived_sha256  # which is copied as it is
        if sha256 is None or current.cache_control != note.cache_control:
            return None
        return note.model_copy(update={"sha256": sha256})

    def _published(self, key: str, picture: bytes, note: Note, *, written: Note | None = None) -> Published:
        """Publishes a picture by its content.

        Args:
            key: The key.
            picture: The picture as archived.
            note: Its note, without its SHA-256 as published.
            written: The note that was written already, with a SHA-256 that an earlier version may have come to.
        """
        data = self._formatted(key, picture)
        mine = note.model_copy(update={"sha256": _sha256(data)})
        current, changed = self._publish(key, data, mine, written=written == mine)
        return self._outcome(key, mine, current, changed=changed)

    def _outcome(self, key: str, mine: Note, current: Note, *, changed: bool = False) -> Published:
        why = ""
        if current != mine:
            why = f"a refresh that is not older has this address: that of {current.refreshed_at}, by run {current.run}"
        return Published(uri=self.store.uri(key), published=not why, changed=changed, why=why)

    def _key(self, name: str) -> str:
        key = self.pattern.replace(_NAME, name)
        if key.lower().startswith(".segmind/"):
            raise ConfigurationError(f"publish_to: {key!r} is in .segmind, which is reserved; choose another")
        return key

    def _note(self, fingerprint: str, refreshed_at: datetime, run: str, archived_sha256: str) -> Note:
        """A note, for now with the SHA-256 of the picture as archived."""
        return Note(
            refreshed_at=refreshed_at,
            run=run,
            fingerprint=fingerprint,
            sha256=archived_sha256,
            cache_control=self.cache_control or None,
            archived_sha256=archived_sha256,
        )

    def _publish(self, key: str, data: bytes, note: Note, *, written: bool = False) -> tuple[Note, bool]:
        """Tries until the picture is there with its note, or another note keeps it out.

        The promises depend on the order of the calls; the tests step through their interleavings.

        Args:
            key: The key of the picture.
            data: The picture.
            note: Its note.
            written: Whether the note was written. Any note found after that has replaced it, and is not older.

        Returns:
            The note that is there, and whether the picture was written.
        """
        for _ in range(_ROUNDS):
            with suppress(PreconditionFailedError):  # another run came in between: read again
                before = self.store.get(key)
                current, version = self._read_note(key)
                if current and current != note and (written or current.refreshed_at > note.refreshed_at):
                    return current, False
                if current != note:
                    self._write_note(key, note, version)
                written = True
                if before and before.data == data and current and current.cache_control == note.cache_control:
                    if self.store.holds(key, data):  # still: an older run may have written until it could see the note
                        return note, False
                    continue
                self._write(key, data, note, before)
                current, _ = self._read_note(key)
                if current is None or current == note:
                    return note, True
                if before and current.sha256 == _sha256(before.data):  # overwritten: what a newer run has published
                    self._publish(key, before.data, current, written=True)
                return current, False
        raise StoreError(f"{self.store.uri(key)} is being written by other runs; run again when they have finished")

    def _write_note(self, key: str, note: Note, version: str | None) -> None:
        data = note.model_dump_json(indent=2).encode()
        self.store.put(_note_key(key), data, "application/json", if_absent=version is None, if_match=version)

    def _write(self, key: str, data: bytes, note: Note, before: StoredObject | None) -> None:
        self.store.put(
            key,
            data,
            file_type(_FORMATS[_extension(key)][0])[0],
            if_absent=before is None,
            if_match=before.etag if before else None,
            cache_control=note.cache_control,
        )

    def _read_note(self, key: str) -> tuple[Note | None, str | None]:
        """The note of a key and its version; None and None only if it certainly does not exist."""
        remedy = (
            "it names the refresh that is published, so nothing is published there until it is restored (or removed, "
            "if any refresh may be published there)"
        )
        found = read_model(self.store, _note_key(key), Note, remedy)
        return (found[0], found[1].etag) if found else (None, None)

    def _formatted(self, key: str, picture: bytes) -> bytes:
        """The picture in the format of its address: as it is, or converted."""
        format, options = _FORMATS[_extension(key)]
        try:
            image = open_picture(picture)
            if file_type(str(image.format)) == file_type(format):
                return picture
            load_picture(image, picture)
            with decoding(picture):
                upright = upright_srgb(image, image.size)
        except BrokenPicture as broken:
            raise StoreError(
                f"{self.store.uri(key)} is not published: the picture {broken}; restore it in the archive"
            ) from None
        try:
            return encoded(on_white(upright) if format == "JPEG" else upright, format, **options)
        except (OSError, ValueError) as error:  # too wide or too high for the format
            raise StoreError(
                f"{self.store.uri(key)} is not published: its {upright.width}×{upright.height} pixels cannot be "
                f"written as {format} ({error}); choose another extension in publish_to"
            ) from error


def split_publish_to(publish_to: str) -> tuple[str, str]:
    """Splits a `publish_to` into a place and the pattern of the keys there.

    Args:
        publish_to: `s3://bucket/live`, a folder or `file:///folder`, for PNGs with the jobs' names; or one of these
            followed by a pattern, such as `s3://bucket/live/{name}.jpg`.

    Returns:
        The place, for `open_store`, and the pattern.

    Raises:
        ConfigurationError: It has another form.

    Example:
        >>> split_publish_to("s3://bucket/live")
        ('s3://bucket/live', '{name}.png')
        >>> split_publish_to("/srv/live/mugs/{name}/large.webp")
        ('/srv/live/mugs', '{name}/large.webp')
    """
    path = path_of_file_url(publish_to.strip())
    if not (in_s3 := is_s3(path)):
        path = path.replace(os.sep, "/")
    place, pattern = path.rstrip("/") or path[:1], f"{_NAME}.png"
    if _NAME in path:
        before, _, after = path.partition(_NAME)
        place, slash, start = before.rpartition("/")
        place, pattern = place or slash or ".", f"{start}{_NAME}{after}"
    if not path:
        mistake = "it is empty"
    elif re.search("[{}]", path.replace(_NAME, "", 1)):
        mistake = "it has a placeholder other than one {name}"
    elif not in_s3 and re.match(r"(?i)[a-z][a-z0-9+.-]+://|file:|s3:", path):
        mistake = "it is neither in S3 nor a folder"
    elif in_s3 and not re.match(r"(?i)s3://[^/]", place):
        mistake = "it has no bucket before {name}"
    elif _NAME not in path and _extension(path) in _FORMATS:
        mistake = "all pictures would have this address"
    elif _extension(pattern) not in _FORMATS:
        mistake = "its extension is not one of the supported formats"
    elif ".segmind" in path.lower().split("/") or {"", ".", ".."} & {*pattern.split("/")}:
        mistake = "it has a part that is empty, ., .. or .segmind"
    else:
        return place, pattern
    raise ConfigurationError(
        f"publish_to: nothing can be published to {publish_to!r}: {mistake}; name s3://bucket/live or a folder, or a "
        "pattern there such as s3://bucket/live/{name}.jpg, with {name} once and .png, .jpg, .jpeg or .webp at its end"
    )


def _extension(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _note_key(key: str) -> str:
    return f".segmind/live/{key}.json"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Publisher:
    """Publishes the pictures of one run.

    Attributes:
        publishing: Writes the pictures.
        refreshed_at: When the run was due, which decides which of two runs has the newer picture.
        run: The flow run.
    """

    publishing: Publishing
    refreshed_at: datetime
    run: str

    def publish(
        self, archived: ArchivedImage, archive: Archive, log: logging.Logger, content: bytes | None = None
    ) -> ArchivedImage:
        """Copies a picture from the archive to its permanent address, unless a newer refresh is there.

        Args:
            archived: The picture.
            archive: The archive that it is in.
            log: Logs the result.
            content: The picture's content, if it is at hand; else it is read from the archive where it is needed.

        Returns:
            The picture, with the address that it is published at.

        Raises:
            StoreError: It cannot be read from the archive, converted or written. It stays in the archive; the same job
                run again publishes it without paying.
        """

        def read() -> bytes:
            picture = archive.content(archived.image)
            if picture is None or hashlib.sha256(picture).hexdigest() != archived.sha256:
                raise StoreError(f"{archived.image} is gone from the archive, or is no longer what was archived")
            return picture

        about: _About = {
            "fingerprint": archived.fingerprint,
            "refreshed_at": self.refreshed_at,
            "run": self.run,
        }
        try:
            if content is not None:
                published = self.publishing.publish(archived.name, content, **about)
            else:
                facts = archived.sha256, _extension(archived.image)
                published = self.publishing.publish_archived(archived.name, read, *facts, **about)
        except Exception as error:
            known = str(error) if isinstance(error, SegmindError) else redact(f"{type(error).__name__}: {error}")
            raise StoreError(
                f"{archived.image} is archived, but not published: {known}",
                fingerprint=archived.fingerprint,
                requests_sent=archived.attempts,
                cost_usd=archived.cost_usd,
                possibly_billed_usd=archived.possibly_billed_usd,
            ) from error
        if published.why:
            log.info("not published: %s", published.why)
            return archived
        log.log(logging.INFO if published.changed else logging.DEBUG, "published: %s", published.uri)
        return archived.model_copy(update={"published": published.uri})


class _About(TypedDict):
    fingerprint: str
    refreshed_at: datetime
    run: str
