"""The automations of `deployments/automations`, as a team would create them: by the CLI, on a real server."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.patient import PatientTransport
from tests.support.waiting import until

FOLDER = Path(__file__).parents[2] / "deployments" / "automations"
FILES = sorted(FOLDER.glob("*.yaml"))
PREFECT = str(Path(sys.executable).with_name("prefect"))
PLACEHOLDER = "REPLACE-WITH-THE-ID-OF-A-NOTIFICATION-BLOCK"
FLOWS = """
from prefect import flow
from prefect.events import emit_event
from prefect.flow_runs import suspend_flow_run


@flow(name="image-to-image")
def image_to_image() -> None:
    raise ValueError("no such picture")


@flow(name="process-inbox")
def process_inbox() -> None:
    emit_event("prefect-segmind.credits.exhausted", {"prefect.resource.id": "prefect-segmind.account"})


@flow(name="refresh-assets")
def refresh_assets() -> None: ...


@flow(name="explore-variations")
def explore_variations() -> None:
    suspend_flow_run(wait_for_input=str, timeout=3600, key="approve-1")
"""
DEPLOYMENTS = """
name: automations
deployments:
  - {name: failing, tags: [segmind], entrypoint: "flows.py:image_to_image", work_pool: {name: pool}}
  - {name: untagged, entrypoint: "flows.py:image_to_image", work_pool: {name: pool}}
  - {name: inbox, tags: [segmind], entrypoint: "flows.py:process_inbox", work_pool: {name: pool},
     schedules: [{interval: 3600, slug: hourly}]}
  - {name: bystander, tags: [segmind], entrypoint: "flows.py:process_inbox", work_pool: {name: pool}}
  - {name: nightly, tags: [segmind], entrypoint: "flows.py:refresh_assets", work_pool: {name: pool}}
  - {name: asking, tags: [segmind], entrypoint: "flows.py:explore_variations", work_pool: {name: pool}}
  - {name: asking-untagged, entrypoint: "flows.py:explore_variations", work_pool: {name: pool}}
"""


def test_there_are_four() -> None:
    assert [file.name for file in FILES] == [
        "alert-when-stale.yaml",
        "notify-on-failure.yaml",
        "notify-when-asked.yaml",
        "pause-when-credits-run-out.yaml",
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_key_is_known_to_prefect(file: Path) -> None:
    """Prefect ignores what it does not know, so a misspelt key would vanish silently."""
    from prefect.events.schemas.automations import AutomationCore

    block = "0c2816cb-a0ff-42fe-8c32-92514940c20b"
    written = yaml.safe_load(file.read_text().replace(PLACEHOLDER, block))
    read = AutomationCore.model_validate(written)
    assert written.keys() <= read.model_fields_set
    assert written["trigger"].keys() <= type(read.trigger).model_fields.keys()
    assert len(written["actions"]) == len(read.actions)
    for each, action in zip(written["actions"], read.actions, strict=True):
        assert action.type == each["type"]
        assert each.keys() <= type(action).model_fields.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_events_are_those_that_the_plugin_emits(file: Path) -> None:
    from prefect_segmind.reporting import events

    own = {value for name, value in vars(events).items() if name.isupper() and isinstance(value, str)}
    named = re.findall(r"prefect-segmind\.[a-z]+\.[a-z]+", file.read_text())
    assert set(named) <= own


def test_a_forgotten_block_is_refused() -> None:
    from prefect.events.schemas.automations import AutomationCore

    for file in FILES:
        written = yaml.safe_load(file.read_text())
        if any("block_document_id" in action for action in written["actions"]):
            assert file.read_text().count(PLACEHOLDER) == 2, "once in the comment, once in the action"
            with pytest.raises(ValueError, match="block_document_id"):
                AutomationCore.model_validate(written)


class Hook:
    """A local place that notifications are posted to."""

    def __init__(self) -> None:
        self.posted: list[dict[str, str]] = []
        posted = self.posted

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                posted.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def about(self, text: str) -> list[dict[str, str]]:
        return [each for each in self.posted if text in each["subject"] + each["body"]]


@pytest.fixture(scope="module")
def hook() -> Iterator[Hook]:
    hook = Hook()
    thread = threading.Thread(target=hook.server.serve_forever)
    thread.start()
    yield hook
    hook.server.shutdown()
    hook.server.server_close()
    thread.join()


class Server:
    """The Prefect server, what is deployed there, and a shell."""

    def __init__(self, folder: Path, api: httpx.Client) -> None:
        self.folder, self.api = folder, api

    def prefect(self, *arguments: str) -> str:
        done = subprocess.run([PREFECT, *arguments], cwd=self.folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def create(self, name: str, block: str = "", change: tuple[str, str] = ("", "")) -> None:
        """Creates the automation of the file, by the command that the file's comment names."""
        text = (FOLDER / f"{name}.yaml").read_text()
        assert change[0] in text
        file = self.folder / f"{name}.yaml"
        file.write_text(text.replace(PLACEHOLDER, block).replace(*change))
        self.prefect("automation", "create", "--from-file", str(file))

    def asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return self.api.request(method, path, json=body).raise_for_status().json()

    def deployment(self, name: str) -> dict[str, Any]:
        return dict(self.asked("GET", f"/deployments/name/{name}"))

    def run(self, name: str) -> str:
        return str(self.asked("POST", f"/deployments/{self.deployment(name)['id']}/create_flow_run", {})["id"])

    def finished(self, run: str) -> str | None:
        state = self.asked("GET", f"/flow_runs/{run}")["state"]
        return str(state["name"]) if state["type"] in ("COMPLETED", "FAILED", "CRASHED") else None


@pytest.fixture(scope="module")
def server(_prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("automations")
    (folder / "flows.py").write_text(FLOWS)
    (folder / "prefect.yaml").write_text(DEPLOYMENTS)
    with httpx.Client(base_url=os.environ["PREFECT_API_URL"], timeout=30, transport=PatientTransport()) as api:
        server = Server(folder, api)
        server.prefect("--no-prompt", "work-pool", "create", "pool", "--type", "process")
        server.prefect("--no-prompt", "deploy", "--all")
        with (folder / "worker.log").open("w") as log:
            worker = subprocess.Popen(
                [PREFECT, "worker", "start", "--pool", "pool"],
                cwd=folder,
                env={**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "1"},
                stdout=log,
                stderr=log,
            )
        try:
            yield server
        finally:
            worker.terminate()
            worker.wait(60)


@pytest.fixture(scope="module")
def block(server: Server, hook: Hook) -> str:
    """The id of a block that posts to the hook, made as the file's comment says."""
    code = (
        "from prefect.blocks.notifications import CustomWebhookNotificationBlock as Block;"
        f"Block(name='hook', url='{hook.url}', json_data={{'subject': '{{{{subject}}}}', 'body': '{{{{body}}}}'}})"
        ".save('segmind-alerts')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    said = server.prefect("block", "inspect", "custom-webhook/segmind-alerts")
    found = re.search(r"Block id\W+([0-9a-f-]{36})", said)
    assert found, said
    return found[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_they_do_what_they_say(server: Server, hook: Hook, block: str) -> None:
    a_failed_run_is_told(server, hook, block)
    a_run_that_waits_for_a_person_is_told(server, hook, block)
    a_deployment_is_paused_when_credits_run_out(server)
    a_stale_deployment_is_told(server, hook, block)


def a_failed_run_is_told(server: Server, hook: Hook, block: str) -> None:
    server.create("notify-on-failure", block)
    other = server.run("image-to-image/untagged")
    assert until(lambda: server.finished(other)) == "Failed"
    run = server.run("image-to-image/failing")
    assert until(lambda: server.finished(run)) == "Failed"
    assert until(lambda: hook.about(run))
    [message] = hook.about(run)
    name = server.asked("GET", f"/flow_runs/{run}")["name"]
    assert message["subject"] == f"image-to-image: {name} is Failed"
    assert "ValueError: no such picture" in message["body"]
    assert f"https://prefect.example.com/runs/flow-run/{run}" in message["body"]
    assert not hook.about(other)


def a_run_that_waits_for_a_person_is_told(server: Server, hook: Hook, block: str) -> None:
    def set_state(run: str, **state: str) -> None:
        server.asked("POST", f"/flow_runs/{run}/set_state", {"state": state, "force": True})

    server.create("notify-when-asked", block)
    run = server.run("explore-variations/asking")
    assert until(lambda: server.asked("GET", f"/flow_runs/{run}")["state"]["name"] == "Suspended")
    assert until(lambda: hook.about(run))
    [message] = hook.about(run)
    name = server.asked("GET", f"/flow_runs/{run}")["name"]
    assert message["subject"] == f"explore-variations: {name} waits for an answer"
    assert "Resume, on the run's page, shows what it would make" in message["body"]
    assert f"https://prefect.example.com/runs/flow-run/{run}" in message["body"]
    # As the server sees them: a run without a tag, and one without a deployment, which is paused where it is.
    other = server.run("explore-variations/asking-untagged")
    for state in ("PENDING", "RUNNING", "PAUSED"):
        set_state(other, type=state, name="Suspended" if state == "PAUSED" else state.capitalize())
    set_state(run, type="RUNNING")
    set_state(run, type="PAUSED")
    assert until(lambda: len(hook.about(run)) == 2)
    assert not hook.about(other)


def a_deployment_is_paused_when_credits_run_out(server: Server) -> None:
    def scheduled() -> bool:
        deployments = {"id": {"any_": [server.deployment("process-inbox/inbox")["id"]]}}
        found = {"deployments": deployments, "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
        return bool(server.asked("POST", "/flow_runs/filter", found))

    server.create("pause-when-credits-run-out")
    assert until(scheduled)
    assert not server.deployment("process-inbox/inbox")["paused"]
    run = server.run("process-inbox/inbox")
    assert until(lambda: server.finished(run)) == "Completed"
    assert until(lambda: server.deployment("process-inbox/inbox")["paused"])
    assert until(lambda: not scheduled()), "what its schedule had planned is gone"
    assert not server.deployment("process-inbox/bystander")["paused"]


def a_stale_deployment_is_told(server: Server, hook: Hook, block: str) -> None:
    def run(final: str) -> None:
        # A run as the server sees it, without the seconds that a worker takes.
        name = server.run("refresh-assets/nightly")
        for state in ("PENDING", "RUNNING", final):
            server.asked("POST", f"/flow_runs/{name}/set_state", {"state": {"type": state}, "force": True})

    server.create("alert-when-stale", block, ("within: 93600", "within: 12"))
    for _ in range(4):
        run("COMPLETED")
        last = time.monotonic()
        time.sleep(4)
    assert not hook.about("refresh-assets/nightly"), "a success now and then is enough"
    assert until(lambda: hook.about("refresh-assets/nightly"), 60)
    assert time.monotonic() - last >= 12
    assert [each["subject"] for each in hook.about("refresh-assets/nightly")] == [
        "refresh-assets/nightly: no success for 26 hours"
    ]
    # A run that fails starts the clock again, and does not stop it.
    run("FAILED")
    assert until(lambda: len(hook.about("refresh-assets/nightly")) == 2, 60)
