"""What runs on a real Prefect server do with pictures that earlier runs, or other machines, have in their outbox."""

from __future__ import annotations

import json
import os
import socket
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from prefect_segmind import BatchError, BatchResult, image_to_image, refresh_assets
from prefect_segmind.archive.record import Run
from prefect_segmind.cli.commands import run as command
from prefect_segmind.errors import KeptElsewhereError
from prefect_segmind.pipeline.archive import Archiving
from prefect_segmind.pipeline.left_over import LeftOver, archive_left_over
from prefect_segmind.pipeline.pay import GeneratedImage
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services
from prefect_segmind.tasks.produce_asset import produce_asset
from tests.support.manifests import mugs, write_campaign
from tests.support.walk import left

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.many]


def campaign(photo: Path, count: int = 2) -> str:
    return write_campaign(photo, mugs(photo, count, "a red mug", name="mug/{:03}", first_seed=1000))


def run(manifest: str, **parameters: Any) -> BatchResult:
    try:
        return refresh_assets(manifest, **parameters)
    except BatchError as error:
        return error.result


def is_archived(generated: GeneratedImage) -> bool:
    archive = Services().archive
    return archive.content(archive.store.uri(f"{generated.job.place}.jpg")) is not None


def test_a_run_archives_what_earlier_runs_have_left_in_the_outbox_and_says_so(
    sandbox: Sandbox, photo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = left(photo, name="hero/first", seed=200)
    run(campaign(photo), dry_run=True)
    assert not is_archived(first), "a dry run does nothing"
    result = run(campaign(photo))
    assert (result.total, result.generated, result.cost_usd) == (2, 2, Decimal("0.10"))
    second = left(photo, name="hero/second", seed=300)
    assert image_to_image(str(photo), "a blue mug").status == "generated"
    for name, each in {"hero/first": first, "hero/second": second}.items():
        assert is_archived(each)
        assert f"archived 1 picture that earlier runs had left in the outbox: {name}" in caplog.text
    assert sandbox.ledger.billed == 5


def test_an_outbox_that_cannot_be_emptied_fails_no_run(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a mistake of the program")

    monkeypatch.setattr("prefect_segmind.tasks.left_over.archive_left_over", broken)
    assert run(campaign(photo)).generated == 2
    assert "could not be archived: a mistake of the program" in caplog.text


def test_a_picture_that_another_machine_keeps_fails_its_asset_alone_and_is_paid_for_again_on_demand(
    sandbox: Sandbox,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs, host = left(photo, name="mug/000", seed=1000, prompt="a red mug"), socket.gethostname()
    Path(os.environ["PREFECT_INTEGRATIONS_SEGMIND_OUTBOX"]).rename(tmp_path / "out of reach")
    monkeypatch.setattr(socket, "gethostname", lambda: "another-machine")
    planned = run(campaign(photo), dry_run=True)
    assert (planned.plan.kept, planned.plan.generate, planned.planned_usd) == (1, 1, Decimal("0.05"))
    result = run(campaign(photo))
    assert (result.generated, result.failed, result.cost_usd, sandbox.ledger.billed) == (1, 1, Decimal("0.05"), 2)
    (failure,) = result.failures
    assert (failure.name, failure.stage) == ("mug/000", "generate")
    assert f"its picture is in {theirs.path} on {host}, out of reach" in failure.error
    with pytest.raises(KeptElsewhereError):
        image_to_image(str(photo), "a red mug", name="one", seed=1000)
    capsys.readouterr()
    assert command(["refresh", campaign(photo), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failures"][0]["error"] == failure.error
    assert command(["refresh", campaign(photo), "--on-kept", "repay", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["generated"], again["reused"], again["cost_usd"], sandbox.ledger.billed) == (1, 1, "0.05", 3)


def test_a_flow_run_looks_once_for_what_is_left_over_however_many_tasks_it_has(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def look(archiving: Archiving, run: Run, flow_run_id: str | None = None) -> LeftOver:
        looks.append(archiving.archive.url)
        return archive_left_over(archiving, run, flow_run_id)

    monkeypatch.setattr("prefect_segmind.tasks.left_over.archive_left_over", look)

    @flow
    def mapped() -> None:
        jobs = [
            {"image": str(photo), "prompt": "a red mug", "name": f"mug/{seed}", "seed": seed}
            for seed in (101, 102, 103)
        ]
        produce_asset.map(jobs).result()

    mapped()
    assert (len(looks), sandbox.ledger.billed) == (1, 3)
    mapped()
    assert len(looks) == 2
