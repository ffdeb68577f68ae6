"""A batch on a real Prefect server: what it makes, what it pays, what it tells, and how it ends."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prefect import flow, tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext
from prefect.flow_engine import run_flow
from prefect.states import AwaitingConcurrencySlot, Cancelling, Scheduled

from prefect_segmind import BatchError, BatchResult, produce_asset, refresh_assets
from prefect_segmind.archive.record import Record
from prefect_segmind.batch import plan
from prefect_segmind.batch import results as results_module
from prefect_segmind.batch import tally as batch_module
from prefect_segmind.batch.approval import Reply
from prefect_segmind.cli import output
from prefect_segmind.cli.listeners import Run
from prefect_segmind.errors import (
    BadGatewayError,
    BudgetReachedError,
    ConfigurationError,
    InsufficientCreditsError,
    InvalidKeyError,
    ManifestError,
    OverloadedError,
    RateLimitError,
    StoreError,
)
from prefect_segmind.flows import batch_run, dispatch
from prefect_segmind.limits.ledger import Totals
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.upload import Uploads
from prefect_segmind.reporting.listener import heard_by
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from prefect_segmind.storage.store import StoredObject
from tests.support.answering import answering
from tests.support.manifests import mugs, write_campaign
from tests.support.waiting import until

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.many]


@pytest.fixture
def campaign(photo: Path) -> Callable[..., str]:
    """Writes a manifest beside the photo: so many assets, all of it, each with a prompt and a seed of its own."""

    def write(count: int, *extra: dict[str, Any], **top: Any) -> str:
        assets = mugs(photo, count, "a red mug, number {:03}", name="mug/{:03}", first_seed=1000)
        return write_campaign(photo, [*assets, *extra], **top)

    return write


def run(manifest: str, **parameters: Any) -> BatchResult:
    """The result, however the run ends."""
    try:
        return refresh_assets(manifest, **parameters)
    except BatchError as error:
        return error.result


def agrees(result: BatchResult, sandbox: Sandbox) -> None:
    """The report and the ledger agree to the cent."""
    assert result.cost_usd <= sandbox.ledger.billed_usd <= result.cost_usd + result.possibly_billed_usd
    ended = result.generated + result.reused + result.recovered + result.failed + result.not_started
    assert ended == result.total
    assert len(result.images) == result.generated + result.reused + result.recovered
    assert len(result.failures) == result.failed


def test_a_manifest_becomes_pictures_and_run_again_it_pays_nothing(
    sandbox: Sandbox, campaign: Callable[..., str]
) -> None:
    first, second = run(campaign(6)), run(campaign(6))
    assert (first.generated, first.cost_usd, first.planned_usd) == (6, Decimal("0.30"), Decimal("0.30"))
    assert (second.reused, second.generated, second.cost_usd, second.planned_usd) == (6, 0, Decimal(0), Decimal(0))
    assert {each.image for each in first.images} == {each.image for each in second.images}
    assert sandbox.ledger.billed == 6


def test_more_assets_cost_only_what_is_missing(sandbox: Sandbox, campaign: Callable[..., str]) -> None:
    run(campaign(3))
    result = run(campaign(5))
    assert (result.reused, result.generated, result.planned_usd) == (3, 2, Decimal("0.10"))
    assert sandbox.ledger.billed == 5


def test_two_rows_that_are_the_same_picture_pay_once(sandbox: Sandbox, campaign: Callable[..., str]) -> None:
    same = {"image": "mug.jpg", "prompt": "a red mug, number 000", "seed": 1000}
    result = run(campaign(1, *({"name": f"copy/{n}", **same} for n in range(3))))
    assert (result.generated, result.reused, result.planned_usd) == (1, 3, Decimal("0.05"))
    assert len({each.sha256 for each in result.images}) == 1
    assert len({each.image for each in result.images}) == 4
    assert sandbox.ledger.billed == 1


def test_templates_take_the_variables_of_the_run(sandbox: Sandbox, campaign: Callable[..., str]) -> None:
    asset = {
        "name": "hero",
        "image": "mug.jpg",
        "prompt": "{{ product }} in {{ season }} light",
        "vars": {"product": "a mug"},
    }
    manifest = campaign(0, asset, vars={"season": "summer"}, variants={"style_type": ["ANIME", "DESIGN"]})
    result = run(manifest, variables={"season": "winter"})
    assert {each.name for each in result.images} == {"hero/anime", "hero/design"}
    assert {each.prompt for each in sandbox.ledger.requests} == {"a mug in winter light"}


def test_every_mistake_is_told_at_once_and_nothing_is_uploaded(sandbox: Sandbox, campaign: Callable[..., str]) -> None:
    wrong = (
        {"name": "a", "image": "mug.jpg", "prompt": "x", "style_type": "realistic"},
        {"name": "../b", "image": "mug.jpg"},
    )
    with pytest.raises(ManifestError) as error:
        refresh_assets(campaign(1, *wrong))
    for text in ("Did you mean REALISTIC?", "prompt: missing", "'../b' is not allowed", "nothing was uploaded or paid"):
        assert text in str(error.value)
    assert sandbox.ledger.requests == ()
    uploads = Services(archive=os.environ["PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO"]).archive.store
    assert list(uploads.keys("")) == []


def test_a_missing_image_fails_alone_and_unpaid_and_can_be_run_again_from_the_manifest_of_failures(
    sandbox: Sandbox, campaign: Callable[..., str], photo: Path
) -> None:
    result = run(
        campaign(2, {"name": "lost", "image": "lost.jpg", "prompt": "a {{ thing }}", "vars": {"thing": "hat"}})
    )
    assert (result.generated, result.failed, result.plan.fail) == (2, 1, 1)
    (failure,) = result.failures
    assert (failure.name, failure.stage) == ("lost", "validate")
    assert "lost.jpg does not exist" in failure.error
    assert result.failed_manifest
    (photo.parent / "lost.jpg").write_bytes(photo.read_bytes())
    again = run(result.failed_manifest)
    assert (again.total, again.generated) == (1, 1)
    assert sandbox.ledger.requests[-1].prompt == "a hat"


def test_of_two_hundred_assets_the_bad_ones_fail_alone_and_the_ledger_agrees_to_the_cent(
    tmp_path: Path, sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three are bad, two meet a rate limit, two a 502, one half a body; none is asked for twice without need."""
    lost = ({"name": f"lost/{n}", "image": "lost.jpg", "prompt": "x"} for n in range(2))
    with Sandbox(tmp_path / "many", latency=0.05, credits="100", sketch=True, s3=False) as many:
        monkeypatch.setenv("SEGMIND_BASE_URL", many.base_url)
        monkeypatch.setenv("SEGMIND_API_KEY", many.api_key)
        many.play(Answer(status=422), prompt="number 003")
        many.play(*[Answer(status=429, reset_in=0.5)] * 2)
        for prompt in ("number 110", "number 111"):
            many.play(Answer(status=502), prompt=prompt)
        many.play(Answer(kind="half_body"), prompt="number 112")
        result = run(campaign(198, *lost), max_concurrency=16)
        assert (result.generated, result.failed, result.not_started) == (197, 3, 0)
        assert {each.name for each in result.failures} == {"mug/003", "lost/0", "lost/1"}
        assert (result.cost_usd, result.possibly_billed_usd) == (Decimal("9.85"), Decimal("0.15"))
        agrees(result, many)
        asked = Counter(each.prompt for each in many.ledger.requests)
        again = {prompt for prompt, times in asked.items() if times > 1}
        assert {f"a red mug, number {n}" for n in (110, 111, 112)} <= again
        assert len(again) <= 5


def lines(result: BatchResult) -> list[dict[str, Any]]:
    """The file of all results."""
    assert result.results
    return [json.loads(line) for line in (Services().archive.content(result.results) or b"").splitlines()]


def test_the_result_of_each_asset_is_a_line_in_the_archive_however_few_a_report_names(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(campaign(2))
    monkeypatch.setattr(results_module, "NAMED", 2)
    lost = [{"name": f"lost/{number}", "image": "lost.jpg", "prompt": "x"} for number in range(3)]
    result = run(campaign(5, *lost))
    assert (result.reused, result.generated, result.failed, result.total) == (2, 3, 3, 8)
    assert [len(each) for each in (result.images, result.failures)] == [2, 2]
    told = lines(result)
    assert Counter(each["status"] for each in told) == {"reused": 2, "generated": 3, "failed": 3}
    assert {each["name"] for each in told} == {*(f"mug/00{n}" for n in range(5)), *(f"lost/{n}" for n in range(3))}
    assert {each["stage"] for each in told if each["status"] == "failed"} == {"validate"}
    assert result.failed_manifest
    assert Path(str(result.results)).parent == Path(result.failed_manifest).parent


def test_an_interrupted_run_keeps_the_results_that_it_has(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = batch_module.Tally.end

    def interrupted(tally: Any, entry: Any, result: Any) -> None:
        ended(tally, entry, result)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(batch_module.Tally, "end", interrupted)
    run = Run()
    with heard_by(run), pytest.raises(KeyboardInterrupt):
        refresh_assets(campaign(4), max_concurrency=1)
    assert run.result is not None
    assert run.result.not_started
    assert len(lines(run.result)) == run.result.generated + run.result.failed


def test_the_results_are_beside_the_outbox_where_the_archive_takes_nothing(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Services().archive.store
    put = store.put

    def full(key: str, *arguments: Any, **options: Any) -> str:
        if key.startswith(".segmind/runs/"):
            raise StoreError("the archive is full")
        return put(key, *arguments, **options)

    monkeypatch.setattr(store, "put", full)
    result = run(campaign(1, {"name": "lost", "image": "lost.jpg", "prompt": "x"}))
    assert result.results
    assert Path(result.results).is_relative_to(Services().outbox.folder.parent)
    assert {each["name"] for each in map(json.loads, Path(result.results).read_text().splitlines())} == {
        *("mug/000", "lost"),
    }


def test_a_run_with_failures_is_completed_where_that_is_wanted(sandbox: Sandbox, campaign: Callable[..., str]) -> None:
    manifest = campaign(1, {"name": "lost", "image": "lost.jpg", "prompt": "x"})
    failed = refresh_assets(manifest, return_state=True)
    assert failed.is_failed()
    assert "2 assets: 1 generated, 1 failed; paid 0.05 USD" in str(failed.message)
    completed = refresh_assets(manifest, fail_run_on_failures=False, return_state=True)
    assert completed.is_completed()
    assert (completed.result().reused, completed.result().failed) == (1, 1)


def test_a_budget_holds_under_concurrency(sandbox: Sandbox, campaign: Callable[..., str]) -> None:
    with pytest.raises(BatchError) as error:
        refresh_assets(campaign(30), budget_usd=Decimal("1.00"), max_concurrency=16)
    assert isinstance(error.value.stopped, BudgetReachedError)
    result = error.value.result
    assert (result.generated, result.failed, result.not_started) == (20, 0, 10)
    assert result.cost_usd == sandbox.ledger.billed_usd == Decimal("1.00")
    assert "budget of 1.00 USD is reached" in str(result.stopped)


def names(result: BatchResult) -> list[str]:
    return sorted(each.name for each in result.images)


def test_a_budget_makes_the_first_assets_of_the_manifest_even_if_they_are_the_slow_ones(
    sandbox: Sandbox, campaign: Callable[..., str], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Uploads.upload

    def slow_at_first(self: Uploads, job: Any, reader: Any) -> Any:
        time.sleep(1.0 if job.job.image.endswith("/mug.jpg") else 0)
        return upload(self, job, reader)

    monkeypatch.setattr(Uploads, "upload", slow_at_first)
    (photo.parent / "cup.jpg").write_bytes(photo.read_bytes() + b"another")
    others = ({"name": f"cup/{n}", "image": "cup.jpg", "prompt": f"cup {n}"} for n in range(6))
    result = run(campaign(2, *others), budget_usd=Decimal("0.15"))
    assert (names(result), result.not_started) == (["cup/0", "mug/000", "mug/001"], 5)


def test_an_asset_that_waits_for_a_retry_keeps_its_place_in_the_budget(
    sandbox: Sandbox, campaign: Callable[..., str]
) -> None:
    run(campaign(1))
    sandbox.play(Answer(status=429, reset_in=1), Answer(status=503), prompt="number 002")
    sandbox.play(Answer(status=422), prompt="number 001")
    result = run(campaign(8), budget_usd=Decimal("0.10"))
    assert names(result) == ["mug/000", "mug/002", "mug/003"]
    assert (result.reused, result.failed, result.not_started) == (1, 1, 4)


def test_what_may_have_been_billed_counts_against_the_budget(sandbox: Sandbox, campaign: Callable[..., str]) -> None:
    sandbox.play(*[Answer(status=502)] * 4)
    result = run(campaign(30), budget_usd=Decimal("1.00"), max_concurrency=16)
    assert result.generated == 16
    assert result.cost_usd + result.possibly_billed_usd <= Decimal("1.00")
    agrees(result, sandbox)


def test_what_is_not_billed_leaves_the_budget_to_others(sandbox: Sandbox, campaign: Callable[..., str]) -> None:
    sandbox.play(*[Answer(status=422)] * 3)
    result = run(campaign(30), budget_usd=Decimal("1.00"), max_concurrency=16)
    assert (result.generated, result.failed) == (20, 3)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(status=401), InvalidKeyError),
        (
            Answer(status=406, body='{"error": "Insufficient credits: balance 0.01, need 0.05"}'),
            InsufficientCreditsError,
        ),
        (Answer(status=429, retry_after="300"), RateLimitError),
        (Answer(status=503, retry_after="300"), OverloadedError),
    ],
    ids=lambda each: str(each.status) if isinstance(each, Answer) else "",
)
def test_a_dead_account_stops_the_dispatch_and_what_is_in_flight_is_archived(
    sandbox: Sandbox, campaign: Callable[..., str], answer: Answer, kind: type[Exception]
) -> None:
    sandbox.play(answer, prompt="number 006")
    with pytest.raises(BatchError) as error:
        refresh_assets(campaign(60), max_concurrency=4, fail_run_on_failures=False)
    result = error.value.result
    assert isinstance(error.value.stopped, kind)
    assert result.failed == 1
    assert result.not_started >= 40
    assert result.generated == sandbox.ledger.billed
    agrees(result, sandbox)


def test_a_rate_limit_holds_all_back_and_none_fails(
    tmp_path: Path, sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The issue's 20 a minute, ten times as fast."""
    with Sandbox(tmp_path / "limited", latency=0.05, requests_per_minute=20, rate_window=6.0, s3=False) as limited:
        monkeypatch.setenv("SEGMIND_BASE_URL", limited.base_url)
        monkeypatch.setenv("SEGMIND_API_KEY", limited.api_key)
        result = run(campaign(60), max_concurrency=16)
        refused = [each for each in limited.ledger.requests if each.status == 429]
        assert (result.generated, result.failed, limited.ledger.billed) == (60, 0, 60)
        assert len(refused) <= 40


@pytest.mark.parametrize("status", [503, 529])
def test_an_overloaded_provider_is_waited_for_by_all_and_leaves_the_budget_whole(
    sandbox: Sandbox, campaign: Callable[..., str], caplog: pytest.LogCaptureFixture, status: int
) -> None:
    # When the first has named its cost, all others are sent before one is answered.
    sandbox.play(Answer(), *[Answer(status=status, reset_in=2, delay=1.0)] * 6)
    result = run(campaign(7), budget_usd=Decimal("0.35"))
    assert (result.generated, result.cost_usd, result.possibly_billed_usd) == (7, Decimal("0.35"), 0)
    first, *answered = sandbox.ledger.requests
    assert first.billed
    assert [each.status for each in answered] == [status] * 6 + [200] * 6
    assert answered[6].time >= max(each.time for each in answered[:6]) + timedelta(seconds=2), "by all of them"
    told = [each.getMessage() for each in caplog.records if "all workers wait" in each.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("the provider is overloaded: ")


def test_a_dry_run_tells_the_plan_and_does_nothing(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(campaign(2))
    monkeypatch.delenv("SEGMIND_API_KEY")
    result = run(campaign(5, {"name": "lost", "image": "lost.jpg", "prompt": "x"}), dry_run=True)
    assert (result.total, result.generated, result.reused, result.failed) == (6, 3, 2, 1)
    assert (result.planned_usd, result.cost_usd, result.dry_run) == (Decimal("0.15"), Decimal(0), True)
    assert [(each.name, each.needs) for each in result.jobs] == [
        *((f"mug/{n:03}", "reuse") for n in range(2)),
        *((f"mug/{n:03}", "generate") for n in range(2, 5)),
        ("lost", "fail"),
    ]
    assert result.sentence() == "6 assets: would generate 3, reuse 2; 1 would fail; would cost 0.15 USD"
    assert sandbox.ledger.billed == 2


def test_a_dry_run_is_completed_though_assets_will_fail_and_its_plan_names_them(
    sandbox: Sandbox, campaign: Callable[..., str]
) -> None:
    manifest = campaign(1, {"name": "lost", "image": "lost.jpg", "prompt": "x"})
    state: State[BatchResult] = refresh_assets(manifest, dry_run=True, fail_run_on_failures=True, return_state=True)
    assert state.is_completed()
    flow_run_id = state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        (plan_page,) = client.read_artifacts(artifact_filter=wanted)
    assert "- mug/000: generate, 0.05 USD" in str(plan_page.data)
    assert "- lost: fail, " in str(plan_page.data)


def test_a_plan_asks_nothing_for_each_job_that_is_archived_or_new(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(campaign(5))
    asked: list[str] = []
    store = Services().archive.store
    get = store.get

    def watched(key: str) -> Any:
        asked.append(key)
        return get(key)

    monkeypatch.setattr(store, "get", watched)
    result = run(campaign(10), dry_run=True)
    assert (result.reused, result.generated, asked) == (5, 5, [])


def test_a_plan_above_the_budget_is_a_warning_and_not_a_refusal(
    sandbox: Sandbox, campaign: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    result = run(campaign(4), budget_usd=Decimal("0.10"))
    assert (result.generated, result.not_started) == (2, 2)
    assert "the plan costs 0.20 USD, the budget of 0.10 USD pays for 2 of 4 pictures" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"max_concurrency": 0}, {"requests_per_minute": 0}, {"budget_usd": Decimal("-1")}], ids=str
)
def test_limits_that_make_no_sense_are_refused(
    sandbox: Sandbox, campaign: Callable[..., str], wrong: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        refresh_assets(campaign(1), **wrong)


def test_there_is_one_task_run_for_each_asset_and_the_run_tells_plan_progress_and_pictures(
    sandbox: Sandbox, campaign: Callable[..., str]
) -> None:
    state: State[BatchResult] = refresh_assets(campaign(5), return_state=True)
    flow_run_id = state.state_details.flow_run_id
    assert flow_run_id is not None
    with get_client(sync_client=True) as client:

        def completed() -> list[TaskRun] | None:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
            return runs if sum(bool(each.state and each.state.is_completed()) for each in runs) == 5 else None

        runs = until(completed)
        assert runs is not None
        assert sorted(each.name for each in runs) == [f"produce mug/{n:03}" for n in range(5)]
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        )
    texts = {str(each.key).partition("-")[0]: str(each.data) for each in artifacts}
    assert "0.25 USD" in texts["plan"]
    assert texts["batch"].count("data:image/jpeg;base64,") == 10
    assert "X-Amz" not in "".join(texts.values())


def test_the_progress_of_a_run_is_an_artifact_while_it_goes_on(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "WATCH_SECONDS", 0.05)
    state: State[BatchResult] = refresh_assets(campaign(3), max_concurrency=1, return_state=True)
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        (progress,) = (each for each in client.read_artifacts(artifact_filter=wanted) if each.type == "progress")
    assert progress.data == 100
    assert str(progress.description).startswith("3 of 3 done")


def pages(state: State[Any]) -> dict[str, str]:
    """The markdown pages of a flow run, by the first word of their keys."""
    flow_run_id = state.state_details.flow_run_id
    assert flow_run_id is not None
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=wanted)
    return {str(each.key).partition("-")[0]: str(each.data) for each in found if each.type == "markdown"}


def test_the_page_of_a_run_tells_each_failure_in_text_that_wraps_and_names_what_was_not_started(
    sandbox: Sandbox, campaign: Callable[..., str]
) -> None:
    reason = "The safety check refused the picture and the prompt together, for a reason that is told at length"
    sandbox.play(Answer(status=422, body=json.dumps({"error": reason})))
    state: State[BatchResult] = refresh_assets(
        campaign(6), budget_usd=Decimal("0.10"), max_concurrency=1, return_state=True
    )
    error: Any = state.result(raise_on_failure=False)
    result: BatchResult = error.result
    (failure,) = result.failures
    ended = {each.name for each in result.images} | {failure.name}
    waiting = tuple(name for name in (f"mug/{n:03}" for n in range(6)) if name not in ended)
    assert (result.not_started, result.not_started_names) == (3, waiting)
    page = pages(state)["batch"]
    (line,) = [each for each in page.splitlines() if reason in each]
    assert line.startswith(f"- **{failure.name}** (generate): the API answered 422: "), "a table would cut it off"
    assert f"#### Not started: 3\n\n{', '.join(waiting)}\n" in page


def test_what_nobody_has_approved_is_named_as_not_started(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "NAMED", 2)
    with answering(Reply("stop")):
        state: State[BatchResult] = refresh_assets(campaign(3), approve_above_usd=Decimal(0), return_state=True)
    with pytest.raises(BatchError) as error:
        state.result()
    assert (error.value.result.not_started, error.value.result.not_started_names) == (3, ("mug/000", "mug/001"))


def test_each_picture_of_the_page_has_its_prompt_its_addresses_and_before_and_after_in_one_size(
    sandbox: Sandbox, campaign: Callable[..., str], tmp_path: Path
) -> None:
    state: State[BatchResult] = refresh_assets(campaign(2), publish_to=str(tmp_path / "live"), return_state=True)
    page = pages(state)["batch"]
    for each in state.result().images:
        _, _, below = page.partition(f"#### {each.name}: generated, 0.05 USD")
        told = below.partition("####")[0].replace("<wbr>", "").replace("\\", "")
        assert f"- **prompt**: a red mug, number {each.name[-3:]}" in told
        assert f"- **picture**: {each.image}" in told
        assert f"- **published**: {each.published}" in told
        before, after = re.findall(r"base64,([^)]+)", told)
        sizes = [Image.open(BytesIO(base64.b64decode(shown))).size for shown in (before, after)]
        assert sizes == [(320, 320)] * 2, "the source is 600×400, the picture 1024×1024"


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({}, "refresh-assets campaign"),
        ({"variables": {"season": "autumn"}, "dry_run": True}, "refresh-assets campaign season=autumn (dry run)"),
        (
            {"variables": {"season": "late  summer"}, "defaults": {"style_type": "ANIME"}, "dry_run": True},
            "refresh-assets campaign season=late summer style_type=ANIME (dry run)",
        ),
        (
            {"variables": {"season": "autumn", "link": "https://x.example/?sig=1234567890"}, "dry_run": True},
            "refresh-assets campaign season=autumn link=https://x.example/?… (dry run)",
        ),
    ],
)
def test_the_name_of_a_run_tells_its_season_and_that_it_is_a_dry_run(
    sandbox: Sandbox, campaign: Callable[..., str], parameters: dict[str, Any], name: str
) -> None:
    prompt = "{{ season }} {{ link }}"
    manifest = campaign(0, {"name": "hero", "image": "mug.jpg", "prompt": prompt}, vars={"season": "", "link": "x"})
    state: State[BatchResult] = refresh_assets(manifest, **parameters, return_state=True)
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(state.state_details.flow_run_id).name == name  # type: ignore[arg-type]


def test_a_run_that_is_cancelled_in_prefect_sends_nothing_new_and_ends_as_cancelled(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch, own_tag: str
) -> None:
    monkeypatch.setattr(dispatch, "WATCH_SECONDS", 0.2)
    sandbox.play(*[Answer(delay=1.5)] * 200)
    ended: list[State[Any]] = []

    def refresh() -> None:
        with tags(own_tag):
            ended.append(refresh_assets(campaign(60), max_concurrency=4, return_state=True))

    thread = threading.Thread(target=refresh)
    thread.start()
    with get_client(sync_client=True) as client:
        until(lambda: sandbox.ledger.requests)
        (found,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[own_tag])))
        assert found.name.startswith("refresh-assets campaign")
        assert found.state
        assert found.state.is_running()
        client.set_flow_run_state(found.id, Cancelling(), force=True)
    thread.join(60)
    assert ended[0].is_cancelled()
    assert 0 < sandbox.ledger.billed < 30
    with pytest.raises(BatchError) as error:
        ended[0].result()
    assert error.value.result.cost_usd == sandbox.ledger.billed_usd


def test_produce_asset_works_in_a_flow_of_ones_own(sandbox: Sandbox, photo: Path) -> None:
    @flow
    def one() -> Any:
        return produce_asset({"image": str(photo), "prompt": "a red mug", "seed": 4242})

    sandbox.play(Answer(status=502))
    archived: Any = one()
    assert (archived.status, archived.attempts, archived.possibly_billed_usd) == ("generated", 2, Decimal("0.05"))


def test_a_job_whose_seed_is_drawn_is_the_same_picture_in_each_retry(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(*[Answer(status=502)] * 5)

    @flow
    def one() -> Any:
        return produce_asset({"image": str(photo), "prompt": "a red mug", "seed": "random"})

    with pytest.raises(BadGatewayError) as error:
        one()
    assert (error.value.requests_sent, error.value.possibly_billed_usd) == (2, Decimal("0.10"))
    assert len(sandbox.ledger.requests) == 2


def test_an_image_that_only_the_plan_could_not_read_gets_one_seed(
    sandbox: Sandbox, campaign: Callable[..., str], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.play(Answer(status=502))
    monkeypatch.setattr(plan, "inspect_source", lambda *_, **__: (_ for _ in ()).throw(StoreError("down")))
    result = run(campaign(0, {"name": "x", "image": photo.name, "prompt": "a mug", "seed": "random"}))
    assert (result.plan.fail, result.generated, result.possibly_billed_usd) == (1, 1, Decimal("0.05"))
    assert len({each.seed for each in sandbox.ledger.requests if each.seed}) == 1


def test_a_failed_upload_fails_no_other_asset_of_the_same_image(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, failing = Uploads.upload, iter([True])

    def sometimes(*arguments: Any) -> Any:
        if next(failing, False):
            time.sleep(0.3)  # so that others wait for this one
            raise StoreError("a hiccup")
        return upload(*arguments)

    monkeypatch.setattr(Uploads, "upload", sometimes)
    result = run(campaign(20))
    assert (result.generated, result.failed) == (19, 1)
    assert result.failures[0].stage == "upload"


def test_a_run_that_breaks_tells_what_it_has_paid(
    sandbox: Sandbox,
    campaign: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(batch_run, "publish_batch", broken)
    run = Run()
    with heard_by(run), pytest.raises(OSError, match="no space"):
        refresh_assets(campaign(3))
    assert run.result is not None
    assert (run.result.generated, run.result.cost_usd) == (3, Decimal("0.15"))
    assert run.ledger.totals == Totals(3, Decimal("0.15"))
    assert "3 assets: 3 generated; paid 0.15 USD" in caplog.messages, "a worker's log is all there is"


def test_a_batch_stops_where_answer_after_answer_is_paid_for_and_holds_no_picture(
    sandbox: Sandbox, campaign: Callable[..., str]
) -> None:
    sandbox.play(*[Answer(kind="html")] * 30)
    with pytest.raises(BatchError) as error:
        refresh_assets(campaign(30), max_concurrency=2, fail_run_on_failures=False)
    result = error.value.result
    assert output.exit_code(error.value) == output.FAILED
    assert 3 <= result.failed <= 3 + 1, "what was in flight goes on"
    assert (result.generated, result.failed + result.not_started) == (0, 30)
    assert (result.cost_usd, result.possibly_billed_usd) == (sandbox.ledger.billed_usd, Decimal(0))
    assert result.stopped is not None
    assert "paid answers in a row held no picture" in result.stopped
    assert "the answer is kept in" in result.stopped
    agrees(result, sandbox)


def test_a_picture_now_and_then_keeps_a_batch_going_and_so_does_the_setting(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = Answer(kind="html"), Answer()
    sandbox.play(bad, bad, good, bad, bad, good)
    result = run(campaign(6), max_concurrency=1, requests_per_minute=600)
    assert (result.generated, result.failed, result.stopped) == (2, 4, None)
    assert result.cost_usd == sandbox.ledger.billed_usd == Decimal("0.30")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_STOP_AFTER_UNUSABLE", "0")
    sandbox.play(*[bad] * 4)
    again = run(campaign(6), max_concurrency=1)
    assert (again.reused, again.failed, again.stopped) == (2, 4, None)
    assert again.cost_usd == Decimal("0.20")


def test_a_batch_recovers_what_was_answered_before_and_could_not_be_read_then(
    sandbox: Sandbox, campaign: Callable[..., str], photo: Path
) -> None:
    sandbox.play(*[Answer(kind="html")] * 2)
    first = run(campaign(2))
    assert (first.failed, first.cost_usd) == (2, Decimal("0.10"))
    one, _ = Path(os.environ["PREFECT_INTEGRATIONS_SEGMIND_OUTBOX"]).rglob("*.answer")
    one.write_bytes(photo.read_bytes())  # as if it could be read by now
    planned = run(campaign(2), dry_run=True)
    assert (planned.recovered, planned.generated, planned.planned_usd) == (1, 1, Decimal("0.05"))
    second = run(campaign(2))
    assert (second.recovered, second.generated, second.cost_usd) == (1, 1, Decimal("0.05"))
    assert sandbox.ledger.billed == 3


def test_the_runs_defaults_win_over_the_manifests_and_give_way_to_an_assets(
    sandbox: Sandbox, campaign: Callable[..., str]
) -> None:
    own = {"name": "own", "image": "mug.jpg", "prompt": "x", "style_type": "DESIGN"}
    manifest = campaign(1, own, defaults={"style_type": "ANIME", "image_weight": 30})
    result = run(manifest, defaults={"style_type": "REALISTIC"})
    archive = Services().archive
    sent = {each.name: json.loads(archive.content(each.sidecar) or b"")["request"] for each in result.images}
    assert {name: (each["style_type"], each["image_weight"]) for name, each in sent.items()} == {
        **{"mug/000": ("REALISTIC", 30), "own": ("DESIGN", 30)}
    }
    with pytest.raises(ManifestError, match="Did you mean REALISTIC"):
        refresh_assets(manifest, defaults={"style_type": "realistic"})


def test_each_finished_picture_is_published_and_one_that_cannot_be_is_published_by_the_next_run(
    sandbox: Sandbox, campaign: Callable[..., str], tmp_path: Path
) -> None:
    live = tmp_path / "live"
    (live / "mug").mkdir(parents=True)
    (live / "mug" / "001.png").mkdir()  # in the way
    first = run(campaign(2), publish_to=str(live))
    assert (first.generated, first.failed, first.cost_usd) == (1, 1, Decimal("0.10"))
    assert (first.failures[0].name, first.failures[0].stage) == ("mug/001", "publish")
    (live / "mug" / "001.png").rmdir()
    second = run(campaign(2), publish_to=str(live))
    assert {each.published for each in second.images} == {str(live / "mug" / f"00{n}.png") for n in range(2)}
    assert (second.cost_usd, sandbox.ledger.billed) == (Decimal(0), 2)
    agrees(first, sandbox)


@pytest.fixture
def produced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the assets that had a task run."""
    names: list[str] = []
    produce = dispatch._produce

    def noting(entry: Any, *more: Any) -> None:
        names.append(entry.name)
        produce(entry, *more)

    monkeypatch.setattr(dispatch, "_produce", noting)
    return names


def test_what_is_in_place_is_reused_without_a_task_run_and_without_being_read(
    sandbox: Sandbox, campaign: Callable[..., str], produced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(campaign(3))
    produced.clear()
    store = Services().archive.store
    read, get = list[str](), store.get

    def watched(key: str) -> StoredObject | None:
        read.append(key)
        return get(key)

    monkeypatch.setattr(store, "get", watched)
    monkeypatch.setattr(batch_run, "publish_batch", lambda *_: None)  # it shows the pictures
    result = run(campaign(5))
    assert (result.reused, result.generated, result.total) == (3, 2, 5)
    assert sorted(produced) == ["mug/003", "mug/004"]
    assert not [key for key in read if key.startswith(("mug/000", "mug/001", "mug/002"))]
    assert Counter(each["status"] for each in lines(result)) == {"reused": 3, "generated": 2}
    assert (result.cost_usd, sandbox.ledger.billed) == (Decimal("0.10"), 5)


def test_a_picture_that_was_just_generated_is_published_without_being_read_again(
    sandbox: Sandbox, campaign: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Services().archive
    read, content = list[str](), archive.content

    def watched(uri: str) -> bytes | None:
        read.append(uri)
        return content(uri)

    monkeypatch.setattr(archive, "content", watched)
    monkeypatch.setattr(batch_run, "publish_batch", lambda *_: None)  # it shows the pictures
    result = run(campaign(2), publish_to=str(tmp_path / "live"))
    assert (result.generated, len(list((tmp_path / "live" / "mug").iterdir())), read) == (2, 2, [])


def test_prefect_keeps_nothing_of_the_task_runs_that_have_ended(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def look(*_: Any) -> None:
        context = FlowRunContext.get()
        assert context is not None
        kept.append(len(context.run_results) + len(context.task_run_assets))

    monkeypatch.setattr(batch_run, "archive_what_is_left_over", look)
    assert run(campaign(3)).generated == 3
    assert kept == [0]


def test_a_picture_whose_record_was_not_finished_is_left_to_a_task_run(
    sandbox: Sandbox, campaign: Callable[..., str], produced: list[str]
) -> None:
    image = run(campaign(2)).images[0]
    archive = Services().archive
    found = archive.read(image.fingerprint)
    assert found is not None
    attempts = tuple(each.model_copy(update={"possibly_billed": None}) for each in found.record.attempts)
    archive.write(Record(fingerprint=image.fingerprint, attempts=attempts), found.etag)
    produced.clear()
    result = run(campaign(2))
    assert (result.reused, produced, sandbox.ledger.billed) == (2, [image.name], 2)
    again = archive.read(image.fingerprint)
    assert again is not None
    assert again.record.state == "done"


def test_a_copy_under_another_name_is_in_place_too(
    sandbox: Sandbox, campaign: Callable[..., str], produced: list[str]
) -> None:
    same = {"image": "mug.jpg", "prompt": "a red mug, number 000", "seed": 1000, "name": "again"}
    run(campaign(1, same))
    produced.clear()
    result = run(campaign(1, same))
    assert (result.reused, produced) == (2, [])
    assert {each.image.rpartition("/")[0].partition("/archive/")[2] for each in result.images} == {"mug/000", "again"}


def test_a_picture_that_is_gone_or_is_another_one_fails_its_asset_alone_and_is_not_paid_for_again(
    sandbox: Sandbox, campaign: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(tmp_path / "archive"))
    gone, another, _ = sorted(run(campaign(3)).images, key=lambda each: each.name)
    Path(gone.image).unlink()
    Path(another.image).write_bytes(bytes(Path(another.image).stat().st_size))
    result = run(campaign(3))
    assert (result.reused, result.failed, result.cost_usd, sandbox.ledger.billed) == (1, 2, Decimal(0), 3)
    told = {each.name: (each.stage, each.error) for each in result.failures}
    assert told["mug/000"][0] == told["mug/001"][0] == "archive"
    assert f"{gone.image} is gone from the archive, though it was paid for; restore it" in told["mug/000"][1]
    assert f"{another.image} is no longer the one that was archived" in told["mug/001"][1]


def test_what_is_in_place_is_published_where_its_address_differs_and_its_note_is_that_of_the_newest_refresh(
    sandbox: Sandbox, campaign: Callable[..., str], produced: list[str], tmp_path: Path
) -> None:
    live = tmp_path / "live"
    run(campaign(3))
    produced.clear()
    first = run(campaign(3), publish_to=f"{live}/{{name}}.jpg")
    pictures = {name: (live / "mug" / f"{name}.jpg").read_bytes() for name in ("000", "001", "002")}
    (live / "mug" / "000.jpg").unlink()
    (live / "mug" / "001.jpg").write_bytes(b"another one")
    second = run(campaign(3), publish_to=f"{live}/{{name}}.jpg")
    assert {each.published for each in (*first.images, *second.images)} == {
        str(live / "mug" / f"{n}.jpg") for n in pictures
    }
    assert {name: (live / "mug" / f"{name}.jpg").read_bytes() for name in pictures} == pictures
    assert (first.reused, second.reused, produced) == (3, 3, [])
    notes = [json.loads(each.read_text()) for each in (live / ".segmind" / "live" / "mug").iterdir()]
    assert len({each["run"] for each in notes}) == 1


def test_what_is_in_place_keeps_older_refreshes_out(
    sandbox: Sandbox, campaign: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = campaign(0, {"name": "hero", "image": "mug.jpg", "prompt": "a mug in {{ season }}"})
    live = str(tmp_path / "live")
    run(manifest, variables={"season": "autumn"}, publish_to=live)
    due = datetime.now(UTC)
    assert run(manifest, variables={"season": "autumn"}, publish_to=live).reused == 1
    shown = (tmp_path / "live" / "hero.png").read_bytes()
    monkeypatch.setattr(batch_run, "refreshed_at", lambda: due)  # it came before, and had to wait
    assert run(manifest, variables={"season": "summer"}, publish_to=live).images[0].published is None
    assert (tmp_path / "live" / "hero.png").read_bytes() == shown


def test_what_the_outbox_still_has_of_an_archived_picture_is_settled_by_a_task_run(
    sandbox: Sandbox, campaign: Callable[..., str], produced: list[str]
) -> None:
    image = run(campaign(2)).images[0]
    produced.clear()
    outbox = Services().outbox
    left = outbox.folder / f"{image.fingerprint}.jpg"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(Services().archive.content(image.image) or b"")
    result = run(campaign(2))
    assert (result.reused, produced, left.exists()) == (2, [image.name], False)


def test_an_interrupt_while_pictures_are_found_in_place_names_the_others_as_not_started(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(campaign(3))
    found = Pipeline.reuse_in_place

    def interrupted(pipeline: Pipeline, job: Any, *more: Any) -> Any:
        if job.name == "mug/000":
            return found(pipeline, job, *more)
        os.kill(os.getpid(), signal.SIGINT)
        pipeline.gate.pause(30)  # until the run is stopped
        return None

    monkeypatch.setattr(Pipeline, "reuse_in_place", interrupted)
    run_ = Run()
    with heard_by(run_), pytest.raises(KeyboardInterrupt):
        refresh_assets(campaign(4))
    assert run_.result is not None
    assert run_.result.reused + run_.result.not_started == 4
    assert run_.result.not_started_names[-3:] == ("mug/001", "mug/002", "mug/003")
    assert sandbox.ledger.billed == 3


def test_an_older_refresh_is_not_published_over_a_newer_one(
    sandbox: Sandbox, campaign: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = {"name": "hero", "image": "mug.jpg", "prompt": "a mug in {{ season }}"}
    manifest = campaign(0, asset)
    newer = run(manifest, variables={"season": "autumn"}, publish_to=str(tmp_path / "live"))
    live = (tmp_path / "live" / "hero.png").read_bytes()
    due = datetime.now(UTC) - timedelta(hours=2)  # it had to wait, for a worker or for an answer
    monkeypatch.setattr(batch_run, "refreshed_at", lambda: due)
    older = run(manifest, variables={"season": "summer"}, publish_to=str(tmp_path / "live"))
    assert older.generated == 1
    assert older.images[0].published is None
    assert newer.images[0].published
    assert (tmp_path / "live" / "hero.png").read_bytes() == live


def test_a_run_is_as_old_as_when_it_was_due_however_long_it_waited_for_a_worker_or_for_its_turn(
    sandbox: Sandbox, campaign: Callable[..., str], tmp_path: Path
) -> None:
    manifest = campaign(0, {"name": "hero", "image": "mug.jpg", "prompt": "a mug in {{ season }}"})
    asked: dict[str, Any] = {"manifest": manifest, "publish_to": str(tmp_path / "live")}
    with get_client(sync_client=True) as client:
        late = client.create_flow_run(
            refresh_assets,
            parameters=asked | {"variables": {"season": "summer"}},
            state=Scheduled(scheduled_time=datetime.now(UTC) - timedelta(hours=2)),
        )
        client.set_flow_run_state(late.id, AwaitingConcurrencySlot(scheduled_time=datetime.now(UTC)), force=True)
        run(**asked, variables={"season": "autumn"})
        live = (tmp_path / "live" / "hero.png").read_bytes()
        result = run_flow(refresh_assets, flow_run=client.read_flow_run(late.id), parameters=late.parameters)
    assert isinstance(result, BatchResult)
    assert (result.generated, result.images[0].published) == (1, None)
    assert (tmp_path / "live" / "hero.png").read_bytes() == live


@pytest.mark.parametrize("wrong", ["https://cdn.example/live", "s3://b/live/{title}.png", "s3://b/live/{name}.gif"])
def test_a_place_to_publish_to_that_is_none_is_told_before_anything_is_paid(
    sandbox: Sandbox, campaign: Callable[..., str], wrong: str
) -> None:
    with pytest.raises(ConfigurationError, match="publish_to"):
        refresh_assets(campaign(1), publish_to=wrong)
    assert sandbox.ledger.requests == ()
