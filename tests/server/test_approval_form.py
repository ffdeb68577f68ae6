"""Asking first, on a real Prefect server: the run pauses, shows its plan, and does what it is answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import Pause, PrefectHTTPStatusError
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Pending

from prefect_segmind import BatchError, BatchResult, refresh_assets
from prefect_segmind.errors import ApprovalTimeoutError, ConfigurationError, NotApprovedError
from prefect_segmind.flows import approval_form
from prefect_segmind.reporting.listener import Question
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services
from tests.support.manifests import mugs, write_campaign
from tests.support.waiting import until

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.many]


@pytest.fixture
def manifest(photo: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Five pictures, 0.25 USD."""
    monkeypatch.setattr(approval_form, "POLL_SECONDS", 1)
    return write_campaign(photo, mugs(photo, 5, "a red | mug, number {}", first_seed=1000))


class Paused:
    """A run that waits for an answer."""

    def __init__(self, client: SyncPrefectClient, ended: Future[State[BatchResult]], tag: str) -> None:
        self._client, self._ended = client, ended
        wanted = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[tag]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])),
        )

        def paused() -> list[FlowRun]:
            found = client.read_flow_runs(flow_run_filter=wanted)
            assert found or not ended.done(), ended.result()
            return found

        self.id = until(paused)[0].id
        self.form = ""

    def wait_for_form(self) -> None:
        """Prefect stores the form after the state; until it is there, the server takes no answer."""
        self.form = until(self._form)

    def _form(self) -> str:
        """What the person reads; empty until it is there."""
        found = self._client.read_flow_run(self.id).state
        assert found is not None
        keyset = found.state_details.run_input_keyset
        assert keyset is not None
        try:
            return str(json.loads(self._client.read_flow_run_input(self.id, keyset["description"])))
        except PrefectHTTPStatusError as error:
            if error.response.status_code != 404:
                raise
            return ""

    def answer(self, **answer: Any) -> str:
        """Answers as the form does, and returns the server's word for it."""
        found = self._client.request(
            "POST", "/flow_runs/{id}/resume", path_params={"id": self.id}, json={"run_input": answer}
        )
        return str(found.json()["status"])

    def end(self) -> None:
        """Ends a run that a failed test has left behind."""
        until(lambda: self._ended.done() or self.answer(answer="stop") == "ACCEPT")

    def ended(self) -> State[BatchResult]:
        return self._ended.result(60)


@pytest.fixture
def paused(manifest: str, own_tag: str) -> Iterator[Callable[..., Paused]]:
    runs: list[Paused] = []
    with get_client(sync_client=True) as client, ThreadPoolExecutor(1) as pool:

        def start(**parameters: Any) -> Paused:
            refresh: Callable[[], Any] = partial(refresh_assets, manifest, return_state=True, **parameters)
            ended = pool.submit(copy_context().run, refresh)
            runs.append(Paused(client, ended, own_tag))
            runs[-1].wait_for_form()
            return runs[-1]

        try:
            yield start
        finally:
            for run in runs:
                run.end()


def test_a_run_that_costs_more_waits_and_shows_what_it_will_do(sandbox: Sandbox, paused: Callable[..., Paused]) -> None:
    run = paused(approve_above_usd=Decimal("0.10"))
    for told in ("5 pictures, 0.25 USD", "More than 0.10 USD", "mug/4", r"a red \| mug, number 0", "data:image/jpeg"):
        assert told in run.form
    answered = datetime.now(UTC)
    assert run.answer(answer="go on") == "ACCEPT"
    result = run.ended().result()
    assert all(each.time > answered for each in sandbox.ledger.requests), "nothing is paid while it waits"
    assert (result.generated, result.cost_usd) == (5, Decimal("0.25"))
    assert sandbox.ledger.billed == 5


def test_trimmed_it_spends_what_is_approved_and_is_completed(sandbox: Sandbox, paused: Callable[..., Paused]) -> None:
    run = paused(approve_above_usd=Decimal("0.05"))
    assert run.answer(answer="trim", up_to_usd=0.17) == "ACCEPT"
    state = run.ended()
    assert state.is_completed()
    result = state.result()
    assert (result.generated, result.not_started, result.cost_usd) == (3, 2, Decimal("0.15"))
    assert {each.name for each in result.images} == {"mug/0", "mug/1", "mug/2"}, "the first of the manifest"
    assert sandbox.ledger.billed == 3


def test_trimmed_without_an_amount_it_spends_what_needs_no_approval(
    sandbox: Sandbox, paused: Callable[..., Paused]
) -> None:
    run = paused(approve_above_usd=Decimal("0.10"))
    assert run.answer(answer="trim") == "ACCEPT"
    assert run.ended().result().generated == sandbox.ledger.billed == 2


def test_stopped_it_pays_nothing_and_is_cancelled(sandbox: Sandbox, paused: Callable[..., Paused]) -> None:
    run = paused(approve_above_usd=Decimal(0))
    assert run.answer(answer="stop") == "ACCEPT"
    state = run.ended()
    assert state.is_cancelled()
    assert "not approved" in str(state.message)
    with pytest.raises(BatchError) as error:
        state.result()
    assert isinstance(error.value.stopped, NotApprovedError)
    assert (error.value.result.not_started, error.value.result.cost_usd) == (5, Decimal(0))
    assert sandbox.ledger.requests == ()


@pytest.mark.parametrize("answer", [{}, {"answer": "maybe"}, {"answer": "trim", "up_to_usd": -1}, {"up_to_usd": 1}])
def test_what_is_no_answer_is_refused_and_the_run_waits_on(
    sandbox: Sandbox, paused: Callable[..., Paused], answer: dict[str, Any]
) -> None:
    run = paused(approve_above_usd=Decimal(0))
    assert run.answer(**answer) == "REJECT"
    assert run.answer(answer="stop") == "ACCEPT"
    assert run.ended().is_cancelled()
    assert sandbox.ledger.requests == ()


def test_unanswered_it_fails_unpaid(
    sandbox: Sandbox, paused: Callable[..., Paused], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_APPROVAL_TIMEOUT_SECONDS", "2")
    state = paused(approve_above_usd=Decimal(0)).ended()
    assert state.is_failed()
    with pytest.raises(BatchError, match="nobody answered within 2 seconds") as error:
        state.result()
    assert isinstance(error.value.stopped, ApprovalTimeoutError)
    assert sandbox.ledger.requests == ()


def test_cancelled_while_it_waits_it_ends_as_cancelled(
    sandbox: Sandbox, paused: Callable[..., Paused], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_APPROVAL_TIMEOUT_SECONDS", "3")
    run = paused(approve_above_usd=Decimal(0))
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Cancelling(), force=True)
    assert run.ended().is_cancelled()
    assert sandbox.ledger.requests == ()


def deployed_run(client: SyncPrefectClient, **parameters: Any) -> UUID:
    """A run as a worker is given it."""
    deployment = client.create_deployment(client.create_flow(refresh_assets), name="scheduled")
    return client.create_flow_run_from_deployment(deployment, parameters=parameters).id


def work_on(client: SyncPrefectClient, run: UUID) -> State[Any]:
    """What a worker's process does with a run, until it ends or is suspended."""
    found = client.read_flow_run(run)
    assert found.state is not None
    if found.state.name != "Resuming":
        client.set_flow_run_state(run, Pending())
    try:
        state = run_flow(refresh_assets, flow_run=client.read_flow_run(run), return_type="state")
    except Pause as suspended:
        state = suspended.state
    assert isinstance(state, State)
    return state


def test_a_suspended_run_is_asked_once_and_told_once(
    sandbox: Sandbox, manifest: str, photo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def logged(text: str) -> int:
        return sum(text in each.getMessage() for each in caplog.records)

    with get_client(sync_client=True) as client:
        run = deployed_run(client, manifest=manifest, approve_above_usd="0.10")
        assert work_on(client, run).name == "Suspended"
        assert (logged("it waits until somebody answers"), logged("Suspending flow run")) == (1, 1)
        assert client.resume_flow_run(run, run_input={"answer": "trim", "up_to_usd": 0.15}).status.value == "ACCEPT"
        caplog.clear()
        assert work_on(client, run).is_completed()
        assert logged("approved: up to 0.15 USD") == 1
        assert (logged("it waits until somebody answers"), logged("Suspending flow run")) == (0, 0)
        states = [each.name for each in client.read_flow_run_states(run)]
    assert states.count("Suspended") == 1
    assert sandbox.ledger.billed == 3


def test_a_plan_that_has_changed_since_the_answer_is_asked_again(
    sandbox: Sandbox, manifest: str, caplog: pytest.LogCaptureFixture
) -> None:
    with get_client(sync_client=True) as client:
        run = deployed_run(client, manifest=manifest, approve_above_usd="0.10")
        assert work_on(client, run).name == "Suspended"
        client.resume_flow_run(run, run_input={"answer": "go on"})
        assets = yaml.safe_load(Path(manifest).read_text())["assets"]
        Path(manifest).write_text(yaml.safe_dump({"assets": assets[:4]}))
        assert work_on(client, run).name == "Suspended"
        client.resume_flow_run(run, run_input={"answer": "stop"})
        assert work_on(client, run).is_cancelled()
    assert sandbox.ledger.requests == ()


def test_the_form_tells_what_goes_live_until_when_it_waits_and_for_which_deployment(
    sandbox: Sandbox, manifest: str, caplog: pytest.LogCaptureFixture
) -> None:
    live = "s3://segmind/live/{name}/large.jpg"
    with get_client(sync_client=True) as client:
        run = deployed_run(client, manifest=manifest, approve_above_usd="0.10", publish_to=live)
        state = work_on(client, run)
        keyset = state.state_details.run_input_keyset
        assert keyset is not None
        form = client.read_flow_run_input(run, keyset["description"])
        client.resume_flow_run(run, run_input={"answer": "stop"})
    assert "s3://segmind/live/mug/0/large.jpg" in form
    assert "s3://segmind/live/mug/4/large.jpg" in form
    assert state.state_details.pause_timeout is not None
    assert "in 12 hours; then the run fails, unpaid" in form
    assert f"{state.state_details.pause_timeout:%Y-%m-%d}" in form
    assert "refresh-assets/scheduled" in form
    asked = next(each.getMessage() for each in caplog.records if "it waits until somebody" in each.getMessage())
    assert "12 hours at most" in asked


@pytest.mark.parametrize(
    ("publish_to", "told"),
    [
        (None, "nothing, the pictures stay in the archive"),
        ("s3://shop/live", "s3://shop/live/a.png and 7 more at s3://shop/live"),
        ("s3://shop/live/{name}/x.webp", "s3://shop/live/a/x.webp and 7 more at s3://shop/live"),
    ],
)
def test_what_goes_live_is_told_by_its_addresses(publish_to: str | None, told: str) -> None:
    plan = _plan().model_copy(update={"total": 8})
    assert Question("x", plan, Decimal(0), (("a", "b"),), (), publish_to).goes_live() == told


def test_nobody_is_asked_for_what_costs_no_more(sandbox: Sandbox, manifest: str) -> None:
    assert refresh_assets(manifest, approve_above_usd=Decimal("0.25")).generated == 5
    assert refresh_assets(manifest, approve_above_usd=Decimal(0)).reused == 5, "what is paid for costs nothing"


def test_what_nobody_has_approved_is_not_paid_even_if_the_world_has_changed_since_the_plan(
    sandbox: Sandbox, paused: Callable[..., Paused], manifest: str, photo: Path
) -> None:
    late = [{"name": f"late/{n}", "image": "late.jpg", "prompt": f"a mug, {n}", "seed": 2000 + n} for n in range(20)]
    assets = yaml.safe_load(Path(manifest).read_text())["assets"]
    Path(manifest).write_text(yaml.safe_dump({"assets": [*assets, *late]}))
    run = paused(approve_above_usd=Decimal("0.05"))
    (photo.parent / "late.jpg").write_bytes(photo.read_bytes())
    assert run.answer(answer="go on") == "ACCEPT"
    run.ended()
    assert sandbox.ledger.billed_usd <= 2 * Decimal("0.25"), "the plan, and as much again for second requests"
    (photo.parent / "late.jpg").unlink()
    result = refresh_assets(manifest, approve_above_usd=Decimal("0.50"), fail_run_on_failures=False)
    assert result.plan.planned_usd <= Decimal("0.50")


def test_the_setting_counts_where_the_flow_names_none(
    sandbox: Sandbox, paused: Callable[..., Paused], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_APPROVE_ABOVE_USD", "0.20")
    run = paused()
    assert run.answer(answer="stop") == "ACCEPT"
    assert run.ended().is_cancelled()


def test_where_nobody_could_answer_it_says_so_at_once(sandbox: Sandbox, manifest: str) -> None:
    question = Question("x", _plan(), Decimal(0), (), ())
    with (
        temporary_settings({PREFECT_API_URL: None}),
        pytest.raises(ConfigurationError, match="without a Prefect server"),
    ):
        approval_form._ask_in_prefect(question, Services())


def _plan() -> Any:
    from prefect_segmind.batch.plan import Plan

    return Plan(total=1, generate=1, reuse=0, recover=0, wait=0, fail=0, price_usd=Decimal("0.05"))


def test_a_source_that_cannot_be_read_is_named_in_the_form(sandbox: Sandbox, photo: Path) -> None:
    (photo.parent / "text.jpg").write_text("no picture")
    sources = [str(photo), str(photo.parent / "text.jpg"), str(photo.parent / "lost.jpg")]
    told = approval_form.description(Question("x", _plan(), Decimal(0), (("a", "b"),), sources), Services().reader)
    assert told.count("data:image/jpeg") == 1
    assert told.count("cannot be read") == 2
