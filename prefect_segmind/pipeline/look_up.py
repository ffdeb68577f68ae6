"""The third stage, the one that pays: one request for a picture that nobody has paid for yet."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.picture import Answered, PaidPicture
from prefect_segmind.archive.archive import Archive, RecordRead
from prefect_segmind.archive.leases import Claim, claim, held_beside, held_claim, held_elsewhere, this_process
from prefect_segmind.archive.outbox import Outbox, OutboxEntry
from prefect_segmind.archive.record import (
    LEASE_SECONDS,
    Attempt,
    FlowRuns,
    OnUnknown,
    Record,
    Run,
    Verdict,
    sums,
    verdict,
)
from prefect_segmind.errors import (
    ApiError,
    OutboxError,
    OutcomeUnknownError,
    PreconditionFailedError,
    SegmindError,
    StoreError,
)
from prefect_segmind.images.inspection import Picture
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import Sums
from prefect_segmind.limits.retry import RetryPolicy, decide, holds_all
from prefect_segmind.pipeline.sums import forget, inherit, remember
from prefect_segmind.pipeline.upload import UploadedImage
from prefect_segmind.pipeline.validate import ValidatedJob

WAIT_SECONDS = 1.0
"""Seconds until the second look at a record that another run holds; each further one comes later."""
LONGEST_WAIT_SECONDS = 5.0
"""Seconds between looks at most."""
REQUEST_SECONDS = 3600.0
"""How long a claim is kept for one request at most."""
ARCHIVE_SECONDS = 600.0
"""How long a claim on a picture in the outbox is kept for the archive stage to finish."""


class GeneratedImage(BaseModel):
    """A picture that is paid for, by this run or an earlier one.

    Attributes:
        job: What was asked for.
        source_uri: Where the source image lies: where it was uploaded to, if this run has paid.
        archive: The archive that has its record.
        run: The run that got it.
        status: `generated` by this run, an earlier try of its flow run included; `recovered` from the outbox, `reused`
            from the archive: paid for before.
        path: The picture in the outbox; None where the archive has it.
        picture: Its facts.
        attempts: Every request that was ever sent for it.
        requests_sent: How many of them this run has to report.
        cost_usd: What this run paid for it.
        possibly_billed_usd: What requests of unknown outcome may have cost, as far as this run has to report them.
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

    @property
    def name(self) -> str:
        """The job's name."""
        return self.job.name


@dataclass(frozen=True)
class Generation:
    """Pays for pictures, each of them once.

    Attributes:
        archive: Has the records.
        outbox: Takes the pictures.
        open_client: Makes the client that sends a request; a pool of connections that threads share is slow.
        address: Turns the URI of an uploaded image into an address that the provider can GET, for one request.
        on_unknown: Whether a picture is paid for again where an earlier request, of this run or another, may have been
            billed.
        policy: How patient the run is.
        gate: What every request of the run passes; one of its own lets it go at once.
        say: Takes a line for the log.
        warn: Takes a line that a person should see, for it is about money.
    """

    archive: Archive
    outbox: Outbox
    open_client: Callable[[], SegmindClient]
    address: Callable[[str], str]
    on_unknown: OnUnknown = "repay"
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    gate: Gate = field(default_factory=Gate)
    say: Callable[[str], None] = print
    warn: Callable[[str], None] = print

    def generate(
        self, job: ValidatedJob, upload: Callable[[], UploadedImage], run: str, flow_runs: FlowRuns = ()
    ) -> GeneratedImage:
        """Gets the picture of a job: from the archive, from the outbox, or by one request to the API.

        Call it again with the same `run` to retry: what happened before stands in the record. A picture that another
        run is paying for at this moment is waited for.

        Args:
            job: What is asked for.
            upload: Puts its source image where the provider can read it; called only if there is something to pay.
            run: Identifies the run across its retries.
            flow_runs: The flow run that it is in. What may be sent and what is reported is counted by flow run, however
                often that is run again.

        Raises:
            ApiError: The request failed; its `decision` says whether and when to try again.
            NotStartedError: The run of a batch has stopped, and no request was sent.
            OutboxError: The disk is full; unless `possibly_billed`, nothing was paid.
            OutcomeUnknownError: An earlier request may have been paid, and `on_unknown` is `fail`; or as many of this
                flow run may have been as are allowed.
            SegmindError: As `upload` raises it; or the record could not be read or written. Nothing was paid now; what
                earlier requests of the run came to stands on the error, as on all others.
        """
        try:
            job = self._as_paid_for(job)
            generated = self._picture(job, upload, Run(run, flow_runs))
        except BaseException as error:
            if getattr(error, "decision", None) is None:
                self._ended(job, run, error)
            raise
        forget(self.archive.url, job.fingerprint, run)
        return generated

    def _as_paid_for(self, job: ValidatedJob) -> ValidatedJob:
        """The job as it was known earlier, if it has been paid for then, or may have been, and not since."""
        earlier = job.earlier
        if earlier is None or self.archive.read(job.fingerprint):
            return job
        found = self.archive.read(earlier.fingerprint)
        paid = found and (found.record.state == "done" or found.record.outcome_unknown(Run("")))
        return earlier if paid or self._in_outbox(earlier, unfinished=True) else job

    def _picture(self, job: ValidatedJob, upload: Callable[[], UploadedImage], run: Run) -> GeneratedImage:
        told, looked, pauses = False, False, 0
        left = held_claim(self.archive, job.fingerprint)
        if left is not None and left.record.holder and run.follows(left.record.holder.flow_runs):
            left.release()  # nobody is going to archive for an earlier try of this flow run
        while True:
            found = self._read(job, run)
            elsewhere = held_elsewhere(self.archive, found, run.id)
            done = found and found.record.state == "done"
            kept = None if done else self._in_outbox(job, unfinished=not elsewhere)
            if not (done or kept or elsewhere or looked):
                # Another run may have read the same answer meanwhile, and have put its picture there.
                kept, looked = self._read_again(job, run) or self._in_outbox(job, unfinished=True), True
            unread = [] if done or kept or elsewhere else self.outbox.answers(job.fingerprint)
            what = verdict(
                found.record if found else None,
                run=run,
                in_outbox=kept is not None and not held_beside(self.archive, found, run.id),
                held_elsewhere=elsewhere,
                on_unknown=self.on_unknown,
                unreadable=bool(unread),
            )
            if what is Verdict.PAY:
                with self.gate.first(job.fingerprint) as first:
                    if first and (paid := self._pay(job, upload, run, found, unread)):
                        return paid
                pauses = self._pause(job, pauses)
            elif what is Verdict.REUSE and found and found.record.picture:
                self.say(f"reused: {job.name} is paid for and archived already; nothing to pay")
                picture, attempts = found.record.picture, found.record.attempts
                return self._result(job, None, run, "reused", None, picture, attempts)
            elif what is Verdict.RECOVER and kept:
                now = self.archive.read(job.fingerprint)
                if (now and now.etag) != (found and found.etag):
                    continue  # the run that has brought it has just claimed or archived it
                self.say(f"recovered: {job.name} was paid for and lies in the outbox; nothing to pay")
                path, entry = kept
                self.gate.picture(entry.paid.paid_at)
                attempts = found.record.attempts if found else entry.attempts
                return self._result(job, None, run, "recovered", path, entry.paid, attempts)
            elif what is Verdict.WAIT:
                if not told:
                    self.say(f"waiting: another run is paying for {job.name} at this moment")
                    told = True
                pauses = self._pause(job, pauses)
            else:
                forbidden = (
                    'on_unknown is "fail"' if self.on_unknown == "fail" else "this flow run sends no more for it"
                )
                allowed = 'on_unknown="repay"' if self.on_unknown == "fail" else "a new run"
                raise OutcomeUnknownError(
                    f"{_unsettled(job, found, unread)}; {forbidden} (look at the provider's usage page; {allowed} pays "
                    "once more)"
                )

    def _read(self, job: ValidatedJob, run: Run) -> RecordRead | None:
        """The record of the picture; what this run has to report of it so far is remembered."""
        found = self.archive.read(job.fingerprint)
        if found is None:
            return None
        held = held_claim(self.archive, job.fingerprint)
        if held is not None and held.run == run.id:  # which may know more than the archive could be told
            found = replace(found, record=held.record)
        remember(self.archive.url, job.fingerprint, run.id, self._sums(job, run, found.record.attempts))
        return found

    def _sums(self, job: ValidatedJob, run: Run, attempts: tuple[Attempt, ...]) -> Sums:
        earlier = any(run.follows(each.flow_runs) for each in attempts)
        inherits = earlier and inherit(self.archive.url, job.fingerprint, run)
        return sums(run, attempts, job.price_usd, inherits=inherits)

    def _in_outbox(self, job: ValidatedJob, *, unfinished: bool) -> tuple[Path, OutboxEntry] | None:
        return self.outbox.find(job.fingerprint, seed=job.seed, list_price_usd=job.price_usd, unfinished=unfinished)

    def _read_again(self, job: ValidatedJob, run: Run) -> tuple[Path, OutboxEntry] | None:
        """The picture in what could not be read when it came: by now a link may work, or another version is here."""

        def read(body: Path, found: Path) -> Picture:
            try:
                with self.open_client() as client:
                    return client.read(body, found)
            except ApiError as error:
                self.say(f"read again, {body} still gives no picture: {error}")
                raise

        return self.outbox.read_again(job.fingerprint, run.id, read, seed=job.seed, list_price_usd=job.price_usd)

    def _pause(self, job: ValidatedJob, pauses: int) -> int:
        """Waits before another look at what another run holds; other jobs of a batch go on meanwhile."""
        with self.gate.parked(job.name):
            self.gate.pause(min(WAIT_SECONDS * 1.5**pauses, LONGEST_WAIT_SECONDS))
        return pauses + 1

    def _pay(
        self,
        job: ValidatedJob,
        upload: Callable[[], UploadedImage],
        run: Run,
        found: RecordRead | None,
        unread: list[Path],
    ) -> GeneratedImage | None:
        """Sends one request; None where another run was faster to claim the picture.

        All that can fail on this machine is done before the claim: the upload, disk space, the signed address.
        """
        uploaded = upload()
        with (
            self.gate.admit(job.price_usd, job.name) as admission,
            self.outbox.receive(job.fingerprint, run.id) as part,
            self.open_client() as client,
        ):
            request = job.request(self.address(uploaded.uri))
            held = self._claim(job, found, run)
            if held is None:
                return None
            first = sum(each.run == run.id for each in held.record.attempts) == 1
            if first and (why := _unsettled(job, found, unread)):
                self.warn(f"{why}: paying again")
            held.hold(REQUEST_SECONDS)
            try:
                admission.sent()
                paid = client.generate(request, part)
                admission.paid(paid.cost_usd, paid.paid_at)
                entry = OutboxEntry(paid=paid, attempts=held.record.attempts)
                path = self.outbox.keep(job.fingerprint, part, entry)
            except SegmindError as error:
                reason, kept = str(error), None
                if error.answered is not None:
                    kept = self._keep_answer(error, part, error.answered)
                    admission.unusable(error)
                self._failed(job, run, held, error, reason, kept)
                raise
            except BaseException as error:
                known = SegmindError(f"ended by {type(error).__name__}", possibly_billed=True)
                self._failed(job, run, held, known, str(known))
                vars(error).update(vars(known))  # for whoever reports an interrupt
                raise
        kept_at = f"{path} on {socket.gethostname()}"
        self._note(
            held,
            lambda record: record.answered(
                status=200,
                reason=None,
                wait_seconds=None,
                possibly_billed=False,
                kept=kept_at,
                cost_usd=paid.cost_usd,
            ),
        )
        held.hold(ARCHIVE_SECONDS)
        for notice in paid.notices:
            self.say(notice)
        return self._result(job, uploaded, run, "generated", path, paid, held.record.attempts)

    def _ended(self, job: ValidatedJob, run: str, error: BaseException) -> None:
        """Notes on what ends a run before its next request what the earlier ones came to, and gives up its claim."""
        sums = forget(self.archive.url, job.fingerprint, run)
        vars(error).update(fingerprint=job.fingerprint, **sums._asdict())
        held = held_claim(self.archive, job.fingerprint)
        if held is not None and held.run == run:
            held.give_up()

    def _claim(self, job: ValidatedJob, found: RecordRead | None, run: Run) -> Claim | None:
        held = held_claim(self.archive, job.fingerprint)
        if held is None or held.run != run.id:
            return claim(self.archive, found, job.fingerprint, run)
        try:
            held.write(lambda record: record.claimed_by(this_process(run), datetime.now(UTC)))
        except PreconditionFailedError:
            held.release()
            return None
        return held

    def _keep_answer(self, error: SegmindError, part: Path, answered: Answered) -> Path | None:
        """Keeps the body of a 200 that is no picture, and names it on the error; None where there is nothing in it."""
        try:
            kept = self.outbox.keep_answer(part, answered)
        except OutboxError as broken:
            self.warn(str(broken))
            kept = part
        if kept is not None:
            error.args = (f"{error}; the answer is kept in {kept}, and read again first when the job is run again",)
        return kept

    def _failed(
        self, job: ValidatedJob, run: Run, held: Claim, error: SegmindError, reason: str, kept: Path | None = None
    ) -> None:
        """Decides what follows a failed request, and notes it in the record and on the error.

        Args:
            job: What was asked for.
            run: The run that asked.
            held: Its claim.
            error: The failure.
            reason: What went wrong, for the record.
            kept: Where the body of a 200 lies that is no picture.
        """
        mine = tuple(filter(run.owns, held.record.attempts))
        alike = mine[:-1]
        if self.policy.rate_limit_retries is not None:
            alike = tuple(each for each in alike if each.held_all == holds_all(error))
        policy = self.policy if self.on_unknown == "repay" else replace(self.policy, unknown_retries=0)
        # Of the failed one it is not noted yet. A flow run may be run again days later.
        counted_from = next(each.sent_at for each in mine if each.run == run.id and not each.held_all)
        decision = decide(
            error,
            attempts=len(alike) + 1,
            unknown=sum(1 for each in mine if each.possibly_billed) + error.possibly_billed,
            elapsed=(datetime.now(UTC) - counted_from).total_seconds(),
            jitter=random.random(),
            policy=policy,
        )

        def outcome(record: Record) -> Record:
            return record.answered(
                status=error.status,
                reason=f"{type(error).__name__}: {reason}",
                wait_seconds=decision.wait_seconds,
                possibly_billed=error.possibly_billed,
                held_all=holds_all(error),
                kept=f"{kept} on {socket.gethostname()}" if kept else None,
                cost_usd=None if error.possibly_billed or error.answered is None else error.answered.cost_usd,
            )

        error.decision = decision
        error.fingerprint = job.fingerprint
        so_far = self._sums(job, run, outcome(held.record).attempts)
        vars(error).update(so_far._asdict())
        self._note(held, outcome)
        if decision.wait_seconds is None:
            forget(self.archive.url, job.fingerprint, run.id)
            held.release()
        else:
            remember(self.archive.url, job.fingerprint, run.id, so_far)
            held.hold(decision.wait_seconds + LEASE_SECONDS)

    def _note(self, held: Claim, outcome: Callable[[Record], Record]) -> None:
        """Notes the outcome of a request in the record; where the archive fails, this run still knows it."""
        try:
            held.write(outcome)
        except StoreError as broken:
            held.record = outcome(held.record)
            self.warn(f"the outcome of this request could not be noted in the archive: {broken}")

    def _result(
        self,
        job: ValidatedJob,
        uploaded: UploadedImage | None,
        run: Run,
        status: Literal["generated", "recovered", "reused"],
        path: Path | None,
        picture: PaidPicture,
        attempts: tuple[Attempt, ...],
    ) -> GeneratedImage:
        known = Record(fingerprint=job.fingerprint, attempts=attempts).archived(picture, "-", "-").attempts
        brought = next((each for each in reversed(known) if each.status == 200 and each.reason is None), None)
        reported = self._sums(job, run, known)
        if brought and run.follows(brought.flow_runs) and inherit(self.archive.url, job.fingerprint, run):
            status = "generated"
        return GeneratedImage(
            job=job,
            source_uri=uploaded.uri if uploaded else job.job.image,
            archive=self.archive.url,
            run=run.id,
            status=status,
            path=path,
            picture=picture,
            attempts=attempts,
            **reported._asdict(),
        )


def _unsettled(job: ValidatedJob, found: RecordRead | None, unread: list[Path]) -> str | None:
    """What was paid for, or may have been, and has brought no picture that is at hand here, in words for people.

    Args:
        job: What the picture is of.
        found: Its record, if there is one.
        unread: Answers in this machine's outbox that cannot be read as a picture.
    """
    if unread:
        places = ", ".join(map(str, unread))
        return f"{job.name} was paid for, and what was answered cannot be read as a picture: {places}"
    attempts = found.record.attempts if found else ()
    if kept := next((each for each in reversed(attempts) if each.kept), None):
        what = "what was answered, no picture that could be read," if kept.reason else "its picture"
        return f"{job.name} was paid for, and {what} lies in {kept.kept}, out of reach (run the same job there)"
    if any(each.paid_for_nothing for each in attempts):
        return f"{job.name} was paid for, and there was nothing in the answer"
    if lost := next((each for each in reversed(attempts) if each.possibly_billed is not False), None):
        why = f" ({lost.reason})" if lost.reason else ""
        return f"an earlier request for {job.name} may have been billed, and no picture came of it{why}"
    return None
