"""The flow that settles an archive, and its command after a process was killed for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow, State

from prefect_segmind import Reconciled, reconcile
from prefect_segmind.archive import leases
from prefect_segmind.errors import ApiError, HistoryError, SegmindError
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from tests.support.waiting import until
from tests.support.walk import generate, up_to_upload

pytestmark = pytest.mark.usefixtures("prefect_server")
HISTORY = "PREFECT_INTEGRATIONS_SEGMIND_HISTORY_URL"


@pytest.fixture
def pages(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pages that flows create in Prefect's UI."""
    sandbox.reset()
    found: list[str] = []
    monkeypatch.setattr(
        "prefect_segmind.reporting.artifacts.create_markdown_artifact", lambda markdown, **_: found.append(markdown)
    )
    return found


def lose(photo: Path, sandbox: Sandbox, **fields: Any) -> None:
    job, uploaded = up_to_upload(photo, **fields)
    sandbox.play(Answer(kind="lost"))
    with pytest.raises(ApiError):
        generate(job, uploaded)
    leases._claims.clear()


def test_the_flow_archives_what_was_billed_and_lost_and_shows_a_table(
    sandbox: Sandbox, photo: Path, pages: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lose(photo, sandbox, name="hero/[summer]")
    monkeypatch.setenv(HISTORY, "")
    result = reconcile()
    assert (result.recovered, result.looked_up, sandbox.ledger.billed) == (1, 1, 1)
    (page,) = pages
    assert "| name | sent (UTC) | outcome | USD |" in page
    assert "| hero/\\[summer\\] |" in page
    assert "| recovered | 0.05 |" in page
    assert str(result.pictures[0].image).rpartition("/")[2] in page.replace("<wbr>", "")
    assert "1 request looked up: 1 recovered (0.05 USD, paid before); this run paid nothing" in caplog.text
    assert reconcile().pictures == ()


def test_the_flow_fails_where_the_history_cannot_be_read_or_something_could_not_be_settled(
    sandbox: Sandbox, photo: Path, pages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended() -> State[Reconciled]:
        flow: Flow[[], Reconciled] = reconcile
        return flow(return_state=True)

    lose(photo, sandbox)
    state = ended()
    assert (state.is_failed(), pages) == (True, [])
    with pytest.raises(HistoryError, match=HISTORY):
        state.result()
    monkeypatch.setenv(HISTORY, "")
    Services().archive.store.put(f".segmind/{'0' * 64}.json", b"{", "application/json")
    state = ended()
    assert state.is_failed()
    with pytest.raises(SegmindError, match=r"1 recovered .* cannot be read by this version"):
        state.result()
    assert f"{'0' * 64}.json" in pages[0].replace("<wbr>", "")


@pytest.mark.slow
def test_what_a_process_that_was_killed_had_in_flight_is_archived_by_the_command_unpaid(
    sandbox: Sandbox, photo: Path, pages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HISTORY, "")
    sandbox.play(Answer(delay=600))
    command = [sys.executable, "-m", "prefect_segmind"]
    process = subprocess.Popen([*command, "generate", str(photo), "a red mug"], env=os.environ)
    until(lambda: sandbox.ledger.billed == 1 or process.poll() is not None, 120)
    process.kill()
    process.wait()
    done = subprocess.run([*command, "reconcile", "--json"], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["looked_up"], told["recovered"], told["cost_usd"]) == (1, 1, "0.05")
    assert (told["pictures"][0]["name"], done.stderr) == ("mug", "")
    assert (sandbox.ledger.billed, len(sandbox.ledger.requests)) == (1, 1)
