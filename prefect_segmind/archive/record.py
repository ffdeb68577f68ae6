"""The record of a picture: whether it is paid for, who may pay for it, and what every request for it came to.

A record is one small JSON object in the archive, `.segmind/{fingerprint}.json`. It is created before the first request
and never deleted, so that it alone answers "is this picture paid for?".
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Literal, NamedTuple

from pydantic import BaseModel, model_validator

from prefect_segmind.api.picture import KEPT_MODEL, PaidPicture
from prefect_segmind.limits.ledger import NOTHING, PastRequest, RequestId, Totals
from prefect_segmind.limits.retry import UNKNOWN_RETRIES

OnUnknown = Literal["repay", "fail"]
"""What to do where an earlier request may have been paid but its picture was never seen."""

LEASE_SECONDS = 60.0
"""How long a claim holds since the record was last written, by the store's own clock."""

FlowRuns = tuple[tuple[str, int], ...]
"""A flow run and those that it is in, the outermost first, each with the number of its try: Prefect's `run_count`."""


class Attempt(BaseModel):
    """One request for the picture.

    Attributes:
        run: The run that sent it.
        sent_at: When it was about to be sent, UTC.
        status: HTTP status of the answer, if there was one.
        held_all: Whether it was refused for a time for which every request of the run was held back.
        reason: What went wrong, in a few words; None for the one that brought the picture.
        wait_seconds: Seconds waited before the next one; None if none followed.
        possibly_billed: Whether it may have been paid though no picture came of it; None while no outcome is known.
        reported_by: The run whose report counts it as possibly billed.
        kept: Where the picture that it brought lies until it is archived: host and path of an outbox. Where there is a
            reason, it is the body of a 200 that could not be read as a picture.
        flow_runs: The flow run that it was sent in.
        cost_usd: What a 200 has cost, read to its end; None where there was no such answer.
    """

    model_config = KEPT_MODEL

    run: str
    sent_at: datetime
    status: int | None = None
    held_all: bool = False
    reason: str | None = None
    wait_seconds: float | None = None
    possibly_billed: bool | None = None
    reported_by: str | None = None
    kept: str | None = None
    flow_runs: FlowRuns = ()
    cost_usd: Decimal | None = None

    @property
    def request(self) -> RequestId:
        """What identifies it in a ledger."""
        return RequestId(self.run, self.sent_at)

    @property
    def paid_for_nothing(self) -> bool:
        """Whether it was paid for, for certain, and brought no picture that could be read."""
        return bool(self.cost_usd and self.reason)


class Holder(BaseModel):
    """The run that may pay for the picture, and the process it lives in."""

    model_config = KEPT_MODEL

    run: str
    host: str
    pid: int
    started: str
    renewals: int = 0
    flow_runs: FlowRuns = ()


class Run(NamedTuple):
    """Who wants a picture: a task run, which holds claims, in a flow run, by which requests and money are counted.

    Whatever has a flow run run again, the requests of its earlier tries are its own.

    Attributes:
        id: The task run.
        flow_runs: The flow run that it is in.

    Example:
        >>> again = Run("task 2", (("flow", 2),))
        >>> again.follows((("flow", 1),)), again.follows((("flow", 2),)), again.follows((("another", 1),))
        (True, False, False)
    """

    id: str
    flow_runs: FlowRuns = ()

    def follows(self, flow_runs: FlowRuns) -> bool:
        """Whether it is in a later try of a flow run: of its own, or of one around it."""
        theirs = dict(flow_runs)
        return any(theirs.get(flow_run, number) < number for flow_run, number in self.flow_runs)

    def owns(self, attempt: Attempt) -> bool:
        """Whether a request counts as sent by it or its flow run, tries before this one included."""
        same = self.flow_runs and attempt.flow_runs and self.flow_runs[-1][0] == attempt.flow_runs[-1][0]
        return attempt.run == self.id or bool(same) or self.follows(attempt.flow_runs)


class Record(BaseModel):
    """What the archive remembers of one picture.

    Attributes:
        state: `claimed` by a run that pays or has tried to; `done` once the picture is archived.
        holder: Who may pay now; None once that run has given up.
        attempts: Every request ever sent for it, oldest first.
        picture: The facts of the picture, when done.
        image: Key of the picture in the archive, when done.
        sidecar: Key of its sidecar, when done.
    """

    model_config = KEPT_MODEL

    schema_version: Literal[1] = 1
    fingerprint: str
    state: Literal["claimed", "done"] = "claimed"
    holder: Holder | None = None
    attempts: tuple[Attempt, ...] = ()
    picture: PaidPicture | None = None
    image: str | None = None
    sidecar: str | None = None

    @model_validator(mode="after")
    def _done_names_its_picture(self) -> Record:
        if self.state == "done" and not (self.picture and self.image and self.sidecar):
            raise ValueError("a record that is done names its picture")
        return self

    def outcome_unknown(self, run: Run) -> bool:
        """Whether another run has paid, or may have, for a picture that is not at hand here."""
        return any(
            not run.owns(each) and (each.kept or each.paid_for_nothing or each.possibly_billed is not False)
            for each in self.attempts
        )

    def claimed_by(self, holder: Holder, now: datetime) -> Record:
        """The record as the holder writes it just before its next request.

        A request of a dead run that has no outcome is given one here: possibly billed, and reported by this run, which
        also reports what the dead one would have reported at its end.
        """
        dead = self.holder.run if self.holder and self.holder.run != holder.run else None
        lost = {"possibly_billed": True, "reason": "the run ended before it had the answer", "reported_by": holder.run}
        closed = tuple(
            each.model_copy(update=lost)
            if each.possibly_billed is None
            else each.model_copy(update={"reported_by": holder.run})
            if dead and each.reported_by == dead
            else each
            for each in self.attempts
        )
        attempt = Attempt(run=holder.run, sent_at=now, flow_runs=holder.flow_runs)
        return self.model_copy(update={"holder": holder, "attempts": (*closed, attempt)})

    def answered(
        self,
        status: int | None,
        reason: str | None,
        wait_seconds: float | None,
        *,
        possibly_billed: bool,
        held_all: bool = False,
        kept: str | None = None,
        cost_usd: Decimal | None = None,
    ) -> Record:
        """The record with the outcome of the last request; a run that is not going to wait lets go of its claim."""
        last = self.attempts[-1].model_copy(
            update={
                "status": status,
                "held_all": held_all,
                "reason": reason,
                "wait_seconds": wait_seconds,
                "possibly_billed": possibly_billed,
                "kept": kept,
                "cost_usd": cost_usd,
                "reported_by": self.attempts[-1].run if possibly_billed else None,
            }
        )
        answered = self.model_copy(update={"attempts": (*self.attempts[:-1], last)})
        return answered.given_up() if reason is not None and wait_seconds is None else answered

    def given_up(self) -> Record:
        """The record of a run that is over or waits no longer: it has reported its requests itself, or will."""
        return self.model_copy(update={"holder": None})

    def renewed(self) -> Record:
        """The record as its holder writes it again: a new version, so that nobody takes over by the one from before."""
        holder = self.holder and self.holder.model_copy(update={"renewals": self.holder.renewals + 1})
        return self.model_copy(update={"holder": holder})

    def archived(self, picture: PaidPicture, image: str, sidecar: str) -> Record:
        """The record once the picture is in the archive. A request without an outcome was the one that brought it."""
        brought = {"status": 200, "possibly_billed": False, "cost_usd": picture.cost_usd}
        attempts = tuple(
            each.model_copy(update=brought) if each.possibly_billed is None else each for each in self.attempts
        )
        return self.model_copy(
            update={
                "state": "done",
                "holder": None,
                "attempts": attempts,
                "picture": picture,
                "image": image,
                "sidecar": sidecar,
            }
        )


def past_requests(run: Run, attempts: tuple[Attempt, ...], price_usd: Decimal) -> Iterator[PastRequest]:
    """The requests for a picture that a run has to report.

    They are its own, those of earlier tries of its flow run, whose own reports are lost, and those of dead runs that it
    has taken over.

    Args:
        run: The run.
        attempts: All requests for the picture.
        price_usd: What one of unknown outcome may have cost.
    """
    flow_runs = {each.run: each.flow_runs for each in attempts}

    def is_ours(other: str) -> bool:
        return other == run.id or run.follows(flow_runs.get(other, ()))

    for each in attempts:
        sent = is_ours(each.run)
        # One of its own without an outcome is under way, and in its ledger.
        unknown = each.possibly_billed or (each.possibly_billed is None and each.run != run.id)
        unknown_usd = price_usd if unknown else NOTHING
        reports_unknown = unknown and is_ours(each.reported_by or each.run)
        if sent or reports_unknown:
            known = Totals(int(sent), (sent and each.cost_usd) or NOTHING)
            yield PastRequest(
                each.request,
                known._replace(possibly_billed_usd=unknown_usd if reports_unknown else NOTHING),
                charged=known._replace(possibly_billed_usd=unknown_usd) if sent else Totals(),
            )


def answers_of_earlier_tries(run: Run, record: Record) -> Iterator[tuple[datetime, bool]]:
    """When earlier tries of a run's flow run have asked for what was paid, and whether there was a picture in it.

    There was one in an answer that could not be read when it came and has been read since.
    """
    for each in record.attempts:
        if each.cost_usd and run.follows(each.flow_runs):
            yield each.sent_at, each.reason is None or (each.kept is not None and record.state == "done")


class Verdict(StrEnum):
    """What is to be done for a job."""

    REUSE = "reuse"
    RECOVER = "recover"
    WAIT = "wait"
    REFUSE = "refuse"
    PAY = "pay"


def verdict(
    record: Record | None,
    *,
    run: Run,
    in_outbox: bool,
    held_elsewhere: bool,
    on_unknown: OnUnknown,
    unreadable: bool = False,
) -> Verdict:
    """Decides whether a job is to be paid for. Pure: the caller has read the record and the outbox.

    Args:
        record: The job's record, None if there is none. A record that cannot be read is an error, never None.
        run: The run that asks.
        in_outbox: Whether the paid picture is on this machine's disk, and no run that lives on it is to archive it.
        held_elsewhere: Whether another run that lives holds the claim.
        on_unknown: The policy for a request that may have been paid, or was, though there is no picture of it.
        unreadable: Whether an answer is kept on this machine's disk that was paid for and cannot be read.

    Example:
        >>> verdict(None, run=Run("a"), in_outbox=False, held_elsewhere=False, on_unknown="repay").value
        'pay'
    """
    if record is not None and record.state == "done":
        return Verdict.REUSE
    if in_outbox:
        return Verdict.RECOVER
    if record is not None and held_elsewhere:
        return Verdict.WAIT
    if on_unknown == "fail" and (unreadable or (record is not None and record.outcome_unknown(run))):
        return Verdict.REFUSE
    if record is None:
        return Verdict.PAY
    # Of this very run it is decided after each request; here of the others that count as its flow run's.
    own = [each for each in record.attempts if each.run != run.id and run.owns(each)]
    unknown = sum(1 for each in own if each.kept or each.possibly_billed is not False)  # out of reach, or never seen
    spent = any(each.paid_for_nothing for each in own)  # another request would bring the same
    return Verdict.REFUSE if spent or unknown > (UNKNOWN_RETRIES if on_unknown == "repay" else 0) else Verdict.PAY
