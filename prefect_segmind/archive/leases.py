"""Claims on pictures: the right of a run to pay for one, for as long as the run is alive.

A claim is the `holder` in a picture's record. It expires 60 s after the record was last written, by the store's own
clock. Threads of the holder's process renew it every 15 s, several at once, so that a renewal that hangs delays no
other. A claim held by a dead process of this host expires at once.
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
"""A claim whose record was written longer ago is renewed."""
LOOK_SECONDS = 5.0
"""Seconds between looks for such claims."""
RENEWERS = 16
"""The most renewals at once: a store may take minutes over one."""

_claims: dict[tuple[str, str], Claim] = {}
_claiming: set[tuple[str, str]] = set()
_lock = threading.Lock()
_due: SimpleQueue[Claim] = SimpleQueue()
_watch: threading.Thread | None = None


class Claim:
    """The right of one run to pay for one picture. Created by `claim` only.

    Attributes:
        archive: The archive that has the record.
        record: The record as last written.
        run: The run that holds the claim.
    """

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
        """Change the record, and keep the claim for at least one lease more.

        Args:
            change: Makes the new record of the present one.

        Returns:
            The record as written.

        Raises:
            PreconditionFailedError: The claim was lost to another run, or released.
            StoreError: The record could not be written.
        """
        with self._lock:
            if self._released:
                raise PreconditionFailedError(f"the claim on {self.record.fingerprint} has been released")
            self._put(change(self.record))
            self._until = max(self._until, self._written + LEASE_SECONDS)
            return self.record

    def hold(self, seconds: float) -> None:
        """Renew the claim while this process is alive, for at most this long. A released claim stays released.

        Args:
            seconds: From now.
        """
        self._until = time.monotonic() + seconds

    def release(self) -> None:
        """Stop renewing the claim: when this returns, no renewal is in progress, and none follows."""
        with self._lock:
            self._released = True
        with _lock:
            if _claims.get((self.archive.url, self.record.fingerprint)) is self:
                del _claims[self.archive.url, self.record.fingerprint]

    def give_up(self) -> None:
        """Release the claim, in the record too if that can be written, so that no other run waits for this one."""
        with suppress(StoreError):
            self.write(Record.given_up)
        self.release()

    def take_turn(self) -> bool:
        """Whether a renewal is due and not in progress; if so, the caller must call `renew`."""
        if self._renewing or time.monotonic() - self._written < RENEW_SECONDS:
            return False
        self._renewing = True
        return True

    def renew(self) -> None:
        """Write the record again, so that its age starts anew; release a claim that is lost or no longer needed."""
        try:
            with self._lock:
                if self._released:
                    return
                # Decided under the lock: an earlier write has extended the claim, and none can come in between.
                self._released = time.monotonic() > self._until
                try:
                    self._put(self.record.given_up() if self._released else self.record.renewed())
                except PreconditionFailedError:
                    self._released = True
                except StoreError:
                    pass  # the next look tries again, before the lease ends
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
    """Claim a picture for its next request.

    Args:
        archive: The archive that has the record.
        found: The record as just read; None if there was none.
        fingerprint: The picture's.
        run: The run that claims.

    Returns:
        The claim, with the next request in its record; None if another run was faster.

    Raises:
        StoreError: The record cannot be written or read.
    """
    key = archive.url, fingerprint
    with _lock:
        # Between threads of one process this decides, even on a store that ignores conditions.
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
        # A store that ignores conditions may accept two writers: the one that reads itself back has won.
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
    """The claim that this process holds on a picture, if any.

    Args:
        archive: The archive that has the record.
        fingerprint: The picture's.
    """
    with _lock:
        return _claims.get((archive.url, fingerprint))


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
    if holder.host == host_id() and holder.pid == os.getpid():
        mine = held_claim(archive, found.record.fingerprint)
        return mine is not None and mine.run == holder.run
    if found.age > LEASE_SECONDS:
        return False
    return holder.host != host_id() or _process_started(holder.pid) == holder.started


def held_on_this_host(archive: Archive, found: RecordRead | None, run: str) -> bool:
    """Whether another live run of this host holds the claim, and is about to archive the picture in the outbox.

    Takes the arguments of `held_elsewhere`.
    """
    holder = found.record.holder if found else None
    return holder is not None and holder.host == host_id() and held_elsewhere(archive, found, run)


def this_process(run: Run) -> Holder:
    """The holder of a claim by a run in this process.

    Args:
        run: The run.
    """
    started = _process_started(os.getpid()) or ""
    return Holder(run=run.id, host=host_id(), pid=os.getpid(), started=started, flow_runs=run.flow_runs)


@lru_cache(maxsize=1)
def host_id() -> str:
    """An id of this host since it was started, and of this container, which has process ids of its own."""
    parts = [socket.gethostname(), f"{uuid.getnode():x}"]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _process_started(pid: int) -> str | None:
    """When a process of this host started, as text to compare, since ids are reused; None if it is dead."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    if sys.platform != "win32":  # which has no cheap way to ask: there a claim expires by time
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
    return ""


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
            held = list(_claims.values())
        for each in held:
            if each.take_turn():
                _due.put(each)


def _renew_due() -> None:
    while True:
        each = _due.get()
        with suppress(Exception):  # the failure of one renewal must not end the others
            each.renew()
