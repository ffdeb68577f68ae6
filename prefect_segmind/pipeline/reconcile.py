"""Reconciling: asks the provider what became of requests whose outcome is unknown here. It pays nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.history import Outcome as Ended
from prefect_segmind.api.history import Row, Sought, matched
from prefect_segmind.api.listing import RequestHistory, check_bodies
from prefect_segmind.api.picture import Answered, PaidPicture
from prefect_segmind.api.submission import is_request_id
from prefect_segmind.archive.record import RUN_ENDED, Attempt, Outcome, Record, Run
from prefect_segmind.errors import (
    AccountError,
    ApiError,
    ForgottenError,
    HistoryError,
    NotAnImageError,
    ResultLinkError,
    SegmindError,
    SubmittedError,
    UnprocessableError,
    UnsafeImageError,
)
from prefect_segmind.limits.ledger import RequestId
from prefect_segmind.money import usd
from prefect_segmind.pipeline.poll import Poller
from prefect_segmind.pipeline.validate import ValidatedJob

LOOK_AGAIN_SECONDS = (5.0, 15.0)
"""When the history is looked at again for a request that it does not list, in seconds after the first look: a row may
land late."""
PENDING_SECONDS = 2.0
"""Seconds between two looks at a request that is still under way."""
STALE = timedelta(hours=1)
"""The age at which a request that the history has as pending is not waited for any more: the provider keeps none that
long."""
OF_THE_MODEL = (400, 422, 500, 502, 504)
"""Statuses of requests that may have failed at the model (a 400 where it could not get the image); others are refused
before that, and are not listed."""
ASKED_FOR_NOTHING = "billed as well, says the provider's history; the picture of another request was taken"


class Replies(NamedTuple):
    """What the provider says of some requests.

    Attributes:
        outcomes: The outcomes that are known now.
        picture: The picture, in the file that was given for it; None if there is none.
        brought_by: The request that has brought it.
    """

    outcomes: Mapping[RequestId, Outcome]
    picture: PaidPicture | None = None
    brought_by: Attempt | None = None

    def entered(self, record: Record, attempts: Sequence[Attempt], run: Run, kept: str | None = None) -> Record:
        """A record with what the provider says, and that this run has asked for the others in vain.

        Args:
            record: The record.
            attempts: The requests that it was asked about.
            run: The run that has asked.
            kept: Where the picture is, as in `Attempt.kept`; None if there is none.
        """
        for each in attempts:
            vain = Outcome(possibly_billed=each.possibly_billed is not False, reason=each.reason or RUN_ENDED)
            outcome = self.outcomes.get(each.request, vain).copy()
            # One that is paid for and brings no picture stays in doubt: a later run may ask again, and this one not.
            outcome["asked_by"] = run.id
            if self.brought_by is not None and each.request == self.brought_by.request:
                outcome["kept"] = kept
            record = record.settled(each.request, **outcome)
        return record


def could_tell(error: BaseException) -> bool:
    """Whether the provider may know more of a failed request than its answer says.

    Args:
        error: What the request has ended with.

    Example:
        >>> could_tell(ApiError("…", status=502, possibly_billed=True)), could_tell(ApiError("…", status=429))
        (True, False)
    """
    if not isinstance(error, ApiError) or isinstance(error, UnsafeImageError):
        return False
    return error.possibly_billed or error.answered is not None


def can_ask(attempt: Attempt, run: Run, *, lists: bool, polls: bool) -> bool:
    """Whether the provider can be asked about a request, and was not by this run already.

    Args:
        attempt: The request.
        run: The run.
        lists: Whether the provider's history can be read.
        polls: Whether the API serves the results of submitted requests.
    """
    known = attempt.request_id is not None
    return attempt.asked_by != run.id and ((lists and (known or attempt.image_file is not None)) or (polls and known))


@dataclass(frozen=True)
class Reconciler:
    """Asks the provider about requests of unknown outcome: for their results, and its request history. Threads may
    share it.

    Attributes:
        poller: Waits for the results of submitted requests; what is under way at the provider is waited for as long.
        history: The provider's request history; None where it is not to be asked.
        polls: Whether the API serves results of submitted requests.
    """

    poller: Poller
    history: RequestHistory | None = None
    polls: bool = False
    _warned: list[str] = field(default_factory=list)

    def can_ask(self, attempt: Attempt, run: Run) -> bool:
        """Whether the provider can be asked about a request, and was not by this run already.

        Args:
            attempt: The request.
            run: The run.
        """
        return can_ask(attempt, run, lists=self.history is not None, polls=self.polls)

    def ask(
        self,
        client: SegmindClient,
        job: ValidatedJob,
        attempts: Sequence[Attempt],
        part: Path,
        log: logging.Logger,
        others: Sequence[Attempt] = (),
        keep: Callable[[Answered], str | None] = lambda _: None,
    ) -> Replies:
        """Asks about requests for one picture, waits for those that are still under way, and downloads the picture.

        Args:
            client: The client.
            job: The job of the picture.
            attempts: The requests of unknown outcome.
            part: The file to write the picture to; its content is replaced once the picture is whole.
            log: Logs what becomes known, and that the history cannot be read.
            others: The other requests for the picture, which have rows of their own.
            keep: Keeps a result in `part` that cannot be read as a picture, and returns where, as in `Attempt.kept`.

        Returns:
            What the provider says. A request of which it says nothing is not among the outcomes.

        Raises:
            AccountError: The provider refuses the account, and the request may be finished.
            ResultLinkError: A picture was made and billed, and cannot be downloaded now; nothing must be paid again.
            SubmittedError: A request is accepted and not finished, and the run waits no longer.
        """
        outcomes: dict[RequestId, Outcome] = {}
        unfinished: dict[RequestId, SegmindError] = {}
        for each in attempts if self.polls else ():
            if not each.is_submitted or each.request_id is None or not is_request_id(each.request_id):
                continue
            submitted = client.submitted(each.request_id)
            try:
                picture = self.poller.result(client, submitted, job.seed, part, log, resumed=True)
            except ForgottenError:
                continue  # the history may know it
            except (AccountError, SubmittedError) as error:
                unfinished[each.request] = error  # another may have brought the picture; or the id is none of a submit
            except UnprocessableError as error:
                outcomes[each.request] = _not_billed(each, str(error))
            except NotAnImageError as error:
                if error.answered is None or (isinstance(error, ResultLinkError) and not error.gone):
                    raise
                outcomes[each.request] = _paid_for_nothing(error, each.request_id, keep(error.answered))
            else:
                log.info("the provider has finished request %s of %s: fetched", each.request_id, job.name)
                return _brought(outcomes, each, picture)
        replies = Replies(outcomes)
        left = [each for each in attempts if each.request not in outcomes]
        if left and self.history is not None and not (unfinished and self.poller.gate.is_ending):
            patience = 0.0 if unfinished else self.poller.patience_seconds
            replies = self._ask_history(self.history, client, job, left, others, part, log, outcomes, patience)
        for request, why in unfinished.items():
            if replies.picture is None and request not in replies.outcomes:
                raise why
        return replies

    def _ask_history(
        self,
        history: RequestHistory,
        client: SegmindClient,
        job: ValidatedJob,
        attempts: Sequence[Attempt],
        others: Sequence[Attempt],
        part: Path,
        log: logging.Logger,
        outcomes: dict[RequestId, Outcome],
        patience: float,
    ) -> Replies:
        body = job.request("-").body()
        listed = [each for each in others if _may_be_listed(each)]
        listing = _Listing(history, _sought(body, attempts), listed, _sought(body, listed))
        completed: list[tuple[Attempt, Row]] = []
        for index, row in sorted(self._rows(listing, log, patience).items()):
            each = attempts[index]
            if row.outcome is Ended.FAILED:
                log.info("the provider's history says that a request of %s failed, unbilled", job.name)
                outcomes[each.request] = _not_billed(each, row.error or "no reason given", row.request_id)
            elif row.outcome is Ended.COMPLETED:
                completed.append((each, row))
        return self._download(client, job, completed, part, log, outcomes)

    def look_up(
        self,
        body: Mapping[str, Any],
        attempts: Sequence[Attempt],
        list_price_usd: Decimal,
        taken: Collection[str] = (),
    ) -> dict[RequestId, Outcome]:
        """Looks up requests whose pictures are not needed: nothing is downloaded, and none is waited for.

        Args:
            body: The body that they were sent with, but for the address of the image.
            attempts: The requests.
            list_price_usd: The cost of a request whose row names none.
            taken: The provider's ids of other requests for the picture.

        Returns:
            The outcomes of those that the history lists as ended.

        Raises:
            HistoryError: The history cannot be read.
        """
        if self.history is None:
            return {}
        outcomes: dict[RequestId, Outcome] = {}
        for index, row in self.history.find(_sought(body, attempts), taken).items():
            each = attempts[index]
            if row.outcome is Ended.FAILED:
                outcomes[each.request] = _not_billed(each, row.error or "no reason given", row.request_id)
            elif row.outcome is Ended.COMPLETED:
                outcomes[each.request] = _outcome(_answered(row, list_price_usd), ASKED_FOR_NOTHING)
        return outcomes

    def _rows(self, listing: _Listing, log: logging.Logger, patience: float) -> dict[int, Row]:
        """The rows of requests that have ended, by their place among those that are sought.

        Raises:
            SubmittedError: One is still under way, none has brought the picture, and the run waits no longer.
        """
        began, looks = monotonic(), [*LOOK_AGAIN_SECONDS]
        pending: list[Row] = []
        while True:
            found, failure = listing.look()
            now, elapsed = datetime.now(UTC), monotonic() - began
            if failure is None:
                pending = [row for row in found.values() if row.outcome is Ended.PENDING and not _is_stale(row, now)]
                if any(row.outcome is Ended.COMPLETED and row.url for row in found.values()):
                    return found
            elif not pending and not (looks and _may_pass(failure)):
                self._warn(str(failure), log)
                return {}
            if pending:
                wait = PENDING_SECONDS
                if elapsed + wait > patience:
                    raise _under_way(pending[0], f"it is still pending after {elapsed:.0f} s")
            elif looks and (failure or listing.may_bring_more(found, now)):
                wait = max(0.0, looks.pop(0) - elapsed)
            else:
                return found
            if not self.poller.gate.rest(wait):
                if pending:
                    raise _under_way(pending[0], "the run was ended")
                return found

    def _download(
        self,
        client: SegmindClient,
        job: ValidatedJob,
        told: Sequence[tuple[Attempt, Row]],
        part: Path,
        log: logging.Logger,
        outcomes: dict[RequestId, Outcome],
    ) -> Replies:
        """Downloads the picture of the first completed request that still has one; the others are paid for as well."""
        brought: Replies | None = None
        for each, row in told:
            answered = _answered(row, job.price_usd)
            if brought is not None:
                outcomes[each.request] = _outcome(answered, ASKED_FOR_NOTHING)
            elif row.url is None:
                outcomes[each.request] = _outcome(answered, "billed, says the provider's history, without a picture")
            else:
                try:
                    picture = client.download(row.url, part, answered, job.seed)
                except ResultLinkError as error:
                    if not error.gone:
                        raise
                    outcomes[each.request] = _paid_for_nothing(error, row.request_id)
                else:
                    cost = usd(answered.cost_usd)
                    log.info("the provider's history has the picture of %s (%s USD): downloaded", job.name, cost)
                    brought = _brought(outcomes, each, picture)
        return brought or Replies(outcomes)

    def _warn(self, message: str, log: logging.Logger) -> None:
        """Logs once in a run that the history cannot be read: it concerns all its pictures."""
        if not self._warned:
            self._warned.append(message)
            log.warning("%s; requests of unknown outcome count as possibly billed", message)


class _Listing(NamedTuple):
    """What is looked for in the history.

    Attributes:
        history: The history.
        sought: The requests of unknown outcome.
        others: The other requests for the picture that may have a row.
        sought_by_others: The same, as they are looked for.
    """

    history: RequestHistory
    sought: Sequence[Sought]
    others: Sequence[Attempt]
    sought_by_others: Sequence[Sought]

    def look(self) -> tuple[dict[int, Row], HistoryError | None]:
        """The rows of the requests sought, by their place; or why the history cannot be read.

        A row may also be that of another request for the same picture: one that says FAILED proves nothing for the
        next where it may be that of an earlier one, and a row nearer to one that was paid for is that one's. Such a one
        may have no row, where a proxy has answered it, so it has no claim on the row of another.
        """
        everyone = [*self.sought, *self.sought_by_others]
        try:
            rows = self.history.rows(everyone)
            failed = matched(self.sought_by_others, rows).values()
            theirs = {row.request_id for row in failed if row.outcome is Ended.FAILED}
            nearest = matched(everyone, rows)
            for index, other in enumerate(self.others, len(self.sought)):
                if other.cost_usd is not None and index in nearest:
                    theirs.add(nearest[index].request_id)
            found = matched(self.sought, rows, theirs)
            if not found:
                check_bodies(rows)
            return found, None
        except HistoryError as failure:
            return {}, failure

    def may_bring_more(self, found: Mapping[int, Row], now: datetime) -> bool:
        """Whether a row, or the link in one, may still be to come."""
        young = any(now - each.sent_at < STALE for each in self.sought)
        return young and any(
            index not in found or (found[index].outcome is Ended.COMPLETED and found[index].url is None)
            for index in range(len(self.sought))
        )


def _sought(body: Mapping[str, Any], attempts: Sequence[Attempt]) -> list[Sought]:
    """Requests as they are looked for in the history.

    Args:
        body: What they were sent with, but for the address of the image.
        attempts: The requests; one whose address is not known is looked for by its id alone.
    """
    bodies = ({**body, "image_file": each.image_file} if each.image_file else {} for each in attempts)
    return [Sought(sent, each.sent_at, each.request_id) for sent, each in zip(bodies, attempts, strict=True)]


def _answered(row: Row, list_price_usd: Decimal) -> Answered:
    return Answered(
        cost_usd=list_price_usd if row.cost_usd is None else row.cost_usd,
        cost_source="list price" if row.cost_usd is None else "history",
        request_id=row.request_id,
        at=datetime.now(UTC),
    )


def _outcome(answered: Answered, reason: str) -> Outcome:
    """The outcome of a request that is paid for and brings no picture."""
    return Outcome(
        status=200,
        reason=reason,
        possibly_billed=False,
        cost_usd=answered.cost_usd,
        request_id=answered.request_id,
    )


def _paid_for_nothing(error: ApiError, request_id: str, kept: str | None = None) -> Outcome:
    assert error.answered is not None
    answered = error.answered.model_copy(update={"request_id": request_id})
    return _outcome(answered, f"{type(error).__name__}: {error}") | Outcome(possibly_billed=False, kept=kept)


def _brought(outcomes: dict[RequestId, Outcome], attempt: Attempt, picture: PaidPicture) -> Replies:
    """What the provider says, once a request has brought the picture."""
    outcomes[attempt.request] = Outcome(
        status=200,
        reason=None,
        wait_seconds=None,
        possibly_billed=False,
        cost_usd=picture.cost_usd,
        request_id=picture.request_id,
        kept=None,
    )
    return Replies(outcomes, picture, attempt)


def _not_billed(attempt: Attempt, why: str, request_id: str | None = None) -> Outcome:
    """The outcome of a request that has failed at the provider, which bills nothing for it."""
    return Outcome(
        reason=f"{attempt.reason or 'the answer was lost'}; not billed, says the provider: {why}",
        possibly_billed=False,
        cost_usd=None,
        kept=None,
        request_id=request_id or attempt.request_id,
    )


def _is_stale(row: Row, now: datetime) -> bool:
    return row.created_at is not None and now - row.created_at > STALE


def _may_be_listed(attempt: Attempt) -> bool:
    """Whether a request that is not in doubt has reached the model, so that the history may have a row of it."""
    return attempt.cost_usd is not None or attempt.possibly_billed is not False or attempt.status in OF_THE_MODEL


def _may_pass(failure: HistoryError) -> bool:
    """Whether the history may be read a moment later: it is there, and the key is not refused."""
    return failure.status not in (401, 403, 404)


def _under_way(row: Row, why: str) -> SubmittedError:
    return SubmittedError(
        f"request {row.request_id} is under way at the provider: {why}; run the same job again, or prefect-segmind "
        "reconcile, to fetch its picture without another payment",
        possibly_billed=True,
        request_id=row.request_id,
    )
