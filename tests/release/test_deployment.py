"""The deployments as a team starts them: the README's five commands in a fresh clone, then all that starts a run.

A real server, a real worker in an environment of its own, and the sandbox for the API and S3.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx
import pytest

from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from tests.support import environment, waiting
from tests.support.patient import PatientTransport
from tests.support.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(840)]
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "schedules-and-events.md").read_text(encoding="utf-8")
HEADING = "## A schedule in three terminals"
T = TypeVar("T")


def block(start: str, kind: str) -> str:
    """The first fenced block of a kind in the page on schedules and events below some text."""
    found = re.search(rf"```{kind}\n(.*?)```", PAGE.partition(start)[2], re.S)
    assert found, start
    return found[1]


def terminals() -> list[list[str]]:
    """What is pasted into each of the README's terminals, a command each."""
    below = README.partition(HEADING)[2].partition("\n## ")[0]
    pasted = re.findall(r"^\*\*Terminal (\d)\*\*.*\n\n```bash\n((?:.+\n)+?)```", below, re.M)
    assert [number for number, _ in pasted] == ["1", "2", "3"]
    return [commands.splitlines() for _, commands in pasted]


def test_there_are_five_commands_in_three_terminals_and_the_file_says_the_same() -> None:
    assert [len(commands) for commands in terminals()] == [3, 1, 1]
    head = (ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8").partition("\nname:")[0]
    assert re.findall(r"^# {3}(prefect .*)$", head, re.M) == [
        command for commands in terminals() for command in commands if command.startswith("prefect ")
    ]


def test_no_server_is_started_in_the_background() -> None:
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("deployments/**/*.yaml")):
        for line in re.findall(r"^#? *prefect .*server start.*$", path.read_text(encoding="utf-8"), re.M):
            assert "--background" not in line


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a clone has: all that git knows or would take."""
    folder = tmp_path / "clone"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, folder / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


class Team:
    """Somebody who has a shell in the clone, and a browser on the server's API."""

    def __init__(self, clone: Path, environment: dict[str, str], port: int) -> None:
        self.clone, self.environment, self.port = clone, environment, port
        self.api = httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=60, transport=PatientTransport())
        self.staying: list[subprocess.Popen[bytes]] = []

    def shell(self, command: str) -> str:
        done = subprocess.run(
            command, shell=True, cwd=self.clone, env=self.environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}{self.log}"
        return done.stdout

    def stay(self, command: str) -> None:
        """Starts a command that stays, in a terminal: a question there would be asked, and nobody answers it."""
        import pty  # POSIX only

        here, terminal = pty.openpty()
        process = subprocess.Popen(
            command.split(),
            cwd=self.clone,
            env=self.environment,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        self.staying.append(process)
        threading.Thread(target=self._write_down, args=(here, f"{len(self.staying)}.log"), daemon=True).start()

    def _write_down(self, terminal: int, name: str) -> None:
        with (self.clone.parent / name).open("wb", buffering=0) as log, suppress(OSError):  # at the end of the process
            while shown := os.read(terminal, 65536):
                log.write(shown)
        os.close(terminal)

    def close(self) -> None:
        """Ctrl-C in each terminal, the last one first."""
        for process in reversed(self.staying):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def log(self) -> str:
        """What the terminals show."""
        paths = sorted(self.clone.parent.glob("*.log"))
        return "\n".join(path.read_text(errors="replace")[-20_000:] for path in paths)

    def until(self, look: Callable[[], T | None]) -> T:
        def reached() -> T | None:
            with suppress(httpx.TransportError):
                return look()
            return None

        found = waiting.until(reached, 240, every=0.25, why=lambda: self.log)
        assert found is not None
        return found

    def deployment(self, name: str) -> str:
        return str(self.api.get(f"/deployments/name/{name}").raise_for_status().json()["id"])

    def start(self, name: str, **parameters: Any) -> str:
        url = f"/deployments/{self.deployment(name)}/create_flow_run"
        return str(self.api.post(url, json={"parameters": parameters}).raise_for_status().json()["id"])

    def runs(self, name: str) -> list[dict[str, Any]]:
        """The runs of a deployment that are not only planned for later, oldest first."""
        wanted = {"deployments": {"id": {"any_": [self.deployment(name)]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found = self.api.post("/flow_runs/filter", json=wanted).raise_for_status().json()
        return [each for each in found if each["state"]["name"] != "Scheduled"]

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.api.get(f"/flow_runs/{run}").raise_for_status().json()["state"])

    def ended(self, run: str) -> dict[str, Any]:
        """The final state of a run."""

        def look() -> dict[str, Any] | None:
            state = self.state(run)
            return state if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

        return self.until(look)

    def accepts(self, run: str, answer: dict[str, Any]) -> bool:
        """Answers the question of a run; whether the server takes it."""
        found = self.api.post(f"/flow_runs/{run}/resume", json={"run_input": answer}).json()
        return bool(found["status"] == "ACCEPT")

    def paused(self, run: str) -> None:
        self.until(lambda: self.state(run)["type"] == "PAUSED" or None)

    def completed(self, run: str) -> None:
        state = self.ended(run)
        assert state["type"] == "COMPLETED", f"{state}\n{self.log}"


@pytest.fixture
def team(sandbox: Sandbox, clone: Path, tmp_path: Path) -> Iterator[Team]:
    """A shell in a new virtual environment and a new home, with the variables of the README's first picture."""
    port = free_port()
    home = environment.copied(environment.installed(), tmp_path / "venv")  # for all that the package declares
    subprocess.run([home / "bin" / "pip", "uninstall", "--quiet", "--yes", "prefect-segmind"], check=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_API", "PYTHON", "COV_"))}
    variables = kept | {
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(home),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_API_PORT": str(port),
        # Only so that the test does not wait as long as people may.
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
    }
    found = Team(clone, variables, port)
    try:
        yield found
    finally:
        found.close()


def test_a_fresh_clone_runs_by_itself_after_five_commands(sandbox: Sandbox, team: Team) -> None:
    (install, config, server), (worker,), (deploy,) = [
        [command.replace("4200", str(team.port)) for command in commands] for commands in terminals()
    ]
    team.shell(install)
    team.shell(config)
    team.stay(server)
    team.until(lambda: team.api.get("/health").is_success or None)
    team.stay(worker)
    team.until(lambda: team.api.get("/work_pools/local-process").is_success or None)
    # Nobody waits here until half past three at night.
    file = team.clone / "deployments" / "prefect.yaml"
    assert '"30 3 * * *"' in file.read_text()
    file.write_text(file.read_text().replace('"30 3 * * *"', '"* * * * *"'))
    team.shell(deploy)

    an_event_makes_the_picture_that_it_asks_for(sandbox, team)
    the_schedule_runs_with_its_own_parameters(sandbox, team)
    the_same_event_makes_no_other_picture(sandbox, team)
    what_is_wrong_with_an_event_is_a_failed_run_that_names_it(team)
    an_inbox_is_visited_one_visit_at_a_time(sandbox, team)
    a_run_waits_for_an_answer_and_does_what_it_says(sandbox, team)
    run_deployment_runs_once_for_each_key(team)
    a_value_that_the_form_does_not_offer_is_refused(team)
    every_picture_is_in_the_archive_and_billed_once(sandbox)
    a_deployment_is_paused_when_the_credits_run_out(sandbox, team)


def send(team: Team, **payload: Any) -> str:
    """Sends the event of the docs, as it stands but for another payload; returns its id."""
    command = block("<!-- webhook: a test sends this -->", "bash")
    command = command.replace("4200", str(team.port))
    event_id = str(uuid4())
    if payload:
        command = re.sub(r'"payload": \{.*?\}', lambda _: f'"payload": {json.dumps(payload)}', command, flags=re.S)
        command = re.sub(r'"id": "[0-9a-f-]{36}"', f'"id": "{event_id}"', command)
    command = command.replace("s3://my-bucket", "s3://segmind")
    team.shell(command.rstrip() + " --fail --silent --show-error --retry 9")
    return event_id


def an_event_makes_the_picture_that_it_asks_for(sandbox: Sandbox, team: Team) -> None:
    photo = team.clone / "deployments" / "photos" / "mug.jpg"
    Services().s3.put_object(Bucket="segmind", Key="photos/mug.jpg", Body=photo.read_bytes())
    sandbox.play(Answer(status=429, reset_in=1), prompt="in the snow")
    send(team)
    (run,) = team.until(lambda: team.runs("image-to-image/on-asset-changed") or None)
    team.completed(run["id"])
    assert (run["parameters"]["seed"], run["parameters"]["style_type"]) == (4711, "GENERAL")
    made = [each for each in sandbox.ledger.requests if each.prompt == "a red mug in the snow"]
    assert [each.status for each in made] == [429, 200]
    assert made[-1].seed == 4711


def the_same_event_makes_no_other_picture(sandbox: Sandbox, team: Team) -> None:
    send(team)  # with the same id: no other run
    payload = json.loads(re.findall(r'"payload": (\{.*?\})', block("<!-- webhook", "bash"), re.S)[0])
    send(team, **payload)  # with another id: a run that finds the picture
    before = len(sandbox.ledger.requests)
    runs = team.until(lambda: found if len(found := team.runs("image-to-image/on-asset-changed")) == 2 else None)
    team.completed(runs[-1]["id"])
    assert len(team.runs("image-to-image/on-asset-changed")) == 2
    assert len(sandbox.ledger.requests) == before


def what_is_wrong_with_an_event_is_a_failed_run_that_names_it(team: Team) -> None:
    good = {"name": "shop/bad", "image": "s3://segmind/photos/mug.jpg", "prompt": "a mug"}
    wrong = {
        "image_weight": {**good, "image_weight": "heavy"},
        "name": {"image": "s3://segmind/photos/mug.jpg", "prompt": "a mug"},
        "image": {**good, "image": "deployments/photos/mug.jpg"},
    }
    known = {each["id"] for each in team.runs("image-to-image/on-asset-changed")}
    for payload in wrong.values():
        send(team, **payload)

    def new() -> list[dict[str, Any]] | None:
        found = [each for each in team.runs("image-to-image/on-asset-changed") if each["id"] not in known]
        return found if len(found) == len(wrong) else None

    runs = team.until(new)
    messages = [team.ended(each["id"]) for each in runs]
    assert {each["type"] for each in messages} == {"FAILED"}
    for field in wrong:
        assert any(f"{field}:" in each["message"] for each in messages), (field, messages)


def an_inbox_is_visited_one_visit_at_a_time(sandbox: Sandbox, team: Team) -> None:
    shutil.copy(team.clone / "deployments" / "photos" / "candle.jpg", team.clone / "deployments" / "inbox")
    first, second = (team.start("process-inbox/every-15-minutes") for _ in range(2))
    waiting = "AwaitingConcurrencySlot"
    team.until(lambda: waiting in {team.state(each)["name"] for each in (first, second)} or None)
    team.completed(first)
    team.completed(second)
    prompts = [each.prompt for each in sandbox.ledger.requests]
    assert prompts.count("candle on a picnic blanket, soft morning light") == 1


def a_run_waits_for_an_answer_and_does_what_it_says(sandbox: Sandbox, team: Team) -> None:
    shutil.copy(team.clone / "deployments" / "photos" / "bowl.jpg", team.clone / "deployments" / "inbox")
    batch = team.start("refresh-assets/scheduled", variables={"season": "winter"}, approve_above_usd=0.05)
    visit = team.start("process-inbox/every-15-minutes", approve_above_usd=0)
    answers: dict[str, dict[str, Any]] = {batch: {"answer": "trim", "up_to_usd": 0.10}, visit: {"answer": "go on"}}
    for run in answers:
        team.paused(run)
        assert not [
            each for each in sandbox.ledger.requests if each.prompt and re.search("winter|bowl on", each.prompt)
        ]
        assert team.state(run)["name"] == "Suspended", "it keeps no place of the worker, nor of its deployment"
    for run, answer in answers.items():
        # Prefect stores the form after the state, and takes no answer until it is there.
        waiting.until(partial(team.accepts, run, answer))
    for run in answers:
        team.completed(run)
    prompts = [each.prompt or "" for each in sandbox.ledger.requests]
    assert len([each for each in prompts if "winter" in each]) == 2
    assert len([each for each in prompts if "bowl on a picnic blanket" in each]) == 1


def run_deployment_runs_once_for_each_key(team: Team) -> None:
    code = block("<!-- run_deployment: a test runs this -->", "python") + "print(run.id)\n"
    (team.clone / "order.py").write_text(code)
    first, second = (team.shell(f"{Path(sys.executable).name} order.py").split()[-1] for _ in range(2))
    assert first == second
    team.completed(first)


def a_value_that_the_form_does_not_offer_is_refused(team: Team) -> None:
    url = f"/deployments/{team.deployment('image-to-image/on-demand')}/create_flow_run"
    parameters = {"image": "deployments/photos/mug.jpg", "prompt": "a mug", "style_type": "realistic"}
    assert team.api.post(url, json={"parameters": parameters}).status_code == 409


def the_schedule_runs_with_its_own_parameters(sandbox: Sandbox, team: Team) -> None:
    def scheduled() -> str | None:
        runs = [each for each in team.runs("refresh-assets/scheduled") if each["auto_scheduled"]]
        return next((each["id"] for each in runs if each["state"]["type"] == "COMPLETED"), None)

    run = team.api.get(f"/flow_runs/{team.until(scheduled)}").json()
    assert run["parameters"]["variables"] == {"season": "summer"}
    assert run["parameters"]["manifest"] == "deployments/campaign.yaml"
    assert len([each for each in sandbox.ledger.requests if each.prompt and "summer" in each.prompt]) == 3
    url = f"/deployments/{team.deployment('refresh-assets/scheduled')}/schedules"
    for each in team.api.get(url).raise_for_status().json():  # it has shown that it runs; once a minute is for the test
        team.api.patch(f"{url}/{each['id']}", json={"active": False}).raise_for_status()


def every_picture_is_in_the_archive_and_billed_once(sandbox: Sandbox) -> None:
    archive = Services().archive
    names = {key.rpartition("/")[0] for key in archive.store.keys("") if key.endswith((".jpg", ".png", ".webp"))}
    pictures = {
        "shop/mug",
        "shop/blue",
        "inbox/candle",
        "inbox/bowl",
        *(f"summer/{each}" for each in ("mug", "candle", "bowl")),
    }
    assert pictures <= names
    assert len({each for each in names if each.startswith("winter/")}) == 2
    assert len(names) == sandbox.ledger.billed == 9


def a_deployment_is_paused_when_the_credits_run_out(sandbox: Sandbox, team: Team) -> None:
    team.shell(block("## Automations", "bash"))
    sandbox.play(Answer(status=406, body='{"error": "Insufficient credits: balance 0.01, need 0.05"}'))
    parameters = {"image": "deployments/photos/bowl.jpg", "prompt": "a bowl"}
    assert team.ended(team.start("image-to-image/on-demand", **parameters))["type"] == "FAILED"
    team.until(lambda: team.api.get("/deployments/name/image-to-image/on-demand").json()["paused"] or None)
    assert not team.api.get("/deployments/name/refresh-assets/scheduled").json()["paused"]


def test_without_a_work_pool_one_process_serves_the_same(
    sandbox: Sandbox, clone: Path, prefect_server: None, tmp_path: Path
) -> None:
    api = os.environ["PREFECT_API_URL"]
    variables = {**os.environ, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "deployments/serve.py"], cwd=clone, env=variables, stdout=log, stderr=subprocess.STDOUT
        )
    team = Team(clone, variables, int(api.rpartition(":")[2].partition("/")[0]))
    try:
        team.until(lambda: team.api.get("/deployments/name/explore-variations/on-demand").is_success or None)
        grid = {"image": "deployments/photos/mug.jpg", "prompt": "a mug", "styles": ["ANIME", "DESIGN"]}
        run = team.start("explore-variations/on-demand", **grid, weights=[50])
        assert team.ended(run)["type"] == "COMPLETED", (tmp_path / "serve.log").read_text()
    finally:
        server.send_signal(signal.SIGINT)  # Ctrl-C
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:  # Prefect's runner may hang where a run's process ends at the same moment
            server.kill()
            server.wait()
    assert sandbox.ledger.billed == 2
    keys = set(Services().archive.store.keys("mug/"))
    assert [each for each in keys if "contact-sheet" in each]
