"""Several processes want one picture, on one machine or on several, in every order of their steps.

They look, claim, send, answer, archive and renew; they are stopped and go on, and are killed and replaced. However that
falls, the picture is paid for once, and once more at most for each request of which nobody can know: one that was in
flight when its process was gone, or slept for longer than half a lease while another machine looked on.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefect_segmind.errors import SegmindError
from prefect_segmind.pipeline.archive import ArchivedImage
from tests.faults.api import Api
from tests.faults.schedule import Killed, Process, Schedule
from tests.faults.world import FIRST, Then

EVERYTHING = os.environ.get("FAULTS") == "all"
HERE, THERE = FIRST, FIRST._replace(name="there", host="host 2", outbox="outbox 2")
API = Api()

which = st.integers(0, 2)


class Processes(RuleBasedStateMachine):
    """Three processes and their common archive."""

    scenarios: tuple[str, ...] = ("plain",)

    @initialize(machines=st.sampled_from([(HERE, HERE, HERE), (HERE, HERE, THERE)]), scenario=which)
    def begin(self, machines: tuple[Then, ...], scenario: int) -> None:
        self.schedule = Schedule(API, machines, self.scenarios[scenario % len(self.scenarios)])

    @rule(number=which)
    def start(self, number: int) -> None:
        process = self._process(number)
        if not (process.runs or process.is_killed):
            self.schedule.start(process)

    @rule(number=which, operations=st.integers(1, 6))
    def go_on(self, number: int, operations: int) -> None:
        self.schedule.step(self._process(number), operations)

    @rule(number=which)
    def get_the_picture(self, number: int) -> None:
        self.start(number)
        self.go_on(number, 60)

    @rule(number=which, seconds=st.sampled_from([0.0, 65.0]))
    def stop(self, number: int, seconds: float) -> None:
        self.schedule.stop(self._process(number))
        self.schedule.elapse(seconds)

    @rule(number=which)
    def wake(self, number: int) -> None:
        self._process(number).is_stopped, self._process(number).asleep = False, 0.0

    @rule(number=which)
    def kill(self, number: int) -> None:
        self.schedule.kill(self._process(number))

    @rule(number=which)
    def replace(self, number: int) -> None:
        if self._process(number).is_killed:
            self.schedule.replace(self._process(number))

    @rule(seconds=st.sampled_from([1.0, 20.0, 65.0]))
    def time_passes(self, seconds: float) -> None:
        self.schedule.elapse(seconds)

    @invariant()
    @precondition(lambda self: hasattr(self, "schedule"))
    def it_is_paid_for_once(self) -> None:
        billed, allowed = len(self.schedule.api.billed), 1 + self.schedule.excused
        assert billed <= allowed, f"billed {billed} times where {allowed} is the most"

    @invariant()
    @precondition(lambda self: hasattr(self, "schedule"))
    def it_is_downloaded_and_archived_by_one_run(self) -> None:
        schedule = self.schedule
        allowed = len(schedule.api.billed) + schedule.broken_off
        for times in (sum(each.startswith("/results/") for each in schedule.api.asked), schedule.archived):
            assert times <= allowed, f"{times} times where {allowed} is the most"

    def teardown(self) -> None:
        if not hasattr(self, "schedule"):
            return
        try:
            self._come_to_an_end()
        finally:
            self.schedule.close()

    def _come_to_an_end(self) -> None:
        schedule = self.schedule
        schedule.finish()
        self.it_is_paid_for_once()
        for process in [*schedule.processes]:
            if process.is_killed:
                schedule.replace(process)
        for _ in range(2):  # what lies on a machine is archived by a run there, and then all the others have it
            for process in schedule.processes:
                schedule.start(process)
                schedule.finish()
        self.it_is_paid_for_once()
        for process in schedule.processes:
            assert isinstance(process.ended, ArchivedImage), process.ended
        record = schedule.world.record
        assert record is not None
        assert (record.state, record.holder) == ("done", None)
        files = schedule.world.contents()
        assert any(each in files for each in schedule.api.pictures)

    def _process(self, number: int) -> Process:
        process = self.schedule.processes[number]
        assert process.ended is None or isinstance(process.ended, (ArchivedImage, SegmindError, Killed)), process.ended
        return process


class ProcessesThatAsk(Processes):
    """Three processes that may ask the provider what became of a request."""

    scenarios = ("lost, history", "v2", "plain, history")


HOW = settings(
    max_examples=400 if EVERYTHING else 20,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
Processes.TestCase.settings = HOW
ProcessesThatAsk.TestCase.settings = HOW
TestProcesses = Processes.TestCase
TestProcessesThatAsk = ProcessesThatAsk.TestCase
