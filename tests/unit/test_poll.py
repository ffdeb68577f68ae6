"""By v2 a request is submitted, noted, polled for and fetched; whoever comes next goes on where a run has ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path

import pytest

from prefect_segmind.archive.record import Attempt, Run
from prefect_segmind.errors import (
    AccountError,
    RunCancelledError,
    SegmindError,
    SubmittedError,
    UnprocessableError,
)
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import NOTHING
from prefect_segmind.pipeline.poll import Durations
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from tests.support.waiting import until
from tests.support.walk import LOG, archive_picture, generate, paid_usd, pipeline, record_of, up_to_upload, walk

PRICE = Decimal("0.05")


def last_attempt(fingerprint: str) -> Attempt:
    return record_of(fingerprint).attempts[-1]


BILLED_ONCE = {
    "plain": Answer(),
    "the answer to the submit is lost": Answer(kind="lost"),
    "the answer to the submit is cut": Answer(kind="half_body"),
    "502 after acceptance": Answer(status=502, billed=True),
    "an answer to the submit that cannot be used": Answer(body='{"status": "QUEUED"}', kind="html", billed=True),
    "three polls fail": Answer(polls=(502, 429, 0)),
    "polls that are no status": Answer(polls=(500, 503, 504)),
    "forgotten": Answer(forgotten=True),
    "forgotten, and listed late": Answer(forgotten=True, lands_after=1),
    "listed late": Answer(kind="lost", lands_after=0.4),
}


@pytest.mark.parametrize("answer", BILLED_ONCE.values(), ids=BILLED_ONCE)
def test_whatever_becomes_of_the_answers_it_is_billed_once(with_v2: Sandbox, photo: Path, answer: Answer) -> None:
    with_v2.play(answer)
    generated = generate(*up_to_upload(photo))
    assert (generated.status, generated.requests_sent) == ("generated", 1)
    assert (generated.cost_usd, generated.possibly_billed_usd) == (PRICE, NOTHING)
    archived = archive_picture(generated)
    assert (with_v2.ledger.billed, len(with_v2.ledger.requests)) == (1, 1)
    record = record_of(archived.fingerprint)
    assert (record.state, paid_usd(record)) == ("done", PRICE)
    assert last_attempt(archived.fingerprint).request_id == with_v2.ledger.requests[0].request_id
    assert not list(Services().outbox.folder.iterdir())


def test_the_picture_is_the_same_by_v1_and_by_v2(
    with_v2: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_v2 = walk(photo)
    monkeypatch.setenv("SEGMIND_BASE_URL", with_v2.base_url)
    by_v1 = walk(photo)
    assert (by_v1.status, by_v1.fingerprint, with_v2.ledger.billed) == ("reused", by_v2.fingerprint, 1)


def test_a_request_that_has_failed_is_not_billed_and_not_sent_again(with_v2: Sandbox, photo: Path) -> None:
    with_v2.play(Answer(fails="the safety check refused it"))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(UnprocessableError, match="the safety check refused it") as failed:
        generate(job, uploaded, run="one")
    assert (failed.value.status, failed.value.possibly_billed, failed.value.possibly_billed_usd) == (
        422,
        False,
        NOTHING,
    )
    assert failed.value.decision is not None
    assert not failed.value.decision.retry
    assert last_attempt(job.fingerprint).possibly_billed is False
    assert with_v2.ledger.billed == 0


def test_the_id_of_a_request_is_noted_before_it_is_polled_for(with_v2: Sandbox, photo: Path) -> None:
    with_v2.play(Answer(processing=2))
    job, uploaded = up_to_upload(photo)
    thread = threading.Thread(target=lambda: generate(job, uploaded, run="one"))
    thread.start()
    try:
        until(lambda: (found := Services().archive.read(job.fingerprint)) and found.record.attempts[-1].is_submitted)
        assert last_attempt(job.fingerprint).possibly_billed is None
    finally:
        thread.join()


def test_a_request_that_is_not_finished_in_time_is_left_to_the_next_run(
    with_v2: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_v2.play(Answer(processing=4))
    job, uploaded = up_to_upload(photo)
    with monkeypatch.context() as impatient:
        impatient.setenv("PREFECT_INTEGRATIONS_SEGMIND_READ_TIMEOUT_SECONDS", "1.5")
        with pytest.raises(SubmittedError, match="still PROCESSING after") as submitted:
            generate(job, uploaded, run="one")
    assert (submitted.value.possibly_billed_usd, submitted.value.decision) == (PRICE, None)
    record = record_of(job.fingerprint)
    assert (record.holder, record.attempts[-1].is_submitted) == (None, True)
    again = archive_picture(generate(job, uploaded, run="two"))
    assert (again.status, again.cost_usd, again.possibly_billed_usd, again.attempts) == (
        *("recovered", NOTHING, NOTHING),
        0,
    )
    assert (with_v2.ledger.billed, paid_usd(record_of(job.fingerprint))) == (1, PRICE)


def test_a_batch_that_is_ended_leaves_what_is_submitted_at_once(with_v2: Sandbox, photo: Path) -> None:
    with_v2.play(Answer(processing=30))
    gate = Gate()
    opened, ended = pipeline(gate=gate), []
    job, uploaded = up_to_upload(photo)

    def run() -> None:
        try:
            opened.generate(job, lambda: uploaded, Run("one"), LOG)
        except SegmindError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: (found := opened.look_up.archive.read(job.fingerprint)) and found.record.attempts[-1].is_submitted)
    assert (gate.in_flight, gate.ledger.in_flight_usd) == (1, PRICE), "while it is polled for it is in flight"
    gate.stop(RunCancelledError("the run was ended by SIGTERM"))
    thread.join(10)
    assert [type(each) for each in ended] == [SubmittedError]
    assert gate.ledger.totals == (1, NOTHING, PRICE)
    assert last_attempt(job.fingerprint).is_submitted


def test_a_batch_that_has_reached_its_budget_still_waits_for_what_is_submitted(with_v2: Sandbox, photo: Path) -> None:
    from prefect_segmind.errors import BudgetReachedError

    with_v2.play(Answer(processing=1))
    gate = Gate()
    opened, brought = pipeline(gate=gate), []
    job, uploaded = up_to_upload(photo)
    thread = threading.Thread(target=lambda: brought.append(opened.generate(job, lambda: uploaded, Run("one"), LOG)))
    thread.start()
    until(lambda: gate.in_flight)
    gate.stop(BudgetReachedError("the budget is reached"))
    thread.join()
    assert [each.status for each in brought] == ["generated"]


KILLED = """
import sys
from tests.support.walk import generate, up_to_upload, paid_usd, record_of
generate(*up_to_upload(sys.argv[1]), run="a run that is killed")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "then"),
    [
        (signal.SIGKILL, "v2"),
        (signal.SIGTERM, "v2"),
        (signal.SIGKILL, "v1, by the history"),
        (signal.SIGKILL, "v2, forgotten"),
    ],
)
def test_a_run_that_dies_is_resumed_by_the_next(
    with_v2: Sandbox, photo: Path, by: signal.Signals, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_v2.play(Answer(processing=1.5, forgotten=3.0 if "forgotten" in then else False))
    job, _ = up_to_upload(photo)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(photo)], cwd=Path(__file__).parents[2])
    try:
        until(lambda: (found := Services().archive.read(job.fingerprint)) and found.record.attempts[-1].is_submitted)
    finally:
        process.send_signal(by)
        process.wait()
    if then.startswith("v1"):
        monkeypatch.setenv("SEGMIND_BASE_URL", with_v2.base_url)
    if "forgotten" in then:
        time.sleep(4)
    archived = walk(photo)
    assert (archived.status, archived.cost_usd, archived.possibly_billed_usd) == ("recovered", NOTHING, NOTHING)
    assert (with_v2.ledger.billed, len(with_v2.ledger.requests)) == (1, 1)
    assert paid_usd(record_of(job.fingerprint)) == PRICE


def test_what_is_submitted_is_resumed_without_the_history(
    with_v2: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_HISTORY_URL", "off")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_READ_TIMEOUT_SECONDS", "1.2")
    with_v2.play(Answer(processing=2))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(SubmittedError):
        generate(job, uploaded, run="one", on_unknown="fail")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_READ_TIMEOUT_SECONDS", "20")
    again = generate(job, uploaded, run="two", on_unknown="fail")
    assert (again.status, again.cost_usd, with_v2.ledger.billed) == ("recovered", NOTHING, 1)


def test_a_key_that_is_refused_while_polling_leaves_the_request_to_be_fetched(with_v2: Sandbox, photo: Path) -> None:
    with_v2.play(Answer(polls=(401,)))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(AccountError) as refused:
        generate(job, uploaded, run="one")
    assert refused.value.possibly_billed_usd == PRICE
    again = generate(job, uploaded, run="two")
    assert (again.status, again.cost_usd, with_v2.ledger.billed) == ("recovered", NOTHING, 1)


def test_a_request_that_takes_longer_than_usual_is_told_once(
    with_v2: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect_segmind.pipeline import poll

    monkeypatch.setattr(poll, "LONG_SECONDS", 0.2)
    with_v2.play(Answer(processing=3))
    said: list[str] = []
    generate(*up_to_upload(photo), said=said)
    assert len([each for each in said if "still PROCESSING" in each]) == 1, said


def test_the_usual_duration_is_the_median_of_the_runs_own() -> None:
    durations = Durations()
    for seconds in (5.0, 60.0, 7.0):
        durations.add(seconds)
    assert durations.usual == 7.0
