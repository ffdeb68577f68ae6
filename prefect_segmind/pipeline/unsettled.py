"""Unsettled requests: those of unknown outcome in all records of an archive, looked up at the provider.

What was paid for and never seen is downloaded and archived, though nobody asks for its job again. Nothing is paid.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from prefect_segmind.api.history import HISTORY_SETTING
from prefect_segmind.api.request import ImageToImageRequest
from prefect_segmind.archive.archive import RecordRead
from prefect_segmind.archive.leases import held_elsewhere
from prefect_segmind.archive.record import Attempt, Record, Run, Verdict
from prefect_segmind.errors import (
    HistoryError,
    PreconditionFailedError,
    RunCancelledError,
    SegmindError,
    StoreError,
    SubmittedError,
)
from prefect_segmind.limits.ledger import NOTHING
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.left_over import OUT_OF_REACH, archive_left_over, job_of
from prefect_segmind.pipeline.pay import GeneratedImage
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.validate import ValidatedJob

THREADS = 8
"""Pictures that are asked about at once: each may wait for a row that lands late, or for a request still under way."""
END_SECONDS = 5.0
"""How long the end of a run waits for those under way to give up what they have claimed."""
NO_HISTORY = (
    f"there is no request history to look requests up in: {HISTORY_SETTING} is off, or it is not set and none is known "
    "for the host of SEGMIND_BASE_URL; set it to the history's address"
)
"""The message where no history is configured."""
_NO_JOB = "its job is not known: run the same job again, and the provider is asked"
_NOT_TOLD = "the provider's history does not say what became of it: it counts as possibly billed"
_TOO_LITTLE = "an earlier version noted too little to look it up: the provider's usage page may tell"

TITLES = ("name", "sent (UTC)", "outcome", "USD")
"""The titles of the columns of `LookedUp.cells`."""

Result = Literal["recovered", "billed again", "no picture", "not billed", "submitted", "unknown", "failed"]


class LookedUp(BaseModel):
    """What is known by now of an earlier request.

    Attributes:
        name: The name of its job; None if that is not known.
        fingerprint: The fingerprint of its picture.
        sent_at: When it was sent, UTC; None if that is not known.
        outcome: `recovered`: it was billed, and its picture is archived now. `billed again`: it was billed, though the
            picture has come from another request. `no picture`: it was billed and has no picture any more. `not
            billed`: it has failed at the provider. `submitted`: it is under way at the provider. `unknown`: the
            provider does not know it. `failed`: it cannot be settled now, as its picture
            cannot be downloaded or archived, or its record not be written.
        cost_usd: What it was billed; None if that is not known.
        image: The address of the picture in the archive, if it is there.
        request_id: The provider's id of it; None if that is not known.
        asked: Whether the provider was asked about it; otherwise the outbox had its picture, or it cannot be asked.
        reason: Why there is no picture; None if there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None
    fingerprint: str
    sent_at: datetime | None
    outcome: Result
    cost_usd: Decimal | None = None
    image: str | None = None
    request_id: str | None = None
    asked: bool = True
    reason: str | None = None

    @property
    def title(self) -> str:
        """The name of its job, or what else names its picture."""
        return self.name or self.fingerprint[:16]

    def cells(self) -> tuple[str, str, str, str]:
        """The request as a row of a table: name, when it was sent (UTC), outcome, USD."""
        sent = f"{self.sent_at:%Y-%m-%d %H:%M:%S}" if self.sent_at else "?"
        return self.title, sent, self.outcome, "" if self.cost_usd is None else usd(self.cost_usd)


class Reconciled(BaseModel):
    """What has become known of the unsettled requests of an archive.

    Attributes:
        archive: The address of the archive.
        records: Records of pictures in it.
        looked_up: Requests that the provider was asked about.
        recovered: Pictures that were paid for and are archived now.
        not_billed: Requests that have failed at the provider, unbilled.
        billed_again: Requests that were billed though the picture has come from another one.
        no_picture: Requests that were billed and have no picture any more.
        submitted: Requests that are still under way at the provider.
        unknown: Requests of which nothing has become known: they count as possibly billed.
        failed: Requests that cannot be settled now, each with its reason.
        cost_usd: What the recovered pictures had cost; nothing is paid now.
        pictures: The requests, by name and time.
        problems: What else could not be done: records that cannot be read, pictures that stay in the outbox.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    archive: str = ""
    records: int = 0
    looked_up: int = 0
    recovered: int = 0
    not_billed: int = 0
    billed_again: int = 0
    no_picture: int = 0
    submitted: int = 0
    unknown: int = 0
    failed: int = 0
    cost_usd: Decimal = NOTHING
    pictures: tuple[LookedUp, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether everything that could be archived is, and every record was read."""
        return not self.failed and not self.problems

    def failures(self) -> list[str]:
        """A line for each request that cannot be settled now."""
        return [f"{each.title}: {each.reason}" for each in self.pictures if each.outcome == "failed"]

    def sentence(self) -> str:
        """The counts in one line."""
        counts = (
            (self.recovered, f"recovered ({usd(self.cost_usd)} USD, paid before)"),
            (self.not_billed, "not billed"),
            (self.billed_again, "billed again"),
            (self.no_picture, "billed, without a picture"),
            (self.submitted, "still under way"),
            (self.unknown, "unknown"),
            (self.failed, "failed"),
        )
        counted = ", ".join(f"{count} {what}" for count, what in counts if count)
        looked_up = f"{self.looked_up} request{'s' * (self.looked_up != 1)} looked up"
        empty = "" if self.records else "; there are no records of pictures: is this the address of the archive?"
        return f"{looked_up}{': ' if counted else ''}{counted}; this run paid nothing{empty}"


def reconcile_archive(pipeline: Pipeline, run: Run, log: logging.Logger, flow_run_id: str | None = None) -> Reconciled:
    """Looks up every unsettled request of an archive, and archives what was paid for. It pays nothing.

    Pictures that live runs hold are left to them. Of a picture that is archived already only the record is corrected.

    Args:
        pipeline: The stages over the archive.
        run: The run that asks.
        log: Logs what becomes known.
        flow_run_id: The Prefect flow run, for the sidecars.

    Returns:
        What has become known.

    Raises:
        HistoryError: The provider's request history cannot be read, or there is none.
        OutboxError: The outbox cannot be read.
        StoreError: The archive cannot be read.
    """
    history = pipeline.cashier.reconciler.history
    if history is None:
        raise HistoryError(NO_HISTORY)
    history.check()
    settling = _Settling(pipeline, run, log, flow_run_id)
    left = archive_left_over(pipeline.archiving, run, flow_run_id)
    found = [settling.recovered_from_outbox(each) for each in left.archived.values()]
    seen = set[str]()
    problems = [f"{path} was paid for and stays in the outbox: {why}" for path, why in left.stayed.items()]
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="segmind-reconcile")
    tasks: list[Future[list[LookedUp]]] = []
    try:
        tasks += (pool.submit(settling.settle, each) for each in _unsettled(pipeline, run, seen, problems))
        for task in tasks:
            found += task.result()
    except BaseException:
        pipeline.gate.stop(RunCancelledError("the run was ended"))
        pool.shutdown(wait=False, cancel_futures=True)
        wait(tasks, END_SECONDS)
        raise
    finally:
        pool.shutdown(wait=False)
    if any(each.outcome == "unknown" for each in found):
        try:  # it may be the history that was out of reach meanwhile, and not a request that it does not list
            history.check()
        except HistoryError as error:
            problems.append(str(error))
    return _counted(pipeline.archiving.archive.url, len(seen), found, problems)


def _unsettled(pipeline: Pipeline, run: Run, seen: set[str], problems: list[str]) -> Iterator[RecordRead]:
    """The records to look into; `seen` receives the fingerprints of all, and `problems` those that cannot be read."""
    archive = pipeline.archiving.archive
    for fingerprint, found in archive.records():
        seen.add(fingerprint)
        if isinstance(found, StoreError):
            if isinstance(found.__cause__ or found, OUT_OF_REACH):
                raise found
            problems.append(str(found))
        elif any(each.in_doubt for each in found.record.attempts) and not held_elsewhere(archive, found, run.id):
            yield found


def _counted(archive: str, records: int, found: Iterable[LookedUp], problems: Sequence[str]) -> Reconciled:
    pictures = tuple(sorted(found, key=lambda each: (each.title, str(each.sent_at))))
    counts = Counter(each.outcome for each in pictures)
    return Reconciled(
        archive=archive,
        records=records,
        looked_up=sum(each.asked for each in pictures),
        recovered=counts["recovered"],
        not_billed=counts["not billed"],
        billed_again=counts["billed again"],
        no_picture=counts["no picture"],
        submitted=counts["submitted"],
        unknown=counts["unknown"],
        failed=counts["failed"],
        cost_usd=sum((each.cost_usd or NOTHING for each in pictures if each.outcome == "recovered"), NOTHING),
        pictures=pictures,
        problems=tuple(problems),
    )


class _Settling(NamedTuple):
    """Settles records, one at a time in each thread.

    Attributes:
        pipeline: The stages over the archive.
        run: The run that asks.
        log: Logs what becomes known.
        flow_run_id: The Prefect flow run, for the sidecars.
    """

    pipeline: Pipeline
    run: Run
    log: logging.Logger
    flow_run_id: str | None

    def settle(self, found: RecordRead) -> list[LookedUp]:
        """Settles the requests of one record, as far as the provider knows them.

        Raises:
            HistoryError: The provider's request history cannot be read.
        """
        record = found.record
        doubtful = [each for each in record.attempts if each.in_doubt]
        about = [each for each in doubtful if self.pipeline.cashier.reconciler.can_ask(each, self.run)]
        job = job_of(record.asked) if record.asked else None
        ended: tuple[Result, str]
        try:
            if record.state == "done":
                return self._correct(found)
            untold = [
                _entry(record, each, "unknown", asked=False, reason=_TOO_LITTLE) for each in _less(doubtful, about)
            ]
            if not about:
                return untold
            if job is None or job.fingerprint != record.fingerprint:
                return [*untold, *(_entry(record, each, "unknown", asked=False, reason=_NO_JOB) for each in about)]
            return [*untold, *self._fetch(job, about)]
        except HistoryError:
            raise
        except SubmittedError as error:
            ended = "submitted", str(error)
        except SegmindError as error:
            ended = "failed", str(error)
        return [_entry(record, each, ended[0], reason=ended[1]) for each in about]

    def _fetch(self, job: ValidatedJob, about: Sequence[Attempt]) -> list[LookedUp]:
        """Fetches the picture of a job, if one of its requests has made it."""
        pipeline, run = self.pipeline, self.run
        finding = pipeline.look_up.look_up(job, run, self.log)
        if finding.verdict is Verdict.RECOVER and finding.kept:
            path, entry = finding.kept
            generated = GeneratedImage.paid_before(
                job,
                pipeline.archiving.archive.url,
                run,
                path,
                entry.paid,
                attempts=finding.attempts,
                paid_by=entry.run,
                source_uri=entry.source_uri,
            )
            return [self.recovered_from_outbox(pipeline.archiving.archive_picture(generated, self.flow_run_id))]
        if finding.record and finding.verdict in (Verdict.REUSE, Verdict.KEPT):
            return self._correct(finding.record, job)
        if finding.record is None or finding.verdict is not Verdict.ASK:
            return []  # another run has it by now
        try:
            paid = pipeline.cashier.ask(job, finding, run, self.log)
            if paid is None:
                now = pipeline.archiving.archive.read(job.fingerprint)
                told = now.record.attempts if now else ()
                return list(_told(finding.record.record, about, told, asked_by=run.id))
            generated = GeneratedImage.paid_before(
                job,
                pipeline.archiving.archive.url,
                run,
                paid.path,
                paid.picture,
                attempts=paid.attempts,
                paid_by=paid.paid_by,
            )
            image, reason = None, None
            try:
                image = pipeline.archiving.archive_picture(generated, self.flow_run_id).image
            except SegmindError as error:
                reason = str(error)
            return list(_told(finding.record.record, about, paid.attempts, image=image, reason=reason))
        finally:
            pipeline.cashier.give_up(job, run)

    def recovered_from_outbox(self, archived: ArchivedImage) -> LookedUp:
        """What is known of the request whose picture was in the outbox, by the record as it is now."""
        found = self.pipeline.archiving.archive.read(archived.fingerprint)
        picture = found.record.picture if found else None
        sent = [each for each in found.record.attempts if _has_returned(each)] if found else []
        return LookedUp(
            name=archived.name,
            fingerprint=archived.fingerprint,
            sent_at=sent[-1].sent_at if sent else None,
            outcome="recovered",
            cost_usd=picture.cost_usd if picture else None,
            image=archived.image,
            request_id=picture.request_id if picture else None,
            asked=False,
        )

    def _correct(self, found: RecordRead, job: ValidatedJob | None = None) -> list[LookedUp]:
        """Corrects the record of a picture that is archived, or kept in another outbox, by what the provider says.

        Args:
            found: The record.
            job: The job of the picture; by default that in its sidecar.
        """
        record, reconciler = found.record, self.pipeline.cashier.reconciler
        about = [each for each in record.attempts if _is_unknown(each) and reconciler.can_ask(each, self.run)]
        body = _body(job.parameters) if job else self._body_in_sidecar(record)
        returned = [each for each in record.attempts if each.possibly_billed is False and each.cost_usd]
        if not about or body is None or not all(each.image_file or each.request_id for each in returned):
            return []  # the row of the request that has returned the picture could be taken for one of these
        sought = {each.request for each in (*about, *returned)}
        taken = {each.request_id for each in record.attempts if each.request_id and each.request not in sought}
        outcomes = reconciler.look_up(body, [*about, *returned], self.pipeline.price_usd, taken)
        settled = record
        for each in about:
            if outcome := outcomes.get(each.request):
                settled = settled.settled(each.request, **outcome)
        if settled != record:
            try:
                self.pipeline.archiving.archive.write(settled, found.etag)
            except PreconditionFailedError:
                return []  # another run has written it meanwhile
        return list(_told(settled, about, settled.attempts))

    def _body_in_sidecar(self, record: Record) -> Mapping[str, Any] | None:
        """The body of the requests for a picture that is archived; None if its sidecar does not say it."""
        beside = self.pipeline.archiving.archive.store.get(record.sidecar or "")
        try:
            return _body(json.loads(beside.data)["request"]) if beside else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


def _less(attempts: Iterable[Attempt], without: Collection[Attempt]) -> list[Attempt]:
    return [each for each in attempts if each not in without]


def _body(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The body of a request but for its image.

    Raises:
        ValueError: The parameters are of another form.
    """
    fields = {**parameters, "image_file": "-"}
    return ImageToImageRequest.model_validate(fields, context={"allow_unlisted_resolution": True}).body()


def _is_unknown(attempt: Attempt) -> bool:
    """Whether a request may have been billed, and nobody knows."""
    return attempt.possibly_billed is not False and not attempt.kept_picture


def _has_returned(attempt: Attempt) -> bool:
    """Whether a request has brought the picture."""
    return attempt.possibly_billed is False and attempt.status == 200 and attempt.reason is None


def _told(
    record: Record,
    about: Iterable[Attempt],
    told: Sequence[Attempt],
    *,
    image: str | None = None,
    reason: str | None = None,
    asked_by: str | None = None,
) -> Iterator[LookedUp]:
    """What has become known of requests.

    Args:
        record: Their record.
        about: The requests as they were.
        told: The requests of the record as they are now.
        image: The address of the picture, if one of them has brought it.
        reason: Why the picture that one of them has brought could not be archived.
        asked_by: Leaves out those of unknown outcome that this run has not asked about: another one was faster.
    """
    now = {each.request: each for each in told}
    has_picture = image is not None or record.state == "done" or record.kept_picture is not None
    for each in about:
        known = now.get(each.request, each)
        if _has_returned(known):
            yield _entry(record, known, "failed" if reason else "recovered", image=image, reason=reason)
        elif known.possibly_billed is not False:
            if asked_by in (None, known.asked_by):
                yield _entry(record, known, "unknown", reason=_NOT_TOLD)
        elif known.cost_usd:
            yield _entry(record, known, "billed again" if has_picture else "no picture", reason=known.reason)
        else:
            yield _entry(record, known, "not billed", reason=known.reason)


def _entry(
    record: Record,
    attempt: Attempt,
    outcome: Result,
    *,
    asked: bool = True,
    image: str | None = None,
    reason: str | None = None,
) -> LookedUp:
    name = record.asked.name if record.asked else None
    if name is None and record.image:
        name = record.image.rpartition("/")[0]
    return LookedUp(
        name=name,
        fingerprint=record.fingerprint,
        sent_at=attempt.sent_at,
        outcome=outcome,
        cost_usd=None if outcome in ("unknown", "submitted") else attempt.cost_usd,
        image=image,
        request_id=attempt.request_id,
        asked=asked,
        reason=reason,
    )
