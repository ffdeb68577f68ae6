"""Paying: one request for a picture that is not paid for yet, and asking what became of earlier ones."""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.history import address
from prefect_segmind.api.picture import Answered, PaidPicture
from prefect_segmind.api.request import ImageToImageRequest
from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.leases import Claim, claim, give_up, held_claim, this_process
from prefect_segmind.archive.outbox import Outbox, OutboxEntry
from prefect_segmind.archive.record import (
    LEASE_SECONDS,
    Asked,
    Attempt,
    Holder,
    OnUnknown,
    Outcome,
    Record,
    Run,
    past_requests,
)
from prefect_segmind.errors import (
    AccountError,
    ApiError,
    Decision,
    NotAnImageError,
    OutboxError,
    PreconditionFailedError,
    SegmindError,
    StoreError,
    SubmittedError,
)
from prefect_segmind.limits.admission import Admission, Gate
from prefect_segmind.limits.ledger import NOTHING, Totals
from prefect_segmind.limits.retry import RetryPolicy, decide, holds_all
from prefect_segmind.pipeline.look_up import Finding
from prefect_segmind.pipeline.reconcile import Reconciler, Replies, could_tell
from prefect_segmind.pipeline.upload import UploadedImage
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.storage.reserved_file import release

REQUEST_SECONDS = 3600.0
"""How long a claim is kept for one request at most."""
ARCHIVE_SECONDS = 600.0
"""How long a claim on a picture in the outbox is kept for the archive stage to finish."""


class GeneratedImage(BaseModel):
    """A picture that is paid for, by this run or an earlier one.

    Attributes:
        job: The job.
        source_uri: The location of the source image: where it was uploaded to, if this run has paid.
        archive: The archive that has its record.
        run: The run that got it.
        status: `generated` by this run, earlier tries of its flow run included; or paid for before and `recovered` from
            the outbox or `reused` from the archive.
        path: The picture in the outbox; None if it is in the archive.
        picture: Its facts.
        paid_by: The run whose request has brought it, where that is known.
        attempts: Every request that was ever sent for it.
        requests_sent: The number of them that this run has to report.
        cost_usd: What this run paid for it.
        possibly_billed_usd: What those of unknown outcome may have cost, as far as this run has to report them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: ValidatedJob
    source_uri: str
    archive: str
    run: str
    status: Literal["generated", "recovered", "reused"]
    path: Path | None
    picture: PaidPicture
    attempts: tuple[Attempt, ...]
    requests_sent: int
    cost_usd: Decimal
    possibly_billed_usd: Decimal
    paid_by: str | None = None

    @property
    def name(self) -> str:
        """The name of the job."""
        return self.job.name

    @classmethod
    def paid_before(
        cls,
        job: ValidatedJob,
        archive: str,
        run: Run,
        path: Path,
        picture: PaidPicture,
        *,
        attempts: tuple[Attempt, ...],
        paid_by: str | None,
        source_uri: str | None = None,
    ) -> GeneratedImage:
        """A picture in the outbox whose job nobody asks for now: this run has nothing to report of its requests.

        Args:
            job: The job.
            archive: The archive that has its record.
            run: The run that archives it.
            path: The picture in the outbox.
            picture: Its facts.
            attempts: Every request that was ever sent for it.
            paid_by: The run whose request has brought it, where that is known.
            source_uri: The location of the source image; the job's if None.
        """
        return cls(
            job=job,
            source_uri=source_uri or job.job.image,
            archive=archive,
            run=run.id,
            status="recovered",
            path=path,
            picture=picture,
            paid_by=paid_by,
            attempts=attempts,
            requests_sent=0,
            cost_usd=NOTHING,
            possibly_billed_usd=NOTHING,
        )


class Paid(NamedTuple):
    """The picture that a request has brought.

    Attributes:
        path: The picture in the outbox.
        picture: Its facts.
        attempts: Every request for it.
        paid_by: The run that has sent the one that brought it.
    """

    path: Path
    picture: PaidPicture
    attempts: tuple[Attempt, ...]
    paid_by: str


@dataclass
class _Sending:
    """One request under way, and what it needs.

    Once its answer is kept as one without a picture, `kept` is where. Not `is_asked` if the provider could be asked
    about it, and was not.
    """

    client: SegmindClient
    job: ValidatedJob
    request: ImageToImageRequest
    part: Path
    held: Claim
    admission: Admission
    run: Run
    log: logging.Logger
    kept: Path | None = None
    is_asked: bool = True


@dataclass(frozen=True)
class Cashier:
    """Sends the paid requests, each under a claim on its picture. Threads may share it.

    Attributes:
        archive: The archive, with the records.
        outbox: The outbox, which receives the pictures.
        open_client: Makes the client for one request; a pool of connections that threads share is slow.
        address: Turns the URI of an uploaded image into an address that the provider can GET, for one request.
        reconciler: Asks the provider what became of requests whose outcome is unknown.
        on_unknown: Whether a picture is paid for again where an earlier request, of this run or another, may have been
            billed.
        policy: The limits of the run's retries.
        gate: Admits every request of the run and enters it in the ledger.
    """

    archive: Archive
    outbox: Outbox
    open_client: Callable[[], SegmindClient]
    address: Callable[[str], str]
    reconciler: Reconciler
    on_unknown: OnUnknown = "repay"
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    gate: Gate = field(default_factory=Gate)

    def pay(
        self,
        job: ValidatedJob,
        uploaded: UploadedImage,
        finding: Finding,
        run: Run,
        log: logging.Logger,
        *,
        archived_next: bool = False,
    ) -> Paid | None:
        """Sends one request; where its outcome is unknown, the provider is asked what became of it.

        What can fail on this machine (disk space, the signed address) is done before the picture is claimed.

        Args:
            job: The job.
            uploaded: Its source image, where the provider can read it.
            finding: The state of the picture when it was decided to pay.
            run: The run that pays.
            log: Logs that a picture is paid for again, and the notices about the answer.
            archived_next: Whether the caller archives the picture as soon as this returns: then that it has come is not
                written into the record of its own, but with that the picture is archived, or why it could not be.

        Returns:
            The picture; None if another run was faster to claim it.

        Raises:
            ApiError: The request failed; its `decision` says whether and when to try again.
            NotStartedError: The run of a batch has stopped, and no request was sent.
            OutboxError: The disk is full; unless `possibly_billed`, nothing was paid.
            StoreError: The record cannot be written; nothing was paid.
            SubmittedError: The provider has accepted the request and not finished it, and the run waits no longer.
        """
        asked = self._asked(job, uploaded.uri, run.id)
        with (
            self.open_client() as client,
            self.gate.admit(job.price_usd, job.name) as admission,
            self.outbox.receive(job.fingerprint, run.id, asked) as part,
        ):
            request = job.request(self.address(uploaded.uri))
            held = self._claim(job, finding, run, asked, address(request.image_file), admission.shares)
            if held is None:
                return None
            held.is_new = finding.is_new
            request_id = held.record.attempts[-1].request
            first = sum(each.run == run.id for each in held.record.attempts) == 1
            if first and (why := finding.unresolved(job.name)):
                log.warning("%s: paying again", why)
            held.hold(REQUEST_SECONDS)

            def enter() -> None:
                """Enters the request, and what a dead run may have been billed, which this one reports from here on."""
                earlier = past_requests(run, held.record.attempts[:-1], job.price_usd)
                self.gate.ledger.carry(job.fingerprint, earlier, run.id)
                admission.sent(job.fingerprint, request_id)

            def before_sending() -> None:
                held.confirm()
                admission.confirm()
                enter()
                held.sending()

            paid, path = None, part
            sending = _Sending(client, job, request, part, held, admission, run, log)
            try:
                paid = self._bought(sending, before_sending)
                admission.paid(paid.cost_usd, paid.paid_at)
                entry = OutboxEntry(paid=paid, attempts=held.record.attempts, **asked.model_dump())
                path = self.outbox.keep(job.fingerprint, part, entry)
                if sending.kept:
                    self.outbox.remove_answer(job.fingerprint, held.record.attempts[-1], held.record.attempts)
            except BaseException as error:
                if admission.request is None and not isinstance(error, ApiError):
                    # It was not sent: the claim is lost or cannot be confirmed, or the run was interrupted.
                    held.give_up()
                    if not isinstance(error, PreconditionFailedError):
                        raise
                    self.gate.ledger.not_sent(job.fingerprint, request_id)
                    return None
                if paid is not None:  # whatever it is that fails now, the picture is here and paid for
                    self._write_outcome(held, _answered(paid, path), log)
                    held.give_up()
                    raise
                enter()  # unless it was sent: it was tried
                if isinstance(error, SubmittedError) and error.request_id:
                    self._note(held, error.request_id, log)
                if held.record.attempts[-1].is_submitted and (
                    not isinstance(error, ApiError) or isinstance(error, AccountError)
                ):
                    if isinstance(error, SegmindError) and error.answered is not None:
                        admission.unusable(error)  # its cost is known, and the disk has failed
                    held.give_up()  # the next run fetches it
                    raise
                if not isinstance(error, SegmindError):
                    ended = SegmindError(f"ended by {type(error).__name__}", possibly_billed=True)
                    self._fail(run, held, ended, log, sending.kept or self.outbox.arrived(part))
                    raise
                failed, kept = error, None
                if error.answered is not None:
                    # What it has brought is kept already, and a link to its picture that did not work may be here.
                    if kept := self._keep_answer(part, error.answered, log) or sending.kept:
                        failed = error.with_facts(
                            f"{error}; the answer is kept in {kept}, and read again first when the job is run again"
                        )
                    admission.unusable(failed)
                decision = self._fail(run, held, error, log, kept, is_asked=sending.is_asked)
                raise failed.with_facts(decision=decision) from error.__cause__
            # Before anything else can end the run.
            self._write_outcome(held, _answered(paid, path), log, at_once=not archived_next)
        return self._paid(held, path, paid, run.id, log)

    def ask(self, job: ValidatedJob, finding: Finding, run: Run, log: logging.Logger) -> Paid | None:
        """Asks the provider, under a claim on the picture, what became of earlier requests of unknown outcome.

        Nothing is sent that could be billed. What the provider says is written into the record.

        Args:
            job: The job.
            finding: The state of the picture when it was decided to ask.
            run: The run that asks.
            log: Logs what becomes known.

        Returns:
            The picture, if one of them has brought it; None if none has, or another run was faster to claim it.

        Raises:
            OutboxError: The disk is full; nothing was paid now.
            ResultLinkError: A picture was made and billed, and cannot be downloaded now.
            StoreError: The record cannot be written; nothing was paid.
            SubmittedError: A request is accepted and not finished, and the run waits no longer.
        """
        before = finding.record.record.asked if finding.record else None
        sender = next(each.run for each in reversed(finding.attempts) if each.in_doubt)
        asked = self._asked(job, (before and before.source_uri) or job.job.image, sender)
        with self.outbox.receive(job.fingerprint, run.id, asked) as part, self.open_client() as client:
            held = self._claimed_by(Claim.take_over, job, finding, run)
            if held is None:
                return None
            held.hold(REQUEST_SECONDS)
            self._report(job, held, run)
            doubtful = [each for each in held.record.attempts if each.in_doubt and self.reconciler.can_ask(each, run)]
            others = [each for each in held.record.attempts if each not in doubtful]

            def keep(answered: Answered) -> str | None:
                path = self._keep_answer(part, answered, log)
                return _on_this_host(path) if path else None

            release(part)
            with self.gate.parked(job.name):
                replies = self.reconciler.ask(client, job, doubtful, part, log, others, keep)
            brought_by = replies.brought_by
            if replies.picture is None or brought_by is None:
                self._enter(held, job, doubtful, replies, run, log)
                return None
            facts = asked.model_copy(update={"run": brought_by.run}).model_dump()
            entry = OutboxEntry(paid=replies.picture, attempts=held.record.attempts, **facts)
            path = self.outbox.keep(job.fingerprint, part, entry)
            self.outbox.remove_answer(job.fingerprint, brought_by, held.record.attempts)
            self.gate.picture(replies.picture.paid_at)
            self._enter(held, job, doubtful, replies, run, log, _on_this_host(path))
        return self._paid(held, path, replies.picture, brought_by.run, log)

    def _paid(self, held: Claim, path: Path, picture: PaidPicture, sender: str, log: logging.Logger) -> Paid:
        held.hold(ARCHIVE_SECONDS)
        for notice in picture.notices:
            log.info(notice)
        return Paid(path, picture, held.record.attempts, sender)

    def _bought(self, sending: _Sending, before_sending: Callable[[], None]) -> PaidPicture:
        """The picture that a request brings, or that the provider has made of it though the answer was lost.

        Raises:
            ApiError: The request failed; not `possibly_billed` if the provider says that it has billed nothing.
            SubmittedError: As for `pay`.
        """
        client, job, part, log = sending.client, sending.job, sending.part, sending.log
        try:
            if not client.submits:
                return client.generate(sending.request, part, before_sending)
            submitted = client.submit(sending.request, before_sending)
            self._note(sending.held, submitted.request_id, log)
            return self.reconciler.poller.result(client, submitted, job.seed, part, log, resumed=False)
        except ApiError as error:
            about_result = client.submits and isinstance(error, (NotAnImageError, AccountError))
            if about_result or not could_tell(error):
                raise
            return self._made_all_the_same(sending, error)

    def _made_all_the_same(self, sending: _Sending, error: ApiError) -> PaidPicture:
        """The picture that the provider has made of a request of unknown outcome.

        One whose answer was read whole keeps its slot: a few of them in a row stop a batch, and others are not to be
        sent before they are counted. The answer is kept first, until the picture is.

        Raises:
            ApiError: It has made none, or cannot be asked: the error, with what the provider says.
            SubmittedError: As for `pay`.
        """
        job, run, log = sending.job, sending.run, sending.log
        attempts = sending.held.record.attempts
        sent = attempts[-1]
        if error.request_id and not sent.is_submitted:  # named by an answer of which nobody knows who has sent it
            sent = sent.model_copy(update={"request_id": error.request_id, "possibly_billed": True})
        if not self.reconciler.can_ask(sent, run):
            raise error
        log.warning("%s: %s; the provider is asked what became of the request", job.name, error)
        with ExitStack() as meanwhile:
            if error.answered is not None:
                try:
                    sending.kept = self.outbox.keep_answer(sending.part, error.answered)
                except OutboxError:  # it stays where it is, and nothing else may come there
                    sending.is_asked = False
                    raise error from None
            else:
                release(sending.part)
                sending.admission.stand_aside(error)
                meanwhile.enter_context(self.gate.parked(job.name))
            replies = self.reconciler.ask(sending.client, job, [sent], sending.part, log, attempts[:-1])
        if replies.picture is None:
            raise _as_told(error, replies.outcomes.get(sent.request)) from error.__cause__
        log.warning("%s: the provider has made its picture all the same, and it is paid for once", job.name)
        return replies.picture

    def _enter(
        self,
        held: Claim,
        job: ValidatedJob,
        doubtful: Sequence[Attempt],
        replies: Replies,
        run: Run,
        log: logging.Logger,
        kept: str | None = None,
    ) -> None:
        """Enters what the provider says of earlier requests in the record and in the ledger."""
        self._write_outcome(held, lambda record: replies.entered(record, doubtful, run, kept), log)
        for each in doubtful:
            if outcome := replies.outcomes.get(each.request):
                cost = outcome.get("cost_usd") or NOTHING
                told = Totals(1, cost) if run.owns(each) else Totals()
                self.gate.ledger.correct(job.fingerprint, each.request, told)
        self._report(job, held, run)
        self.gate.corrected()

    def _report(self, job: ValidatedJob, held: Claim, run: Run) -> None:
        """Enters in the ledger what this run has to report of the requests in the record."""
        past = past_requests(run, held.record.attempts, job.price_usd)
        self.gate.ledger.carry(job.fingerprint, past, run.id)

    def _note(self, held: Claim, request_id: str, log: logging.Logger) -> None:
        """Notes in the record that the provider has accepted the request: whoever comes next can fetch its result."""
        self._write_outcome(held, lambda record: record.submitted(request_id), log)

    def _asked(self, job: ValidatedJob, source_uri: str, run: str) -> Asked:
        about = job.model_dump(mode="json")
        return Asked(job=about, source_uri=source_uri, archive=self.archive.url, run=run)

    def set_aside(self, job: ValidatedJob, run: Run) -> None:
        """Lets any run of this process archive the picture that a run has got, as nobody knows when that one will.

        Args:
            job: The job of the picture.
            run: The run.
        """
        held = held_claim(self.archive, job.fingerprint)
        if held is not None and held.run == run.id:
            held.is_idle = True

    def give_up(self, job: ValidatedJob, run: Run) -> None:
        """Gives up the claim that a run may hold on a picture, so that no other run waits for it.

        Args:
            job: The job of the picture.
            run: The run.
        """
        give_up(self.archive, job.fingerprint, run.id)

    def release_for(self, job: ValidatedJob, run: Run) -> None:
        """Releases a claim left by an earlier try of a run's flow run, which will not archive the picture.

        One whose request is under way is not left: a thread of that try goes on where its run was interrupted, and
        brings the picture.

        Args:
            job: The job of the picture.
            run: The run that goes on.
        """
        left = held_claim(self.archive, job.fingerprint)
        if left is None or left.is_asking:
            return
        if left.record.holder and run.follows(left.record.holder.flow_runs):
            left.release()

    def _claim(
        self,
        job: ValidatedJob,
        finding: Finding,
        run: Run,
        asked: Asked,
        image_file: str,
        shares: tuple[str, ...],
    ) -> Claim | None:
        def begin(held: Claim, holder: Holder) -> None:
            held.begin_request(holder, asked, image_file, shares)

        return self._claimed_by(begin, job, finding, run)

    def _claimed_by(
        self, begin: Callable[[Claim, Holder], None], job: ValidatedJob, finding: Finding, run: Run
    ) -> Claim | None:
        held = held_claim(self.archive, job.fingerprint)
        if held is None or held.run != run.id:
            return claim(self.archive, finding.record, job.fingerprint, run, begin)
        try:
            begin(held, this_process(run))
        except PreconditionFailedError:
            return None
        return held

    def _keep_answer(self, part: Path, answered: Answered, log: logging.Logger) -> Path | None:
        """Keeps the body of a 200 without a picture; returns where, or None if it is empty."""
        try:
            return self.outbox.keep_answer(part, answered)
        except OutboxError as broken:
            log.warning(str(broken))
            return part

    def _fail(
        self,
        run: Run,
        held: Claim,
        error: SegmindError,
        log: logging.Logger,
        kept: Path | None = None,
        *,
        is_asked: bool = True,
    ) -> Decision:
        """Decides what follows a failed request, and writes it into the record.

        Args:
            run: The run that sent it.
            held: Its claim.
            error: The failure.
            log: Logs that the record cannot be written.
            kept: Where the body of a 200 without a picture is kept, or what has arrived of an answer.
            is_asked: Whether the provider was asked about it, if that can be.
        """
        mine = tuple(filter(run.owns, held.record.attempts))
        alike = mine[:-1]
        if self.policy.rate_limit_retries is not None:
            alike = tuple(each for each in alike if each.held_all == holds_all(error))
        policy = self.policy if self.on_unknown == "repay" else replace(self.policy, unknown_retries=0)
        # The failed one has no outcome yet. A flow run may be run again days later.
        counted_from = next(each.sent_at for each in mine if each.run == run.id and not each.held_all)
        can_ask = self.reconciler.can_ask
        decision = decide(
            error,
            attempts=len(alike) + 1,
            unknown=sum(1 for each in mine if each.possibly_billed) + error.possibly_billed,
            elapsed=(datetime.now(UTC) - counted_from).total_seconds(),
            jitter=random.random(),
            policy=policy,
        )

        def outcome(record: Record) -> Record:
            return record.with_outcome(
                status=error.status,
                reason=f"{type(error).__name__}: {error}",
                wait_seconds=decision.wait_seconds,
                possibly_billed=error.possibly_billed,
                held_all=holds_all(error),
                kept=_on_this_host(kept) if kept else None,
                cost_usd=None if error.possibly_billed or error.answered is None else error.answered.cost_usd,
                request_id=error.request_id or record.attempts[-1].request_id,
                asked_by=run.id if is_asked and could_tell(error) and can_ask(record.attempts[-1], run) else None,
            )

        self._write_outcome(held, outcome, log)
        if decision.wait_seconds is None:
            held.release()
        else:
            held.hold(decision.wait_seconds + LEASE_SECONDS)
        return decision

    def _write_outcome(
        self, held: Claim, outcome: Callable[[Record], Record], log: logging.Logger, *, at_once: bool = True
    ) -> None:
        """Writes the outcome of a request into the record; if the archive fails, this run still remembers it."""
        try:
            held.write(outcome) if at_once else held.note(outcome)
        except StoreError as broken:
            log.warning("the outcome of this request could not be written to the archive: %s", broken)


def _answered(paid: PaidPicture, path: Path) -> Callable[[Record], Record]:
    """The outcome of a request that has brought a picture, which waits in the outbox."""
    outcome = Outcome(
        status=200,
        possibly_billed=False,
        kept=_on_this_host(path),
        cost_usd=paid.cost_usd,
        request_id=paid.request_id,
    )
    return lambda record: record.with_outcome(**outcome)


def _as_told(error: ApiError, outcome: Outcome | None) -> ApiError:
    """The error of a request, with what the provider says of it; None if it says nothing."""
    if outcome is None:
        return error
    request_id = outcome.get("request_id")
    if (cost := outcome.get("cost_usd")) is None:
        return error.with_facts(
            f"{error}; {outcome.get('reason')}", possibly_billed=False, answered=None, request_id=request_id
        )
    answered = Answered(cost_usd=cost, cost_source="history", request_id=request_id, at=datetime.now(UTC))
    return NotAnImageError(f"{error}; {outcome.get('reason')}", status=200, answered=answered, request_id=request_id)


def _on_this_host(path: Path) -> str:
    return f"{path} on {socket.gethostname()}"
