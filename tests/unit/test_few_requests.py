"""A batch asks its archive no more than it must: every request to a store takes time, and CPU that pictures need."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.record import Record, Run
from prefect_segmind.errors import ArchiveError, StoreError
from prefect_segmind.pipeline.archive import Archiving
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services
from tests.support.moto_server import moto_server
from tests.support.walk import LOG, pipeline, up_to_upload

BUCKET = "few-requests"


@pytest.fixture
def requests(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of a store with conditions, in order, each request as its method and what it is about."""
    made: list[str] = []

    def note(params: dict[str, str], **_: object) -> None:
        path = params["url_path"]
        made.append(f"{params['method']} {'record' if '.segmind/' in path else Path(path).suffix}")

    with moto_server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", f"s3://{BUCKET}/{tmp_path.name}")
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO", f"s3://{BUCKET}/{tmp_path.name}/uploads")
        client = Services().s3
        client.create_bucket(Bucket=BUCKET)
        assert Services().archive.store.conditional  # asked once for all runs of the process
        client.meta.events.register("before-call.s3", note)
        yield made


def record(fingerprint: str) -> Record:
    found = Services().archive.read(fingerprint)
    assert found is not None
    return found.record


def test_a_picture_that_the_listing_did_not_have_is_a_claim_the_picture_its_sidecar_and_the_record(
    requests: list[str], sandbox: Sandbox, photo: Path
) -> None:
    job, _ = up_to_upload(photo)
    opened = pipeline(unseen={job.fingerprint})
    opened.upload(job)
    requests.clear()
    archived = opened.produce(job, Run("one"), LOG)
    assert requests == ["PUT record", f"PUT {Path(archived.image).suffix}", "PUT .json", "PUT record"]
    assert record(job.fingerprint).state == "done"
    assert record(job.fingerprint).attempts[0].status == 200


def test_what_another_run_has_archived_since_the_listing_is_not_paid_for_again(
    requests: list[str], sandbox: Sandbox, photo: Path
) -> None:
    job, _ = up_to_upload(photo)
    first = pipeline().produce(job, Run("another"), LOG)
    again = pipeline(unseen={job.fingerprint}).produce(job, Run("one"), LOG)
    assert (again.status, again.image, sandbox.ledger.billed) == ("reused", first.image, 1)


def test_the_second_job_for_a_picture_reads_what_the_first_has_written(sandbox: Sandbox, photo: Path) -> None:
    job, other = (up_to_upload(photo, name=name)[0] for name in ("first", "second"))
    opened = pipeline(unseen={job.fingerprint})
    statuses = [opened.produce(each, Run(each.name), LOG).status for each in (job, other)]
    assert (statuses, sandbox.ledger.billed) == (["generated", "reused"], 1)


class TestThatAPictureHasCome:
    @pytest.mark.parametrize("error", [StoreError("the archive is full"), KeyboardInterrupt()])
    def test_is_in_the_record_when_it_cannot_be_archived_at_once(
        self, sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        job, _ = up_to_upload(photo)

        def fail(*_: object, **__: object) -> str:
            raise error

        monkeypatch.setattr(Archive, "put_picture", fail)
        with pytest.raises((ArchiveError, KeyboardInterrupt)):
            pipeline().produce(job, Run("one"), LOG)
        known = record(job.fingerprint)
        (sent,) = known.attempts
        assert (sent.status, sent.possibly_billed, sent.cost_usd) == (200, False, Decimal("0.05"))
        assert known.kept_picture, "another machine knows where it is, and pays nothing"
        assert known.holder is None, "and waits for nobody"

    def test_is_in_the_record_at_once_where_another_task_archives_it(self, sandbox: Sandbox, photo: Path) -> None:
        job, uploaded = up_to_upload(photo)
        opened = pipeline()
        generated = opened.generate(job, lambda: uploaded, Run("one"), LOG)
        assert record(job.fingerprint).attempts[0].status == 200
        Archiving(opened.archiving.archive, opened.archiving.outbox).archive_picture(generated)
        assert record(job.fingerprint).state == "done"
