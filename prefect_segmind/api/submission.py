"""Reading the answers of v2: what was submitted, how far it is, and what has come of it. Pure."""

from __future__ import annotations

import re
from decimal import Decimal
from enum import StrEnum
from typing import Any, NamedTuple, TypeGuard

from prefect_segmind.api.response import json_value, read_cost
from prefect_segmind.errors import redact

FAILED = "FAILED"
"""The status of a request that has failed and is not billed; it is raised as an error, and no `Status`."""


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


def read_request_id(body: bytes, secret: str = "") -> str | None:
    """The id in the answer to a submitted request.

    Args:
        body: The body of the answer.
        secret: The API key, which no id contains.

    Returns:
        The id; None if there is none of a sane form.
    """
    found = _object(body).get("request_id")
    return found if is_request_id(found) and redact(found, secret) == found else None


def read_submitted(body: bytes, secret: str = "") -> Submitted | None:
    """The request that the provider has accepted.

    Args:
        body: The body of the answer to it.
        secret: The API key, which its id does not contain.

    Returns:
        The request, whose addresses are to be checked before anything is sent there; None if a field is missing.
    """
    parsed = _object(body)
    addresses = [each for each in (parsed.get("status_url"), parsed.get("response_url")) if isinstance(each, str)]
    request_id = read_request_id(body, secret)
    return Submitted(request_id, *addresses) if request_id and len(addresses) == 2 else None


def read_status(body: bytes) -> str | None:
    """The status of a submitted request.

    Args:
        body: The body of the answer.

    Returns:
        The name of a `Status`, or `FAILED`; None for anything else.

    Example:
        >>> read_status(b'{"status": "PROCESSING"}'), read_status(b'{"status": "FAILED"}'), read_status(b"<html>")
        ('PROCESSING', 'FAILED', None)
    """
    found = _object(body).get("status")
    name = found.upper() if isinstance(found, str) else ""
    return name if name in (*Status.__members__, FAILED) else None


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
