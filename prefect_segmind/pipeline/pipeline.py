"""The pipeline: takes a job through all stages, from its validation to the published picture."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Literal

from prefect_segmind.api.picture import PaidPicture
from prefect_segmind.archive.leases import not_renewed
from prefect_segmind.archive.record import LEASE_SECONDS, Attempt, Record, Run, Verdict, past_requests
from prefect_segmind.errors import KeptElsewhereError, OutcomeUnknownError, SegmindError
from prefect_segmind.jobs.job import Job
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import Ledger
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage, Archiving
from prefect_segmind.pipeline.look_up import KEPT_REMEDY, Finding, LookUp
from prefect_segmind.pipeline.pay import Cashier, GeneratedImage, Paid
from prefect_segmind.pipeline.publish import Publisher
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.upload import UploadedImage, Uploads
from prefect_segmind.pipeline.validate import ValidatedJob, validate

WAIT_SECONDS = 1.0
"""Seconds until the second look at a record that another run holds; the waits grow from there."""
LONGEST_WAIT_SECONDS = 5.0
"""The most seconds between two looks."""
KEPT = 10_000
"""Uploads that are remembered; jobs with the same image mostly follow each other."""


@dataclass(frozen=True)
class Pipeline:
    """The stages of a run. Threads may share it.

    Attributes:
        reader: Reads source images.
        uploads: Uploads them to where the provider can read them.
        look_up: Finds out what is paid for.
        cashier: Pays.
        archiving: Archives.
        publisher: Publishes; None if that is not asked for.
        price_usd: The expected price of a picture.
    """

    reader: SourceReader
    uploads: Uploads
    look_up: LookUp
    cashier: Cashier
    archiving: Archiving
    publisher: Publisher | None
    price_usd: Decimal
    _uploaded: dict[tuple[str, str], Future[UploadedImage]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ledger(self) -> Ledger:
        """The ledger of the run."""
        return self.look_up.ledger

    @property
    def gate(self) -> Gate:
        """The gate that admits every request of the run."""
        return self.cashier.gate

    def upload(self, job: ValidatedJob) -> UploadedImage:
        """Uploads a job's source image; one that several jobs of the run share is uploaded once.

        Args:
            job: The job.

        Raises:
            SegmindError: As for `Uploads.upload`.
        """
        key, mine = (job.job.image, job.source_sha256), Future[UploadedImage]()
        while True:
            with self._lock:
                found = self._uploaded.setdefault(key, mine)
                if len(self._uploaded) > KEPT:
                    self._uploaded.pop(next(iter(self._uploaded)))
            if found is mine:
                break
            with suppress(SegmindError):  # the upload failed for another job: try it for this one
                return found.result()
        try:
            mine.set_result(self.uploads.upload(job, self.reader))
        except BaseException as error:  # noqa: BLE001 (raised below)
            with self._lock:
                self._uploaded.pop(key, None)
            mine.set_exception(error)
        return mine.result()

    def generate(
        self, job: ValidatedJob, upload: Callable[[], UploadedImage], run: Run, log: logging.Logger
    ) -> GeneratedImage:
        """Gets the picture of a job: from archive, outbox or the provider's history, or by one request to the API.

        Call it again with the same run to retry: the record has what happened before. A picture that another run is
        paying for at this moment is waited for.

        Args:
            job: The job.
            upload: Uploads its source image; called only if there is something to pay.
            run: The run that asks. Requests are limited per flow run, however often that is run again.
            log: Logs what happens.

        Returns:
            The picture.

        Raises:
            ApiError: The request failed; its `decision` says whether and when to try again.
            InvalidJobError: Nothing can be archived under the name of the job.
            KeptElsewhereError: It is paid for and lies in an outbox out of reach, and `on_kept` is `wait`.
            NotStartedError: The run of a batch has stopped, and no request was sent.
            OutboxError: The disk is full; unless `possibly_billed`, nothing was paid.
            OutcomeUnknownError: An earlier request may have been paid, and `on_unknown` is `fail`; or as many of this
                flow run may have been as are allowed.
            SubmittedError: A request is accepted by the provider and not finished; the next run fetches its picture.
            SegmindError: `upload` failed, or the record could not be read or written. Nothing was paid now; the error
                has the totals of the run's earlier requests, as all others have.
        """
        generated = self._get(job, upload, run, log)
        self.cashier.set_aside(generated.job, run)
        return generated

    def _get(
        self,
        job: ValidatedJob,
        upload: Callable[[], UploadedImage],
        run: Run,
        log: logging.Logger,
        *,
        archived_next: bool = False,
    ) -> GeneratedImage:
        try:
            job = self.look_up.as_paid_for(job)
            return self._generate(job, upload, run, log, archived_next)
        except SegmindError as error:
            if error.decision is None:
                self.cashier.give_up(job, run)
            account = self.ledger.account(job.fingerprint, run.id)._asdict()
            raise error.with_facts(fingerprint=job.fingerprint, **account) from error.__cause__
        except BaseException:
            self.cashier.give_up(job, run)
            raise

    def _generate(
        self,
        job: ValidatedJob,
        upload: Callable[[], UploadedImage],
        run: Run,
        log: logging.Logger,
        archived_next: bool,
    ) -> GeneratedImage:
        wait, waited, announced, warned, read_again = WAIT_SECONDS, 0.0, False, False, True
        while True:
            self.cashier.release_for(job, run)
            finding = self.look_up.look_up(job, run, log, read_again=read_again)
            read_again = finding.verdict in (Verdict.WAIT, Verdict.RECOVER)
            if finding.verdict is Verdict.PAY:
                with self.gate.first(job.fingerprint) as first:
                    if first:
                        self.look_up.archive.check_name(job.name, job.fingerprint)
                        uploaded = upload()
                        if paid := self.cashier.pay(job, uploaded, finding, run, log, archived_next=archived_next):
                            return self._paid_for(job, run, "generated", paid, uploaded.uri)
            elif finding.verdict is Verdict.ASK:
                with self.gate.first(job.fingerprint) as first:
                    if first:
                        if paid := self.cashier.ask(job, finding, run, log):
                            return self._paid_for(job, run, "recovered", paid)
                        continue
            elif finding.verdict is Verdict.REUSE and (picture := finding.archived):
                log.info("reused: %s is paid for and archived already; nothing to pay", job.name)
                return self._generated(job, run, "reused", None, picture, finding.attempts)
            elif finding.verdict is Verdict.RECOVER and finding.kept:
                if not self.look_up.is_unchanged(job, finding):
                    continue  # the run that paid for it has just claimed or archived it
                path, entry = finding.kept
                cost = usd(entry.paid.cost_usd)
                log.info("recovered: %s was paid for (%s USD) and is in the outbox; nothing to pay", job.name, cost)
                self.gate.picture(entry.paid.paid_at)
                attempts = finding.attempts if finding.record else entry.attempts
                return self._generated(job, run, "recovered", path, entry.paid, attempts, paid_by=entry.run)
            elif finding.verdict in (Verdict.REFUSE, Verdict.KEPT):
                if self.look_up.is_unchanged(job, finding):
                    raise self._refusal(job, finding)
                continue  # another run has archived it, or pays for it, since the record was read
            elif not announced:
                log.info("waiting: another run is paying for %s at this moment", job.name)
                announced = True
            elif not warned and waited > LEASE_SECONDS and (why := not_renewed(finding.record)):
                log.warning("still waiting for %s: %s", job.name, why)
                warned = True
            with self.gate.parked(job.name):
                self.gate.pause(wait)
            wait, waited = min(wait * 1.5, LONGEST_WAIT_SECONDS), waited + wait

    def _paid_for(
        self,
        job: ValidatedJob,
        run: Run,
        status: Literal["generated", "recovered"],
        paid: Paid,
        source_uri: str | None = None,
    ) -> GeneratedImage:
        path, picture, attempts, paid_by = paid
        return self._generated(job, run, status, path, picture, attempts, source_uri, paid_by)

    def _generated(
        self,
        job: ValidatedJob,
        run: Run,
        status: Literal["generated", "recovered", "reused"],
        path: Path | None,
        picture: PaidPicture,
        attempts: tuple[Attempt, ...],
        source_uri: str | None = None,
        paid_by: str | None = None,
    ) -> GeneratedImage:
        record = Record(fingerprint=job.fingerprint, attempts=attempts)
        known = record.archived(picture, "-", "-", paid_by=paid_by).attempts
        self.ledger.carry(job.fingerprint, past_requests(run, known, job.price_usd), run.id)
        brought = next((each for each in reversed(known) if each.status == 200 and each.reason is None), None)
        if brought and run.follows(brought.flow_runs):
            status = "generated" if self.ledger.reports(job.fingerprint, brought.request, run.id) else status
        return GeneratedImage(
            job=job,
            source_uri=source_uri or job.job.image,
            archive=self.look_up.archive.url,
            run=run.id,
            status=status,
            path=path,
            picture=picture,
            paid_by=paid_by,
            attempts=attempts,
            **self.ledger.account(job.fingerprint, run.id)._asdict(),
        )

    def _refusal(self, job: ValidatedJob, finding: Finding) -> SegmindError:
        if finding.verdict is Verdict.KEPT:
            return KeptElsewhereError(f"{finding.unresolved(job.name)}; {KEPT_REMEDY}")
        seen = finding.record is not None and finding.record.record.kept_picture is not None
        by_policy = self.look_up.on_unknown == "fail" and not seen
        forbidden = 'on_unknown is "fail"' if by_policy else "this flow run sends no more for it"
        allowed = 'on_unknown="repay"' if by_policy else "a new run"
        return OutcomeUnknownError(
            f"{finding.unresolved(job.name)}; {forbidden} (look at the provider's usage page; {allowed} pays once more)"
        )

    def produce(
        self,
        job: Job | ValidatedJob,
        run: Run,
        log: logging.Logger,
        *,
        flow_run_id: str | None = None,
        unpublished: Callable[[ArchivedImage], None] = lambda _: None,
    ) -> ArchivedImage:
        """Takes a job through all its stages.

        Args:
            job: The job. The warnings of one that is validated already are not logged again.
            run: The run that asks.
            log: Logs what happens.
            flow_run_id: The Prefect flow run, for the sidecar.
            unpublished: Receives the archived picture if publishing it fails.

        Returns:
            The picture in the archive.

        Raises:
            SegmindError: A stage failed; the error's `stage` says which.
        """
        with stage("validate"):
            if isinstance(job, Job):
                job = validate(job, self.reader, price_usd=self.price_usd)
                for warning in job.warnings:
                    log.warning(warning)

        def upload() -> UploadedImage:
            with stage("upload"):
                uploaded = self.upload(job)
            for warning in uploaded.warnings:
                log.warning(warning)
            return uploaded

        try:
            with stage("generate"):
                generated = self._get(job, upload, run, log, archived_next=True)
            with stage("archive"):
                archived, content = self.archiving.archive_with_content(generated, flow_run_id)
        except Exception:
            raise
        except BaseException:  # an interrupt between the stages too: nobody is to wait for this run
            self.cashier.give_up(job, run)
            raise
        if self.publisher is None:
            return archived
        with stage("publish"):
            try:
                return self.publisher.publish(archived, self.archiving.archive, log, content)
            except SegmindError:
                unpublished(archived)
                raise

    def reuse_in_place(self, job: ValidatedJob, run: Run, log: logging.Logger) -> ArchivedImage | None:
        """Reuses a picture that is archived under the job's very name, and publishes it where its address differs.

        It is not read, unless it has to be published.

        Args:
            job: The job.
            run: The run that asks.
            log: Logs what is published.

        Returns:
            The picture; None if anything is left to do for it, which is for `produce`.

        Raises:
            SegmindError: It cannot be told now; `produce` tells why.
        """
        archive = self.archiving.archive
        looked_up = ((known, archive.read(known.fingerprint)) for known in job.known_as)
        known, found = next((each for each in looked_up if each[1]), (job, None))
        reused = self.archiving.in_place(known, found.record) if found else None
        if found is None or reused is None:
            return None
        if self.publisher is not None:
            reused = self.publisher.publish(reused, archive, log)
        record = found.record
        if record.picture and any(past_requests(run, record.attempts, job.price_usd)):  # of an earlier try of this run
            paid = self._generated(known, run, "reused", None, record.picture, record.attempts)
            totals = paid.model_dump(include={"status", "cost_usd", "possibly_billed_usd"})
            reused = reused.model_copy(update={**totals, "attempts": paid.requests_sent})
        return reused


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Sets the `stage` of an error that is raised inside, unless it has one.

    Args:
        name: `validate`, `upload`, `generate`, `archive` or `publish`.
    """
    try:
        yield
    except SegmindError as error:
        if error.stage:
            raise
        raise error.with_facts(stage=name) from error.__cause__
