"""Promises of `prefect_segmind.api.submission`: what an answer of v2 says is read, and nothing else is taken for it."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_segmind.api.submission import (
    Result,
    Submitted,
    is_request_id,
    is_result,
    read_request_id,
    read_result,
    read_status,
    read_submitted,
)

FIELDS = {"request_id": "r-1", "status_url": "https://a.example/s", "response_url": "https://a.example/r"}
NOT_OBJECTS = [b"", b"[]", b'"QUEUED"', b"null", b"12", b"<html>", b'{"request_id": "r-', b"\xff", b"[" * 50_000]


@pytest.mark.parametrize("id", ["r-1", "0f8e4c71-aaaa-4bbb-8ccc-0123456789ab", "a.b:c_d", "_x", "-x", "...", "9" * 200])
def test_ids_are_sane(id: str) -> None:
    assert is_request_id(id)


@pytest.mark.parametrize(
    "id", ["", ".", "..", "a/b", "../credits", "a?b", "a#b", "a%2fb", "a b", "a\n", "ä", "9" * 201, None, 12, ["r"]]
)
def test_what_could_change_an_address_is_no_id(id: object) -> None:
    assert not is_request_id(id)
    assert read_request_id(json.dumps({**FIELDS, "request_id": id}).encode()) is None
    assert read_submitted(json.dumps({**FIELDS, "request_id": id}).encode()) is None


def test_a_submitted_request_has_an_id_and_two_addresses() -> None:
    body = json.dumps(FIELDS | {"status": "QUEUED", "poll_url": "https://a.example/p"}).encode()
    assert read_submitted(body) == Submitted(**FIELDS)
    assert read_submitted(gzip.compress(body)) == Submitted(**FIELDS)
    for name in FIELDS:
        for value in ({}, {name: None}, {name: 7}):
            without = {key: each for key, each in FIELDS.items() if key != name} | value
            assert read_submitted(json.dumps(without).encode()) is None


@pytest.mark.parametrize("body", NOT_OBJECTS)
def test_a_body_of_another_form_says_nothing(body: bytes) -> None:
    assert (read_request_id(body), read_submitted(body), read_status(body)) == (None, None, None)
    assert not is_result(body)
    assert read_result(body) == Result(None, None)


@pytest.mark.parametrize("status", ["QUEUED", "PROCESSING", "COMPLETED", "FAILED"])
def test_the_four_statuses_are_read_in_any_case(status: str) -> None:
    assert read_status(json.dumps({"status": status.lower()}).encode()) == status


@pytest.mark.parametrize("status", ["", "error", "ok", 200, None, True, ["FAILED"], {"FAILED": 1}])
def test_no_other_word_is_a_status(status: object) -> None:
    assert read_status(json.dumps({"status": status}).encode()) is None


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
    assert read_result(b'{"metrics": {"cost": NaN}}') == read_result(b'{"metrics": {"cost": Infinity}}')
    assert read_result(b'{"metrics": {"cost": NaN}}').cost_usd is None


@given(st.binary(max_size=200))
def test_no_bytes_end_it(body: bytes) -> None:
    assert read_submitted(body) is None or is_request_id(read_request_id(body))
    assert read_status(body) in (None, "QUEUED", "PROCESSING", "COMPLETED", "FAILED")
    read_result(body)
