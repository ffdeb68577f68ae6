"""The API of the harness: real HTTP on loopback, scripted answers, and a ledger of its own of what it has billed."""

from __future__ import annotations

import base64
import random
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from io import BytesIO
from typing import Any

from PIL import Image

from tests.support.wire import http, http_json, read_request

PRICE = Decimal("0.05")


@dataclass(frozen=True)
class Answer:
    """What the API answers to one request, and what it has done.

    Attributes:
        wire: The answer as it goes over the wire; after it the connection is closed.
        billed: Whether the request was billed.
        picture: The picture that the whole answer brings; None if it brings none.
        is_settled: Whether the answer, once it has arrived, says what the request has cost.
    """

    wire: bytes
    billed: bool = True
    picture: bytes | None = None
    is_settled: bool = True


@lru_cache(maxsize=64)
def picture(number: int) -> bytes:
    """The picture that the API makes for its request of this number: each another one, in three reads of the wire."""
    noise = random.Random(number).randbytes(20 * 20 * 3)
    file = BytesIO()
    Image.frombytes("RGB", (20, 20), noise).save(file, "PNG")
    return file.getvalue()


HEADERS: dict[str, Any] = {"x_cost": f"{PRICE}", "x_request_id": "r-1"}
Make = Callable[[int, str], Answer]
"""Makes the answer to the request of a number, at the API's address."""


def plain(number: int, _: str) -> Answer:
    return Answer(http(picture(number), content_type="image/png", **HEADERS), picture=picture(number))


def rate_limited(*_: object) -> Answer:
    return Answer(http(b'{"error": "slow down"}', "429 Too Many Requests", Retry_After="1"), billed=False)


def bad_gateway(*_: object) -> Answer:
    return Answer(http(b"<html>502</html>", "502 Bad Gateway"), billed=False, is_settled=False)


def bad_gateway_billed(*_: object) -> Answer:
    return Answer(http(b"<html>502</html>", "502 Bad Gateway"), is_settled=False)


def cut(number: int, _: str) -> Answer:
    whole = http(picture(number), content_type="image/png", **HEADERS)
    return Answer(whole[: -len(picture(number)) // 2], is_settled=False)


def whole_then_cut(number: int, _: str) -> Answer:
    data = picture(number)
    return Answer(http(data, length=len(data) + 1, content_type="image/png", **HEADERS), picture=data)


def failed(*_: object) -> Answer:
    return Answer(http(b'{"error": "inference failed"}', "500 Internal Server Error"), billed=False)


def html(*_: object) -> Answer:
    return Answer(http(b"<html>Welcome</html>", content_type="text/html", **HEADERS))


def unusable(*_: object) -> Answer:
    return Answer(http_json({"artifact": {"payload": "AAAA"}}, **HEADERS))


def base64_json(number: int, _: str) -> Answer:
    coded = base64.b64encode(picture(number)).decode()
    return Answer(http_json({"image": coded}, **HEADERS), picture=picture(number))


def link(number: int, origin: str) -> Answer:
    return Answer(http_json({"image_url": f"{origin}/results/{number}"}, **HEADERS), picture=picture(number))


SCENARIOS: dict[str, tuple[Make, ...]] = {
    "plain": (),
    "429": (rate_limited,),
    "502": (bad_gateway,),
    "502 billed": (bad_gateway_billed,),
    "cut": (cut,),
    "whole, then cut": (whole_then_cut,),
    "500": (failed,),
    "HTML": (html,),
    "unusable": (unusable,),
    "base64": (base64_json, base64_json, base64_json),
    "link": (link, link, link),
}
"""The answers to the first requests; every further one is answered with a plain picture."""


@dataclass(frozen=True)
class Seen:
    """A request that has reached the API.

    Attributes:
        port: The port that the client has used, by which the harness knows its side of the exchange.
        answer: What was answered.
    """

    port: int
    answer: Answer


class Api:
    """Answers each POST by the script of the scenario, and serves the pictures that its links lead to."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.origin = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = f"{self.origin}/v1"
        self.seen: list[Seen] = []
        self._script: list[Make] = []
        self._ended: set[int] = set()
        self._change = threading.Condition()
        threading.Thread(target=self._accept, name="faults-api", daemon=True).start()

    def begin(self, scenario: str) -> None:
        """Begins a scenario with an empty ledger."""
        with self._change:
            self.seen, self._script, self._ended = [], list(SCENARIOS[scenario]), set()

    @property
    def billed(self) -> list[Seen]:
        """Its ledger: the requests that were billed."""
        return [each for each in self.seen if each.answer.billed]

    @property
    def pictures(self) -> list[bytes]:
        """The pictures that it has made."""
        return [each.answer.picture for each in self.seen if each.answer.picture is not None]

    def settle(self, ports: set[int]) -> None:
        """Waits until it has done with the connections of these ports."""
        with self._change:
            assert self._change.wait_for(lambda: ports <= self._ended, 20), "the API of the harness hangs"

    def _accept(self) -> None:
        while True:
            connection, (_, port) = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection, port), daemon=True).start()

    def _serve(self, connection: socket.socket, port: int) -> None:
        # A client that was interrupted may hold its end open for as long as somebody keeps the traceback.
        connection.settimeout(0.5)
        with connection, suppress(OSError):
            try:
                text = read_request(connection)
            except (OSError, UnicodeDecodeError):
                text = ""
            wire = b""
            with self._change:
                if text.startswith("POST ") and text.endswith("}"):
                    make = self._script.pop(0) if self._script else plain
                    answer = make(len(self.seen), self.origin)
                    self.seen.append(Seen(port, answer))
                    wire = answer.wire
                elif text.startswith("GET /results/"):
                    wire = http(picture(int(text.split()[1].rpartition("/")[2])), content_type="image/png")
                self._ended.add(port)
                self._change.notify_all()
            connection.sendall(wire)
