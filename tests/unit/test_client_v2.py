"""Promises of v2 in `prefect_segmind.api.client`, over real HTTP on loopback: a submit may be billed, asking never."""

from __future__ import annotations

import base64
import errno
import gzip
import json
import logging
import pickle
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import SecretStr

from prefect_segmind import errors
from prefect_segmind.api import client as room
from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.history import HISTORY_SETTING, Outcome, Sought
from prefect_segmind.api.picture import Answered, PaidPicture
from prefect_segmind.api.request import ImageToImageRequest
from prefect_segmind.api.submission import Status, Submitted
from prefect_segmind.credentials import SegmindCredentials
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.settings import SegmindSettings
from tests.support.asking import ImageSource, inputs
from tests.support.waiting import until
from tests.support.wire import Wire, http, http_json

KEY = "SG_0123456789abcdef"
ODD_KEY = "a-key-of-another-form-0123456789"
REQUEST = ImageToImageRequest(image_file="https://example.com/mug.jpg", prompt="a red mug", seed=4711)
ANSWERED = Answered(
    cost_usd=Decimal("0.04"), cost_source="history", request_id="r-1", at=datetime(2026, 11, 23, tzinfo=UTC)
)


def encoded(format: str) -> bytes:
    file = BytesIO()
    Image.frombytes("RGB", (40, 40), random.Random(7).randbytes(4800)).save(file, format)
    return file.getvalue()


PNG = encoded("PNG")


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "picture.part"


@pytest.fixture
def server() -> Iterator[Wire]:
    with Wire(b"") as server:
        yield server


@pytest.fixture
def client(server: Wire) -> Iterator[SegmindClient]:
    with SegmindClient(KEY, f"{server.url}/v2", list_price_usd=Decimal("0.09")) as client:
        yield client


def named(server: Wire, request_id: str = "r-1") -> Submitted:
    here = f"{server.url}/v2/requests/{request_id}"
    return Submitted(request_id, f"{here}/status", here)


def queued(server: Wire, **other: Any) -> dict[str, Any]:
    return {**named(server)._asdict(), "status": "QUEUED", **other}


def completed(server: Wire, **other: Any) -> dict[str, Any]:
    return {"status": "COMPLETED", "output": f"{server.url}/a.png", "seed": 4711, "metrics": {"cost": 0.05}, **other}


def heads(server: Wire) -> list[str]:
    return [" ".join(each.split(" ")[:2]) for each in server.requests]


def asked(client: SegmindClient, call: str, server: Wire, part: Path) -> object:
    """What a call about the request brings, be it for its status or for its result."""
    return client.status(named(server)) if call == "status" else client.fetch(named(server), 4711, part)


class TestTheAddress:
    @pytest.mark.parametrize(
        ("path", "submits"),
        [("/v2", True), ("/v2/", True), ("/a/v2//", True), ("/v1", False), ("/v2/x", False), ("", False)],
    )
    def test_its_end_says_whether_requests_are_submitted(self, path: str, submits: bool) -> None:
        with SegmindClient(KEY, f"http://127.0.0.1:9{path}") as client:
            assert client.submits is submits

    @pytest.mark.parametrize(
        ("path", "asked"),
        [
            ("/v2", "/v1/get-user-credits"),
            ("/v2/", "/v1/get-user-credits"),
            ("/prefix/v2", "/prefix/v1/get-user-credits"),
            ("/v1", "/v1/get-user-credits"),
            ("", "/get-user-credits"),
        ],
    )
    def test_credits_are_those_of_v1(self, path: str, asked: str, server: Wire) -> None:
        server.answers = [http_json({"credits": 1.2})]
        with SegmindClient(KEY, f"{server.url}{path}") as client:
            assert client.credits() == Decimal("1.2")
        assert heads(server) == [f"GET {asked}"]


class TestSubmitting:
    @pytest.mark.parametrize("status", ["200 OK", "201 Created", "202 Accepted"])
    def test_what_is_sent_is_the_request_of_v1_and_what_comes_names_where_to_ask(
        self, status: str, server: Wire, client: SegmindClient
    ) -> None:
        server.answers = [http_json(queued(server), status)]
        assert client.submit(REQUEST) == named(server)
        head, _, body = server.requests[0].partition("\r\n\r\n")
        assert head.startswith("POST /v2/ideogram-2a-img-2-img HTTP/1.1\r\n")
        assert f"x-api-key: {KEY}" in head
        assert json.loads(body) == REQUEST.body()

    def test_a_request_noted_earlier_has_the_documented_addresses(self, server: Wire, client: SegmindClient) -> None:
        assert client.submitted("r-1") == named(server)
        for id in ("", "..", "a/b", "a?b", "a b", "x" * 201):
            with pytest.raises(ValueError, match="not the id"):
                client.submitted(id)

    def test_an_answer_that_was_whole_when_its_connection_broke_is_used(
        self, server: Wire, client: SegmindClient
    ) -> None:
        body = json.dumps(queued(server)).encode()
        server.answers = [http(body, length=len(body) + 1)]
        assert client.submit(REQUEST) == named(server)

    @pytest.mark.parametrize(
        "fields",
        [
            {"status_url": None},
            {"response_url": 7},
            {"request_id": None},
            {"request_id": "../credits"},
            {"status_url": "http://127.0.0.1:1/v2/requests/r-1/status"},
            {"response_url": "https://evil.example/r-1"},
            {"response_url": "/v2/requests/r-1"},
        ],
    )
    def test_an_answer_without_addresses_that_may_get_the_key_is_an_unknown_outcome(
        self, fields: dict[str, Any], server: Wire, client: SegmindClient
    ) -> None:
        server.answers = [http_json(queued(server, **fields))]
        with pytest.raises(errors.SubmissionUnknownError) as caught:
            client.submit(REQUEST)
        assert (caught.value.status, caught.value.possibly_billed) == (200, True)
        assert caught.value.request_id == (None if "request_id" in fields else "r-1")
        assert len(server.requests) == 1

    @pytest.mark.parametrize(
        "body", [b"", b"<html>hello</html>", b"[]", b'{"status": "QUEUED"}', PNG, b"x" * 2_000_000]
    )
    def test_any_other_answer_is_an_unknown_outcome(self, body: bytes, server: Wire, client: SegmindClient) -> None:
        server.answers = [http(body, x_request_id="r-9")]
        with pytest.raises(errors.SubmissionUnknownError, match="the provider's usage page shows") as caught:
            client.submit(REQUEST)
        assert (caught.value.possibly_billed, caught.value.request_id) == (True, "r-9")
        assert len(str(caught.value)) < 600

    @pytest.mark.parametrize(
        ("answer", "kind", "request_id"),
        [
            (b"", errors.AnswerCutError, None),
            (http(b'{"request_id": "r-', length=999, x_request_id="r-8"), errors.AnswerCutError, "r-8"),
            (http(b'{"request_id": "r-1"}', length=999, x_request_id="r-8"), errors.SubmissionUnknownError, "r-1"),
            (http(b'{"request_id": "r-', length=999, x_request_id="r 8"), errors.AnswerCutError, None),
            (http_json({"error": "no"}, "502 X", x_request_id="r-8"), errors.BadGatewayError, "r-8"),
            (http_json({"error": "no"}, "504 X"), errors.GatewayTimeoutError, None),
        ],
    )
    def test_a_lost_answer_is_an_unknown_outcome(
        self, answer: bytes, kind: type[errors.ApiError], request_id: str | None, server: Wire, client: SegmindClient
    ) -> None:
        server.answers = [answer]
        with pytest.raises(kind) as caught:
            client.submit(REQUEST)
        assert (caught.value.possibly_billed, caught.value.request_id) == (True, request_id)

    def test_an_answer_that_drips_is_an_unknown_outcome(self) -> None:
        with Wire(http(b'{"request_id": "', length=10**6), drip=b"a") as server:
            with (
                SegmindClient(KEY, f"{server.url}/v2", total_timeout=0.5) as client,
                pytest.raises(errors.AnswerCutError, match="took too long") as caught,
            ):
                client.submit(REQUEST)
            assert server.gone.wait(10)
        assert caught.value.possibly_billed

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, errors.BadRequestError),
            (401, errors.InvalidKeyError),
            (404, errors.EndpointNotFoundError),
            (422, errors.UnprocessableError),
            (429, errors.RateLimitError),
            (500, errors.InternalServerError),
            (503, errors.OverloadedError),
            (307, errors.UnexpectedStatusError),
        ],
    )
    def test_a_refusal_costs_nothing(
        self, status: int, kind: type[errors.ApiError], server: Wire, client: SegmindClient
    ) -> None:
        server.answers = [http_json({"error": "no"}, f"{status} X", Retry_After="7")]
        with pytest.raises(kind) as caught:
            client.submit(REQUEST)
        assert (caught.value.status, caught.value.possibly_billed, caught.value.retry_after) == (status, False, 7)

    def test_what_forbids_it_just_before_it_is_sent_is_raised_as_it_is(
        self, server: Wire, client: SegmindClient
    ) -> None:
        def forbid() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            client.submit(REQUEST, forbid)
        assert not any("POST" in each for each in server.requests)

    def test_a_server_that_repeats_the_key_does_not_bring_it_into_an_error(self, server: Wire) -> None:
        server.answers = [http_json({"request_id": ODD_KEY, "text": ODD_KEY}, x_request_id=ODD_KEY)]
        with (
            SegmindClient(ODD_KEY, f"{server.url}/v2") as client,
            pytest.raises(errors.SubmissionUnknownError) as caught,
        ):
            client.submit(REQUEST)
        assert ODD_KEY[:10] not in str(caught.value)
        assert caught.value.request_id is None


class TestAsking:
    @pytest.mark.parametrize("status", Status)
    def test_tells_how_far_it_is(self, status: Status, server: Wire, client: SegmindClient) -> None:
        server.answers = [http_json({"status": status.value, "metrics": {}})]
        assert client.status(named(server)) is status
        assert heads(server) == ["GET /v2/requests/r-1/status"]
        assert f"x-api-key: {KEY}" in server.requests[0]

    @pytest.mark.parametrize("answer", ["422 X", "500 X"])
    def test_the_body_counts_before_the_code(self, answer: str, server: Wire, client: SegmindClient) -> None:
        server.answers = [http_json({"status": "COMPLETED"}, answer)]
        assert client.status(named(server)) is Status.COMPLETED

    def test_a_status_that_was_whole_when_its_connection_broke_is_used(
        self, server: Wire, client: SegmindClient
    ) -> None:
        server.answers = [http(b'{"status": "PROCESSING"}', length=999)]
        assert client.status(named(server)) is Status.PROCESSING

    @pytest.mark.parametrize(
        "answer",
        [
            http_json({"status": "FAILED", "error": "NSFW content detected"}, "422 X"),
            http_json({"status": "FAILED", "error": "NSFW content detected"}),
        ],
    )
    @pytest.mark.parametrize("call", ["status", "fetch"])
    def test_a_request_that_has_failed_is_not_billed(
        self, call: str, answer: bytes, server: Wire, client: SegmindClient, part: Path
    ) -> None:
        server.answers = [answer]
        with pytest.raises(errors.UnprocessableError, match="NSFW content detected") as caught:
            asked(client, call, server, part)
        error = caught.value
        assert (error.status, error.possibly_billed, error.request_id, error.answered) == (422, False, "r-1", None)

    @pytest.mark.parametrize("call", ["status", "fetch"])
    def test_a_422_that_does_not_say_failed_proves_nothing(
        self, call: str, server: Wire, client: SegmindClient, part: Path
    ) -> None:
        server.answers = [http(b'{"detail": "not a UUID"}', "422 X")]
        with pytest.raises(errors.AnswerCutError, match="without the status or result") as caught:
            asked(client, call, server, part)
        assert not caught.value.possibly_billed

    @pytest.mark.parametrize("call", ["status", "fetch"])
    @pytest.mark.parametrize("body", [b"", b'{"error": "not found"}', b"<html>"])
    def test_a_request_that_is_forgotten_is_told_as_such(
        self, body: bytes, call: str, server: Wire, client: SegmindClient, part: Path
    ) -> None:
        server.answers = [http(body, "404 X")]
        with pytest.raises(errors.ForgottenError) as caught:
            asked(client, call, server, part)
        assert (caught.value.status, caught.value.possibly_billed, caught.value.request_id) == (404, False, "r-1")

    @pytest.mark.parametrize("call", ["status", "fetch"])
    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (http_json({"status": "FAILED", "error": "bad key"}, "401 X"), errors.InvalidKeyError),
            (http_json({"status": "COMPLETED"}, "403 X"), errors.PermissionDeniedError),
            (http_json({"status": "FAILED"}, "429 X", Retry_After="7"), errors.RateLimitError),
            (http_json({"status": "QUEUED"}, "500 X"), errors.InternalServerError),
            (http(b"", "502 X"), errors.BadGatewayError),
            (http(b"", "503 X", Retry_After="7"), errors.OverloadedError),
            (http(b"", "504 X"), errors.GatewayTimeoutError),
            (http(b"", "529 X"), errors.OverloadedError),
            (http(b"", "302 X", Location="https://evil.example/"), errors.UnexpectedStatusError),
            (http(b'{"status": "COMPL', length=99, x_request_id="r-of-the-asking"), errors.AnswerCutError),
            (http(b"<html>hello</html>"), errors.AnswerCutError),
            (http_json({"status": "ok"}), errors.AnswerCutError),
            (http(b""), errors.AnswerCutError),
            (b"", errors.AnswerCutError),
        ],
    )
    def test_what_fails_says_nothing_of_the_request_and_costs_nothing(
        self, answer: bytes, kind: type[errors.ApiError], call: str, server: Wire, client: SegmindClient, part: Path
    ) -> None:
        server.answers = [answer]
        with pytest.raises(kind) as caught:
            asked(client, call, server, part)
        assert type(caught.value) is kind
        assert (caught.value.possibly_billed, caught.value.answered) == (False, None)
        assert caught.value.request_id == "r-1", "not that of the asking"
        assert caught.value.retry_after == (7 if b"Retry-After" in answer else None)
        assert len(server.requests) == 1

    def test_a_status_without_an_end_is_not_read_to_it(self, server: Wire, client: SegmindClient) -> None:
        server.answers = [http(b'{"status": "' + b"x" * 20_000_000 + b'"}')]
        with pytest.raises(errors.AnswerCutError, match="without the status") as caught:
            client.status(named(server))
        assert len(str(caught.value)) < 600

    def test_a_look_that_hangs_ends_soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(room, "_STATUS_SECONDS", 0.2)
        with (
            Wire(b"", silent=True) as silent,
            SegmindClient(KEY, f"{silent.url}/v2") as asking,
            pytest.raises(errors.AnswerCutError, match="took too long"),
        ):
            asking.status(named(silent))

    @pytest.mark.parametrize("call", ["status", "fetch"])
    def test_no_other_origin_is_asked(self, call: str, client: SegmindClient, part: Path) -> None:
        with Wire(http_json({"status": "COMPLETED"})) as other, pytest.raises(errors.ApiError, match="another origin"):
            asked(client, call, other, part)
        assert not other.requests

    def test_nobody_there_costs_nothing(self) -> None:
        with SegmindClient(KEY, "http://127.0.0.1:1/v2") as client, pytest.raises(errors.ApiUnreachableError) as caught:
            client.status(client.submitted("r-1"))
        assert not caught.value.possibly_billed


class TestFetching:
    @pytest.mark.parametrize("form", ["output", "images", "both", "inline", "no status", "packed"])
    def test_every_form_of_a_result_ends_as_the_same_picture(
        self, form: str, server: Wire, client: SegmindClient, part: Path
    ) -> None:
        images = [{"url": f"{server.url}/a.png", "content_type": "image/png", "file_name": "a.png", "file_size": 9}]
        result = completed(server)
        if form == "images":
            result |= {"output": None, "images": images}
        elif form == "both":
            result |= {"images": images}
        elif form == "inline":
            result |= {"output": f"data:image/png;base64,{base64.b64encode(PNG).decode()}"}
        elif form == "no status":
            del result["status"]
        body = json.dumps(result).encode()
        server.answers = [http(gzip.compress(body) if form == "packed" else body), http(PNG)]
        picture = client.fetch(named(server), 4711, part)
        assert part.read_bytes() == PNG
        assert (picture.width, picture.seed, picture.cost_usd, picture.cost_source, picture.request_id) == (
            *(40, 4711, Decimal("0.05")),
            *("metrics", "r-1"),
        )
        assert picture.notices == ()
        assert heads(server)[0] == "GET /v2/requests/r-1"
        if form != "inline":
            assert heads(server)[1] == "GET /a.png"
            assert KEY not in server.requests[1]

    def test_the_picture_itself_is_a_result_too(self, server: Wire, client: SegmindClient, part: Path) -> None:
        server.answers = [http(PNG, x_cost="0.04", x_seed_value="4711")]
        picture = client.fetch(named(server), 4711, part)
        assert (picture.cost_usd, picture.cost_source, picture.request_id) == (Decimal("0.04"), "x-cost", "r-1")

    @pytest.mark.parametrize("metrics", [None, {}, {"cost": "gratis"}, {"cost": -1}, [0.05]])
    def test_without_a_sensible_cost_it_is_the_list_price(
        self, metrics: object, server: Wire, client: SegmindClient, part: Path
    ) -> None:
        server.answers = [http_json(completed(server, metrics=metrics)), http(PNG)]
        picture = client.fetch(named(server), 4711, part)
        assert (picture.cost_usd, picture.cost_source) == (Decimal("0.09"), "list price")

    def test_another_seed_than_the_one_asked_for_is_told(self, server: Wire, client: SegmindClient, part: Path) -> None:
        server.answers = [http_json(completed(server, seed=5000)), http(PNG)]
        picture = client.fetch(named(server), 4711, part)
        assert picture.seed == 5000
        assert picture.notices == ("the provider reports seed 5000 where 4711 was asked for",)

    def test_a_result_that_was_whole_when_its_connection_broke_is_used(
        self, server: Wire, client: SegmindClient, part: Path
    ) -> None:
        body = json.dumps(completed(server)).encode()
        server.answers = [http(body, length=len(body) + 1), http(PNG)]
        picture = client.fetch(named(server), 4711, part)
        assert "the connection broke when the answer had arrived whole" in picture.notices[0]

    @pytest.mark.parametrize(
        "answer",
        [
            http_json({"status": "PROCESSING"}),
            http_json({"status": "QUEUED"}, "202 X"),
            http_json({"status": "PROCESSING"}, "422 X"),
        ],
    )
    def test_one_that_is_not_completed_yet_can_be_asked_again(
        self, answer: bytes, server: Wire, client: SegmindClient, part: Path
    ) -> None:
        server.answers = [answer, http_json(completed(server)), http(PNG)]
        with pytest.raises(errors.AnswerCutError, match=r"PROCESSING|QUEUED") as caught:
            client.fetch(named(server), 4711, part)
        assert (caught.value.possibly_billed, caught.value.answered) == (False, None)
        assert client.fetch(named(server), 4711, part).width == 40

    @pytest.mark.parametrize(
        "result", [{"output": None}, {"output": "no picture"}, {"data": [{"is_image_safe": False}]}]
    )
    def test_a_completed_one_without_a_picture_is_paid_and_kept(
        self, result: dict[str, Any], server: Wire, client: SegmindClient, part: Path
    ) -> None:
        body = {"status": "COMPLETED", "metrics": {"cost": 0.04}, **result}
        server.answers = [http_json(body)]
        with pytest.raises(errors.NotAnImageError) as caught:
            client.fetch(named(server), 4711, part)
        assert caught.value.answered is not None
        assert (caught.value.answered.cost_usd, caught.value.possibly_billed) == (Decimal("0.04"), False)
        assert json.loads(part.read_bytes()) == body

    def test_half_a_picture_in_a_completed_one_is_paid(self, server: Wire, client: SegmindClient, part: Path) -> None:
        half = base64.b64encode(PNG[: len(PNG) // 2]).decode()
        server.answers = [http_json(completed(server, output=half))]
        with pytest.raises(errors.AnswerCutError, match="ends early") as caught:
            client.fetch(named(server), 4711, part)
        assert caught.value.answered is not None
        assert not caught.value.possibly_billed

    def test_more_than_a_picture_can_have_is_not_read_to_its_end(
        self, server: Wire, client: SegmindClient, part: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(room, "ANSWER_LIMIT", 30_000)
        server.answers = [http(PNG + bytes(5_000_000))]
        with pytest.raises(errors.NotAnImageError, match="more than 30,000 bytes") as caught:
            client.fetch(named(server), 4711, part)
        assert (caught.value.possibly_billed, caught.value.request_id) == (False, "r-1")
        assert caught.value.answered is not None, "the request is finished, so it is billed"
        assert (caught.value.answered.cost_usd, caught.value.answered.cost_source) == (Decimal("0.09"), "list price")

    def test_a_result_that_cannot_be_read_from_the_disk_can_be_fetched_again(
        self, server: Wire, client: SegmindClient, part: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreadable(_: Path) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        server.answers = [http_json(completed(server))]
        monkeypatch.setattr(Path, "read_bytes", unreadable)
        with pytest.raises(errors.OutboxError, match="Input/output error") as caught:
            client.fetch(named(server), 4711, part)
        assert (caught.value.possibly_billed, caught.value.request_id) == (True, "r-1")

    def test_a_disk_that_fails_leaves_the_request_to_be_fetched_again(
        self, server: Wire, client: SegmindClient, tmp_path: Path
    ) -> None:
        server.answers = [http_json(completed(server))]
        with pytest.raises(errors.OutboxError) as caught:
            client.fetch(named(server), 4711, tmp_path / "gone" / "picture.part")
        assert caught.value.possibly_billed, "the request that was submitted"


LINKED = [
    pytest.param(http(b"", "403 X"), True, id="403"),
    pytest.param(http(b"", "404 X"), True, id="404"),
    pytest.param(http(b"", "410 X"), True, id="410"),
    pytest.param(http(b"<html>expired</html>"), True, id="no picture"),
    pytest.param(http(b"", "302 X", Location="http://10.0.0.8/a.png"), True, id="a private place"),
    pytest.param(http(b"", "503 X"), False, id="503"),
    pytest.param(http(b"", "429 X"), False, id="429"),
    pytest.param(http(b"", "408 X"), False, id="408"),
    pytest.param(http(PNG[: len(PNG) // 2]), False, id="half a picture"),
    pytest.param(http(PNG[:2000], length=len(PNG)), False, id="cut"),
    pytest.param(b"", False, id="nothing"),
]
"""What a link may lead to instead of the picture, and whether it is in vain to follow it again."""


class TestLinks:
    @pytest.fixture(autouse=True)
    def without_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(room, "_LINK_WAITS", (0.0, 0.0))

    @pytest.mark.parametrize(("answer", "gone"), LINKED)
    def test_a_result_whose_link_cannot_be_followed_is_paid_and_tells_whether_it_is_gone(
        self, answer: bytes, gone: bool, server: Wire, client: SegmindClient, part: Path
    ) -> None:
        body = completed(server, output=f"{server.url}/a.png?sig=secret")
        server.answers = [http_json(body), answer]
        with pytest.raises(errors.ResultLinkError) as caught:
            client.fetch(named(server), 4711, part)
        error = caught.value
        assert (error.gone, error.possibly_billed, error.request_id) == (gone, False, "r-1")
        assert error.answered is not None
        assert (error.answered.cost_usd, error.answered.cost_source) == (Decimal("0.05"), "metrics")
        assert "secret" not in str(error)
        assert json.loads(part.read_bytes()) == body
        assert len(server.requests) == (2 if gone else 4), "what may pass is tried again"

    @pytest.mark.parametrize(("answer", "gone"), LINKED)
    def test_a_link_of_the_history_is_followed_by_the_same_rules(
        self, answer: bytes, gone: bool, server: Wire, client: SegmindClient, part: Path
    ) -> None:
        server.answers = [answer]
        with pytest.raises(errors.ResultLinkError) as caught:
            client.download(f"{server.url}/a.png?sig=secret", part, ANSWERED, 4711)
        error = caught.value
        assert (error.gone, error.possibly_billed, error.answered) == (gone, False, ANSWERED)
        assert error.request_id == "r-1"
        assert "secret" not in str(error)
        assert pickle.loads(pickle.dumps(error)).gone is gone
        assert not any(KEY in each or "x-api-key" in each.lower() for each in server.requests)

    def test_a_link_of_the_history_leads_to_the_picture_and_its_facts(
        self, server: Wire, client: SegmindClient, part: Path
    ) -> None:
        server.answers = [b"", http(PNG)]
        picture = client.download(f"{server.url}/a.png?sig=1", part, ANSWERED, 4711)
        assert part.read_bytes() == PNG
        assert isinstance(picture, PaidPicture)
        assert (picture.seed, picture.cost_usd, picture.cost_source, picture.request_id, picture.paid_at) == (
            *(4711, Decimal("0.04"), "history"),
            *("r-1", ANSWERED.at),
        )
        assert server.requests[0].startswith("GET /a.png?sig=1 ")
        assert not any(KEY in each or "x-api-key" in each.lower() for each in server.requests)

    @pytest.mark.parametrize(
        "url",
        [
            "http://10.0.0.8/a.png",
            "https://169.254.169.254/latest",
            "http://127.0.0.1:1/a.png",
            "https://me:word@127.0.0.1/a.png",
            "ftp://example.com/a.png",
            "file:///etc/passwd",
            "/a.png",
            "",
        ],
    )
    def test_an_address_against_our_rules_is_gone(self, url: str, client: SegmindClient, part: Path) -> None:
        with pytest.raises(errors.ResultLinkError) as caught:
            client.download(url, part, ANSWERED, 4711)
        assert (caught.value.gone, caught.value.answered) == (True, ANSWERED)

    def test_a_link_that_could_not_be_followed_stays_to_be_followed_later(
        self, server: Wire, client: SegmindClient, part: Path
    ) -> None:
        server.answers = [b""]
        with pytest.raises(errors.ResultLinkError):
            client.download(f"{server.url}/a.png?sig=1", part, ANSWERED, 4711)
        server.answers = [http(PNG)]
        assert client.read(part, part.with_suffix(".found")).width == 40
        assert server.requests[-1].startswith("GET /a.png?sig=1 ")

    def test_a_disk_that_fails_is_told_as_such(self, client: SegmindClient, server: Wire, tmp_path: Path) -> None:
        with pytest.raises(errors.OutboxError) as caught:
            client.download(f"{server.url}/a.png", tmp_path / "gone" / "picture.part", ANSWERED, 4711)
        assert (caught.value.possibly_billed, caught.value.answered) == (False, ANSWERED)


class TestOnTheSandbox:
    """The same client and the sandbox, which was written apart from it, by the contract alone."""

    @pytest.fixture
    def request_(self) -> Iterator[ImageToImageRequest]:
        with ImageSource() as source:
            yield ImageToImageRequest(**inputs(source.url))

    @pytest.fixture
    def credentials(self, sandbox: Sandbox) -> SegmindCredentials:
        return SegmindCredentials(api_key=SecretStr(sandbox.api_key), base_url=sandbox.base_url_v2)

    def test_a_request_is_submitted_polled_for_and_fetched(
        self, sandbox: Sandbox, credentials: SegmindCredentials, request_: ImageToImageRequest, part: Path
    ) -> None:
        with credentials.get_client() as client:
            submitted = client.submit(request_)
            until(lambda: client.status(submitted) is Status.COMPLETED)
            picture = client.fetch(client.submitted(submitted.request_id), request_.seed, part)
            assert client.credits() == Decimal("999.95")
        assert (picture.cost_usd, picture.cost_source, picture.notices) == (Decimal("0.05"), "metrics", ())
        assert sandbox.ledger.billed == 1

    def test_polling_survives_what_fails_and_is_never_billed(
        self, sandbox: Sandbox, credentials: SegmindCredentials, request_: ImageToImageRequest
    ) -> None:
        sandbox.play(Answer(polls=(429, 502, 0, 504)))
        kinds = (errors.RateLimitError, errors.BadGatewayError, errors.AnswerCutError, errors.GatewayTimeoutError)
        with credentials.get_client() as client:
            submitted = client.submit(request_)
            for kind in kinds:
                with pytest.raises(kind) as caught:
                    client.status(submitted)
                assert not caught.value.possibly_billed
            assert until(lambda: client.status(submitted) is Status.COMPLETED)
        assert sandbox.ledger.billed == 1

    def test_one_that_fails_is_not_billed_and_one_that_is_forgotten_is_told_as_such(
        self, sandbox: Sandbox, credentials: SegmindCredentials, request_: ImageToImageRequest
    ) -> None:
        sandbox.play(Answer(fails="NSFW content"), Answer(forgotten=True))
        with credentials.get_client() as client:
            submitted = client.submit(request_)
            with pytest.raises(errors.UnprocessableError, match="NSFW content"):
                until(lambda: client.status(submitted) is Status.COMPLETED)
            with pytest.raises(errors.ForgottenError):
                client.status(client.submit(request_))

    @pytest.mark.parametrize("lost", [Answer(kind="lost"), Answer(status=502, billed=True)])
    def test_a_lost_answer_is_found_in_the_history_and_its_picture_downloaded(
        self,
        lost: Answer,
        sandbox: Sandbox,
        credentials: SegmindCredentials,
        request_: ImageToImageRequest,
        part: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delenv(HISTORY_SETTING, raising=False)
        history = credentials.get_history(SegmindSettings(), logging.getLogger("tests"))
        assert history is not None
        sandbox.play(lost)
        sent_at = datetime.now(UTC)
        with credentials.get_client() as client:
            with pytest.raises(errors.ApiError) as caught:
                client.submit(request_)
            assert caught.value.possibly_billed
            until(lambda: sandbox.ledger.billed == 1)
            (row,) = history.find([Sought(request_.body(), sent_at)]).values()
            assert history.find([Sought({}, sent_at, row.request_id)])[0] == row
            assert row.outcome is Outcome.COMPLETED
            assert row.url is not None
            answered = ANSWERED.model_copy(update={"cost_usd": row.cost_usd, "request_id": row.request_id})
            picture = client.download(row.url, part, answered, request_.seed)
        assert (picture.cost_usd, picture.cost_source) == (Decimal("0.05"), "history")
        assert part.stat().st_size == picture.size_bytes
        assert sandbox.ledger.billed == 1
