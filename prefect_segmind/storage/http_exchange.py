"""One HTTP exchange: one request, and what comes of it within a time, whatever the peer sends.

httpx's transport is used without its client, which would also read redirects and cookies: it fails on those that are
malformed, and logs every address with its query.
"""

from __future__ import annotations

import math
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from time import monotonic
from typing import Any, NamedTuple

import httpx

from prefect_segmind._version import __version__
from prefect_segmind.log_guard import guard_logs
from prefect_segmind.text import printable

NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
"""How an exchange ends if the request was certainly not sent."""

MESSAGE_LIMIT = 1000
"""The most characters of an error's message; it may quote what the peer has sent."""


class Times(NamedTuple):
    """How long an exchange may take.

    Attributes:
        connect: Seconds to connect to one address, and for each step of TLS.
        read: Seconds to wait for the next bytes.
        total: Seconds for all of it, from the connection to the last byte.
    """

    connect: float
    read: float
    total: float


def parsed_url(address: str, base: httpx.URL | None = None) -> httpx.URL:
    """An http(s) URL that can be requested.

    Args:
        address: The address.
        base: What it is relative to, for a redirect.

    Raises:
        ValueError: It is none; the message does not contain it.

    Example:
        >>> parsed_url("/b.png?x=1", httpx.URL("https://cdn.example/a.png"))
        URL('https://cdn.example/b.png?x=1')
        >>> parsed_url("mailto:somebody@example.com")
        Traceback (most recent call last):
        ValueError: not an http(s) address
    """
    try:
        url = base.join(address) if base else httpx.URL(address)
        host, port = url.host, url.port  # decoded here, and not later where nobody expects it to fail
    except (httpx.InvalidURL, ValueError) as error:  # of idna too
        raise ValueError(f"not a URL ({str(error).partition(':')[0]})") from None
    if url.scheme not in ("http", "https") or not host:
        raise ValueError("not an http(s) address")
    if port is not None and not 0 < port < 65_536:
        raise ValueError("its port is none")
    return url


def transport(certificates: Any, proxy: httpx.Proxy | None) -> httpx.HTTPTransport:
    """What exchanges go through. It keeps no connection: a request on one that the peer has dropped would be lost.

    Args:
        certificates: The `ssl.SSLContext`.
        proxy: The proxy, if any.
    """
    guard_logs()
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.HTTPTransport(verify=certificates, proxy=proxy, trust_env=False, limits=limits)


@contextmanager
def exchange(
    transport: httpx.HTTPTransport,
    method: str,
    url: httpx.URL,
    times: Times,
    *,
    headers: dict[str, str],
    json: object = None,
    sni: str | None = None,
    before_sending: Callable[[], None] = lambda: None,
) -> Iterator[httpx.Response]:
    """Sends a request, and yields the answer when its head has come; its body is to be read by `iter_raw`.

    The connection is shut when the time is over, be it that the peer drips its headers, its body, or endless answers
    before the answer. Redirects are not followed.

    Args:
        transport: What it goes through.
        method: Such as GET.
        url: The URL.
        times: How long it may take.
        headers: Headers beside the usual ones.
        json: The body, if any.
        sni: The name that TLS asks for and that the certificate must have, if it is not the URL's.
        before_sending: Called when the connection stands, just before the request is sent. What it raises is raised as
            it is, and nothing is sent.

    Raises:
        httpx.TransportError: The exchange failed, while the answer was read too; one of `NOT_SENT` if nothing of the
            request was sent.
    """
    usual = {
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
        "User-Agent": f"prefect-segmind/{__version__}",
    }
    with _Watch(times.total, before_sending) as watch:
        extensions = {"timeout": httpx.Timeout(times.read, connect=times.connect).as_dict(), "trace": watch.trace}
        if sni:
            extensions["sni_hostname"] = sni
        request = httpx.Request(method, url, headers=usual | headers, json=json, extensions=extensions)
        try:
            try:
                answer = transport.handle_request(request)
            except (ValueError, OverflowError) as error:  # a name or a number that only the system finds unusable
                if error is watch.refusal:
                    raise
                kind = httpx.RemoteProtocolError if watch.is_connected else httpx.ConnectError
                raise kind(str(error)) from error
            with closing(answer):
                yield answer
        except httpx.TransportError as error:
            if isinstance(error, NOT_SENT):
                raise type(error)(_shown(error)) from error
            if watch.asks_proxy:
                raise httpx.ConnectError(f"the proxy: {_shown(error)}") from error
            if watch.over:
                raise httpx.ReadTimeout(f"it was not over after {times.total:g} s") from error
            raise type(error)(_shown(error)) from error
        if watch.over:  # where the peer names no length, a connection that was shut looks like the end
            raise httpx.ReadTimeout(f"it was not over after {times.total:g} s")


def _shown(error: httpx.TransportError) -> str:
    """The message of an error, which may quote whole lines of what the peer has sent, in sane length."""
    return printable(str(error)[:MESSAGE_LIMIT]) or type(error).__name__


class _Watch:
    """Shuts the connection of an exchange when its time is over, and knows how far it has come.

    httpx has time-outs for each read alone, which a peer that sends a byte a second never meets. httpcore's `trace`
    extension (https://www.encode.io/httpcore/extensions/#trace) hands out the connection as soon as there is one; a
    duplicate of its socket stays valid when TLS takes the socket itself over.
    """

    def __init__(self, seconds: float, before_sending: Callable[[], None]) -> None:
        self.over = False
        self.asks_proxy = False  # by a CONNECT; the request itself follows
        self.refusal: BaseException | None = None
        self._before_sending = before_sending
        self._socket: socket.socket | None = None
        self._seconds = seconds
        self._lock = threading.Lock()

    def __enter__(self) -> _Watch:
        _deadlines.add(self, self._seconds)
        return self

    def __exit__(self, *_: object) -> None:
        _deadlines.forget(self)
        with self._lock:
            if self._socket:
                self._socket.close()

    @property
    def is_connected(self) -> bool:
        """Whether there has been a connection, to the peer or a proxy."""
        return self._socket is not None

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Is called by httpcore before and after each of its steps."""
        step = event.partition(".")[2]
        if step == "connect_tcp.complete":
            self._connected(info["return_value"])
        elif step == "send_request_headers.started":
            self.asks_proxy = info["request"].method == b"CONNECT"
            if not self.asks_proxy:
                self._let_send()

    def _connected(self, stream: Any) -> None:
        try:
            twin = stream.get_extra_info("socket").dup()
        except OSError as error:  # too many open files
            raise httpx.ConnectError(str(error)) from error
        with self._lock:
            self._socket = twin
            over = self.over
        if over:
            self.end()

    def _let_send(self) -> None:
        try:
            self._before_sending()
        except BaseException as refusal:
            self.refusal = refusal
            raise
        if self.over:
            raise httpx.ConnectTimeout("the time was over before the request was sent")

    def end(self) -> None:
        """Shuts the connection, as the time is over."""
        with self._lock:
            self.over = True
            if self._socket:
                with suppress(OSError):  # it is shut already
                    self._socket.shutdown(socket.SHUT_RDWR)


class _Deadlines:
    """One thread that ends every exchange of this process whose time is over.

    A timer for each would be one more thread for each request, and a switch of threads to start it.
    """

    def __init__(self) -> None:
        self._due: dict[_Watch, float] = {}
        self._wakes = math.inf
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, watch: _Watch, seconds: float) -> None:
        """Ends an exchange after so many seconds."""
        with self._changed:
            self._due[watch] = at = monotonic() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="segmind-deadlines", daemon=True)
                self._thread.start()
            if at < self._wakes:
                self._changed.notify()

    def forget(self, watch: _Watch) -> None:
        """Lets an exchange be: it has ended."""
        with self._changed:
            self._due.pop(watch, None)

    def _run(self) -> None:
        while True:
            with self._changed:
                now = monotonic()
                over = [watch for watch, at in self._due.items() if at <= now]
                for watch in over:
                    del self._due[watch]
                self._wakes = min(self._due.values(), default=math.inf)
                if not over:
                    self._changed.wait(min(self._wakes - now, threading.TIMEOUT_MAX))
            for watch in over:
                watch.end()


_deadlines = _Deadlines()


def _after_fork() -> None:
    """Let a copy of the process have a thread of its own."""
    global _deadlines
    _deadlines = _Deadlines()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
