"""Reading the answers of v2: what was accepted, how far it is, and what has come of it. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final, NamedTuple, TypeGuard

from prefect_segmind.api.response import answer_error, error_text, header, json_value, read_cost
from prefect_segmind.errors import (
    AnswerCutError,
    ForgottenError,
    SubmissionUnknownError,
    UnprocessableError,
    redact,
)

SUCCESS: Final = range(200, 300)
"""The HTTP statuses of an answer that brings what was asked for."""
_FAILED: Final = "FAILED"
_ABOUT_THE_ASKING: Final = (401, 403, 429)
"""The HTTP statuses of an answer that says nothing about the request asked for, whatever its body says."""


class Status(StrEnum):
    """How far a submitted request is."""

    QUEUED = "QUEUED"
    PROCESSING = "PROCESSING"
    COMPLETED = "COMPLETED"


class Submitted(NamedTuple):
    """A request that the provider has accepted.

    Attributes:
        request_id: The provider's id.
        status_url: Where its status is.
        response_url: Where its result is.
    """

    request_id: str
    status_url: str
    response_url: str


class Result(NamedTuple):
    """The facts of a result, beside its picture.

    Attributes:
        seed: The seed; None if it names none.
        cost_usd: The cost; None if it names no sensible one.
    """

    seed: int | None
    cost_usd: Decimal | None


def is_request_id(text: object) -> TypeGuard[str]:
    """Whether an id of unknown origin is of a form that can be part of an address, stored and shown.

    Args:
        text: The id.

    Example:
        >>> is_request_id("0f8e-4c.7:1"), is_request_id("../credits"), is_request_id("..")
        (True, False, False)
    """
    return isinstance(text, str) and bool(re.fullmatch(r"(?!\.{1,2}\Z)[A-Za-z0-9._:-]{1,200}", text))


def named_request(headers: Mapping[str, str], body: bytes, secret: str = "") -> str | None:
    """The id of the request that an answer names, in its body or else in a header.

    Args:
        headers: The headers of the answer.
        body: The body of the answer.
        secret: The API key, which no id contains.

    Returns:
        The id; None if there is none of a sane form.
    """
    named = (_object(body).get("request_id"), header(headers, "x-request-id"))
    return next((each for each in named if is_request_id(each) and redact(each, secret) == each), None)


def accepted(
    status: int, headers: Mapping[str, str], body: bytes, *, owns: Callable[[str], bool], secret: str = ""
) -> Submitted:
    """The request that the provider has accepted, by its answer.

    Args:
        status: The HTTP status, one of `SUCCESS`.
        headers: The headers of the answer.
        body: The body of the answer.
        owns: Whether an address may get the key.
        secret: The API key, which is removed from the text of an error.

    Raises:
        SubmissionUnknownError: The answer does not name the request, or where to ask for it.
    """
    parsed = _object(body)
    status_url, response_url = parsed.get("status_url"), parsed.get("response_url")
    named = named_request({}, body, secret)
    if named and isinstance(status_url, str) and isinstance(response_url, str):
        if owns(status_url) and owns(response_url):
            return Submitted(named, status_url, response_url)
        flaw = "names an address of another origin"
    else:
        flaw = "lacks its id or an address"
    raise SubmissionUnknownError(
        f"the API accepted the request, but its answer {flaw}: {error_text(body, secret)} (check SEGMIND_BASE_URL; the "
        "provider's usage page shows whether it was billed)",
        status=status,
        possibly_billed=True,
        request_id=named_request(headers, body, secret),
    )


def judged(
    status: int, headers: Mapping[str, str], body: bytes, submitted: Submitted, *, now: datetime, secret: str = ""
) -> Status | None:
    """What an answer says about a submitted request. Its body counts before its HTTP status.

    Args:
        status: The HTTP status.
        headers: The headers of the answer.
        body: The body of the answer, or its beginning.
        submitted: The request.
        now: The time here, aware.
        secret: The API key, which is removed from the text of an error.

    Returns:
        How far the request is; None if a successful answer does not say it.

    Raises:
        UnprocessableError: The request has failed, and is not billed.
        ForgottenError: The provider no longer has it.
        ApiError: The answer says nothing about the request, by the class of its status.
    """
    found = None if status in _ABOUT_THE_ASKING else _object(body).get("status")
    name = found.upper() if isinstance(found, str) else ""
    known = Status(name) if name in Status.__members__ else None
    told = status in SUCCESS or status == 422
    # A 422 alone may be an edge's word about the question, and a 503 that says "failed" a gateway's about itself.
    if name == _FAILED and told:
        raise UnprocessableError(
            f"the provider reports that the request failed: {error_text(body, secret)} ({UnprocessableError.advice})",
            status=422,
            request_id=submitted.request_id,
        )
    if told or known is Status.COMPLETED:
        return known
    if status == 404:
        raise ForgottenError(
            "the provider no longer has the request; only its request history does",
            status=404,
            request_id=submitted.request_id,
        )
    error = answer_error(status, headers, body, now=now, secret=secret)
    raise error.with_facts(request_id=submitted.request_id, possibly_billed=False)


def without_status(status: int, body: bytes, submitted: Submitted, secret: str = "") -> AnswerCutError:
    """The error for a successful answer about a submitted request that does not say how far it is.

    Args:
        status: The HTTP status.
        body: The body of the answer, or its beginning.
        submitted: The request.
        secret: The API key, which is removed from the text.
    """
    return AnswerCutError(
        f"the API answered {status} without the status or result of the request: {error_text(body, secret)}",
        status=status,
        request_id=submitted.request_id,
    )


def is_result(body: bytes) -> bool:
    """Whether a body is that of a result, by its fields; a result need not name its status.

    Args:
        body: The body of the answer.
    """
    return not _object(body).keys().isdisjoint(("output", "images", "metrics"))


def read_result(body: bytes) -> Result:
    """The facts of a result, as far as it names them.

    Args:
        body: The body of the answer.

    Example:
        >>> read_result(b'{"seed": 4711, "metrics": {"cost": 0.05}}')
        Result(seed=4711, cost_usd=Decimal('0.05'))
    """
    parsed = _object(body)
    seed, metrics = parsed.get("seed"), parsed.get("metrics")
    cost = metrics.get("cost") if isinstance(metrics, dict) else None
    named = re.fullmatch(r"[0-9]{1,18}", _number(seed) or "")
    return Result(int(named[0]) if named else None, read_cost(_number(cost)))


def _number(value: object) -> str | None:
    """A number, or a text that may be one, as a text."""
    return str(value) if isinstance(value, int | float | str) else None


def _object(body: bytes) -> dict[str, Any]:
    """The object in a body of JSON; an empty one for a body of any other form."""
    try:
        parsed = json_value(body)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
