"""Batches in processes of their own, killed at any moment, two at once, interrupted: each picture is paid for once."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_segmind.archive.record import Record
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from tests.support.waiting import until

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.slow]

KILLS = int(os.environ.get("SEGMIND_KILLS", "2"))
"""How often a run is killed; five by hand, and then on two machines by v2 too."""


ON_ANOTHER_MACHINE = """
import socket
socket.gethostname = lambda: {host!r}
from prefect_segmind.__main__ import main
main()
"""


def start(manifest: Path, *options: str, home: Path | None = None, machine: str | None = None) -> subprocess.Popen[str]:
    """Starts a run in a process group of its own.

    With a home, it has a Prefect of its own that knows no server; on a named machine it has a home, an outbox and a
    host of its own.
    """
    code = ["-c", ON_ANOTHER_MACHINE.format(host=machine)] if machine else ["-m", "prefect_segmind"]
    command = [sys.executable, *code, "refresh", str(manifest), "--json", *options]
    environment = dict(os.environ)
    if machine:
        place = manifest.parent / f"machine {machine}"
        environment["PREFECT_HOME"] = str(place)
        environment["PREFECT_INTEGRATIONS_SEGMIND_OUTBOX"] = str(place / "outbox")
    if home:
        environment["PREFECT_HOME"] = str(home)
        del environment["PREFECT_API_URL"]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    out, told = process.communicate(timeout=240)
    assert out.count("\n") == 1, told
    return process.returncode, json.loads(out), told


def campaign(photo: Path, count: int) -> Path:
    path = photo.parent / "campaign.csv"
    rows = (f"mug/{n:03},{photo.name},{prompt(n)},{n + 100}\n" for n in range(count))
    path.write_text("name,image,prompt,seed\n" + "".join(rows))
    return path


def prompt(number: int) -> str:
    return f"a red mug number {number:03}"


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    def look() -> bool:
        assert process.poll() is None, process.communicate()
        return happened()

    until(look, 120, every=0.01)


def records() -> list[Record]:
    archive = Services().archive
    found = (archive.store.get(key) for key in archive.store.keys(".segmind/") if key.count("/") == 1)
    return [Record.model_validate_json(each.data) for each in found if each and b'"fingerprint"' in each.data]


def number(record: Record) -> int:
    assert record.image
    return int(record.image.removeprefix("mug/")[:3])


def runs_that_report(found: list[Record]) -> list[str | None]:
    """The run that reports it, for each request that may have been billed."""
    return [attempt.reported_by for each in found for attempt in each.attempts if attempt.possibly_billed]


def pictures() -> list[str]:
    return [key for key in Services().archive.store.keys("mug/") if key.endswith(".jpg")]


@pytest.mark.timeout(1200)
def test_killed_at_any_moment_and_run_again_at_once_all_is_archived_and_paid_once(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(tmp_path / "archive"))
    count, dice = 10 * (KILLS + 1), random.Random()
    manifest = campaign(photo, count)
    for _ in range(KILLS):
        asked = {each.prompt for each in sandbox.ledger.requests}
        held = [prompt(n) for n in range(count) if prompt(n) not in asked][dice.randint(0, 4) :]
        sandbox.script.clear()
        for each in held:  # billed, and still without an answer when the kill comes
            sandbox.play(Answer(delay=600), prompt=each)
        sandbox.play(*[Answer(delay=0.3)] * count)
        process = start(manifest, "--max-concurrency", "4")
        wait_until(lambda held=held: any(each.prompt in held for each in sandbox.ledger.requests), process)  # type: ignore[misc]
        time.sleep(dice.uniform(0, 0.5))
        process.kill()
        process.communicate()
    before = records()
    sandbox.script.clear()
    code, last, log = ended(start(manifest, "--max-concurrency", "8", "--verbose"))
    assert code == 0, last
    assert last["generated"] + last["reused"] + last["recovered"] == last["total"] == count
    assert last["waiting"] == 0
    assert "another run is paying" not in log
    assert len(pictures()) == count
    noted = records()
    assert len(noted) == count
    assert all(each.state == "done" for each in noted)
    billed = Counter(each.prompt for each in sandbox.ledger.requests if each.billed)
    unknown = {
        prompt(number(each)): sum(attempt.possibly_billed is True for attempt in each.attempts) for each in noted
    }
    assert all(billed[each] <= 1 + unknown[each] for each in unknown), "only what was in flight at a kill is paid again"
    assert KILLS <= sum(unknown.values()) <= 4 * KILLS
    known = runs_that_report(before)
    reported = [run for run in runs_that_report(noted) if run not in known]
    assert reported, "the last kill has hit a request in flight"
    assert Decimal(last["possibly_billed_usd"]) == Decimal("0.05") * len(reported)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_killed_in_mid_request_and_run_again_every_picture_is_billed_exactly_once(
    version: str, sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up_at_the_provider(sandbox, version, monkeypatch)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(tmp_path / "archive"))
    kills = KILLS if KILLS > 2 else 1
    count, dice = 24 * kills, random.Random()
    manifest = campaign(photo, count)
    in_flight: list[int] = []
    for _ in range(kills):
        sandbox.script.clear()
        sandbox.play(*[Answer(processing=dice.uniform(0, 3)) for _ in range(count)])
        begun = len(sandbox.history)
        process = start(manifest, "--max-concurrency", "8")
        wait_until(lambda begun=begun: len(sandbox.history) >= begun + 10, process)  # type: ignore[misc]
        time.sleep(dice.uniform(0, 0.5))
        process.kill()
        process.communicate()
        in_flight.append(sum(attempt.possibly_billed is None for each in records() for attempt in each.attempts))
    assert all(in_flight), "each kill has hit requests in flight"
    sandbox.script.clear()
    code, last, log = ended(start(manifest, "--max-concurrency", "8"))
    assert code == 0, (last, log)
    assert (last["total"], last["failed"]) == (count, 0)
    assert last["recovered"] > 0
    assert len(pictures()) == count
    assert_billed_once_each(sandbox, count)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", ["v1", "v2"] if KILLS > 2 else ["v1"])
def test_a_machine_that_is_gone_with_requests_in_flight_is_taken_over_by_another_and_nothing_is_billed_again(
    version: str, sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up_at_the_provider(sandbox, version, monkeypatch)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(tmp_path / "archive"))
    count, manifest = 16, campaign(photo, 16)
    sandbox.play(*[Answer()] * 8, *[Answer(processing=20)] * 8)
    one = start(manifest, "--max-concurrency", "8", machine="one")
    wait_until(lambda: len(sandbox.history) == count and sum(each.state == "done" for each in records()) == 8, one)
    one.kill()
    one.communicate()
    code, last, log = ended(start(manifest, "--max-concurrency", "8", machine="two"))
    assert code == 0, (last, log)
    assert (last["failed"], last["total"]) == (0, count)
    assert (last["reused"], last["recovered"], last["cost_usd"], last["possibly_billed_usd"]) == (8, 8, "0.00", "0.00")
    assert_billed_once_each(sandbox, count)


def look_up_at_the_provider(sandbox: Sandbox, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.history.clear()
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_HISTORY_URL", "")
    monkeypatch.setenv("SEGMIND_BASE_URL", sandbox.base_url_v2 if version == "v2" else sandbox.base_url)


def assert_billed_once_each(sandbox: Sandbox, count: int) -> None:
    """The provider has billed each picture once, and the records say the same, request by request.

    What is left in doubt was never sent: a run that is killed between its claim and its request leaves a claim.
    """
    billed = Counter(each.prompt for each in sandbox.ledger.requests if each.billed)
    assert billed == {prompt(n): 1 for n in range(count)}
    noted = records()
    assert {each.state for each in noted} == {"done"}
    attempts = [attempt for each in noted for attempt in each.attempts]
    paid = [attempt for attempt in attempts if attempt.cost_usd is not None]
    assert len(paid) == count
    assert sum(attempt.cost_usd or Decimal(0) for attempt in paid) == sandbox.ledger.billed_usd
    assert len([attempt for attempt in attempts if attempt.possibly_billed]) == len(attempts) - count


def test_two_processes_at_once_pay_once_for_each_picture_and_neither_stands_still(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(tmp_path / "archive"))
    manifest = campaign(photo, 60)
    # The first answers are so slow that both have begun before one of them could have made all.
    sandbox.play(*[Answer(delay=5.0)] * 12, *[Answer(delay=0.6)] * 200)
    both = [start(manifest, "--max-concurrency", "4") for _ in range(2)]
    (_, one, _), (_, other, _) = (ended(each) for each in both)
    assert sandbox.ledger.billed == 60
    assert one["generated"] + other["generated"] == 60
    assert one["failed"] == other["failed"] == 0
    assert one["generated"] > 0
    assert other["generated"] > 0
    assert len(pictures()) == 60


@pytest.mark.parametrize(
    ("how", "named"),
    [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")],
    ids=["ctrl-c", "sigterm", "sighup"],
)
def test_interrupted_it_sends_nothing_new_and_archives_what_is_in_flight(
    sandbox: Sandbox, photo: Path, how: signal.Signals, named: str
) -> None:
    manifest = campaign(photo, 60)
    sandbox.play(*[Answer(delay=1.0)] * 200)
    process = start(manifest, "--max-concurrency", "4")
    wait_until(lambda: len(sandbox.ledger.requests) >= 5, process)
    process.send_signal(how)
    if how == signal.SIGHUP:
        process.send_signal(how)  # the shell and the system each send it
    code, told, _ = ended(process)
    assert code == 130
    assert told["stopped"] == f"the run was ended by {named}"
    assert told["generated"] == sandbox.ledger.billed
    assert told["failures"] == []
    assert told["not_started"] >= 40
    assert len(pictures()) == sandbox.ledger.billed


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_the_grace_ends_in_time_though_answers_are_still_to_come(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_GRACE_SECONDS", "1")
    sandbox.play(*[Answer(delay=600)] * 8)  # later than the end of the process is waited for
    process = start(campaign(photo, 8), "--max-concurrency", "4")
    wait_until(lambda: len(sandbox.ledger.requests) >= 4, process)
    process.send_signal(how)
    code, told, _ = ended(process)
    assert code == 130
    assert (told["cost_usd"], told["possibly_billed_usd"]) == ("0.00", "0.20")
    assert (told["failed"], told["not_started"]) == (4, 4)
    assert told["failed_manifest"]


def test_the_grace_ends_in_time_in_a_flow_without_a_command_too(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_GRACE_SECONDS", "1")
    sandbox.play(*[Answer(delay=600)] * 8)
    script = photo.parent / "script.py"
    script.write_text(OWN_PROCESS)
    process = subprocess.Popen(
        [sys.executable, str(script), "batch", str(campaign(photo, 8))], stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(sandbox.ledger.requests) >= 4, process)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGTERM
    assert "4 failed, 4 not started; paid 0.00 USD, possibly 0.20 USD more" in log


def test_a_terminal_that_goes_away_ends_a_run_in_order(sandbox: Sandbox, photo: Path) -> None:
    """A dropped ssh: SIGHUP, and no stream to write to any more."""
    manifest = campaign(photo, 60)
    sandbox.play(*[Answer(delay=1.0)] * 200)
    ours, theirs = pty.openpty()
    take = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    )
    refresh = (sys.executable, "-m", "prefect_segmind", "refresh", str(manifest), "--max-concurrency", "4")
    process = subprocess.Popen(
        [sys.executable, "-c", take, *refresh],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    while len(sandbox.ledger.requests) < 5:
        assert process.poll() is None
        if select.select([ours], [], [], 0.01)[0]:
            os.read(ours, 65536)
    os.close(ours)
    assert process.wait(240) == 130
    assert 5 <= len(pictures()) == sandbox.ledger.billed < 60


def test_a_run_that_ignores_the_hang_up_goes_on_to_its_end(sandbox: Sandbox, photo: Path) -> None:
    """As `nohup` has it."""
    sandbox.play(*[Answer(delay=1.0)] * 200)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the process inherits
    try:
        process = start(campaign(photo, 8), "--max-concurrency", "4")
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until(lambda: len(sandbox.ledger.requests) >= 2, process)
    process.send_signal(signal.SIGHUP)
    code, told, _ = ended(process)
    assert (code, told["generated"]) == (0, 8)


OWN_PROCESS = """
import sys
from prefect import flow
from prefect_segmind import generate_image, refresh_assets, upload_image, validate_job

@flow
def own():
    job = validate_job({"name": "mug", "image": sys.argv[2], "prompt": "a red mug number 000"})
    generate_image(job, upload_image(job))

if sys.argv[1] == "own":
    own()
else:
    refresh_assets(sys.argv[2], max_concurrency=4)
"""


def hung_up(photo: Path, what: str, path: Path, requests: int, sandbox: Sandbox) -> int:
    """Runs a flow as a worker's process does, without a command, and hangs up on it."""
    sandbox.play(*[Answer(delay=2.0)] * 200)
    script = photo.parent / "script.py"
    script.write_text(OWN_PROCESS)
    process = subprocess.Popen(
        [sys.executable, str(script), what, str(path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(sandbox.ledger.requests) >= requests, process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=240)
    return process.returncode


def test_a_flow_in_a_process_of_its_own_is_ended_by_a_hang_up_in_order_too(sandbox: Sandbox, photo: Path) -> None:
    assert hung_up(photo, "batch", campaign(photo, 60), 5, sandbox) == -signal.SIGHUP
    assert 5 <= len(pictures()) == sandbox.ledger.billed < 60
    assert all(each.state == "done" for each in records())


def test_a_hang_up_on_somebodys_own_flow_leaves_a_record_of_what_may_have_been_billed(
    sandbox: Sandbox, photo: Path
) -> None:
    assert hung_up(photo, "own", photo, 1, sandbox) == -signal.SIGHUP
    ((attempt,),) = [each.attempts for each in records()]
    assert attempt.possibly_billed


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGHUP], ids=["ctrl-c", "sighup"])
def test_a_signal_of_a_terminal_ends_a_run_with_a_temporary_server_in_time_and_leaves_nothing_behind(
    sandbox: Sandbox, photo: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """A terminal interrupts the whole process group, Prefect's temporary server with it."""
    sandbox.play(*[Answer(delay=1.0)] * 200)
    process = start(campaign(photo, 60), "--max-concurrency", "4", "--verbose", home=tmp_path / "prefect")
    wait_until(lambda: len(sandbox.ledger.requests) >= 5, process)
    os.killpg(process.pid, how)
    code, told, log = ended(process)
    assert code == 130, log
    assert told["generated"] == sandbox.ledger.billed >= 5
    assert told["failures"] == []
    assert len(pictures()) == sandbox.ledger.billed
    with closing(sqlite3.connect(tmp_path / "prefect" / "prefect.db")) as database:
        ((state,),) = database.execute("SELECT state_type FROM flow_run")
    assert state in {"CRASHED", "CANCELLED"}, "the server was there to the end: no call to it was tried for minutes"
    assert "Error logging to API" not in log
    server = re.search(r"Starting temporary server on (http://[\d.:]+)", log)
    assert server
    with pytest.raises(httpx.ConnectError):
        httpx.get(server[1])
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
