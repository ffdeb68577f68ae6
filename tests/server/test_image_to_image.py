"""The flow and its tasks on a real Prefect server: what its API and its database tell afterwards."""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
from base64 import b64encode
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
from prefect import Flow, flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_HOME
from prefect.utilities.callables import parameter_schema
from pydantic import SecretStr

from prefect_segmind import (
    ArchivedImage,
    Job,
    archive_image,
    explore_variations,
    generate_image,
    image_to_image,
    publish_image,
    upload_image,
    validate_job,
)
from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.resolutions import Resolution
from prefect_segmind.errors import BadGatewayError, InvalidJobError, InvalidKeyError, RateLimitError
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from tests.support import prefect_server, waiting
from tests.support.server_events import all_events

pytestmark = pytest.mark.usefixtures("prefect_server")

T = TypeVar("T")


def until(look: Callable[[SyncPrefectClient], T | None]) -> T:
    """What the server's API tells, as soon as it does: it records task runs, logs and events a moment later."""
    with get_client(sync_client=True) as client:
        found = waiting.until(lambda: look(client))
    assert found is not None
    return found


def task_runs(flow_run_id: UUID, names: set[str]) -> dict[str, TaskRun]:
    def look(client: SyncPrefectClient) -> dict[str, TaskRun] | None:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
        ended = {each.name: each for each in runs if each.state and each.state.is_final()}
        return ended if names <= ended.keys() else None

    return until(look)


def states(run: TaskRun, final: str = "Completed") -> list[State[Any]]:
    def look(client: SyncPrefectClient) -> list[State[Any]] | None:
        answer = client.request("GET", "/task_run_states/", params={"task_run_id": str(run.id)})
        told = sorted((State.model_validate(each) for each in answer.json()), key=lambda each: each.timestamp)
        return told if told and told[-1].name == final else None

    return until(look)


def flow_run_id(state: State[Any]) -> UUID:
    assert state.state_details.flow_run_id is not None
    return state.state_details.flow_run_id


def run(photo: Path, **parameters: Any) -> State[ArchivedImage]:
    return image_to_image(image=str(photo), prompt="a red mug", return_state=True, **parameters)


def test_a_rate_limit_and_a_gateway_error_are_waited_for_by_prefect_in_front_of_everybody(
    sandbox: Sandbox, photo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox.play(Answer(status=429, reset_in=3), Answer(status=502))
    state = run(photo)
    archived = state.result()
    assert (archived.status, archived.attempts, archived.cost_usd) == ("generated", 3, Decimal("0.05"))
    runs = task_runs(flow_run_id(state), {"validate mug", "upload mug", "generate mug", "archive mug"})
    told = states(runs["generate mug"])
    assert [each.name for each in told] == [
        *("Pending", "Running", "AwaitingRetry", "Retrying", "AwaitingRetry", "Retrying", "Completed")
    ]
    limited = sandbox.ledger.requests[0].time
    scheduled = told[2].state_details.scheduled_time
    assert scheduled is not None
    assert scheduled >= limited + timedelta(seconds=3), "never before the reset that the server named"
    assert told[3].timestamp >= scheduled
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert any("request 1 of mug failed: the API answered 429" in each for each in warnings)
    assert any("request 2 of mug failed and may have been billed: the API answered 502" in each for each in warnings)
    assert sandbox.ledger.billed == 1


def test_each_failed_request_is_an_event_that_says_what_happened(sandbox: Sandbox, photo: Path, own_tag: str) -> None:
    sandbox.play(Answer(status=429, reset_in=0.2, headers={"x-request-id": "abc"}), Answer(status=504))
    archived = run(photo, seed=777).result()
    first, second = sorted(all_events(own_tag, "prefect-segmind.attempt.failed"), key=lambda each: each["occurred"])
    assert {each["resource"]["prefect.resource.id"] for each in (first, second)} == {
        f"prefect-segmind.job.{archived.fingerprint}"
    }
    assert {key: first["payload"][key] for key in ("name", "attempt", "status", "possibly_billed", "request_id")} == {
        **{"name": "mug", "attempt": 1, "status": 429, "possibly_billed": False, "request_id": "abc"}
    }
    assert (second["payload"]["status"], second["payload"]["possibly_billed"]) == (504, True)
    assert second["payload"]["wait_seconds"] >= 2


def test_the_same_run_again_and_under_another_name_pays_nothing(sandbox: Sandbox, photo: Path) -> None:
    first, again, renamed = run(photo).result(), run(photo).result(), run(photo, name="summer/hero").result()
    assert [each.status for each in (first, again, renamed)] == ["generated", "reused", "reused"]
    assert again.image == first.image
    assert "/summer/hero/" in renamed.image
    assert sandbox.ledger.billed == 1


def test_whatever_happens_between_a_picture_is_billed_once(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive is down after the answer, then up again; then the same run once more, and under another name."""
    with monkeypatch.context() as down:
        answered = SegmindClient.generate

        def then_s3_is_down(*arguments: Any) -> Any:
            picture = answered(*arguments)
            down.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
            return picture

        down.setattr(SegmindClient, "generate", then_s3_is_down)
        failed = run(photo)
    assert failed.is_failed()
    assert "safe in the outbox" in str(failed.message)
    results = [run(photo).result(), run(photo).result(), run(photo, name="summer/hero").result()]
    assert [each.status for each in results] == ["recovered", "reused", "reused"]
    assert [each.cost_usd for each in results] == [Decimal("0.00")] * 3
    assert sandbox.ledger.billed == 1


def test_what_does_not_pass_by_itself_is_not_retried(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(Answer(status=500), Answer())
    state = run(photo)
    assert state.is_failed()
    assert state.message is not None
    assert "the API answered 500" in state.message
    generate = task_runs(flow_run_id(state), {"generate mug"})["generate mug"]
    assert [each.name for each in states(generate, "Failed")] == ["Pending", "Running", "Failed"]
    assert len(sandbox.ledger.requests) == 1


def test_a_task_with_fewer_retries_gives_up_earlier(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(*[Answer(status=429)] * 3)

    @flow
    def impatient() -> None:
        job = validate_job(Job(image=str(photo), prompt="a red mug"))
        generate_image.with_options(retries=1)(job, upload_image(job))

    with pytest.raises(RateLimitError) as error:
        impatient()
    assert len(sandbox.ledger.requests) == 2
    assert error.value.decision
    assert error.value.decision.reason == "gave up after 1 retry"


def test_two_gateway_errors_end_the_run_and_say_what_may_have_been_paid(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(Answer(status=502), Answer(status=504), Answer())
    with pytest.raises(BadGatewayError.__mro__[1]) as error:
        run(photo).result()
    assert (error.value.requests_sent, error.value.possibly_billed_usd) == (2, Decimal("0.10"))  # type: ignore[attr-defined]


def asked_by_automation(flow: Flow[..., Any], parameters: dict[str, Any]) -> FlowRun:
    """A run of a flow as Prefect's automations ask for one."""
    name = b64encode(b"segmind - asset changed").decode()
    headers = {"Prefect-Automation-ID": str(uuid4()), "Prefect-Automation-Name": name}
    with get_client(sync_client=True) as client:
        body = {
            "flow_id": str(client.create_flow(flow)),
            "parameters": parameters,
            "state": {"type": "PENDING"},
        }
        answer = client.request("POST", "/flow_runs/", json=body, headers=headers)
        return client.read_flow_run(UUID(answer.json()["id"]))


@pytest.mark.parametrize(
    ("begun_by", "image", "allowed"),
    [
        ("an event", "{photo}", None),
        ("an event", " s3:/segmind/mug.jpg", None),
        ("an event", "http://127.0.0.1/mug.jpg", None),
        ("an event", "s3://segmind/none.jpg", "http://,https://"),
        ("an event", "{photo}", "any"),
        ("an event", "S3://segmind/none.jpg", None),
        ("a person", "{photo}", None),
    ],
)
def test_only_an_event_is_bound_to_the_sources_for_events(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, begun_by: str, image: str, allowed: str | None
) -> None:
    refused = begun_by == "an event" and allowed != "any" and not image.startswith("S3:")
    if allowed:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_EVENT_SOURCES", allowed)
    parameters = {"image": image.format(photo=photo), "prompt": "a red mug", "name": "mug"}
    made = asked_by_automation(image_to_image, parameters) if begun_by == "an event" else None
    state: Any = run_flow(image_to_image, flow_run=made, parameters=parameters, return_type="state")
    message = f"is not allowed in an event; its image begins with {'http://' if allowed else 's3://'} or https://"
    assert (message in str(state.message)) is refused
    assert not (refused and sandbox.ledger.requests)


def test_variations_are_bound_to_the_sources_for_events_too(sandbox: Sandbox, photo: Path) -> None:
    parameters = {"image": str(photo), "prompt": "a red mug"}
    made = asked_by_automation(explore_variations, parameters)
    state: Any = run_flow(explore_variations, flow_run=made, parameters=parameters, return_type="state")
    assert "is not allowed in an event" in str(state.message)
    assert not sandbox.ledger.requests


def test_all_mistakes_of_a_job_are_told_at_once_and_nothing_is_uploaded(sandbox: Sandbox, photo: Path) -> None:
    state = run(photo, style_type="realistic", resolution="RESOLUTION_800_1280", image_weight=0)
    with pytest.raises(InvalidJobError) as error:
        state.result()
    for line in ("Did you mean REALISTIC?", "Did you mean RESOLUTION_768_1280?", "Did you mean 1?"):
        assert line in str(error.value)
    assert sandbox.ledger.requests == ()
    assert list(Services(archive=os.environ["PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO"]).archive.store.keys("")) == []


def test_before_and_after_stand_side_by_side_in_an_artifact_that_never_expires(sandbox: Sandbox, photo: Path) -> None:
    state = run(photo, name="Summer/Hero [one]_two")
    ids = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id(state)]), type=ArtifactFilterType(any_=["markdown"])
    )
    (artifact,) = until(lambda client: client.read_artifacts(artifact_filter=ids))
    markdown = str(artifact.data)
    assert len(re.findall(r"\(data:image/jpeg;base64,[A-Za-z0-9+/=]+\)", markdown)) == 2
    assert "http" not in re.sub(r"data:image[^)]*", "", markdown)
    assert re.sub(r"([_\[\]])", r"\\\1", state.result().image) in markdown
    assert "- **prompt**: " in markdown, "a list, for Prefect's UI cuts long texts in tables off"
    assert re.fullmatch(r"[a-z0-9-]+", artifact.key or "")


def test_a_report_that_cannot_be_made_does_not_fail_a_paid_run(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("no artifacts today")

    monkeypatch.setattr("prefect_segmind.reporting.artifacts.create_markdown_artifact", gone)
    assert run(photo).result().status == "generated"
    assert "no artifacts today" in caplog.text


def test_a_missing_key_is_said_before_anything_is_done(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEGMIND_API_KEY")
    state = run(photo)
    assert state.is_failed()
    assert "SEGMIND_API_KEY" in str(state.message)
    runs = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id(state)]))
    with get_client(sync_client=True) as client:
        assert client.read_task_runs(flow_run_filter=runs) == []


def test_the_key_comes_from_a_block_that_the_flow_names(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect_segmind import SegmindCredentials

    right, wrong = (f"{each}-{uuid4()}" for each in ("marketing", "wrong"))
    SegmindCredentials(api_key=SecretStr(sandbox.api_key), base_url=sandbox.base_url).save(right)
    SegmindCredentials(api_key=SecretStr("SG_ffffffffffffffff"), base_url=sandbox.base_url).save(wrong)
    monkeypatch.delenv("SEGMIND_API_KEY")
    monkeypatch.delenv("SEGMIND_BASE_URL")
    with pytest.raises(InvalidKeyError):
        run(photo, credentials_block=wrong).result()
    assert run(photo, credentials_block=right).result().status == "generated"


def test_the_four_tasks_work_one_by_one_in_somebodys_own_flow(sandbox: Sandbox, photo: Path) -> None:
    @flow
    def our_own(image: str) -> str:
        job = validate_job({"image": image, "prompt": "a red mug", "seed": 123456})
        picture = generate_image(job, upload_image(job))
        return archive_image(picture).image

    assert our_own(str(photo)).startswith("s3://segmind/")
    assert sandbox.ledger.requests[0].seed == 123456


def test_a_fifth_task_copies_a_picture_to_an_address_that_stays(sandbox: Sandbox, photo: Path, tmp_path: Path) -> None:
    @flow
    def our_own(image: str) -> ArchivedImage:
        job = validate_job({"image": image, "prompt": "a red mug", "name": "shop/hero"})
        archived = archive_image(generate_image(job, upload_image(job)))
        return publish_image(archived, str(tmp_path / "live"))

    published = our_own(str(photo))
    assert published.published == str(tmp_path / "live" / "shop" / "hero.png")
    assert Path(published.published).read_bytes().startswith(b"\x89PNG")


def test_results_of_tasks_are_small_records(sandbox: Sandbox, photo: Path) -> None:
    @flow
    def watched() -> list[int]:
        job = validate_job({"image": str(photo), "prompt": "a red mug"})
        uploaded = upload_image(job)
        generated = generate_image(job, uploaded)
        every = (job, uploaded, generated, archive_image(generated))
        return [len(each.model_dump_json()) for each in every]

    assert max(watched()) < 4000


def test_the_form_has_drop_downs_and_a_text_for_each_parameter() -> None:
    schema = parameter_schema(image_to_image)
    assert schema.properties["resolution"]["enum"] == ["AUTO", *(each.value for each in Resolution)]
    assert schema.properties["style_type"]["enum"] == ["GENERAL", "REALISTIC", "DESIGN", "RENDER_3D", "ANIME"]
    assert schema.properties["magic_prompt_option"]["enum"] == ["AUTO", "ON", "OFF"]
    assert schema.required == ["image", "prompt"]
    undocumented = [name for name, each in schema.properties.items() if not each.get("description")]
    assert undocumented == []


def has_logs(wanted: LogFilter, client: SyncPrefectClient) -> bool:
    return len(client.read_logs(wanted)) > 3


def test_no_key_and_no_signed_address_is_left_anywhere(
    sandbox: Sandbox, photo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, own_tag: str
) -> None:
    """Searched for in the server's database, in the archive, the outbox and the log, after good and bad runs.

    An answer that was paid for and is no picture is kept as it came, for the eyes of its user alone.
    """
    signed = f"a.png?X-Amz-Signature={(signature := uuid4().hex)}"
    sandbox.play(
        Answer(status=429, reset_in=0.1),
        Answer(status=400, body=json.dumps({"error": f"bad key {sandbox.api_key}"})),
        Answer(kind="html", body=f"<p>https://x.example/{signed} {sandbox.api_key}</p>"),
        Answer(kind="json_url"),
    )
    caplog.set_level(logging.DEBUG, "prefect")
    ids = [flow_run_id(run(photo, name=f"secrets/{each}", seed=100 + each)) for each in range(3)]
    for each in ids:
        wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[each]))
        until(partial(has_logs, wanted))
    assert all_events(own_tag, "prefect-segmind."), "which reach the database last"
    secrets = [sandbox.api_key, signature, os.environ["AWS_SECRET_ACCESS_KEY"]]
    with closing(sqlite3.connect(f"file:{prefect_server.home() / 'prefect.db'}?mode=ro", uri=True)) as database:
        rows = "\n".join(database.iterdump())
    assert all(str(each) in rows for each in ids)
    # The rows of neighbours hold signed addresses that they have made up.
    place = re.escape(os.environ["PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO"].removeprefix("s3://"))
    assert re.search(place, rows)
    assert not re.search(rf"{place}[^\s\"']*X-Amz-Signature", rows)
    assert [secret for secret in secrets if secret in rows] == []
    secrets.append("X-Amz-Signature")
    folders = (Path(PREFECT_HOME.value()), tmp_path, sandbox.folder)
    places = [each for folder in folders for each in folder.rglob("*") if each.is_file()]
    kept = [each for each in places if each.suffix == ".answer"]
    assert [each.stat().st_mode & 0o777 for each in kept] == [0o600]
    places = [each for each in places if each not in kept]
    for secret in secrets:
        assert secret not in caplog.text
        for path in places:
            assert secret.encode() not in path.read_bytes(), f"{secret} is in {path}"


def test_the_flow_is_named_after_its_job(sandbox: Sandbox, photo: Path) -> None:
    state = run(photo)
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(flow_run_id(state)).name == "image-to-image mug"
