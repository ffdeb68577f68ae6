"""The provider's request history: its rows, and which of them became of a request whose answer was lost. Pure.

The provider's documentation names the fields of a row and leaves the form of the list around them open, so every usual
form is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from prefect_segmind.api.origin import on_loopback
from prefect_segmind.api.response import TEXT_LIMIT, json_value, read_cost, read_time
from prefect_segmind.errors import redact
from prefect_segmind.text import printable, stripped

HISTORY_SETTING: Final = "PREFECT_INTEGRATIONS_SEGMIND_HISTORY_URL"
"""The setting that names the address of the history."""
SKEW: Final = timedelta(seconds=60)
"""How far the clocks of this machine and of the provider may be apart."""
_PROVIDER: Final = "api.segmind.com"
_PROVIDERS_HISTORY: Final = "https://api.spotprod.segmind.com/inference-request/request-history"
_PATH: Final = "/inference-request/request-history"
_LISTS: Final = ("data", "results", "requests", "history", "items")
"""The keys under which a page may have its list."""
_ID_LIMIT: Final = 200


class Outcome(StrEnum):
    """What became of a request."""

    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    PENDING = "PENDING"


_OUTCOMES: Final = {
    **dict.fromkeys(("COMPLETED", "SUCCESS", "SUCCEEDED"), Outcome.COMPLETED),
    **dict.fromkeys(("FAILED", "ERROR", "CANCELLED", "CANCELED"), Outcome.FAILED),
}
_RANKS: Final = (Outcome.COMPLETED, Outcome.PENDING, Outcome.FAILED)


class Row(BaseModel):
    """A request in the history.

    Attributes:
        request_id: The provider's id.
        outcome: What became of it; `PENDING` for a status that is not known.
        created_at: When the provider took it, UTC; None if the row names no time.
        cost_usd: What it was billed; None if the row names no sensible amount.
        body: Its body as it was sent; empty if the row has none.
        url: The link to its picture.
        error: Why it failed, for people.
    """

    model_config = ConfigDict(frozen=True)

    request_id: str
    outcome: Outcome
    created_at: datetime | None = None
    cost_usd: Decimal | None = None
    body: Mapping[str, Any]
    url: str | None = None
    error: str | None = None


class Page(NamedTuple):
    """A page of the history.

    Attributes:
        rows: Its rows that can be read, each request once.
        listed: The number of all its rows.
    """

    rows: tuple[Row, ...]
    listed: int


class Sought(NamedTuple):
    """A request whose outcome is not known.

    Attributes:
        body: Its body as it was sent; empty if it is to be found by its id alone.
        sent_at: When it was sent, aware.
        request_id: The provider's id, where an answer named one.
    """

    body: Mapping[str, Any]
    sent_at: datetime
    request_id: str | None = None


def history_url(base_url: str, setting: str | None) -> str | None:
    """The address of the history.

    Args:
        base_url: The address of the API.
        setting: The address, or `off`; None for the one that belongs to the API.

    Returns:
        The address, which is checked where it is used; None if there is none, or it is switched off.

    Example:
        >>> history_url("http://127.0.0.1:8787/v2", None)
        'http://127.0.0.1:8787/inference-request/request-history'
        >>> history_url("https://gateway.example/v1", None) is None
        True
    """
    if setting := stripped(setting or ""):
        return None if setting.lower() == "off" else setting
    base = urlsplit(base_url.strip())
    if base.hostname == _PROVIDER:
        return _PROVIDERS_HISTORY
    return f"{base.scheme}://{base.netloc}{_PATH}" if on_loopback(base_url.strip()) else None


def parse_page(data: bytes) -> tuple[Row, ...]:
    """The rows of a page, each request once; those that cannot be read are left out.

    Args:
        data: The body of the answer: a list, bare or under one of its usual names.

    Raises:
        ValueError: There is no list.
    """
    return read_page(data).rows


def read_page(data: bytes) -> Page:
    """The rows of a page, as `parse_page`, and how many there were.

    Args:
        data: The body of the answer.

    Raises:
        ValueError: There is no list, or no entry of it can be read.
    """
    listed = _list(json_value(data))
    rows = tuple(_one_each(row for row in map(_row, listed) if row is not None))
    if listed and not rows:
        raise ValueError(f"none of its {len(listed)} rows names its request")
    return Page(rows, len(listed))


def parse_row(data: bytes) -> Row:
    """The row of one request, bare or under one of the usual names.

    Args:
        data: The body of the answer.

    Raises:
        ValueError: There is none.
    """
    parsed = json_value(data)
    named = [parsed[name] for name in _LISTS if name in parsed] if isinstance(parsed, dict) else []
    for each in (parsed, *named):
        rows = [each] if isinstance(each, dict) else each if isinstance(each, list) else []
        for row in _one_each(row for row in map(_row, rows) if row is not None):
            return row
    raise ValueError("no row of a request")


def address(image_file: str) -> str:
    """The address of an image without its query and its fragment: a signature differs from request to request.

    Args:
        image_file: The address.

    Example:
        >>> address("https://bucket.s3.amazonaws.com/mug.jpg?X-Amz-Signature=ab")
        'https://bucket.s3.amazonaws.com/mug.jpg'
    """
    return re.split(r"[?#]", image_file, maxsplit=1)[0]


def same_request(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether the body of a request in the history is ours.

    Args:
        theirs: The body in the history; its numbers may be texts, and it may name fields of ours that we left out, as
            empty ones.
        ours: The body as it was sent.

    Example:
        >>> same_request({"prompt": "a mug", "seed": "123", "negative_prompt": ""}, {"prompt": "a mug", "seed": 123})
        True
    """
    return all(name in theirs and _same(name, theirs[name], ours[name]) for name in ours) and all(
        name in ours or _is_empty(value) for name, value in theirs.items()
    )


def matched(sought: Sequence[Sought], rows: Iterable[Row], taken: Collection[str] = ()) -> dict[int, Row]:
    """Which rows of the history became of the requests sought.

    A row is one's own by the request's id where an answer named it; else by the same body, if it is not older than the
    request, the nearest in time first. One row settles one request.

    Args:
        sought: The requests.
        rows: Rows of the history, in any order.
        taken: The ids of rows that have settled others before.

    Returns:
        The row of each request that has one, by its index.
    """
    free = {row.request_id: row for row in _one_each(rows) if row.request_id not in taken}
    found: dict[int, Row] = {}
    for index, each in enumerate(sought):
        if each.request_id is not None and each.request_id in free:
            found[index] = free.pop(each.request_id)
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in free.values():
        alike.setdefault(_key(row.body), []).append(row)
    pairs = [
        (_distance(each, row), _RANKS.index(row.outcome), index, row.request_id)
        for index, each in enumerate(sought)
        if index not in found and each.body
        for row in alike.get(_key(each.body), ())
        if _may_be(each, row)
    ]
    for _, _, index, request_id in sorted(pairs):
        if index not in found and request_id in free:
            found[index] = free.pop(request_id)
    return found


def _list(parsed: object) -> list[Any]:
    """The list in a page.

    Raises:
        ValueError: There is none.
    """
    if isinstance(parsed, list):
        return parsed
    below = [parsed[name] for name in _LISTS if name in parsed] if isinstance(parsed, dict) else []
    nested = [each[name] for each in below if isinstance(each, dict) for name in _LISTS if name in each]
    for each in (*below, *nested):
        if isinstance(each, list):
            return each
    raise ValueError("no list of requests")


def _row(parsed: object) -> Row | None:
    """The row in an entry of the list; None if it cannot be read."""
    if not isinstance(parsed, dict):
        return None
    found = parsed.get("request_id")
    request_id = printable(str(found).strip()) if isinstance(found, str | int) and not isinstance(found, bool) else ""
    if not 0 < len(request_id) <= _ID_LIMIT:
        return None
    return Row(
        request_id=request_id,
        outcome=_OUTCOMES.get(
            (_text(parsed.get("model_status") or parsed.get("status")) or "").upper(), Outcome.PENDING
        ),
        created_at=_created(parsed),
        cost_usd=read_cost(_text(parsed.get("credits_deduction"))),
        body=_body(parsed.get("request_body")),
        url=_url(parsed.get("generation_url")),
        error=_reason(parsed.get("error")),
    )


def _created(parsed: Mapping[str, Any]) -> datetime | None:
    for name in ("model_created", "created_at", "created"):
        if time := read_time(_text(parsed.get(name)) or ""):
            try:
                return time.astimezone(UTC)
            except OverflowError:
                return None
    return None


def _text(value: object) -> str | None:
    """A number, or a text that may be one, as a text."""
    return str(value).strip() if isinstance(value, int | float | str) else None


def _body(found: object) -> Mapping[str, Any]:
    """The body of a request, which may be the text of an object."""
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            return {}
    return found if isinstance(found, dict) else {}


def _url(found: object) -> str | None:
    """The link in a row, or the first of several."""
    first = found[0] if isinstance(found, list) and found else found
    text = first.strip() if isinstance(first, str) else ""
    return text if re.fullmatch(r"(?i)https?://\S+", text) and text.isprintable() else None


def _reason(found: object) -> str | None:
    """The error in a row, a text or an object with one, as it may be stored and shown."""
    if isinstance(found, dict):
        found = next((found[name] for name in ("error", "detail", "message") if name in found), None)
    text = found[:10_000] if isinstance(found, str) else ""
    return redact(printable(" ".join(text.split())))[:TEXT_LIMIT] or None


def _one_each(rows: Iterable[Row]) -> Iterable[Row]:
    """Each request once: one with several outputs has a row for each of them."""
    found: dict[str, Row] = {}
    for row in rows:
        known = found.setdefault(row.request_id, row)
        if known.url is None and row.url is not None:
            found[row.request_id] = row
    return found.values()


def _same(name: str, theirs: object, ours: object) -> bool:
    if name == "image_file" and isinstance(theirs, str) and isinstance(ours, str):
        return address(theirs) == address(ours)
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return theirs is ours
    if isinstance(ours, int | float) and isinstance(theirs, str):
        return theirs == str(ours)
    return theirs == ours


def _is_empty(value: object) -> bool:
    return value is None or value in ("", [], {})


def _key(body: Mapping[str, Any]) -> tuple[str, str]:
    """What is equal in the bodies of the same request, and mostly differs in others."""
    image, seed = body.get("image_file"), body.get("seed")
    if isinstance(seed, float) and seed.is_integer():
        seed = int(seed)
    return address(image) if isinstance(image, str) else "", str(seed) if isinstance(seed, int | float | str) else ""


def _may_be(sought: Sought, row: Row) -> bool:
    old = row.created_at is not None and row.created_at < sought.sent_at - SKEW
    return not old and same_request(row.body, sought.body)


def _distance(sought: Sought, row: Row) -> timedelta:
    return timedelta.max if row.created_at is None else abs(row.created_at - sought.sent_at)
