"""The provider's own SDK gets along with the sandbox: an independent check of what it serves."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from segmind import SegmindClient
from segmind.exceptions import SegmindError
from segmind.v2 import InferenceFailed

from prefect_segmind.sandbox import Answer, Sandbox
from tests.support.asking import HTTP, MODEL, ImageSource, inputs
from tests.support.waiting import until


@pytest.fixture
def source() -> Iterator[ImageSource]:
    with ImageSource() as source:
        yield source


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    with Sandbox(tmp_path, latency=0.0, sketch=True, s3=False) as sandbox:
        # Not by its dotted name: the package has an object of that name too.
        monkeypatch.setattr(import_module("segmind.generations"), "REQUEST_HISTORY_URL", sandbox.history_url)
        yield sandbox


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[SegmindClient]:
    client = SegmindClient(api_key=sandbox.api_key, base_url=sandbox.base_url)
    yield client
    client._client.close()


def test_a_synchronous_run_answers_the_picture(client: SegmindClient, source: ImageSource) -> None:
    answer = client.run_sync(MODEL, **inputs(source.url))
    assert answer.content.startswith(b"\xff\xd8")


def test_a_run_answers_the_result(client: SegmindClient, sandbox: Sandbox, source: ImageSource) -> None:
    result = client.run(MODEL, **inputs(source.url))
    assert (result["status"], result["seed"], result["metrics"]["cost"]) == ("COMPLETED", 4711, 0.05)
    assert HTTP.get(result["output"]).content.startswith(b"\xff\xd8")
    assert sandbox.ledger.billed == 1


def test_a_submitted_request_is_polled_waited_for_and_fetched(client: SegmindClient, source: ImageSource) -> None:
    source.released.clear()
    job = client.submit_async(MODEL, **inputs(source.url))
    assert job.status()["status"] == "PROCESSING"
    assert job.result()["status"] == "PROCESSING"
    source.released.set()
    result = job.wait(timeout=20, interval=0.05)
    assert (result["request_id"], result["images"][0]["url"]) == (job.request_id, result["output"])
    assert job.status()["status"] == "COMPLETED"
    assert job.result() == result


def test_a_failed_request_raises(client: SegmindClient, sandbox: Sandbox, source: ImageSource) -> None:
    sandbox.play(Answer(fails="out of memory"))
    job = client.submit_async(MODEL, **inputs(source.url))
    with pytest.raises(InferenceFailed) as failed:
        job.wait(timeout=20, interval=0.05)
    assert (failed.value.detail, failed.value.status_body["status"]) == ("out of memory", "FAILED")
    assert job.result()["error"] == "out of memory"


def test_the_history_lists_what_was_asked_by_either_version(
    client: SegmindClient, sandbox: Sandbox, source: ImageSource
) -> None:
    sandbox.play(Answer(), Answer(fails=True))
    made = client.run_sync(MODEL, **inputs(source.url)).headers["x-request-id"]
    failed = client.submit_async(MODEL, **inputs(source.url, prompt="a hat")).request_id
    until(lambda: client.generations.history(status="FAILED")["data"], 20)
    page = client.generations.history(per_page=1, page=2, model_name="ideogram", sort_by="model_created")
    assert (page["total"], [each["request_id"] for each in page["data"]]) == (2, [made])
    assert client.generations.history(from_date="2026-11-01", to_date="2026-11-01")["data"] == []
    row = client.generations.get(made)
    assert (row["model_status"], row["credits_deduction"], row["request_body"]) == (
        "COMPLETED",
        0.05,
        inputs(source.url),
    )
    assert HTTP.get(row["generation_url"]).content.startswith(b"\xff\xd8")
    assert client.generations.get(failed)["error"]


def test_errors_reach_the_sdk_with_status_and_text(
    client: SegmindClient, sandbox: Sandbox, source: ImageSource
) -> None:
    sandbox.play(Answer(status=502))
    with pytest.raises(SegmindError) as error:
        client.submit_async(MODEL, **inputs(source.url))
    assert (error.value.status, "unavailable" in (error.value.detail or "")) == (502, True)
    with pytest.raises(SegmindError, match="YYYY-MM-DD"):
        client.generations.history(from_date="yesterday")
    with pytest.raises(SegmindError, match="404"):
        client.generations.get("nobody")
