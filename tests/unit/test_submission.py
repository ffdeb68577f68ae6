"""Promises of `prefect_segmind.api.submission`: what an answer of v2 says is read, and nothing else is taken for it."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_segmind import errors
from prefect_segmind.api.submission import (
    Result,
    Status,
    Submitted,
    accepted,
    is_request_id,
    is_result,
    judged,
    named_request,
    read_result,
)

FIELDS = {"request_id": "r-1", "status_url": "https://a.example/s", "response_url": "https://a.example/r"}
MINE = Submitted(**FIELDS)
NOT_OBJECTS = [b"", b"[]", b'"QUEUED"', b"null", b"12", b"<html>", b'{"request_id": "r-', b"\xff", b"[" * 50_000]


def owned(url: str) -> bool:
    return url.startswith("https://a.example/")


def accept(body: bytes, **headers: str) -> Submitted:
    return accepted(202, headers, body, owns=owned, secret="my-own-key")


def judge(body: bytes, status: int = 200, **headers: str) -> Status | None:
    return judged(status, headers, body, MINE, now=datetime.now(UTC), secret="my-own-key")


@pytest.mark.parametrize("id", ["r-1", "0f8e4c71-aaaa-4bbb-8ccc-0123456789ab", "a.b:c_d", "_x", "-x", "...", "9" * 200])
def test_ids_are_sane(id: str) -> None:
    assert is_request_id(id)
    assert accept(json.dumps({**FIELDS, "request_id": id}).encode()).request_id == id


@pytest.mark.parametrize(
    "id", ["", ".", "..", "a/b", "../credits", "a?b", "a#b", "a%2fb", "a b", "a\n", "ä", "9" * 201, None, 12, ["r"]]
)
def test_what_could_change_an_address_is_no_id(id: object) -> None:
    assert not is_request_id(id)
    body = json.dumps({**FIELDS, "request_id": id}).encode()
    assert named_request({}, body) is None
    with pytest.raises(errors.SubmissionUnknownError, match="lacks its id"):
        accept(body)


def test_the_body_names_the_request_before_the_header_and_neither_may_repeat_the_key() -> None:
    assert named_request({"X-Request-Id": "r-2"}, b'{"request_id": "r-1"}') == "r-1"
    assert named_request({"X-Request-Id": '["r-2"]'}, b"<html>") == "r-2"
    assert named_request({"X-Request-Id": "r 2"}, b"") is None
    for key in ("my-own-key", "SG_0123456789abcdef"):
        assert (
            named_request({"X-Request-Id": f"x{key}"}, json.dumps({"request_id": key}).encode(), "my-own-key") is None
        )


def test_an_accepted_request_has_an_id_and_two_addresses() -> None:
    body = json.dumps(FIELDS | {"status": "QUEUED", "poll_url": "https://a.example/p"}).encode()
    assert accept(body) == accept(gzip.compress(body)) == MINE


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [..., None, 7, "", "https://b.example/x"])
def test_an_answer_that_lacks_one_of_them_leaves_the_outcome_unknown(name: str, value: object) -> None:
    fields: dict[str, object] = {**FIELDS, name: value}
    body = json.dumps({key: each for key, each in fields.items() if each is not ...}).encode()
    with pytest.raises(errors.SubmissionUnknownError) as caught:
        accept(body, x_request_id="r-9")
    assert (caught.value.status, caught.value.possibly_billed) == (202, True)
    assert caught.value.request_id == (None if name == "request_id" else "r-1")


@pytest.mark.parametrize("body", NOT_OBJECTS)
def test_a_body_of_another_form_says_nothing(body: bytes) -> None:
    with pytest.raises(errors.SubmissionUnknownError):
        accept(body)
    assert judge(body) is None
    assert not is_result(body)
    assert read_result(body) == Result(None, None)


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("code", [200, 202, 422])
def test_a_status_is_read_in_any_case(code: int, status: Status) -> None:
    assert judge(json.dumps({"status": status.lower()}).encode(), code) is status


@pytest.mark.parametrize("word", ["", "error", "ok", 200, None, True, ["FAILED"], {"FAILED": 1}])
def test_no_other_word_is_a_status(word: object) -> None:
    assert judge(json.dumps({"status": word}).encode()) is None


@pytest.mark.parametrize("code", [200, 202, 422])
def test_failed_is_failed(code: int) -> None:
    with pytest.raises(errors.UnprocessableError, match="not safe") as caught:
        judge(b'{"status": "FAILED", "error": "not safe"}', code)
    assert (caught.value.status, caught.value.possibly_billed, caught.value.request_id) == (422, False, "r-1")


@pytest.mark.parametrize("status", ["FAILED", "failed"])
@pytest.mark.parametrize("code", [400, 404, 500, 502, 503])
def test_failed_with_a_code_of_which_the_provider_says_nothing_may_be_a_gateways_word(code: int, status: str) -> None:
    with pytest.raises(errors.ApiError) as caught:
        judge(json.dumps({"status": status, "message": "upstream timed out"}).encode(), code)
    assert not isinstance(caught.value, errors.UnprocessableError)
    assert caught.value.status == code


@pytest.mark.parametrize("status", ["FAILED", "COMPLETED", "QUEUED"])
@pytest.mark.parametrize("code", [401, 403, 429])
def test_an_answer_about_the_asking_says_nothing_about_the_request(code: int, status: str) -> None:
    with pytest.raises(errors.STATUS_ERRORS[code]) as caught:
        judge(json.dumps({"status": status}).encode(), code)
    assert (caught.value.status, caught.value.possibly_billed) == (code, False)


def test_completed_is_believed_with_another_code_and_the_others_are_not() -> None:
    assert judge(b'{"status": "COMPLETED"}', 500) is Status.COMPLETED
    for status in ("QUEUED", "PROCESSING"):
        with pytest.raises(errors.BadGatewayError) as caught:
            judge(json.dumps({"status": status}).encode(), 502)
        assert not caught.value.possibly_billed
        with pytest.raises(errors.ForgottenError):
            judge(json.dumps({"status": status}).encode(), 404)


def test_no_message_has_the_key() -> None:
    said = b'{"status": "FAILED", "error": "my-own-key", "request_id": "my-own-key"}'
    for call in (lambda: accept(said), lambda: judge(said), lambda: judge(said, 401)):
        with pytest.raises(errors.ApiError) as caught:
            call()
        assert "my-own-key" not in str(caught.value)
        assert caught.value.request_id in (None, "r-1")


@pytest.mark.parametrize("name", ["output", "images", "metrics"])
def test_a_result_is_known_by_its_fields(name: str) -> None:
    assert is_result(json.dumps({name: None}).encode())
    assert not is_result(b'{"message": "be back soon"}')


@pytest.mark.parametrize(
    ("fields", "result"),
    [
        ({"seed": 4711, "metrics": {"cost": 0.05}}, Result(4711, Decimal("0.05"))),
        ({"seed": "4711", "metrics": {"cost": "0.0625"}}, Result(4711, Decimal("0.0625"))),
        ({"seed": 0, "metrics": {"cost": 0}}, Result(0, Decimal(0))),
        ({"seed": -1, "metrics": {"cost": -1}}, Result(None, None)),
        ({"seed": 1.5, "metrics": {"cost": "free"}}, Result(None, None)),
        ({"seed": True, "metrics": {"cost": True}}, Result(None, None)),
        ({"seed": [1], "metrics": {"cost": [0.05]}}, Result(None, None)),
        ({"seed": "9" * 19, "metrics": {"cost": 1e30}}, Result(None, None)),
        ({"seed": None, "metrics": None}, Result(None, None)),
        ({"metrics": [0.05]}, Result(None, None)),
        ({}, Result(None, None)),
    ],
)
def test_seed_and_cost_are_read_where_they_are_sensible(fields: dict[str, object], result: Result) -> None:
    assert read_result(json.dumps(fields).encode()) == result


def test_a_cost_that_is_no_number_is_none() -> None:
    for cost in (b"NaN", b"Infinity", b"-Infinity"):
        assert read_result(b'{"metrics": {"cost": ' + cost + b"}}").cost_usd is None


@given(st.binary(max_size=200), st.integers(100, 599))
def test_whatever_comes_is_an_answer_or_an_error_of_ours(body: bytes, code: int) -> None:
    with suppress(errors.ApiError):
        judge(body, code)
    with suppress(errors.SubmissionUnknownError):
        accept(body)
    read_result(body)
