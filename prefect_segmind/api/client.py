"""The HTTP client of the image-to-image API. It sends one request at a time and knows nothing of retries."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, Field, ValidationError

from prefect_segmind.api.picture import Answered, PaidPicture
from prefect_segmind.api.request import ENDPOINT, ImageToImageRequest
from prefect_segmind.api.response import (
    START_LIMIT,
    TEXT_LIMIT,
    Link,
    answer_error,
    content_type,
    error_text,
    header,
    is_whole_json,
    picture_or_link,
    read_cost,
    request_id,
    unpacked_start,
)
from prefect_segmind.errors import (
    AnswerCutError,
    ApiError,
    ApiUnreachableError,
    ConfigurationError,
    NotAnImageError,
    OutboxError,
    ResultLinkError,
    redact,
)
from prefect_segmind.images.container import is_truncated
from prefect_segmind.images.inspection import BrokenPicture, Picture, picture_of, read_picture
from prefect_segmind.money import LIST_PRICE_USD, Usd
from prefect_segmind.storage.disk_errors import reason
from prefect_segmind.storage.http import Destination, DownloadError, download
from prefect_segmind.storage.http_environment import proxy_for, ssl_context
from prefect_segmind.storage.http_exchange import NOT_SENT, Times, exchange, parsed_url, transport
from prefect_segmind.storage.reserved_file import replacing

DEFAULT_BASE_URL = "https://api.segmind.com/v1"
ANSWER_LIMIT = 50_000_000
"""The most bytes of a picture; a JSON answer may be a third longer for its base64."""
EXCHANGE_SECONDS = 600.0
"""The most seconds of one exchange, from the connection to the last byte; a generation takes about 10."""
_LINK_WAITS = (0.5, 2.0, 5.0, 10.0, 20.0, 30.0)
"""Seconds between the attempts to download a linked picture, which is paid for and nowhere else."""


class _Balance(BaseModel):
    credits: Usd
    free: Usd | None = Field(None, alias="free-credits")


class SegmindClient:
    """An HTTP client of the API. Use one per thread, and close it or use it as a context manager.

    Args:
        api_key: The key; it is sent to the API's own address only, and no message contains it.
        base_url: The address of the API, https unless it is on loopback.
        connect_timeout: Seconds to connect.
        read_timeout: Seconds to wait for the next bytes of an answer; a generation takes about 10 s.
        total_timeout: Seconds for one exchange, so that an answer that drips ends too.
        list_price_usd: The cost of a picture if the answer names none.

    Attributes:
        base_url: As above, without a slash at the end.
        on_loopback: Whether the API is on this machine.

    Raises:
        ConfigurationError: The key, the address, or a proxy or certificate named in the environment is unusable.

    Example:
        >>> SegmindClient("SG_0123456789abcdef", "http://127.0.0.1:8787/v1").on_loopback
        True
    """

    def __init__(
        self,
        api_key: str,
        base_url: str = DEFAULT_BASE_URL,
        *,
        connect_timeout: float = 10.0,
        read_timeout: float = 180.0,
        total_timeout: float = EXCHANGE_SECONDS,
        list_price_usd: Decimal = LIST_PRICE_USD,
    ) -> None:
        key = api_key.strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigurationError("api_key: it is empty or has characters that keys do not have; copy it again")
        self._key = key
        self.base_url = base_url.strip().rstrip("/")
        try:
            url = parsed_url(self.base_url)
        except ValueError as error:
            raise ConfigurationError(f"SEGMIND_BASE_URL: {base_url!r} is not usable: {error}") from None
        if url.userinfo or url.query or url.fragment:
            raise ConfigurationError("SEGMIND_BASE_URL: write only scheme, host, port and path")
        self.on_loopback = on_loopback(self.base_url)
        if url.scheme == "http" and not self.on_loopback:
            raise ConfigurationError("SEGMIND_BASE_URL: only https, so that the key is not sent in the clear")
        self._host = url.host
        self._list_price = list_price_usd
        self._times = Times(connect=connect_timeout, read=read_timeout, total=total_timeout)
        # A proxy would get requests that are meant for this machine. The environment counts for nothing else: what it
        # names has been checked.
        proxy = None if self.on_loopback else proxy_for(self.base_url)
        self._transport = transport(ssl_context(from_environment=not self.on_loopback), proxy)

    def __enter__(self) -> SegmindClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def generate(
        self, request: ImageToImageRequest, part: Path, before_sending: Callable[[], None] = lambda: None
    ) -> PaidPicture:
        """Sends one request, which may be billed, and streams the picture to a file.

        Args:
            request: The request; its `image_file` must be an address that the provider can GET.
            part: The file to write; its content is replaced. After an error with `answered` it holds the body of the
                answer as received, and beside it a file with the suffix `.found` may hold what a link in it led to.
            before_sending: Called when the connection stands, just before the request is sent. What it raises is raised
                as it is, and nothing is sent.

        Returns:
            The picture's facts, from its bytes and the answer's headers.

        Raises:
            ApiError: The request failed; `possibly_billed` is True if it may have been billed, and if a 200 was read to
                its end, `answered` has its cost.
            OutboxError: The file cannot be written.
        """
        answer: httpx.Response | None = None
        broken: httpx.TransportError | None = None
        with self._translated():
            try:
                with self._exchange("POST", ENDPOINT, request.body(), before_sending) as answer:
                    self._raise_unless_200(answer)
                    self._receive(answer, part)
            except httpx.TransportError as error:
                if answer is None:
                    raise
                try:
                    whole = _is_whole(part.read_bytes())
                except OSError as unreadable:  # it may be whole, and stays
                    raise _unusable(part, unreadable, "read from") from unreadable
                if not whole:
                    raise self._cut(error).with_facts(status=200, request_id=self._request_id(answer)) from None
                broken = error
        picture = self._picture(answer, self._answered(answer), request.seed, part)
        if broken is None:
            return picture
        notice = f"the connection broke when the answer had arrived whole ({self._shown(broken)})"
        return picture.model_copy(update={"notices": (*picture.notices, notice)})

    def read(self, body: Path, found: Path) -> Picture:
        """Finds the picture in the body of a 200, or downloads it from the link there.

        Args:
            body: The file with the body; it is not changed.
            found: The file to write if the body is not the picture itself.

        Returns:
            The facts of the picture.

        Raises:
            NotAnImageError: There is no picture. If a link led to something else, `found` has that.
            AnswerCutError: The picture provably lacks its end.
            OSError: A file cannot be read or written.
        """
        data = body.read_bytes()
        held = picture_or_link(data, self._key)
        if isinstance(held, Link):
            return self._follow(held, found)
        if held is not None:
            found.write_bytes(held)
        try:
            return read_picture(body if held is None else found)
        except BrokenPicture as broken:
            if held is not None:
                found.unlink()  # the body has it too
            raise _no_picture(broken, data if held is None else held, self._key) from None

    def credits(self) -> Decimal:
        """The account's credits in USD, free ones included. The call is free, so it also serves to check a key.

        Raises:
            ApiError: The request failed; it is never billed.
        """
        with self._translated(billable=False), self._exchange("GET", "get-user-credits") as answer:
            self._raise_unless_200(answer)
            body = _start(answer)
        try:
            balance = _Balance.model_validate_json(unpacked_start(body))
        except ValidationError:
            text = error_text(body, self._key)
            raise ApiUnreachableError(f"the API answered without a credit balance: {text}", status=200) from None
        return balance.credits + (balance.free or 0)

    def _exchange(
        self, method: str, path: str, body: object = None, before_sending: Callable[[], None] = lambda: None
    ) -> AbstractContextManager[httpx.Response]:
        return exchange(
            self._transport,
            method,
            httpx.URL(f"{self.base_url}/{path}"),
            self._times,
            headers={"x-api-key": self._key},
            json=body,
            before_sending=before_sending,
        )

    def _raise_unless_200(self, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            return
        body = b""
        with suppress(httpx.TransportError):  # the status says enough
            body = _start(answer)
        raise answer_error(answer.status_code, answer.headers, body, now=datetime.now(UTC), secret=self._key)

    def _receive(self, answer: httpx.Response, part: Path) -> None:
        """Writes the body of a 200 to a file, as received: one that is paid for and cannot be read is kept like that.

        Each piece is with the system as soon as it has come, so that the end of the process takes no more than what is
        still on the way, and the piece in hand: at most 64 kB, for about 30 µs. Between the head of the answer and its
        first bytes in the file about 0.2 ms pass (measured on loopback with two cores).

        Raises:
            NotAnImageError: It is too large, and was not read to its end.
            OutboxError: The file cannot be written.
        """
        size = 0
        try:
            with replacing(part) as write:
                for chunk in answer.iter_raw():
                    size += len(chunk)
                    if size > ANSWER_LIMIT * 4 // 3 + 10_000:
                        raise NotAnImageError(
                            f"the API answered 200 with more than {ANSWER_LIMIT:,} bytes (check the provider's usage "
                            "page before running again)",
                            status=200,
                            possibly_billed=True,
                            request_id=self._request_id(answer),
                        )
                    write(chunk)
        except OSError as error:
            raise _unusable(part, error) from error

    def _request_id(self, answer: httpx.Response) -> str | None:
        return request_id(answer.headers, self._key)

    def _answered(self, answer: httpx.Response) -> Answered:
        cost, seed = read_cost(header(answer.headers, "x-cost")), header(answer.headers, "x-seed-value") or ""
        return Answered(
            cost_usd=self._list_price if cost is None else cost,
            cost_source="list price" if cost is None else "x-cost",
            seed=int(seed) if re.fullmatch(r"[0-9]{1,18}", seed) else None,
            content_type=content_type(answer.headers, self._key),
            request_id=self._request_id(answer),
            at=datetime.now(UTC),
        )

    def _picture(self, answer: httpx.Response, answered: Answered, seed: int | None, part: Path) -> PaidPicture:
        """The picture of an answer that was read to its end; once it is whole, it replaces the body."""
        found = part.with_suffix(".found")
        try:
            found.unlink(missing_ok=True)
            picture = self.read(part, found)
            if found.exists():
                found.replace(part)
        except OSError as error:
            with suppress(OSError):
                found.unlink(missing_ok=True)
            raise _unusable(part, error).with_facts(answered=answered, possibly_billed=False) from error
        except ApiError as error:
            raise error.with_facts(answered=answered, request_id=answered.request_id) from None
        return answered.brought(picture, seed)

    def _follow(self, link: Link, found: Path) -> Picture:
        """Downloads a linked picture without the key; it is paid for, so a download that failed or was cut is repeated.

        Raises:
            ResultLinkError: It could not be downloaded, or is not a picture.
            OSError: The file cannot be written.
        """
        for wait in (*_LINK_WAITS, None):
            try:
                with found.open("wb") as file:
                    download(link.url, file, limit=ANSWER_LIMIT, destination=Destination(same_origin=self.base_url))
                return read_picture(found)
            except DownloadError as error:
                if error.retryable and _is_whole_picture(found.read_bytes()):
                    return read_picture(found)
                found.unlink()  # a part of the picture
                why, again = f"could not be followed: {error}", error.retryable
            except BrokenPicture as broken:
                text = _shown(broken, found.read_bytes(), self._key)
                why, again = f"does not lead to a picture: {text}", broken.truncated
            if wait is None or not again:
                raise ResultLinkError(f"the API answered 200 with a link to the picture that {why}", status=200)
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _translated(self, billable: bool = True) -> Iterator[None]:
        """Turns the failures of httpx into errors of this package, which never show an address with its query."""
        try:
            yield
        except ApiError as error:
            error.possibly_billed &= billable
            raise
        except NOT_SENT as error:
            why = self._shown(error)
            raise ApiUnreachableError(
                f"{self._host} cannot be reached: {why} (check SEGMIND_BASE_URL, the network and any proxy)"
            ) from None
        except httpx.TransportError as error:
            raise self._cut(error, billable) from None

    def _cut(self, error: httpx.TransportError, billable: bool = True) -> AnswerCutError:
        what = "took too long" if isinstance(error, httpx.TimeoutException) else "was cut"
        return AnswerCutError(
            f"the answer of {self._host} {what}: {self._shown(error)}"
            + (" (the provider's usage page shows whether it was billed)" if billable else ""),
            possibly_billed=billable,
        )

    def _shown(self, error: httpx.TransportError) -> str:
        """The message of an error; it may quote what the peer has sent, which may repeat the key."""
        return redact(str(error), self._key)[:TEXT_LIMIT]


def on_loopback(url: str) -> bool:
    """Whether a URL has a loopback address, or the name localhost.

    Args:
        url: The URL.

    Example:
        >>> on_loopback("http://127.0.0.1:8787/v1"), on_loopback("https://api.segmind.com/v1")
        (True, False)
    """
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _start(answer: httpx.Response) -> bytes:
    """The beginning of a body; all of one that is not larger than any should be."""
    body = bytearray()
    for chunk in answer.iter_raw():
        body += chunk
        if len(body) >= START_LIMIT:
            break
    return bytes(body[:START_LIMIT])


def _is_whole(body: bytes) -> bool:
    """Whether the body of a 200 is whole by its content: JSON to its end, or a picture with its end that decodes.

    Without that proof a body whose connection broke counts as cut.
    """
    if is_whole_json(body):
        return True
    try:
        held = picture_or_link(body)
    except ApiError:
        return False
    if isinstance(held, Link):
        return False  # a text without an end mark: half of an address is an address
    return _is_whole_picture(body if held is None else held)


def _is_whole_picture(data: bytes) -> bool:
    try:
        picture_of(data)
    except BrokenPicture:
        return False
    return not is_truncated(data)


def _no_picture(broken: BrokenPicture, data: bytes, key: str) -> ApiError:
    """The error for the body of a 200 that was read to its end and does not decode to a picture."""
    if broken.truncated:
        return AnswerCutError(
            "the API answered 200 with a picture that ends early (the provider's usage page shows whether it was "
            "billed)",
            status=200,
            possibly_billed=True,
        )
    return NotAnImageError(
        f"the API answered 200 without a picture: {_shown(broken, data, key)} (check the provider's usage page "
        "before running again)",
        status=200,
    )


def _shown(broken: BrokenPicture, data: bytes, key: str) -> str:
    """Bytes that are not a picture, as a message shows them: their text, or what is wrong with them."""
    start = data[:2000]
    text = "".join(start.decode("utf-8", "replace").split())
    if not data:
        return "the body is empty"
    if text.isprintable() and "\ufffd" not in text:
        return repr(error_text(start, key))
    return f"the file {broken}"


def _unusable(part: Path, error: OSError, what: str = "written to") -> OutboxError:
    return OutboxError(
        f"outbox: the answered picture could not be {what} {part.parent}: {reason(error)} (free space there)",
        status=200,
        possibly_billed=True,
    )
