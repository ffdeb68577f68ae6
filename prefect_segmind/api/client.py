"""The HTTP client of the image-to-image API. It sends one request at a time and knows nothing of retries."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from ipaddress import ip_address
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import httpx

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
from prefect_segmind.storage.http import Destination, DownloadError, download
from prefect_segmind.storage.http_environment import proxy_for, ssl_context

DEFAULT_BASE_URL = "https://api.segmind.com/v1"
ANSWER_LIMIT = 50_000_000
"""Bytes of a picture that are accepted; a JSON answer may be a third longer for its base64."""
_LINK_WAITS = (0.5, 2.0, 5.0, 10.0, 20.0, 30.0)
"""Seconds between the attempts to download a linked picture: it is paid for, and the link is all there is of it."""


class SegmindClient:
    """Talks to the API. Use one per thread, and close it or use it as a context manager.

    Args:
        api_key: The key; it goes to the API's own address only, and into no message.
        base_url: Address of the API, https unless it is on loopback.
        connect_timeout: Seconds to connect.
        read_timeout: Seconds to wait for the next bytes of an answer; a generation takes about 10 s.
        list_price_usd: What a picture is taken to cost where the answer does not say.

    Raises:
        ConfigurationError: The key or the address is unusable, or a proxy or certificate that the environment names.

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
            raise ConfigurationError("api_key: empty, or it holds characters that no key has; copy it once more")
        self._key = key
        self.base_url = base_url.strip().rstrip("/")
        try:
            parts = httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise ConfigurationError(f"SEGMIND_BASE_URL: {base_url!r} is no address: {error}") from None
        if not parts.host or parts.scheme not in ("http", "https"):
            raise ConfigurationError(f"SEGMIND_BASE_URL: {base_url!r} is no http(s) address")
        self.on_loopback = on_loopback(self.base_url)
        if parts.scheme == "http" and not self.on_loopback:
            raise ConfigurationError("SEGMIND_BASE_URL: only https, so that the key is not sent in the clear")
        self._list_price = list_price_usd
        # A proxy of the environment would get what is meant for this machine.
        proxy = None if self.on_loopback else proxy_for(self.base_url)
        # No connection is kept: one that the server has dropped meanwhile would look like a request of unknown outcome.
        self._http = httpx.Client(
            headers={"x-api-key": key},
            timeout=httpx.Timeout(read_timeout, connect=connect_timeout),
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,  # but for what stands here, which has been checked
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

    def generate(self, request: ImageToImageRequest, part: Path) -> PaidPicture:
        """Sends one request, which may be billed, and streams the picture to a file.

        Args:
            request: The request; its `image_file` must be an address that the provider can GET.
            part: The file to write; what it holds is replaced. After an error that has `answered` it holds the body of
                the answer as it came, and beside it, with the suffix `.found`, may lie what a link in it has led to.

        Returns:
            The picture's facts, read from its bytes and the answer's headers.

        Raises:
            ApiError: In one of its classes; `possibly_billed` says whether it may have been paid, and `answered` what
                it has cost where a 200 was read to its end.
            OutboxError: The file could not be written.
        """
        with (
            self._translated(),
            self._http.stream("POST", f"{self.base_url}/{ENDPOINT}", json=request.body()) as answer,
        ):
            self._raise_unless_200(answer)
            try:
                with part.open("r+b" if part.exists() else "wb") as file:
                    # As it came over the wire: what is paid for and cannot be read is kept like that.
                    self._write(answer, answer.iter_raw(), file)
                    file.truncate()
            except OSError as error:
                raise _unwritable(part, error) from error
        return self._picture(answer, self._answered(answer), request.seed, part)

    def read(self, body: Path, found: Path) -> Picture:
        """Finds the picture in the body of a 200, wherever it is in it, and follows a link to it.

        Args:
            body: The body; it stays as it is.
            found: The file to write, where the body is not the picture itself.

        Raises:
            NotAnImageError: In one of its classes. Where a link has led to something else, `found` has that.
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
        """The account's credits in USD, free ones included. The call is free, so it is also the check of a key.

        Raises:
            ApiError: In one of its classes; nothing is ever billed.
        """
        with self._translated(billable=False), self._http.stream("GET", f"{self.base_url}/get-user-credits") as answer:
            self._raise_unless_200(answer)
            answer.read()
            try:
                found: Any = answer.json()
                credits = Decimal(str(found["credits"])) + Decimal(str(found.get("free-credits") or 0))
                if not credits.is_finite():
                    raise ValueError("no number")
                return credits
            except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError):
                text = error_text(answer.content, self._key)
                raise ApiUnreachableError(f"the API did not tell the credits, it said: {text}", status=200) from None

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
            NotAnImageError: It is too large, and not read to its end.
        """
        size = 0
        for chunk in chunks:
            size += len(chunk)
            if size > ANSWER_LIMIT * 4 // 3 + 10_000:
                raise NotAnImageError(
                    f"the API answered 200 with more than {ANSWER_LIMIT:,} bytes (look at the provider's usage page "
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
        """The picture of an answer that was read to its end: it takes the place of the body once it is whole."""
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
        """Unpacks a body that says it is compressed; what only says so stays as it came, and the error is returned."""
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
            ResultLinkError: It could not be downloaded, or is no picture.
            OSError: The file cannot be written.
        """
        for wait in (*_LINK_WAITS, None):
            try:
                with found.open("wb") as file:
                    download(link.url, file, limit=ANSWER_LIMIT, destination=Destination(same_origin=self.base_url))
                return read_picture(found)
            except DownloadError as error:
                found.unlink()  # what is there of it has no end
                why, again = f"could not be followed: {error}", error.retryable
            except BrokenPicture as broken:
                text = _shown(broken, found.read_bytes(), self._key)
                why, again = f"leads to no picture: {text}", broken.truncated
            if wait is None or not again:
                raise ResultLinkError(f"the API answered 200 with a link to the picture, which {why}", status=200)
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _translated(self, billable: bool = True) -> Iterator[None]:
        """Turns every failure of httpx into one of our errors; none of them shows an address with its query."""
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
                + (" (the provider's usage page tells whether it was billed)" if billable else ""),
                possibly_billed=billable,
            ) from None


def on_loopback(url: str) -> bool:
    """Whether a URL names this machine itself.

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
    """The error for the body of a 200 that was read to its end and is no picture that can be used."""
    if broken.truncated:
        return AnswerCutError(
            "the API answered 200 with a picture that ends early (the provider's usage page tells whether it was "
            "billed)",
            status=200,
            possibly_billed=True,
        )
    return NotAnImageError(
        f"the API answered 200 without a picture: {_shown(broken, data, key)} (look at the provider's usage page "
        "before running again)",
        status=200,
    )


def _shown(broken: BrokenPicture, data: bytes, key: str) -> str:
    """What a message shows of bytes that are no picture: their text, or what is wrong with them."""
    text = error_text(data[:2000], key)
    if not data:
        return "nothing in it"
    if text.isprintable() and "\ufffd" not in text:
        return repr(text)
    return f"bytes that are no picture: the file {broken}"


def _unwritable(part: Path, error: OSError) -> OutboxError:
    why = error.strerror or error
    return OutboxError(
        f"outbox: {part.parent} could not take a picture that was answered: {why} (free space there)",
        status=200,
        possibly_billed=True,
    )
