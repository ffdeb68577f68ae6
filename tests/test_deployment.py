"""The deployment, as a team would start it: a real server, a work pool, a worker, and a run from the API."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from prefect_segmind.sandbox import Answer, Sandbox

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PREFECT = str(Path(sys.executable).with_name("prefect"))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a clone has of the deployment: the file and the flows at their place."""
    folder = tmp_path / "clone"
    for name in ("deployments", "flows"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def environment(sandbox: Sandbox, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Prefect server of its own, and the environment in which everything talks to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")}
    kept |= {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_SERVER_API_PORT": str(port)}
    server = subprocess.Popen(
        [PREFECT, "server", "start"], env=kept, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(240):
            try:
                httpx.get(f"{api}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield {**kept, "PREFECT_API_URL": api}
    finally:
        server.terminate()
        server.wait(30)


def test_on_demand_is_deployed_and_run_by_a_worker(
    sandbox: Sandbox, photo: Path, clone: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    def prefect(*arguments: str) -> str:
        done = subprocess.run(
            [PREFECT, *arguments], cwd=clone, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    prefect("--no-prompt", "work-pool", "create", "local-process", "--type", "process")
    prefect("--no-prompt", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    sandbox.play(Answer(status=429, reset_in=1))
    with (tmp_path / "worker.log").open("w") as log:
        worker = subprocess.Popen(
            [PREFECT, "worker", "start", "--pool", "local-process"], cwd=clone, env=environment, stdout=log, stderr=log
        )
    try:
        api = environment["PREFECT_API_URL"]
        deployment = httpx.get(f"{api}/deployments/name/image-to-image/on-demand").json()
        parameters = {"image": str(photo), "prompt": "a red mug", "style_type": "DESIGN"}
        url = f"{api}/deployments/{deployment['id']}/create_flow_run"
        run = httpx.post(url, json={"parameters": parameters, "state": {"type": "SCHEDULED"}}).raise_for_status().json()
        for _ in range(240):
            state = httpx.get(f"{api}/flow_runs/{run['id']}").json()["state"]
            if state["type"] in ("COMPLETED", "FAILED", "CRASHED"):
                break
            time.sleep(0.5)
        assert state["type"] == "COMPLETED", (state, (tmp_path / "worker.log").read_text())
    finally:
        worker.terminate()
        worker.wait(60)
    assert [each.status for each in sandbox.ledger.requests] == [429, 200]
    assert sandbox.ledger.billed == 1
    bucket = sandbox.folder / "s3" / os.environ["PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE"].removeprefix("s3://")
    sidecar = json.loads(next((bucket / "mug").glob("*.json")).read_text())
    assert sidecar["flow_run_id"] == run["id"]
    assert sidecar["request"]["style_type"] == "DESIGN"
    refused = httpx.post(url, json={"parameters": {**parameters, "style_type": "realistic"}})
    assert refused.status_code == 409, "a value that the form does not offer is refused before a run is made"
