"""The deployments: no key that Prefect drops, the same in code, and what an event says reaches the flow."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import (
    ConcurrencyLimitSpec,
    DeploymentConfig,
    PrefectYamlModel,
    RawScheduleConfig,
    WorkPoolConfig,
)
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ParameterTypeError
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_API_AUTH_STRING,
    PREFECT_UI_ENABLED,
    Settings,
    temporary_settings,
)
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.schema_tools.hydration import HydrationContext, hydrate
from prefect.utilities.templating import find_placeholders
from pydantic import BaseModel

from prefect_segmind import flows
from prefect_segmind.errors import InvalidJobError
from prefect_segmind.jobs.job import parse_job
from prefect_segmind.manifest.loading import load_manifest
from prefect_segmind.manifest.templates import render
from tests.support.patient import PatientTransport

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deployments"
DOCS = (ROOT / "docs" / "schedules-and-events.md").read_text(encoding="utf-8")
NAMES = [
    "image-to-image/on-demand",
    "image-to-image/on-asset-changed",
    "refresh-assets/scheduled",
    "refresh-assets/sharded",
    "process-inbox/every-15-minutes",
    "explore-variations/on-demand",
    "reconcile/nightly",
]


def read_file() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "prefect.yaml").read_text(encoding="utf-8"))


def load_serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deployments_serve", FOLDER / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    """The flow at an entrypoint, which is the package's own."""
    path, _, name = deployment["entrypoint"].partition(":")
    flow: Flow[..., Any] = getattr(flows, name)
    assert Path(inspect.getfile(flow.fn)).resolve() == ROOT / path
    return flow


FILE = read_file()
BY_NAME = {f"{flow_of(each).name}/{each['name']}": each for each in FILE["deployments"]}
SERVE = load_serve()
SERVED: dict[str, RunnerDeployment] = {f"{each.flow_name}/{each.name}": each for each in SERVE.deployments()}


def mistakes(file: dict[str, Any]) -> Iterator[str]:
    """Keys that Prefect drops without a word, and what it takes but nobody means."""
    # `sla` works on Prefect's own cloud only, `schedule` is an old spelling.
    yield from unknown("the file", file, PrefectYamlModel, more={"prefect-version", "definitions"})
    for deployment in file["deployments"]:
        where = deployment["name"]
        yield from unknown(where, deployment, DeploymentConfig, less={"schedule", "sla"})
        yield from unknown(f"{where}: work_pool", deployment["work_pool"], WorkPoolConfig)
        if isinstance(limit := deployment.get("concurrency_limit", 1), dict):
            yield from unknown(f"{where}: concurrency_limit", limit, ConcurrencyLimitSpec)
        for trigger in deployment.get("triggers", []):
            yield from unknown(f"{where}: trigger", trigger, DeploymentEventTrigger, less={"id"})
        for schedule in deployment.get("schedules", []):
            yield from unknown(f"{where}: schedule", schedule, RawScheduleConfig)
            yield from (f"{where}: schedule without {key}" for key in ("slug", "timezone") if not schedule.get(key))
            if "active" in schedule:
                yield f"{where}: schedule: active would wake what somebody has paused"
        slugs = [each.get("slug") for each in deployment.get("schedules", [])]
        if len(set(slugs)) < len(slugs):
            yield f"{where}: two schedules of one slug"


def unknown(
    where: str,
    found: dict[str, Any],
    model: type[BaseModel],
    *,
    more: frozenset[str] | set[str] = frozenset(),
    less: frozenset[str] | set[str] = frozenset(),
) -> Iterator[str]:
    yield from (f"{where}: {key}" for key in found.keys() - (model.model_fields.keys() - less | more))


def arrive(payload: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the run that Prefect's server makes for an event with such a payload."""
    from prefect.server.events.actions import RunDeployment  # the server takes seconds to import: only where it is used

    trigger = DeploymentEventTrigger.model_validate(BY_NAME["image-to-image/on-asset-changed"]["triggers"][0])
    trigger.set_deployment_id(uuid4())
    parameters: Any = deepcopy(trigger.as_automation().actions[0].parameters)  # type: ignore[union-attr]
    RunDeployment._upgrade_v1_templates(parameters)
    context = HydrationContext(
        raise_on_error=True, render_jinja=True, jinja_context={"event": {"payload": json.loads(json.dumps(payload))}}
    )
    return hydrate(parameters, context)


def test_the_file_deploys_what_was_promised_and_holds_only_keys_that_prefect_reads() -> None:
    assert list(BY_NAME) == NAMES
    assert list(mistakes(FILE)) == []


@pytest.mark.parametrize(
    ("number", "path", "value"),
    [
        (0, ("enforce_parameters_schema",), False),
        (0, ("work_pool", "job_variable"), {}),
        (1, ("triggers", 0, "expects"), ["x"]),
        (2, ("schedules", 0, "crons"), "* * * * *"),
        (2, ("schedules", 0, "slug"), ""),
        (2, ("schedules", 0, "slug"), "autumn-campaign"),
        (2, ("schedules", 1, "timezone"), None),
        (2, ("schedules", 1, "active"), True),
        (4, ("concurrency_limit", "collision"), "ENQUEUE"),
    ],
)
def test_the_check_of_the_file_is_strict(number: int, path: tuple[Any, ...], value: Any) -> None:
    file = deepcopy(FILE)
    place = file["deployments"][number]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert len(list(mistakes(file))) == 1


def test_the_code_makes_the_same_deployments() -> None:
    def fields(deployment: dict[str, Any]) -> dict[str, Any]:
        limit = deployment.get("concurrency_limit") or {}
        return {
            "description": deployment["description"],
            "tags": deployment["tags"],
            "parameters": deployment["parameters"],
            "enforce_parameter_schema": deployment.get("enforce_parameter_schema", True),
            "limit": (limit.get("limit"), limit.get("collision_strategy")),
            "triggers": [shown(DeploymentEventTrigger.model_validate(each)) for each in deployment.get("triggers", [])],
            "schedules": [
                (each["slug"], each["cron"], each["timezone"], each.get("parameters", {}))
                for each in deployment.get("schedules", [])
            ],
        }

    def fields_in_code(deployment: RunnerDeployment) -> dict[str, Any]:
        strategy = deployment.concurrency_options and deployment.concurrency_options.collision_strategy.value
        return {
            "description": deployment.description,
            "tags": deployment.tags,
            "parameters": deployment.parameters,
            "enforce_parameter_schema": deployment.enforce_parameter_schema,
            "limit": (deployment.concurrency_limit, strategy),
            "triggers": [shown(each) for each in deployment.triggers],
            "schedules": [
                (each.slug, each.schedule.cron, each.schedule.timezone, each.parameters)  # type: ignore[union-attr]
                for each in deployment.schedules or []
            ],
        }

    def shown(trigger: Any) -> dict[str, Any]:
        return trigger.model_dump(mode="json", exclude={"id"})

    assert list(SERVED) == NAMES
    assert {name: fields_in_code(each) for name, each in SERVED.items()} == {
        name: fields(each) for name, each in BY_NAME.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_flows_and_their_templates_survive_the_deployment(name: str) -> None:
    deployment = BY_NAME[name]
    flow = flow_of(deployment)
    for schedule in deployment.get("schedules", []):
        merged = deployment["parameters"] | schedule.get("parameters", {})
        assert find_placeholders(merged) == set(), "Prefect would take it out"
        flow.validate_parameters(merged)
    assert deployment["parameters"].keys() <= inspect.signature(flow.fn).parameters.keys()


def test_an_event_that_says_only_what_is_needed_gets_the_flows_own_defaults() -> None:
    needed = {"image": "a.jpg", "prompt": "a red mug", "name": "mug"}
    signature = inspect.signature(flows.image_to_image.fn).parameters
    arrived = arrive(needed)
    assert arrived == needed | {name: signature[name].default for name in arrived.keys() - needed.keys()}
    assert signature.keys() - arrived.keys() == set(SERVE.OURS)
    flows.image_to_image.validate_parameters(arrived)


def test_what_an_event_says_arrives_as_it_was_sent() -> None:
    sent = {
        "image": "00123",
        "prompt": "say \"hi\" & 'ho' <b>\n{{ stem }} {% x %} {# y #} ü 猫 \\n",
        "name": "true",
        "image_weight": 70,
        "style_type": "ANIME",
        "resolution": "AUTO",
        "seed": 4711,
        "magic_prompt_option": "OFF",
        "negative_prompt": "1234",
        "allow_extreme_ratio": True,
    }
    assert json.dumps(arrive(sent), sort_keys=True) == json.dumps(sent, sort_keys=True)
    assert arrive(sent | {"seed": "random"})["seed"] == "random"
    assert "archive" not in arrive(sent | {"archive": "s3://elsewhere"})


@pytest.mark.parametrize("missing", ["image", "prompt", "name"])
@pytest.mark.parametrize("how", ["left out", "null", "empty"])
def test_what_an_event_does_not_say_though_it_is_needed_is_named(missing: str, how: str) -> None:
    payload: dict[str, Any] = {"image": "a.jpg", "prompt": "a red mug", "name": "mug"}
    del payload[missing]
    if how != "left out":
        payload[missing] = None if how == "null" else ""
    with pytest.raises(ParameterTypeError, match=f"- {missing}: Input should be a valid string"):
        flows.image_to_image.validate_parameters(arrive(payload))


def test_what_an_event_says_wrongly_is_named() -> None:
    needed = {"image": "a.jpg", "prompt": "a red mug", "name": "mug"}
    with pytest.raises(ParameterTypeError, match="- image_weight: Input should be a valid integer"):
        flows.image_to_image.validate_parameters(arrive(needed | {"image_weight": "heavy"}))
    arrived = arrive(needed | {"style_type": "realistic"})
    flows.image_to_image.validate_parameters(arrived)  # the job's own check, which knows a better word
    with pytest.raises(InvalidJobError, match=r"style_type: 'realistic' is not allowed.*Did you mean REALISTIC"):
        parse_job(arrived)


@pytest.mark.parametrize("slug", ["nightly", "autumn-campaign"])
def test_the_sample_manifest_has_no_mistakes(slug: str) -> None:
    deployment = BY_NAME["refresh-assets/scheduled"]
    schedule = next(each for each in deployment["schedules"] if each["slug"] == slug)
    parameters = deployment["parameters"] | schedule["parameters"]
    season = parameters["variables"]["season"]

    def s3() -> Any:
        raise AssertionError("nothing is read from S3")

    with load_manifest(
        str(ROOT / parameters["manifest"]), parameters["variables"], defaults=parameters.get("defaults"), s3=s3
    ) as manifest:
        jobs = list(manifest.jobs)
    assert manifest.warnings == ()
    assert [job.name for job in jobs] == [f"{season}/{product}" for product in ("mug", "candle", "bowl")]
    assert all(season in job.prompt for job in jobs)
    assert {job.style_type.value for job in jobs} == {parameters.get("defaults", {}).get("style_type", "GENERAL")}
    photos = {Path(job.image) for job in jobs}
    assert photos == set((FOLDER / "photos").iterdir())
    assert sum(path.stat().st_size for path in photos) < 120_000


def test_the_inbox_is_there_and_its_prompt_names_the_file() -> None:
    parameters = BY_NAME["process-inbox/every-15-minutes"]["parameters"]
    assert (ROOT / parameters["inbox"]).is_dir()
    assert render(parameters["prompt"], {"stem": "cup"}).startswith("cup on a picnic blanket")


def test_the_schedules_are_of_different_season_style_and_budget_and_come_when_they_are_said_to() -> None:
    deployment = BY_NAME["refresh-assets/scheduled"]
    nightly, monday = (deployment["parameters"] | each["parameters"] for each in deployment["schedules"])
    for name in ("variables", "defaults", "budget_usd"):
        assert nightly.get(name) != monday.get(name), name
    assert [each["cron"] for each in deployment["schedules"]] == ["30 3 * * *", "0 6 * * 1"]
    (visits,) = BY_NAME["process-inbox/every-15-minutes"]["schedules"]
    assert visits["cron"] == "*/15 * * * *"


def test_the_blocks_of_the_docs_are_yaml_and_their_entrypoint_is_a_flow() -> None:
    blocks = [yaml.safe_load(each) for each in re.findall(r"```yaml\n(.*?)```", DOCS, re.S)]
    (deployment,) = next(each for each in blocks if isinstance(each, list))
    assert load_flow_from_entrypoint(deployment["entrypoint"]).name == flows.image_to_image.name
    assert deployment["pull"] == [], "there is no clone to pull"
    assert list(unknown("docs", deployment, DeploymentConfig)) == []


@pytest.fixture
def api(prefect_server: None) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=str(PREFECT_API_URL.value()), timeout=60, transport=PatientTransport()) as client:
        yield client


def test_a_webhook_is_told_which_part_of_an_event_is_missing(api: httpx.Client) -> None:
    text = re.search(r"-d '(\[\{.*?\}\])'", DOCS, re.S)
    assert text
    (event,) = json.loads(text[1])
    event["event"] = "marketing.asset.changed.in.a.test"  # which no deployment waits for
    assert api.post("/events", json=[event]).status_code == 204
    for key in ("id", "occurred", "event", "resource"):
        answer = api.post("/events", json=[{name: value for name, value in event.items() if name != key}])
        assert (answer.status_code, key in answer.text) == (422, True), key


def test_a_key_gives_the_same_run_whatever_the_parameters_and_the_deployment(api: httpx.Client) -> None:
    ids = [
        flows.image_to_image.to_deployment(name, entrypoint_type=EntrypointType.MODULE_PATH).apply()  # type: ignore[union-attr]
        for name in ("one-of-two", "two-of-two")
    ]

    def start(number: int, **body: Any) -> httpx.Response:
        return api.post(f"/deployments/{ids[number]}/create_flow_run", json=body)

    job, key = {"image": "a.jpg", "prompt": "a mug"}, {"idempotency_key": "cms-4711-revision-3"}
    first = start(0, parameters=job, **key)
    again = [start(0, parameters=job | {"prompt": "a hat"}, **key), start(1, parameters=job, **key)]
    assert [each.status_code for each in (first, *again)] == [201, 200, 200]
    assert {each.json()["id"] for each in again} == {first.json()["id"]}
    for wrong, named in ((job | {"style_type": "realistic"}, "realistic"), ({"image": "a.jpg"}, "prompt")):
        refused = start(0, parameters=wrong)
        assert (refused.status_code, named in refused.text) == (409, True)
    unnoticed = start(0, parameters=job | {"promt": "a hat"})
    assert unnoticed.status_code == 201
    for run in (first, unnoticed):
        api.delete(f"/flow_runs/{run.json()['id']}").raise_for_status()
    for each in ids:
        api.delete(f"/deployments/{each}").raise_for_status()


@pytest.mark.slow
def test_deploying_again_changes_what_the_file_says_and_wakes_deployments_but_no_schedule(
    api: httpx.Client, tmp_path: Path
) -> None:
    pool = f"again-{uuid4()}"
    api.post("/work_pools/", json={"name": pool, "type": "process"}).raise_for_status()
    (tmp_path / "again.py").write_text("from prefect import flow\n\n@flow\ndef again(): ...\n")

    def deploy(*schedules: dict[str, str]) -> dict[str, Any]:
        entry = {
            "name": pool,
            "entrypoint": "again.py:again",
            "work_pool": {"name": pool},
            "schedules": list(schedules),
        }
        (tmp_path / "prefect.yaml").write_text(yaml.safe_dump({"deployments": [entry]}))
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(api.get(f"/deployments/name/again/{pool}").raise_for_status().json())

    def schedules(deployment: dict[str, Any]) -> dict[str, tuple[str, bool]]:
        return {each["slug"]: (each["schedule"]["cron"], each["active"]) for each in deployment["schedules"]}

    deployment = deploy({"slug": "kept", "cron": "0 3 1 1 *"}, {"slug": "old", "cron": "0 4 1 1 *"})
    url = f"/deployments/{deployment['id']}"
    (kept,) = (each["id"] for each in deployment["schedules"] if each["slug"] == "kept")
    api.patch(f"{url}/schedules/{kept}", json={"active": False}).raise_for_status()
    api.patch(url, json={"paused": True}).raise_for_status()
    assert api.get(url).json()["paused"] is True
    deployment = deploy({"slug": "kept", "cron": "0 5 1 1 *"}, {"slug": "new", "cron": "0 6 1 1 *"})
    assert deployment["paused"] is False
    assert schedules(deployment) == {
        "kept": ("0 5 1 1 *", False),
        "old": ("0 4 1 1 *", True),  # it is not in the file any more, and goes on
        "new": ("0 6 1 1 *", True),
    }
    deployment = deploy({"slug": "newer", "cron": "0 7 1 1 *", "replaces": "new"})
    assert schedules(deployment).keys() == {"kept", "old", "newer"}
    for each in (url, f"/work_pools/{pool}"):
        api.delete(each).raise_for_status()


def test_a_template_is_written_so_that_deploying_does_not_take_it_for_a_placeholder() -> None:
    spared, bare = re.findall(r"In `parameters` write (.+), never a bare `(.+?)`", " ".join(DOCS.split()))[0]
    assert len(templates := re.findall(r"`(.+?)`", spared)) == 2
    assert [find_placeholders(each) for each in templates] == [set(), set()]
    assert [each.name for each in find_placeholders(bare)] == ["stem"]


def test_what_the_docs_say_of_prefects_settings_is_so() -> None:
    assert "every 10 seconds (`PREFECT_WORKER_QUERY_SECONDS`)" in " ".join(DOCS.split())
    assert "free after five minutes" in DOCS
    settings = Settings()
    assert settings.worker.query_seconds == 10
    assert settings.server.concurrency.initial_deployment_lease_duration == 300


def test_a_server_with_a_password_lets_nobody_in_without_it(tmp_path: Path) -> None:
    from prefect.server.api.server import create_app

    with temporary_settings(
        {PREFECT_SERVER_API_AUTH_STRING: "user:password", PREFECT_HOME: tmp_path, PREFECT_UI_ENABLED: False}
    ):
        server = httpx.ASGITransport(create_app(ephemeral=True, ignore_cache=True))

    async def status(auth: tuple[str, str] | None) -> int:
        async with httpx.AsyncClient(transport=server, base_url="http://server") as client:
            return (await client.get("/api/admin/version", auth=auth)).status_code

    assert [asyncio.run(status(auth)) for auth in (None, ("user", "wrong"), ("user", "password"))] == [401, 401, 200]
