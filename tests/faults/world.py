"""The world that one picture walks through: the API, an archive, outboxes, machines and processes, and the time.

Time is the world's own: a wait takes none, it makes every object of the archive older and lets live claims be renewed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn
from unittest import mock

from prefect.exceptions import TerminationSignal

from prefect_segmind.api import client
from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.endpoint import Endpoint
from prefect_segmind.api.listing import RequestHistory
from prefect_segmind.archive import leases, outbox
from prefect_segmind.archive.archive import Archive, record_key
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.archive.record import LEASE_SECONDS, OnUnknown, Record, Run
from prefect_segmind.errors import OutcomeUnknownError, SegmindError
from prefect_segmind.images.inspection import SourceImage
from prefect_segmind.jobs.job import parse_job
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import Ledger, Totals
from prefect_segmind.pipeline import poll, reconcile
from prefect_segmind.pipeline.archive import ArchivedImage, Archiving
from prefect_segmind.pipeline.look_up import LookUp
from prefect_segmind.pipeline.pay import Cashier
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.poll import Poller
from prefect_segmind.pipeline.reconcile import Reconciler
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.upload import Uploads
from prefect_segmind.pipeline.validate import InspectedSource, ValidatedJob, resolve
from prefect_segmind.storage import store
from prefect_segmind.storage.local import LocalStore
from tests.faults.api import PRICE, Api
from tests.faults.tap import ENDS, GONE, Exchange, Fault, Mistake, Operation, Tap, TappedStore

MEMORY = Path("/dev/shm")
RUNS = 5
"""The most runs until a picture is there: one that needs more never comes to an end."""
PATIENCE = 30.0
"""Seconds that a run waits for a request that is under way."""
KEY = "SG_0123456789abcdef"
SOURCE = InspectedSource(SourceImage(format="PNG", width=1024, height=1024, size_bytes=1, sha256="0" * 64))
"""An image that the provider reads where it is: uploads go through no tap."""
LOG = logging.Logger("tests.faults")
LOG.addHandler(logging.NullHandler())


class Stuck(AssertionError):
    """A run waits for longer than any lease lasts."""


class Then(NamedTuple):
    """How the job is run again.

    Attributes:
        name: What the point is called by.
        same_process: Whether the process goes on that had the first run.
        same_flow: Whether it is a later try of the same flow run.
        host: The machine.
        outbox: The outbox there.
    """

    name: str
    same_process: bool = False
    same_flow: bool = False
    host: str = "host 1"
    outbox: str = "outbox 1"


FIRST = Then("first", same_process=True)
THEN = {
    each.name: each
    for each in (
        Then("again", same_process=True),
        Then("next try", same_process=True, same_flow=True),
        Then("later process", same_flow=True),
        Then("new process"),
        Then("other outbox", outbox="outbox 2"),
        Then("other machine", host="host 2", outbox="outbox 3"),
    )
}


class Point(NamedTuple):
    """One point of failure, with all that happens around it.

    Attributes:
        scenario: What the API answers.
        policy: The policy `on_unknown`.
        then: How the job is run again, by its name in `THEN`.
        faults: What fails.
    """

    scenario: str
    policy: OnUnknown
    then: str
    faults: tuple[Fault, ...] = ()

    def __str__(self) -> str:
        return " | ".join([self.scenario, self.policy, self.then, *map(str, self.faults)])

    @classmethod
    def named(cls, name: str) -> Point:
        """The point of a name, as `str` gives it."""
        scenario, policy, then, *faults = name.split(" | ")
        return cls(scenario, "fail" if policy == "fail" else "repay", then, tuple(map(Fault.named, faults)))

    @property
    def kinds(self) -> set[str]:
        """The kinds of its faults."""
        return {each.kind for each in self.faults}


@dataclass
class Told:
    """What a run has told when it was over.

    Attributes:
        run: The run.
        flow: Its flow run.
        ledger: Its ledger; None if it is lost with its process.
        ended: The picture, or what ended it; None if it is gone.
        accounted: What its ledger had for it at that moment.
        waited: Seconds that it has waited for another run.
    """

    run: str
    flow: str
    ledger: Ledger | None
    ended: ArchivedImage | BaseException | None = None
    accounted: Totals | None = None
    waited: float = 0.0


@dataclass
class World:
    """Everything that a picture's walk touches.

    Attributes:
        point: What is tried.
        api: The API.
        job: The job.
        folder: The folder of the archive and the outboxes.
        tap: What all operations go through.
        told: What each run has told.
        at_rest: The record and the files when the first run was over.
        first_run: The number of operations of the first run.
        clock: Its time, in seconds that only grow.
        sleep: Lets time pass for a run that waits.
    """

    point: Point
    api: Api
    job: ValidatedJob
    folder: Path
    tap: Tap
    told: list[Told] = field(default_factory=list)
    at_rest: AtRest | None = None
    first_run: int = 0
    _host: str = FIRST.host
    clock: Callable[[], float] = field(init=False)
    sleep: Callable[[float], None] = field(init=False)
    _later: float = 0.0
    _waited: float = 0.0

    def __post_init__(self) -> None:
        """Makes time its own."""
        self.clock, self.sleep = lambda: time.monotonic() + self._later, self._elapse

    @property
    def store(self) -> LocalStore:
        """The archive's store itself."""
        return LocalStore(self.folder / "archive")

    @property
    def record(self) -> Record | None:
        """The record as it is in the archive."""
        found = self.store.get(record_key(self.job.fingerprint))
        return Record.model_validate_json(found.data) if found else None

    def outbox(self, name: str = FIRST.outbox) -> dict[str, bytes]:
        """The files of an outbox."""
        folder = self.folder / name
        return {each.name: each.read_bytes() for each in sorted(folder.iterdir())} if folder.is_dir() else {}

    def contents(self) -> list[bytes]:
        """What all the files have in them, in the archive and in the outboxes."""
        return [each.read_bytes() for each in self.folder.rglob("*") if each.is_file()]

    @property
    def where(self) -> str:
        """The operations at which the faults have struck."""
        return ", ".join(dict.fromkeys(f"{each.place}: {each.name}" for _, each in self.tap.struck)) or "nowhere"

    def play(self) -> None:
        """The first run, with the faults, and what follows until the picture is there or is refused for good."""
        then = THEN[self.point.then]
        with self._patched():
            if GONE in self.point.kinds:
                self._first_in_a_process_of_its_own()
            else:
                self._run(FIRST)
            self.tap.lasts, self.first_run = False, len(self.tap.operations)
            struck = {fault.kind for fault, _ in self.tap.struck}
            self.at_rest = AtRest(self.record, self.contents(), bool(struck & set(ENDS)))
            if self.at_rest.is_dead or not then.same_process:
                self._end_process()
            if not self._until_it_is_there(then):
                self._until_it_is_there(FIRST._replace(name="back"))
            elif then.outbox != FIRST.outbox:
                self._end_process()
                self._until_it_is_there(FIRST._replace(name="back"))

    def _until_it_is_there(self, then: Then) -> bool:
        """Runs the job until it succeeds and nothing has failed on the way; False if it is refused."""
        for _ in range(RUNS):
            before = len(self.tap.struck)
            self._run(then)
            ended = self.told[-1].ended
            if isinstance(ended, ArchivedImage) and len(self.tap.struck) == before:
                return True
            if isinstance(ended, OutcomeUnknownError):
                return False
        return False

    def _run(self, then: Then) -> None:
        """One run: a task run of a flow run, with its retries."""
        again = then.same_flow and self.told
        number = len(self.told) + 1
        flow = self.told[0].flow if again else f"flow {number}"
        ledger = self.told[-1].ledger if again and then.same_process else None
        if ledger:
            ledger.begin_try()
        told = Told(f"task {number}", flow, ledger or Ledger())
        self.told.append(told)
        self._host, self._waited = then.host, 0.0
        try:
            with self._out_of_reach(then), self.tap.open():
                told.ended = self._retried(told, Run(told.run, ((flow, number),)), then)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the judge looks at it
            told.ended = error
            if not isinstance(error, Exception):
                self._end_process()
        told.waited = self._waited
        if told.ledger and told.ledger.pictures:
            told.accounted = told.ledger.account(self.job.fingerprint, told.run)
        self.api.settle({each.port for each in self.tap.exchanges})

    @contextmanager
    def _out_of_reach(self, then: Then) -> Iterator[None]:
        """Another machine does not see the outbox of the first one."""
        theirs, away = self.folder / FIRST.outbox, self.folder / "out of reach"
        hides = then.host != FIRST.host and theirs.is_dir()
        if hides:
            theirs.rename(away)
        try:
            yield
        finally:
            if hides:
                away.rename(theirs)

    def _retried(self, told: Told, run: Run, then: Then) -> ArchivedImage:
        """The tries of one task run: Prefect tries again where the error's decision says so."""
        assert told.ledger is not None
        history = self.history()
        while True:
            try:
                return self.pipeline(told.ledger, then, history).produce(self.job, run, LOG)
            except SegmindError as error:
                if not (error.decision and error.decision.retry):
                    raise
                self._elapse(error.decision.wait_seconds or 0.0)

    def history(self) -> RequestHistory | None:
        """The provider's request history, as a process reads it; None where it has none to ask."""
        if self.api.history_url is None:
            return None
        open_endpoint = partial(Endpoint, KEY, self.api.history_url)
        return RequestHistory(open_endpoint, log=LOG, clock=self.clock, sleep=self.sleep)

    def pipeline(self, ledger: Ledger, then: Then, history: RequestHistory | None) -> Pipeline:
        """The pipeline of a run."""
        archive = Archive(TappedStore(self.store, self.tap))
        kept = Outbox(self.folder / then.outbox, min_free_bytes=1)
        open_client = partial(SegmindClient, KEY, self.api.url)
        uploads = Uploads(s3=lambda: _never())
        gate = Gate(ledger=ledger)
        reconciler = Reconciler(Poller(gate, PATIENCE), history, self.api.is_v2)
        cashier = Cashier(
            archive, kept, open_client, uploads.address, reconciler, on_unknown=self.point.policy, gate=gate
        )
        return Pipeline(
            reader=SourceReader(s3=lambda: _never(), allow_loopback=True),
            uploads=uploads,
            look_up=LookUp(archive, kept, open_client, ledger, self.point.policy, can_ask=reconciler.can_ask),
            cashier=cashier,
            archiving=Archiving(archive, kept),
            publisher=None,
            price_usd=PRICE,
        )

    def _first_in_a_process_of_its_own(self) -> None:
        """The first run in a child, which ends at the point without a word, as by `kill -9`."""
        facts, end = os.pipe()
        child = os.fork()
        if not child:
            try:
                self.tap.gone = partial(self._vanish, end)
                self._run(FIRST)
            finally:
                self._vanish(end)
        os.close(end)
        with open(facts, encoding="utf-8") as file:  # noqa: PTH123 - a pipe
            seen = json.load(file)
        os.waitpid(child, 0)
        self.tap.operations[:] = [Operation(*each) for each in seen["operations"]]
        self.tap.struck[:] = [(Fault(*fault), Operation(*operation)) for fault, operation in seen["struck"]]
        self.tap.exchanges[:] = [Exchange(*each) for each in seen["exchanges"]]
        self.told.append(Told("task 1", "flow 1", None))
        self.api.settle({each.port for each in self.tap.exchanges})

    def _vanish(self, end: int) -> NoReturn:
        exchanges = [astuple(each)[:-1] for each in self.tap.exchanges]
        seen = {"operations": self.tap.operations, "struck": self.tap.struck, "exchanges": exchanges}
        os.write(end, json.dumps(seen).encode())
        os._exit(9)

    def _end_process(self) -> None:
        """A process that comes to its end gives up in the record what it still can; nobody renews its claims."""
        with suppress(KeyboardInterrupt, TerminationSignal, Mistake):  # it ends all the same
            for claim in list(leases._claims.values()):
                if claim.is_released:
                    with suppress(SegmindError):
                        claim.settle()
        leases._claims.clear()

    def _elapse(self, seconds: float) -> None:
        """Lets time pass."""
        while seconds > 0:
            step = min(seconds, leases.LOOK_SECONDS)
            seconds -= step
            self._later += step
            self.make_older(step)
            for claim in list(leases._claims.values()):
                if claim.take_turn():
                    claim.renew()

    def make_older(self, seconds: float) -> None:
        """Makes all objects of the archive older."""
        for each in self.store.folder.rglob("*"):
            was = each.stat()
            os.utime(each, (was.st_atime - seconds, was.st_mtime - seconds))

    def rest(self, seconds: float) -> bool:
        """A run waits for what is under way at the provider; nobody ends it meanwhile."""
        self.sleep(seconds)
        return True

    def _pause(self, gate: Gate, seconds: float) -> None:
        """Another run holds the picture: look again later."""
        self._waited += seconds
        if self._waited > 10 * LEASE_SECONDS:
            raise Stuck(f"it has waited {self._waited:.0f} s")
        self._elapse(seconds)
        gate._raise_if_stopped()

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """One process after the other, on the machine that is named."""
        with ExitStack() as patches:
            for target, name, value in (
                (leases, "clock", lambda: self.clock()),
                (poll, "monotonic", lambda: self.clock()),
                (reconcile, "monotonic", lambda: self.clock()),
                (leases, "host_id", lambda: self._host),
                (leases, "_start_renewers", lambda: None),
                (socket, "gethostname", lambda: self._host),
                (client, "time", SimpleNamespace(monotonic=time.monotonic, sleep=self._elapse)),
                (store, "time", SimpleNamespace(time=time.time, sleep=self._elapse)),
                (Gate, "pause", lambda gate, seconds: self._pause(gate, seconds)),
                (Gate, "rest", lambda _, seconds: self.rest(seconds)),
            ):
                patches.enter_context(mock.patch.object(target, name, value))
            yield


class AtRest(NamedTuple):
    """What was there when the first run was over.

    Attributes:
        record: The record.
        contents: What the files had in them.
        is_dead: Whether its process is over.
    """

    record: Record | None
    contents: list[bytes]
    is_dead: bool


def _never() -> Any:
    raise AssertionError("the harness has no such thing")


@contextmanager
def world_of(point: Point, api: Api, tap: type[Tap] = Tap) -> Iterator[World]:
    """A world in which nothing has happened."""
    memory = MEMORY if MEMORY.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=memory))
    job = parse_job({"image": f"{api.origin}/mug.png", "name": "mug", "prompt": "a red mug"})
    api.begin(point.scenario)
    world = World(
        point, api, resolve(job, SOURCE), folder, tap(f"{folder}/outbox", point.faults, gone=_never, look=list)
    )
    world.tap.look = world.contents
    try:
        # In memory the reserved space is written, which takes a while.
        with mock.patch.object(outbox, "RESERVED_BYTES", 1 << 16):
            yield world
    finally:
        leases._claims.clear()
        shutil.rmtree(folder)


@contextmanager
def played(point: Point, api: Api) -> Iterator[World]:
    """The world after a point has been tried in it."""
    with world_of(point, api) as world:
        world.play()
        yield world
