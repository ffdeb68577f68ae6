"""A claim is kept for as long as its run needs it and no longer, whatever befalls the others and the store."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from prefect_segmind.archive import leases
from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.record import Record, Run
from prefect_segmind.errors import PreconditionFailedError, StoreError
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services
from prefect_segmind.storage.s3 import S3Store
from tests.support.waiting import until
from tests.support.walk import archive_picture, generate, up_to_upload, walk


def claimed(archive: Archive, fingerprint: str, run: str = "a run") -> leases.Claim:
    claim = leases.claim(archive, archive.read(fingerprint), fingerprint, Run(run))
    assert claim is not None
    return claim


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Services(archive=str(tmp_path / "archive")).archive


def test_a_renewal_under_way_never_overwrites_a_record_that_is_done(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = generate(*up_to_upload(photo))
    claim = leases.held_claim(Services().archive, generated.job.fingerprint)
    assert claim is not None
    checked, go_on, put = threading.Event(), threading.Event(), S3Store._put

    def slow(self: S3Store, *what: Any, **more: Any) -> str:
        if threading.current_thread() is renewal:
            checked.set()  # a store that ignores conditions: they have been checked, and the write is still to come
            go_on.wait(10)
        return put(self, *what, **more)

    monkeypatch.setattr(S3Store, "_put", slow)
    renewal = threading.Thread(target=claim.renew)
    renewal.start()
    assert checked.wait(10)
    threading.Timer(0.5, go_on.set).start()
    archive_picture(generated)
    renewal.join()
    again = Services().archive.read(generated.job.fingerprint)
    assert again is not None
    assert again.record.state == "done"
    assert walk(photo).status == "reused"
    assert sandbox.ledger.billed == 1


def test_a_claim_that_is_released_is_not_renewed(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = claimed(archive, "ab" * 32)
    claim.release()
    claim.hold(1000)
    monkeypatch.setattr(archive, "write", lambda *_: pytest.fail("written"))
    claim.renew()
    with pytest.raises(PreconditionFailedError, match="has been released"):
        claim.write(Record.renewed)
    assert leases.held_claim(archive, "ab" * 32) is None


def test_a_claim_that_is_no_longer_needed_is_given_up_in_the_record_too(archive: Archive) -> None:
    claim = claimed(archive, "ab" * 32)
    claim.hold(-1)
    claim.renew()
    found = archive.read("ab" * 32)
    assert found is not None
    assert found.record.holder is None
    with pytest.raises(PreconditionFailedError):
        claim.write(Record.renewed)


def test_a_write_keeps_the_claim_that_was_about_to_end(archive: Archive) -> None:
    claim = claimed(archive, "ab" * 32)
    claim.hold(-1)
    claim.write(Record.renewed)
    claim.renew()
    assert leases.held_claim(archive, "ab" * 32) is claim
    claim.release()


def test_a_claim_is_given_up_even_if_the_archive_is_down(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = claimed(archive, "ab" * 32)

    def down(*_: object) -> str:
        raise StoreError("down")

    with monkeypatch.context() as now:
        now.setattr(archive, "write", down)
        claim.give_up()
    assert leases.held_claim(archive, "ab" * 32) is None


def test_a_record_that_was_just_written_is_not_written_again(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = claimed(archive, "ab" * 32)
    assert not claim.take_turn()
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.0)
    assert claim.take_turn()
    assert not claim.take_turn(), "one renewal of a claim at a time"
    claim.renew()
    assert claim.take_turn()
    claim.release()


def test_neither_a_renewal_that_hangs_nor_one_that_breaks_keeps_the_others(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, broken, sound = (claimed(archive, each * 32) for each in ("aa", "bb", "cc"))
    hanging, go_on, broke, write = threading.Event(), threading.Event(), threading.Event(), archive.write

    def slow(record: Record, etag: str | None) -> str:
        if record.fingerprint == hung.record.fingerprint:
            hanging.set()
            go_on.wait(60)
        if record.fingerprint == broken.record.fingerprint:
            broke.set()
            raise AttributeError("botocore's")
        return write(record, etag)

    def renewals() -> int:
        return sound.record.holder.renewals if sound.record.holder else 0

    with monkeypatch.context() as now:
        now.setattr(archive, "write", slow)
        now.setattr(leases, "RENEW_SECONDS", 0.05)
        now.setattr(leases, "LOOK_SECONDS", 0.05)
        until(lambda: hanging.is_set() and broke.is_set())
        before = renewals()
        until(lambda: renewals() >= before + 3)
        sound.release()
        broken.release()
        assert not go_on.is_set()
        go_on.set()
        hung.release()


HANGS = """
import sys, threading, time
from prefect_segmind import services
from prefect_segmind.services import Services
from prefect_segmind.archive import leases
from prefect_segmind.archive.record import Run
leases.RENEW_SECONDS = leases.LOOK_SECONDS = 0.05
archive = Services(archive=sys.argv[1]).archive
claim = leases.claim(archive, None, "ab" * 32, Run("a run"))
hanging = threading.Event()
def hang(*_):
    hanging.set()
    time.sleep(600)
archive.write = hang
assert hanging.wait(30)
"""


def test_a_renewal_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANGS, str(tmp_path / "archive")]
    subprocess.run(command, cwd=Path(__file__).parents[2], env=dict(os.environ), timeout=60, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere its name is not read")
def test_a_process_whose_name_is_no_text_is_alive_like_any_other() -> None:
    code = r"open('/proc/self/comm', 'wb').write(b'caf\xe9'); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        until(lambda: b"caf\xe9" in Path(f"/proc/{child.pid}/comm").read_bytes())
        assert leases._process_started(child.pid)
    finally:
        child.communicate(b"\n")
