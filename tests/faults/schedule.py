"""Several processes that want one picture, stepped one operation at a time in any order.

Each run has a thread, but only one of them moves at a time: before each operation on the archive and on the wire it
gives the baton back. What a process knows of its claims is its own; hosts, process ids and the time are the schedule's.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock
from uuid import uuid4

from prefect_segmind.archive import leases
from prefect_segmind.archive.record import LEASE_SECONDS, Run
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import Ledger
from prefect_segmind.pipeline import poll, reconcile
from prefect_segmind.pipeline.archive import ArchivedImage
from tests.faults.api import Api
from tests.faults.tap import OUTBOX, STORE, WIRE, Operation, Tap
from tests.faults.world import LOG, Point, Then, World, world_of

T = TypeVar("T")


class Killed(BaseException):
    """The process is gone: whatever its code does from here on has no effect."""


@dataclass
class Process:
    """A process, and the run in it.

    Attributes:
        then: Its machine and outbox.
        pid: Its number.
        id: What it has drawn at its start.
        claims: The claims that it knows of.
        is_killed: Whether it is gone.
        is_stopped: Whether it stands still, as by SIGSTOP or a laptop's sleep: it renews nothing.
        in_flight: Whether its request may be billed and neither the record nor the provider's history knows of it.
        sends: How many parts of its request are sent.
        asleep: Seconds that have passed since it stopped.
        wakes_at: When its wait ends.
        ended: How its last run has ended.
    """

    then: Then
    pid: int
    id: str = field(default_factory=lambda: uuid4().hex)
    claims: dict[Any, Any] = field(default_factory=dict)
    is_killed: bool = False
    is_stopped: bool = False
    in_flight: bool = False
    sends: int = 0
    asleep: float = 0.0
    wakes_at: float = 0.0
    ended: ArchivedImage | BaseException | None = None
    thread: threading.Thread | None = None
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @property
    def runs(self) -> bool:
        """Whether it has a run that is not over."""
        return self.thread is not None


class _Baton(Tap):
    """A tap that lets the runs' threads go through one at a time."""

    schedule: Schedule

    def through(self, operation: Operation, do: Callable[[], T]) -> T:
        process = self.schedule.process_of_thread()
        if process is None:
            return do()
        if operation.place != OUTBOX:
            self.schedule.yield_at(process, operation)
        if process.is_killed:
            raise Killed
        result = do()
        self.schedule.done(process, operation)
        return result


class Schedule:
    """The processes, their common archive, and the time.

    Args:
        api: The API.
        machines: The machine and outbox of each process.
        scenario: What the API answers.

    Attributes:
        processes: The processes.
        now: Seconds since the beginning.
        excused: Requests that were in flight when their process was gone, or slept for longer than half a lease while
            another machine looked on: nobody can know of them. Where there is a history, that are those only that were
            not sent before that.
        broken_off: How often a process was gone or stood still in the middle of its run, whose work another may do.
        archived: How often a picture was put into the archive.
    """

    def __init__(self, api: Api, machines: tuple[Then, ...], scenario: str = "plain") -> None:
        self.api, self.now, self.excused, self.broken_off, self.archived = api, 0.0, 0, 0, 0
        self._patches = ExitStack()
        self.world: World = self._patches.enter_context(world_of(Point(scenario, "repay", "again"), api, _Baton))
        self.world.clock, self.world.sleep = (lambda: self.now), self._sleep
        assert isinstance(self.world.tap, _Baton)
        self.world.tap.schedule = self
        self.processes = [Process(each, 1000 + number) for number, each in enumerate(machines)]
        self._one_place = len({each.outbox for each in machines}) == 1
        self._current = self.processes[0]
        self._back = threading.Semaphore(0)
        self._runs = 0
        system = SimpleNamespace(**{name: getattr(os, name) for name in dir(os) if not name.startswith("__")})
        system.getpid = lambda: self._current.pid
        for target, name, value in (
            (leases, "os", system),
            (leases, "clock", lambda: self.now),
            (leases, "host_id", lambda: self._current.then.host),
            (leases, "_look_at", self._look_at),
            (leases, "_start_renewers", lambda: None),
            (leases, "_claims", {}),
            (leases, "_process", ""),
            (socket, "gethostname", lambda: self._current.then.host),
            (poll, "monotonic", lambda: self.now),
            (reconcile, "monotonic", lambda: self.now),
            (Gate, "pause", lambda gate, seconds: self._sleep(seconds)),
            (Gate, "rest", lambda _, seconds: self.world.rest(seconds)),
        ):
            self._patches.enter_context(mock.patch.object(target, name, value))
        self._patches.enter_context(self.world.tap.open())

    def close(self) -> None:
        """Ends all runs."""
        for each in self.processes:
            self.kill(each)
        self._patches.close()

    def start(self, process: Process) -> None:
        """Begins a run."""
        self._runs += 1
        run = Run(f"task {self._runs}", ((f"flow {self._runs}", 1),))
        process.ended = None
        process.thread = threading.Thread(target=self._run, args=(process, run), daemon=True)
        process.thread.start()

    def step(self, process: Process, operations: int = 1) -> None:
        """Lets a run go on for some operations, unless it sleeps, stands still or is over."""
        for _ in range(operations):
            if not process.runs or process.is_stopped or process.wakes_at > self.now:
                return
            self._hand_over(process)

    def kill(self, process: Process) -> None:
        """Ends a process, as by `kill -9`."""
        self.broken_off += process.runs
        told = self._has_history or (self._one_place and self._has_arrived())
        if process.in_flight and not process.is_killed and not told:
            self.excused += 1
        process.is_killed, process.is_stopped, process.in_flight = True, False, False
        while process.runs:
            self._hand_over(process)
        process.claims.clear()

    def stop(self, process: Process) -> None:
        """Lets a process stand still, as by SIGSTOP."""
        self.broken_off += process.runs
        process.is_stopped = not process.is_killed

    def replace(self, process: Process) -> None:
        """A new process takes the place of one that is gone."""
        number = self.processes.index(process)
        self.processes[number] = Process(process.then, process.pid + 10)

    def elapse(self, seconds: float) -> None:
        """Lets time pass; processes that do not stand still renew their claims."""
        while seconds > 0:
            step = min(seconds, leases.LOOK_SECONDS)
            seconds, self.now = seconds - step, self.now + step
            self.world.make_older(step)
            for each in self.processes:
                if each.is_stopped:
                    self._sleep_on(each, step)
                elif not each.is_killed:
                    self._renew(each)

    def finish(self) -> None:
        """Lets everybody go on until all runs are over."""
        for each in self.processes:
            each.is_stopped, each.asleep = False, 0.0
        for _ in range(400):
            waiting = [each for each in self.processes if each.runs]
            if not waiting:
                return
            for each in waiting:
                self.step(each, 200)
            self.elapse(leases.LOOK_SECONDS)
        raise AssertionError(f"runs wait for ever: {waiting}")

    def process_of_thread(self) -> Process | None:
        """The process whose run this thread is."""
        return next((each for each in self.processes if each.thread is threading.current_thread()), None)

    def yield_at(self, process: Process, operation: Operation) -> None:
        """Gives the baton back before an operation, and takes it again."""
        if operation.place == WIRE and operation.name == "send":
            process.in_flight = True
        self._back.release()
        process.go.acquire()

    def done(self, process: Process, operation: Operation) -> None:
        """Notes what a process has done."""
        if operation == Operation(STORE, "put record", reads=False, creates=True):
            process.in_flight = False
        self.archived += operation.name == "put picture"
        if operation.name == "connect":
            process.sends = 0
        if operation.name == "send":
            process.sends += 1
            if process.sends == 2 and self._has_history:  # head and body: the provider has it, and its history lists it
                process.in_flight = False

    @property
    def _has_history(self) -> bool:
        return self.api.scenario.history == "answers"

    def _run(self, process: Process, run: Run) -> None:
        process.go.acquire()
        try:
            if not process.is_killed:
                pipeline = self.world.pipeline(Ledger(), process.then, self.world.history())
                process.ended = pipeline.produce(self.world.job, run, LOG)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the machine looks at it
            process.ended = error
        process.thread = None
        self._back.release()

    def _hand_over(self, process: Process) -> None:
        self._become(process)
        process.go.release()
        assert self._back.acquire(timeout=20), "the harness hangs"
        process.claims = leases._claims

    def _become(self, process: Process) -> None:
        self._current = process
        leases._claims, leases._process = process.claims, process.id

    def _sleep(self, seconds: float) -> None:
        process = self.process_of_thread()
        assert process is not None
        process.wakes_at = self.now + seconds
        self.yield_at(process, Operation(STORE, "wait", reads=True))
        if process.is_killed:
            raise Killed

    def _sleep_on(self, process: Process, seconds: float) -> None:
        process.asleep += seconds
        if process.in_flight and not self._one_place and process.asleep > LEASE_SECONDS / 2:
            self.excused, process.in_flight = self.excused + 1, False

    def _renew(self, process: Process) -> None:
        self._become(process)
        for claim in list(process.claims.values()):
            if claim._lock.acquire(blocking=False):  # else its run writes at this moment
                claim._lock.release()
                if claim.take_turn():
                    claim.renew()

    def _look_at(self, pid: int) -> tuple[str | None, bool]:
        found = next((each for each in self.processes if each.pid == pid), None)
        return ("started", False) if found and not found.is_killed else (None, True)

    def _has_arrived(self) -> bool:
        files = self.world.contents()
        return any(each in files for each in self.api.pictures)
