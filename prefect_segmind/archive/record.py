"""The record of a picture: whether it is paid for, who may pay for it, and the outcome of every request for it.

A record is one small JSON object in the archive, `.segmind/{fingerprint}.json`. It is created before the first request
and never deleted, so that it alone answers "is this picture paid for?".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, Required, TypedDict, Unpack

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from prefect_segmind.api.picture import KEPT_MODEL, PaidPicture
from prefect_segmind.limits.ledger import NOTHING, PastRequest, RequestId, Totals
from prefect_segmind.limits.retry import UNKNOWN_RETRIES
from prefect_segmind.money import Usd

OnUnknown = Literal["repay", "fail"]
"""What to do where an earlier request may have been paid but its picture was never seen."""

OnKept = Literal["wait", "repay"]
"""What to do where a picture is paid for and lies in an outbox that this machine cannot read."""

LEASE_SECONDS = 60.0
"""How long a claim holds after the record was last written, by the store's own clock, unless its holder is known to be
alive or dead."""

RUN_ENDED = "the run ended before it had the answer"
"""The reason in an attempt whose run died: nobody knows what became of it."""

FlowRuns = tuple[tuple[str, int], ...]
"""A flow run and its parents, the outermost first, each with the number of its try: Prefect's `run_count`."""


class Asked(BaseModel):
    """What a request is for: with it, a picture can be archived though nobody asks for its job again.

    All is None for a request of an earlier version.

    Attributes:
        job: The validated job, as JSON values.
        source_uri: The location of the source image that was sent.
        archive: The archive that the picture is for.
        run: The run that pays.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    job: dict[str, Any] | None = None
    source_uri: str | None = None
    archive: str | None = None
    run: str | None = None

    @property
    def name(self) -> str | None:
        """The name of the job, where it is known."""
        job = self.job.get("job") if self.job else None
        return str(job["name"]) if isinstance(job, dict) and "name" in job else None


class Attempt(BaseModel):
    """One request for the picture.

    Attributes:
        run: The run that sent it.
        sent_at: When it was about to be sent, UTC.
        status: HTTP status of the answer, if there was one.
        held_all: Whether the refusal made every request of the run wait.
        reason: What went wrong, in a few words; None for the request that returned the picture.
        wait_seconds: Seconds waited before the next one; None if none followed.
        possibly_billed: Whether it may have been billed without returning a picture; None while the outcome is unknown.
        reported_by: The run whose report counts it as possibly billed.
        kept: Path and host of the picture in an outbox until it is archived; with a `reason`, of the body of a 200 that
            could not be read as a picture.
        flow_runs: The flow run that it was sent in.
        cost_usd: What it has cost, if that is known.
        image_file: The address of the source image that was sent, without the query, which may be a signature.
        request_id: The provider's id of it, where an answer or the provider's history has named one.
        asked_by: The run that has asked the provider for it last; it does not ask again.
        shares: The shares of shared budgets that it is paid from.
    """

    model_config = KEPT_MODEL

    run: str
    sent_at: AwareDatetime
    status: int | None = None
    held_all: bool = False
    reason: str | None = None
    wait_seconds: FiniteFloat | None = None
    possibly_billed: bool | None = None
    reported_by: str | None = None
    kept: str | None = None
    flow_runs: FlowRuns = ()
    cost_usd: Usd | None = None
    image_file: str | None = None
    request_id: str | None = None
    asked_by: str | None = None
    shares: tuple[str, ...] = ()

    @property
    def request(self) -> RequestId:
        """What identifies it in a ledger."""
        return RequestId(self.run, self.sent_at)

    @property
    def kept_picture(self) -> str | None:
        """Where the picture is that it was certainly paid for and has returned; None if there is none."""
        return None if self.reason else self.kept

    @property
    def paid_for_nothing(self) -> bool:
        """Whether it was certainly paid for and returned no readable picture."""
        return bool(self.cost_usd and self.reason)

    @property
    def in_doubt(self) -> bool:
        """Whether the provider may know more of it: it may have been billed, and nobody has seen its picture."""
        return not self.kept_picture and (
            self.possibly_billed is not False or self.kept is not None or self.paid_for_nothing
        )

    @property
    def is_submitted(self) -> bool:
        """Whether the provider has accepted it, and is to be asked for its result."""
        return self.request_id is not None and self.possibly_billed is None


class Outcome(TypedDict, total=False):
    """The outcome of a request: these fields of its `Attempt`."""

    status: int | None
    reason: str | None
    wait_seconds: float | None
    possibly_billed: Required[bool]
    held_all: bool
    kept: str | None
    cost_usd: Decimal | None
    request_id: str | None
    asked_by: str | None


class Holder(BaseModel):
    """The run that may pay for the picture, and its process.

    Attributes:
        run: The task run.
        host: The host, by `leases.host_id()`.
        pid: The process.
        started: When the process started, as the system counts it: ids of processes are reused. Empty if unknown.
        process: An id that the process drew when it started; empty in records of earlier versions.
        renewals: How often the claim has been renewed, so that each renewal is a new version of the record.
        flow_runs: The flow run that the task run is in.
    """

    model_config = KEPT_MODEL

    run: str
    host: str
    pid: Annotated[int, Field(gt=0, lt=2**32)]
    started: str
    process: str = ""
    renewals: int = 0
    flow_runs: FlowRuns = ()


class Run(NamedTuple):
    """Who asks for a picture: a task run, which holds claims, in a flow run, by which requests and money are counted.

    When a flow run is retried, the requests of its earlier tries count as its own.

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
        """Whether it is in a later try of the same flow run, or of one of its parents.

        Args:
            flow_runs: The flow run of another task run.
        """
        theirs = dict(flow_runs)
        return any(theirs.get(flow_run, number) < number for flow_run, number in self.flow_runs)

    def owns(self, attempt: Attempt) -> bool:
        """Whether a request counts as sent by it or its flow run, including earlier tries.

        Args:
            attempt: The request.
        """
        same = self.flow_runs and attempt.flow_runs and self.flow_runs[-1][0] == attempt.flow_runs[-1][0]
        return attempt.run == self.id or bool(same) or self.follows(attempt.flow_runs)


class Record(BaseModel):
    """What the archive remembers of one picture.

    Attributes:
        schema_version: The version of this format.
        fingerprint: The picture's.
        state: `claimed` by a run that pays or has tried to; `done` once the picture is archived.
        holder: Who may pay now; None once that run has given up.
        attempts: Every request ever sent for it, oldest first.
        asked: What the last request was for, until done; None in records of earlier versions.
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
    asked: Asked | None = None
    picture: PaidPicture | None = None
    image: str | None = None
    sidecar: str | None = None

    @model_validator(mode="after")
    def _done_names_its_picture(self) -> Record:
        if self.state == "done" and not (self.picture and self.image and self.sidecar):
            raise ValueError("a record that is done names its picture")
        return self

    @property
    def kept_picture(self) -> str | None:
        """Where the last picture is that was certainly paid for and is not archived; None if there is none."""
        if self.state == "done":
            return None
        return next((each.kept_picture for each in reversed(self.attempts) if each.kept_picture), None)

    @property
    def runs_in_doubt(self) -> frozenset[str]:
        """The runs that may have been billed for a picture that nobody has seen."""
        return frozenset(each.run for each in self.attempts if each.in_doubt)

    def may_be_archived_by_another(self, run: Run) -> bool:
        """Whether another run may have archived the picture and died before it could write that into the record.

        Args:
            run: The run that asks; when it has sent the last request, it has looked before.
        """
        if self.state == "done" or not self.attempts or self.attempts[-1].run == run.id:
            return False
        return any(
            each.kept_picture or each.possibly_billed is None or each.reason == RUN_ENDED for each in self.attempts
        )

    def outcome_unknown(self, run: Run) -> bool:
        """Whether another run has paid, or may have paid, for a picture that nobody has seen.

        Args:
            run: The run that asks.
        """
        return any(not run.owns(each) and each.in_doubt for each in self.attempts)

    def claimed_by(
        self,
        holder: Holder,
        now: datetime,
        asked: Asked | None = None,
        image_file: str | None = None,
        shares: tuple[str, ...] = (),
    ) -> Record:
        """The record as the holder writes it just before its next request.

        Args:
            holder: Who is about to pay.
            now: The time of the request, UTC.
            asked: What the request is for.
            image_file: The address of the source image that is sent, without its query.
            shares: The shares of shared budgets that the request is paid from.
        """
        attempt = Attempt(run=holder.run, sent_at=now, flow_runs=holder.flow_runs, image_file=image_file, shares=shares)
        record = self.taken_over_by(holder)
        return record.model_copy(update={"attempts": (*record.attempts, attempt), "asked": asked or self.asked})

    def taken_over_by(self, holder: Holder) -> Record:
        """The record as a run writes it that is about to ask the provider for earlier requests, or to pay.

        A request of a dead run without an outcome becomes possibly billed, unless the provider is known to have it.
        This run reports it, and all that the dead run would have reported at its end.

        Args:
            holder: That run.
        """
        dead = self.holder.run if self.holder and self.holder.run != holder.run else None
        reported = {"reported_by": holder.run}
        lost = reported | {"possibly_billed": True, "reason": RUN_ENDED}

        def taken_over(attempt: Attempt) -> Attempt:
            if attempt.possibly_billed is None and attempt.request_id is None:
                return attempt.model_copy(update=lost)
            ends_with_it = dead and (attempt.reported_by == dead or attempt.is_submitted)
            return attempt.model_copy(update=reported) if ends_with_it else attempt

        return self.model_copy(update={"holder": holder, "attempts": tuple(map(taken_over, self.attempts))})

    def submitted(self, request_id: str) -> Record:
        """The record once the provider has accepted the last request, whose result is still to come.

        Args:
            request_id: The provider's id of it.
        """
        *earlier, last = self.attempts
        return self.model_copy(update={"attempts": (*earlier, last.model_copy(update={"request_id": request_id}))})

    def settled(self, request: RequestId, **outcome: Unpack[Outcome]) -> Record:
        """The record with what the provider says of an earlier request.

        Args:
            request: Which one.
            outcome: The fields of the `Attempt`; those left out stay as they are.
        """
        known = dict(outcome) if outcome["possibly_billed"] else {**outcome, "reported_by": None}
        return self.model_copy(
            update={
                "attempts": tuple(
                    each.model_copy(update=known) if each.request == request else each for each in self.attempts
                )
            }
        )

    def with_outcome(self, **outcome: Unpack[Outcome]) -> Record:
        """The record with the outcome of the last request; a run that is not going to wait gives up its claim.

        Args:
            outcome: The fields of the `Attempt`; those left out keep their defaults.
        """
        *earlier, last = self.attempts
        reported_by = last.run if outcome["possibly_billed"] else None
        last = last.model_copy(update={**outcome, "reported_by": reported_by})
        record = self.model_copy(update={"attempts": (*earlier, last)})
        return record.given_up() if last.reason is not None and last.wait_seconds is None else record

    def given_up(self) -> Record:
        """The record without its holder, which reports its own requests."""
        return self.model_copy(update={"holder": None})

    def renewed(self) -> Record:
        """The record as its holder renews it: a new version, so that nobody can take over by the previous one."""
        holder = self.holder and self.holder.model_copy(update={"renewals": self.holder.renewals + 1})
        return self.model_copy(update={"holder": holder})

    def archived(self, picture: PaidPicture, image: str, sidecar: str, *, paid_by: str | None = None) -> Record:
        """The record once the picture is in the archive. The request without an outcome is the one that returned it.

        One of a run that ended before it could tell the outcome is not in doubt any more either. Where another request
        is known to have returned it, one without an outcome stays so: its run may still wait for the answer.

        Args:
            picture: The facts of the picture.
            image: Its key.
            sidecar: The key of its sidecar.
            paid_by: The run whose request has returned it, where that is known.
        """
        returned = {"status": 200, "possibly_billed": False, "cost_usd": picture.cost_usd}
        senders = [each for each in self.attempts if paid_by in (None, each.run)]
        open_ones = [each for each in senders if each.possibly_billed is None]
        if paid_by and any(map(_returned, senders)):
            open_ones = []
        elif paid_by and not open_ones:
            doubted = [each for each in senders if each.possibly_billed]
            # A 502 is in doubt too; it has brought the picture only if that came from the provider's history.
            late = [] if any(each.cost_usd for each in senders) else doubted
            open_ones = ([each for each in doubted if each.status in (None, 200)] or late)[-1:]
            returned |= {"reason": None, "reported_by": None, "kept": None}
        attempts = tuple(each.model_copy(update=returned) if each in open_ones else each for each in self.attempts)
        done = {"state": "done", "holder": None, "attempts": attempts, "asked": None}
        return self.model_copy(update=done | {"picture": picture, "image": image, "sidecar": sidecar})

    def with_known_outcomes(self, attempts: tuple[Attempt, ...]) -> Record:
        """The record with the outcomes that their run knows of requests that have none here.

        Args:
            attempts: The requests as that run knows them.
        """
        known = {each.request: each for each in attempts}
        told = (known.get(each.request, each) if each.possibly_billed is None else each for each in self.attempts)
        return self.model_copy(update={"attempts": tuple(told)})


def _returned(attempt: Attempt) -> bool:
    """Whether a request is known to have returned the picture."""
    return attempt.status == 200 and attempt.reason is None


def _unknown(attempt: Attempt) -> bool:
    """Whether a request may have been billed without returning a picture that somebody could read."""
    return not attempt.kept_picture and (attempt.kept is not None or attempt.possibly_billed is not False)


def past_requests(run: Run, attempts: tuple[Attempt, ...], price_usd: Decimal) -> Iterator[PastRequest]:
    """The requests for a picture that a run has to report.

    They are its own, those of earlier tries of its flow run, whose reports are lost, and those of dead runs that it has
    taken over.

    Args:
        run: The run.
        attempts: All requests for the picture.
        price_usd: What a request of unknown outcome may have cost.
    """
    flow_runs = {each.run: each.flow_runs for each in attempts}

    def is_ours(other: str) -> bool:
        return other == run.id or run.follows(flow_runs.get(other, ()))

    for each in attempts:
        sent = is_ours(each.run)
        # A request of its own without an outcome is still in flight, and in its ledger.
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
    """The paid requests of earlier tries of a run's flow run.

    Args:
        run: The run.
        record: The record of the picture.

    Yields:
        When the request was sent, and whether its answer held a picture, if only by a later reading.
    """
    for each in record.attempts:
        if each.cost_usd and run.follows(each.flow_runs):
            yield each.sent_at, each.reason is None or (each.kept is not None and record.state == "done")


class Verdict(StrEnum):
    """What to do for a job."""

    REUSE = "reuse"
    RECOVER = "recover"
    WAIT = "wait"
    REFUSE = "refuse"
    KEPT = "kept elsewhere"
    ASK = "ask"
    PAY = "pay"


def verdict(
    record: Record | None,
    *,
    run: Run,
    in_outbox: bool,
    held_elsewhere: bool,
    on_unknown: OnUnknown,
    on_kept: OnKept = "wait",
    unreadable: bool = False,
    can_ask: Callable[[Attempt], bool] = lambda _: False,
) -> Verdict:
    """Decide whether to pay for a job. Pure: the caller has read the record and the outbox.

    Args:
        record: The job's record, None if there is none. A record that cannot be read is an error, never None.
        run: The run that asks.
        in_outbox: Whether the paid picture is in this machine's outbox, and no live run here is about to archive it.
        held_elsewhere: Whether another live run holds the claim.
        on_unknown: The policy for requests that were or may have been paid without returning a picture.
        on_kept: The policy for a picture that is paid for and lies in an outbox out of reach.
        unreadable: Whether the outbox has a paid answer that cannot be read as a picture.
        can_ask: Whether the provider can be asked what became of a request, and has not been asked by this run yet.

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
    if record is not None and record.kept_picture and on_kept == "wait":
        return Verdict.KEPT
    if record is not None and any(each.in_doubt and can_ask(each) for each in record.attempts):
        return Verdict.ASK
    if on_unknown == "fail" and (unreadable or (record is not None and record.outcome_unknown(run))):
        return Verdict.REFUSE
    if record is None:
        return Verdict.PAY
    # After each request of its own a run decides by itself; here count the other requests of its flow run.
    own = [each for each in record.attempts if each.run != run.id and run.owns(each)]
    kept = sum(1 for each in own if each.kept_picture)  # on another disk
    unknown = sum(1 for each in own if _unknown(each))  # never seen
    spent = any(each.paid_for_nothing for each in own)  # another request would return the same
    too_many = kept + unknown > UNKNOWN_RETRIES or (unknown > 0 and on_unknown == "fail")
    return Verdict.REFUSE if spent or too_many else Verdict.PAY
