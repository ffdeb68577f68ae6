"""Claims on pictures: which run may pay for one, for as long as it lives.

A claim is the `holder` in a picture's record. It holds for 60 s since the record was last written, by the store's own
clock, and a thread of the holder's process writes it again every 15 s. A holder that is a dead process of this host is
dead at once.
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
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

from prefect_segmind.archive import Archive, RecordRead
from prefect_segmind.errors import PreconditionFailedError, StoreError
from prefect_segmind.record import LEASE_SECONDS, Holder, Record

RENEW_SECONDS = 15.0

_claims: dict[tuple[str, str], Claim] = {}
_claiming: set[tuple[str, str]] = set()
_lock = threading.Lock()
_renewer: threading.Thread | None = None


class Claim:
    """The right of one run to pay for one picture. Made by `claim` only."""

    def __init__(self, archive: Archive, record: Record, etag: str, run: str) -> None:
        self.archive = archive
        self.record = record
        self.run = run
        self._etag = etag
        self._until = time.monotonic() + LEASE_SECONDS
        self._released = False
        self._lock = threading.Lock()

    def write(self, change: Callable[[Record], Record]) -> Record:
        """Changes the record.

        Raises:
            PreconditionFailedError: The claim was lost to another run.
            StoreError: The record could not be written.
        """
        with self._lock:
            changed = change(self.record)
            self._etag = self.archive.write(changed, self._etag)
            self.record = changed
            return changed

    def hold(self, seconds: float) -> None:
        """Keeps the claim alive for as long as this process lives, at most for so many seconds more."""
        self._until = time.monotonic() + seconds

    def release(self) -> None:
        """Stops keeping the claim alive: when this returns, no renewal is under way, and none follows."""
        with self._lock:
            self._released = True
        with _lock:
            if _claims.get((self.archive.url, self.record.fingerprint)) is self:
                del _claims[self.archive.url, self.record.fingerprint]

    def renew(self) -> None:
        """Writes the record again, so that its age begins anew; lets go of a claim that is lost or no longer needed."""
        if time.monotonic() > self._until:
            self.release()
            return
        try:
            with self._lock:
                if not self._released:
                    # The counter makes the version new, so that nobody takes over by the one from before.
                    holder = self.record.holder
                    renewed = holder and holder.model_copy(update={"renewals": holder.renewals + 1})
                    record = self.record.model_copy(update={"holder": renewed})
                    self._etag = self.archive.write(record, self._etag)
                    self.record = record
        except PreconditionFailedError:
            self.release()
        except StoreError:
            return  # the next round tries again; the lease lives for four of them


def claim(archive: Archive, found: RecordRead | None, fingerprint: str, run: str) -> Claim | None:
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
        record = before.claimed_by(this_process(run), datetime.now(timezone.utc))
        try:
            etag = archive.write(record, found.etag if found else None)
        except PreconditionFailedError:
            return None
        # A store that ignores conditions may let two writers through: the one that reads itself has won.
        again = archive.read(fingerprint)
        if again is None or again.record.holder != record.holder:
            return None
        claimed = Claim(archive, record, etag, run)
        with _lock:
            _claims[key] = claimed
    finally:
        with _lock:
            _claiming.discard(key)
    _start_renewer()
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
    if found is None or holder is None or holder.run == run or found.age > LEASE_SECONDS:
        return False
    if holder.host != host_id():
        return True
    if holder.pid == os.getpid():
        mine = held_claim(archive, found.record.fingerprint)
        return mine is not None and mine.run == holder.run
    return _process_started(holder.pid) == holder.started


def this_process(run: str) -> Holder:
    """The holder of a claim that a run in this process makes."""
    return Holder(run=run, host=host_id(), pid=os.getpid(), started=_process_started(os.getpid()) or "")


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
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
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


def _start_renewer() -> None:
    global _renewer
    with _lock:
        if _renewer is None or not _renewer.is_alive():
            _renewer = threading.Thread(target=_renew_all, name="segmind-lease", daemon=True)
            _renewer.start()


def _renew_all() -> None:
    while True:
        time.sleep(RENEW_SECONDS)
        with _lock:
            held = list(_claims.values())
        for each in held:
            with suppress(Exception):  # whatever befalls one claim, the others live on it
                each.renew()
