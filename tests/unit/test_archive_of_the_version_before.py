"""An archive and an outbox that the version before has written: read, reused, recovered, and paid for no second time.

`tests/data/archive-0.1.0-before` was written by that version against the sandbox, host and folders renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from prefect_segmind.errors import OutcomeUnknownError
from prefect_segmind.manifest.loading import load_manifest
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services
from tests.support.walk import walk

BEFORE = Path(__file__).parents[1] / "data" / "archive-0.1.0-before"
PROMPTS = {
    "done": "a red mug",
    "waiting": "a mug that waits",
    "unread": "a mug that nobody could read",
    "lost": "a lost mug",
    "dying": "a mug whose run dies",
}
FINGERPRINTS = {
    "done": "a0a98c1a3b2736733a395b8cff986abc7442a54480d19e7ca4bb60d93760fe80",
    "waiting": "feb61495e61dba53bf076b7037ba89cc35c9b932593cc6d04524b22192aa0900",
    "unread": "6557eab8779a3a03a42eff4e64987817dcc8bc7bd7a284d30b262237c055d838",
    "lost": "1577502e332a081ea216ab8110a06bb80ffb1c9616de4eee721f4a9e8300e46e",
    "dying": "05bd2dfc2a8b13a2bf93efba6c6d01b3b942f08b79e060cee25bea2579a2e1fa",
}
PRICE, NOTHING = Decimal("0.05"), Decimal("0.00")


@pytest.fixture
def archive(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive, as old as it would be, with its outbox where this machine has the outbox of such a folder."""
    folder = tmp_path / "pictures"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(folder))
    shutil.copytree(BEFORE / "archive", folder)
    shutil.copytree(BEFORE / "outbox", Services().outbox.folder)
    an_hour_ago = time.time() - 3600
    for path in folder.rglob("*"):
        os.utime(path, (an_hour_ago, an_hour_ago))
    return folder


def again(name: str, **how: Any) -> ArchivedImage:
    """The job as it was asked for then."""
    return walk(BEFORE / "mug.jpg", name=name, prompt=PROMPTS[name], resolution="RESOLUTION_512_1536", **how)


NEW = {"asked", "image_file", "request_id", "asked_by", "shares"}
"""Fields that the version before did not know."""


def record(archive: Path, name: str) -> dict[str, Any]:
    """A record, without new fields that say nothing."""
    found: dict[str, Any] = json.loads((archive / ".segmind" / f"{FINGERPRINTS[name]}.json").read_bytes())
    for each in (found, *found["attempts"]):
        for field in NEW:
            if each.get(field, ...) in (None, []):
                del each[field]
    return found


def requests_before(archive: Path, name: str) -> list[dict[str, Any]]:
    """The requests in the record as it was, once the record as it is now is found to be that one, extended."""
    before, now = record(BEFORE / "archive", name), record(archive, name)
    assert now["schema_version"] == before["schema_version"] == 1
    assert now.keys() - before.keys() <= NEW
    assert {key for each in now["attempts"] for key in each} - {
        key for each in before["attempts"] for key in each
    } <= NEW
    attempts: list[dict[str, Any]] = before["attempts"]
    return attempts


def test_every_job_is_still_the_same_picture(archive: Path, sandbox: Sandbox) -> None:
    assert {name: again(name).fingerprint for name in PROMPTS} == FINGERPRINTS


def test_what_is_archived_is_reused_and_its_record_left_as_it_is(archive: Path, sandbox: Sandbox) -> None:
    made = again("done")
    assert (made.status, made.cost_usd, made.attempts) == ("reused", NOTHING, 0)
    assert made.image == str(archive / "done" / f"{FINGERPRINTS['done'][:16]}.jpg")
    assert Path(made.image).read_bytes() == (BEFORE / "archive" / "done" / Path(made.image).name).read_bytes()
    assert record(archive, "done") == record(BEFORE / "archive", "done")
    assert sandbox.ledger.requests == ()


@pytest.mark.parametrize("name", ["waiting", "unread"])
def test_what_lies_paid_in_the_outbox_is_recovered(archive: Path, sandbox: Sandbox, name: str) -> None:
    made = again(name)
    assert (made.status, made.cost_usd, made.possibly_billed_usd, made.attempts) == ("recovered", NOTHING, NOTHING, 0)
    kept = next(each for each in (BEFORE / "outbox").glob(f"{FINGERPRINTS[name]}*") if each.suffix != ".json")
    assert Path(made.image).read_bytes() == kept.read_bytes()
    assert requests_before(archive, name) == record(archive, name)["attempts"]
    assert record(archive, name)["state"] == "done"
    assert record(archive, name)["picture"]["cost_usd"] == "0.05"
    assert list(Services().outbox.folder.glob(f"{FINGERPRINTS[name]}*")) == []
    assert (again(name).status, sandbox.ledger.requests) == ("reused", ())


def test_what_may_have_been_billed_is_paid_for_again_only_where_that_is_allowed_and_reported_no_second_time(
    archive: Path, sandbox: Sandbox
) -> None:
    with pytest.raises(OutcomeUnknownError, match="an earlier request for lost may have been billed"):
        again("lost", on_unknown="fail")
    assert sandbox.ledger.requests == ()
    made = again("lost")
    assert (made.status, made.cost_usd, made.possibly_billed_usd, made.attempts) == ("generated", PRICE, NOTHING, 1)
    (lost,), (first, second) = requests_before(archive, "lost"), record(archive, "lost")["attempts"]
    assert first == lost
    assert (second["status"], second["cost_usd"]) == (200, "0.05")


def test_a_run_that_has_died_is_taken_over_and_what_it_may_have_been_billed_is_reported(
    archive: Path, sandbox: Sandbox
) -> None:
    made = again("dying")
    assert (made.status, made.cost_usd, made.possibly_billed_usd, made.attempts) == ("generated", PRICE, PRICE, 1)
    (open_,), (first, second) = requests_before(archive, "dying"), record(archive, "dying")["attempts"]
    assert open_["possibly_billed"] is None
    closed = {"possibly_billed": True, "reason": "the run ended before it had the answer", "reported_by": second["run"]}
    assert first == {**open_, **closed}


def test_the_manifest_of_what_had_failed_is_run_again_as_it_is(archive: Path, sandbox: Sandbox) -> None:
    (failed,) = archive.glob(".segmind/runs/*/failed.yaml")
    shutil.copy(BEFORE / "mug.jpg", failed.parent)
    with load_manifest(str(failed), None, s3=lambda: Services().s3) as manifest:
        (job,) = manifest.jobs
    assert (job.name, job.prompt, job.image) == ("lost", PROMPTS["lost"], str(failed.parent / "mug.jpg"))
    assert walk(job.image, **job.model_dump(exclude={"image"})).fingerprint == FINGERPRINTS["lost"]
