"""The HTTP client of the image-to-image API. It sends one request at a time and knows nothing of retries."""

from __future__ import annotations

import os
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from prefect_segmind.download import Destination, DownloadError, download
from prefect_segmind.errors import (
    AnswerCutError,
    ApiError,
    ApiUnreachableError,
    ConfigurationError,
    NotAnImageError,
    OutboxError,
    ResultLinkError,
    SegmindError,
)
from prefect_segmind.fingerprint import ENDPOINT
from prefect_segmind.image import BrokenPicture, Picture, read_picture
from prefect_segmind.price import LIST_PRICE_USD, read_cost
from prefect_segmind.record import PaidPicture
from prefect_segmind.request import ImageToImageRequest
from prefect_segmind.response import SPACE, Link, answer_error, error_text, header, picture_or_link

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
        ConfigurationError: The key or the address is unusable.

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
        trust_env = not self.on_loopback  # a proxy of the environment would get what is meant for this machine
        certificates = (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")) if trust_env else ()
        # No connection is kept: one that the server has dropped meanwhile would look like a request of unknown outcome.
        self._http = httpx.Client(
            headers={"x-api-key": key},
            timeout=httpx.Timeout(read_timeout, connect=connect_timeout),
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=trust_env,
            verify=_ssl_context(trust_env, certificates),
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
            part: The file to write; what it holds is replaced.

        Returns:
            The picture's facts, read from its bytes and the answer's headers.

        Raises:
            ApiError: In one of its classes; `possibly_billed` says whether it may have been paid.
            OutboxError: The file could not be written.
        """
        with (
            self._translated(),
            self._http.stream("POST", f"{self.base_url}/{ENDPOINT}", json=request.body()) as answer,
        ):
            self._raise_unless_200(answer)
            size = 0
            try:
                with part.open("r+b" if part.exists() else "wb") as file:
                    for chunk in answer.iter_bytes():
                        size += len(chunk)
                        if size > ANSWER_LIMIT * 4 // 3 + 10_000:
                            raise _not_an_image(answer, f"more than {ANSWER_LIMIT:,} bytes")
                        file.write(chunk)
                    file.truncate()
                picture = self._picture(answer, part)
            except OSError as error:
                raise _unwritable(part, error) from error
        cost = read_cost(header(answer.headers, "x-cost"))
        seed = header(answer.headers, "x-seed-value") or ""
        told = int(seed) if re.fullmatch(r"[0-9]{1,18}", seed) else None
        notices = []
        if told is not None and request.seed is not None and told != request.seed:
            notices.append(f"the provider reports seed {seed} where {request.seed} was asked for")
        said = (answer.headers.get("content-type") or "").split(";")[0].strip().lower()
        if said.startswith("image/") and said != picture.content_type:
            notices.append(f"the provider called the picture {said}; it is {picture.content_type}")
        return PaidPicture(
            **picture.model_dump(),
            seed=request.seed or 0 if told is None else told,
            cost_usd=self._list_price if cost is None else cost,
            cost_source="list price" if cost is None else "x-cost",
            request_id=header(answer.headers, "x-request-id"),
            paid_at=datetime.now(UTC),
            notices=tuple(notices),
        )

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

    def _picture(self, answer: httpx.Response, part: Path) -> Picture:
        """The picture in a finished file, after replacing JSON by what it holds or links to."""
        with part.open("rb") as file:
            start = file.read(64).lstrip(SPACE)
        if start[:1] in (b"{", b"[", b'"'):
            found = self._with_request_id(answer, part.read_bytes())
            if isinstance(found, bytes):
                part.write_bytes(found)
            elif isinstance(found, Link):
                self._follow(answer, found, part)
        try:
            return read_picture(part)
        except BrokenPicture as broken:
            if broken.truncated:
                raise AnswerCutError(
                    "the API answered 200 with a picture that ends early (the provider's usage page tells whether it "
                    "was billed)",
                    status=200,
                    possibly_billed=True,
                    request_id=header(answer.headers, "x-request-id"),
                ) from None
            with part.open("rb") as file:
                text = error_text(file.read(2000), self._key)
            raise _not_an_image(answer, _shown(text)) from None

    def _with_request_id(self, answer: httpx.Response, body: bytes) -> bytes | Link | None:
        try:
            return picture_or_link(body, self._key)
        except SegmindError as error:
            error.request_id = header(answer.headers, "x-request-id")
            raise

    def _follow(self, answer: httpx.Response, link: Link, part: Path) -> None:
        """Downloads a linked picture at once, without the key; it is paid for, so a failed download is repeated."""
        for wait in (*_LINK_WAITS, None):
            try:
                with part.open("wb") as file:
                    download(link.url, file, limit=ANSWER_LIMIT, destination=Destination(same_origin=self.base_url))
                return
            except DownloadError as error:
                if wait is None or not error.retryable:
                    raise ResultLinkError(
                        f"the API answered 200 with a link to the picture, which could not be followed: {error}",
                        status=200,
                        possibly_billed=True,
                        request_id=header(answer.headers, "x-request-id"),
                    ) from None
                time.sleep(wait)

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


@lru_cache(maxsize=4)
def _ssl_context(trust_env: bool, _certificates: tuple[str | None, ...]) -> ssl.SSLContext:
    """The context that httpx would make for each client, at 20 ms of CPU; made once for each environment."""
    return httpx.create_ssl_context(trust_env=trust_env)


def _shown(text: str) -> str:
    """What a message shows of an answer that is no picture."""
    if not text:
        return "nothing in it"
    return repr(text) if text.isprintable() and "\ufffd" not in text else "bytes that are no picture"


def _not_an_image(answer: httpx.Response, found: str) -> NotAnImageError:
    return NotAnImageError(
        f"the API answered 200 without a picture: {found} (look at the provider's usage page before running again)",
        status=200,
        possibly_billed=True,
        request_id=header(answer.headers, "x-request-id"),
    )


def _unwritable(part: Path, error: OSError) -> OutboxError:
    why = error.strerror or error
    return OutboxError(
        f"outbox: {part.parent} could not take a picture that was answered: {why} (free space there)",
        status=200,
        possibly_billed=True,
    )
