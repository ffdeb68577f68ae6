"""A request that is accepted and not finished is left to the next run, which fetches its picture unpaid."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prefect_segmind.archive.archive import RecordRead
from prefect_segmind.cli import commands, output
from prefect_segmind.flows import refresh_assets
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from tests.support.asking import rows
from tests.support.manifests import mugs, write_campaign
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_server")
PATIENCE = "PREFECT_INTEGRATIONS_SEGMIND_READ_TIMEOUT_SECONDS"


@pytest.fixture(autouse=True)
def _v2(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.reset()
    monkeypatch.setenv("SEGMIND_BASE_URL", sandbox.base_url_v2)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_HISTORY_URL", "")


@pytest.fixture
def manifest(photo: Path) -> str:
    return write_campaign(photo, mugs(photo, 6, "a mug, number {}"))


def interrupted(arguments: Sequence[str], how: signal.Signals, when: int) -> tuple[int, Any, str]:
    """Runs a command that is interrupted once so many requests are submitted: their ids are noted in the archive."""
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect_segmind", *arguments, "--json"],
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: process.poll() is not None or submitted() >= when, 120)
    process.send_signal(how)
    out, told = process.communicate(timeout=240)
    return process.returncode, json.loads(out), told


def submitted() -> int:
    records = [found.record for _, found in Services().archive.records() if isinstance(found, RecordRead)]
    return sum(attempt.is_submitted for record in records for attempt in record.attempts)


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    capsys.readouterr()
    code = commands.run([*arguments, "--json"])
    told = capsys.readouterr()
    return code, json.loads(told.out), told.err


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_batch_leaves_what_is_submitted_and_the_next_run_fetches_all_of_it_unpaid(
    sandbox: Sandbox, manifest: str, how: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    sandbox.play(*[Answer(processing=15.0)] * 4)
    command = ["refresh", manifest, "--max-concurrency", "4"]
    code, first, _ = interrupted(command, how, 4)
    assert (code, first["submitted"], first["not_started"], first["failed"]) == (output.INTERRUPTED, 4, 2, 0)
    assert (first["cost_usd"], first["possibly_billed_usd"], first["failed_manifest"]) == ("0.00", "0.20", None)
    assert len(first["submitted_names"]) == 4
    assert "prefect-segmind reconcile" in first["error"]
    code, second, _ = ran(capsys, *command)
    assert (code, second["recovered"], second["generated"], second["submitted"]) == (output.DONE, 4, 2, 0)
    assert (second["cost_usd"], sandbox.ledger.billed, len(rows(sandbox))) == ("0.10", 6, 6)


@pytest.mark.slow
def test_an_interrupted_picture_is_told_as_submitted_and_fetched_by_the_same_command(
    sandbox: Sandbox, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sandbox.play(Answer(processing=15.0))
    command = ["generate", str(photo), "a red mug"]
    code, first, told = interrupted(command, signal.SIGINT, 1)
    assert (code, first["status"], first["name"]) == (output.INTERRUPTED, "submitted", "mug"), told
    assert (first["cost_usd"], first["possibly_billed_usd"], first["attempts"]) == ("0.00", "0.05", 1)
    assert "the same command again, or prefect-segmind reconcile, fetches it" in first["error"]
    assert "possibly billed: 0.05 USD" in told
    code, second, _ = ran(capsys, *command)
    assert (code, second["status"], second["cost_usd"]) == (output.DONE, "recovered", "0.00")
    assert (second["fingerprint"], sandbox.ledger.billed) == (first["fingerprint"], 1)


def test_a_picture_that_takes_longer_than_the_patience_is_submitted_and_no_failed_request(
    sandbox: Sandbox,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(PATIENCE, "0.1")
    sandbox.play(Answer(processing=1.0))
    code, first, told = ran(capsys, "generate", str(photo), "a red mug")
    assert (code, first["status"], first["possibly_billed_usd"]) == (output.FAILED, "submitted", "0.05")
    assert "prefect-segmind reconcile" in told
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert [each for each in warnings if "is submitted and not finished" in each] == [f"mug: {first['error']}"]
    assert not [each for each in warnings if "failed" in each]
    monkeypatch.setenv(PATIENCE, "30")
    assert ran(capsys, "generate", str(photo), "a red mug")[1]["status"] == "recovered"
    assert sandbox.ledger.billed == 1


def test_a_batch_of_which_some_are_only_submitted_is_not_done_and_lists_them(
    sandbox: Sandbox, manifest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PATIENCE, "0.1")
    pages: list[str] = []
    monkeypatch.setattr(
        "prefect_segmind.reporting.artifacts.create_markdown_artifact", lambda markdown, **_: pages.append(markdown)
    )
    sandbox.play(*[Answer(processing=600.0)] * 6)
    code, first, _ = ran(capsys, "refresh", manifest)
    assert (code, first["submitted"], first["failed"], first["not_started"]) == (output.FAILED, 6, 0, 0)
    assert (first["failures"], first["failed_manifest"], first["possibly_billed_usd"]) == ([], None, "0.30")
    assert "6 assets: 6 submitted; paid 0.00 USD, possibly 0.30 USD more" in first["error"]
    page = next(each for each in pages if "#### Submitted: 6" in each)
    assert "to fetch their pictures without another payment" in page
    assert commands.run(["refresh", manifest]) == output.FAILED
    people = capsys.readouterr().out
    assert "6 submitted" in people
    assert "to fetch their pictures without another payment, run the same again" in people
    result = refresh_assets(manifest, fail_run_on_failures=False)
    assert (result.submitted, len(result.submitted_names)) == (6, 6)
    code, planned, _ = ran(capsys, "refresh", manifest, "--dry-run")
    assert {each["needs"] for each in planned["jobs"]} == {"ask"}
    assert (code, planned["planned_usd"], planned["submitted"]) == (output.DONE, "0.30", 0)
    assert commands.run(["refresh", manifest, "--dry-run"]) == output.DONE
    people = capsys.readouterr().out
    assert "6, at most 0.30 USD: the provider is asked first what became of earlier requests" in people
    assert "0, 0.00 USD at 0.05 USD each" in people
    assert len(rows(sandbox)) == 6
