"""Archiving: a paid picture, its sidecar and its record are stored for good."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from prefect_segmind.archive.archive import Archive, sidecar_key
from prefect_segmind.archive.leases import Claim, held_claim
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.archive.record import Record
from prefect_segmind.errors import ArchiveError, OutboxError, PreconditionFailedError, SegmindError, StoreError
from prefect_segmind.limits.ledger import NOTHING
from prefect_segmind.money import usd
from prefect_segmind.pipeline.pay import GeneratedImage
from prefect_segmind.pipeline.sidecar import sidecar
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.storage.disk_errors import reason
from prefect_segmind.storage.paths import may_be_there

_WAITS = (0.0, 0.1, 0.3, 1.0, 2.0)
"""Seconds before a record is read and written again that another run has written meanwhile."""
_OF_PICTURE = {"sha256", "width", "height", "seed"}


class ArchivedImage(BaseModel):
    """A picture in the archive.

    Attributes:
        status: `generated` by this run; `recovered` or `reused` if it was paid for before.
        name: The name of its job.
        image: The URI of the picture.
        sidecar: The URI of its sidecar.
        fingerprint: The fingerprint of its job.
        sha256: The SHA-256 of the file, in hexadecimal.
        width: In pixels.
        height: In pixels.
        seed: The seed it was made with.
        cost_usd: What this run paid for it.
        possibly_billed_usd: What requests of unknown outcome may have cost in addition.
        attempts: The number of requests that this run has sent for it.
        published: The address that it was published to; None if it was not to be, or a newer refresh is there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Literal["generated", "reused", "recovered"]
    name: str
    image: str
    sidecar: str
    fingerprint: str
    sha256: str
    width: int
    height: int
    seed: int
    cost_usd: Decimal
    possibly_billed_usd: Decimal
    attempts: int
    published: str | None = None


@dataclass(frozen=True)
class Archiving:
    """Moves pictures from the outbox to the archive.

    Attributes:
        archive: The archive.
        outbox: The outbox.
    """

    archive: Archive
    outbox: Outbox

    def archive_picture(self, generated: GeneratedImage, flow_run_id: str | None = None) -> ArchivedImage:
        """Archives a picture; see `archive_with_content`."""
        return self.archive_with_content(generated, flow_run_id)[0]

    def archive_with_content(
        self, generated: GeneratedImage, flow_run_id: str | None = None
    ) -> tuple[ArchivedImage, bytes | None]:
        """Archives a picture: writes the picture, its sidecar and its record, then removes it from the outbox.

        A picture that is in the archive under another name is copied to this one.

        Args:
            generated: The picture.
            flow_run_id: The Prefect flow run, for the sidecar.

        Returns:
            The picture in the archive, and its content where that was read for it.

        Raises:
            ArchiveError: The archive cannot be read or written. A picture from the outbox is still there; running the
                same job again archives it without paying.
        """
        held = held_claim(self.archive, generated.job.fingerprint)
        if held is not None and held.run != generated.run:
            held = None
        if held is not None:
            held.is_idle = False
        try:
            if generated.path is None:
                return self._reuse(generated, flow_run_id)
            return self._archive(generated, generated.path, flow_run_id, held)
        except SegmindError as error:
            if held is not None:  # in the record the picture may not be paid for yet
                held.give_up()
            safe = (
                f"the picture is paid for and safe in the outbox, {generated.path}; run the same job again on this "
                "machine when the archive is back, and it is archived without another payment"
                if generated.path and may_be_there(generated.path)
                else f"this run paid {usd(generated.cost_usd)} USD"
            )
            raise ArchiveError(
                f"{generated.name} could not be archived; {safe}. The reason: {error}",
                fingerprint=generated.job.fingerprint,
                requests_sent=generated.requests_sent,
                cost_usd=generated.cost_usd,
                possibly_billed_usd=generated.possibly_billed_usd,
            ) from error
        finally:
            if held is not None:
                held.release()

    def _archive(
        self, generated: GeneratedImage, path: Path, flow_run_id: str | None, held: Claim | None
    ) -> tuple[ArchivedImage, bytes | None]:
        fingerprint, picture = generated.job.fingerprint, generated.picture
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return self._reuse(generated, flow_run_id)  # another run of the same job has archived it meanwhile
        except OSError as error:
            raise StoreError(f"outbox: {path} cannot be read: {reason(error)}") from error
        if hashlib.sha256(data).hexdigest() != picture.sha256:
            raise StoreError(f"outbox: {path} is no longer the picture that was paid for")
        is_new = held is not None and held.is_new
        image = self.archive.put_picture(generated.name, fingerprint, picture, data, is_new=is_new)
        beside_key = sidecar_key(image)
        before = Record(fingerprint=fingerprint, attempts=generated.attempts)

        def archived(record: Record) -> Record:
            return record.archived(picture, image, beside_key, paid_by=generated.paid_by)

        self.archive.put_sidecar(image, sidecar(generated, archived(before), flow_run_id, None))
        done = self._record_done(held, before, archived)
        outbox = replace(self.outbox, also=(*self.outbox.also, path.parent))
        outbox.remove(fingerprint, picture.sha256, done.runs_in_doubt)
        return self._result(generated, image, beside_key), data

    def _record_done(self, held: Claim | None, before: Record, archived: Callable[[Record], Record]) -> Record:
        """Writes the finished record: over the claim of this run, or over what other runs have written since.

        Returns:
            The record as it is in the archive.
        """
        if held is not None:
            try:
                return held.write(archived)
            except PreconditionFailedError:
                held.release()  # the claim was lost meanwhile
        for wait in (*_WAITS, None):
            found = self.archive.read(before.fingerprint)
            record = found.record.with_known_outcomes(before.attempts) if found else before
            if record.state != "done":
                record = archived(record)
            elif found and record == found.record:
                return record
            try:
                self.archive.write(record, found.etag if found else None)
                return record
            except PreconditionFailedError:  # another run came in between: look again
                if wait is None:
                    raise
                time.sleep(wait)
        raise AssertionError("the last look returns or raises")

    def _reuse(self, generated: GeneratedImage, flow_run_id: str | None) -> tuple[ArchivedImage, bytes | None]:
        found = self.archive.read(generated.job.fingerprint)
        if found is None or found.record.picture is None or not found.record.image or not found.record.sidecar:
            raise StoreError(f"the record of {generated.name} is gone, and its picture is not in the outbox")
        record, picture, data = found.record, found.record.picture, None
        if found.record.image.rpartition("/")[0] == generated.name:
            image, beside_key = found.record.image, found.record.sidecar
            if self._is_in_outbox(record.fingerprint):  # which may have all that is left, and is emptied below
                data = self.archive.get_picture(record)
            else:
                self.archive.check_picture(record)
        else:
            data = self.archive.get_picture(record)
            image = self.archive.put_picture(generated.name, record.fingerprint, picture, data)
            copied_from = self.archive.store.uri(found.record.image)
            beside_key = self.archive.put_sidecar(image, sidecar(generated, record, flow_run_id, copied_from))
        self.outbox.remove(record.fingerprint, picture.sha256, record.runs_in_doubt)
        return self._result(generated, image, beside_key), data

    def _is_in_outbox(self, fingerprint: str) -> bool:
        """Whether the outbox has anything of a picture; if it cannot be read, nothing is removed there either."""
        try:
            return self.outbox.has(fingerprint)
        except OutboxError:
            return False

    def in_place(self, job: ValidatedJob, record: Record) -> ArchivedImage | None:
        """The picture of a job that is archived under its very name, checked without reading it.

        Args:
            job: The job.
            record: Its record.

        Returns:
            The picture, reused at no cost; None if anything is left to do for it.

        Raises:
            StoreError: The archive cannot be read.
        """
        image, picture = self.archive.key_for(job.name, record), record.picture
        if image is None or picture is None:
            return None
        return ArchivedImage(
            status="reused",
            name=job.name,
            image=self.archive.store.uri(image),
            sidecar=self.archive.store.uri(sidecar_key(image)),
            fingerprint=record.fingerprint,
            cost_usd=NOTHING,
            possibly_billed_usd=NOTHING,
            attempts=0,
            **picture.model_dump(include=_OF_PICTURE),
        )

    def _result(self, generated: GeneratedImage, image: str, beside: str) -> ArchivedImage:
        return ArchivedImage(
            name=generated.name,
            image=self.archive.store.uri(image),
            sidecar=self.archive.store.uri(beside),
            fingerprint=generated.job.fingerprint,
            attempts=generated.requests_sent,
            **generated.picture.model_dump(include=_OF_PICTURE),
            **generated.model_dump(include={"status", "cost_usd", "possibly_billed_usd"}),
        )
