"""HTTP/1.1 as the stubs speak it: one process, one event loop, answers after a given time, everything counted.

It knows what clients of the benchmark send (httpx, requests, boto3) and no more: bodies with a length or in chunks,
`Expect: 100-continue`, connections that are kept or closed. It is no server for anything else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

_PIECE = 1 << 22
"""Bytes that a socket takes at once, if the system lets it: a picture is then one call to `send`."""


class Request(NamedTuple):
    """A request that was read to its end.

    Attributes:
        method: Such as `GET`.
        path: Its path, decoded.
        query: Its query, decoded.
        headers: Its headers, with names in lower case.
        body: Its body, without chunks.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


class Answer(NamedTuple):
    """An answer, which is sent when its time has come.

    Attributes:
        status: The HTTP status.
        body: The body; of an answer to HEAD it is the length that counts.
        headers: Headers beside `Date`, `Content-Length` and `Connection`.
        delay: Seconds from the request's last byte to the answer.
        counted: The name under which it is counted; None if it is not.
    """

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0
    counted: str | None = None


@dataclass
class Traffic:
    """What has been asked and answered.

    Times are those of `time.monotonic`, which all processes of a machine share.

    Attributes:
        requests: The number of requests by name.
        in_flight: Requests that wait for their answer now.
        peak: The most that have waited at once.
        first: When the first request had been read; None before that.
        last: When the last answer was sent; None before that.
        late: Seconds by which answers were sent later than they were due, in all.
        latest: Seconds by which the latest one was. Where this is much, the stub or the machine was too slow.
        answered: The number of answers that were sent.
    """

    requests: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0
    peak: int = 0
    first: float | None = None
    last: float | None = None
    late: float = 0.0
    latest: float = 0.0
    answered: int = 0

    def begin(self, name: str) -> None:
        """Counts a request that has been read."""
        if self.first is None:
            self.first = time.monotonic()
        self.requests[name] = self.requests.get(name, 0) + 1
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)

    def end(self, due: float | None) -> None:
        """Counts its answer, or that its client has gone.

        Args:
            due: When the answer was due; None if nobody was there to get it.
        """
        self.in_flight -= 1
        if due is not None:
            self.last = time.monotonic()
            self.answered += 1
            self.late += self.last - due
            self.latest = max(self.latest, self.last - due)

    def as_json(self) -> Answer:
        """The figures as the body of an answer, with the CPU seconds of this process."""
        figures = {
            "requests": self.requests,
            "answered": self.answered,
            "peak_in_flight": self.peak,
            "first_request": self.first,
            "last_answer": self.last,
            "mean_late_seconds": self.late / max(self.answered, 1),
            "most_late_seconds": self.latest,
            "cpu_seconds": time.process_time(),
        }
        return Answer(body=json.dumps(figures).encode(), headers=(("Content-Type", "application/json"),))


class Connection(asyncio.Protocol):
    """A client's connection: one request after the other.

    Args:
        answer: Answers a request.
        traffic: Counts it.
    """

    def __init__(self, answer: Callable[[Request], Answer], traffic: Traffic) -> None:
        self._answer = answer
        self._traffic = traffic
        self._received = bytearray()
        self._head: tuple[str, str, dict[str, str]] | None = None
        self._waits: asyncio.TimerHandle | None = None
        self._counted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Is called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(_PIECE)
        connection = transport.get_extra_info("socket")
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIECE)

    def data_received(self, data: bytes) -> None:
        """Is called by asyncio."""
        self._received += data
        if not self._waits:
            self._read()

    def connection_lost(self, error: Exception | None) -> None:
        """Is called by asyncio."""
        if self._waits:
            self._waits.cancel()
            if self._counted:
                self._traffic.end(None)

    def _read(self) -> None:
        """Answers the request that has been received, if it is there to its end."""
        if self._head is None:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            line, *lines = self._received[:end].decode("latin-1").split("\r\n")
            del self._received[: end + 4]
            method, target, _ = line.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
            self._head = method, target, headers
            if headers.get("expect", "").lower() == "100-continue":
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        method, target, headers = self._head
        body = self._body(headers)
        if body is None:
            return
        self._head = None
        url = urlsplit(target)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        answer = self._answer(Request(method, unquote(url.path), query, headers, body))
        self._counted = answer.counted is not None
        if answer.counted is not None:
            self._traffic.begin(answer.counted)
        loop = asyncio.get_running_loop()
        due, closes = time.monotonic() + answer.delay, headers.get("connection", "").lower() == "close"
        if answer.delay > 0:
            self._waits = loop.call_later(answer.delay, self._send, answer, method, closes, due)
        else:
            self._send(answer, method, closes, due)

    def _body(self, headers: dict[str, str]) -> bytes | None:
        """The body of the request, taken out of what was received; None if it is not there to its end."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            found = _joined(bytes(self._received))
            if found is None:
                return None
            body, length = found
        else:
            length = int(headers.get("content-length", "0"))
            if len(self._received) < length:
                return None
            body = bytes(self._received[:length])
        del self._received[:length]
        return body

    def _send(self, answer: Answer, method: str, closes: bool, due: float) -> None:
        self._waits = None
        ends = "close" if closes else "keep-alive"
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}", f"Date: {_date(int(time.time()))}"]
        lines += [f"{name}: {value}" for name, value in answer.headers]
        if answer.status != HTTPStatus.NO_CONTENT:
            lines.append(f"Content-Length: {len(answer.body)}")
        lines.append(f"Connection: {ends}\r\n\r\n")
        self._transport.write("\r\n".join(lines).encode())
        if method != "HEAD" and answer.body:
            self._transport.write(answer.body)
        if self._counted:
            self._traffic.end(due)
        if closes:
            self._transport.close()
        elif self._received:
            self._read()


def unchunked(body: bytes) -> bytes:
    """The content of a body in chunks: those of HTTP, and those of AWS, which are signed and may have a trailer.

    Args:
        body: The body, to its end.

    Example:
        >>> unchunked(b"4;chunk-signature=0f\\r\\nblue\\r\\n0\\r\\nx-amz-checksum-crc32:aaaa==\\r\\n\\r\\n")
        b'blue'
    """
    found = _joined(body)
    return b"" if found is None else found[0]


def _joined(body: bytes) -> tuple[bytes, int] | None:
    """The content of chunks, and how many bytes they take; None if their end is not there yet."""
    pieces, at = list[bytes](), 0
    while (end := body.find(b"\r\n", at)) >= 0:
        size = int(body[at:end].partition(b";")[0], 16)
        if size == 0:
            end = body.find(b"\r\n\r\n", end)
            return None if end < 0 else (b"".join(pieces), end + 4)
        pieces.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return None


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    """The time as an HTTP date, put together once a second."""
    return formatdate(second, usegmt=True)


def options(description: str | None) -> argparse.ArgumentParser:
    """The command line of a stub, with what each of them has.

    Args:
        description: What it is, of which the first line is shown.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0 for one that is free; it is the first line of output")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds from a request to its answer")
    return parser


def serve(answer: Callable[[Request], Answer], traffic: Traffic, port: int) -> None:
    """Serves on loopback until SIGTERM or Ctrl-C, and prints the port first.

    Args:
        answer: Answers a request, at once.
        traffic: Counts the requests.
        port: The port; 0 for one that is free.
    """
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(answer, traffic, port))


async def _serve(answer: Callable[[Request], Answer], traffic: Traffic, port: int) -> None:
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    server = await loop.create_server(lambda: Connection(answer, traffic), "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await over.wait()
    server.close()  # it does not wait for connections that are kept: `asyncio.run` ends them
