"""A picture is paid for once: across re-runs, names, crashes, broken archives and processes."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import boto3
import pytest
from httpcore._backends.sync import SyncBackend, SyncStream
from PIL import Image

from prefect_segmind.api import client
from prefect_segmind.archive import leases
from prefect_segmind.archive.archive import Archive, RecordRead, record_key
from prefect_segmind.archive.outbox import RESERVED_BYTES, Outbox, OutboxEntry
from prefect_segmind.archive.record import Attempt, Holder, OnKept, OnUnknown, Record, Run, Verdict
from prefect_segmind.errors import (
    AnswerCutError,
    ArchiveError,
    BadGatewayError,
    GatewayTimeoutError,
    InvalidJobError,
    KeptElsewhereError,
    NotAnImageError,
    NotStartedError,
    OutboxError,
    OutcomeUnknownError,
    RateLimitError,
    ResultLinkError,
    RunCancelledError,
    SegmindError,
    StoreError,
    StoreUnreachableError,
    UnprocessableError,
)
from prefect_segmind.images.inspection import BrokenPicture
from prefect_segmind.jobs.fingerprint import derived_seed, fingerprint
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import Ledger, Totals
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.pipeline.archive import ArchivedImage, Archiving
from prefect_segmind.pipeline.look_up import Finding, LookUp
from prefect_segmind.pipeline.pipeline import LONGEST_WAIT_SECONDS
from prefect_segmind.pipeline.upload import UploadedImage
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from prefect_segmind.storage.http import DownloadError
from prefect_segmind.storage.store import StoredObject
from tests.support.logs import listening
from tests.support.moto_server import moto_server
from tests.support.waiting import until
from tests.support.walk import LOG, archive_picture, generate, pipeline, up_to_upload, walk, with_gate
from tests.support.wire import Wire, http


def recorded(fingerprint: str, archive: str | None = None) -> RecordRead:
    found = Services(archive=archive).archive.read(fingerprint)
    assert found is not None
    return found


def test_the_same_job_again_is_reused_and_costs_nothing(sandbox: Sandbox, photo: Path) -> None:
    first, second = walk(photo), walk(photo)
    assert (first.status, first.cost_usd, first.attempts) == ("generated", Decimal("0.05"), 1)
    assert (second.status, second.cost_usd, second.attempts) == ("reused", Decimal("0.00"), 0)
    assert second.image == first.image
    assert sandbox.ledger.billed == 1


def test_the_same_picture_under_another_name_is_copied_there_and_costs_nothing(sandbox: Sandbox, photo: Path) -> None:
    first, second = walk(photo, name="spring/hero"), walk(photo, name="summer/hero")
    assert (second.status, second.cost_usd, second.sha256) == ("reused", Decimal("0.00"), first.sha256)
    assert second.image != first.image
    store = Services().archive.store
    copy = json.loads(store.get(f"summer/hero/{first.fingerprint[:16]}.json").data)  # type: ignore[union-attr]
    assert (copy["cost_usd"], copy["copied_from"]) == ("0.00", first.image)
    assert sandbox.ledger.billed == 1


def test_a_picture_that_is_reused_is_not_read(sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = walk(photo)
    store = Services().archive.store
    read, get = list[str](), store.get

    def watched(key: str) -> StoredObject | None:
        read.append(key)
        return get(key)

    monkeypatch.setattr(store, "get", watched)
    assert walk(photo).status == "reused"
    assert set(read) == {f".segmind/{first.fingerprint}.json"}


def test_a_picture_that_the_outbox_still_has_is_removed_there_only_when_that_of_the_archive_has_been_read(
    sandbox: Sandbox, photo: Path
) -> None:
    generated = generate(*up_to_upload(photo))
    assert generated.path is not None
    data = generated.path.read_bytes()
    archived = archive_picture(generated)
    generated.path.write_bytes(data)  # as if a run had died before it could remove it
    store = Services().archive.store
    key = archived.image.removeprefix(f"{store.url}/")
    store.put(key, bytes(len(data)), "image/jpeg")  # of the same size, and rclone keeps no checksum
    with pytest.raises(ArchiveError, match="is no longer the one that was archived"):
        walk(photo)
    assert generated.path.exists()
    store.put(key, data, "image/jpeg")
    assert (walk(photo).status, generated.path.exists()) == ("reused", False)


def test_the_same_text_in_another_spelling_is_the_same_picture(sandbox: Sandbox, photo: Path) -> None:
    spellings = ["a caf\u00e9 mug", "a cafe\u0301 mug", " a caf\u00e9 mug\u00a0", "a caf\u00e9 mug\r\n"]
    assert len({walk(photo, prompt=prompt).fingerprint for prompt in spellings}) == sandbox.ledger.billed == 1


def as_it_was(job: ValidatedJob) -> ValidatedJob:
    """The job as it was known when texts were taken as they were written."""
    (earlier,) = job.earlier
    parameters = {**job.parameters, "prompt": "a red mug "}
    del parameters["seed"]
    seed = derived_seed(job.source_sha256, parameters)
    assert earlier.fingerprint == fingerprint(job.source_sha256, {**parameters, "seed": seed}) != job.fingerprint
    return earlier


def test_what_was_paid_for_under_another_spelling_is_reused(sandbox: Sandbox, photo: Path) -> None:
    job, uploaded = up_to_upload(photo, prompt="a red mug ")
    before = archive_picture(generate(as_it_was(job), uploaded))
    again = walk(photo, prompt="a red mug ")
    assert (again.status, again.cost_usd, again.fingerprint) == ("reused", Decimal("0.00"), before.fingerprint)
    assert (again.image, again.seed) == (before.image, before.seed)
    assert sandbox.ledger.billed == 1


def test_what_lies_in_the_outbox_under_another_spelling_is_recovered(sandbox: Sandbox, photo: Path) -> None:
    job, uploaded = up_to_upload(photo, prompt="a red mug ")
    generate(as_it_was(job), uploaded)
    leases._claims.clear()
    Services().archive.write(Record(fingerprint=as_it_was(job).fingerprint), recorded(as_it_was(job).fingerprint).etag)
    again = walk(photo, prompt="a red mug ")
    assert (again.status, again.cost_usd, sandbox.ledger.billed) == ("recovered", Decimal("0.00"), 1)


def test_what_was_paid_for_under_its_address_is_reused(sandbox: Sandbox, photo: Path) -> None:
    with Wire(http(photo.read_bytes())) as server:
        job, uploaded = up_to_upload(f"{server.url}/mug.jpg")
        (by_address,) = job.earlier
        before = archive_picture(generate(by_address, uploaded))
        again = walk(f"{server.url}/mug.jpg")
    assert (again.status, again.cost_usd, again.image) == ("reused", Decimal("0.00"), before.image)
    sidecar = json.loads(Services().archive.content(before.sidecar) or b"")
    assert sidecar["source"] == {"sha256_of_url": by_address.source_sha256}, "what was there then is not known"
    assert (walk(photo).status, sandbox.ledger.billed) == ("generated", 2)


def test_what_has_failed_unpaid_under_another_spelling_is_paid_for_under_the_one(sandbox: Sandbox, photo: Path) -> None:
    job, uploaded = up_to_upload(photo, prompt="a red mug ")
    sandbox.play(Answer(status=422))
    with pytest.raises(SegmindError):
        generate(as_it_was(job), uploaded)
    assert walk(photo, prompt="a red mug ").fingerprint == job.fingerprint
    assert walk(photo, prompt="a red mug").status == "reused"


def test_a_seed_another_prompt_or_another_image_is_another_picture(
    sandbox: Sandbox, photo: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jpg"
    other.write_bytes(photo.read_bytes() + b"\0")
    prints = {walk(photo).fingerprint, walk(photo, seed=100).fingerprint, walk(photo, prompt="a hat").fingerprint}
    prints.add(walk(other).fingerprint)
    assert len(prints) == sandbox.ledger.billed == 4


def test_random_seeds_make_another_picture_each_time(sandbox: Sandbox, photo: Path) -> None:
    assert walk(photo, seed="random").fingerprint != walk(photo, seed="random").fingerprint


def test_archive_down_after_the_answer_then_up_again_pays_once(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = generate(*up_to_upload(photo))
    assert generated.path is not None
    assert generated.path.is_file()
    with monkeypatch.context() as down:
        down.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        with pytest.raises(ArchiveError, match="safe in the outbox") as error:
            archive_picture(generated)
    assert str(generated.path) in str(error.value)
    assert error.value.cost_usd == Decimal("0.05")
    again = walk(photo)
    assert (again.status, again.cost_usd, again.attempts) == ("recovered", Decimal("0.00"), 0)
    assert (again.possibly_billed_usd, sandbox.ledger.billed) == (Decimal(0), 1)
    assert not generated.path.exists(), "the outbox is emptied once the archive has the picture"
    assert walk(photo).status == "reused"


def test_what_is_left_in_the_outbox_of_an_archived_picture_does_no_harm(sandbox: Sandbox, photo: Path) -> None:
    generated = generate(*up_to_upload(photo))
    assert generated.path is not None
    archive_picture(generated)
    generated.path.write_bytes(b"half a")
    assert walk(photo).status == "reused"
    assert not generated.path.exists()


def test_that_a_job_may_be_paid_for_twice_is_said_once(sandbox: Sandbox, photo: Path) -> None:
    killed_while_waiting(sandbox, photo)
    sandbox.play(Answer(status=429, reset_in=0.1))
    job, uploaded = up_to_upload(photo)
    said: list[str] = []
    with pytest.raises(RateLimitError):
        generate(job, uploaded, run="one", said=said)
    generate(job, uploaded, run="one", said=said)
    assert [each for each in said if each.endswith("paying again")] == [
        "an earlier request for mug may have been billed without bringing a picture: paying again"
    ]


def test_a_picture_without_its_facts_is_recovered_all_the_same(sandbox: Sandbox, photo: Path) -> None:
    generated = generate(*up_to_upload(photo))
    assert generated.path is not None
    generated.path.with_suffix(".json").unlink()
    leases.held_claim(Services().archive, generated.job.fingerprint).release()  # type: ignore[union-attr]
    again = walk(photo)
    assert (again.status, again.sha256, sandbox.ledger.billed) == ("recovered", generated.picture.sha256, 1)


def test_an_answer_that_had_arrived_whole_when_the_run_died_is_recovered(
    sandbox: Sandbox, photo: Path, tmp_path: Path
) -> None:
    generated = generate(*up_to_upload(photo))
    assert generated.path is not None
    arrived = generated.path.with_name(f"{generated.job.fingerprint}.0123456789abcdef.part")
    generated.path.with_suffix(".json").unlink()
    generated.path.rename(arrived)
    leases.held_claim(Services().archive, generated.job.fingerprint).release()  # type: ignore[union-attr]
    again = walk(photo)
    assert (again.status, again.sha256, sandbox.ledger.billed) == ("recovered", generated.picture.sha256, 1)


def test_an_answer_that_had_arrived_in_part_is_not_taken_for_a_picture(sandbox: Sandbox, photo: Path) -> None:
    generated = generate(*up_to_upload(photo))
    assert generated.path is not None
    data = generated.path.read_bytes()
    generated.path.with_suffix(".json").unlink()
    generated.path.unlink()
    outbox = generated.path.parent
    (outbox / f"{generated.job.fingerprint}.aaaaaaaaaaaaaaaa.part").write_bytes(data[: len(data) // 2])
    reserved = data[: len(data) // 2] + bytes(RESERVED_BYTES - len(data) // 2)
    (outbox / f"{generated.job.fingerprint}.bbbbbbbbbbbbbbbb.part").write_bytes(reserved)
    leases.held_claim(Services().archive, generated.job.fingerprint).release()  # type: ignore[union-attr]
    with pytest.raises(KeptElsewhereError, match="on this machine and is gone"):
        walk(photo)
    assert walk(photo, on_kept="repay").status == "generated"
    assert list(outbox.iterdir()) == []


KILLED = """
import sys
from tests.support.moto_server import moto_server
from tests.support.waiting import until
from tests.support.walk import walk
walk(sys.argv[1])
"""


def killed_while_waiting(sandbox: Sandbox, photo: Path) -> None:
    """A run in another process, killed after the API has billed its request and before it had the answer."""
    sandbox.play(Answer(delay=60))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(photo)], cwd=Path(__file__).parents[2])
    try:
        until(lambda: sandbox.ledger.billed == 1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_run_killed_while_it_waited_is_repaid_at_once_and_counted(sandbox: Sandbox, photo: Path) -> None:
    killed_while_waiting(sandbox, photo)
    began = time.monotonic()
    again = walk(photo)
    assert time.monotonic() - began < leases.RENEW_SECONDS, "a dead process of this host is not waited for"
    assert (again.status, again.cost_usd) == ("generated", Decimal("0.05"))
    assert again.possibly_billed_usd == Decimal("0.05")
    assert sandbox.ledger.billed_usd == again.cost_usd + again.possibly_billed_usd
    log = recorded(again.fingerprint).record.attempts
    assert [(each.possibly_billed, each.status) for each in log] == [(True, None), (False, 200)]
    assert walk(photo).possibly_billed_usd == 0, "what one run has reported, the next does not report again"


@pytest.mark.slow
def test_a_run_killed_while_it_waited_is_not_repaid_where_the_policy_says_fail(sandbox: Sandbox, photo: Path) -> None:
    killed_while_waiting(sandbox, photo)
    with pytest.raises(OutcomeUnknownError, match="on_unknown"):
        walk(photo, on_unknown="fail")
    assert sandbox.ledger.billed == 1


def test_a_picture_that_waits_for_one_archive_is_not_taken_by_another(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = generate(*up_to_upload(photo))
    with monkeypatch.context() as other:
        other.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(tmp_path / "other"))
        assert walk(photo).status == "generated"
    assert waiting.path is not None
    assert waiting.path.is_file()
    leases.held_claim(Services().archive, waiting.job.fingerprint).release()  # type: ignore[union-attr]
    assert walk(photo).status == "recovered"


def test_an_interrupt_after_the_answer_leaves_the_picture_for_the_next_run(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as now:
        now.setattr("prefect_segmind.api.client.read_picture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(*up_to_upload(photo))
    again = walk(photo)
    assert (again.status, again.cost_usd, again.possibly_billed_usd) == ("recovered", Decimal(0), Decimal(0))
    assert sandbox.ledger.billed == 1
    (sent,) = recorded(again.fingerprint).record.attempts
    assert (sent.status, sent.possibly_billed, sent.cost_usd, sent.reason) == (200, False, Decimal("0.05"), None)


def test_what_had_arrived_when_a_run_was_interrupted_is_found_from_another_outbox(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as now:
        now.setattr("prefect_segmind.api.client.read_picture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(*up_to_upload(photo))
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX", str(tmp_path / "another outbox"))
    again = walk(photo)
    assert (again.status, again.cost_usd, sandbox.ledger.billed) == ("recovered", Decimal(0), 1)
    assert recorded(again.fingerprint).record.attempts[0].possibly_billed is False


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES])
def test_an_outbox_whose_files_cannot_be_looked_at_is_an_error_of_ours_and_no_payment(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    generated = generate(*up_to_upload(photo))
    assert generated.path is not None
    part = generated.path.rename(generated.path.with_name(f"{generated.job.fingerprint}.0123456789abcdef.part"))
    leases._claims.clear()
    real = Path.stat

    def failing(self: Path, **options: Any) -> os.stat_result:
        if self in (part, generated.path):
            raise OSError(error, os.strerror(error))
        return real(self, **options)

    with monkeypatch.context() as disk:
        disk.setattr(Path, "stat", failing)
        with pytest.raises(OutboxError, match="cannot be read"):
            walk(photo)
        with pytest.raises(ArchiveError):
            archive_picture(generated)
    assert walk(photo).status == "recovered"


def test_an_archive_under_another_name_is_the_same_archive_with_the_same_outbox(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    waiting = generate(*up_to_upload(photo), archive="link")
    leases._claims.clear()
    names = ["real", "./link/", str(tmp_path / "link")]
    assert {Services(archive=each).outbox for each in names} == {Services(archive="link").outbox}
    assert {Services(archive=each).archive.url for each in names} == {str(tmp_path / "real")} == {waiting.archive}
    recovered = archive_picture(generate(*up_to_upload(photo), archive="real"))
    assert (recovered.status, recovered.image.startswith(str(tmp_path / "real"))) == ("recovered", True)
    for each in names:
        assert Services(archive=each).archive.content(recovered.image), "which has one address too"
    assert generate(*up_to_upload(photo), archive="./link").status == "reused"
    assert sandbox.ledger.billed == 1


def test_what_waits_in_the_outbox_that_an_earlier_version_had_for_a_link_is_found(
    sandbox: Sandbox, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    link = str(tmp_path / "link")
    waiting = generate(*up_to_upload(photo), archive=link)
    assert waiting.path is not None
    leases._claims.clear()
    before = waiting.path.parent.with_name(hashlib.sha256(link.encode()).hexdigest()[:16])
    waiting.path.parent.rename(before)
    archive = Services(archive=link).archive
    archive.write(Record(fingerprint=waiting.job.fingerprint), recorded(waiting.job.fingerprint, link).etag)
    archived = archive_picture(generate(*up_to_upload(photo), archive=link))
    assert (archived.status, sandbox.ledger.billed, list(before.iterdir())) == ("recovered", 1, [])


def on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From here on this is another machine, which cannot read the outbox of the first.

    Returns:
        Where that outbox is from now on.
    """
    outbox = Path(os.environ["PREFECT_INTEGRATIONS_SEGMIND_OUTBOX"])
    leases._claims.clear()
    monkeypatch.setattr(socket, "gethostname", lambda: "another-machine")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX", str(tmp_path / "another outbox"))
    return outbox.rename(tmp_path / "out of reach")


@pytest.mark.parametrize("on_unknown", ["repay", "fail"])
def test_a_picture_in_the_outbox_of_another_machine_is_known_and_named_and_not_paid_for_again(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_unknown: OnUnknown
) -> None:
    theirs, host = generate(*up_to_upload(photo)), socket.gethostname()
    there = on_another_machine(tmp_path, monkeypatch)
    with pytest.raises(KeptElsewhereError) as kept:
        walk(photo, on_unknown=on_unknown)
    assert f"mug was paid for, and its picture is in {theirs.path} on {host}, out of reach" in str(kept.value)
    assert all(each in str(kept.value) for each in ("run the same job there", "prefect-segmind outbox", "on_kept"))
    assert (kept.value.requests_sent, kept.value.cost_usd, kept.value.possibly_billed_usd) == (0, 0, 0)
    assert sandbox.ledger.billed == 1
    said: list[str] = []
    ours = archive_picture(generate(*up_to_upload(photo), on_unknown=on_unknown, on_kept="repay", said=said))
    assert any(f"its picture is in {theirs.path}" in each and each.endswith("paying again") for each in said)
    assert (ours.status, ours.possibly_billed_usd, sandbox.ledger.billed) == ("generated", Decimal(0), 2)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX", str(there))
    again = walk(photo)
    assert (again.status, again.sha256) == ("reused", ours.sha256)


@pytest.mark.parametrize("linked", [False, True])
def test_a_picture_in_another_outbox_that_this_machine_can_read_is_recovered_and_removed_there(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    theirs = generate(*up_to_upload(photo))
    assert theirs.path is not None
    if linked:
        there = on_another_machine(tmp_path, monkeypatch)
        (tmp_path / "outbox").symlink_to(there)
    else:
        leases._claims.clear()
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX", str(tmp_path / "another outbox"))
    archived = walk(photo, on_unknown="fail")
    assert (archived.status, archived.cost_usd, archived.sha256) == ("recovered", Decimal(0), theirs.picture.sha256)
    assert (list(theirs.path.parent.iterdir()), sandbox.ledger.billed) == ([], 1)
    assert walk(photo).status == "reused"


def test_a_file_that_a_record_names_and_that_holds_no_picture_is_not_taken_for_one(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = generate(*up_to_upload(photo))
    assert theirs.path is not None
    leases._claims.clear()
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX", str(tmp_path / "another outbox"))
    theirs.path.write_bytes(b"half a picture")
    with pytest.raises(OutboxError, match="was paid for and"):
        walk(photo)
    assert sandbox.ledger.billed == 1


def test_a_run_that_archives_a_kept_picture_while_another_looks_for_it_is_no_refusal(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = generate(*up_to_upload(photo))
    leases._claims.clear()
    find, others = Outbox.find, [1]

    def archived_meanwhile(self: Outbox, *arguments: Any, **more: Any) -> Any:
        if others and others.pop():
            archive_picture(theirs)
        return find(self, *arguments, **more)

    monkeypatch.setattr(Outbox, "find", archived_meanwhile)
    assert (walk(photo).status, sandbox.ledger.billed) == ("reused", 1)


def test_a_second_picture_of_one_job_is_reported_and_neither_archived_nor_removed(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = generate(*up_to_upload(photo))
    assert theirs.path is not None
    other = theirs.path.with_name(f"{theirs.job.fingerprint}.png")
    other.write_bytes(picture_bytes())
    os.utime(theirs.path, (1, 1))
    leases._claims.clear()
    for status in ("recovered", "reused"):
        said: list[str] = []
        archived = archive_picture(generate(*up_to_upload(photo), said=said))
        assert (archived.status, archived.sha256) == (status, theirs.picture.sha256)
        assert any("paid for more than once" in each and str(other) in each for each in said)
    assert [other] == list(other.parent.iterdir())


def half_archived(sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, name: str = "mug") -> ArchivedImage:
    """A run on another machine that had archived picture and sidecar when it died."""
    generated = generate(*up_to_upload(photo, name=name))
    assert generated.path is not None
    with monkeypatch.context() as dying:
        dying.setattr(Archiving, "_record_done", lambda _, __, before, archived: archived(before))
        archived = archive_picture(generated)
    leases._claims.clear()
    assert recorded(archived.fingerprint).record.state == "claimed"
    return archived


@pytest.mark.parametrize("on_unknown", ["repay", "fail"])
@pytest.mark.parametrize("name", ["mug", "another/name"])
def test_a_picture_whose_sidecar_is_archived_is_reused_though_its_record_is_not_done(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, on_unknown: OnUnknown, name: str
) -> None:
    before = half_archived(sandbox, photo, monkeypatch, name)
    again = walk(photo, on_unknown=on_unknown)
    assert (again.status, again.cost_usd, again.sha256) == ("reused", Decimal(0), before.sha256)
    record = recorded(before.fingerprint).record
    assert (record.state, sandbox.ledger.billed) == ("done", 1)
    assert record.picture is not None
    assert (record.picture.sha256, record.picture.cost_usd) == (before.sha256, Decimal("0.05"))
    assert Services().archive.store.uri(record.image or "") == before.image
    assert Services().archive.store.uri(record.sidecar or "") == before.sidecar


def test_the_copy_of_a_picture_finishes_its_record_too(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, copy = walk(photo), walk(photo, name="copy")
    archive, found = Services().archive, recorded(first.fingerprint)
    undone = Record(fingerprint=first.fingerprint, attempts=(Attempt(run="dead", sent_at=datetime.now(UTC)),))
    archive.write(undone, found.etag)
    assert (walk(photo, name="third").status, sandbox.ledger.billed) == ("reused", 1)
    assert archive.store.uri(recorded(first.fingerprint).record.image or "") == first.image
    archive.write(undone, recorded(first.fingerprint).etag)
    bucket, _, key = first.sidecar.removeprefix("s3://").partition("/")
    Services().s3.delete_object(Bucket=bucket, Key=key)
    assert (walk(photo, name="copy").image, sandbox.ledger.billed) == (copy.image, 1)


def test_a_sidecar_whose_picture_is_gone_is_an_error_and_no_payment(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = half_archived(sandbox, photo, monkeypatch)
    bucket, _, key = before.image.removeprefix("s3://").partition("/")
    Services().s3.delete_object(Bucket=bucket, Key=key)
    with pytest.raises(StoreError, match="is gone from the archive, though it was paid for"):
        walk(photo)
    assert sandbox.ledger.billed == 1


def test_a_picture_without_its_sidecar_is_not_taken_for_this_ones(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = half_archived(sandbox, photo, monkeypatch)
    bucket, _, key = before.sidecar.removeprefix("s3://").partition("/")
    Services().s3.put_object(Bucket=bucket, Key=key, Body=b'{"fingerprint": "half')
    assert walk(photo, on_kept="repay").status == "generated"


@pytest.mark.slow
def test_runs_in_one_process_pay_once_and_one_of_them_has_the_picture(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.play(Answer(delay=1.0))
    put = Archive.put_picture

    def slow(*arguments: Any, **more: Any) -> str:
        time.sleep(3)  # the others look meanwhile: the picture lies in the outbox, and its run is at it
        return put(*arguments, **more)

    monkeypatch.setattr(Archive, "put_picture", slow)
    results, (job, _) = [], up_to_upload(photo)

    def work(run: str) -> None:
        results.append(pipeline().produce(job, Run(run), LOG))

    threads = [threading.Thread(target=work, args=(each,)) for each in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sandbox.ledger.billed == 1
    assert sorted(each.status for each in results) == ["generated", "reused", "reused", "reused"]
    assert sum(each.cost_usd for each in results) == Decimal("0.05")


def test_a_budget_for_one_picture_is_enough_for_two_jobs_that_want_it(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(Answer(delay=1.0))
    gate = Gate(ledger=Ledger(Decimal("0.05")))
    opened, made = pipeline(gate=gate), list[str]()
    asked = {name: up_to_upload(photo, name=name) for name in ("first", "second")}
    assert all(map(gate.enter, asked))

    def work(name: str) -> None:
        made.append(opened.produce(asked[name][0], Run(name), LOG).status)
        gate.leave(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == ["generated", "reused"]
    assert (gate.stopped, gate.ledger.spent_usd, sandbox.ledger.billed) == (None, Decimal("0.05"), 1)


@pytest.fixture
def conditional_store() -> Iterator[str]:
    """An S3 server that honours conditional writes, and an archive on it."""
    with moto_server() as endpoint:
        yield endpoint


@pytest.mark.slow
def test_two_processes_on_a_store_with_conditional_writes_pay_once(
    sandbox: Sandbox, photo: Path, tmp_path: Path, conditional_store: str
) -> None:
    boto3.client("s3", endpoint_url=conditional_store, region_name="us-east-1").create_bucket(Bucket="both")
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL_S3": conditional_store,
        "PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO": "s3://both/uploads",
        "PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE": "s3://both/archive",
    }
    sandbox.play(Answer(delay=1.0))
    code = "import sys; from tests.support.walk import walk; print(walk(sys.argv[1]).status)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(photo)],
            cwd=Path(__file__).parents[2],
            # each has an outbox of its own, as two machines have
            env={**environment, "PREFECT_INTEGRATIONS_SEGMIND_OUTBOX": str(tmp_path / f"outbox-{each}")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for each in range(2)
    ]
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(said) == ["generated", "reused"]
    assert sandbox.ledger.billed == 1


def test_a_failed_request_is_retried_under_the_same_claim_and_logged(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(Answer(status=429, reset_in=0.1), Answer(status=502))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(RateLimitError) as limited:
        generate(job, uploaded, run="one")
    assert limited.value.decision
    assert limited.value.decision.retry
    with pytest.raises(BadGatewayError) as gateway:
        generate(job, uploaded, run="one")
    assert (gateway.value.requests_sent, gateway.value.possibly_billed_usd) == (2, Decimal("0.05"))
    archived = archive_picture(generate(job, uploaded, run="one"))
    assert (archived.attempts, archived.cost_usd, archived.possibly_billed_usd) == (3, Decimal("0.05"), Decimal("0.05"))
    log = recorded(job.fingerprint).record.attempts
    assert [(each.status, each.possibly_billed) for each in log] == [(429, False), (502, True), (200, False)]
    assert all(each.wait_seconds for each in log[:2])
    assert log[2].wait_seconds is None


def test_an_overloaded_provider_is_never_possibly_billed_and_forbids_no_further_request(
    sandbox: Sandbox, photo: Path
) -> None:
    sandbox.play(Answer(status=503), Answer(status=529), Answer(status=502))
    job, uploaded = up_to_upload(photo)
    for status in (503, 529, 502):
        with pytest.raises(SegmindError) as error:
            generate(job, uploaded, run="one")
        assert error.value.status == status
        assert error.value.decision
        assert error.value.decision.retry
        assert error.value.possibly_billed_usd == (Decimal("0.05") if status == 502 else 0)
    assert generate(job, uploaded, run="one").possibly_billed_usd == Decimal("0.05")


def test_where_rate_limits_are_counted_apart_they_leave_the_retries_to_other_failures(
    sandbox: Sandbox, photo: Path
) -> None:
    sandbox.play(*[Answer(status=429)] * 3, Answer(status=502))
    job, uploaded = up_to_upload(photo)
    policy = RetryPolicy(retries=1, rate_limit_retries=3)
    opened = pipeline(policy=policy)
    for kind in (RateLimitError, RateLimitError, RateLimitError, BadGatewayError):
        with pytest.raises(kind) as error:
            opened.generate(job, lambda: uploaded, Run("one"), LOG)
        assert error.value.decision
        assert error.value.decision.retry
        opened = with_gate(opened)  # as long as the limit is none of this test's business
    assert opened.generate(job, lambda: uploaded, Run("one"), LOG).requests_sent == 5


def test_a_second_answer_of_unknown_outcome_ends_the_run(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(Answer(kind="half_body"), Answer(kind="half_body"), Answer())
    job, uploaded = up_to_upload(photo)
    for retry in (True, False):
        with pytest.raises(AnswerCutError) as cut:
            generate(job, uploaded, run="one")
        assert cut.value.decision
        assert cut.value.decision.retry is retry
    assert cut.value.possibly_billed_usd == Decimal("0.10")
    assert sandbox.ledger.billed == 2
    outbox = Path(os.environ["PREFECT_INTEGRATIONS_SEGMIND_OUTBOX"])
    assert [each for each in outbox.rglob("*") if each.is_file()] == []


def test_where_the_policy_says_fail_a_run_does_not_repeat_its_own_request_of_unknown_outcome_either(
    sandbox: Sandbox, photo: Path
) -> None:
    sandbox.play(Answer(status=504), Answer())
    job, uploaded = up_to_upload(photo)
    with pytest.raises(GatewayTimeoutError) as error:
        generate(job, uploaded, run="one", on_unknown="fail")
    assert error.value.decision
    assert not error.value.decision.retry
    assert (error.value.requests_sent, error.value.possibly_billed_usd) == (1, Decimal("0.05"))


def test_a_run_that_gave_up_lets_go_of_its_claim(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(Answer(status=500))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(Exception, match="500"):
        generate(job, uploaded)
    assert recorded(job.fingerprint).record.holder is None
    assert generate(job, uploaded).status == "generated"


def test_a_run_that_was_interrupted_lets_go_of_its_claim_and_reports_its_request_itself(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, uploaded = up_to_upload(photo)

    def interrupted(self: client.SegmindClient, request: Any, part: Path, before_sending: Callable[[], None]) -> None:
        before_sending()
        raise KeyboardInterrupt

    ledger = Ledger()
    with monkeypatch.context() as now:
        now.setattr(client.SegmindClient, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(job, uploaded, ledger=ledger)
    assert ledger.totals == Totals(1, possibly_billed_usd=Decimal("0.05"))
    with pytest.raises(OutcomeUnknownError):
        walk(photo, on_unknown="fail")
    again = walk(photo)
    assert (again.status, again.possibly_billed_usd) == ("generated", Decimal("0.00")), "it is reported once"


def test_a_record_that_cannot_be_read_is_never_taken_for_not_there(sandbox: Sandbox, photo: Path) -> None:
    job, uploaded = up_to_upload(photo)
    archive = Services().archive
    archive.store.put(record_key(job.fingerprint), b'{"state": "done"', "application/json")
    with pytest.raises(StoreError, match=r"cannot be read by this version; .* nothing is paid until it is restored"):
        generate(job, uploaded)
    assert sandbox.ledger.requests == ()


def test_an_archive_that_is_down_before_the_request_costs_nothing(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, uploaded = up_to_upload(photo)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StoreError):
        generate(job, uploaded)
    assert sandbox.ledger.requests == ()


def test_a_full_disk_is_found_before_paying(sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX_MIN_FREE_BYTES", str(10**18))
    with pytest.raises(OutboxError, match="nothing was paid"):
        walk(photo)
    assert sandbox.ledger.requests == ()


def test_a_picture_that_is_gone_from_the_archive_is_not_paid_for_again_behind_your_back(
    sandbox: Sandbox, photo: Path
) -> None:
    first = walk(photo)
    bucket, _, key = first.image.removeprefix("s3://").partition("/")
    Services().s3.delete_object(Bucket=bucket, Key=key)
    with pytest.raises(ArchiveError, match="is gone from the archive, though it was paid for"):
        walk(photo)
    assert sandbox.ledger.billed == 1


def test_a_different_picture_under_the_same_key_is_never_overwritten(sandbox: Sandbox, photo: Path) -> None:
    job, uploaded = up_to_upload(photo)
    store = Services().archive.store
    key = f"{job.name}/{job.fingerprint[:16]}.jpg"
    store.put(key, b"somebody's own", "image/jpeg")
    archived = archive_picture(generate(job, uploaded))
    assert store.get(key).data == b"somebody's own"  # type: ignore[union-attr]
    assert archived.image != store.uri(key)
    assert archived.sha256[:16] in archived.image


@pytest.mark.parametrize("dies", [False, True], ids=["", "and its run dies before the record is done"])
def test_a_picture_that_was_lost_and_paid_for_again_has_a_sidecar_of_its_own(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    folder = tmp_path / "archive"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(folder))
    lost = walk(photo)
    Path(lost.image).unlink()
    (folder / record_key(lost.fingerprint)).unlink()
    content = BytesIO()
    Image.new("RGB", (1024, 1024)).save(content, "JPEG")
    sandbox.script.play(
        Answer(kind="not_an_image", body_base64=base64.b64encode(content.getvalue()), content_type="image/jpeg")
    )
    paid = generate(*up_to_upload(photo))
    if dies:
        with monkeypatch.context() as now:
            now.setattr(Archiving, "_record_done", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                archive_picture(paid)
        assert paid.path is not None
        paid.path.unlink()
        got = walk(photo)
    else:
        got = archive_picture(paid)
    assert (got.status, got.sha256) == ("reused" if dies else "generated", paid.picture.sha256)
    for each in (got, lost):
        assert json.loads(Path(each.sidecar).read_text())["output"]["sha256"] == each.sha256
    assert hashlib.sha256(Path(got.image).read_bytes()).hexdigest() == got.sha256
    assert sandbox.ledger.billed == 2


def test_a_name_that_the_archive_cannot_hold_is_told_before_anything_is_paid(
    sandbox: Sandbox, photo: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "taken").write_bytes(b"somebody's own")
    for name in ("taken", "taken/below"):
        job, _ = up_to_upload(photo, name=name)
        with pytest.raises(InvalidJobError, match=r"name: no picture can be stored as .* is no folder; choose another"):
            pipeline(str(archive)).generate(job, never, Run("one"), LOG)
        assert Services(archive=str(archive)).archive.read(job.fingerprint) is None, "nor is it claimed"
    first = archive_picture(generate(*up_to_upload(photo, name="hero"), archive=str(archive)))
    below = Path(first.image).relative_to(archive).as_posix()
    job, _ = up_to_upload(photo, name=f"{below}/below", seed=4711)
    with pytest.raises(InvalidJobError, match="is no folder"):
        pipeline(str(archive)).generate(job, never, Run("one"), LOG)
    assert sandbox.ledger.billed == 1
    (archive / "taken").unlink()
    assert archive_picture(generate(*up_to_upload(photo, name="taken"), archive=str(archive))).status == "reused"


def test_another_live_run_is_waited_for_and_said_so(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(Answer(delay=1.5))
    job, uploaded = up_to_upload(photo)
    first = threading.Thread(target=lambda: pipeline().produce(job, Run("first"), LOG))
    first.start()
    until(lambda: len(sandbox.ledger.requests) == 1)
    said: list[str] = []
    second = generate(job, uploaded, said=said)
    first.join()
    assert second.status == "reused"
    assert said[0].startswith("waiting: another run is paying")
    assert sandbox.ledger.billed == 1


def test_another_run_is_waited_for_however_often_one_has_to_look(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, waits = up_to_upload(photo), list[float]()

    def wait(_: Gate, seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2000:
            raise NotStartedError("enough")

    monkeypatch.setattr(LookUp, "look_up", lambda *_, **__: Finding(Verdict.WAIT))
    monkeypatch.setattr(Gate, "pause", wait)
    with pytest.raises(NotStartedError, match="enough"):
        generate(*asked)
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_WAIT_SECONDS


def test_a_lease_of_another_host_dies_by_time(sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, uploaded = up_to_upload(photo)
    archive = Services().archive
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(leases, "host_id", lambda: "another host")
        claimed = leases.claim(archive, None, job.fingerprint, Run("their run"))
    assert claimed is not None
    leases._claims.clear()
    assert leases.held_elsewhere(archive, archive.read(job.fingerprint), "my run")
    monkeypatch.setattr(StoredObject, "age", 61.0)
    assert not leases.held_elsewhere(archive, archive.read(job.fingerprint), "my run")
    assert generate(job, uploaded).possibly_billed_usd == Decimal("0.05")


def test_a_claim_is_renewed_while_its_run_lives_and_no_longer(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = up_to_upload(photo)
    archive = Services().archive
    claimed = leases.claim(archive, None, job.fingerprint, Run("a run"))
    assert claimed is not None
    before = archive.read(job.fingerprint)
    time.sleep(1.1)
    claimed.renew()
    after = archive.read(job.fingerprint)
    assert before is not None
    assert after is not None
    assert after.age <= 1
    assert after.record.attempts == before.record.attempts
    assert after.etag != before.etag, "so that nobody takes over by the version from before"
    claimed.hold(-1)
    claimed.renew()
    assert leases.held_claim(archive, job.fingerprint) is None


def test_a_claim_that_was_taken_over_is_let_go_and_pays_nothing(sandbox: Sandbox, photo: Path, tmp_path: Path) -> None:
    job, uploaded = up_to_upload(photo)
    archive = Services(archive=str(tmp_path / "archive")).archive
    sandbox.play(Answer(status=429))
    with pytest.raises(RateLimitError):
        generate(job, uploaded, run="slow", archive=archive.url)
    found = archive.read(job.fingerprint)
    assert found is not None
    theirs = found.record.claimed_by(Holder(run="fast", host="another", pid=1, started=""), datetime.now(UTC))
    gave_up = theirs.with_outcome(status=500, reason="it failed", wait_seconds=None, possibly_billed=False)
    archive.write(gave_up, found.etag)
    assert generate(job, uploaded, run="slow", archive=archive.url).status == "generated"
    assert [each.run for each in recorded(job.fingerprint, archive.url).record.attempts] == ["slow", "fast", "slow"]


def test_only_one_of_two_claims_on_one_version_of_a_record_wins(sandbox: Sandbox, photo: Path, tmp_path: Path) -> None:
    archive: Archive = Services(archive=str(tmp_path / "archive")).archive
    job, _ = up_to_upload(photo)
    assert leases.claim(archive, None, job.fingerprint, Run("one")) is not None
    assert leases.claim(archive, None, job.fingerprint, Run("two")) is None


def never() -> UploadedImage:
    pytest.fail("uploaded, though there is nothing to pay")


def test_what_is_paid_for_needs_neither_the_upload_place_nor_a_client(sandbox: Sandbox, photo: Path) -> None:
    job, uploaded = up_to_upload(photo)
    opened = pipeline()
    look_up = replace(opened.look_up, open_client=lambda: pytest.fail("a client was opened"))
    opened = replace(opened, look_up=look_up, cashier=replace(opened.cashier, open_client=look_up.open_client))
    waiting = generate(job, uploaded)
    leases.held_claim(opened.look_up.archive, job.fingerprint).release()  # type: ignore[union-attr]
    recovered = opened.generate(job, never, Run("two"), LOG)
    archive_picture(waiting)
    reused = opened.generate(job, never, Run("three"), LOG)
    assert (recovered.status, reused.status) == ("recovered", "reused")
    assert (waiting.source_uri, reused.source_uri) == (uploaded.uri, str(photo))


def test_an_upload_that_fails_costs_nothing_and_claims_nothing(sandbox: Sandbox, photo: Path) -> None:
    job, _ = up_to_upload(photo)

    def gone() -> UploadedImage:
        raise StoreError("the bucket is gone")

    opened = pipeline()
    with pytest.raises(StoreError, match="the bucket is gone"):
        opened.generate(job, gone, Run("one"), LOG)
    assert opened.look_up.archive.read(job.fingerprint) is None
    assert sandbox.ledger.requests == ()


def billed_502(sandbox: Sandbox, photo: Path, ledger: Ledger | None = None) -> tuple[ValidatedJob, UploadedImage]:
    """A job whose first request, of the run `one`, may have been billed; it is to be sent again."""
    sandbox.play(Answer(status=502))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(BadGatewayError) as error:
        generate(job, uploaded, run="one", ledger=ledger)
    assert error.value.decision
    assert error.value.decision.retry
    return job, uploaded


def reported(error: SegmindError) -> tuple[int, Decimal]:
    return error.requests_sent, error.possibly_billed_usd


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9", StoreError),
        ("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX_MIN_FREE_BYTES", str(10**18), OutboxError),
    ],
)
def test_whatever_ends_a_run_its_earlier_requests_are_reported(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, kind: type[SegmindError]
) -> None:
    ledger = Ledger()
    job, uploaded = billed_502(sandbox, photo, ledger)
    with monkeypatch.context() as broken:
        broken.setenv(name, value)
        with pytest.raises(kind) as error:
            generate(job, uploaded, run="one", ledger=ledger)
    assert error.value.decision is None
    assert reported(error.value) == (1, Decimal("0.05"))
    assert walk(photo).possibly_billed_usd == 0, "it is reported once"


def test_a_run_that_takes_over_from_a_dead_one_reports_what_that_may_have_been_billed_though_its_own_request_fails(
    sandbox: Sandbox, photo: Path
) -> None:
    job, uploaded = up_to_upload(photo)
    lost = Attempt(run="long ago", sent_at=datetime.now(UTC))
    Services().archive.write(Record(fingerprint=job.fingerprint, attempts=(lost,)), None)
    sandbox.play(Answer(status=422))
    ledger = Ledger()
    with pytest.raises(UnprocessableError) as error:
        generate(job, uploaded, ledger=ledger)
    assert recorded(job.fingerprint).record.attempts[0].reported_by
    assert reported(error.value) == (1, Decimal("0.05"))
    assert ledger.totals == Totals(1, possibly_billed_usd=Decimal("0.05"))
    assert walk(photo).possibly_billed_usd == 0, "it is reported once"


def test_a_run_that_ends_well_leaves_nothing_to_report_behind(sandbox: Sandbox, photo: Path) -> None:
    job, uploaded = billed_502(sandbox, photo)
    generated = generate(job, uploaded, run="one")
    assert (generated.requests_sent, generated.possibly_billed_usd) == (2, Decimal("0.05"))
    archive_picture(generated)
    ledger = Ledger()
    assert generate(job, uploaded, run="another", ledger=ledger).status == "reused"
    assert ledger.totals == Totals()


@pytest.mark.parametrize("lapsed", [False, True])
def test_a_run_that_is_stopped_before_it_tries_again_reports_its_request_and_nobody_else_does(
    sandbox: Sandbox, photo: Path, lapsed: bool
) -> None:
    job, uploaded = billed_502(sandbox, photo)
    opened = pipeline()
    if lapsed:
        claim = leases.held_claim(opened.look_up.archive, job.fingerprint)
        assert claim is not None
        claim.hold(-1)
        claim.renew()
    opened.gate.stop(RunCancelledError("Ctrl-C"))
    with pytest.raises(NotStartedError) as stopped:
        opened.generate(job, lambda: uploaded, Run("one"), LOG)
    assert reported(stopped.value) == (1, Decimal("0.05"))
    assert recorded(job.fingerprint).record.holder is None
    again = walk(photo)
    assert (again.status, again.possibly_billed_usd) == ("generated", Decimal("0.00"))


def test_another_try_of_a_flow_run_waits_for_the_request_that_an_earlier_one_has_in_flight(
    sandbox: Sandbox, photo: Path
) -> None:
    sandbox.script.play(Answer(delay=1.0))
    job, uploaded = up_to_upload(photo)
    ledger = Ledger()

    def get(run: Run) -> ArchivedImage:
        return archive_picture(pipeline(ledger=ledger).generate(job, lambda: uploaded, run, LOG))

    with ThreadPoolExecutor() as pool:
        earlier = pool.submit(get, Run("task 1", (("flow", 1),)))
        until(lambda: ledger.totals.requests_sent == 1)
        ledger.begin_try()
        again = get(Run("task 2", (("flow", 2),)))
        assert earlier.result(10).image == again.image
    assert (sandbox.ledger.billed, ledger.totals) == (1, Totals(1, Decimal("0.05")))


@pytest.mark.parametrize(
    ("answer", "known"), [(Answer(delay=1.0), (Decimal("0.05"), False)), (Answer(status=502, delay=1.0), (None, None))]
)
def test_a_record_tells_no_cost_of_a_request_in_flight_when_another_picture_of_the_job_is_archived(
    sandbox: Sandbox,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Answer,
    known: tuple[Decimal | None, bool | None],
) -> None:
    job, uploaded = up_to_upload(photo)
    generate(job, uploaded)
    outbox = Path(os.environ["PREFECT_INTEGRATIONS_SEGMIND_OUTBOX"])
    back = on_another_machine(tmp_path, monkeypatch)
    sandbox.script.play(answer)
    ledger = Ledger()
    other = pipeline(on_kept="repay", ledger=ledger, policy=RetryPolicy(retries=0))
    with ThreadPoolExecutor() as pool:
        paying = pool.submit(other.produce, job, Run("other"), LOG)
        until(lambda: ledger.totals.requests_sent == 1)
        monkeypatch.setattr(leases, "host_id", lambda: "the first machine")
        back.rename(outbox)
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX", str(outbox))
        assert walk(photo).status == "recovered"
        with suppress(BadGatewayError):
            paying.result(10)
    record = recorded(job.fingerprint).record
    told = [(each.cost_usd, each.possibly_billed) for each in record.attempts]
    assert (record.state, told) == ("done", [(Decimal("0.05"), False), known])


def test_a_claim_that_is_let_go_just_before_a_retry_is_made_anew(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, uploaded = billed_502(sandbox, photo)
    archive, begin_request = Services().archive, leases.Claim.begin_request
    lapsed = leases.held_claim(archive, job.fingerprint)

    def late(self: leases.Claim, *request: Any) -> None:
        if self is lapsed:
            self.release()
        begin_request(self, *request)

    monkeypatch.setattr(leases.Claim, "begin_request", late)
    generated = generate(job, uploaded, run="one")
    assert (generated.requests_sent, generated.possibly_billed_usd) == (2, Decimal("0.05"))
    held = leases.held_claim(archive, job.fingerprint)
    assert held is not None
    assert held is not lapsed
    assert len(sandbox.ledger.requests) == 2


def test_an_overload_that_names_a_time_is_counted_with_the_rate_limits_and_another_is_not(
    sandbox: Sandbox, photo: Path
) -> None:
    asked = [Answer(status=429), Answer(status=503, retry_after="1"), Answer(status=529, reset_in=1)]
    sandbox.play(*asked, Answer(status=503), Answer(status=503, retry_after="1"), Answer(status=503))
    job, uploaded = up_to_upload(photo)
    opened = pipeline(policy=RetryPolicy(retries=1, rate_limit_retries=4))
    for retry in (True, True, True, True, True, False):
        with pytest.raises(SegmindError) as error:
            opened.generate(job, lambda: uploaded, Run("one"), LOG)
        assert error.value.decision
        assert error.value.decision.retry is retry
        opened = with_gate(opened)
    assert error.value.decision
    assert error.value.decision.reason == "gave up after 1 retry"


@pytest.mark.parametrize(("first", "retry"), [(429, True), (502, False)])
def test_the_time_that_a_rate_limit_took_does_not_end_a_run(
    sandbox: Sandbox, photo: Path, first: int, retry: bool
) -> None:
    sandbox.play(Answer(status=first, reset_in=0.1), Answer(status=429, reset_in=0.1))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(SegmindError):
        generate(job, uploaded, run="one")
    claim = leases.held_claim(Services().archive, job.fingerprint)
    assert claim is not None

    def an_hour_ago(record: Record) -> Record:
        sent = record.attempts[0].sent_at - timedelta(hours=1)
        return record.model_copy(update={"attempts": (record.attempts[0].model_copy(update={"sent_at": sent}),)})

    claim.write(an_hour_ago)
    with pytest.raises(RateLimitError) as error:
        generate(job, uploaded, run="one")
    assert error.value.decision
    assert error.value.decision.retry is retry


KEPT = """
import sys, uuid
from tests.support.moto_server import moto_server
from tests.support.waiting import until
from tests.support.walk import archive_picture, generate, up_to_upload
generated = generate(*up_to_upload(sys.argv[1]))
print("kept", flush=True)
sys.stdin.readline()
archive_picture(generated)
"""


def process_that_keeps(photo: Path) -> subprocess.Popen[str]:
    """A process that has a paid picture in the outbox, and archives it once its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", KEPT, str(photo)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "kept\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("lives", "status"), [(True, "reused"), (False, "recovered")])
def test_a_picture_in_the_outbox_belongs_to_the_process_that_got_it_while_that_lives(
    sandbox: Sandbox, photo: Path, lives: bool, status: str
) -> None:
    process = process_that_keeps(photo)
    assert process.stdin
    job, uploaded = up_to_upload(photo)
    if lives:
        threading.Timer(2, process.stdin.close).start()
    else:
        process.kill()
        process.wait()
    began = time.monotonic()
    got = generate(job, uploaded)
    assert got.status == status
    assert lives or time.monotonic() - began < leases.RENEW_SECONDS, "a dead process is not waited for"
    archive_picture(got)
    process.wait(30)
    assert sandbox.ledger.billed == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the start of a process is not read")
def test_a_run_waits_for_a_stopped_process_of_this_host_however_long_and_says_so_once(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = process_that_keeps(photo)
    assert process.stdin
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(StoredObject, "age", 3600.0)
    looks, said = iter(range(100)), list[str]()

    def pause(*_: object) -> None:
        if next(looks) == 30:
            process.send_signal(signal.SIGCONT)
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.close()
            process.wait(30)

    monkeypatch.setattr(Gate, "pause", pause)
    try:
        assert generate(*up_to_upload(photo), said=said).status == "reused"
    finally:
        process.kill()
        process.wait()
    told = [each for each in said if f"process {process.pid} of this host holds the claim and is alive" in each]
    assert len(told) == 1
    assert sandbox.ledger.billed == 1


STOPPED = """
import os, signal, sys
from prefect_segmind.archive import leases
from tests.support.walk import walk
confirm, real, late = leases.Claim.confirm, leases.clock, 0.0
def stopped(claim):
    global late
    print("claimed", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    late = 3600.0
    confirm(claim)
leases.clock = lambda: real() + late
leases.host_id = lambda: "another host"
leases.Claim.confirm = stopped
done = walk(sys.argv[1])
print(done.status, done.attempts, done.cost_usd, done.possibly_billed_usd)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGSTOP")
def test_a_run_that_was_stopped_before_it_sent_and_goes_on_after_another_has_paid_sends_nothing(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(photo)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PREFECT_INTEGRATIONS_SEGMIND_OUTBOX": str(tmp_path / "another outbox")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == "claimed\n"
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        with monkeypatch.context() as later:
            later.setattr(StoredObject, "age", 61.0)
            ours = walk(photo)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "reused 0 0.00 0.00\n"
    finally:
        process.kill()
        process.wait()
    assert (ours.status, ours.possibly_billed_usd, sandbox.ledger.billed) == ("generated", Decimal("0.05"), 1)


class Lost:
    """A store whose next write of a record fails once it has taken effect."""

    def __init__(self, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
        write = Archive.write

        def lost(self: Archive, record: Record, etag: str | None) -> str:
            monkeypatch.setattr(Archive, "write", write)
            write(self, record, etag)
            raise error

        monkeypatch.setattr(Archive, "write", lost)


@pytest.mark.parametrize(
    "error",
    [
        StoreUnreachableError("no answer"),
        StoreError("the server failed", status=500),
        AttributeError("botocore's"),
        KeyboardInterrupt(),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_claim_whose_answer_was_lost_is_not_sent_counts_nothing_and_refuses_nobody(
    sandbox: Sandbox, photo: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, uploaded = up_to_upload(photo)
    ledger = Ledger()
    Lost(error, monkeypatch)
    with pytest.raises(type(error)):
        generate(job, uploaded, ledger=ledger)
    assert (ledger.totals, sandbox.ledger.requests) == (Totals(), ())
    assert recorded(job.fingerprint).record.attempts == ()
    again = walk(photo, on_unknown="fail")
    assert (again.status, again.attempts, again.possibly_billed_usd) == ("generated", 1, Decimal("0.00"))


def test_a_claim_of_which_nobody_knows_whether_it_is_read_back_is_not_sent_and_refuses_nobody(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a store that ignores conditions, as the sandbox's."""
    job, uploaded = up_to_upload(photo)
    read, write = Archive.read, Archive.write

    def unreachable(*_: object) -> None:
        monkeypatch.setattr(Archive, "read", read)
        raise StoreUnreachableError("no answer")

    def written(self: Archive, record: Record, etag: str | None) -> str:
        etag = write(self, record, etag)
        monkeypatch.setattr(Archive, "write", write)
        monkeypatch.setattr(Archive, "read", unreachable)
        return etag

    monkeypatch.setattr(Archive, "write", written)
    with pytest.raises(StoreUnreachableError):
        generate(job, uploaded)
    assert sandbox.ledger.requests == ()
    assert walk(photo, on_unknown="fail").status == "generated"


@pytest.mark.parametrize("error", [StoreUnreachableError("no answer"), KeyboardInterrupt()])
def test_a_request_that_was_claimed_and_not_sent_is_in_no_ledger_and_no_record(
    sandbox: Sandbox, photo: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, uploaded = up_to_upload(photo)
    lost = Attempt(run="long ago", sent_at=datetime.now(UTC))
    Services().archive.write(Record(fingerprint=job.fingerprint, attempts=(lost,)), None)
    ledger = Ledger()

    def unconfirmed(_: leases.Claim) -> None:
        raise error

    with monkeypatch.context() as now:
        now.setattr(leases.Claim, "confirm", unconfirmed)
        with pytest.raises(type(error)):
            generate(job, uploaded, ledger=ledger)
    assert (ledger.totals.requests_sent, sandbox.ledger.requests) == (0, ())
    assert recorded(job.fingerprint).record.attempts == (lost,)
    again = walk(photo)
    assert (again.attempts, again.possibly_billed_usd) == (1, Decimal("0.05")), "what the dead run may have been billed"


def test_the_right_to_send_is_checked_once_the_connection_stands_and_nothing_is_sent_without_it(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = list[str]()
    connect, write = SyncBackend.connect_tcp, SyncStream.write

    def connecting(*what: Any, **more: Any) -> Any:
        stream = connect(*what, **more)
        events.append("connected")
        return stream

    def sending(*what: Any, **more: Any) -> None:
        events.append("sent")
        write(*what, **more)

    job, uploaded = up_to_upload(photo)
    monkeypatch.setattr(leases.Claim, "confirm", lambda _: events.append("confirmed"))
    monkeypatch.setattr(SyncBackend, "connect_tcp", connecting)
    monkeypatch.setattr(SyncStream, "write", sending)
    generate(job, uploaded)
    assert events[:3] == ["connected", "confirmed", "sent"]
    assert events.count("confirmed") == 1


def test_a_step_of_the_users_own_that_fails_after_a_picture_is_paid_for_makes_nobody_wait(
    sandbox: Sandbox, photo: Path
) -> None:
    waiting = generate(*up_to_upload(photo))
    said: list[str] = []
    again = generate(*up_to_upload(photo), said=said)
    assert (again.status, again.cost_usd, again.requests_sent) == ("recovered", Decimal(0), 0)
    assert not any(each.startswith("waiting") for each in said)
    both = list[ArchivedImage]()  # the first one goes on after all, at the same time
    threads = [
        threading.Thread(target=lambda each=each: both.append(archive_picture(each))) for each in (waiting, again)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((each.status, each.cost_usd) for each in both) == [
        ("generated", Decimal("0.05")),
        ("recovered", Decimal("0.00")),
    ]
    assert both[0].image == both[1].image
    assert recorded(again.job.fingerprint).record.state == "done"
    assert leases.held_claim(Services().archive, again.job.fingerprint) is None
    assert (walk(photo).status, sandbox.ledger.billed) == ("reused", 1)


@pytest.mark.parametrize("on_unknown", ["repay", "fail"])
def test_a_run_that_looks_while_another_claims_or_ends_waits_and_refuses_nothing(
    sandbox: Sandbox, photo: Path, on_unknown: OnUnknown, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, uploaded = up_to_upload(photo)
    archive, write, verdicts = Services().archive.url, Archive.write, list[str]()

    def looked_at(self: Archive, record: Record, etag: str | None) -> str:
        written = write(self, record, etag)
        if self.url == archive:  # a claim of an earlier test may be given up meanwhile
            verdicts.append(pipeline(on_unknown=on_unknown).look_up.look_up(job, Run("another"), LOG).verdict)
        return written

    with monkeypatch.context() as now:
        now.setattr(Archive, "write", looked_at)
        archived = archive_picture(generate(job, uploaded))
    assert archived.status == "generated"
    assert verdicts == ["wait", "wait", "reuse"]
    before = recorded(job.fingerprint)
    unfinished = before.record.model_copy(update={"state": "claimed", "holder": leases.this_process(Run("ended"))})
    stale, read = [replace(before, record=unfinished, stored=replace(before.stored, etag="before"))], Archive.read
    monkeypatch.setattr(Archive, "read", lambda *what: stale.pop() if stale else read(*what))
    assert generate(job, uploaded, on_unknown=on_unknown).status == "reused"
    assert sandbox.ledger.billed == 1


def test_a_picture_in_this_outbox_is_not_left_to_another_host(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(leases, "host_id", lambda: "another host")
        kept = generate(*up_to_upload(photo))
    said: list[str] = []
    assert generate(*up_to_upload(photo), said=said).status == "recovered"
    assert not any(each.startswith("waiting") for each in said)
    archive_picture(kept)


def test_a_picture_that_is_archived_while_one_looks_is_reused_and_not_recovered(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, uploaded = up_to_upload(photo)
    find, others = Outbox.find, ["the other run"]

    def slow(self: Outbox, *what: Any, **more: Any) -> tuple[Path, OutboxEntry] | None:
        if not others:
            return find(self, *what, **more)
        theirs = generate(job, uploaded, run=others.pop())
        found = find(self, *what, **more)
        archive_picture(theirs)
        return found

    monkeypatch.setattr(Outbox, "find", slow)
    assert generate(job, uploaded, run="this run").status == "reused"
    assert sandbox.ledger.billed == 1


def kept_answers() -> list[Path]:
    return sorted(Path(os.environ["PREFECT_INTEGRATIONS_SEGMIND_OUTBOX"]).rglob("*.answer"))


def picture_bytes(format: str = "PNG") -> bytes:
    file = BytesIO()
    Image.linear_gradient("L").save(file, format)
    return file.getvalue()


def odd_answers() -> dict[str, tuple[Answer, bytes]]:
    """Answers of a 200 that hold no picture that can be read, and their bodies."""
    odd = b"\x00\x01\x02 no picture that anybody knows"
    texts = {
        "html": "<html>Welcome</html>",
        "json of an unknown shape": '{"artifact": {"payload": "AAAA"}}',
        "a link that leads nowhere": '{"image_url": "https://169.254.169.254/a.png?X-Amz-Signature=secret"}',
        "an unsafe one": '{"data": [{"url": null, "is_image_safe": false}], "note": "a dove"}',
    }
    answers = {name: (Answer(kind="error", status=200, body=text), text.encode()) for name, text in texts.items()}
    answers["bytes"] = (Answer(kind="not_an_image", body_base64=base64.b64encode(odd)), odd)
    return answers


@pytest.mark.parametrize("what", odd_answers())
def test_what_was_paid_for_and_is_no_picture_is_kept_as_it_came_and_named(
    sandbox: Sandbox, photo: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer, body = odd_answers()[what]
    sandbox.play(answer)
    job, uploaded = up_to_upload(photo)
    with pytest.raises(NotAnImageError) as error:
        generate(job, uploaded)
    (kept,) = kept_answers()
    assert kept.read_bytes() == body
    assert str(kept) in str(error.value)
    for each in kept.parent.iterdir():
        assert stat.S_IMODE(each.stat().st_mode) == 0o600, f"{each} is for its user alone"
    assert (error.value.cost_usd, error.value.possibly_billed_usd) == (sandbox.ledger.billed_usd, Decimal(0))
    record = recorded(job.fingerprint).record
    assert [(each.status, each.possibly_billed, each.cost_usd) for each in record.attempts] == [
        (200, False, Decimal("0.05"))
    ]
    told = record.model_dump_json() + str(error.value) + caplog.text + kept.with_suffix(".answer.json").read_text()
    assert "secret" not in told, "a signed link is in the kept answer alone"


@pytest.mark.parametrize("what", odd_answers())
def test_what_still_cannot_be_read_is_named_in_a_warning_before_it_is_paid_for_again(
    sandbox: Sandbox, photo: Path, what: str
) -> None:
    answer, body = odd_answers()[what]
    sandbox.play(answer, answer, Answer())
    asked = up_to_upload(photo)
    for number in (1, 2):
        with pytest.raises(NotAnImageError):
            generate(*asked)
        assert [each.read_bytes() for each in kept_answers()] == [body] * number, "none replaces another"
    with pytest.raises(OutcomeUnknownError) as refused:
        generate(*asked, on_unknown="fail")
    assert all(str(each) in str(refused.value) for each in kept_answers())
    assert sandbox.ledger.billed == 2
    said: list[str] = []
    again = archive_picture(generate(*asked, said=said))
    (warning,) = [each for each in said if each.endswith("paying again")]
    assert all(str(each) in warning for each in kept_answers())
    assert (again.status, again.cost_usd, sandbox.ledger.billed) == ("generated", Decimal("0.05"), 3)
    assert len(kept_answers()) == 2, "what was paid for and brought no picture is a person's to throw away"
    assert walk(photo).status == "reused"


def test_an_answer_that_another_version_can_read_is_recovered_unpaid(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = picture_bytes()
    headers = {"x-cost": "0.0625", "x-request-id": "r-7"}
    sandbox.play(Answer(kind="not_an_image", body_base64=base64.b64encode(body), headers=headers))
    job, uploaded = up_to_upload(photo)

    def too_new(_: Path) -> None:
        raise BrokenPicture("is of a kind that is not read here")

    with monkeypatch.context() as old:
        old.setattr("prefect_segmind.api.client.read_picture", too_new)
        with pytest.raises(NotAnImageError) as error:
            generate(job, uploaded)
        said: list[str] = []
        with pytest.raises(OutcomeUnknownError):
            generate(job, uploaded, on_unknown="fail", said=said)
        assert any("still does not hold a picture" in each for each in said)
    assert error.value.cost_usd == Decimal("0.0625")
    again = walk(photo)
    assert (again.status, again.cost_usd, again.attempts) == ("recovered", Decimal(0), 0)
    assert (again.sha256, again.possibly_billed_usd) == (hashlib.sha256(body).hexdigest(), Decimal(0))
    assert len(sandbox.ledger.requests) == 1
    paid = recorded(job.fingerprint).record.picture
    assert paid is not None
    assert (paid.cost_usd, paid.request_id) == (Decimal("0.0625"), "r-7"), "what the headers told is not lost"
    assert list(Path(os.environ["PREFECT_INTEGRATIONS_SEGMIND_OUTBOX"]).rglob("*.*")) == []


def down(*_: object, **__: object) -> None:
    """A download where there is no network."""
    raise DownloadError("the network is down")


def answered_while_the_network_is_down(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ValidatedJob, UploadedImage]:
    """A job that was paid for and answered by a link, which led nowhere."""
    monkeypatch.setattr("prefect_segmind.api.client._LINK_WAITS", ())
    asked = up_to_upload(photo)
    with monkeypatch.context() as network:
        network.setattr("prefect_segmind.api.client.download", down)
        sandbox.play(Answer(kind="json_url"))
        with pytest.raises(ResultLinkError, match="the network is down"):
            generate(*asked)
    return asked


def test_a_link_that_works_again_is_followed_unpaid(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = vars(client)["download"]
    answered_while_the_network_is_down(sandbox, photo, monkeypatch)
    (kept,) = kept_answers()
    assert "/v1/results/" in kept.read_text()
    assert vars(client)["download"] is real
    again = walk(photo)
    assert (again.status, again.cost_usd, sandbox.ledger.billed) == ("recovered", Decimal(0), 1)
    assert kept_answers() == []


def test_two_runs_that_read_one_kept_answer_at_once_pay_for_nothing(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link may work but once: the one that gets nothing from it looks where the other has put the picture."""
    real = vars(client)["download"]
    asked = answered_while_the_network_is_down(sandbox, photo, monkeypatch)
    both, followed = threading.Barrier(2), threading.Event()

    def once(*arguments: Any, **more: Any) -> object:
        if both.wait(30) == 0:
            try:
                return real(*arguments, **more)
            finally:
                followed.set()
        assert followed.wait(30)
        until(lambda: kept_answers() == [])
        raise DownloadError("the link was for one time", status=403)

    monkeypatch.setattr("prefect_segmind.api.client.download", once)
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(generate(*asked).status)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (made, sandbox.ledger.billed) == (["recovered", "recovered"], 1)


def test_an_answer_that_another_run_takes_away_while_it_is_read_is_no_error(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.play(Answer(kind="not_an_image", body_base64=base64.b64encode(picture_bytes())))
    asked = up_to_upload(photo)

    def too_new(_: Path) -> None:
        raise BrokenPicture("is of a kind that is not read here")

    with monkeypatch.context() as old:
        old.setattr("prefect_segmind.api.client.read_picture", too_new)
        with pytest.raises(NotAnImageError):
            generate(*asked)
    read, others = client.SegmindClient.read, [1]

    def slow(self: client.SegmindClient, body: Path, found: Path) -> Any:
        picture = read(self, body, found)
        if others and others.pop():
            assert generate(*asked).status == "recovered"
        return picture

    monkeypatch.setattr(client.SegmindClient, "read", slow)
    assert (generate(*asked).status, sandbox.ledger.billed) == ("recovered", 1)


def test_a_flow_run_that_goes_on_where_its_picture_is_out_of_reach_keeps_to_the_policy_and_says_so(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, uploaded = up_to_upload(photo)
    said: list[str] = []

    def on_machine(number: int, on_kept: OnKept) -> str:
        outbox = tmp_path / f"machine {number}"
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX", str(outbox))
        monkeypatch.setattr(socket, "gethostname", lambda: f"machine-{number}")
        flow_runs = (("flow", number),)
        run, log = Run(f"task {number}", flow_runs), listening(said, logging.WARNING)
        made = pipeline(on_unknown="fail", on_kept=on_kept).generate(job, lambda: uploaded, run, log)
        leases._claims.clear()
        outbox.rename(tmp_path / f"out of reach {number}")
        return made.status

    assert on_machine(1, "wait") == "generated"
    with pytest.raises(KeptElsewhereError, match=r"its picture is in .* on machine-1"):
        on_machine(2, "wait")
    assert (said, sandbox.ledger.billed) == ([], 1)
    assert on_machine(3, "repay") == "generated"
    assert [each for each in said if "its picture is in" in each and each.endswith("paying again")] == said
    assert len(said) == 1
    with pytest.raises(OutcomeUnknownError, match="this flow run sends no more for it"):
        on_machine(4, "repay")
    assert sandbox.ledger.billed == 2


def test_what_a_link_has_led_to_is_kept_too_for_the_link_may_not_live_as_long(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = up_to_upload(photo)

    def too_new(_: Path) -> None:
        raise BrokenPicture("is of a kind that is not read here")

    with monkeypatch.context() as old:
        old.setattr("prefect_segmind.api.client.read_picture", too_new)
        sandbox.play(Answer(kind="json_url"))
        with pytest.raises(ResultLinkError, match="does not lead to a picture"):
            generate(*asked)
        assert len(kept_answers()) == 2
        with pytest.raises(OutcomeUnknownError):
            generate(*asked, on_unknown="fail")
        assert len(kept_answers()) == 2, "and once is enough"
    monkeypatch.setattr("prefect_segmind.api.client._LINK_WAITS", ())
    monkeypatch.setattr("prefect_segmind.api.client.download", lambda *_, **__: pytest.fail("the link is dead by now"))
    again = walk(photo)
    assert (again.status, sandbox.ledger.billed) == ("recovered", 1)


def test_json_that_had_arrived_whole_when_a_run_was_interrupted_is_read_again(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as now:
        now.setattr("prefect_segmind.api.client.download", interrupted)
        sandbox.play(Answer(kind="json_url"))
        with pytest.raises(KeyboardInterrupt):
            generate(*up_to_upload(photo))
    with monkeypatch.context() as network:
        network.setattr("prefect_segmind.api.client.download", down)
        with pytest.raises(OutcomeUnknownError) as refused:
            walk(photo, on_unknown="fail")
    (kept,) = kept_answers()
    assert str(kept) in str(refused.value)
    again = walk(photo)
    assert (again.status, again.cost_usd, sandbox.ledger.billed) == ("recovered", Decimal(0), 1)


def test_an_answer_that_another_machine_keeps_is_named_with_the_machine(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.play(Answer(kind="html"))
    asked = up_to_upload(photo)
    with pytest.raises(NotAnImageError):
        generate(*asked)
    (kept,), host = kept_answers(), socket.gethostname()
    on_another_machine(tmp_path, monkeypatch)
    with pytest.raises(OutcomeUnknownError) as refused:
        generate(*asked, on_unknown="fail")
    assert f"{kept} on {host}" in str(refused.value)
    said: list[str] = []
    assert generate(*asked, said=said).status == "generated"
    assert any(f"{kept} on {host}" in each and each.endswith("paying again") for each in said)


def test_an_empty_answer_is_paid_for_and_leaves_nothing_to_keep(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(Answer(kind="empty"))
    asked = up_to_upload(photo)
    with pytest.raises(NotAnImageError, match="the body is empty") as error:
        generate(*asked)
    assert error.value.cost_usd == Decimal("0.05")
    assert kept_answers() == []
    with pytest.raises(OutcomeUnknownError, match="the answer was empty"):
        generate(*asked, on_unknown="fail")
    assert sandbox.ledger.billed == 1


def test_a_picture_that_ends_early_in_a_whole_answer_is_asked_for_again_and_kept(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(Answer(kind="truncated_image"))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(AnswerCutError) as cut:
        generate(job, uploaded, run="one")
    assert cut.value.decision
    assert cut.value.decision.retry
    assert (cut.value.cost_usd, cut.value.possibly_billed_usd) == (Decimal(0), Decimal("0.05"))
    (kept,) = kept_answers()
    assert str(kept) in str(cut.value)
    archived = archive_picture(generate(job, uploaded, run="one"))
    assert archived.cost_usd + archived.possibly_billed_usd == sandbox.ledger.billed_usd == Decimal("0.10")


def test_a_run_that_has_paid_for_an_answer_without_a_picture_tells_it_in_its_sum(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(Answer(kind="html"))
    job, uploaded = up_to_upload(photo)
    with pytest.raises(NotAnImageError):
        generate(job, uploaded, run="one")
    archived = archive_picture(generate(job, uploaded, run="one"))
    assert (archived.cost_usd, archived.possibly_billed_usd) == (Decimal("0.10"), Decimal(0))
    assert sandbox.ledger.billed_usd == Decimal("0.10")


def test_a_disk_that_fails_under_an_answer_loses_nothing(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    sandbox.play(Answer(kind="html"))
    said: list[str] = []
    with monkeypatch.context() as disk:
        disk.setattr("prefect_segmind.archive.outbox.sync", failing)
        with pytest.raises(NotAnImageError) as error:
            generate(*up_to_upload(photo), said=said)
    (part,) = Path(os.environ["PREFECT_INTEGRATIONS_SEGMIND_OUTBOX"]).rglob("*.part")
    assert b"<html>" in part.read_bytes()
    assert str(part) in str(error.value)
    assert any("could not be made durable" in each for each in said)


def test_a_picture_is_in_the_record_whatever_ends_the_run_right_after_it_was_kept(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    job, uploaded = up_to_upload(photo)
    with monkeypatch.context() as now:
        now.setattr("prefect_segmind.archive.outbox.release", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(job, uploaded)
    assert (recorded(job.fingerprint).record.kept_picture or "").startswith(str(tmp_path / "outbox"))
    on_another_machine(tmp_path, monkeypatch)
    with pytest.raises(KeptElsewhereError):
        walk(photo)
    assert sandbox.ledger.billed == 1
