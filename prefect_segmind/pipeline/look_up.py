"""Looking up a job's picture in the archive's record and in the outbox, before anything is paid."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.picture import PaidPicture
from prefect_segmind.archive.archive import Archive, RecordRead
from prefect_segmind.archive.leases import held_claim, held_elsewhere, held_on_this_host, settle
from prefect_segmind.archive.outbox import Outbox, OutboxEntry, path_and_host
from prefect_segmind.archive.record import Attempt, OnKept, OnUnknown, Run, Verdict, past_requests, verdict
from prefect_segmind.errors import ApiError, OutboxError, PreconditionFailedError
from prefect_segmind.images.inspection import Picture
from prefect_segmind.limits.ledger import Ledger
from prefect_segmind.pipeline.validate import ValidatedJob

KEPT_REMEDY = (
    'nothing is paid again: run the same job there, or "prefect-segmind outbox --archive", or bring the file back; '
    'on_kept="repay" pays once more'
)
"""What to do about a picture that is kept elsewhere."""


class Finding(NamedTuple):
    """The state of a picture at one moment.

    Attributes:
        verdict: What is to be done for the job.
        record: Its record; None if there is none.
        kept: The paid picture in the outbox and its facts; None if it is not there.
        unreadable: Answers in the outbox that were paid for and cannot be read as a picture.
        is_new: Whether the archive was listed and had nothing of the picture, neither a record nor a sidecar.
    """

    verdict: Verdict
    record: RecordRead | None = None
    kept: tuple[Path, OutboxEntry] | None = None
    unreadable: tuple[Path, ...] = ()
    is_new: bool = False

    @property
    def archived(self) -> PaidPicture | None:
        """The facts of the picture; None if it is not in the archive."""
        return self.record.record.picture if self.record else None

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Every request in the record."""
        return self.record.record.attempts if self.record else ()

    def unresolved(self, name: str) -> str | None:
        """Describes an earlier request that was or may have been paid for without a picture within reach.

        Args:
            name: The name of the job.

        Returns:
            The description, for a message; None if there was no such request.
        """
        if self.record and (kept := self.record.record.kept_picture):
            return kept_elsewhere(name, kept)
        if self.unreadable:
            places = ", ".join(map(str, self.unreadable))
            return f"{name} was paid for, and the answer cannot be read as a picture: {places}"
        if kept := next((each.kept for each in reversed(self.attempts) if each.kept), None):
            what = "the answer, which could not be read as a picture,"
            return f"{name} was paid for, and {what} is in {kept}, out of reach (run the same job there)"
        if any(each.paid_for_nothing for each in self.attempts):
            return f"{name} was paid for, and the answer was empty"
        if lost := next((each for each in reversed(self.attempts) if each.possibly_billed is not False), None):
            why = f" ({lost.reason})" if lost.reason else ""
            return f"an earlier request for {name} may have been billed without bringing a picture{why}"
        return None


def kept_elsewhere(name: str, kept: str) -> str:
    """Describes a picture that was paid for and that this machine cannot read.

    Args:
        name: The name of its job.
        kept: Its path and host, as in `Attempt.kept`.
    """
    path, host = path_and_host(kept)
    if host == socket.gethostname():
        return f"{name} was paid for, and its picture was in {path} on this machine and is gone"
    return f"{name} was paid for, and its picture is in {path} on {host}, out of reach"


@dataclass(frozen=True)
class LookUp:
    """Finds out what is to be done for a job. Threads may share it.

    Attributes:
        archive: The archive, with the records.
        outbox: The outbox, with pictures that are paid for and not archived yet.
        open_client: Makes the client that reads kept answers again.
        ledger: Receives the earlier requests that this run has to report.
        on_unknown: Whether a picture is paid for again where an earlier request may have been billed.
        on_kept: Whether a picture is paid for again that is paid for and lies in an outbox out of reach.
        can_ask: Whether the provider can be asked what became of a request, and was not by this run already.
        unseen: Fingerprints of pictures of which a listing has shown nothing, in the archive or the outbox. The first
            look at each reads no record: the claim that follows fails if another run has been there since.
    """

    archive: Archive
    outbox: Outbox
    open_client: Callable[[], SegmindClient]
    ledger: Ledger
    on_unknown: OnUnknown = "repay"
    on_kept: OnKept = "wait"
    can_ask: Callable[[Attempt, Run], bool] = lambda *_: False
    unseen: set[str] = field(default_factory=set)

    def as_paid_for(self, job: ValidatedJob) -> ValidatedJob:
        """The job under a fingerprint that it had in an earlier version, if it has been paid for under that one.

        Args:
            job: The job.

        Raises:
            StoreError: A record cannot be read.
        """
        if job.fingerprint in self.unseen or not job.earlier or self.archive.read(job.fingerprint):
            return job
        return next(filter(self._is_paid_for, job.earlier), job)

    def _is_paid_for(self, job: ValidatedJob) -> bool:
        found = self.archive.read(job.fingerprint)
        record = found.record if found else None
        paid = record and (record.state == "done" or record.kept_picture or record.outcome_unknown(Run("")))
        return bool(paid or _in_outbox(self.outbox, job, unfinished=True))

    def look_up(self, job: ValidatedJob, run: Run, log: logging.Logger, *, read_again: bool = True) -> Finding:
        """Finds out what is to be done for a job now.

        Args:
            job: The job.
            run: The run that asks.
            log: Logs a kept answer that still does not hold a picture.
            read_again: Whether to try once more to read answers that could not be read when they came.

        Returns:
            What is to be done, and the state of the picture.

        Raises:
            StoreError: The record cannot be read.
        """
        with suppress(KeyError):
            self.unseen.remove(job.fingerprint)  # for this one look
            return Finding(Verdict.PAY, is_new=True)
        found = self._read(job, run)
        elsewhere = held_elsewhere(self.archive, found, run.id)
        done = found is not None and found.record.state == "done"
        outbox = self.outbox
        if found and not (done or elsewhere):  # another outbox of this machine, or a volume that machines share
            places = (each.kept for each in found.record.attempts if each.kept)
            outbox = outbox.reaching(job.fingerprint, places)
        kept = None if done else _in_outbox(outbox, job, unfinished=not elsewhere)
        if read_again and not (done or kept or elsewhere):
            # Another run may have read the same answer meanwhile, and put its picture there.
            attempts = found.record.attempts if found else ()
            kept = self._read_again(outbox, job, run, attempts, log) or _in_outbox(outbox, job, unfinished=True)
        if found and not (done or kept or elsewhere) and found.record.may_be_archived_by_another(run):
            found = self._finished(job, found, log)
            done = found.record.state == "done"
        unreadable = () if done or kept or elsewhere else tuple(outbox.answers(job.fingerprint))
        what = verdict(
            found.record if found else None,
            run=run,
            in_outbox=kept is not None and not held_on_this_host(self.archive, found, run.id),
            held_elsewhere=elsewhere,
            on_unknown=self.on_unknown,
            on_kept=self.on_kept,
            unreadable=bool(unreadable),
            can_ask=lambda attempt: self.can_ask(attempt, run),
        )
        finding = Finding(what, found, kept, unreadable)
        if (picture := kept[1].paid if kept else finding.archived) and not elsewhere:
            in_doubt = found.record.runs_in_doubt if found else None
            _report_others(job, outbox, picture, in_doubt, log)
        return finding

    def is_unchanged(self, job: ValidatedJob, finding: Finding) -> bool:
        """Whether the record is still as it was found: no other run has claimed or archived the picture meanwhile.

        Args:
            job: The job.
            finding: What was found.

        Raises:
            StoreError: The record cannot be read.
        """
        now = self.archive.read(job.fingerprint)
        return (now and now.etag) == (finding.record and finding.record.etag)

    def _read(self, job: ValidatedJob, run: Run) -> RecordRead | None:
        found = self.archive.read(job.fingerprint)
        if (found is None or found.record.state != "done") and settle(self.archive, job.fingerprint):
            found = self.archive.read(job.fingerprint)
        if found is None:
            return None
        held = held_claim(self.archive, job.fingerprint)
        if held is not None and held.run == run.id:  # which has what could not be written to the archive
            found = replace(found, record=held.record)
        past = past_requests(run, found.record.attempts, job.price_usd)
        self.ledger.carry(job.fingerprint, past, run.id)
        return found

    def _finished(self, job: ValidatedJob, found: RecordRead, log: logging.Logger) -> RecordRead:
        """The record of a run that died between the sidecar and the record, finished from the sidecar.

        Args:
            job: The job.
            found: Its record.
            log: Logs that it was found.

        Returns:
            The record as it is now; unchanged if the archive has no sidecar of the picture.

        Raises:
            StoreError: The archive cannot be listed, or the picture beside the sidecar is gone.
        """
        record = self.archive.by_sidecar(found.record, job.name)
        if record is None:
            return found
        with suppress(PreconditionFailedError):  # another run has written it meanwhile
            self.archive.write(record, found.etag)
            log.info("%s was archived by a run that ended before it could write that into the record", job.name)
        return self.archive.read(job.fingerprint) or found

    def _read_again(
        self, outbox: Outbox, job: ValidatedJob, run: Run, attempts: Sequence[Attempt], log: logging.Logger
    ) -> tuple[Path, OutboxEntry] | None:
        """The picture in an answer that could not be read before: by now its link, or a newer version, may work."""

        def read(body: Path, found: Path) -> Picture:
            try:
                with self.open_client() as client:
                    return client.read(body, found)
            except ApiError as error:
                log.info("read again, %s still does not hold a picture: %s", body, error)
                raise

        return outbox.read_again(
            job.fingerprint, run.id, read, seed=job.seed, list_price_usd=job.price_usd, attempts=attempts
        )


def _report_others(
    job: ValidatedJob, outbox: Outbox, picture: PaidPicture, in_doubt: Collection[str] | None, log: logging.Logger
) -> None:
    with suppress(OutboxError):  # what is archived needs no outbox
        for path in outbox.others(job.fingerprint, picture.sha256, in_doubt):
            log.warning(
                "%s was paid for more than once: another picture of it stays in the outbox until you move it, %s",
                *(job.name, path),
            )


def _in_outbox(outbox: Outbox, job: ValidatedJob, *, unfinished: bool) -> tuple[Path, OutboxEntry] | None:
    return outbox.find(job.fingerprint, seed=job.seed, list_price_usd=job.price_usd, unfinished=unfinished)
