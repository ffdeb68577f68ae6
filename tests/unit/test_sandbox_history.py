"""The sandbox's promises about the request history, and about requests whose answer is lost."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.sandbox import history as history_module
from tests.support.asking import HTTP, MODEL, ImageSource, ask, get, inputs, rows, settled, submit
from tests.support.waiting import until


@pytest.fixture(scope="module")
def _source() -> Iterator[ImageSource]:
    with ImageSource() as source:
        yield source


@pytest.fixture
def source(_source: ImageSource) -> Iterator[ImageSource]:
    yield _source
    _source.released.set()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with Sandbox(tmp_path_factory.mktemp("sandbox"), latency=0.0, sketch=True, s3=False) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running: Sandbox) -> Sandbox:
    running.reset()
    return running


def states(sandbox: Sandbox) -> list[str]:
    return [each["model_status"] for each in rows(sandbox)]


# What is listed


@pytest.mark.parametrize("by", [ask, submit])
def test_a_request_is_listed_with_its_inputs_its_picture_and_its_cost(
    sandbox: Sandbox, source: ImageSource, by: Any
) -> None:
    before = datetime.now(UTC)
    answer = by(sandbox, source.url, negative_prompt="blur")
    row = settled(sandbox)
    assert row["request_id"] == answer.headers["x-request-id"] == sandbox.ledger.requests[0].request_id
    assert (row["model_name"], row["model_status"], row["credits_deduction"]) == (MODEL, "COMPLETED", 0.05)
    assert row["request_body"] == inputs(source.url, negative_prompt="blur")
    assert row["error"] is None
    assert row["latency_ms"] >= 0
    created, updated = (datetime.fromisoformat(row[each]) for each in ("model_created", "model_updated"))
    assert before <= created <= updated <= datetime.now(UTC)
    picture = HTTP.get(row["generation_url"])
    assert picture.content.startswith(b"\xff\xd8")
    assert HTTP.get(row["generation_url"], headers={"x-api-key": sandbox.api_key}).status_code == 400
    if by is ask:
        assert picture.content == answer.content


@pytest.mark.parametrize("by", [ask, submit])
@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        (None, {"key": "SG_0000000000000000"}),
        (None, {"image_weight": 0}),
        (Answer(status=400), {}),
        (Answer(status=401), {}),
        (Answer(status=403), {}),
        (Answer(status=404), {}),
        (Answer(status=406), {}),
        (Answer(status=429), {}),
        (Answer(status=503), {}),
        (Answer(status=529), {}),
    ],
)
def test_a_refused_request_is_not_listed(
    sandbox: Sandbox, source: ImageSource, answer: Answer | None, fields: dict[str, Any], by: Any
) -> None:
    sandbox.play(*[answer] if answer else [])
    assert by(sandbox, source.url, **fields).status_code >= 400
    assert (rows(sandbox), len(sandbox.ledger.requests)) == ([], 1)


@pytest.mark.parametrize("by", [ask, submit])
@pytest.mark.parametrize("status", [422, 500, 502, 504])
def test_an_error_of_the_model_is_listed_as_failed(sandbox: Sandbox, source: ImageSource, status: int, by: Any) -> None:
    sandbox.play(Answer(status=status))
    answer = by(sandbox, source.url)
    (row,) = rows(sandbox)
    assert (row["model_status"], row["credits_deduction"], row["generation_url"]) == ("FAILED", 0, None)
    assert row["error"] == answer.json()["error"]
    assert row["request_body"] == inputs(source.url)


@pytest.mark.parametrize("kind", ["html", "empty", "not_an_image", "unsafe"])
def test_a_200_without_a_picture_is_listed_without_a_link(sandbox: Sandbox, source: ImageSource, kind: Any) -> None:
    sandbox.play(Answer(kind=kind), Answer(kind=kind, billed=False))
    assert [ask(sandbox, source.url).status_code for _ in range(2)] == [200, 200]
    found = [(each["model_status"], each["credits_deduction"], each["generation_url"]) for each in rows(sandbox)]
    assert found == [("COMPLETED", 0, None), ("COMPLETED", 0.05, None)]


def test_an_image_that_cannot_be_fetched_fails_and_is_not_billed(sandbox: Sandbox, source: ImageSource) -> None:
    refused = ask(sandbox, source.url, image_file=f"{source.url}/nothing.jpg")
    row = settled(sandbox)
    assert refused.status_code == 400
    assert (row["model_status"], row["error"]) == ("FAILED", refused.json()["error"])
    assert sandbox.ledger.billed == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"prompt": NaN}'])
def test_a_row_of_a_body_that_is_no_object_has_no_inputs(sandbox: Sandbox, content: bytes) -> None:
    sandbox.play(Answer(status=502))
    HTTP.post(f"{sandbox.base_url}/{MODEL}", content=content, headers={"x-api-key": sandbox.api_key})
    assert [each["request_body"] for each in rows(sandbox)] == [{}]


def test_a_request_can_be_kept_out_of_the_history_or_put_into_it(sandbox: Sandbox, source: ImageSource) -> None:
    sandbox.play(Answer(listed=False), Answer(status=502, listed=False), Answer(status=429, listed=True))
    assert [ask(sandbox, source.url).status_code for _ in range(3)] == [200, 502, 429]
    assert [each["error"] for each in rows(sandbox)] == ["Rate limit exceeded"]
    unlisted = sandbox.ledger.requests[0].request_id
    assert get(sandbox, f"{sandbox.history_url}/{unlisted}").status_code == 404


def test_a_row_can_land_late(sandbox: Sandbox, source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.play(Answer(lands_after=3600))
    request_id = ask(sandbox, source.url).headers["x-request-id"]
    assert rows(sandbox) == []
    assert get(sandbox, f"{sandbox.history_url}/{request_id}").status_code == 404
    sandbox.reset()
    sandbox.play(Answer(lands_after=0.2))
    ask(sandbox, source.url)
    assert until(lambda: states(sandbox), 20) == ["COMPLETED"]


# Accepted, and the answer lost


def test_a_request_goes_on_and_is_billed_though_its_client_is_gone(sandbox: Sandbox, source: ImageSource) -> None:
    source.released.clear()
    content = json.dumps(inputs(source.url)).encode()
    head = f"POST /v1/{MODEL} HTTP/1.1\r\nHost: 127.0.0.1\r\nx-api-key: {sandbox.api_key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(sandbox.base_url).port or 0)) as client:
        client.sendall(head.encode() + content)
        assert until(lambda: states(sandbox), 20) == ["PENDING"]
    assert (states(sandbox), sandbox.ledger.requests) == (["PENDING"], ())
    source.released.set()
    row = settled(sandbox)
    assert (row["model_status"], row["credits_deduction"]) == ("COMPLETED", 0.05)
    assert HTTP.get(row["generation_url"]).status_code == 200
    assert sandbox.ledger.billed == 1


@pytest.mark.parametrize("by", [ask, submit])
def test_an_answer_can_be_lost_while_the_request_goes_on(sandbox: Sandbox, source: ImageSource, by: Any) -> None:
    source.released.clear()
    sandbox.play(Answer(kind="lost"))
    with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
        by(sandbox, source.url)
    (row,) = rows(sandbox)
    assert (row["model_status"], row["generation_url"], row["latency_ms"]) == ("PENDING", None, None)
    source.released.set()
    row = settled(sandbox)
    assert (row["model_status"], row["credits_deduction"]) == ("COMPLETED", 0.05)
    assert HTTP.get(row["generation_url"]).content.startswith(b"\xff\xd8")
    (entry,) = sandbox.ledger.requests
    assert (entry.status, entry.billed, entry.request_id) == (0, True, row["request_id"])


@pytest.mark.parametrize("by", [ask, submit])
@pytest.mark.parametrize(("fails", "why"), [(True, "Inference failed"), ("out of memory", "out of memory")])
def test_a_request_whose_answer_is_lost_can_fail(
    sandbox: Sandbox, source: ImageSource, by: Any, fails: bool | str, why: str
) -> None:
    sandbox.play(Answer(kind="lost", fails=fails))
    with pytest.raises(httpx.RemoteProtocolError):
        by(sandbox, source.url)
    row = settled(sandbox)
    assert (row["model_status"], row["credits_deduction"], row["generation_url"]) == ("FAILED", 0, None)
    assert why in row["error"]
    assert sandbox.ledger.billed == 0


@pytest.mark.parametrize("by", [ask, submit])
@pytest.mark.parametrize("answer", [Answer(status=502, billed=True), Answer(kind="html", billed=True)])
def test_a_billed_answer_without_a_picture_leaves_one_in_the_history(
    sandbox: Sandbox, source: ImageSource, by: Any, answer: Answer
) -> None:
    sandbox.play(answer)
    assert by(sandbox, source.url).status_code == answer.status
    row = settled(sandbox)
    assert (row["model_status"], row["credits_deduction"]) == ("COMPLETED", 0.05)
    assert HTTP.get(row["generation_url"]).content.startswith(b"\xff\xd8")
    assert (sandbox.ledger.billed, sandbox.ledger.billed_usd) == (1, Decimal("0.05"))
    assert sandbox.ledger.requests[0].status == answer.status


@pytest.mark.parametrize("kind", ["half_body", "truncated_image"])
def test_the_history_has_the_whole_picture_of_an_answer_that_was_cut(
    sandbox: Sandbox, source: ImageSource, kind: Any
) -> None:
    whole = ask(sandbox, source.url).content
    sandbox.play(Answer(kind=kind))
    with contextlib.suppress(httpx.RemoteProtocolError):
        assert len(ask(sandbox, source.url).content) < len(whole)
    assert HTTP.get(rows(sandbox)[0]["generation_url"]).content == whole


def test_a_billed_502_of_v1_comes_after_the_bill(sandbox: Sandbox, source: ImageSource) -> None:
    sandbox.play(Answer(status=502, billed=True))
    assert ask(sandbox, source.url).status_code == 502
    assert (states(sandbox), sandbox.ledger.billed) == (["COMPLETED"], 1)


def test_a_billed_502_checks_the_request_as_any_other(sandbox: Sandbox, source: ImageSource) -> None:
    sandbox.play(Answer(status=502, billed=True))
    assert ask(sandbox, source.url, image_weight=0).status_code == 400
    assert (rows(sandbox), sandbox.ledger.billed) == ([], 0)


def test_a_v1_request_that_fails_is_answered_with_422(sandbox: Sandbox, source: ImageSource) -> None:
    sandbox.play(Answer(fails="the safety check refused it"), Answer(status=504, fails=True))
    answer = ask(sandbox, source.url)
    assert (answer.status_code, answer.json()) == (422, {"error": "the safety check refused it"})
    assert ask(sandbox, source.url).status_code == 504
    assert states(sandbox) == ["FAILED", "FAILED"]
    assert [(each.status, each.billed) for each in sandbox.ledger.requests] == [(422, False), (504, False)]


def test_a_request_that_fails_is_never_billed() -> None:
    with pytest.raises(ValidationError, match="not billed"):
        Answer(billed=True, fails=True)
    with pytest.raises(ValidationError, match="body"):
        Answer(kind="lost", body="x")


def test_a_reset_ends_what_is_in_flight(sandbox: Sandbox, source: ImageSource) -> None:
    source.released.clear()
    sandbox.play(Answer(kind="lost"))
    with pytest.raises(httpx.RemoteProtocolError):
        ask(sandbox, source.url)
    sandbox.reset()
    source.released.set()
    assert rows(sandbox) == []
    ask(sandbox, source.url, prompt="another")
    assert [each.prompt for each in sandbox.ledger.requests] == ["another"]


def test_whoever_waits_for_a_picture_at_a_reset_is_told(tmp_path: Path, source: ImageSource) -> None:
    source.released.clear()
    with Sandbox(tmp_path, latency=0, s3=False) as sandbox:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, sandbox, source.url)
            until(lambda: states(sandbox), 20)
            sandbox.reset()
            assert asked.result().json() == {"error": "the sandbox was reset"}
        source.released.set()


# Listings


def test_a_listing_is_paged_newest_first(sandbox: Sandbox, source: ImageSource) -> None:
    asked = [ask(sandbox, source.url, seed=200 + n).headers["x-request-id"] for n in range(5)]
    pages = [get(sandbox, sandbox.history_url, page=n, per_page=2).json() for n in (1, 2, 3, 4)]
    assert [[each["request_id"] for each in page["data"]] for page in pages] == [
        [asked[4], asked[3]],
        [asked[2], asked[1]],
        [asked[0]],
        [],
    ]
    assert {(each["per_page"], each["total"], each["total_pages"]) for each in pages} == {(2, 5, 3)}
    assert [each["page"] for each in pages] == [1, 2, 3, 4]
    assert [each["request_id"] for each in rows(sandbox, sort_order="asc")] == asked
    assert [each["request_id"] for each in rows(sandbox)] == asked[::-1]


def test_a_listing_can_be_filtered_and_sorted(sandbox: Sandbox, source: ImageSource) -> None:
    sandbox.play(Answer(status=502), Answer(), Answer(status=500))
    failed, made, _ = (ask(sandbox, source.url).headers["x-request-id"] for _ in range(3))
    assert len(rows(sandbox, model_name="2a-img")) == 3
    assert rows(sandbox, model_name="flux") == []
    assert [each["request_id"] for each in rows(sandbox, status="COMPLETED")] == [made]
    assert rows(sandbox, status="FAILED", sort_order="asc")[0]["request_id"] == failed
    assert rows(sandbox, status="PENDING") == []
    assert rows(sandbox, sort_by="credits_deduction")[0]["request_id"] == made
    assert rows(sandbox, sort_by="credits_deduction", sort_order="asc")[-1]["request_id"] == made
    assert len(rows(sandbox, sort_by="model_name")) == 3


def test_a_listing_covers_its_days_and_by_default_the_last_week(sandbox: Sandbox, source: ImageSource) -> None:
    today = datetime.now(UTC).date()
    ids = [ask(sandbox, source.url, seed=200 + n).headers["x-request-id"] for n in range(3)]
    for request_id, days in zip(ids, (40, 8, 0), strict=True):
        generation = sandbox.history.find(request_id)
        assert generation is not None
        generation.created = datetime(today.year, today.month, today.day, 23, 59, tzinfo=UTC) - timedelta(days=days)

    def listed(**parameters: Any) -> list[str]:
        return [each["request_id"] for each in rows(sandbox, **parameters)]

    assert listed() == [ids[2]]
    assert listed(from_date=today - timedelta(days=8)) == [ids[2], ids[1]]
    assert listed(from_date=today - timedelta(days=8), to_date=today - timedelta(days=8)) == [ids[1]]
    assert listed(to_date=today - timedelta(days=40)) == [ids[0]]
    assert listed(from_date=today) == [ids[2]]
    row = get(sandbox, f"{sandbox.history_url}/{ids[0]}").json()
    assert (row["request_id"], row["model_status"]) == (ids[0], "COMPLETED")


DAY = date(2026, 11, 1)


@pytest.mark.parametrize(
    "parameters",
    [
        {"page": 0},
        {"page": "x"},
        {"per_page": 0},
        {"per_page": 101},
        {"from_date": "yesterday"},
        {"from_date": "20261101"},
        {"from_date": "1700000000"},
        {"from_date": "2026-02-30"},
        {"to_date": "2026-11-01T00:00:00"},
        {"to_date": "0001-01-01"},
        {"from_date": DAY, "to_date": DAY - timedelta(days=1)},
        {"from_date": DAY, "to_date": DAY + timedelta(days=31)},
        {"status": "DONE"},
        {"sort_by": "prompt"},
        {"sort_order": "up"},
        {"limit": 5},
    ],
)
def test_a_wrong_parameter_is_refused_by_its_name(sandbox: Sandbox, parameters: dict[str, Any]) -> None:
    answer = get(sandbox, sandbox.history_url, **parameters)
    assert answer.status_code == 400
    assert next(iter(parameters)) in answer.json()["error"]


def test_a_window_of_31_days_is_not_too_long(sandbox: Sandbox) -> None:
    assert rows(sandbox, from_date=DAY, to_date=DAY + timedelta(days=30)) == []


def test_the_history_takes_the_right_key_only(sandbox: Sandbox, source: ImageSource) -> None:
    request_id = ask(sandbox, source.url).headers["x-request-id"]
    for url in (sandbox.history_url, f"{sandbox.history_url}/{request_id}"):
        assert [get(sandbox, url, key=key).status_code for key in ("", "SG_0000000000000000")] == [401, 401]
        assert get(sandbox, url).status_code == 200
    unknown = get(sandbox, f"{sandbox.history_url}/nobody")
    assert (unknown.status_code, "nobody" in unknown.json()["error"]) == (404, True)


def test_old_requests_are_dropped(sandbox: Sandbox, source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "_KEPT", 2)
    asked = [ask(sandbox, source.url, seed=200 + n).headers["x-request-id"] for n in range(3)]
    assert [each["request_id"] for each in rows(sandbox)] == asked[:0:-1]


# A history that fails


def test_the_history_can_be_made_to_fail(sandbox: Sandbox, source: ImageSource) -> None:
    ask(sandbox, source.url)
    sandbox.history.play(
        Answer(status=500), Answer(kind="html"), Answer(headers={"x-edge": "1"}), Answer(status=429, retry_after="1")
    )
    first, page, usual, limited, last = (get(sandbox, sandbox.history_url) for _ in range(5))
    assert [each.status_code for each in (first, page, usual, limited, last)] == [500, 200, 200, 429, 200]
    assert page.headers["content-type"].startswith("text/html")
    assert (usual.headers["x-edge"], limited.headers["retry-after"]) == ("1", "1")
    assert usual.json() == last.json()
    for kind in ("lost", "half_body"):
        sandbox.history.play(Answer.model_validate({"kind": kind}))
        with pytest.raises(httpx.RemoteProtocolError):
            get(sandbox, sandbox.history_url)
    assert len(rows(sandbox)) == 1


def test_the_history_can_be_switched_off_and_on(sandbox: Sandbox, source: ImageSource) -> None:
    ask(sandbox, source.url)
    sandbox.history.off = True
    request_id = sandbox.ledger.requests[0].request_id
    urls = (sandbox.history_url, f"{sandbox.history_url}/{request_id}")
    assert [get(sandbox, url).status_code for url in urls] == [404, 404]
    sandbox.history.off = False
    assert [get(sandbox, url).status_code for url in urls] == [200, 200]


def test_another_process_can_script_the_history(sandbox: Sandbox) -> None:
    control = sandbox.base_url.removesuffix("/v1") + "/sandbox/history"
    assert HTTP.post(control, json={"answers": [{"status": 502}]}).json() == {"queued": 1}
    assert [get(sandbox, sandbox.history_url).status_code for _ in range(2)] == [502, 200]
    HTTP.post(control, json={"off": True}).raise_for_status()
    assert get(sandbox, sandbox.history_url).status_code == 404
    sandbox.reset()
    assert get(sandbox, sandbox.history_url).status_code == 200
