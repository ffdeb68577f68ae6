"""A batch on several machines: a server on PostgreSQL, a work pool and four workers, each on a machine of its own.

Whatever dies in the middle, each picture is paid for once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from prefect_segmind.archive.record import Record
from prefect_segmind.batch.shards import ShardKey
from prefect_segmind.sandbox import Sandbox, sample_photo
from tests.support.moto_server import moto_server
from tests.support.patient import PatientTransport
from tests.support.ports import free_port
from tests.support.postgres import postgres
from tests.support.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
POOL, WORKERS, SHARDS = "machines", 4, 4
PREFIX = "PREFECT_INTEGRATIONS_SEGMIND_"
BUCKET = "several-machines"
LIVE = ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "PAUSED")

MACHINE = """
import os, socket
if name := os.environ.get("TEST_MACHINE"):
    socket.gethostname = lambda: name
"""
"""What tells the machines apart, in each of their processes."""


class Cluster:
    """A Prefect server on PostgreSQL with a work pool, the workers of several machines, the API and an S3 server."""

    def __init__(self, folder: Path, sandbox: Sandbox, s3: str, database: str) -> None:
        self.folder, self.sandbox = folder, sandbox
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        self.s3 = boto3.session.Session(region_name="us-east-1").client(
            "s3", endpoint_url=s3, aws_access_key_id="test", aws_secret_access_key="test"
        )
        self.s3.create_bucket(Bucket=BUCKET)
        self.s3.put_object(Bucket=BUCKET, Key="photos/mug.jpg", Body=sample_photo((300, 200)))
        port = free_port()
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(MACHINE)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "SEGMIND_"))},
            **sandbox.environment(),
            "AWS_ENDPOINT_URL_S3": s3,
            f"{PREFIX}UPLOAD_TO": f"s3://{BUCKET}/uploads",
            f"{PREFIX}GRACE_SECONDS": "15",
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_API_REQUEST_TIMEOUT": "240",
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PYTHONPATH": str(folder / "site"),
        }
        self.api = httpx.Client(base_url=self.environment["PREFECT_API_URL"], timeout=60, transport=PatientTransport())
        own = {
            "PREFECT_API_DATABASE_CONNECTION_URL": database,
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_SERVER_UI_ENABLED": "false",
        }
        self.start("server", ["-m", "prefect", "server", "start"], own)
        until(self.is_healthy, 240, every=0.5, why=lambda: self.log("server"))
        self.prefect("work-pool", "create", POOL, "--type", "process")
        file = ROOT / "deployments" / "prefect.yaml"
        self.prefect("deploy", "--name", "refresh-assets/sharded", "--pool", POOL, "--prefect-file", str(file))

    def start(self, name: str, arguments: list[str], more: dict[str, str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.started[name] = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=self.environment | more,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.started[name]

    def start_worker(self, name: str) -> None:
        place = self.folder / name
        place.mkdir(exist_ok=True)
        own = {"TEST_MACHINE": name, f"{PREFIX}OUTBOX": str(place / "outbox"), "PREFECT_HOME": str(place / "home")}
        command = ["-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", name]
        self.start(name, command, own)

    def prefect(self, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.log("server")

    def is_healthy(self) -> bool:
        try:
            return self.api.get("/health").is_success
        except httpx.HTTPError:
            return False

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-6_000:]

    def told(self, name: str) -> dict[str, Any]:
        """What a command with `--json` has printed."""
        lines = (self.folder / f"{name}.log").read_text().splitlines()
        return dict(json.loads(next(each for each in lines if each.startswith("{"))))

    def logs(self) -> str:
        return "\n".join(f"== {name}\n{self.log(name)}" for name in self.started)

    def close(self) -> None:
        for each in reversed(list(self.started.values())):
            with suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGTERM)
        for each in self.started.values():
            try:
                each.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(each.pid, signal.SIGKILL)
                each.wait()

    # --- what a campaign of its own has -------------------------------------------------------------------------------

    def campaign(self, name: str, count: int) -> tuple[str, str]:
        """The addresses of a manifest and an archive."""
        rows = (f"{name}/{n:03},s3://{BUCKET}/photos/mug.jpg,a red mug in {name} number {n}\n" for n in range(count))
        self.s3.put_object(Bucket=BUCKET, Key=f"{name}.csv", Body=("name,image,prompt\n" + "".join(rows)).encode())
        return f"s3://{BUCKET}/{name}.csv", f"s3://{BUCKET}/{name}"

    def billed(self, name: str) -> int:
        """How many requests for its pictures were billed."""
        return sum(each.cost > 0 for each in self.sandbox.ledger.requests if f" in {name} " in str(each.prompt))

    def asked(self, name: str) -> int:
        """For how many of its pictures a request was sent."""
        return len({each.prompt for each in self.sandbox.ledger.requests if f" in {name} " in str(each.prompt)})

    def keys(self, prefix: str) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [each["Key"] for page in pages for each in page.get("Contents", [])]

    def records(self, name: str) -> list[Record]:
        keys = [key for key in self.keys(f"{name}/.segmind/") if key.count("/") == 2]
        bodies = (self.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys)
        return [Record.model_validate_json(each) for each in bodies if b'"fingerprint"' in each]

    # --- runs ---------------------------------------------------------------------------------------------------------

    def run(self, manifest: str, archive: str, **parameters: Any) -> str:
        """Has the deployment run, and gives the id of its flow run."""
        deployment = self.api.get("/deployments/name/refresh-assets/sharded").raise_for_status().json()["id"]
        body = {"parameters": {"manifest": manifest, "archive": archive, "shards": SHARDS, **parameters}}
        body |= {"state": {"type": "SCHEDULED"}}
        made = self.api.post(f"/deployments/{deployment}/create_flow_run", json=body)
        return str(made.raise_for_status().json()["id"])

    def started_shards(self) -> list[ShardKey]:
        """The keys of all runs of shards, the last one first."""
        body = {"limit": 200, "sort": "EXPECTED_START_TIME_DESC"}
        found = self.api.post("/flow_runs/filter", json=body).raise_for_status().json()
        return [key for each in found if (key := ShardKey.parse(each["idempotency_key"]))]

    def flow_run(self, run: str) -> dict[str, Any]:
        return dict(self.api.get(f"/flow_runs/{run}").raise_for_status().json())

    def set_state(self, run: str, **state: Any) -> None:
        self.api.post(f"/flow_runs/{run}/set_state", json={"state": state, "force": True}).raise_for_status()

    def shards(self, run: str) -> list[dict[str, Any]]:
        body = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "limit": 200}
        found = self.api.post("/flow_runs/filter", json=body).raise_for_status().json()
        return [each for each in found if ShardKey.parse(each["idempotency_key"])]

    def wait_for(self, run: str, *types: str, seconds: float = 400) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            found = self.flow_run(run)
            return found if found["state_type"] in types else {}

        return until(look, seconds, every=1, why=self.logs)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox(folder / "sandbox", latency=1.0, credits="1000.00", sketch=True))
        s3 = stack.enter_context(moto_server())
        database = stack.enter_context(postgres())
        cluster = Cluster(folder, sandbox, s3, database)
        stack.callback(cluster.close)
        for number in range(WORKERS):
            cluster.start_worker(f"worker-{number}")
        yield cluster


def test_a_worker_that_is_killed_in_the_middle_costs_no_picture_twice(cluster: Cluster) -> None:
    count = 48
    manifest, archive = cluster.campaign("killed", count)
    command = ["-m", "prefect_segmind", "refresh", manifest, "--archive", archive, "--shards", str(SHARDS), "--json"]
    command += ["--max-concurrency", "4"]
    until(lambda: "started" in cluster.log("worker-0"), 120, why=cluster.logs)
    terminal = cluster.start("terminal", command, {})
    until(lambda: cluster.asked("killed") >= 6, 300, every=0.05, why=cluster.logs)
    parent = cluster.started_shards()[0].run
    running = [each for each in cluster.shards(parent) if each["state_type"] == "RUNNING"]
    victim = running[0]
    (worker,) = [
        name for name in cluster.started if _has_child(cluster.started[name].pid, victim["infrastructure_pid"])
    ]
    os.kill(cluster.started[worker].pid, signal.SIGKILL)
    os.kill(int(victim["infrastructure_pid"]), signal.SIGKILL)
    assert terminal.wait(500) == 0, cluster.logs()
    result = cluster.told("terminal")
    assert (result["total"], result["generated"], result["failed"]) == (count, count, 0), result
    assert cluster.billed("killed") == count
    assert Decimal(result["cost_usd"]) == Decimal("0.05") * count
    assert Decimal(result["possibly_billed_usd"]) == 0
    assert len(result["shards"]) == SHARDS + 1
    assert all(each.state == "done" for each in cluster.records("killed"))
    cluster.start_worker(worker)


def test_a_run_that_is_cancelled_cancels_its_shards_which_end_in_order(cluster: Cluster) -> None:
    manifest, archive = cluster.campaign("cancelled", 200)
    run = cluster.run(manifest, archive, max_concurrency=8)
    until(lambda: cluster.asked("cancelled") >= 12, 300, every=0.2, why=cluster.logs)
    cluster.set_state(run, type="CANCELLING")
    ended = cluster.wait_for(run, "CANCELLED")
    until(lambda: all(each["state_type"] not in LIVE for each in cluster.shards(run)), 120, why=cluster.logs)
    assert {each["state_type"] for each in cluster.shards(run)} == {"CANCELLED"}
    assert cluster.billed("cancelled") == cluster.asked("cancelled") < 200
    done = [each for each in cluster.records("cancelled") if each.state == "done"]
    assert len(done) == cluster.billed("cancelled"), ended


def test_a_run_that_dies_and_is_run_again_waits_for_the_shards_that_it_has_started(cluster: Cluster) -> None:
    count = 80
    manifest, archive = cluster.campaign("again", count)
    run = cluster.run(manifest, archive, max_concurrency=4)
    until(lambda: cluster.asked("again") >= 4, 300, every=0.1, why=cluster.logs)
    os.kill(int(cluster.flow_run(run)["infrastructure_pid"]), signal.SIGKILL)
    cluster.wait_for(run, "CRASHED")
    before = {each["id"] for each in cluster.shards(run)}
    cluster.set_state(run, type="SCHEDULED", name="AwaitingRetry")
    ended = cluster.wait_for(run, "COMPLETED", "FAILED")
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    assert {each["id"] for each in cluster.shards(run)} == before
    assert cluster.billed("again") == count
    assert all(each.state == "done" for each in cluster.records("again"))


def test_all_shards_draw_from_one_budget(cluster: Cluster) -> None:
    manifest, archive = cluster.campaign("budget", 40)
    run = cluster.run(manifest, archive, max_concurrency=8, budget_usd="0.75", requests_per_minute=600)
    ended = cluster.wait_for(run, "FAILED", "COMPLETED")
    assert ended["state_type"] == "FAILED"
    assert "not started; paid 0.75 USD" in ended["state"]["message"], ended["state"]["message"]
    assert cluster.billed("budget") == 15
    account = cluster.s3.get_object(Bucket=BUCKET, Key=f"budget/.segmind/budgets/run-{run}.json")
    assert b"shares" in account["Body"].read()


def test_ctrl_c_in_the_terminal_ends_the_shards_in_order(cluster: Cluster) -> None:
    manifest, archive = cluster.campaign("interrupted", 200)
    command = ["-m", "prefect_segmind", "refresh", manifest, "--archive", archive, "--shards", str(SHARDS), "--json"]
    terminal = cluster.start("interrupted", command, {})
    until(lambda: cluster.asked("interrupted") >= 12, 300, every=0.2, why=cluster.logs)
    terminal.send_signal(signal.SIGINT)
    assert terminal.wait(120) == 130, cluster.log("interrupted")
    result = cluster.told("interrupted")
    billed = cluster.billed("interrupted")
    assert 12 <= result["generated"] == billed < 200, result
    assert Decimal(result["cost_usd"]) == Decimal("0.05") * billed
    assert result["not_started"] == 200 - billed
    assert {each["state_type"] for each in cluster.shards(cluster.started_shards()[0].run)} <= {
        "CANCELLING",
        "CANCELLED",
    }


def test_a_shard_that_crashes_three_times_is_given_up_and_what_it_has_paid_is_told(cluster: Cluster) -> None:
    count = 60
    manifest, archive = cluster.campaign("crashing", count)
    command = ["-m", "prefect_segmind", "refresh", manifest, "--archive", archive, "--shards", "2", "--json"]
    terminal = cluster.start("crashing", [*command, "--max-concurrency", "2"], {})
    killed = set[str]()

    def kill() -> bool:
        asked, runs = cluster.asked("crashing"), cluster.shards(cluster.started_shards()[0].run)
        for each in runs if asked else ():
            is_first = each["idempotency_key"].split(":")[1] == "1"
            if is_first and each["state_type"] == "RUNNING" and each["id"] not in killed:
                until(lambda: cluster.asked("crashing") > asked + 1, 60)
                os.kill(int(each["infrastructure_pid"]), signal.SIGKILL)
                killed.add(each["id"])
        return len(killed) == 3

    until(kill, 400, every=0.5, why=cluster.logs)
    assert terminal.wait(300) == 1, cluster.log("crashing")
    result = cluster.told("crashing")
    assert result["generated"] + result["failed"] == count
    assert result["generated"] == sum(each.state == "done" for each in cluster.records("crashing"))
    assert all("shard 1 of 2 did not come to it: its run has died" in each["error"] for each in result["failures"])
    told = Decimal(result["cost_usd"]) + Decimal(result["possibly_billed_usd"])
    assert told == Decimal("0.05") * cluster.billed("crashing")
    assert Decimal(result["possibly_billed_usd"]) <= Decimal("0.05") * 3  # in flight at each kill
    assert result["failed_manifest"]


def _has_child(parent: int, child: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1] == str(parent)
    return False
