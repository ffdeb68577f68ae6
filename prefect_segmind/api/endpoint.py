"""An address that gets the key: its checks, its connections, and the errors that its answers stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime

import httpx

from prefect_segmind.api.origin import on_loopback
from prefect_segmind.api.response import START_LIMIT, TEXT_LIMIT, answer_error
from prefect_segmind.errors import (
    AnswerCutError,
    ApiError,
    ApiUnreachableError,
    ConfigurationError,
    redact,
)
from prefect_segmind.storage.http_environment import proxy_for, ssl_context
from prefect_segmind.storage.http_exchange import NOT_SENT, Times, exchange, parsed_url, transport

EXCHANGE_SECONDS = 600.0
"""The most seconds of one exchange, from the connection to the last byte; a generation takes about 10."""
_DOCUMENT_LIMIT = 1_000_000


class Endpoint:
    """An address that gets the key, and no other does. Use one per thread, and close it or use it as a context manager.

    Args:
        api_key: The key; it is sent to this address's own origin only, and no message contains it.
        url: The address, https unless it is on loopback.
        setting: The setting that names the address, for messages.
        connect_timeout: Seconds to connect.
        read_timeout: Seconds to wait for the next bytes of an answer.
        total_timeout: Seconds for one exchange, so that an answer that drips ends too.

    Attributes:
        url: As above, without a slash at the end.
        on_loopback: Whether it is on this machine.
        host: Its host.
        times: How long an exchange may take.
        secret: The key, for taking it out of texts.

    Raises:
        ConfigurationError: The key, the address, or a proxy or certificate named in the environment is unusable.

    Example:
        >>> with Endpoint("SG_0123456789abcdef", "http://127.0.0.1:8787/v1/") as endpoint:
        ...     endpoint.url, endpoint.owns("http://127.0.0.1:8787/v2"), endpoint.owns("http://127.0.0.1:8788/v1")
        ('http://127.0.0.1:8787/v1', True, False)
    """

    def __init__(
        self,
        api_key: str,
        url: str,
        *,
        setting: str = "SEGMIND_BASE_URL",
        connect_timeout: float = 10.0,
        read_timeout: float = 180.0,
        total_timeout: float = EXCHANGE_SECONDS,
    ) -> None:
        self.secret = api_key.strip()
        if not self.secret or not self.secret.isascii() or not self.secret.isprintable() or " " in self.secret:
            raise ConfigurationError("api_key: it is empty or has characters that keys do not have; copy it again")
        self.url = url.strip().rstrip("/")
        try:
            parsed = parsed_url(self.url)
        except ValueError as error:
            raise ConfigurationError(f"{setting}: {url!r} is not usable: {error}") from None
        if parsed.userinfo or parsed.query or parsed.fragment:
            raise ConfigurationError(f"{setting}: write only scheme, host, port and path")
        self.on_loopback = on_loopback(self.url)
        if parsed.scheme == "http" and not self.on_loopback:
            raise ConfigurationError(f"{setting}: only https, so that the key is not sent in the clear")
        self.host = parsed.host
        self._setting = setting
        self._origin = _origin(parsed)
        self.times = Times(connect=connect_timeout, read=read_timeout, total=total_timeout)
        # A proxy would get requests that are meant for this machine. The environment counts for nothing else: what it
        # names has been checked.
        proxy = None if self.on_loopback else proxy_for(self.url)
        self._transport = transport(ssl_context(from_environment=not self.on_loopback), proxy)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def owns(self, url: str) -> bool:
        """Whether a URL has this endpoint's scheme, host and port, and thus may get the key.

        Args:
            url: The URL, of unknown origin.
        """
        try:
            parsed = parsed_url(url)
        except ValueError:
            return False
        return _origin(parsed) == self._origin and not parsed.userinfo

    def exchange(
        self,
        method: str,
        path: str = "",
        body: object = None,
        *,
        params: Mapping[str, str | int] | None = None,
        seconds: float = EXCHANGE_SECONDS,
        before_sending: Callable[[], None] = lambda: None,
    ) -> AbstractContextManager[httpx.Response]:
        """Sends one request with the key; to be used within `translated`.

        Args:
            method: Such as GET.
            path: A path below the endpoint's address, or a whole URL of its origin.
            body: The body, sent as JSON; None for none.
            params: The query, if any.
            seconds: How long the exchange may take, where that is less than the endpoint's own times.
            before_sending: Called when the connection stands, just before the request is sent. What it raises is raised
                as it is, and nothing is sent.

        Returns:
            A context manager that yields the answer when its head has come; its body is to be read by `iter_raw`.

        Raises:
            ApiError: The URL is of another origin; nothing is sent.
        """
        url = path if re.match(r"(?i)https?://", path) else f"{self.url}/{path}".rstrip("/")
        if not self.owns(url):
            raise ApiError(f"{self._setting}: an address of another origin than {self.url} does not get the key")
        return exchange(
            self._transport,
            method,
            httpx.URL(url).copy_merge_params(dict(params)) if params else httpx.URL(url),
            Times(*(min(each, seconds) for each in self.times)),
            headers={"x-api-key": self.secret},
            json=body,
            before_sending=before_sending,
        )

    def raise_unless_ok(self, answer: httpx.Response, ok: Container[int] = (200,)) -> None:
        """Raises the error that an answer's status stands for.

        Args:
            answer: The answer, whose body has not been read.
            ok: The statuses without an error.

        Raises:
            ApiError: Of the status's class, with the text of the answer.
        """
        if answer.status_code in ok:
            return
        body = b""
        with suppress(httpx.TransportError):  # the status says enough
            body = start_of(answer)
        raise self.error_of(answer, body)

    def error_of(self, answer: httpx.Response, body: bytes) -> ApiError:
        """The error that an answer's status stands for.

        Args:
            answer: The answer.
            body: Its body, or the beginning of it.
        """
        return answer_error(answer.status_code, answer.headers, body, now=datetime.now(UTC), secret=self.secret)

    @contextmanager
    def translated(self, billable: bool = True) -> Iterator[None]:
        """Turns the failures of httpx into errors of this package, which never show an address with its query.

        Args:
            billable: Whether what is sent may be billed; where it may not, no error is `possibly_billed`.

        Raises:
            ApiUnreachableError: The request was not sent.
            AnswerCutError: It was sent, and its answer is missing or incomplete.
        """
        try:
            yield
        except ApiError as error:  # a disk that fails says nothing of what is billed
            error.possibly_billed &= billable
            raise
        except NOT_SENT as error:
            raise ApiUnreachableError(
                f"{self.host} cannot be reached: {self.shown(error)} (check {self._setting}, the network and any proxy)"
            ) from None
        except httpx.TransportError as error:
            raise self.cut(error, billable) from None

    def cut(self, error: httpx.TransportError, billable: bool = True) -> AnswerCutError:
        """The error for an answer that did not come to its end.

        Args:
            error: How its connection ended.
            billable: Whether its request may have been billed.
        """
        what = "took too long" if isinstance(error, httpx.TimeoutException) else "was cut"
        return AnswerCutError(
            f"the answer of {self.host} {what}: {self.shown(error)}"
            + (" (the provider's usage page shows whether it was billed)" if billable else ""),
            possibly_billed=billable,
        )

    def shown(self, error: httpx.TransportError) -> str:
        """The message of an error without the key, which the peer may have repeated.

        Args:
            error: The error; it may quote what the peer has sent.
        """
        return redact(str(error), self.secret)[:TEXT_LIMIT]


def start_of(answer: httpx.Response, limit: int = START_LIMIT) -> bytes:
    """The beginning of a body; all of one that is not larger than any should be.

    Args:
        answer: The answer, whose body has not been read.
        limit: The most bytes.

    Raises:
        httpx.TransportError: It was cut.
    """
    body = bytearray()
    for chunk in answer.iter_raw():
        body += chunk
        if len(body) >= limit:
            break
    return bytes(body[:limit])


def document(
    exchange: AbstractContextManager[httpx.Response],
) -> tuple[httpx.Response, bytes, httpx.TransportError | None]:
    """Reads an answer that should be a few lines, at most 1 MB of it.

    Args:
        exchange: The exchange that brings it.

    Returns:
        The answer; its body; and how its connection broke, if it did, as the body may be whole all the same.

    Raises:
        httpx.TransportError: There was no answer.
    """
    answer: httpx.Response | None = None
    body = bytearray()
    try:
        with exchange as answer:
            for chunk in answer.iter_raw():
                body += chunk
                if len(body) > _DOCUMENT_LIMIT:
                    break
    except httpx.TransportError as error:
        if answer is None:
            raise
        return answer, bytes(body), error
    return answer, bytes(body), None


def _origin(url: httpx.URL) -> tuple[str, bytes, int]:
    return url.scheme, url.raw_host, url.port or (443 if url.scheme == "https" else 80)
