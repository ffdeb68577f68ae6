"""The sandbox's promises about v2: submit, poll, result, and what a script makes of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from pydantic import ValidationError

from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.sandbox import script as script_module
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


def ended(sandbox: Sandbox, submitted: httpx.Response) -> httpx.Response:
    """The last answer to polls of the status."""
    address = submitted.json()["status_url"]

    def polled() -> httpx.Response | None:
        answer = get(sandbox, address)
        return answer if answer.json().get("status") in ("COMPLETED", "FAILED") else None

    answer = until(polled, 20)
    assert answer is not None
    return answer


# The life of a request


def test_a_submit_names_the_addresses_to_poll(sandbox: Sandbox, source: ImageSource) -> None:
    assert sandbox.base_url_v2 == sandbox.base_url.removesuffix("1") + "2"
    answer = submit(sandbox, source.url)
    told = answer.json()
    address = f"{sandbox.base_url_v2}/requests/{told['request_id']}"
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, told["request_id"])
    assert told == {
        "request_id": told["request_id"],
        "status": "QUEUED",
        "status_url": f"{address}/status",
        "response_url": address,
        "poll_url": f"{address}/status",
    }
    assert "x-cost" not in answer.headers


def test_a_request_is_queued_then_processed_then_completed(
    tmp_path: Path, sandbox: Sandbox, source: ImageSource
) -> None:
    with Sandbox(tmp_path, latency=3600, sketch=True, s3=False) as slow:
        told = submit(slow, source.url).json()
        assert get(slow, told["status_url"]).json()["status"] == "QUEUED"
        generation = slow.history.find(told["request_id"])
        assert generation is not None
        generation._started -= 1800
        for address in (told["status_url"], told["response_url"]):
            answer = get(slow, address)
            assert (answer.status_code, answer.json()["status"], "output" in answer.json()) == (
                200,
                "PROCESSING",
                False,
            )
        assert (rows(slow)[0]["model_status"], slow.ledger.requests) == ("PENDING", ())
    source.released.clear()
    submitted = submit(sandbox, source.url)
    assert get(sandbox, submitted.json()["status_url"]).json()["status"] == "PROCESSING"
    source.released.set()
    assert ended(sandbox, submitted).json()["status"] == "COMPLETED"


def test_a_result_links_to_the_picture_and_tells_what_it_cost(sandbox: Sandbox, source: ImageSource) -> None:
    submitted = submit(sandbox, source.url)
    status = ended(sandbox, submitted)
    assert status.status_code == 200
    result = get(sandbox, submitted.json()["response_url"]).json()
    picture = HTTP.get(result["output"])
    assert Image.open(io.BytesIO(picture.content)).size == (640, 1024)
    assert HTTP.get(result["output"], headers={"x-api-key": sandbox.api_key}).status_code == 400
    assert result["images"] == [
        {
            "url": result["output"],
            "content_type": "image/jpeg",
            "file_name": f"{result['request_id']}.jpg",
            "file_size": len(picture.content),
        }
    ]
    assert (result["status"], result["seed"], result["prompt"]) == ("COMPLETED", 4711, "a mug at sunset")
    metrics = result["metrics"]
    assert (metrics["cost"], metrics["remaining_credits"], metrics["retry_count"]) == (0.05, 9.95, 0)
    assert metrics["queue_time"] + metrics["inference_time"] == pytest.approx(metrics["total_time"], abs=0.002)
    assert rows(sandbox)[0]["generation_url"] == result["output"]


def test_v1_and_v2_make_the_same_picture_and_one_entry_each(sandbox: Sandbox, source: ImageSource) -> None:
    answered = ask(sandbox, source.url)
    submitted = submit(sandbox, source.url)
    ended(sandbox, submitted)
    result = get(sandbox, submitted.json()["response_url"]).json()
    assert HTTP.get(result["output"]).content == answered.content
    first, second = sandbox.ledger.requests
    assert second.request_id == submitted.json()["request_id"]
    assert first.image_sha256 == second.image_sha256
    assert (second.prompt, second.seed, second.status, second.billed) == ("a mug at sunset", 4711, 200, True)
    assert sandbox.ledger.billed_usd == Decimal("0.10")


def test_a_failed_request_is_422_on_both_addresses_and_not_billed(sandbox: Sandbox, source: ImageSource) -> None:
    sandbox.play(Answer(fails="out of memory"))
    submitted = submit(sandbox, source.url)
    assert submitted.status_code == 200
    status = ended(sandbox, submitted)
    result = get(sandbox, submitted.json()["response_url"])
    for answer in (status, result):
        assert (answer.status_code, answer.json()["status"], answer.json()["error"]) == (422, "FAILED", "out of memory")
    assert (settled(sandbox)["error"], sandbox.ledger.billed) == ("out of memory", 0)
    assert [each.status for each in sandbox.ledger.requests] == [200]


def test_an_image_that_cannot_be_fetched_fails_the_request(sandbox: Sandbox, source: ImageSource) -> None:
    submitted = submit(sandbox, source.url, image_file=f"{source.url}/nothing.jpg")
    assert submitted.status_code == 200
    status = ended(sandbox, submitted)
    assert (status.status_code, "image_file" in status.json()["error"]) == (422, True)
    assert sandbox.ledger.billed == 0


def test_a_submit_is_checked_as_a_v1_request_is(tmp_path: Path, source: ImageSource) -> None:
    with Sandbox(tmp_path, latency=0, credits="0.05", requests_per_minute=2, sketch=True, s3=False) as sandbox:
        assert submit(sandbox, source.url, key="SG_0000000000000000").status_code == 401
        ended(sandbox, submit(sandbox, source.url))
        assert submit(sandbox, source.url).status_code == 406
        assert submit(sandbox, source.url).status_code == 429
        assert submit(sandbox, source.url, style_type="OIL").status_code == 429
        plain = HTTP.post(f"{sandbox.base_url_v2}/{MODEL}", data={}, headers={"x-api-key": sandbox.api_key})
        assert plain.status_code == 429
        assert HTTP.post(f"{sandbox.base_url_v2}/ideogram-9", json={}).status_code == 404
        assert HTTP.get(f"{sandbox.base_url_v2}/{MODEL}").status_code == 405
        assert len(rows(sandbox)) == sandbox.ledger.billed == 1


def test_polls_need_the_key_and_a_v2_request(sandbox: Sandbox, source: ImageSource) -> None:
    told = submit(sandbox, source.url).json()
    for address in (told["status_url"], told["response_url"]):
        assert [get(sandbox, address, key=key).status_code for key in ("", "SG_0000000000000000")] == [401, 401]
    by_v1 = ask(sandbox, source.url).headers["x-request-id"]
    for request_id in ("nobody", by_v1):
        for end in ("", "/status"):
            assert get(sandbox, f"{sandbox.base_url_v2}/requests/{request_id}{end}").status_code == 404


def test_status_and_result_are_forgotten_after_an_hour_and_the_history_is_not(
    sandbox: Sandbox, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = submit(sandbox, source.url)
    ended(sandbox, submitted)
    assert script_module.KEPT_SECONDS == 3600
    monkeypatch.setattr(script_module, "KEPT_SECONDS", 0.0)
    told = submitted.json()
    assert [get(sandbox, told[each]).status_code for each in ("status_url", "response_url")] == [404, 404]
    assert get(sandbox, f"{sandbox.history_url}/{told['request_id']}").json()["model_status"] == "COMPLETED"


# The script


@pytest.mark.parametrize("forgotten", [True, 0])
def test_a_request_can_be_forgotten_at_once(sandbox: Sandbox, source: ImageSource, forgotten: Any) -> None:
    sandbox.play(Answer(forgotten=forgotten))
    told = submit(sandbox, source.url).json()
    assert [get(sandbox, told[each]).status_code for each in ("status_url", "response_url")] == [404, 404]
    assert settled(sandbox)["model_status"] == "COMPLETED"


def test_a_request_can_be_forgotten_after_some_seconds(sandbox: Sandbox, source: ImageSource) -> None:
    sandbox.play(Answer(forgotten=0.3))
    told = submit(sandbox, source.url).json()
    assert until(lambda: get(sandbox, told["status_url"]).status_code == 404, 20)
    assert [Answer(forgotten=each).kept_seconds for each in (True, False, 1, 2.5)] == [0, 3600, 1, 2.5]


def test_the_first_polls_can_fail(sandbox: Sandbox, source: ImageSource) -> None:
    sandbox.play(Answer(polls=(502, 0, 429, 504, 200, 500)))
    told = submit(sandbox, source.url).json()
    settled(sandbox)
    assert get(sandbox, told["status_url"]).status_code == 502
    with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
        get(sandbox, told["status_url"])
    addresses = [told["status_url"]] * 3 + [told["response_url"]] * 2
    assert [get(sandbox, each).status_code for each in addresses] == [429, 504, 200, 500, 200]
    with pytest.raises(ValidationError, match="polls"):
        Answer(polls=(7,))


def test_the_answer_to_a_submit_can_be_an_error_without_a_request(sandbox: Sandbox, source: ImageSource) -> None:
    sandbox.play(Answer(status=429, retry_after="2"), Answer(status=503))
    answer = submit(sandbox, source.url)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert submit(sandbox, source.url).status_code == 503
    assert (rows(sandbox), sandbox.ledger.billed) == ([], 0)


def test_a_502_after_the_request_was_accepted_comes_at_once(sandbox: Sandbox, source: ImageSource) -> None:
    source.released.clear()
    sandbox.play(Answer(status=502, billed=True))
    assert submit(sandbox, source.url).status_code == 502
    assert rows(sandbox)[0]["model_status"] == "PENDING"
    source.released.set()
    row = settled(sandbox)
    assert (row["model_status"], row["request_body"], sandbox.ledger.billed) == ("COMPLETED", inputs(source.url), 1)


def test_the_answer_to_a_submit_can_be_odd_or_cut(sandbox: Sandbox, source: ImageSource) -> None:
    sandbox.play(
        Answer(kind="html"),
        Answer(kind="error", status=200, body='{"request_id": "abc"}'),
        Answer(status=202, kind="image", headers={"x-request-id": "another"}),
        Answer(kind="half_body"),
    )
    page, partial, accepted = (submit(sandbox, source.url) for _ in range(3))
    assert page.headers["content-type"].startswith("text/html")
    assert partial.json() == {"request_id": "abc"}
    assert (accepted.status_code, accepted.headers["x-request-id"]) == (202, "another")
    with pytest.raises(httpx.RemoteProtocolError, match="complete message body"):
        submit(sandbox, source.url)
    until(lambda: {each["model_status"] for each in rows(sandbox)} == {"COMPLETED"}, 20)
    assert [bool(each["generation_url"]) for each in rows(sandbox)] == [True, True, False, False]


def test_a_result_can_hold_no_usable_picture(sandbox: Sandbox, source: ImageSource) -> None:
    results = []
    for kind in ("unsafe", "not_an_image", "truncated_image"):
        sandbox.play(Answer.model_validate({"kind": kind}))
        submitted = submit(sandbox, source.url)
        ended(sandbox, submitted)
        results.append(get(sandbox, submitted.json()["response_url"]).json())
    unsafe, text, half = results
    assert (unsafe["status"], unsafe["output"], unsafe["images"]) == ("COMPLETED", None, [])
    with pytest.raises(OSError, match="identify"):
        Image.open(io.BytesIO(HTTP.get(text["output"]).content))
    with Image.open(io.BytesIO(HTTP.get(half["output"]).content)) as image, pytest.raises(OSError, match="truncated"):
        image.load()
    assert sandbox.ledger.billed == 3
    assert [bool(each["generation_url"]) for each in rows(sandbox)] == [True, True, False]


def test_a_request_can_be_processed_for_longer(sandbox: Sandbox, source: ImageSource) -> None:
    sandbox.play(Answer(processing=3600))
    told = submit(sandbox, source.url).json()
    ask(sandbox, source.url)
    assert [each["model_status"] for each in rows(sandbox)] == ["COMPLETED", "PENDING"]
    assert get(sandbox, told["status_url"]).json()["status"] == "PROCESSING"


def test_another_process_can_script_v2(sandbox: Sandbox, source: ImageSource) -> None:
    control = f"{sandbox.base_url.removesuffix('/v1')}/sandbox/script"
    order = {"answers": [{"polls": [502], "fails": "no", "forgotten": False, "lands_after": 0, "processing": 0}]}
    assert HTTP.post(control, json=order).json() == {"queued": 1}
    told = submit(sandbox, source.url).json()
    settled(sandbox)
    assert [get(sandbox, told["status_url"]).status_code for _ in range(2)] == [502, 422]
