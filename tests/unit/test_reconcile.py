"""The provider is asked what became of a request whose answer was lost, before another one is paid for."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from prefect_segmind.api import listing
from prefect_segmind.api.history import Outcome, Row, Sought
from prefect_segmind.api.picture import PaidPicture
from prefect_segmind.archive import leases
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.archive.record import Attempt, Record, Run
from prefect_segmind.errors import (
    AnswerCutError,
    NotAnImageError,
    OutcomeUnknownError,
    SegmindError,
    SubmittedError,
)
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import NOTHING
from prefect_segmind.pipeline import reconcile
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from prefect_segmind.storage.http import DownloadError
from tests.support.asking import rows
from tests.support.waiting import until
from tests.support.walk import LOG, archive_picture, generate, paid_usd, pipeline, record_of, up_to_upload, walk

PRICE = Decimal("0.05")
UNNAMED = {"x-request-id": ""}
"""Headers of an answer that does not name its request."""


LOST = {
    "the answer is lost": Answer(kind="lost"),
    "the answer is cut": Answer(kind="half_body"),
    "the picture ends early": Answer(kind="truncated_image"),
    "502 after acceptance": Answer(status=502, billed=True),
    "504 after acceptance": Answer(status=504, billed=True),
    "502 that names the request": Answer(status=502, billed=True, lands_after=0.3),
    "HTML with a 200": Answer(kind="html", billed=True),
    "nothing with a 200": Answer(kind="empty", billed=True),
    "listed late": Answer(kind="lost", lands_after=0.4),
}


@pytest.mark.parametrize("answer", LOST.values(), ids=LOST)
def test_what_the_provider_has_made_is_fetched_and_billed_once(
    with_history: Sandbox, photo: Path, answer: Answer
) -> None:
    with_history.play(answer)
    said: list[str] = []
    generated = generate(*up_to_upload(photo), said=said)
    assert (generated.status, generated.requests_sent) == ("generated", 1)
    assert (generated.cost_usd, generated.possibly_billed_usd) == (PRICE, NOTHING)
    archived = archive_picture(generated)
    assert (with_history.ledger.billed, len(with_history.ledger.requests)) == (1, 1)
    record = record_of(archived.fingerprint)
    assert (record.state, paid_usd(record), record.asked) == ("done", PRICE, None)
    (attempt,) = record.attempts
    assert attempt.request_id == with_history.ledger.requests[0].request_id
    assert generated.picture.cost_source == "history"
    assert any("the provider's history has the picture" in each for each in said), said
    assert "mug: the provider has made its picture all the same, and it is paid for once" in said
    assert not list(Services().outbox.folder.iterdir()), "nothing is left in the outbox"
    assert walk(photo).status == "reused"


def test_a_request_of_which_the_provider_says_that_it_failed_is_sent_again_freely(
    with_history: Sandbox, photo: Path
) -> None:
    with_history.play(Answer(kind="lost", fails="out of memory"), Answer(status=502), Answer(kind="lost", fails=True))
    job, uploaded = up_to_upload(photo)
    for _ in range(3):
        with pytest.raises(SegmindError, match="not billed, says the provider") as failed:
            generate(job, uploaded, run="one", on_unknown="fail")
        assert (failed.value.possibly_billed, failed.value.possibly_billed_usd) == (False, NOTHING)
        assert failed.value.decision is not None
        assert failed.value.decision.retry, "it uses a retry, and none of those for unknown outcomes"
    generated = generate(job, uploaded, run="one", on_unknown="fail")
    assert (generated.requests_sent, generated.cost_usd, generated.possibly_billed_usd) == (4, PRICE, NOTHING)
    assert with_history.ledger.billed == 1
    log = record_of(job.fingerprint).attempts
    assert [each.possibly_billed for each in log] == [False] * 4
    assert "out of memory" in (log[0].reason or "")


def test_a_request_that_is_not_listed_is_looked_for_again_and_then_left_to_the_policy(
    with_history: Sandbox, photo: Path
) -> None:
    with_history.play(Answer(kind="lost", listed=False))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(AnswerCutError) as lost:
        generate(job, uploaded, run="one")
    assert (lost.value.possibly_billed, lost.value.possibly_billed_usd) == (True, PRICE)
    again = generate(job, uploaded, run="one")
    assert (again.cost_usd, again.possibly_billed_usd, again.requests_sent) == (PRICE, PRICE, 2)


def test_after_one_that_is_not_listed_nothing_is_sent_where_the_policy_is_to_fail(
    with_history: Sandbox, photo: Path
) -> None:
    with_history.play(Answer(kind="lost", listed=False))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(AnswerCutError) as lost:
        generate(job, uploaded, run="one", on_unknown="fail")
    assert lost.value.decision is not None
    assert not lost.value.decision.retry
    with pytest.raises(OutcomeUnknownError):
        generate(job, uploaded, run="two", on_unknown="fail")
    assert len(with_history.ledger.requests) == 1


def test_a_request_that_was_not_listed_and_is_now_is_fetched_by_the_next_run(
    with_history: Sandbox, photo: Path
) -> None:
    with_history.play(Answer(kind="lost", lands_after=3))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(AnswerCutError):
        generate(job, uploaded, run="one", on_unknown="fail")
    until(lambda: rows(with_history))
    again = generate(job, uploaded, run="two", on_unknown="fail")
    assert (again.status, again.cost_usd, again.possibly_billed_usd) == ("recovered", NOTHING, NOTHING)
    assert paid_usd(record_of(archive_picture(again).fingerprint)) == PRICE
    assert with_history.ledger.billed == 1


def test_a_request_under_way_is_waited_for_without_a_slot(with_history: Sandbox, photo: Path) -> None:
    with_history.play(Answer(kind="lost", processing=3), prompt="the first")
    gate = Gate(max_concurrency=1)
    opened, outcome = pipeline(gate=gate), {}

    def first() -> None:
        job, uploaded = up_to_upload(photo, prompt="the first")
        outcome["first"] = opened.generate(job, lambda: uploaded, Run("first"), LOG)

    thread = threading.Thread(target=first)
    thread.start()
    until(lambda: len(with_history.history) and gate.in_flight == 0 and gate._admitted == 0)
    job, uploaded = up_to_upload(photo, prompt="the second")
    assert opened.generate(job, lambda: uploaded, Run("second"), LOG).status == "generated"
    assert "first" not in outcome, "the other had the only slot meanwhile"
    assert gate.ledger.in_flight_usd == PRICE, "the money of the first stays reserved"
    thread.join()
    assert outcome["first"].cost_usd == PRICE
    assert gate.ledger.totals == (2, 2 * PRICE, NOTHING)


def test_without_the_history_there_is_one_warning_and_all_is_as_before(with_history: Sandbox, photo: Path) -> None:
    with_history.history.off = True
    with_history.play(Answer(kind="lost"))
    job, uploaded = up_to_upload(photo)
    said: list[str] = []
    with pytest.raises(AnswerCutError) as lost:
        generate(job, uploaded, run="one", said=said)
    assert lost.value.possibly_billed_usd == PRICE
    assert len([each for each in said if "request history cannot be read" in each]) == 1, said
    again = generate(job, uploaded, run="one")
    assert (again.cost_usd, again.possibly_billed_usd) == (PRICE, PRICE)


def test_it_is_not_asked_when_it_is_switched_off_and_not_when_nothing_is_unknown(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    from prefect_segmind.api.listing import RequestHistory

    monkeypatch.setattr(RequestHistory, "_get", lambda *each, **_: asked.append(each))
    sandbox.play(Answer(kind="lost"))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(AnswerCutError):
        generate(job, uploaded, run="one")
    generate(job, uploaded, run="one")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_HISTORY_URL", "")
    sandbox.play(Answer(status=429, reset_in=0.1))
    job, uploaded = up_to_upload(photo, prompt="another")
    with pytest.raises(SegmindError):
        generate(job, uploaded, run="two")
    generate(job, uploaded, run="two")
    assert asked == []


@pytest.mark.slow
def test_what_a_dead_run_has_sent_is_recovered_and_not_paid_for_again(with_history: Sandbox, photo: Path) -> None:
    killed(with_history, photo, Answer(delay=60))
    archived = walk(photo)
    assert (archived.status, archived.cost_usd, archived.possibly_billed_usd) == ("recovered", NOTHING, NOTHING)
    record = record_of(archived.fingerprint)
    assert (with_history.ledger.billed, paid_usd(record), record.attempts[0].status) == (1, PRICE, 200)
    assert record.attempts[0].reason is None


@pytest.mark.slow
def test_of_two_runs_that_look_up_the_same_lost_picture_one_downloads_it(
    with_history: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(with_history, photo, Answer(delay=60))
    downloads: list[str] = []
    from prefect_segmind.api.client import SegmindClient

    download = SegmindClient.download

    def counted(self: SegmindClient, url: str, *others: Any) -> Any:
        downloads.append(url)
        return download(self, url, *others)

    monkeypatch.setattr(SegmindClient, "download", counted)
    start = threading.Barrier(4, timeout=60)

    def run() -> str:
        start.wait()
        return walk(photo).status

    with ThreadPoolExecutor(4) as pool:
        statuses = sorted(each.result() for each in [pool.submit(run) for _ in range(4)])
    assert statuses == ["recovered", "reused", "reused", "reused"]
    assert (len(downloads), with_history.ledger.billed) == (1, 1)


KILLED = """
import sys
from tests.support.walk import generate, up_to_upload, paid_usd, record_of
generate(*up_to_upload(sys.argv[1]), run="a run that is killed")
"""


def killed(sandbox: Sandbox, photo: Path, answer: Answer) -> None:
    """A run in another process, killed after the API has taken its request and before it had the answer."""
    sandbox.play(answer)
    before = len(sandbox.history)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(photo)], cwd=Path(__file__).parents[2])
    try:
        until(lambda: len(sandbox.history) > before and process.poll() is None, 60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_one_failure_of_the_history_proves_nothing(with_history: Sandbox, photo: Path) -> None:
    with_history.history.play(Answer(status=500), Answer(status=500), Answer(status=500))
    with_history.play(Answer(kind="lost"))
    generated = generate(*up_to_upload(photo))
    assert (generated.status, generated.cost_usd, generated.possibly_billed_usd) == ("generated", PRICE, NOTHING)
    assert with_history.ledger.billed == 1


def test_a_row_of_an_earlier_request_that_failed_does_not_prove_that_the_next_one_did(
    with_history: Sandbox, photo: Path
) -> None:
    with_history.play(Answer(status=500, headers=UNNAMED))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(SegmindError):
        generate(job, uploaded, run="one")
    with_history.play(Answer(kind="lost", lands_after=0.4))
    generated = generate(job, uploaded, run="two")
    assert (generated.status, generated.cost_usd, with_history.ledger.billed) == ("generated", PRICE, 1)
    assert len(with_history.ledger.requests) == 2


def test_a_row_that_lands_meanwhile_is_that_of_the_request_that_was_sent_before(
    with_history: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "REUSED_SECONDS", 2.0)
    monkeypatch.setattr(reconcile, "LOOK_AGAIN_SECONDS", (2.5, 5.0))
    with_history.play(Answer(status=500, lands_after=1.0, headers=UNNAMED))
    job, uploaded = up_to_upload(photo)
    opened = pipeline()
    with pytest.raises(SegmindError):
        opened.generate(job, lambda: uploaded, Run("one"), LOG)
    history = opened.cashier.reconciler.history
    assert history is not None
    history.find([Sought({"prompt": "of another job"}, record_of(job.fingerprint).attempts[0].sent_at)])
    until(lambda: rows(with_history))  # the listing that was just read does not have it
    with_history.play(Answer(kind="lost", lands_after=0.8))
    generated = opened.generate(job, lambda: uploaded, Run("two"), LOG)
    assert (generated.status, generated.cost_usd, generated.possibly_billed_usd) == ("generated", PRICE, NOTHING)
    assert with_history.ledger.billed == 1


def test_a_row_of_a_request_that_was_refused_for_its_image_proves_nothing_for_the_next(
    with_history: Sandbox, photo: Path
) -> None:
    with_history.play(Answer(status=400, listed=True, fails="cannot fetch the image", headers=UNNAMED))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(SegmindError):
        generate(job, uploaded, run="one")
    with_history.play(Answer(kind="lost", lands_after=0.4))
    assert generate(job, uploaded, run="two").cost_usd == PRICE
    assert with_history.ledger.billed == 1


def test_an_answer_that_was_paid_for_and_is_not_listed_takes_no_row_of_another_request(
    with_history: Sandbox, photo: Path
) -> None:
    with_history.play(
        Answer(kind="html", listed=False, billed=False)
    )  # by a proxy, which the provider knows nothing of
    job, uploaded = up_to_upload(photo)
    with pytest.raises(NotAnImageError):
        generate(job, uploaded, run="one")
    with_history.play(Answer(kind="lost"))
    generated = generate(job, uploaded, run="two")
    assert (generated.status, generated.cost_usd, with_history.ledger.billed) == ("generated", PRICE, 1)


UNREADABLE = "PAID FOR, IN A FORMAT OF LATER YEARS. " * 9


def unreadable(**other: Any) -> Answer:
    return Answer(kind="html", body=UNREADABLE, billed=True, **other)


def answers() -> list[str]:
    return [each.read_text() for each in Services().outbox.folder.glob("*.answer")]


def test_an_answer_that_was_paid_for_is_replaced_by_its_picture_alone(
    with_history: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise DownloadError("the server answered 404", status=404, retryable=False)

    with_history.play(unreadable())
    monkeypatch.setattr("prefect_segmind.api.client.download", gone)
    with pytest.raises(NotAnImageError, match="is kept in"):
        generate(*up_to_upload(photo))
    assert UNREADABLE in answers()


def test_an_answer_stays_though_the_provider_says_that_its_request_has_failed(
    with_history: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(_: object, sought: Sequence[Sought]) -> list[Row]:
        facts = {"outcome": Outcome.FAILED, "error": "out of memory"}
        return [Row(request_id=each.request_id or "r-1", body=each.body, **facts) for each in sought]

    with_history.play(unreadable())
    with monkeypatch.context() as now:
        now.setattr(listing.RequestHistory, "rows", failed)
        with pytest.raises(SegmindError, match="not billed, says the provider: out of memory"):
            generate(*up_to_upload(photo))
    assert answers() == [UNREADABLE]
    assert walk(photo).status == "generated"
    assert answers() == [UNREADABLE], "what does not fit together is for a person to judge"


@pytest.mark.parametrize("listed", [False, True])
def test_an_answer_that_was_paid_for_outlasts_an_interrupt_and_another_payment_unless_its_picture_comes(
    with_history: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with_history.play(unreadable(listed=listed))
    with monkeypatch.context() as now:
        now.setattr(reconcile.Reconciler, "ask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(*up_to_upload(photo), run="one")
    leases._claims.clear()  # its process has ended
    assert walk(photo).status == ("recovered" if listed else "generated")
    assert answers() == ([] if listed else [UNREADABLE])
    assert with_history.ledger.billed == (1 if listed else 2)


def test_an_answer_that_cannot_be_kept_stays_and_the_provider_is_asked_by_the_next_try(
    with_history: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with_history.play(unreadable())
    job, uploaded = up_to_upload(photo)
    with monkeypatch.context() as now:
        now.setattr(Outbox, "_set_aside", full)
        with pytest.raises(NotAnImageError, match=r"is kept in .*\.part"):
            generate(job, uploaded, run="one")
    (part,) = Services().outbox.folder.glob("*.part")
    assert part.read_text() == UNREADABLE
    again = generate(job, uploaded, run="one")
    assert (again.requests_sent, again.cost_usd, with_history.ledger.billed) == (1, PRICE, 1)


def test_an_answer_that_was_paid_for_is_kept_while_the_provider_is_asked(with_history: Sandbox, photo: Path) -> None:
    with_history.play(Answer(kind="html", body="<html>paid for</html>"))
    with pytest.raises(NotAnImageError, match="is kept in"):
        generate(*up_to_upload(photo))
    (kept,) = Services().outbox.folder.glob("*.answer")
    assert kept.read_text() == "<html>paid for</html>"


def test_paid_answers_without_a_picture_stop_a_batch_though_the_provider_is_asked(
    with_history: Sandbox, photo: Path
) -> None:
    with_history.play(*[Answer(kind="html")] * 12)
    gate = Gate(max_concurrency=2, stop_after_unusable=3)
    opened = pipeline(gate=gate)

    def run(number: int) -> None:
        job, uploaded = up_to_upload(photo, prompt=f"a mug, the {number}th")
        with suppress(SegmindError):
            opened.generate(job, lambda: uploaded, Run(f"{number}"), LOG)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(run, range(12)))
    assert 3 <= with_history.ledger.billed <= 4, "no more than were in flight beside the third"


def test_a_picture_that_is_ready_is_not_kept_waiting_by_another_request(with_history: Sandbox, photo: Path) -> None:
    job, uploaded = up_to_upload(photo)
    for answer in (Answer(kind="lost"), Answer(kind="lost", processing=60)):
        with_history.history.off = True
        with_history.play(answer)
        with pytest.raises(SegmindError):
            generate(job, uploaded)
        leases._claims.clear()
    with_history.history.off = False
    again = generate(job, uploaded)
    assert (again.status, again.cost_usd) == ("recovered", NOTHING)


def test_a_502_whose_picture_came_from_the_history_is_known_once_that_is_archived() -> None:
    now = datetime.now(UTC)
    lost = Attempt(run="one", sent_at=now, status=502, reason="bad gateway", possibly_billed=True, reported_by="one")
    file = {"sha256": "ab" * 32, "format": "PNG", "content_type": "image/png", "extension": "png", "size_bytes": 1}
    paid_for = {"seed": 100, "cost_usd": PRICE, "cost_source": "history", "paid_at": now, "width": 1, "height": 1}
    picture = PaidPicture.model_validate(file | paid_for)
    (known,) = (
        Record(fingerprint="ab" * 32, attempts=(lost,)).archived(picture, "a.png", "a.json", paid_by="one").attempts
    )
    assert (known.status, known.possibly_billed, known.cost_usd, known.reason) == (200, False, PRICE, None)


def test_a_request_that_was_under_way_is_not_paid_for_again_because_the_history_fails(
    with_history: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_READ_TIMEOUT_SECONDS", "2")
    with_history.play(Answer(kind="lost", processing=60))
    with_history.history.play(Answer(), *[Answer(status=401)] * 50)
    with pytest.raises(SubmittedError, match="still pending") as under_way:
        generate(*up_to_upload(photo))
    assert under_way.value.decision is None
    assert len(with_history.history) == 1
