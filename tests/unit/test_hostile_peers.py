"""Whatever a peer sends over a real socket, there is a result, or an error of ours that is right about the money."""

from __future__ import annotations

import base64
import gzip
import random
import socket
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.request import ImageToImageRequest
from prefect_segmind.errors import SegmindError
from prefect_segmind.images.inspection import read_picture
from prefect_segmind.storage.http import Destination, DownloadError, download_bytes
from tests.support.wire import Wire, http, http_json

KEY = "SG_0123456789abcdef"
REQUEST = ImageToImageRequest(image_file="https://example.com/mug.jpg", prompt="a red mug", seed=4711)
LIMIT = 100_000


def drawn(format: str) -> bytes:
    file = BytesIO()
    Image.frombytes("RGB", (12, 9), random.Random(7).randbytes(3 * 12 * 9)).save(file, format)
    return file.getvalue()


PNG, JPEG = drawn("PNG"), drawn("JPEG")
CODED = base64.b64encode(PNG).decode()
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n" + PNG[:5] + b"\r\n"
WHOLE = (
    http(PNG, x_cost='["0.05"]', x_request_id="r-1", x_seed_value="4711", Date="Sat, 01 Mar 2025 12:00:00 GMT"),
    http(JPEG, Set_Cookie="a=b; Path=/"),
    http(gzip.compress(PNG), Content_Encoding="gzip"),
    http_json({"image": CODED}, x_cost="0.04"),
    http_json({"data": [{"url": None, "is_image_safe": False}]}),
    http_json({"output": "https://cdn.example/a.png"}),
    http_json({"credits": 1.2, "free-credits": 0.5}),
    CHUNKED + f"{len(PNG) - 5:x}\r\n".encode() + PNG[5:] + b"\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n" + PNG,
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + http(PNG),
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n" + PNG,
    http_json(
        {"error": "slow down"}, "429 Too Many", Retry_After="7", x_rate_limit_reset_at_utc="2025-03-01T12:00:30Z"
    ),
    http(b"<html><h1>Bad Gateway</h1></html>", "502 Bad Gateway"),
    http(gzip.compress(b'{"error": "no"}'), "406 No", Content_Encoding="gzip"),
    http(b"", "302 Found", Location="https://cdn.example/b.png"),
    http(b"", "204 No Content"),
)
ODD = (
    *(
        b"\r\n",
        b"\0",
        b"\xff",
        b":",
        b": ",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b"-1",
        b"0",
        b"9" * 25,
        b"9" * 5000,
        b"[" * 3000,
    ),
    *(
        b"chunked",
        b"HTTP/0.9 ",
        b"HTTP/1.1 100 \r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/2 200\r\n",
        b" folded\r\n",
    ),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"ffffffffffffffffffff\r\n"),
    *(b"Content-Length: -1\r\n", b"Content-Length: 5\r\nContent-Length: 6\r\n", b"Content-Length: 5, 5\r\n"),
    *(b"Content-Encoding: br\r\n", b"Content-Encoding: gzip, deflate\r\n", b"\x1f\x8b\x08", b"x\x9c"),
    *(b"Location: mailto:a@b\r\n", b"Location: https://xn--a/\r\n", b"Location: data:,x\r\n", b"https://[::1"),
    *(b"x-cost: 1e-999999\r\n", b"x-cost: " + b"[" * 5000 + b"\r\n", b"Retry-After: 1e999\r\n"),
    b"x-request-id: " + KEY.encode() + b"\x1b[2J\r\n",
    *(b"Set-Cookie: =\xff; expires=\0\r\n", b"Date: Mon, 99 Foo 99999 99:99:99 +9999\r\n"),
    *(b"X: " + b"a" * 200_000 + b"\r\n", b"X: a\r\n" * 3000, b'{"image":' * 2000, b"data:image/png;base64,"),
)


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """An answer that a server may give, and what a hostile one makes of it; or nothing of the kind."""
    answer = draw(st.sampled_from(WHOLE) | st.binary(max_size=200))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(answer)))
        if start > 200 and draw(st.booleans()):
            start %= 200  # the head, mostly
        end = draw(st.integers(start, min(len(answer), start + 40)))
        what = draw(st.sampled_from(ODD) | st.binary(max_size=6) | st.just(answer[start:end] * 2))
        answer = answer[:start] + what + answer[end:]
    return answer[: draw(st.integers(0, len(answer)))] if draw(st.integers(0, 3)) == 0 else answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """Where every address leads to, if anywhere."""
    real = socket.getaddrinfo

    def resolve(host: Any, *rest: Any, **more: Any) -> Any:
        if host in ("127.0.0.1", b"127.0.0.1"):
            return real(host, *rest, **more)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("prefect_segmind.api.client._LINK_WAITS", ())
    with Wire(b"") as server:
        yield server


T = TypeVar("T")
E = TypeVar("E", bound=Exception)


def outcome(call: Callable[[], T], kind: type[E]) -> tuple[T, None] | tuple[None, E]:
    """What a call returns or raises, which is of this kind."""
    try:
        return call(), None
    except kind as error:
        return None, error


MANY = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.many
@MANY
@given(answer=answers())
def test_a_request_ends_with_a_picture_or_an_error_of_ours_that_is_right_about_the_money(
    answer: bytes, server: Wire, tmp_path: Path
) -> None:
    server.answers, part = [answer], tmp_path / "picture.part"
    with SegmindClient(KEY, f"{server.url}/v1", total_timeout=10.0) as client:
        paid, error = outcome(lambda: client.generate(REQUEST, part), SegmindError)
    if error is None:
        assert paid is not None
        assert read_picture(part).sha256 == paid.sha256
        assert 0 <= paid.cost_usd < 1000
    else:
        assert KEY not in f"{error}{error.request_id}{error.answered}"
        assert str(error).isprintable()
        if error.status in (None, 200, 502, 504):
            assert error.possibly_billed or error.answered is not None, "it had been sent"


@pytest.mark.many
@MANY
@given(answer=answers())
def test_the_credits_are_an_amount_or_an_error_of_ours_that_was_never_billed(answer: bytes, server: Wire) -> None:
    server.answers = [answer]
    with SegmindClient(KEY, f"{server.url}/v1", total_timeout=10.0) as client:
        amount, error = outcome(client.credits, SegmindError)
    if error is None:
        assert amount is not None
        assert abs(amount) < 10**13
    else:
        assert KEY not in f"{error}{error.request_id}"
        assert str(error).isprintable()
        assert not error.possibly_billed


@pytest.mark.many
@MANY
@given(answer=answers())
def test_a_download_is_some_bytes_or_an_error_of_ours(answer: bytes, server: Wire) -> None:
    server.answers, anywhere = [answer], Destination(allow_loopback=True)
    data, error = outcome(lambda: download_bytes(f"{server.url}/a", limit=LIMIT, destination=anywhere), DownloadError)
    if error is None:
        assert data is not None
        assert len(data) <= LIMIT
    else:
        assert len(str(error)) < 1000
        assert str(error).isprintable()


@pytest.mark.many
@MANY
@given(answer=answers())
def test_a_linked_picture_is_one_or_an_error_of_ours_and_the_answer_is_paid(
    answer: bytes, server: Wire, tmp_path: Path
) -> None:
    server.answers = [http_json({"url": f"{server.url}/a"}), answer]
    with SegmindClient(KEY, f"{server.url}/v1", total_timeout=10.0) as client:
        _, error = outcome(lambda: client.generate(REQUEST, tmp_path / "picture.part"), SegmindError)
    assert error is None or error.answered is not None
