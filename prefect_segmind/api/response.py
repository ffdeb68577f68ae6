"""Reading the API's answers: headers, error texts, and the forms in which a 200 may hold a picture.

The provider's page leaves the form of a 200 open (raw bytes, or JSON with a URL or base64), so every form that its
documentation and its SDK show is read. Pure: the bytes come from `client`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote

from pydantic import TypeAdapter

from prefect_segmind.errors import (
    ApiError,
    NotAnImageError,
    UnexpectedStatusError,
    UnsafeImageError,
    redact,
    status_error,
)
from prefect_segmind.money import is_plausible
from prefect_segmind.storage.compression import is_packed, unpacked
from prefect_segmind.text import printable

SPACE = b"\xef\xbb\xbf \t\r\n"
"""Bytes that may precede JSON: a byte order mark and white space."""
START_LIMIT = 64_000
"""The most bytes that are read of a body that should be a few lines: an error, a balance."""
UNPACKED_LIMIT = 70_000_000
"""The most bytes that the body of a 200 may unpack to."""
TEXT_LIMIT = 300
"""The most characters of a provider's error text that a message shows."""
BEFORE_THE_MODEL = frozenset({501, 505, 511, 521, 523, 525, 526, 530})
"""Statuses without a class of errors that rule a picture out: the request was not understood, or the edge could not
connect to the provider (521: refused; 523, 530: no address; 525, 526: no TLS)."""


def header(headers: Mapping[str, str], name: str) -> str | None:
    """A header's value, unwrapped from the JSON list that the provider sometimes sends.

    Args:
        headers: The headers of the answer, with names in any case.
        name: The name in lower case.

    Returns:
        The value; None if it is missing or empty.

    Example:
        >>> header({"x-cost": '["0.05"]'}, "x-cost")
        '0.05'
    """
    value = next((text.strip() for key, text in headers.items() if key.lower() == name), "")
    if value.startswith("["):
        try:
            values = json.loads(value[:_HEADER_LIMIT])
            value = str(values[-1]).strip() if values and values[-1] is not None else ""
        except (ValueError, RecursionError):
            pass  # as it is
    return value[:_HEADER_LIMIT] or None


_HEADER_LIMIT = 1000
"""The most characters of a header's value that are read."""


def request_id(headers: Mapping[str, str], secret: str = "") -> str | None:
    r"""The provider's id of a request, as it may be stored and shown: printable, of a sane length, without the key.

    Args:
        headers: The headers of the answer.
        secret: The API key.

    Example:
        >>> request_id({"x-request-id": "r-1\x1b[2J, for my-own-key"}, "my-own-key")
        'r-1[2J, for …'
    """
    value = printable(header(headers, "x-request-id") or "")
    return redact(value, secret)[:200] or None


def content_type(headers: Mapping[str, str], secret: str = "") -> str:
    """The content type that an answer claims, without parameters; empty if it has none of the usual form.

    Args:
        headers: The headers of the answer.
        secret: The API key.

    Example:
        >>> content_type({"Content-Type": "Image/PNG; q=1"}), content_type({"Content-Type": "a[link](https://b)"})
        ('image/png', '')
    """
    value = redact(header(headers, "content-type") or "", secret).split(";")[0].strip().lower()
    return value if re.fullmatch(r"[a-z]{1,20}/[a-z0-9.+-]{1,60}", value) else ""


def wait_asked(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds that a server asks to wait, by `x-rate-limit-reset-at-utc` and `Retry-After`, the longer of the two.

    Times are compared with the server's own `Date` where it sends one, so that a wrong clock here does no harm.

    Args:
        headers: The headers of the answer, with names in any case.
        now: The time here, aware; used if the answer has no `Date`.

    Returns:
        The seconds, at least 0.0; None if the answer names none.
    """
    clock = read_time(header(headers, "date") or "") or now
    waits: list[float] = []
    if reset := read_time(header(headers, "x-rate-limit-reset-at-utc") or ""):
        waits.append((reset - clock).total_seconds())
    after = header(headers, "retry-after") or ""
    if re.fullmatch(r"\d{1,9}(\.\d+)?", after):
        waits.append(float(after))
    elif until := read_time(after):
        waits.append((until - clock).total_seconds())
    return max(0.0, *waits) if waits else None


def read_time(text: str) -> datetime | None:
    """A time in ISO 8601, as an HTTP date, or in seconds or milliseconds since 1970; in UTC if it names no zone.

    Args:
        text: The time, of unknown origin.

    Returns:
        The time, aware; None if the text is none.

    Example:
        >>> read_time("2026-11-23 10:00:00+01").isoformat()
        '2026-11-23T10:00:00+01:00'
    """
    try:
        if re.match(r"\d{4}-|\d{10}", text):
            zoned = _ZONE.sub(lambda found: f"{found[1]}{found[2]}:{found[3] or '00'}", text.replace(" UTC", "Z"))
            time = TypeAdapter(datetime).validate_python(zoned)
        else:
            time = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


_ZONE = re.compile(r"(:\d\d(?:\.\d+)?) ?([+-]\d\d):?(\d\d)?\Z")
"""The offset behind a time of day; databases write `+00`, where pydantic reads `+00:00`."""


def error_text(body: bytes, secret: str = "") -> str:
    """The text of an error answer, from JSON (`error`, `detail`, `message`), HTML or plain text, redacted and cut.

    Args:
        body: The body of the answer, or its beginning.
        secret: The API key; removed before the text is cut, which could leave half of it.

    Example:
        >>> error_text(b'{"error": "Invalid API key"}'), error_text(b"<html><h1>502 Bad Gateway</h1></html>")
        ('Invalid API key', '502 Bad Gateway')
    """
    start = unpacked_start(body)
    if len(start) == START_LIMIT:
        start = start[: START_LIMIT - len(secret)]  # which may end with a part of the key
    text = start.decode("utf-8", "replace")
    try:
        parsed: Any = json.loads(text)
        while isinstance(parsed, dict) and (found := next(filter(_has_text, map(parsed.get, _ERROR_KEYS)), None)):
            parsed = found
        text = parsed if isinstance(parsed, str) else json.dumps(parsed, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = _without_tags(text)
    text = redact(printable(" ".join(text.split())), secret)
    return text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 1] + "…"


def unpacked_start(body: bytes) -> bytes:
    """The first `START_LIMIT` bytes of a body, unpacked if it is compressed.

    Args:
        body: The body, or its beginning.
    """
    start = body
    if is_packed(body):
        start = b""
        with suppress(ValueError):  # what comes before the damage, or before the end of the beginning
            for piece in unpacked([body]):
                start += piece
                if len(start) > START_LIMIT:
                    break
        start = start or body  # which only looks so
    return start[:START_LIMIT]


def _without_tags(html: str) -> str:
    """The text of HTML, without tags, scripts, styles and the title; in one pass, whatever it is."""
    shown, hidden, at = [], "", 0
    for tag in re.finditer(r"<(/?[a-zA-Z]+|[!?])[^<>]*>", html):
        name = tag[1].lower()
        if not hidden:
            shown.append(html[at : tag.start()])
            hidden = name if name in ("script", "style", "title") else ""
        elif name == f"/{hidden}":
            hidden = ""
        at = tag.end()
    return " ".join(shown if hidden else [*shown, html[at:]])


_ERROR_KEYS = ("error", "detail", "message")


def _has_text(found: object) -> bool:
    """Whether a value is or contains the text of an error: in `{"error": true, "message": "…"}` the second one is."""
    return bool(found) and isinstance(found, str | dict | list)


def answer_error(status: int, headers: Mapping[str, str], body: bytes, *, now: datetime, secret: str) -> ApiError:
    """The error for an answer with another status than 200.

    Args:
        status: The HTTP status.
        headers: The headers of the answer.
        body: The body of the answer, or its beginning.
        now: The time here, aware.
        secret: The API key, which is removed from the text.
    """
    text = error_text(body, secret)
    kind = status_error(status, text)
    message = f"the API answered {status}" + (f": {text}" if text else "")
    unnamed = kind is UnexpectedStatusError and not 300 <= status < 500 and status not in BEFORE_THE_MODEL
    return kind(
        f"{message} ({kind.advice})",
        status=status,
        retry_after=wait_asked(headers, now),
        possibly_billed=status in (502, 504) or unnamed,
        request_id=request_id(headers, secret),
    )


@dataclass(frozen=True)
class Link:
    """The address of the picture, which a 200 may hold instead of the picture.

    Attributes:
        url: The address.
    """

    url: str


def picture_or_link(body: bytes, secret: str = "") -> bytes | Link | None:
    """Finds the picture or the link in a 200 that is JSON, a URL or a data URI, or is compressed.

    Args:
        body: The whole body.
        secret: The API key, which is removed from messages.

    Returns:
        The picture's bytes for base64 or a compressed picture, a link for a URL, None for a body of any other form.

    Raises:
        UnsafeImageError: It has `is_image_safe: false` and no picture.
        NotAnImageError: It is JSON without a picture, or cannot be unpacked.
    """
    if is_packed(body):
        body = _unpacked(body)
        return body if (held := _held(body, secret)) is None else held
    return _held(body, secret)


def is_whole_json(body: bytes) -> bool:
    """Whether a body, compressed or not, is an object, a list or a string in JSON, to its end.

    Args:
        body: The body.

    Example:
        >>> is_whole_json(b'{"url": "https://b.example/k"}'), is_whole_json(b'{"url": "https://b'), is_whole_json(b"12")
        (True, False, False)
    """
    try:
        return isinstance(json_value(body), dict | list | str)
    except ValueError:
        return False


def json_value(body: bytes) -> Any:
    """The value of JSON, compressed or not, of a sane size.

    Args:
        body: The body.

    Raises:
        ValueError: It is none, is cut, or has too many values.

    Example:
        >>> json_value(b'{"status": "QUEUED"}')
        {'status': 'QUEUED'}
    """
    try:
        return _parsed(_unpacked(body) if is_packed(body) else body)
    except (NotAnImageError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _parsed(body: bytes) -> Any:
    """The value of JSON with a sane number of values, which take more memory than their text.

    Raises:
        ValueError: It is none, or has too many.
        RecursionError: It is too deep.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise ValueError("too many values")
    return json.loads(body)


def _unpacked(body: bytes) -> bytes:
    """The body unpacked, once.

    Raises:
        NotAnImageError: It is damaged, ends early, or unpacks to too much.
    """
    plain = bytearray()
    try:
        for piece in unpacked([body]):
            plain += piece
            if len(plain) > UNPACKED_LIMIT:
                raise ValueError(f"it has more than {UNPACKED_LIMIT:,} bytes")
    except ValueError as error:
        raise NotAnImageError(
            f"the API answered 200 with a body that cannot be decompressed: {error} (check the provider's usage page "
            "before running again)",
            status=200,
        ) from None
    return bytes(plain)


def _held(body: bytes, secret: str) -> bytes | Link | None:
    """What `picture_or_link` finds in a body that is not compressed."""
    start = body[:64].lstrip(SPACE)
    if re.match(rb"(?i)https?://|data:image/", start):
        text = body.decode("utf-8-sig", "replace").strip()
        return _decoded(text) if re.fullmatch(r"(?is)https?://\S+|data:image/.*", text) else None
    if start[:1] not in _JSON_STARTS:
        return None
    try:
        parts = list(_parts(_parsed(body)))
    except (ValueError, RecursionError):
        return None
    values = [each.strip() for each in parts if isinstance(each, str) and each.strip()]
    if not values and any(isinstance(each, dict) and each.get("is_image_safe") is False for each in parts):
        raise UnsafeImageError(
            "the API answered 200 without a picture: the picture is not safe (change the prompt or the image)",
            status=200,
        )
    if not values:
        raise NotAnImageError(
            f"the API answered 200 with JSON that holds no picture: {error_text(body, secret)}", status=200
        )
    if found := [each for each in map(_decoded, values) if each is not None]:
        # A word in the place of a picture ("result": "success") may be base64 too.
        return next((each for each in found if isinstance(each, Link) or len(each) >= _SMALLEST), found[0])
    raise NotAnImageError("the API answered 200 with JSON whose picture is neither a URL nor base64", status=200)


_JSON_STARTS = (b"{", b"[", b'"')
_MOST_VALUES = 100_000
"""The most values in JSON that are read."""
_SMALLEST = 32
"""The fewest bytes that may be a picture."""
_PICTURE_KEYS = (
    *("image", "output", "url", "image_url", "images", "data"),
    *("b64_json", "base64", "image_base64", "result", "outputs", "results", "image_urls", "urls"),
)
"""Keys under which JSON may have a picture, at any depth; under others it may repeat the source image."""


def _parts(parsed: object) -> Iterator[object]:
    """All values in JSON that may be a picture, or contain one."""
    yield parsed
    if isinstance(parsed, dict):
        parsed = [parsed.get(name) for name in _PICTURE_KEYS]
    for each in parsed if isinstance(parsed, list) else ():
        yield from _parts(each)


def _decoded(text: str) -> bytes | Link | None:
    """The link or the bytes of a text that is a URL, a data URI or base64; None for any other."""
    if re.match(r"(?i)https?://", text):
        return Link(text)
    if head := re.match(r"(?i)data:[^,]*,", text):
        text = unquote(text[head.end() :])
    coded = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(coded + "=" * (-len(coded) % 4), validate=True)
    except ValueError:
        return None


def read_cost(text: str | None) -> Decimal | None:
    """The cost in USD in an answer's `x-cost` header.

    Args:
        text: The header's value.

    Returns:
        The cost; None if it is missing, not a number, or out of range.

    Example:
        >>> read_cost("0.0500")
        Decimal('0.0500')
        >>> read_cost("NaN") is None
        True
    """
    try:
        cost = Decimal(text.strip()) if text else None
    except InvalidOperation:
        return None
    return cost if cost is not None and is_plausible(cost) and not cost.is_signed() and cost < 1000 else None
