"""Claims on pictures: the right of a run to pay for one, for as long as the run is alive.

A claim is the `holder` in a picture's record. Threads of the holder's process renew it every 15 s, several at once, so
that a renewal that hangs delays no other. Another run takes it over only from a dead holder:

- One that this host still runs is alive, however long ago it has renewed: it may be stopped, or have slept.
- One that this host is known not to run any more is dead at once.
- Of any other nothing is known: it counts as dead once the record was last written more than 60 s ago, by the store's
  own clock.

A claim that its run no longer needs is given up in the record too. Where that cannot be written, or where a write may
have taken effect though its answer was lost, the same threads try until it is written or another run has the picture:
nobody waits for a claim that nobody holds.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from enum import Enum
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue

from prefect_segmind.archive.archive import Archive, RecordRead
from prefect_segmind.archive.record import LEASE_SECONDS, Asked, Holder, Record, Run
from prefect_segmind.errors import PreconditionFailedError, StoreError

RENEW_SECONDS = 15.0
"""A claim whose record was written longer ago is renewed."""
LOOK_SECONDS = 5.0
"""Seconds between looks for such claims."""
LONGEST_PAUSE_SECONDS = 60.0
"""The most seconds between two tries to give up a claim in the record."""
EXIT_SECONDS = 5.0
"""How long a process that ends tries to give up what it could not give up before."""
RENEWERS = 16
"""The most renewals at once: a store may take minutes over one."""
CONFLICTS = 3
"""How often a write is tried that is refused though the record is as it was: S3 answers so while another is running."""

_COUNTS_SLEEP = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))

_claims: dict[tuple[str, str], Claim] = {}
_lock = threading.Lock()
_due: SimpleQueue[Claim] = SimpleQueue()
_watch: threading.Thread | None = None
_process = uuid.uuid4().hex
"""An id of this process, to tell it from those that had or will have its number, and from copies of it."""


def clock() -> float:
    """Seconds on a clock that nobody sets and that goes on while the machine sleeps.

    `CLOCK_MONOTONIC` stops meanwhile on Linux, and goes on in macOS; `time.monotonic()` stops in macOS, and goes on in
    Windows. While a virtual machine is paused, its clocks may all stand still.
    """
    return time.monotonic() if _COUNTS_SLEEP is None else time.clock_gettime(_COUNTS_SLEEP)


class Claim:
    """The right of one run to pay for one picture. Created by `claim` only.

    Args:
        archive: As below.
        found: The record as just read; None if there was none.
        fingerprint: The picture's.
        run: As below.

    Attributes:
        archive: The archive that has the record.
        record: The record as last written, or as it is to be written.
        run: The run that holds the claim.
        is_new: Whether the archive had nothing of the picture when it was claimed.
        is_idle: Whether the picture waits in the outbox, and nothing in this process is about to archive it.
        is_released: Whether the run holds it no longer: it has released or lost it.
    """

    def __init__(self, archive: Archive, found: RecordRead | None, fingerprint: str, run: str) -> None:
        self.archive = archive
        self.record = found.record if found else Record(fingerprint=fingerprint)
        self.run = run
        self.is_new = False
        self.is_idle = False
        self.is_released = False
        self._etag = found.etag if found else None
        self._stored = self.record
        self._uncertain: list[Record] = []  # while it is not known which of them is in the archive
        self._before: Record | None = self.record  # without the last request, until that is sent
        self._left: Record | None = None  # what a released claim has still to write
        self._written = clock()
        self._until = self._written + LEASE_SECONDS
        self._in_turn = False
        self._pause = 0.0
        self._tried = self._written
        self._lock = threading.RLock()

    def begin_request(
        self,
        holder: Holder,
        asked: Asked | None = None,
        image_file: str | None = None,
        shares: tuple[str, ...] = (),
    ) -> None:
        """Write the claim and the next request into the record.

        Args:
            holder: The run, in this process.
            asked: What the request is for.
            image_file: The address of the source image that is sent, without its query.
            shares: The shares of shared budgets that the request is paid from.

        Raises:
            PreconditionFailedError: The claim was lost to another run, or released.
            StoreError: The record could not be written.
        """
        self._begin(lambda record: record.claimed_by(holder, datetime.now(UTC), asked, image_file, shares))

    def take_over(self, holder: Holder) -> None:
        """Write the claim into the record without a request, to ask the provider for earlier ones.

        Args:
            holder: The run, in this process.

        Raises:
            PreconditionFailedError: The claim was lost to another run, or released.
            StoreError: The record could not be written.
        """
        with self._lock:
            self._begin(lambda record: record.taken_over_by(holder))
            self._before = None

    def _begin(self, change: Callable[[Record], Record]) -> None:
        """Write the claim with a change, which is undone by a release until it is known to be written."""
        with self._lock:
            self._require()
            ours = self.record.holder is not None and self.record.holder.run == self.run
            self._before = self.record.given_up() if ours else self.record
            self._put(change(self.record))
            self._until = max(self._until, self._written + LEASE_SECONDS)

    def confirm(self) -> None:
        """Make sure that the claim is still held; the request must be sent as soon as this returns.

        It is, unless the process was stopped: where the record was written longer ago than half a lease, it is written
        again, which fails if another run has taken over.

        Raises:
            PreconditionFailedError: The claim was lost to another run, or released. Nothing may be sent.
            StoreError: The record could not be written. Nothing may be sent.
        """
        with self._lock:
            self._require()
            margin = LEASE_SECONDS / 2
            while clock() - self._written > margin:
                self._put(self.record.renewed())
                margin = LEASE_SECONDS

    def sending(self) -> None:
        """Note that the request in the record is being sent: from here on it stays there."""
        self._before = None

    def write(self, change: Callable[[Record], Record]) -> Record:
        """Change the record, and keep the claim for at least one lease more.

        The claim remembers the change even if it cannot be written; a renewal writes it later.

        Args:
            change: Makes the new record of the present one.

        Returns:
            The record as written.

        Raises:
            PreconditionFailedError: The claim was lost to another run, or released.
            StoreError: The record could not be written.
        """
        with self._lock:
            self.record, self._before = change(self.record), None
            self._require()
            self._put(self.record)
            self._until = max(self._until, self._written + LEASE_SECONDS)
            return self.record

    def note(self, change: Callable[[Record], Record]) -> None:
        """Change the record without writing it: that does the next write or, if none follows, a renewal or the release.

        Args:
            change: Makes the new record of the present one.

        Raises:
            PreconditionFailedError: The claim was lost to another run, or released.
        """
        with self._lock:
            self.record, self._before = change(self.record), None
            self._require()

    def hold(self, seconds: float) -> None:
        """Renew the claim while this process is alive, for at most this long. A released claim stays released.

        Args:
            seconds: From now.
        """
        self._until = clock() + seconds

    def release(self) -> None:
        """Stop renewing the claim: when this returns, no renewal is in progress, and none follows.

        If the record still names its holder, or a request that was never sent, that is mended by `settle`.
        """
        with self._lock:
            if self.is_released:
                return
            self._left = self._before or self.record.given_up()
            self.is_released = True
            if self._left == self._stored and not self._uncertain:
                self._end()

    def settle(self) -> None:
        """Write what a released claim leaves in the record, unless that is written or another run has the picture.

        Raises:
            StoreError: The record could not be written; the renewers try again.
        """
        with self._lock:
            if self._left is not None:
                with suppress(PreconditionFailedError):
                    self._put(self._left)
            self._end()

    @property
    def is_asking(self) -> bool:
        """Whether a thread of this process is sending its request, or waits for the answer."""
        return bool(self.record.attempts) and self.record.attempts[-1].possibly_billed is None

    @property
    def is_settled(self) -> bool:
        """Whether it has nothing left to write: what it is released to, or what is only noted so far."""
        return self._left is None if self.is_released else self.record == self._stored

    def give_up(self) -> None:
        """Release the claim, and settle it at once if the archive is there, so that no other run waits for this one."""
        self.release()
        with suppress(Exception):  # the renewers try again, and what ended the run must not be hidden
            self.settle()

    def take_turn(self) -> bool:
        """Whether `renew` is due and not in progress; if so, the caller must call it."""
        due = self._tried + self._pause if self.is_released else self._written + RENEW_SECONDS
        if self._in_turn or clock() < due:
            return False
        self._in_turn = True
        return True

    def renew(self) -> None:
        """Write the record again, so that its age starts anew; give the claim up once it is no longer needed."""
        try:
            # Decided under the lock: an earlier write has extended the claim, and none can come in between.
            with self._lock:
                self._tried = now = clock()
                if now > self._written + LEASE_SECONDS:  # the process was stopped, or the archive away
                    self._until = max(self._until, now + LEASE_SECONDS)
                if not self.is_released and now <= self._until:
                    with suppress(StoreError):  # lost; or the next look tries again, before the lease ends
                        self._put(self.record.renewed())
                    return
                self._pause = min(2 * self._pause + LOOK_SECONDS, LONGEST_PAUSE_SECONDS)
                self.give_up()
        finally:
            self._in_turn = False

    def forget(self) -> None:
        """Give the claim to nobody and write nothing: it is that of another process, of which this one is a copy."""
        self._lock, self.is_released, self._left = threading.RLock(), True, None

    def _require(self) -> None:
        if self.is_released:
            raise PreconditionFailedError(f"the claim on {self.record.fingerprint} has been released")

    def _put(self, record: Record) -> None:
        began = clock()
        if record not in self._uncertain:  # until it is known to be written, whatever comes in between
            self._uncertain.append(record)
        try:
            self._etag = self._put_over_own(record)
        except PreconditionFailedError:
            self._end()
            raise
        self.record = self._stored = record
        self._written, self._uncertain = began, []

    def _put_over_own(self, record: Record) -> str:
        """Write the record over the version that this claim has written last, be it without an answer."""
        for tries_left in reversed(range(CONFLICTS)):
            try:
                return self.archive.write(record, self._etag)
            except PreconditionFailedError as refused:
                found = self.archive.read(record.fingerprint)
                if found and found.record == record:
                    return found.etag
                known = found.etag if found else None
                if known != self._etag and not (found and found.record in self._uncertain):
                    raise
                if not tries_left:
                    raise StoreError(
                        f"{refused}; but it is as it was: run again later", status=refused.status
                    ) from refused
                self._etag = known
        raise AssertionError("the last try returns or raises")

    def _end(self) -> None:
        self.is_released, self._left = True, None
        key = self.archive.url, self.record.fingerprint
        with _lock:
            if _claims.get(key) is self:
                del _claims[key]


def claim(
    archive: Archive,
    found: RecordRead | None,
    fingerprint: str,
    run: Run,
    begin: Callable[[Claim, Holder], None] = Claim.begin_request,
) -> Claim | None:
    """Claim a picture for its next request.

    Args:
        archive: The archive that has the record.
        found: The record as just read; None if there was none.
        fingerprint: The picture's.
        run: The run that claims.
        begin: Writes the claim into the record.

    Returns:
        The claim, with the next request in its record; None if another run was faster.

    Raises:
        StoreError: The record cannot be written or read.
    """
    _start_renewers()
    claimed = Claim(archive, found, fingerprint, run.id)
    try:
        # Before it is written: a thread of this process that reads the record must not take the claim for a dead one.
        # On a store that ignores conditions this also decides between such threads.
        with _lock:
            other = _claims.setdefault((archive.url, fingerprint), claimed)
        if other is not claimed:
            if other.is_released:
                other.settle()
            return None
        begin(claimed, this_process(run))
        if not archive.store.conditional:
            # It may have accepted two writers: the one that reads itself back has won.
            again = archive.read(fingerprint)
            if again is None or again.record.holder != claimed.record.holder:
                claimed._end()
                return None
    except PreconditionFailedError:
        return None
    except BaseException:
        claimed.release()
        raise
    return claimed


def held_claim(archive: Archive, fingerprint: str) -> Claim | None:
    """The claim that this process holds on a picture, if any.

    Args:
        archive: The archive that has the record.
        fingerprint: The picture's.
    """
    known = _known(archive, fingerprint)
    return None if known is None or known.is_released else known


def give_up(archive: Archive, fingerprint: str, run: str) -> None:
    """Give up the claim that a run holds on a picture, if it does, or try once more to write that it has.

    Args:
        archive: The archive that has the record.
        fingerprint: The picture's.
        run: The run.
    """
    known = _known(archive, fingerprint)
    if known is not None and known.run == run:
        known.give_up()


def settle(archive: Archive, fingerprint: str) -> bool:
    """Write what an earlier run of this process still has to write into a record.

    Args:
        archive: The archive that has the record.
        fingerprint: The picture's.

    Returns:
        Whether there was anything.

    Raises:
        StoreError: The record cannot be written.
    """
    known = _known(archive, fingerprint)
    if known is None or not known.is_released:
        return False
    known.settle()
    return True


class Life(Enum):
    """What is known of the process that holds a claim."""

    ALIVE = "it runs, stopped or not"
    DEAD = "it runs no more"
    UNKNOWN = "it is on another host, or may not be seen"


def life(started: str, seen: str | None, gone: bool) -> Life:
    """Decide whether a process is alive. Pure: the caller has asked the system.

    Args:
        started: When it started, as it has noted; empty if it could not tell.
        seen: When the process that has its id now started; None if that cannot be seen.
        gone: Whether the system says that there is no such process, or that it has ended.

    Example:
        >>> life("17", "17", False).name, life("17", "99", False).name, life("17", None, False).name
        ('ALIVE', 'DEAD', 'UNKNOWN')
    """
    if gone:
        return Life.DEAD
    if not started or seen is None:
        return Life.UNKNOWN
    return Life.ALIVE if seen == started else Life.DEAD


def held_elsewhere(archive: Archive, found: RecordRead | None, run: str) -> bool:
    """Whether another live run holds the claim on a picture.

    Args:
        archive: The archive that has the record.
        found: The record as just read.
        run: The run that asks.
    """
    holder = found.record.holder if found else None
    if found is None or holder is None or holder.run == run:
        return False
    if _is_this_process(holder):
        known = _known(archive, found.record.fingerprint)
        return known is not None and known.run != run
    state = _life_of(holder)
    if state is Life.DEAD:
        return False
    # Earlier versions drew no id, and might live on without giving up what they could not give up at once.
    return (state is Life.ALIVE and bool(holder.process)) or found.age <= LEASE_SECONDS


def held_on_this_host(archive: Archive, found: RecordRead | None, run: str) -> bool:
    """Whether another live run of this host holds the claim, and is about to archive the picture in the outbox.

    Takes the arguments of `held_elsewhere`.
    """
    holder = found.record.holder if found else None
    if found is None or holder is None or holder.host != host_id() or not held_elsewhere(archive, found, run):
        return False
    known = _known(archive, found.record.fingerprint) if _is_this_process(holder) else None
    return known is None or not (known.is_idle or known.is_released)


def not_renewed(found: RecordRead | None) -> str | None:
    """Describe a holder on this host that is alive and has not renewed its claim for long; None for any other.

    Args:
        found: The record as just read.
    """
    holder = found.record.holder if found else None
    if found is None or holder is None or _is_this_process(holder) or _life_of(holder) is not Life.ALIVE:
        return None
    age = found.age
    if age <= 2 * LEASE_SECONDS:
        return None
    return (
        f"process {holder.pid} of this host holds the claim and is alive, but has not renewed it for {age:.0f} s "
        f"(stopped? continue it with kill -CONT {holder.pid}, or end it)"
    )


def this_process(run: Run) -> Holder:
    """The holder of a claim by a run in this process.

    Args:
        run: The run.
    """
    pid = os.getpid()
    started = _look_at(pid)[0] or ""
    return Holder(run=run.id, host=host_id(), pid=pid, started=started, process=_process, flow_runs=run.flow_runs)


def host_id() -> str:
    """An id of this host since it was started, and of this container, which has process ids of its own.

    Where Linux does not show what tells containers apart, it is an id of this process alone: the number of a process in
    another container says nothing.
    """
    return _host_of(_process)


@lru_cache(maxsize=1)
def _host_of(process: str) -> str:
    parts = [socket.gethostname(), f"{uuid.getnode():x}"]
    if sys.platform == "linux":
        try:
            parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
            parts.append(str(Path("/proc/self/ns/pid").readlink()))
        except OSError:
            parts.append(process)
    return " ".join(parts)


def _known(archive: Archive, fingerprint: str) -> Claim | None:
    """The claim that this process holds on a picture, or has released and not settled yet."""
    with _lock:
        return _claims.get((archive.url, fingerprint))


def _is_this_process(holder: Holder) -> bool:
    if holder.host != host_id() or holder.pid != os.getpid():
        return False
    if holder.process:
        return holder.process == _process
    return life(holder.started, *_look_at(holder.pid)) is Life.ALIVE  # written by an earlier version


def _life_of(holder: Holder) -> Life:
    """What is known of another process."""
    if holder.host != host_id():
        return Life.UNKNOWN
    found = life(holder.started, *_look_at(holder.pid))
    # One with this process's number and time, but not its id, has become this one by exec, or is a copy elsewhere.
    return Life.UNKNOWN if found is Life.ALIVE and holder.pid == os.getpid() else found


def _look_at(pid: int) -> tuple[str | None, bool]:
    """When a process of this host started, as text, None if that cannot be seen; and whether it is known to be gone."""
    if sys.platform == "linux":
        with suppress(OSError):
            # Otherwise these are the processes of another container.
            if Path("/proc/self").readlink().name == str(os.getpid()):
                state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
                return fields[18], state in "ZX"
    if sys.platform != "win32":  # where signal 0 is Ctrl-C
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None, True
        except (OSError, OverflowError):
            pass
    return None, False


def _start_renewers() -> None:
    """Start the threads that renew claims. They end with the process, even while a store keeps one waiting."""
    global _watch
    with _lock:
        if _watch is None or not _watch.is_alive():
            _watch = threading.Thread(target=_watch_claims, name="segmind-lease", daemon=True)
            _watch.start()
            for number in range(RENEWERS):
                threading.Thread(target=_renew_due, name=f"segmind-lease-{number}", daemon=True).start()


def _watch_claims() -> None:
    while True:
        time.sleep(LOOK_SECONDS)
        with _lock:
            known = list(_claims.values())
        for each in known:
            if each.take_turn():
                _due.put(each)


def _renew_due() -> None:
    while True:
        each = _due.get()
        with suppress(Exception):  # the failure of one renewal must not end the others
            each.renew()


@atexit.register
def _settle_the_rest() -> None:
    """Let the renewers try once more, for a few seconds, before the process ends."""
    with _lock:
        left = [each for each in _claims.values() if not each.is_settled]
    for each in left:
        _due.put(each)
    until = clock() + EXIT_SECONDS
    while clock() < until and not all(each.is_settled for each in left):
        time.sleep(0.05)


def _after_fork() -> None:
    """Let a copy of the process be one of its own: without the claims, the threads and the locks of the other."""
    global _lock, _due, _watch, _process
    for each in _claims.values():
        each.forget()
    _claims.clear()
    _lock, _due, _watch, _process = threading.Lock(), SimpleQueue(), None, uuid.uuid4().hex


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
