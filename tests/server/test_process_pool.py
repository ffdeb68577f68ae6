"""Whoever has a cluster maps over `produce_asset`: jobs, results and errors cross processes, pictures are paid once."""

from __future__ import annotations

import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.task_runners import ProcessPoolTaskRunner

from prefect_segmind import ArchivedImage, BatchError, BatchResult, produce_asset, refresh_assets
from prefect_segmind.errors import ApiError, SegmindError, SourceImageError
from prefect_segmind.sandbox import Answer, Sandbox
from tests.support.manifests import mugs, write_campaign

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.many]


def over_processes(jobs: list[dict[str, Any]]) -> list[Any]:
    """The result of each job, or the error that it ended with, of a flow that maps over two processes."""

    @flow(task_runner=ProcessPoolTaskRunner(max_workers=2))  # type: ignore[arg-type]
    def mapped() -> list[Any]:
        futures = produce_asset.map(jobs)
        futures.wait()
        return [each.result(raise_on_failure=False) for each in futures]

    return list(mapped())


def test_pictures_are_paid_for_once_over_all_processes(sandbox: Sandbox, photo: Path, conditions: str) -> None:
    prompts = ["a red mug", "a blue mug", "a green mug"]
    jobs = [{"image": str(photo), "prompt": each, "name": f"{copy}/{each[2:]}"} for each in prompts for copy in "abc"]
    made = over_processes(jobs)
    assert all(isinstance(each, ArchivedImage) for each in made), made
    assert [each.name for each in made] == [job["name"] for job in jobs]
    assert sum(each.cost_usd for each in made) == Decimal("0.15")
    assert sandbox.ledger.billed == len({each.image for each in made if each.status == "generated"}) == 3


def test_errors_come_back_as_they_were_raised(sandbox: Sandbox, photo: Path, conditions: str) -> None:
    broken = photo.with_name("broken.jpg")
    broken.write_bytes(b"no picture")
    sandbox.play(Answer(status=400))
    job = {"image": str(photo), "prompt": "a red mug"}
    refused, unusable = over_processes([{**job, "name": "refused"}, {**job, "image": str(broken), "name": "broken"}])
    assert isinstance(refused, ApiError)
    assert (refused.status, refused.stage, refused.requests_sent) == (400, "generate", 1)
    assert isinstance(unusable, SourceImageError)
    assert unusable.stage == "validate"


def test_the_result_of_a_batch_and_its_error_can_be_pickled(sandbox: Sandbox, photo: Path, conditions: str) -> None:
    manifest = write_campaign(photo, mugs(photo, 2, "a mug, number {}"))
    result = refresh_assets(manifest)
    assert isinstance(result, BatchResult)
    assert pickle.loads(pickle.dumps(result)) == result
    sandbox.play(Answer(status=400))
    with pytest.raises(BatchError) as failed:
        refresh_assets(write_campaign(photo, mugs(photo, 3, "a cup, number {}")))
    back = pickle.loads(pickle.dumps(failed.value))
    assert (str(back), back.result, type(back.stopped)) == (str(failed.value), failed.value.result, type(None))
    assert isinstance(back, SegmindError)


@pytest.fixture
def conditions(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An archive whose store honours conditional writes."""
    place = str(tmp_path / "archive")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", place)
    return place
