"""Requests of unknown outcome are looked up for a whole archive: what was paid for is archived, and nothing is paid."""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from prefect_segmind.archive import leases
from prefect_segmind.archive.record import Attempt, Record, Run
from prefect_segmind.cli import commands, output
from prefect_segmind.errors import ApiError, HistoryError, StoreError
from prefect_segmind.limits.admission import Gate
from prefect_segmind.pipeline.unsettled import Reconciled, reconcile_archive
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from tests.support.asking import rows
from tests.support.walk import LOG, archive_picture, generate, left, record_of, up_to_upload

HISTORY = "PREFECT_INTEGRATIONS_SEGMIND_HISTORY_URL"
KEYS = set(Reconciled.model_fields)


@pytest.fixture(autouse=True)
def _history_is_asked_again_at_once(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HISTORY, "off")
    monkeypatch.setattr("prefect_segmind.pipeline.reconcile.LOOK_AGAIN_SECONDS", (0.0,))
    sandbox.reset()


def lost(photo: Path, answer: Answer, sandbox: Sandbox, **fields: Any) -> ValidatedJob:
    """A job whose request was sent by a run that is gone, and that never had the answer."""
    job, uploaded = up_to_upload(photo, **fields)
    sandbox.play(answer)
    with pytest.MonkeyPatch.context() as then:
        then.setenv(HISTORY, "off")
        with pytest.raises(ApiError):
            generate(job, uploaded)
    leases._claims.clear()
    return job


def reconciled(monkeypatch: pytest.MonkeyPatch) -> Reconciled:
    monkeypatch.setenv(HISTORY, "")
    return reconcile_archive(Services().pipeline(Gate()), Run("the one that asks"), LOG)


def test_a_picture_that_was_billed_and_lost_is_archived_unpaid_though_its_sender_is_gone(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lost(photo, Answer(kind="lost"), sandbox, name="hero/summer", seed="random")
    found = reconciled(monkeypatch)
    assert (found.looked_up, found.recovered, found.cost_usd, found.is_whole) == (1, 1, Decimal("0.05"), True)
    (picture,) = found.pictures
    assert (picture.name, picture.outcome, picture.cost_usd) == ("hero/summer", "recovered", Decimal("0.05"))
    assert picture.image == Services().archive.store.uri(f"hero/summer/{job.fingerprint[:16]}.jpg")
    record = record_of(job.fingerprint)
    assert (record.state, record.attempts[0].possibly_billed, picture.sent_at) == (
        "done",
        False,
        record.attempts[0].sent_at,
    )
    assert (sandbox.ledger.billed, len(sandbox.ledger.requests)) == (1, 1)
    assert reconciled(monkeypatch).pictures == ()


def test_what_failed_at_the_provider_is_not_billed_and_what_it_does_not_list_stays_unknown(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = lost(photo, Answer(status=502), sandbox, name="a")
    unlisted = lost(photo, Answer(status=504, listed=False), sandbox, name="b", prompt="another mug")
    found = reconciled(monkeypatch)
    assert [(each.name, each.outcome, each.cost_usd) for each in found.pictures] == [
        ("a", "not billed", None),
        ("b", "unknown", None),
    ]
    assert (found.looked_up, found.not_billed, found.unknown, found.recovered) == (2, 1, 1, 0)
    assert [record_of(each.fingerprint).attempts[0].possibly_billed for each in (failed, unlisted)] == [False, True]
    assert [record_of(each.fingerprint).holder for each in (failed, unlisted)] == [None, None], (
        "the claims were given up"
    )
    assert sandbox.ledger.billed == 0


def test_a_picture_that_a_live_run_holds_is_left_to_it(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, uploaded = up_to_upload(photo)
    sandbox.play(Answer(kind="lost"))
    with pytest.raises(ApiError):
        generate(job, uploaded)  # it waits for its next try
    before = record_of(job.fingerprint)
    assert reconciled(monkeypatch).pictures == ()
    assert record_of(job.fingerprint) == before


def test_a_picture_that_was_paid_for_twice_is_told_and_its_record_corrected(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lost(photo, Answer(status=502, billed=True), sandbox)
    again = archive_picture(generate(job, up_to_upload(photo)[1]))
    found = reconciled(monkeypatch)
    assert (found.looked_up, found.billed_again, found.recovered, sandbox.ledger.billed) == (1, 1, 0, 2)
    (picture,) = found.pictures
    assert (picture.name, picture.outcome, picture.cost_usd) == (again.name, "billed again", Decimal("0.05"))
    record = record_of(job.fingerprint)
    assert [(each.possibly_billed, each.cost_usd) for each in record.attempts] == [(False, Decimal("0.05"))] * 2
    assert record.picture is not None
    assert record.picture.sha256 == again.sha256
    assert reconciled(monkeypatch).pictures == ()


@pytest.mark.parametrize("names_its_request", [True, False])
def test_the_row_of_the_request_that_brought_the_picture_is_not_taken_for_that_of_another(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, names_its_request: bool
) -> None:
    job = lost(photo, Answer(status=502, listed=False), sandbox)
    sandbox.play(*([] if names_its_request else [Answer(headers={"x-request-id": ""})]))
    archive_picture(generate(job, up_to_upload(photo)[1]))
    picture = record_of(job.fingerprint).picture
    assert picture is not None
    assert bool(picture.request_id) is names_its_request
    found = reconciled(monkeypatch)
    assert [each.outcome for each in found.pictures] == ["unknown"]
    assert record_of(job.fingerprint).attempts[0].possibly_billed is True


def test_where_the_row_of_the_paid_request_cannot_be_told_from_another_nothing_is_concluded(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lost(photo, Answer(status=502, billed=True), sandbox)
    archive_picture(generate(job, up_to_upload(photo)[1]))
    found = Services().archive.read(job.fingerprint)
    assert found is not None
    assert found.record.picture is not None
    earlier, paid = found.record.attempts
    of_a_version_before = {
        "attempts": (earlier, paid.model_copy(update={"image_file": None, "request_id": None})),
        "picture": found.record.picture.model_copy(update={"request_id": None}),
    }
    Services().archive.write(found.record.model_copy(update=of_a_version_before), found.etag)
    assert reconciled(monkeypatch).pictures == ()
    assert record_of(job.fingerprint).attempts[0].possibly_billed is True


def test_a_picture_that_another_machine_has_stays_there_and_the_record_is_corrected(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lost(photo, Answer(status=502, billed=True), sandbox)
    found = Services().archive.read(job.fingerprint)
    assert found is not None
    (first,) = found.record.attempts
    there = {"kept": "/outbox/mug.jpg on another-machine", "cost_usd": Decimal("0.05"), "request_id": "theirs"}
    kept = Attempt(run="theirs", sent_at=first.sent_at, status=200, possibly_billed=False, **there)
    Services().archive.write(found.record.model_copy(update={"attempts": (first, kept)}), found.etag)
    told = reconciled(monkeypatch)
    assert [(each.outcome, each.cost_usd) for each in told.pictures] == [("billed again", Decimal("0.05"))]
    record = record_of(job.fingerprint)
    assert (record.state, record.kept_picture, record.attempts[0].possibly_billed) == ("claimed", there["kept"], False)


def test_an_interrupt_ends_the_waiting_and_gives_up_the_claims(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = "PREFECT_INTEGRATIONS_SEGMIND_READ_TIMEOUT_SECONDS"
    monkeypatch.setenv(patience, "1")
    job = lost(photo, Answer(processing=600.0), sandbox)
    monkeypatch.setenv(patience, "100")
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(1.0, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        reconciled(monkeypatch)
    assert record_of(job.fingerprint).holder is None
    assert record_of(job.fingerprint).attempts[0].possibly_billed is True


def test_a_submitted_request_is_fetched_and_one_still_under_way_is_told_as_submitted(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGMIND_BASE_URL", sandbox.base_url_v2)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_READ_TIMEOUT_SECONDS", "0.1")
    job, uploaded = up_to_upload(photo, name="a")
    sandbox.play(Answer(processing=1.0), Answer(processing=60.0))
    for each in ((job, uploaded), up_to_upload(photo, name="b", prompt="another mug")):
        with suppress(Exception):
            generate(*each)
    leases._claims.clear()
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_READ_TIMEOUT_SECONDS", "3")
    found = reconciled(monkeypatch)
    assert [(each.name, each.outcome) for each in found.pictures] == [("a", "recovered"), ("b", "submitted")]
    assert (found.submitted, found.recovered, found.is_whole) == (1, 1, True)
    assert len(rows(sandbox)) == 2


def test_what_lies_in_the_outbox_is_archived_too(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = left(photo, name="hero/summer")
    found = reconciled(monkeypatch)
    assert (found.looked_up, found.recovered, found.cost_usd) == (0, 1, Decimal("0.05"))
    assert [(each.name, each.asked, each.sent_at) for each in found.pictures] == [
        ("hero/summer", False, before.attempts[0].sent_at)
    ]


def test_a_damaged_record_is_told_and_the_others_are_looked_up(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost(photo, Answer(kind="lost"), sandbox)
    Services().archive.store.put(f".segmind/{'0' * 64}.json", b"{", "application/json")
    found = reconciled(monkeypatch)
    assert (found.recovered, found.is_whole) == (1, False)
    (problem,) = found.problems
    assert f"{'0' * 64}.json cannot be read" in problem


def test_a_request_whose_job_or_body_is_not_known_is_told_as_unknown(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lost(photo, Answer(kind="lost"), sandbox)
    archive, found = Services().archive, Services().archive.read(job.fingerprint)
    assert found is not None
    archive.write(found.record.model_copy(update={"asked": None}), found.etag)
    (old,) = [each.model_copy(update={"image_file": None, "request_id": None}) for each in found.record.attempts]
    archive.write(Record(fingerprint="1" * 64, attempts=(old,)), None)
    told = reconciled(monkeypatch)
    assert (told.unknown, told.looked_up, told.recovered) == (2, 0, 0)
    reasons = {each.fingerprint: each.reason or "" for each in told.pictures}
    assert "run the same job again" in reasons[job.fingerprint]
    assert "usage page" in reasons["1" * 64]


def test_a_picture_that_cannot_be_archived_now_is_told_and_found_by_the_next_look(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost(photo, Answer(kind="lost"), sandbox)
    with monkeypatch.context() as now:

        def full(*_: object, **__: object) -> str:
            raise StoreError("the archive is full")

        now.setattr("prefect_segmind.archive.archive.Archive.put_picture", full)
        found = reconciled(monkeypatch)
    assert (found.failed, found.recovered, found.is_whole) == (1, 0, False)
    assert "the archive is full" in found.failures()[0]
    again = reconciled(monkeypatch)
    assert (again.recovered, again.looked_up, sandbox.ledger.billed) == (1, 0, 1)


def test_without_a_history_nothing_is_touched(sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = lost(photo, Answer(kind="lost"), sandbox)
    before = record_of(job.fingerprint)
    with pytest.raises(HistoryError, match=HISTORY):
        reconcile_archive(Services().pipeline(Gate()), Run("another"), LOG)
    sandbox.history.off = True
    with pytest.raises(HistoryError, match="404"):
        reconciled(monkeypatch)
    assert record_of(job.fingerprint) == before


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Runs `reconcile … --json`; standard output must be one JSON object and nothing else."""
    capsys.readouterr()
    code = commands.run(["reconcile", *arguments, "--json"])
    told = capsys.readouterr()
    return code, json.loads(told.out), told.err


def test_the_command_prints_a_table_and_its_json_has_every_count(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost(photo, Answer(kind="lost"), sandbox, name="hero/[summer]")
    lost(photo, Answer(status=502), sandbox, name="b", prompt="another mug")
    monkeypatch.setenv(HISTORY, "")
    assert commands.run(["reconcile", os.environ["PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE"]]) == output.DONE
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert lines[0].split() == ["name", "sent", "(UTC)", "outcome", "USD"]
    assert [line.split()[0] for line in lines[1:3]] == ["b", "hero/[summer]"]
    assert lines[2].split()[-2:] == ["recovered", "0.05"]
    assert "2 requests looked up: 1 recovered (0.05 USD, paid before), 1 not billed; this run paid nothing" in told
    lost(photo, Answer(kind="lost"), sandbox, name="c", prompt="a third mug")
    code, found, _ = command(capsys)
    assert (code, found.keys()) == (output.DONE, KEYS)
    assert (found["recovered"], found["looked_up"], found["cost_usd"]) == (1, 1, "0.05")
    assert found["pictures"][0]["image"].startswith("s3://")
    assert command(capsys)[1]["pictures"] == []
    assert sandbox.ledger.billed == 2


def test_the_exit_codes_tell_a_history_out_of_reach_from_a_refused_key_and_from_bad_input(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, _ = command(capsys)
    assert (code, found.keys()) == (output.FAILED, KEYS | {"error"})
    assert HISTORY in found["error"]
    monkeypatch.setenv(HISTORY, "")
    code, found, _ = command(capsys)
    assert (code, found["records"]) == (output.DONE, 0)
    assert commands.run(["reconcile"]) == output.DONE
    assert "no records of pictures: is this the address of the archive?" in capsys.readouterr().out
    assert command(capsys, "ftp://nowhere")[0] == output.BAD_INPUT
    sandbox.history.off = True
    assert command(capsys)[0] == output.FAILED
    sandbox.history.off = False
    monkeypatch.setenv("SEGMIND_API_KEY", "SG_0000000000000000")
    code, found, _ = command(capsys)
    assert code == output.ACCOUNT_REFUSED
    assert "401" in found["error"]
    assert sandbox.ledger.billed == 0
