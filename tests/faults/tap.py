"""The tap: every operation of a run on the archive, the outbox and the wire goes through it, numbered, and can fail.

It stands below the code under test, at the store's protocol, at the system calls on the outbox's folder and at the
sockets of httpcore, so that it finds each operation wherever the code makes it.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar
from unittest import mock

import httpcore
from botocore.exceptions import ClientError, EndpointConnectionError
from httpcore._backends.sync import SyncBackend, SyncStream
from prefect.exceptions import TerminationSignal

from prefect_segmind.storage.s3_errors import s3_errors
from prefect_segmind.storage.store import Store

T = TypeVar("T")

STORE, OUTBOX, WIRE = "archive", "outbox", "wire"
READ_BYTES = 600
"""The most bytes that one read of the wire takes, so that there is a point in the middle of a body."""


class Mistake(RuntimeError):
    """A programming error."""


STORE_CODES = {
    "403": "AccessDenied",
    "409": "ConditionalRequestConflict",
    "412": "PreconditionFailed",
    "500": "InternalError",
    "503": "SlowDown",
}
DISK_CODES = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EACCES": errno.EACCES}
MISTAKE, CTRL_C, SIGTERM, GONE = "a programming error", "Ctrl-C", "SIGTERM", "gone"
ENDS = (CTRL_C, SIGTERM, GONE)
"""The kinds after which the process is over."""
ANYWHERE = (MISTAKE, *ENDS)
KINDS = {
    STORE: (*STORE_CODES, "unreachable", *ANYWHERE),
    OUTBOX: (*DISK_CODES, *ANYWHERE),
    WIRE: ("reset", "timeout", *ANYWHERE),
}
"""The kinds of faults in each place."""
OUTAGES = {STORE: ("403", "500", "503", "unreachable"), OUTBOX: tuple(DISK_CODES), WIRE: ("reset", "timeout")}
"""The kinds that may last."""


class Fault(NamedTuple):
    """A fault at one operation.

    Attributes:
        number: The operation's, counted from 1 at the beginning of the first run.
        kind: One of `KINDS` for the place of the operation.
        after: Whether it strikes once the operation has taken effect, so that the answer is lost; else before it.
        lasting: Whether everything in the same place fails alike from then on, until the first run ends.
    """

    number: int
    kind: str
    after: bool = False
    lasting: bool = False

    def __str__(self) -> str:
        when = "from" if self.lasting else "after" if self.after else "at"
        return f"{self.kind} {when} {self.number}"

    @classmethod
    def named(cls, name: str) -> Fault:
        """The fault of a name, as `str` gives it."""
        kind, when, number = name.rsplit(" ", 2)
        return cls(int(number), kind, when == "after", when == "from")


class Operation(NamedTuple):
    """An operation that went through the tap.

    Attributes:
        place: `archive`, `outbox` or `wire`.
        name: Such as `put .segmind`.
        reads: Whether it changes nothing, so that to fail before it is to fail after it.
        creates: Whether it is a conditional write, the only one that a store answers with 409 or 412.
    """

    place: str
    name: str
    reads: bool
    creates: bool = False


def can_fail(operation: Operation, fault: Fault) -> bool:
    """Whether there is such a fault.

    Only a conditional write is refused as one, `access` answers and never fails, what only reads needs no space, and a
    socket that has taken all that was to be sent does not complain of it.
    """
    if fault.kind in ("409", "412"):
        return operation.creates
    if fault.kind in DISK_CODES and (operation.name == "access" or (fault.kind == "ENOSPC" and operation.reads)):
        return False
    if fault.kind in OUTAGES[WIRE] and operation.name in ("send", "ask") and fault.after:
        return False
    return fault.kind in KINDS[operation.place]


@dataclass
class Exchange:
    """The client's side of one HTTP exchange.

    Attributes:
        port: Its port.
        sent: Whether it has begun to send.
        asks: Whether it only asks or downloads, which costs nothing.
        is_disturbed: Whether a fault on this machine came between the answer and those who would have read it.
        is_damaged: Whether the disk has failed while its answer was written: what is there may not be what came.
        received: What has been handed over to the code.
    """

    port: int
    sent: bool = False
    asks: bool = False
    is_disturbed: bool = False
    is_damaged: bool = False
    received: bytes = b""


@dataclass
class Tap:
    """Numbers the operations, and makes those fail that are to.

    Attributes:
        folder: The folder that has the outboxes.
        faults: What fails.
        gone: Ends the process.
        look: What to remember of the moment at which a fault strikes.
        operations: What went through it.
        struck: The faults that have struck, with their operations.
        looks: What there was when each of them struck.
        exchanges: Every HTTP exchange.
    """

    folder: str
    faults: tuple[Fault, ...]
    gone: Callable[[], NoReturn]
    look: Callable[[], object]
    operations: list[Operation] = field(default_factory=list)
    struck: list[tuple[Fault, Operation]] = field(default_factory=list)
    looks: list[Any] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    lasts: bool = True
    _looking: bool = False

    def through(self, operation: Operation, do: Callable[[], T]) -> T:
        """Lets one operation through, or not."""
        if self._looking:
            return do()
        self.operations.append(operation)
        fault = self._fault(operation)
        if fault and not fault.after:
            self._strike(fault, operation)
        result = do()
        if fault and fault.after:
            self._strike(fault, operation)
        return result

    def _fault(self, operation: Operation) -> Fault | None:
        """What fails here: the first operation, from its number on, that can fail like that; after it what lasts."""
        number = len(self.operations)
        for fault in self.faults:
            if fault.number > number or not can_fail(operation, fault):
                continue
            struck = next((each for known, each in self.struck if known == fault), None)
            if struck is None or (fault.lasting and self.lasts and struck.place == operation.place):
                return fault
        return None

    def _strike(self, fault: Fault, operation: Operation) -> NoReturn:
        if fault not in [each for each, _ in self.struck]:
            self._looking = True
            self.looks.append(self.look())
            self._looking = False
        self.struck.append((fault, operation))
        if self.exchanges:
            exchange = self.exchanges[-1]
            exchange.is_disturbed |= operation.place == OUTBOX or fault.kind in ENDS
            exchange.is_damaged |= fault.kind in DISK_CODES and operation.name in ("write", "truncate", "close")
        if fault.kind == MISTAKE:
            raise Mistake("a programming error of the harness")
        if fault.kind == CTRL_C:
            raise KeyboardInterrupt
        if fault.kind == SIGTERM:
            raise TerminationSignal(signal.SIGTERM)
        if fault.kind == GONE:
            self.gone()
        if operation.place == OUTBOX:
            code = DISK_CODES[fault.kind]
            raise OSError(code, os.strerror(code))
        if operation.place == WIRE:
            raise _wire_error(operation.name, fault.kind)
        with s3_errors(f"{operation.name} in the harness"):
            if fault.kind == "unreachable":
                raise EndpointConnectionError(endpoint_url="http://harness")
            facts: Any = {
                "Error": {"Code": STORE_CODES[fault.kind], "Message": "a fault of the harness"},
                "ResponseMetadata": {"HTTPStatusCode": int(fault.kind)},
            }
            raise ClientError(facts, "GetObject" if operation.reads else "PutObject")
        raise AssertionError("s3_errors let an error pass")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Stands at the system calls and the sockets of this process, while it is open."""
        with ExitStack() as patches:
            for name, call in self._system_calls().items():
                patches.enter_context(mock.patch.object(os, name, call))
            patches.enter_context(mock.patch.object(io, "open", self._opener()))
            connect, send, receive = SyncBackend.connect_tcp, SyncStream.write, SyncStream.read
            open_exchanges: dict[int, Exchange] = {}

            def connecting(backend: Any, *where: Any, **more: Any) -> Any:
                def do() -> Any:
                    stream = connect(backend, *where, **more)
                    patches.callback(stream.close)  # an interrupted client may leave it to its traceback
                    exchange = Exchange(stream.get_extra_info("client_addr")[1])
                    self.exchanges.append(exchange)
                    open_exchanges[id(stream)] = exchange
                    return stream

                return self.through(Operation(WIRE, "connect", reads=False), do)

            def sending(stream: Any, data: bytes, timeout: float | None = None) -> None:
                if not data:  # the end of a body: nothing is sent
                    return
                exchange = open_exchanges[id(stream)]

                exchange.sent = True
                exchange.asks |= data.startswith(b"GET ")
                name = "ask" if exchange.asks else "send"
                try:
                    self.through(Operation(WIRE, name, reads=False), lambda: send(stream, data, timeout))
                except httpcore.WriteError:  # httpcore looks for an answer all the same
                    with suppress(OSError):  # the other end was faster
                        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
                    raise

            def receiving(stream: Any, size: int, timeout: float | None = None) -> bytes:
                # Only an answer that is there can be lost: the looks that follow take none of the time in which the API
                # could still take the request.
                select.select([stream.get_extra_info("socket")], [], [], timeout)
                data = self.through(
                    Operation(WIRE, "receive", reads=False), lambda: receive(stream, min(size, READ_BYTES), timeout)
                )
                open_exchanges[id(stream)].received += data
                return data

            with (
                mock.patch.object(SyncBackend, "connect_tcp", connecting),
                mock.patch.object(SyncStream, "write", sending),
                mock.patch.object(SyncStream, "read", receiving),
            ):
                yield

    def _is_outbox(self, path: Any) -> bool:
        with suppress(TypeError, OSError):
            name = str(Path(f"/proc/self/fd/{path}").readlink()) if isinstance(path, int) else os.fspath(path)
            return isinstance(name, str) and name.startswith(self.folder)
        return False

    def _system_calls(self) -> dict[str, Callable[..., Any]]:
        reading = ("stat", "lstat", "listdir", "scandir", "access", "statvfs")
        writing = ("mkdir", "chmod", "open", "fsync", "posix_fallocate", "replace", "rename", "unlink", "link", "utime")

        def tapped(name: str, reads: bool) -> Callable[..., Any]:
            real = getattr(os, name)

            def call(path: Any, *more: Any, **named: Any) -> Any:
                if not self._is_outbox(path):
                    return real(path, *more, **named)
                return self.through(Operation(OUTBOX, name, reads), lambda: real(path, *more, **named))

            return call

        return {name: tapped(name, name in reading) for name in (*reading, *writing)}

    def _opener(self) -> Callable[..., Any]:
        real = io.open

        def tapped(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            if not self._is_outbox(path):
                return real(path, mode, *more, **named)
            reads = mode in ("r", "rb")
            file = self.through(Operation(OUTBOX, f"open {mode}", reads), lambda: real(path, mode, *more, **named))
            return file if reads else _Written(file, self)

        return tapped


def _wire_error(name: str, kind: str) -> Exception:
    resets = {"connect": httpcore.ConnectError, "receive": httpcore.ReadError}
    timeouts = {"connect": httpcore.ConnectTimeout, "receive": httpcore.ReadTimeout}
    if kind == "reset":
        return resets.get(name, httpcore.WriteError)(f"{kind} by the harness")
    return timeouts.get(name, httpcore.WriteTimeout)(f"{kind} by the harness")


class _Written:
    """A file in the outbox that is open for writing."""

    def __init__(self, file: Any, tap: Tap) -> None:
        self._file, self._tap = file, tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._tap.through(Operation(OUTBOX, "close", reads=False), self._file.flush)
        finally:
            self._file.close()

    def write(self, data: Any) -> int:
        return self._tap.through(Operation(OUTBOX, "write", reads=False), lambda: self._file.write(data))

    def truncate(self, *size: Any) -> int:
        return self._tap.through(Operation(OUTBOX, "truncate", reads=False), lambda: self._file.truncate(*size))


class TappedStore:
    """A store whose operations go through the tap."""

    def __init__(self, store: Store, tap: Tap) -> None:
        self._store, self._tap = store, tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, key: str) -> Any:
        return self._tap.through(Operation(STORE, f"get {_kind(key)}", reads=True), lambda: self._store.get(key))

    def holds(self, key: str, data: bytes) -> bool:
        return self._tap.through(
            Operation(STORE, f"compare {_kind(key)}", reads=True), lambda: self._store.holds(key, data)
        )

    def keys(self, prefix: str) -> Iterator[str]:
        return self._tap.through(Operation(STORE, "list", reads=True), lambda: iter(list(self._store.keys(prefix))))

    def put(self, key: str, data: bytes, content_type: str, **more: Any) -> str:
        conditional = bool(more.get("if_absent") or more.get("if_match"))
        return self._tap.through(
            Operation(STORE, f"put {_kind(key)}", reads=False, creates=conditional),
            lambda: self._store.put(key, data, content_type, **more),
        )


def _kind(key: str) -> str:
    return "record" if key.startswith(".segmind/") else "sidecar" if key.endswith(".json") else "picture"
