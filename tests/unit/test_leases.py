"""A claim is kept for as long as its run needs it and no longer, whatever befalls the others and the store."""

from __future__ import annotations

import json
import linecache
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from prefect_segmind.archive import leases
from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.leases import Life
from prefect_segmind.archive.record import LEASE_SECONDS, Holder, Record, Run
from prefect_segmind.errors import PreconditionFailedError, StoreError, StoreUnreachableError
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services
from prefect_segmind.storage.local import LocalStore
from prefect_segmind.storage.s3 import S3Store
from prefect_segmind.storage.store import StoredObject
from tests.support.waiting import until
from tests.support.walk import archive_picture, generate, up_to_upload, walk


def claimed(archive: Archive, fingerprint: str, run: str = "a run") -> leases.Claim:
    claim = leases.claim(archive, archive.read(fingerprint), fingerprint, Run(run))
    assert claim is not None
    return claim


def holder(archive: Archive, fingerprint: str = "ab" * 32) -> Holder | None:
    found = archive.read(fingerprint)
    assert found is not None
    return found.record.holder


def renewed_by_this_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the threads that renew claims, which earlier tests have started, from those of this test."""
    this, take_turn = threading.current_thread(), leases.Claim.take_turn
    monkeypatch.setattr(
        leases.Claim, "take_turn", lambda claim: threading.current_thread() is this and take_turn(claim)
    )


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


def test_a_claim_that_is_released_is_given_up_in_the_record_and_never_renewed(archive: Archive) -> None:
    claim = claimed(archive, "ab" * 32)
    claim.release()
    claim.hold(1000)
    with pytest.raises(PreconditionFailedError, match="has been released"):
        claim.write(Record.renewed)
    assert leases.held_claim(archive, "ab" * 32) is None
    claim.renew()
    assert holder(archive) is None
    with pytest.MonkeyPatch.context() as now:
        now.setattr(archive, "write", lambda *_: pytest.fail("written again"))
        claim.renew()


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
    renewed_by_this_thread_alone(monkeypatch)
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
from prefect_segmind.storage.local import LocalStore
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
        assert leases._life_of(holder_in(child)) is Life.ALIVE
    finally:
        child.communicate(b"\n")


# Who is alive

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the start of a process is not read")


@contextmanager
def process(code: str = "input()", *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process of this host, until it is ended."""
    command = [sys.executable, "-c", code, *arguments]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def holder_in(child: subprocess.Popen[Any], **other: Any) -> Holder:
    """Another process as the holder of a claim."""
    started = leases._look_at(child.pid)[0] or ""
    facts = {"run": "theirs", "host": leases.host_id(), "pid": child.pid, "started": started, "process": "theirs"}
    return Holder.model_validate(facts | other)


def hidden(monkeypatch: pytest.MonkeyPatch, pid: int) -> None:
    """Lets nobody see a process, as `hidepid` and `ProtectProc=invisible` do."""
    read = Path.read_text

    def read_text(self: Path, *what: Any, **more: Any) -> str:
        if self == Path(f"/proc/{pid}/stat"):
            raise FileNotFoundError
        return read(self, *what, **more)

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.parametrize(("started", "seen", "gone"), [*product(("", "17"), (None, "17", "99"), (True, False))])
def test_dead_is_only_what_is_known_to_be_dead(started: str, seen: str | None, gone: bool) -> None:
    another = bool(started and seen and started != seen)
    found = leases.life(started, seen, gone)
    assert (found is Life.DEAD) is (gone or another)
    assert (found is Life.ALIVE) is (not gone and started == seen == "17")


@linux
def test_a_process_is_seen_to_live_to_have_died_and_to_be_another_of_the_same_number() -> None:
    with process() as child:
        alive = holder_in(child)
        assert leases._life_of(alive) is Life.ALIVE
        assert leases._life_of(alive.model_copy(update={"started": "1"})) is Life.DEAD
        assert leases._life_of(alive.model_copy(update={"started": ""})) is Life.UNKNOWN
        assert leases._life_of(alive.model_copy(update={"host": "another"})) is Life.UNKNOWN
        child.kill()
        until(lambda: leases._life_of(alive) is Life.DEAD)  # nobody has waited for it: a zombie
        child.communicate()
        assert leases._life_of(alive) is Life.DEAD


@linux
def test_a_process_that_may_not_be_seen_is_not_dead_until_the_system_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with process() as child:
        alive = holder_in(child)
        hidden(monkeypatch, child.pid)
        assert leases._life_of(alive) is Life.UNKNOWN
        with monkeypatch.context() as of_another_user:
            of_another_user.setattr(os, "kill", refuse)
            assert leases._life_of(alive) is Life.UNKNOWN
        child.kill()
        child.communicate()
        assert leases._life_of(alive) is Life.DEAD
    assert leases._life_of(alive.model_copy(update={"pid": 10**30})) is Life.UNKNOWN


def refuse(*_: object) -> None:
    raise PermissionError


@linux
def test_the_processes_of_another_container_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc is that of the host, or nothing tells containers apart, the numbers in it are others."""
    with process() as child:
        alive = holder_in(child)
        with monkeypatch.context() as foreign:
            foreign.setattr(Path, "readlink", lambda _: Path("/proc/1"))
            foreign.setattr(leases, "host_id", lambda: alive.host)
            assert leases._life_of(alive.model_copy(update={"started": "another's"})) is Life.UNKNOWN
        with monkeypatch.context() as blind:
            blind.setattr(Path, "readlink", refuse)
            ours, theirs = leases._host_of("ours"), leases._host_of("theirs")
        leases._host_of.cache_clear()
        assert ours != theirs


def held(archive: Archive, holder: Holder, monkeypatch: pytest.MonkeyPatch, age: float) -> bool:
    """Whether a claim of this holder, last written so long ago, is held."""
    record = Record(fingerprint="ab" * 32).claimed_by(holder, datetime.now(UTC))
    found = archive.read(record.fingerprint)
    archive.write(record, found.etag if found else None)
    with monkeypatch.context() as now:
        now.setattr(StoredObject, "age", age)
        return leases.held_elsewhere(archive, archive.read(record.fingerprint), "my run")


@linux
def test_proof_of_life_wins_over_age_and_only_where_there_is_none_the_age_decides(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process() as child:
        alive = holder_in(child)
        for age in (0.0, 1e6):
            assert held(archive, alive, monkeypatch, age)
            assert not held(archive, alive.model_copy(update={"started": "1"}), monkeypatch, age)
            assert held(archive, alive.model_copy(update={"host": "another"}), monkeypatch, age) is (age == 0)
            of_an_earlier_version = alive.model_copy(update={"process": ""})
            assert held(archive, of_an_earlier_version, monkeypatch, age) is (age == 0)
        hidden(monkeypatch, child.pid)
        assert held(archive, alive, monkeypatch, LEASE_SECONDS - 1)
        assert not held(archive, alive, monkeypatch, LEASE_SECONDS + 1)


CLAIMS = """
import sys
from prefect_segmind.archive import leases
from prefect_segmind.archive.record import Run
from prefect_segmind.services import Services
from prefect_segmind.storage.local import LocalStore
archive = Services(archive=sys.argv[1]).archive
claim = leases.claim(archive, archive.read("ab" * 32), "ab" * 32, Run("their run"))
print(claim is not None, flush=True)
input()
"""


@linux
def test_a_process_that_is_stopped_keeps_its_claim_and_is_named_until_it_is_killed(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process(CLAIMS, archive.url) as child:
        assert child.stdout
        assert child.stdout.readline() == "True\n"
        child.send_signal(signal.SIGSTOP)
        found = archive.read("ab" * 32)
        assert leases.not_renewed(found) is None
        monkeypatch.setattr(StoredObject, "age", 3600.0)
        assert leases.held_elsewhere(archive, found, "my run")
        assert f"process {child.pid} of this host holds the claim and is alive, but has not renewed it for 3600 s" in (
            leases.not_renewed(found) or ""
        )
        child.kill()
        child.communicate()
        assert not leases.held_elsewhere(archive, found, "my run")
        assert leases.not_renewed(found) is None


def test_a_copy_of_this_process_is_another_one_and_an_earlier_version_of_it_is_not(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its id: a machine that was copied while it ran, or exec, leaves host, number and start as they are."""
    ours = leases.this_process(Run("another run"))
    copy = ours.model_copy(update={"process": "another"})
    for age in (0.0, LEASE_SECONDS + 1):
        assert not held(archive, ours, monkeypatch, age), "this process would know"
        assert held(archive, copy, monkeypatch, age) is (age == 0)
        if ours.started:
            assert not held(archive, ours.model_copy(update={"process": ""}), monkeypatch, age)
            assert not held(archive, copy.model_copy(update={"started": "1"}), monkeypatch, age)


FORKS = """
import json, os, sys
from prefect_segmind.archive import leases
from prefect_segmind.archive.record import Record, Run
from prefect_segmind.errors import PreconditionFailedError
from prefect_segmind.services import Services
from prefect_segmind.storage.local import LocalStore
archive = Services(archive=sys.argv[1]).archive
claim = leases.claim(archive, None, "ab" * 32, Run("a run"))
before, threads = leases.this_process(Run("a run")), leases._watch
ours, theirs = os.pipe()
claim._lock.acquire()  # by a renewal in another thread, say
leases._lock.acquire()
child = os.fork()
if child:
    leases._lock.release()
    claim._lock.release()
    seen = json.loads(os.read(ours, 10_000))
    os.waitpid(child, 0)
    print(json.dumps(seen | {"parent": leases.held_claim(archive, "ab" * 32) is claim}))
    sys.exit()
seen = {"forgot": leases.held_claim(archive, "ab" * 32) is None}
now = leases.this_process(Run("a run"))
seen["same id"] = now.process == before.process
etag = archive.read("ab" * 32).etag
claim.renew()
claim.give_up()
try:
    claim.write(Record.renewed)
except PreconditionFailedError:
    seen["renewed"] = archive.read("ab" * 32).etag != etag
seen["waits for the parent"] = leases.held_elsewhere(archive, archive.read("ab" * 32), "another run")
own = leases.claim(archive, None, "cd" * 32, Run("a run"))
seen["claims"] = leases.held_claim(archive, "cd" * 32) is own
seen["renews"] = leases._watch is not threads and leases._watch.is_alive()
os.write(theirs, json.dumps(seen).encode())
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cannot fork")
def test_a_forked_process_is_one_of_its_own_and_renews_nothing_of_its_parents(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKS, str(tmp_path / "archive")]
    ended = subprocess.run(command, cwd=ROOT, timeout=60, check=True, stdout=subprocess.PIPE)
    assert json.loads(ended.stdout) == {
        "forgot": True,
        "same id": False,
        "renewed": False,
        "waits for the parent": True,
        "claims": True,
        "renews": True,
        "parent": True,
    }


NOTES = """
import sys
from decimal import Decimal
from prefect_segmind.archive import leases
from prefect_segmind.archive.record import Run
from prefect_segmind.services import Services
from prefect_segmind.storage.local import LocalStore
claim = leases.claim(Services(archive=sys.argv[1]).archive, None, "ab" * 32, Run("a run"))
claim.sending()
claim.note(lambda record: record.with_outcome(status=200, possibly_billed=False, kept="here", cost_usd=Decimal("0.05")))
"""


def test_what_is_only_noted_is_written_when_the_process_ends(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", NOTES, str(tmp_path)], cwd=ROOT, timeout=60, check=True)
    found = Archive(LocalStore(tmp_path)).read("ab" * 32)
    assert found is not None
    assert [(each.status, each.kept) for each in found.record.attempts] == [(200, "here")]


# What must be written, and may not have been


def test_a_claim_is_known_to_this_process_before_others_can_read_it(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, write = [], archive.write

    def watched(record: Record, etag: str | None) -> str:
        written = write(record, etag)
        seen.append(leases.held_elsewhere(archive, archive.read(record.fingerprint), "another run"))
        return written

    monkeypatch.setattr(archive, "write", watched)
    claimed(archive, "ab" * 32).release()
    assert seen == [True]


def broken(archive: Archive, monkeypatch: pytest.MonkeyPatch, error: BaseException, *, after: bool) -> None:
    """Lets the next write of a record fail, once it has taken effect or before."""
    write = archive.write

    def fails(record: Record, etag: str | None) -> str:
        monkeypatch.setattr(archive, "write", write)
        if after:
            write(record, etag)
        raise error

    monkeypatch.setattr(archive, "write", fails)


FAILURES = [
    StoreUnreachableError("no answer"),
    StoreError("the server failed", status=500),
    StoreError("slow down", status=503),
    AttributeError("botocore's"),
    KeyboardInterrupt(),
]
failures = pytest.mark.parametrize("error", FAILURES, ids=lambda each: type(each).__name__)
when = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


@failures
@when
@pytest.mark.parametrize("begin", [leases.Claim.begin_request, leases.Claim.take_over], ids=["to pay", "to ask"])
def test_a_claim_whose_write_has_failed_counts_nothing_even_if_it_took_effect(
    archive: Archive,
    monkeypatch: pytest.MonkeyPatch,
    begin: Callable[[leases.Claim, Holder], None],
    error: BaseException,
    after: bool,
) -> None:
    lost = Record(fingerprint="ab" * 32).claimed_by(
        Holder(run="long ago", host="another", pid=1, started=""), datetime.now(UTC)
    )
    archive.write(lost, None)
    renewed_by_this_thread_alone(monkeypatch)
    broken(archive, monkeypatch, error, after=after)
    with pytest.raises(type(error)):
        leases.claim(archive, archive.read("ab" * 32), "ab" * 32, Run("a run"), begin)
    assert leases.held_claim(archive, "ab" * 32) is None
    assert leases.settle(archive, "ab" * 32)
    found = archive.read("ab" * 32)
    assert found is not None
    assert found.record == lost, "the run that takes over from the dead one reports what that may have been billed"
    assert not leases.settle(archive, "ab" * 32)
    assert claimed(archive, "ab" * 32).record.attempts[-1].run == "a run"


@failures
@when
@pytest.mark.parametrize("what", ["another request", "a renewal", "an outcome"])
def test_a_claim_whose_later_write_has_failed_is_still_held_even_if_it_took_effect(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: bool, what: str
) -> None:
    renewed_by_this_thread_alone(monkeypatch)
    claim = claimed(archive, "ab" * 32)
    claim.sending()
    claim.write(lambda record: record.with_outcome(status=429, reason="busy", wait_seconds=1, possibly_billed=False))
    broken(archive, monkeypatch, error, after=after)
    with pytest.MonkeyPatch.context() as now:
        now.setattr(leases, "RENEW_SECONDS", 0.0)
        if what == "another request":
            with pytest.raises(type(error)):
                claim.begin_request(leases.this_process(Run("a run")))
        elif what == "an outcome":
            with pytest.raises(type(error)):
                claim.write(lambda record: record.with_outcome(status=500, possibly_billed=False))
        elif isinstance(error, StoreError):
            claim.renew()
        else:
            with pytest.raises(type(error)):
                claim.renew()
        assert claim.take_turn()
        claim.renew()
    assert leases.held_claim(archive, "ab" * 32) is claim
    found = archive.read("ab" * 32)
    assert found is not None
    assert found.record == claim.record
    assert [each.status for each in found.record.attempts] == [500 if what == "an outcome" else 429]
    claim.give_up()
    assert holder(archive) is None


def test_a_claim_that_was_not_sent_leaves_the_record_as_it_was(archive: Archive) -> None:
    claim = claimed(archive, "ab" * 32)
    claim.give_up()
    found = archive.read("ab" * 32)
    assert found is not None
    assert found.record == Record(fingerprint="ab" * 32)
    claim = claimed(archive, "ab" * 32)
    claim.sending()
    claim.give_up()
    found = archive.read("ab" * 32)
    assert found is not None
    assert [(each.run, each.possibly_billed) for each in found.record.attempts] == [("a run", None)]


def test_a_claim_that_another_run_has_taken_over_is_lost_and_writes_nothing_more(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken_over() -> Record:
        found = archive.read("ab" * 32)
        assert found is not None
        theirs = found.record.claimed_by(Holder(run="fast", host="another", pid=1, started=""), datetime.now(UTC))
        archive.write(theirs, found.etag)
        return theirs

    changes: list[Callable[[leases.Claim], object]] = [
        leases.Claim.renew,
        leases.Claim.give_up,
        lambda claim: claim.write(Record.renewed),
        lambda claim: claim.begin_request(leases.this_process(Run("a run"))),
    ]
    for change in changes:
        for uncertain in (False, True):
            found = archive.read("ab" * 32)
            claim = leases.claim(archive, found, "ab" * 32, Run("a run"))
            assert claim is not None
            if uncertain:
                broken(archive, monkeypatch, StoreUnreachableError("no answer"), after=True)
                claim.renew()
            theirs = taken_over()
            with suppress(PreconditionFailedError):
                change(claim)
            assert claim.is_released
            assert leases._known(archive, "ab" * 32) is None
            found = archive.read("ab" * 32)
            assert found is not None
            assert found.record == theirs


@pytest.mark.parametrize("times", [1, 100])
def test_a_write_that_is_refused_though_the_record_is_as_it_was_is_tried_again_and_is_no_lost_claim(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """S3 answers 409 while another write is in progress, be it one that has been given up."""
    refused, write = list[Record](), archive.write

    def conflict(record: Record, etag: str | None) -> str:
        if len(refused) < times:
            refused.append(record)
            raise PreconditionFailedError("a conflict", status=409)
        return write(record, etag)

    monkeypatch.setattr(archive, "write", conflict)
    if times == 1:
        claimed(archive, "ab" * 32).give_up()
        return
    with pytest.raises(StoreError, match="it is as it was") as error:
        claimed(archive, "ab" * 32)
    assert type(error.value) is StoreError
    assert len(refused) == leases.CONFLICTS


class Clock:
    """A clock that only the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        renewed_by_this_thread_alone(monkeypatch)
        self.now = leases.clock()
        monkeypatch.setattr(leases, "clock", lambda: self.now)


@pytest.mark.parametrize("expires", [False, True])
def test_a_claim_that_nobody_holds_any_more_is_given_up_in_the_record_as_soon_as_the_archive_is_back(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, expires: bool
) -> None:
    clock, claim = Clock(monkeypatch), claimed(archive, "ab" * 32)
    claim.sending()

    def down(*_: object) -> str:
        raise StoreUnreachableError("down")

    with monkeypatch.context() as now:
        now.setattr(archive, "write", down)
        if expires:
            claim.hold(-1)
            claim.renew()
        else:
            claim.give_up()
        pauses = []
        for _ in range(6):
            began = clock.now
            while not claim.take_turn():
                clock.now += 1
            claim.renew()
            pauses.append(round(clock.now - began))
    assert pauses == sorted(pauses)
    assert 0 < pauses[-1] <= leases.LONGEST_PAUSE_SECONDS
    assert leases.held_claim(archive, "ab" * 32) is None
    assert holder(archive) is not None
    clock.now += leases.LONGEST_PAUSE_SECONDS
    assert claim.take_turn()
    claim.renew()
    assert holder(archive) is None
    assert leases._known(archive, "ab" * 32) is None


def test_the_right_to_send_is_confirmed_only_where_the_claim_may_have_been_taken_over(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, claim = Clock(monkeypatch), claimed(archive, "ab" * 32)
    written, write = list[Record](), archive.write

    def watched(record: Record, etag: str | None) -> str:
        written.append(record)
        return write(record, etag)

    monkeypatch.setattr(archive, "write", watched)
    clock.now += LEASE_SECONDS / 2
    claim.confirm()
    assert written == []
    clock.now += 1
    claim.confirm()
    assert len(written) == 1
    claim.confirm()
    assert len(written) == 1
    claim.release()
    with pytest.raises(PreconditionFailedError):
        claim.confirm()


def test_a_process_that_was_stopped_for_longer_than_its_claim_was_to_last_gets_the_time_to_go_on(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, claim = Clock(monkeypatch), claimed(archive, "ab" * 32)
    claim.hold(100)
    clock.now += 3600
    claim.renew()
    assert leases.held_claim(archive, "ab" * 32) is claim
    clock.now += LEASE_SECONDS + 1
    claim.renew()
    assert leases.held_claim(archive, "ab" * 32) is claim, "it was stopped once more"
    for _ in range(2):
        clock.now += LEASE_SECONDS - 1
        claim.renew()
    assert leases.held_claim(archive, "ab" * 32) is None
    assert holder(archive) is None


def test_the_clock_of_claims_goes_on_while_the_machine_sleeps() -> None:
    names = {"linux": "CLOCK_BOOTTIME", "darwin": "CLOCK_MONOTONIC"}
    assert getattr(time, names.get(sys.platform, "CLOCK_MONOTONIC"), None) == leases._COUNTS_SLEEP


ENDS = """
import sys
from prefect_segmind.archive import leases
from prefect_segmind.archive.record import Run
from prefect_segmind.errors import StoreUnreachableError
from prefect_segmind.services import Services
from prefect_segmind.storage.local import LocalStore
archive = Services(archive=sys.argv[1]).archive
write = archive.write
def lost(record, etag):
    archive.write = write
    write(record, etag)
    raise StoreUnreachableError("no answer")
archive.write = lost
try:
    leases.claim(archive, None, "ab" * 32, Run("a run"))
except StoreUnreachableError:
    print(archive.read("ab" * 32).record.holder is not None)
"""


def test_a_process_that_ends_takes_back_the_claim_whose_answer_was_lost(archive: Archive) -> None:
    command = [sys.executable, "-c", ENDS, archive.url]
    ended = subprocess.run(command, cwd=ROOT, timeout=60, check=True, stdout=subprocess.PIPE)
    assert ended.stdout == b"True\n"
    found = archive.read("ab" * 32)
    assert found is not None
    assert found.record == Record(fingerprint="ab" * 32)


def interrupted_at(line: int, do: Callable[[], object]) -> bool:
    """Does something, interrupted by Ctrl-C at this line of the claims' code; whether it had so many."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != leases.__file__:
            return None
        # A `with` is traced again when it is left, where no signal is handled.
        if event == "line" and not linecache.getline(leases.__file__, frame.f_lineno).lstrip().startswith("with "):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        do()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left <= 0


def test_an_interrupt_at_any_line_of_a_claim_leaves_nothing_that_anybody_waits_for(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed_by_this_thread_alone(monkeypatch)
    claimed(archive, "ab" * 32).give_up()  # the threads are running
    line = 0
    while interrupted_at(line := line + 1, lambda: claimed(archive, f"{line:064x}")):
        leases.give_up(archive, f"{line:064x}", "a run")
        found = archive.read(f"{line:064x}")
        assert found is None or (found.record.holder, found.record.attempts) == (None, ()), f"line {line}"
        claim = leases.claim(archive, found, f"{line:064x}", Run("another run"))
        assert claim is not None, f"line {line}"
        claim.give_up()
    assert line > 20


def test_an_interrupt_at_any_line_of_giving_up_is_mended_by_the_next_run(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed_by_this_thread_alone(monkeypatch)
    line = 0
    while True:
        line += 1
        claim = claimed(archive, f"{line:064x}")
        if not interrupted_at(line, claim.give_up):
            break
        leases.give_up(archive, f"{line:064x}", "a run")
        leases.settle(archive, f"{line:064x}")
        found = archive.read(f"{line:064x}")
        assert found is not None
        assert (found.record.holder, found.record.attempts) == (None, ()), f"line {line}"
        again = leases.claim(archive, found, f"{line:064x}", Run("another run")) or leases.claim(
            archive, found, f"{line:064x}", Run("another run")
        )
        assert again is not None, f"line {line}"
        again.give_up()
    assert line > 10
