"""The API of the harness: real HTTP on loopback, scripted answers, and a ledger of its own of what it has billed."""

from __future__ import annotations

import base64
import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from io import BytesIO
from typing import Any, Literal
from urllib.parse import urlsplit

from PIL import Image

from tests.support.wire import http, http_json, read_request

PRICE = Decimal("0.05")
PATIENCE = 10.0
"""Seconds for which a client may stand still, on a machine that has much to do."""
HISTORY = "/inference-request/request-history"
NOT_FOUND = http(b'{"error": "not found"}', "404 Not Found")
POLLS_THAT_FAIL = {
    "404": NOT_FOUND,
    "429": http(b'{"error": "slow down"}', "429 Too Many Requests", Retry_After="1"),
    "502": http(b"<html>502</html>", "502 Bad Gateway"),
    "cut": b"",
}
"""Answers to a question that say nothing of the request."""


ListedAs = Literal["PENDING", "FAILED", "COMPLETED", "COMPLETED without a link", None]
"""How the request history lists a request; None if it does not."""


@dataclass(frozen=True)
class Answer:
    """What the API answers to one request, and what it has done.

    Attributes:
        wire: The answer as it goes over the wire; after it the connection is closed.
        billed: Whether the request was billed.
        picture: The picture that the whole answer brings, or that can be fetched by it; None if there is none.
        is_settled: Whether the answer, once it has arrived, says what the request has cost, or where to ask.
        request_id: The provider's id of the request, which the answer names.
        listed: How the request history lists the request, at each look at it from the first; the last one for ever. By
            default as a success if it was billed, and else not at all.
        polls: What is answered each time that somebody asks for its status (v2); the last one for ever.
    """

    wire: bytes
    billed: bool = True
    picture: bytes | None = None
    is_settled: bool = True
    request_id: str | None = None
    listed: tuple[ListedAs, ...] = ()
    polls: tuple[str, ...] = ("PROCESSING", "COMPLETED")

    def listed_at(self, look: int) -> ListedAs:
        """How the history lists it at a look, counted from 0."""
        listed = self.listed or ("COMPLETED" if self.billed else None,)
        return listed[min(look, len(listed) - 1)]

    @property
    def listed_at_last(self) -> ListedAs:
        """How the history lists it for ever."""
        return self.listed_at(len(self.listed))


@lru_cache(maxsize=64)
def picture(number: int) -> bytes:
    """The picture that the API makes for its request of this number: each another one, in three reads of the wire."""
    noise = random.Random(number).randbytes(20 * 20 * 3)
    file = BytesIO()
    Image.frombytes("RGB", (20, 20), noise).save(file, "PNG")
    return file.getvalue()


Make = Callable[[int, str], Answer]
"""Makes the answer to the request of a number, at the API's address."""


def named(number: int) -> str:
    """The provider's id of its request of this number."""
    return f"r-{number}"


def headers(number: int) -> dict[str, Any]:
    return {"x_cost": f"{PRICE}", "x_request_id": named(number)}


def plain(number: int, _: str) -> Answer:
    return Answer(http(picture(number), content_type="image/png", **headers(number)), picture=picture(number))


def rate_limited(*_: object) -> Answer:
    return Answer(http(b'{"error": "slow down"}', "429 Too Many Requests", Retry_After="1"), billed=False)


def bad_gateway(*_: object) -> Answer:
    return Answer(http(b"<html>502</html>", "502 Bad Gateway"), billed=False, is_settled=False, listed=("FAILED",))


def bad_gateway_billed(*_: object) -> Answer:
    return Answer(http(b"<html>502</html>", "502 Bad Gateway"), is_settled=False)


def cut(number: int, _: str) -> Answer:
    whole = http(picture(number), content_type="image/png", **headers(number))
    return Answer(whole[: -len(picture(number)) // 2], is_settled=False)


def lost(*_: object) -> Answer:
    return Answer(b"", is_settled=False)


def whole_then_cut(number: int, _: str) -> Answer:
    data = picture(number)
    return Answer(http(data, length=len(data) + 1, content_type="image/png", **headers(number)), picture=data)


def failed(*_: object) -> Answer:
    wire = http(b'{"error": "inference failed"}', "500 Internal Server Error")
    return Answer(wire, billed=False, listed=("FAILED",))


def html(number: int, _: str) -> Answer:
    return Answer(http(b"<html>Welcome</html>", content_type="text/html", **headers(number)))


def unusable(number: int, _: str) -> Answer:
    return Answer(http_json({"artifact": {"payload": "AAAA"}}, **headers(number)))


def base64_json(number: int, _: str) -> Answer:
    coded = base64.b64encode(picture(number)).decode()
    return Answer(http_json({"image": coded}, **headers(number)), picture=picture(number))


def link(number: int, origin: str) -> Answer:
    return Answer(http_json({"image_url": f"{origin}/results/{number}"}, **headers(number)), picture=picture(number))


def submitted(number: int, origin: str) -> Answer:
    here = f"{origin}/v2/requests/{named(number)}"
    addresses = {"status_url": f"{here}/status", "response_url": here, "poll_url": f"{here}/status"}
    wire = http_json({"request_id": named(number), "status": "QUEUED", **addresses})
    return Answer(wire, picture=picture(number), request_id=named(number))


def polled(*polls: str, billed: bool = True) -> Make:
    """A submission whose status is told so, each time that somebody asks for it."""

    def make(number: int, origin: str) -> Answer:
        answer = replace(submitted(number, origin), polls=polls, billed=billed)
        return answer if billed else replace(answer, picture=None, listed=("FAILED",))

    return make


def listed(make: Make, *at_each_look: ListedAs) -> Make:
    """The same answer, listed so in the history."""
    return lambda number, origin: replace(make(number, origin), listed=at_each_look)


@dataclass(frozen=True)
class Scenario:
    """What the API does.

    Attributes:
        answers: The answers to the first requests; every further one is answered with a plain picture.
        version: The version of the API that the base URL names.
        history: Whether there is a request history that the code may ask, and whether that answers.
    """

    answers: tuple[Make, ...] = ()
    version: Literal["v1", "v2"] = "v1"
    history: Literal["none", "answers", "is broken"] = "none"


WITHOUT_HISTORY = {
    "plain": Scenario(),
    "429": Scenario((rate_limited,)),
    "502": Scenario((bad_gateway,)),
    "502 billed": Scenario((bad_gateway_billed,)),
    "cut": Scenario((cut,)),
    "whole, then cut": Scenario((whole_then_cut,)),
    "500": Scenario((failed,)),
    "HTML": Scenario((html,)),
    "unusable": Scenario((unusable,)),
    "base64": Scenario((base64_json,) * 3),
    "link": Scenario((link,) * 3),
}
"""v1, and nobody to ask what became of a request."""
WITH_HISTORY = {
    f"{name}, history": Scenario(answers, history="answers")
    for name, answers in {
        **{name: each.answers for name, each in WITHOUT_HISTORY.items() if name not in ("base64", "whole, then cut")},
        "lost": (lost,),
        "lost, listed late": (listed(lost, None, None, "COMPLETED"),),
        "lost, pending": (listed(lost, "PENDING", "PENDING", "COMPLETED"),),
        "502 billed, never listed": (listed(bad_gateway_billed, None),),
        "HTML, no link": (listed(html, "COMPLETED without a link"),),
    }.items()
} | {"502 billed, history broken": Scenario((bad_gateway_billed,), history="is broken")}
"""v1, and the provider's history may be asked."""
SUBMITTED = {
    "v2": Scenario(),
    "v2 submit lost": Scenario((lost,)),
    "v2 502 after acceptance": Scenario((bad_gateway_billed,)),
    "v2 polls fail": Scenario((polled("502", "cut", "429", "COMPLETED"),)),
    "v2 failed": Scenario((polled("PROCESSING", "FAILED", billed=False),)),
    "v2 forgotten": Scenario((polled("404"),)),
}
SCENARIOS: dict[str, Scenario] = {
    **WITHOUT_HISTORY,
    **WITH_HISTORY,
    **{name: replace(each, version="v2", history="answers") for name, each in SUBMITTED.items()},
    **{f"{name}, no history": replace(SUBMITTED[name], version="v2") for name in ("v2", "v2 submit lost", "v2 failed")},
}
"""What may happen, by name."""


@dataclass(frozen=True)
class Seen:
    """A request that has reached the API.

    Attributes:
        number: Its number, from 0.
        port: The port that the client has used, by which the harness knows its side of the exchange.
        answer: What was answered.
        body: Its body.
        at: When it came, UTC.
    """

    number: int
    port: int
    answer: Answer
    body: Any
    at: datetime

    def row(self, origin: str, listed_as: ListedAs) -> dict[str, Any]:
        """Its row in the request history."""
        row: dict[str, Any] = {"request_id": named(self.number), "model_name": "ideogram-2a-img-2-img"}
        row |= {"model_status": str(listed_as).partition(" ")[0], "model_created": self.at.isoformat()}
        row |= {"request_body": self.body, "generation_url": None, "credits_deduction": 0.0}
        if row["model_status"] == "COMPLETED":
            row["credits_deduction"] = float(PRICE)
        if listed_as == "COMPLETED":
            row["generation_url"] = f"{origin}/results/{self.number}"
        return row


class Api:
    """Answers each POST by the script of the scenario, and whoever asks for a result, a picture or the history."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.origin = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.seen: list[Seen] = []
        self.scenario = Scenario()
        self.asked: list[str] = []
        self._script: list[Make] = []
        self._looks: Counter[int] = Counter()
        self._polls: Counter[int] = Counter()
        self._ended: set[int] = set()
        self._change = threading.Condition()
        threading.Thread(target=self._accept, name="faults-api", daemon=True).start()

    def begin(self, scenario: str) -> None:
        """Begins a scenario with an empty ledger."""
        with self._change:
            self.scenario = SCENARIOS[scenario]
            self.seen, self.asked, self._script, self._ended = [], [], list(self.scenario.answers), set()
            self._looks, self._polls = Counter(), Counter()

    @property
    def url(self) -> str:
        """The base URL."""
        return f"{self.origin}/{self.scenario.version}"

    @property
    def is_v2(self) -> bool:
        """Whether requests are submitted and polled for."""
        return self.scenario.version == "v2"

    @property
    def history_url(self) -> str | None:
        """Where the request history is; None if there is none."""
        return None if self.scenario.history == "none" else f"{self.origin}{HISTORY}"

    @property
    def billed(self) -> list[Seen]:
        """Its ledger: the requests that were billed."""
        return [each for each in self.seen if each.answer.billed]

    @property
    def pictures(self) -> list[bytes]:
        """The pictures that it has made, as far as somebody can have them."""
        return [
            picture(each.number)
            for each in self.seen
            if each.answer.picture is not None or self.tells(each) == "COMPLETED"
        ]

    @property
    def looks(self) -> int:
        """How often the history was asked."""
        return sum(each.startswith(HISTORY) for each in self.asked)

    def link(self, request: Seen) -> str:
        """The address of the picture of a request."""
        return f"{self.origin}/results/{request.number}"

    def tells(self, request: Seen) -> ListedAs:
        """What the history tells of a request in the end; None if it does not list it, or does not answer."""
        return request.answer.listed_at_last if self.scenario.history == "answers" else None

    def settle(self, ports: set[int]) -> None:
        """Waits until it has done with the connections of these ports."""
        with self._change:
            assert self._change.wait_for(lambda: ports <= self._ended, 2 * PATIENCE), "the API of the harness hangs"

    def _accept(self) -> None:
        while True:
            connection, (_, port) = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection, port), daemon=True).start()

    def _serve(self, connection: socket.socket, port: int) -> None:
        connection.settimeout(PATIENCE)
        with connection, suppress(OSError):
            try:
                text = read_request(connection)
            except (OSError, UnicodeDecodeError):
                text = ""
            wire = b""
            with self._change:
                if text.startswith("POST ") and text.endswith("}"):
                    wire = self._take(port, json.loads(text.partition("\r\n\r\n")[2]))
                elif text.startswith("GET "):
                    path = text.split()[1]
                    self.asked.append(path)
                    wire = self._tell(path)
                self._ended.add(port)
                self._change.notify_all()
            connection.sendall(wire)

    def _take(self, port: int, body: Any) -> bytes:
        """Takes a request that may be billed."""
        usual = submitted if self.scenario.version == "v2" else plain
        make = self._script.pop(0) if self._script else usual
        number = len(self.seen)
        answer = make(number, self.origin)
        self.seen.append(Seen(number, port, answer, body, datetime.now(UTC)))
        return answer.wire

    def _tell(self, path: str) -> bytes:
        """Answers a question, which costs nothing."""
        *_, before, last = urlsplit(path).path.split("/")
        if before == "results":
            return http(picture(int(last)), content_type="image/png")
        if path.startswith(HISTORY):
            return self._look(None if path.startswith(f"{HISTORY}?") else last)
        name = before if last == "status" else last
        found = next((each for each in self.seen if each.answer.request_id == name), None)
        if found is None:
            return NOT_FOUND
        polls = found.answer.polls
        told = polls[min(self._polls[found.number], len(polls) - 1)]
        if last == "status":
            self._polls[found.number] += 1
        if told in POLLS_THAT_FAIL:
            return POLLS_THAT_FAIL[told]
        document: dict[str, Any] = {"request_id": name, "status": told}
        if told == "COMPLETED" and last != "status":
            document |= {"output": f"{self.origin}/results/{found.number}", "metrics": {"cost": float(PRICE)}}
        return http_json(document, "422 Unprocessable Entity" if told == "FAILED" else "200 OK")

    def _look(self, name: str | None) -> bytes:
        """Answers with the rows of the history, or with that of one request."""
        if self.scenario.history != "answers":
            return http(b"<html>500</html>", "500 Internal Server Error")
        rows = []
        for each in reversed(self.seen):
            if name not in (None, named(each.number)):
                continue
            listed_as = each.answer.listed_at(self._looks[each.number])
            self._looks[each.number] += 1
            if listed_as is not None:
                rows.append(each.row(self.origin, listed_as))
        if name is None:
            return http_json({"data": rows})
        return http_json(rows[0]) if rows else NOT_FOUND
