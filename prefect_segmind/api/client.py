"""The HTTP client of the image-to-image API. It sends one request at a time and knows nothing of retries."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from ipaddress import ip_address
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, Field, ValidationError

from prefect_segmind.api.picture import Answered, PaidPicture
from prefect_segmind.api.request import ENDPOINT, ImageToImageRequest
from prefect_segmind.api.response import Link, answer_error, error_text, header, picture_or_link, read_cost
from prefect_segmind.errors import (
    AnswerCutError,
    ApiError,
    ApiUnreachableError,
    ConfigurationError,
    NotAnImageError,
    OutboxError,
    ResultLinkError,
)
from prefect_segmind.images.inspection import BrokenPicture, Picture, read_picture
from prefect_segmind.money import LIST_PRICE_USD
from prefect_segmind.storage.disk_errors import reason
from prefect_segmind.storage.http import Destination, DownloadError, download
from prefect_segmind.storage.http_environment import proxy_for, ssl_context

DEFAULT_BASE_URL = "https://api.segmind.com/v1"
ANSWER_LIMIT = 50_000_000
"""The most bytes of a picture; a JSON answer may be a third longer for its base64."""
_LINK_WAITS = (0.5, 2.0, 5.0, 10.0, 20.0, 30.0)
"""Seconds between the attempts to download a linked picture, which is paid for and nowhere else."""


class _Balance(BaseModel):
    credits: Decimal
    free: Decimal | None = Field(None, alias="free-credits")


class SegmindClient:
    """An HTTP client of the API. Use one per thread, and close it or use it as a context manager.

    Args:
        api_key: The key; it is sent to the API's own address only, and no message contains it.
        base_url: The address of the API, https unless it is on loopback.
        connect_timeout: Seconds to connect.
        read_timeout: Seconds to wait for the next bytes of an answer; a generation takes about 10 s.
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
        list_price_usd: Decimal = LIST_PRICE_USD,
    ) -> None:
        key = api_key.strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigurationError("api_key: it is empty or has characters that keys do not have; copy it again")
        self._key = key
        self.base_url = base_url.strip().rstrip("/")
        try:
            parts = httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise ConfigurationError(f"SEGMIND_BASE_URL: {base_url!r} is not an address: {error}") from None
        if not parts.host or parts.scheme not in ("http", "https"):
            raise ConfigurationError(f"SEGMIND_BASE_URL: {base_url!r} is not an http(s) address")
        self.on_loopback = on_loopback(self.base_url)
        if parts.scheme == "http" and not self.on_loopback:
            raise ConfigurationError("SEGMIND_BASE_URL: only https, so that the key is not sent in the clear")
        self._list_price = list_price_usd
        # A proxy would get requests that are meant for this machine.
        proxy = None if self.on_loopback else proxy_for(self.base_url)
        # No connection is kept: a request on one that the server has dropped would be of unknown outcome.
        self._http = httpx.Client(
            headers={"x-api-key": key},
            timeout=httpx.Timeout(read_timeout, connect=connect_timeout),
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,  # except for the two below, which have been checked
            proxy=proxy,
            verify=ssl_context(from_environment=not self.on_loopback),
            follow_redirects=False,
        )

    def __enter__(self) -> SegmindClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

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

        def trace(event: str, info: Mapping[str, Any]) -> None:
            # https://www.encode.io/httpcore/extensions/#trace; a CONNECT to a proxy is traced too.
            if event == "http11.send_request_headers.started" and info["request"].method == b"POST":
                before_sending()

        url, body = f"{self.base_url}/{ENDPOINT}", request.body()
        with self._translated(), self._http.stream("POST", url, json=body, extensions={"trace": trace}) as answer:
            self._raise_unless_200(answer)
            try:
                with part.open("r+b" if part.exists() else "wb") as file:
                    # As received: an answer that is paid for and cannot be read is kept like that.
                    self._write(answer, answer.iter_raw(), file)
                    file.truncate()
            except OSError as error:
                raise _unwritable(part, error) from error
        return self._picture(answer, self._answered(answer), request.seed, part)

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
        with self._translated(billable=False), self._http.stream("GET", f"{self.base_url}/get-user-credits") as answer:
            self._raise_unless_200(answer)
            answer.read()
        try:
            balance = _Balance.model_validate_json(answer.content)
        except ValidationError:
            text = error_text(answer.content, self._key)
            raise ApiUnreachableError(f"the API answered without a credit balance: {text}", status=200) from None
        return balance.credits + (balance.free or 0)

    def _raise_unless_200(self, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            return
        body = b""
        try:
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > 64_000:
                    break
        except httpx.HTTPError:
            pass  # the status says enough
        raise answer_error(answer.status_code, answer.headers, body, now=datetime.now(UTC), secret=self._key)

    def _write(self, answer: httpx.Response, chunks: Iterator[bytes], file: IO[bytes]) -> None:
        """Writes a body to a file.

        Raises:
            NotAnImageError: It is too large, and was not read to its end.
        """
        size = 0
        for chunk in chunks:
            size += len(chunk)
            if size > ANSWER_LIMIT * 4 // 3 + 10_000:
                raise NotAnImageError(
                    f"the API answered 200 with more than {ANSWER_LIMIT:,} bytes (check the provider's usage page "
                    "before running again)",
                    status=200,
                    possibly_billed=True,
                    request_id=header(answer.headers, "x-request-id"),
                )
            file.write(chunk)

    def _answered(self, answer: httpx.Response) -> Answered:
        cost, seed = read_cost(header(answer.headers, "x-cost")), header(answer.headers, "x-seed-value") or ""
        return Answered(
            cost_usd=self._list_price if cost is None else cost,
            cost_source="list price" if cost is None else "x-cost",
            seed=int(seed) if re.fullmatch(r"[0-9]{1,18}", seed) else None,
            content_type=(answer.headers.get("content-type") or "").split(";")[0].strip().lower(),
            request_id=header(answer.headers, "x-request-id"),
            at=datetime.now(UTC),
        )

    def _picture(self, answer: httpx.Response, answered: Answered, seed: int | None, part: Path) -> PaidPicture:
        """The picture of an answer that was read to its end; once it is whole, it replaces the body."""
        found, packed = part.with_suffix(".found"), None
        try:
            found.unlink(missing_ok=True)
            packed = self._decompress(answer, part, found)
            picture = self.read(part, found)
            if found.exists():
                found.replace(part)
        except OSError as error:
            with suppress(OSError):
                found.unlink(missing_ok=True)
            raise _unwritable(part, error).with_facts(answered=answered, possibly_billed=False) from error
        except ApiError as known:
            if packed:
                known = NotAnImageError(f"{known}; it cannot be decompressed: {packed}", status=200)
            raise known.with_facts(answered=answered, request_id=answered.request_id) from None
        return answered.brought(picture, seed)

    def _decompress(self, answer: httpx.Response, part: Path, plain: Path) -> httpx.DecodingError | None:
        """Unpacks a body with a Content-Encoding; if it cannot be unpacked, it stays, and the error is returned."""
        if answer.headers.get("content-encoding", "identity").lower() == "identity":
            return None
        with part.open("rb") as packed:
            raw = iter(lambda: packed.read(1 << 16), b"")
            unpacked = httpx.Response(200, headers=answer.headers, content=raw)
            try:
                with plain.open("wb") as file:
                    self._write(answer, unpacked.iter_bytes(), file)
            except httpx.DecodingError as error:
                plain.unlink()
                return error
        plain.replace(part)
        return None

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
        host = urlsplit(self.base_url).hostname
        try:
            yield
        except ApiError as error:
            error.possibly_billed &= billable
            raise
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as error:
            raise ApiUnreachableError(
                f"{host} cannot be reached: {error} (check SEGMIND_BASE_URL, the network and any proxy)"
            ) from None
        except httpx.DecodingError as error:
            raise NotAnImageError(
                f"the answer of {host} cannot be decompressed: {error}", status=200, possibly_billed=billable
            ) from None
        except httpx.TransportError as error:
            what = "took too long" if isinstance(error, httpx.TimeoutException) else "was cut"
            raise AnswerCutError(
                f"the answer of {host} {what}: {error or type(error).__name__}"
                + (" (the provider's usage page shows whether it was billed)" if billable else ""),
                possibly_billed=billable,
            ) from None


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
    text = error_text(data[:2000], key)
    if not data:
        return "the body is empty"
    if text.isprintable() and "\ufffd" not in text:
        return repr(text)
    return f"the file {broken}"


def _unwritable(part: Path, error: OSError) -> OutboxError:
    return OutboxError(
        f"outbox: the answered picture could not be written to {part.parent}: {reason(error)} (free space there)",
        status=200,
        possibly_billed=True,
    )
