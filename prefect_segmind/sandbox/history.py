"""The request history: the requests of an account, newest first, in pages."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prefect_segmind.sandbox.answers import Refusal
from prefect_segmind.sandbox.generation import MODEL, Generation
from prefect_segmind.sandbox.script import Answer, Script

PATH = "/inference-request/request-history"

LONGEST_DAYS = 31

_KEPT = 10_000  # requests


class Query(BaseModel):
    """The parameters of a listing; others are refused.

    Attributes:
        page: The page, from 1.
        per_page: Rows on a page.
        from_date: The first day, in UTC; by default seven days before the last.
        to_date: The last day, in UTC; by default today.
        model_name: A part of the model's name.
        status: The only status; None for all.
        sort_by: The column to sort by.
        sort_order: The order.
    """

    model_config = ConfigDict(extra="forbid")

    page: int = Field(default=1, ge=1)
    per_page: int = Field(default=20, ge=1, le=100)
    from_date: date | None = None
    to_date: date | None = None
    model_name: str = ""
    status: Literal["COMPLETED", "FAILED", "PENDING"] | None = None
    sort_by: Literal["model_created", "model_name", "credits_deduction"] = "model_created"
    sort_order: Literal["asc", "desc"] = "desc"

    @field_validator("from_date", "to_date", mode="before")
    @classmethod
    def _is_written_as_a_day(cls, value: str) -> str:
        if not re.fullmatch(r"[12]\d{3}-\d\d-\d\d", value, re.ASCII):
            raise ValueError("must be written as YYYY-MM-DD")
        return value

    @model_validator(mode="after")
    def _window_is_not_too_long(self) -> Query:
        first, last = self.days
        if not 0 <= (last - first).days < LONGEST_DAYS:
            raise ValueError(f"from_date to to_date must be 1 to {LONGEST_DAYS} days")
        return self

    @property
    def days(self) -> tuple[date, date]:
        """The first and the last day."""
        last = self.to_date or datetime.now(UTC).date()
        return self.from_date or last - timedelta(days=7), last


class History:
    """The last requests, and how the request history answers. Only the event loop uses the requests.

    Attributes:
        script: The queue of scripted answers to the next requests of the history, be it for a page or for one row. An
            answer with a picture is the usual one, with its `delay` and headers; `half_body` sends half of it.
        off: Whether every request of the history is answered with 404.
    """

    def __init__(self) -> None:
        self.script = Script()
        self.off = False
        self._requests: OrderedDict[str, Generation] = OrderedDict()

    def play(self, *answers: Answer) -> None:
        """Queues answers, one for each of the next requests of the history."""
        self.script.play(*answers)

    def add(self, generation: Generation) -> None:
        """Adds a request; the oldest one gives way to it when there are too many."""
        self._requests[generation.request_id] = generation
        while len(self._requests) > _KEPT:
            self._requests.popitem(last=False)

    def __len__(self) -> int:
        """The number of requests, also of those that it does not list."""
        return len(self._requests)

    def find(self, request_id: str) -> Generation | None:
        """A request by its id, also one that the history does not list; None if there is none."""
        return self._requests.get(request_id)

    def clear(self) -> None:
        """Removes all requests and scripted answers, and answers again."""
        self._requests.clear()
        self.script.clear()
        self.off = False

    def page(self, parameters: Mapping[str, str], origin: str) -> dict[str, Any]:
        """A page of rows, for JSON.

        Args:
            parameters: The query of the request.
            origin: The sandbox's address with a slash at the end.

        Raises:
            Refusal: A parameter is invalid, with 400.
        """
        try:
            query = Query.model_validate(parameters)
        except ValidationError as error:
            flaws = [f"{'.'.join(map(str, each['loc'])) or 'query'}: {each['msg']}" for each in error.errors()]
            raise Refusal(400, "; ".join(flaws)) from None
        found = list(self._matching(query))
        if query.sort_by == "credits_deduction":
            found.sort(key=lambda each: each.cost, reverse=query.sort_order == "desc")
        elif query.sort_order == "asc":
            found.reverse()
        start = (query.page - 1) * query.per_page
        return {
            "data": [each.row(origin) for each in found[start : start + query.per_page]],
            "page": query.page,
            "per_page": query.per_page,
            "total": len(found),
            "total_pages": -(-len(found) // query.per_page),
        }

    def row(self, request_id: str, origin: str) -> dict[str, Any]:
        """The row of one request, for JSON.

        Args:
            request_id: Its id.
            origin: As for `page`.

        Raises:
            Refusal: The history does not list it, with 404.
        """
        generation = self._requests.get(request_id)
        if generation is None or generation.lands_at > time.monotonic():
            raise Refusal(404, f"Request {request_id!r} not found")
        return generation.row(origin)

    def _matching(self, query: Query) -> Iterator[Generation]:
        if query.model_name not in MODEL:
            return
        first, last = (datetime.combine(day, datetime.min.time(), UTC) for day in query.days)
        end, now, status = last + timedelta(days=1), time.monotonic(), query.status
        for each in reversed(self._requests.values()):
            if each.created < first:
                break
            if each.created < end and each.lands_at <= now and (status is None or status == each.model_status):
                yield each
