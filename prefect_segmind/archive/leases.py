"""Claims on pictures: which run may pay for one, for as long as it lives.

A claim is the `holder` in a picture's record. It holds for 60 s since the record was last written, by the store's own
clock, and threads of the holder's process write it again every 15 s, several at once, so that one that hangs keeps no
other. A holder that is a dead process of this host is dead at once.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue

from prefect_segmind.archive.archive import Archive, RecordRead
from prefect_segmind.archive.record import LEASE_SECONDS, Holder, Record, Run
from prefect_segmind.errors import PreconditionFailedError, StoreError

RENEW_SECONDS = 15.0
"""A record that was written longer ago is written again."""
LOOK_SECONDS = 5.0
"""Seconds between looks for such records."""
RENEWERS = 16
"""Renewals under way at once, at most: a store may take minutes over one."""

_claims: dict[tuple[str, str], Claim] = {}
_claiming: set[tuple[str, str]] = set()
_lock = threading.Lock()
_due: SimpleQueue[Claim] = SimpleQueue()
_watch: threading.Thread | None = None


class Claim:
    """The right of one run to pay for one picture. Made by `claim` only."""

    def __init__(self, archive: Archive, record: Record, etag: str, run: str) -> None:
        self.archive = archive
        self.record = record
        self.run = run
        self._etag = etag
        self._written = time.monotonic()
        self._until = self._written + LEASE_SECONDS
        self._released = False
        self._renewing = False
        self._lock = threading.Lock()

    def write(self, change: Callable[[Record], Record]) -> Record:
        """Changes the record, and keeps the claim for a lease more at least.

        Raises:
            PreconditionFailedError: The claim was lost to another run, or let go.
            StoreError: The record could not be written.
        """
        with self._lock:
            if self._released:
                raise PreconditionFailedError(f"the claim on {self.record.fingerprint} was let go meanwhile")
            self._put(change(self.record))
            self._until = max(self._until, self._written + LEASE_SECONDS)
            return self.record

    def hold(self, seconds: float) -> None:
        """Keeps the claim alive for as long as this process lives, at most for so many seconds more.

        One that is released stays so.
        """
        self._until = time.monotonic() + seconds

    def release(self) -> None:
        """Stops keeping the claim alive: when this returns, no renewal is under way, and none follows."""
        with self._lock:
            self._released = True
        with _lock:
            if _claims.get((self.archive.url, self.record.fingerprint)) is self:
                del _claims[self.archive.url, self.record.fingerprint]

    def give_up(self) -> None:
        """Releases the claim and says so in the record, as far as that can be written: nobody waits for this run."""
        with suppress(StoreError):
            self.write(Record.given_up)
        self.release()

    def take_turn(self) -> bool:
        """Whether the record is to be written again, and nobody is about to do it; `renew` is to follow."""
        if self._renewing or time.monotonic() - self._written < RENEW_SECONDS:
            return False
        self._renewing = True
        return True

    def renew(self) -> None:
        """Writes the record again, so that its age begins anew; lets go of a claim that is lost or no longer needed."""
        try:
            with self._lock:
                if self._released:
                    return
                # Settled under the lock: a write that came before has made the claim last longer, none comes between.
                self._released = time.monotonic() > self._until
                try:
                    self._put(self.record.given_up() if self._released else self.record.renewed())
                except PreconditionFailedError:
                    self._released = True
                except StoreError:
                    pass  # the next look tries again; the lease lives for some more
                over = self._released
            if over:
                self.release()
        finally:
            self._renewing = False

    def _put(self, record: Record) -> None:
        began = time.monotonic()
        self._etag = self.archive.write(record, self._etag)
        self.record, self._written = record, began


def claim(archive: Archive, found: RecordRead | None, fingerprint: str, run: Run) -> Claim | None:
    """Claims a picture for its next request, or says that another run was faster.

    Args:
        archive: Where the record lies.
        found: The record as it was read just now; None if there was none.
        fingerprint: The picture's.
        run: The run that claims.

    Returns:
        The claim, its next request noted in the record; None where it was lost to another run.
    """
    key = archive.url, fingerprint
    with _lock:
        # Threads of one process settle it here, so that it holds on a store that ignores conditions too.
        if key in _claiming or key in _claims:
            return None
        _claiming.add(key)
    try:
        before = found.record if found else Record(fingerprint=fingerprint)
        record = before.claimed_by(this_process(run), datetime.now(UTC))
        try:
            etag = archive.write(record, found.etag if found else None)
        except PreconditionFailedError:
            return None
        # A store that ignores conditions may let two writers through: the one that reads itself has won.
        again = archive.read(fingerprint)
        if again is None or again.record.holder != record.holder:
            return None
        claimed = Claim(archive, record, etag, run.id)
        with _lock:
            _claims[key] = claimed
    finally:
        with _lock:
            _claiming.discard(key)
    _start_renewers()
    return claimed


def held_claim(archive: Archive, fingerprint: str) -> Claim | None:
    """The claim that this process holds on a picture."""
    with _lock:
        return _claims.get((archive.url, fingerprint))


def held_elsewhere(archive: Archive, found: RecordRead | None, run: str) -> bool:
    """Whether another run that lives holds the claim on a picture.

    Args:
        archive: Where the record lies.
        found: The record as it was read just now.
        run: The run that asks.
    """
    holder = found.record.holder if found else None
    if found is None or holder is None or holder.run == run:
        return False
    if holder.host == host_id() and holder.pid == os.getpid():
        mine = held_claim(archive, found.record.fingerprint)
        return mine is not None and mine.run == holder.run
    if found.age > LEASE_SECONDS:
        return False
    return holder.host != host_id() or _process_started(holder.pid) == holder.started


def held_beside(archive: Archive, found: RecordRead | None, run: str) -> bool:
    """Whether another run that lives on this host holds the claim: what lies in the outbox, it is about to archive.

    Args:
        archive: Where the record lies.
        found: The record as it was read just now.
        run: The run that asks.
    """
    holder = found.record.holder if found else None
    return holder is not None and holder.host == host_id() and held_elsewhere(archive, found, run)


def this_process(run: Run) -> Holder:
    """The holder of a claim that a run in this process makes."""
    started = _process_started(os.getpid()) or ""
    return Holder(run=run.id, host=host_id(), pid=os.getpid(), started=started, flow_runs=run.flow_runs)


@lru_cache(maxsize=1)
def host_id() -> str:
    """What tells this host from others, and a container from its neighbours that count their processes anew."""
    parts = [socket.gethostname(), f"{uuid.getnode():x}"]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            link = Path(path)
            parts.append(str(link.readlink()) if link.is_symlink() else link.read_text().strip())
        except OSError:
            continue
    return " ".join(parts)


def _process_started(pid: int) -> str | None:
    """When a process of this host began, as a text to compare; None if it is dead. Guards against reused numbers."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    if sys.platform == "win32":
        return ""  # there is no cheap way to ask: such a holder dies by time
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""


def _start_renewers() -> None:
    """Starts the threads that renew. They end with the process, however long a store keeps one of them."""
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
            held = list(_claims.values())
        for each in held:
            if each.take_turn():
                _due.put(each)


def _renew_due() -> None:
    while True:
        each = _due.get()
        with suppress(Exception):  # whatever befalls one claim, the others live on
            each.renew()
