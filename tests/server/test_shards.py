"""Shards without a cluster: nothing is paid where they cannot be, or would wait for ever, and the error says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_segmind import refresh_assets
from prefect_segmind.cli.commands import run as command
from prefect_segmind.errors import ConfigurationError
from prefect_segmind.flows import sharded_run
from prefect_segmind.sandbox import Sandbox
from tests.support.manifests import mugs, write_campaign

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def campaign(sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(tmp_path / "archive"))
    yield write_campaign(photo, mugs(photo, 3, "a mug, number {}"))
    assert not sandbox.ledger.requests


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch, own_tag: str) -> Iterator[Any]:
    """Deploys the flow to a work pool without a worker, under names of this test's own."""
    pool, name = f"pool-{own_tag[5:13]}", f"sharded-{own_tag[5:13]}"
    monkeypatch.setattr(sharded_run, "SHARDED", f"refresh-assets/{name}")

    def deploy(**options: Any) -> str:
        with get_client(sync_client=True) as client:
            client.create_work_pool(WorkPoolCreate(name=pool, type="process", **options))
            flow_id = client.create_flow(refresh_assets)
            client.create_deployment(flow_id, name, work_pool_name=pool)
        return pool

    yield deploy
    with get_client(sync_client=True) as client:
        client.delete_work_pool(pool)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"shards": 0}, "shards: 0 is not allowed; allowed is 1 to 64"),
        ({"shards": 65}, "shards: 65 is not allowed; allowed is 1 to 64"),
        ({"shards": 20}, "max_concurrency: 16 requests at once are not enough for 20 shards"),
    ],
)
def test_a_wrong_number_of_shards_is_refused(campaign: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        refresh_assets(campaign, **parameters)


def test_without_a_deployment_a_command_says_how_to_make_one(
    campaign: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sharded_run, "SHARDED", "refresh-assets/nobody-has-deployed-this")
    assert command(["refresh", campaign, "--shards", "2"]) == 2
    told = capsys.readouterr().err
    assert "shards: there is no deployment refresh-assets/nobody-has-deployed-this" in told
    assert "prefect deploy --all --prefect-file deployments/prefect.yaml" in told


def test_a_plan_needs_no_other_machines(campaign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_run, "SHARDED", "refresh-assets/nobody-has-deployed-this")
    assert refresh_assets(campaign, shards=2, dry_run=True).generated == 3


def test_without_a_worker_nothing_is_begun(campaign: str, deployed: Any) -> None:
    pool = deployed()
    with pytest.raises(
        ConfigurationError, match=f"shards: the work pool {pool} has no worker that is alive; start one"
    ):
        refresh_assets(campaign, shards=2)


def test_a_pool_that_is_paused_is_told(campaign: str, deployed: Any) -> None:
    pool = deployed(is_paused=True)
    with pytest.raises(ConfigurationError, match=f"shards: the work pool {pool} is paused; resume it"):
        refresh_assets(campaign, shards=2)


def test_a_store_without_conditional_writes_is_refused(sandbox: Sandbox, photo: Path) -> None:
    manifest = write_campaign(photo, mugs(photo, 3, "a mug, number {}"))
    with pytest.raises(ConfigurationError, match=r"shards: the archive s3://.* ignores conditional writes"):
        refresh_assets(manifest, shards=2)
    assert not sandbox.ledger.requests


def test_without_a_server_there_are_no_other_machines(campaign: str) -> None:
    from prefect_segmind.services import Services

    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ConfigurationError, match=r"shards: .* set PREFECT_API_URL"),
    ):
        sharded_run.ShardedRun(2, Services(), 16)
