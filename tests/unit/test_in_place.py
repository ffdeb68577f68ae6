"""A picture that is archived under its job's very name is reused without reading it, and never paid for again."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from prefect_segmind.archive.record import Run
from prefect_segmind.errors import SegmindError, StoreError
from prefect_segmind.limits.admission import Gate
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services
from prefect_segmind.storage.store import Store
from tests.support.walk import LOG, archive_picture, generate, record_of, up_to_upload, walk

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
AGAIN = Run("another task run", (("flow run", 1),))


@pytest.fixture
def job(photo: Path, tmp_path: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> ValidatedJob:
    """A job whose picture is archived, in a folder."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(tmp_path / "archive"))
    job, uploaded = up_to_upload(photo, name="hero")
    archive_picture(generate(job, uploaded))
    return job


def opened(publish_to: Path | None = None) -> Pipeline:
    services = Services(publish_to=str(publish_to) if publish_to else None)
    return services.pipeline(Gate(), publisher=services.publisher(NOON, "a run"), log=LOG)


def test_it_is_reused_at_no_cost(job: ValidatedJob, sandbox: Sandbox) -> None:
    found = opened().reuse_in_place(job, AGAIN, LOG)
    assert found is not None
    assert found == opened().produce(job, AGAIN, LOG), "as if it had gone the ordinary way"
    assert (found.status, found.cost_usd, found.attempts, sandbox.ledger.billed) == ("reused", Decimal(0), 0, 1)


def test_another_name_or_another_picture_is_not_in_place(job: ValidatedJob, photo: Path) -> None:
    other, _ = up_to_upload(photo, name="another/name")
    new, _ = up_to_upload(photo, name="hero", prompt="a blue mug")
    assert [opened().reuse_in_place(each, AGAIN, LOG) for each in (other, new)] == [None, None]


def test_what_was_paid_for_under_another_spelling_is_in_place(photo: Path, sandbox: Sandbox) -> None:
    spaced, _ = up_to_upload(photo, name="hero", prompt="a red mug ")
    (was,) = spaced.earlier
    before = archive_picture(generate(was, up_to_upload(photo)[1]))
    found = opened().reuse_in_place(spaced, AGAIN, LOG)
    assert found is not None
    assert (found.image, found.fingerprint, sandbox.ledger.billed) == (before.image, was.fingerprint, 1)


def test_what_an_earlier_try_of_the_same_flow_run_has_paid_is_reported(photo: Path, sandbox: Sandbox) -> None:
    job, uploaded = up_to_upload(photo, name="hero")
    pipeline = opened()
    first = Run("a task run", (("flow run", 1),))
    pipeline.archiving.archive_picture(pipeline.generate(job, lambda: uploaded, first, LOG))
    found = opened().reuse_in_place(job, Run("a task run of the next try", (("flow run", 2),)), LOG)
    assert found is not None
    assert (found.status, found.cost_usd, found.attempts) == ("generated", Decimal("0.05"), 1)


class Failing:
    """Fails the call of a store of that number."""

    def __init__(self, stores: list[Store], at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        for store in stores:
            for name in ("get", "put", "stat", "holds"):
                monkeypatch.setattr(store, name, self._failing(getattr(store, name), at))

    def _failing(self, call: Callable[..., Any], at: int) -> Callable[..., Any]:
        def tried(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == at:
                raise StoreError("it does not answer")
            return call(*arguments, **options)

        return tried


@pytest.mark.parametrize("is_published", [False, True])
def test_whatever_fails_it_is_found_or_left_to_the_ordinary_way_and_never_paid_for_again(
    job: ValidatedJob, tmp_path: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, is_published: bool
) -> None:
    live = tmp_path / "live"
    if is_published:
        assert opened(live).reuse_in_place(job, AGAIN, LOG)
    shown = (live / "hero.png").read_bytes() if is_published else None
    at, failed = 0, 0
    while True:
        at += 1
        pipeline = opened(live)
        assert pipeline.publisher is not None
        with monkeypatch.context() as patched:
            stores = [pipeline.archiving.archive.store, pipeline.publisher.publishing.store]
            failing = Failing(stores, at, patched)
            try:
                found = pipeline.reuse_in_place(job, AGAIN, LOG)
            except SegmindError:
                found = None
                failed += 1
        if failing.calls < at:
            break
        ordinary = opened(live).produce(job, AGAIN, LOG)
        assert found in (None, ordinary)
        assert ordinary.published == str(live / "hero.png")
        shown = shown or (live / "hero.png").read_bytes()
        assert (live / "hero.png").read_bytes() == shown
    assert failed
    assert sandbox.ledger.billed == 1
    assert record_of(job.fingerprint).state == "done"


def test_what_is_gone_is_told_by_the_ordinary_way(job: ValidatedJob, sandbox: Sandbox) -> None:
    found = opened().reuse_in_place(job, AGAIN, LOG)
    assert found is not None
    Path(found.image).unlink()
    assert opened().reuse_in_place(job, AGAIN, LOG) is None
    with pytest.raises(SegmindError, match="is gone from the archive, though it was paid for"):
        opened().produce(job, AGAIN, LOG)
    assert sandbox.ledger.billed == 1


def test_a_copy_is_in_place_under_its_own_name(job: ValidatedJob, photo: Path) -> None:
    copied = walk(photo, name="copy")
    copy, _ = up_to_upload(photo, name="copy")
    found = opened().reuse_in_place(copy, AGAIN, LOG)
    assert found is not None
    assert (found.image, found.sidecar) == (copied.image, copied.sidecar)
