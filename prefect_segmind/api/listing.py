"""The provider's request history over HTTP: one listing for all threads of a run, asked politely."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Final

from prefect_segmind.api.endpoint import Endpoint
from prefect_segmind.api.history import (
    HISTORY_SETTING,
    SKEW,
    Page,
    Row,
    Sought,
    matched,
    parse_row,
    read_page,
)
from prefect_segmind.api.request import ENDPOINT
from prefect_segmind.api.submission import is_request_id
from prefect_segmind.errors import (
    AnswerCutError,
    ApiError,
    ApiUnreachableError,
    HistoryError,
    InvalidKeyError,
    OverloadedError,
    RateLimitError,
    SegmindError,
)

READ_SECONDS: Final = 30.0
"""The most seconds to wait for the next bytes of the history."""
TOTAL_SECONDS: Final = 120.0
"""The most seconds for a page of it."""
PER_PAGE: Final = 100
"""The most rows that the provider puts on a page."""
MOST_PAGES: Final = 500
"""The most pages of one listing."""
REUSED_SECONDS: Final = 2.0
"""How long a listing answers further questions."""
FAILED_SECONDS: Final = 3.0
"""How long a failure answers further questions, so that not every thread waits for a history that is out of reach."""
_NO_SUCH_REQUEST: Final = (400, 404, 422)
"""The HTTP statuses about a request that the provider does not know: its id may be that of an edge before the provider,
and of another form than the provider's own."""
_CHECKED: Final = 10
_PAGE_LIMIT: Final = 30_000_000
"""The most bytes of a page."""
_LONGEST_WAIT: Final = 30.0
_MOST_WAITS: Final = 3
"""How often, and how long at most, an answer that the history is busy is waited for."""
_FAILURE_WAITS = (1.0, 3.0)
"""Seconds before what failed for a moment is asked again."""
_AT_ONCE: Final = 10.0
"""A failure that took longer to come than this many seconds is not asked for again."""


@dataclass
class _Listing:
    """The history between two days, newest first, as far as it has been read.

    Attributes:
        days: The first day and the last.
        rows: The rows, by the id of the request.
        pages: The number of pages read.
        back_to: The time of the oldest row; None before there is one, and where the rows do not come in that order.
        ended: Whether there are no more.
        read_at: When the last page was read, by the clock of `RequestHistory`.
        begun_at: When the first page was asked for, UTC: a request that was sent later cannot be on it.
    """

    days: tuple[date, date]
    rows: dict[str, Row] = field(default_factory=dict)
    pages: int = 0
    back_to: datetime | None = None
    ended: bool = False
    read_at: float = 0.0
    begun_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def reaches(self, time: datetime) -> bool:
        """Whether every row that is not older than a time has been read."""
        return self.ended or (self.back_to is not None and self.back_to < time)

    def add(self, page: Page) -> None:
        """Adds the next page. One that brings nothing new is the last, whatever the provider says."""
        self.pages += 1
        known = len(self.rows)
        self.rows |= {row.request_id: row for row in page.rows if row.request_id not in self.rows}
        self.ended = page.listed < PER_PAGE or len(self.rows) == known
        times = [row.created_at for row in page.rows if row.created_at is not None]
        self.back_to = times[-1] if times and all(one >= next_ for one, next_ in pairwise(times)) else None


class RequestHistory:
    """The provider's request history. The threads of a run share it: one asks at a time, and the others use its answer.

    Args:
        open_endpoint: Opens the endpoint of the history.
        model: The name of the model, by which rows are filtered.
        log: Logs that the history asks to wait.
        clock: Seconds that only grow.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        open_endpoint: Callable[[], Endpoint],
        *,
        model: str = ENDPOINT,
        log: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._open_endpoint = open_endpoint
        self._model = model
        self._log = log
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._listings: dict[tuple[date, date], _Listing] = {}
        self._failure: HistoryError | None = None
        self._failed_at = 0.0

    def find(self, sought: Sequence[Sought], taken: Collection[str] = ()) -> dict[int, Row]:
        """Looks up what became of requests. A request without a row may have one a moment later.

        Args:
            sought: The requests; without any nothing is asked.
            taken: The ids of rows that have settled other requests.

        Returns:
            The row of each request that has one, by its index.

        Raises:
            HistoryError: The history cannot be read; its cause is the error of the exchange. For the next 3 s it is
                raised again at once.
        """
        rows = self.rows(sought)
        found = matched(sought, rows, taken)
        if not found and any(each.body for each in sought):
            check_bodies(rows)
        return found

    def rows(self, sought: Sequence[Sought]) -> list[Row]:
        """Reads the rows among which those of some requests are, for those who match them in a way of their own.

        Args:
            sought: The requests; without any nothing is asked.

        Returns:
            The rows, and some more.

        Raises:
            HistoryError: As for `find`.
        """
        if not sought:
            return []
        with self._lock:
            if self._failure is not None and self._clock() - self._failed_at < FAILED_SECONDS:
                raise self._failure.with_facts() from self._failure.__cause__
            try:
                rows = self._rows(sought)
            except HistoryError as error:
                self._failure, self._failed_at = error, self._clock()
                raise
            self._failure = None
        return rows

    def check(self) -> int:
        """Reads the newest rows, whatever has failed before.

        Returns:
            The number of rows read, at most 10.

        Raises:
            HistoryError: The history cannot be read, or requests cannot be told by its rows.
        """
        with self._lock:
            rows = self._page(page=1, per_page=_CHECKED, model_name=self._model).rows
        check_bodies(rows)
        return len(rows)

    def _rows(self, sought: Sequence[Sought]) -> list[Row]:
        """The rows among which those of the requests are."""
        found: list[Row] = []
        windows: dict[tuple[date, date], datetime] = {}
        last_sent_at = max(each.sent_at for each in sought)
        for each in sought:
            row = self._row(each.request_id) if is_request_id(each.request_id) else None
            if row is not None:
                found.append(row)
                continue
            sent_at = each.sent_at.astimezone(UTC)
            back_to = sent_at - SKEW
            days = (back_to.date(), sent_at.date() + timedelta(days=1))
            windows[days] = min(back_to, windows.get(days, back_to))
        for days, back_to in windows.items():
            found += self._listed(days, back_to, last_sent_at)
        return found

    def _row(self, request_id: str | None) -> Row | None:
        """The row of one request, of any age; None if there is none, which the listing may have all the same."""
        try:
            body = self._get(f"{request_id}")
            row = None if body is None else parse_row(body)
        except ValueError:
            return None
        return row if row is not None and row.request_id == request_id else None

    def _listed(self, days: tuple[date, date], back_to: datetime, last_sent_at: datetime) -> list[Row]:
        """The rows between two days that are not older than a time, and some more, read after a request was sent."""
        now = self._clock()
        self._listings = {known: each for known, each in self._listings.items() if now - each.read_at <= REUSED_SECONDS}
        listing = self._listings.get(days)
        if listing is None or listing.begun_at < last_sent_at:
            listing = _Listing(days)
        while not listing.reaches(back_to):
            if listing.pages >= MOST_PAGES:
                raise _failure(f"it has more than {MOST_PAGES} pages for {days[0]}")
            first, last = days
            page = self._page(
                page=listing.pages + 1,
                per_page=PER_PAGE,
                from_date=first.isoformat(),
                to_date=last.isoformat(),
                model_name=self._model,
                sort_by="model_created",
                sort_order="desc",
            )
            listing.add(page)
            listing.read_at = self._clock()
        self._listings[days] = listing
        return list(listing.rows.values())

    def _page(self, **params: str | int) -> Page:
        try:
            return read_page(self._get(params=params) or b"")
        except ValueError as error:
            raise _failure(f"its answer has another form ({error})") from None

    def _get(self, request_id: str = "", params: Mapping[str, str | int] | None = None) -> bytes | None:
        """The body of an answer; None if there is no such request.

        Raises:
            HistoryError: It cannot be read.
            ValueError: It is too large.
        """
        waits, failure_waits = [_LONGEST_WAIT] * _MOST_WAITS, list(_FAILURE_WAITS)
        while True:
            asked_at = self._clock()
            try:
                return self._asked(request_id, params)
            except (RateLimitError, OverloadedError) as error:
                if not waits:
                    raise _failure(str(error), error) from error
                wait = min(waits.pop(), error.retry_after or 1.0)
                self._log.info("the request history asks to wait %.1f s", wait)
            except ApiError as error:
                passing = isinstance(error, (ApiUnreachableError, AnswerCutError)) or (error.status or 0) >= 500
                if not passing or not failure_waits or self._clock() - asked_at > _AT_ONCE:
                    raise _failure(str(error), error) from error
                wait = failure_waits.pop(0)
            except SegmindError as error:
                raise _failure(str(error), error) from error
            self._sleep(wait)

    def _asked(self, request_id: str, params: Mapping[str, str | int] | None) -> bytes | None:
        with (
            self._open_endpoint() as endpoint,
            endpoint.translated(billable=False),
            endpoint.exchange("GET", request_id, params=params) as answer,
        ):
            if request_id and answer.status_code in _NO_SUCH_REQUEST:
                return None
            endpoint.raise_unless_ok(answer)
            body = bytearray()
            for chunk in answer.iter_raw():
                body += chunk
                if len(body) > _PAGE_LIMIT:
                    raise ValueError(f"more than {_PAGE_LIMIT:,} bytes")
            return bytes(body).replace(endpoint.secret.encode(), b"SG_...")  # should the history echo it


def check_bodies(rows: Sequence[Row]) -> None:
    """Checks that requests can be told by rows: otherwise that one is not found proves nothing.

    Args:
        rows: Rows of the history.

    Raises:
        HistoryError: No row has the body of its request.
    """
    if rows and not any(each.body for each in rows):
        raise _failure(f"none of its {len(rows)} rows has the request_body by which a request is known")


def _failure(why: str, error: SegmindError | None = None) -> HistoryError:
    """The error for a history that cannot be read.

    Args:
        why: The reason.
        error: The error of the exchange, whose advice is left out where it is about another address.
    """
    if isinstance(error, ApiError) and not isinstance(error, InvalidKeyError):
        why = why.removesuffix(f" ({error.advice})")
    told = HISTORY_SETTING in why or isinstance(error, InvalidKeyError)
    advice = "" if told else f" (check {HISTORY_SETTING}, or set it to off)"
    status, retry_after = (error.status, error.retry_after) if error else (None, None)
    return HistoryError(
        f"the provider's request history cannot be read: {why}{advice}", status=status, retry_after=retry_after
    )
