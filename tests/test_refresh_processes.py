"""Batches in processes of their own, killed at any moment, two at once, interrupted: each picture is paid for once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL

from prefect_segmind import configuration
from prefect_segmind.record import Record
from prefect_segmind.sandbox import Answer, Sandbox

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.slow]

KILLS = int(os.environ.get("SEGMIND_KILLS", "3"))
"""How often a run is killed; ten by hand."""


def start(manifest: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    command = [sys.executable, "-m", "prefect_segmind", "refresh", str(manifest), "--json", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    out, told = process.communicate(timeout=240)
    assert out.count("\n") == 1, told
    return process.returncode, json.loads(out)


def campaign(photo: Path, count: int) -> Path:
    path = photo.parent / "campaign.csv"
    rows = (f"mug/{n:03},{photo.name},a red mug number {n:03},{n + 100}\n" for n in range(count))
    path.write_text("name,image,prompt,seed\n" + "".join(rows))
    return path


def wait_for_requests(sandbox: Sandbox, count: int, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while len(sandbox.ledger.requests) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def records() -> list[Record]:
    archive = configuration.open_archive(None)
    found = (archive.store.get(key) for key in archive.store.keys(".segmind/") if key.count("/") == 1)
    return [Record.model_validate_json(each.data) for each in found if each and b'"fingerprint"' in each.data]


def pictures() -> list[str]:
    return [key for key in configuration.open_archive(None).store.keys("mug/") if key.endswith(".jpg")]


@pytest.mark.timeout(1200)
def test_killed_at_any_moment_and_run_again_at_once_all_is_archived_and_paid_once(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(tmp_path / "archive"))
    count, dice = 40, random.Random()
    manifest = campaign(photo, count)
    sandbox.play(*[Answer(delay=0.3)] * 400)
    for _ in range(KILLS):
        before = len(sandbox.ledger.requests)
        process = start(manifest, "--max-concurrency", "4")
        if before < count:
            wait_for_requests(sandbox, min(before + dice.randint(1, 6), count), process)
        time.sleep(dice.uniform(0, 0.5))
        process.kill()
        process.communicate()
    code, last = ended(start(manifest, "--max-concurrency", "8"))
    assert code == 0, last
    assert last["generated"] + last["reused"] + last["recovered"] == last["total"] == count
    assert len(pictures()) == count
    billed = Counter(each.prompt for each in sandbox.ledger.requests if each.billed)
    noted = records()
    assert len(noted) == count
    assert all(each.state == "done" for each in noted)
    unknown = [attempt for each in noted for attempt in each.attempts if attempt.possibly_billed]
    extra = sandbox.ledger.billed - count
    assert set(billed.values()) <= {1, 2, 3}
    assert extra <= len(unknown), "nothing is paid again but what was in flight at a kill, and each of those is noted"
    assert len(unknown) <= 4 * KILLS
    assert float(last["possibly_billed_usd"]) <= 0.05 * len(unknown)


def test_two_processes_at_once_pay_once_for_each_picture_and_neither_stands_still(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(tmp_path / "archive"))
    manifest = campaign(photo, 60)
    sandbox.play(*[Answer(delay=0.6)] * 200)
    both = [start(manifest, "--max-concurrency", "4") for _ in range(2)]
    (_, one), (_, other) = (ended(each) for each in both)
    assert sandbox.ledger.billed == 60
    assert one["generated"] + other["generated"] == 60
    assert one["failed"] == other["failed"] == 0
    assert one["generated"] > 0
    assert other["generated"] > 0
    assert len(pictures()) == 60


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_interrupted_it_sends_nothing_new_and_archives_what_is_in_flight(
    sandbox: Sandbox, photo: Path, how: signal.Signals
) -> None:
    manifest = campaign(photo, 60)
    sandbox.play(*[Answer(delay=1.0)] * 200)
    process = start(manifest, "--max-concurrency", "4")
    wait_for_requests(sandbox, 5, process)
    process.send_signal(how)
    code, told = ended(process)
    assert code == 130
    assert told["generated"] == sandbox.ledger.billed
    assert told["failed"] == 0
    assert told["not_started"] >= 40
    assert len(pictures()) == sandbox.ledger.billed
