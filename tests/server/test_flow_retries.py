"""Whatever has a flow run run again: one policy, one budget, and sums that tell all of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.flow_engine import run_flow
from prefect.runtime import flow_run
from prefect.states import Pending
from prefect.task_runners import ProcessPoolTaskRunner

from prefect_segmind import (
    ArchivedImage,
    BatchError,
    BatchResult,
    archive_image,
    generate_image,
    image_to_image,
    process_inbox,
    produce_asset,
    refresh_assets,
    upload_image,
    validate_job,
)
from prefect_segmind.api import client
from prefect_segmind.archive.record import Attempt, Record
from prefect_segmind.batch import approval
from prefect_segmind.cli.listeners import Run
from prefect_segmind.errors import (
    BadGatewayError,
    OutcomeUnknownError,
    RateLimitError,
    SegmindError,
    SourceImageError,
)
from prefect_segmind.limits.ledger import Ledger, Totals
from prefect_segmind.reporting.listener import Question, heard_by
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from prefect_segmind.storage.http import DownloadError
from tests.support.manifests import mugs, write_campaign
from tests.support.walk import up_to_upload

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.many]

LOST = Answer(status=502, billed=True)
"""The picture is made and billed, and the answer is lost."""


def agrees(ended: Any, sandbox: Sandbox) -> None:
    """What a run tells at its end is what the provider has billed, to the cent."""
    assert ended.cost_usd <= sandbox.ledger.billed_usd == ended.cost_usd + ended.possibly_billed_usd


def picture(photo: Path, name: str = "mug", **fields: Any) -> ArchivedImage:
    """The four tasks, as in a flow of one's own."""
    job = validate_job({"image": str(photo), "prompt": "a red mug", "name": name, **fields})
    return archive_image(generate_image(job, upload_image(job)))


def again(run: UUID) -> None:
    """What the button Retry in Prefect's UI does."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, Pending(), force=True)


def test_a_flow_that_is_retried_by_a_setting_sends_one_more_request_after_one_that_may_be_billed(
    sandbox: Sandbox, photo: Path
) -> None:
    sandbox.play(*[LOST] * 12)
    retried = image_to_image.with_options(retries=3, retry_delay_seconds=0)
    with pytest.raises(OutcomeUnknownError, match="this flow run sends no more for it") as ended:
        retried(image=str(photo), prompt="a red mug")
    assert len(sandbox.ledger.requests) == 2
    agrees(ended.value, sandbox)
    assert (ended.value.requests_sent, ended.value.possibly_billed_usd) == (2, Decimal("0.10"))


def test_a_flow_of_ones_own_around_the_tasks_sends_no_more_and_tells_all(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(LOST, LOST, LOST, LOST, LOST, LOST)
    ends: list[SegmindError] = []

    @flow(retries=2, retry_delay_seconds=0)
    def mine() -> ArchivedImage:
        try:
            return picture(photo)
        except SegmindError as error:
            ends.append(error)
            raise

    with pytest.raises(OutcomeUnknownError):
        mine()
    assert [type(each) for each in ends] == [BadGatewayError, OutcomeUnknownError, OutcomeUnknownError]
    for each in ends:
        agrees(each, sandbox)
    assert len(sandbox.ledger.requests) == 2


def test_a_flow_around_a_flow_that_is_retried_sends_no_more(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(*[LOST] * 12)

    @flow(retries=2, retry_delay_seconds=0)
    def around() -> ArchivedImage:
        return image_to_image(image=str(photo), prompt="a red mug")

    with pytest.raises(OutcomeUnknownError) as ended:
        around()
    agrees(ended.value, sandbox)
    assert len(sandbox.ledger.requests) == 2


def test_a_flow_that_asks_for_a_picture_twice_in_one_try_is_no_retry(sandbox: Sandbox, photo: Path) -> None:
    """A flow that calls others again and again, each night for example, is not held to the night before."""
    sandbox.play(LOST, LOST)

    @flow
    def nightly() -> ArchivedImage:
        with pytest.raises(BadGatewayError):
            image_to_image(image=str(photo), prompt="a red mug")
        return image_to_image(image=str(photo), prompt="a red mug")

    assert nightly().status == "generated"
    assert len(sandbox.ledger.requests) == 3


def test_a_flow_run_that_is_run_again_by_hand_sends_no_more_and_a_new_run_does(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(LOST, LOST)
    parameters: dict[str, Any] = {"image": str(photo), "prompt": "a red mug"}
    first: State[ArchivedImage] = image_to_image(**parameters, return_state=True)
    run = first.state_details.flow_run_id
    assert run is not None
    again(run)
    with get_client(sync_client=True) as client, pytest.raises(OutcomeUnknownError) as ended:
        run_flow(image_to_image, flow_run=client.read_flow_run(run), parameters=parameters)
    agrees(ended.value, sandbox)
    assert len(sandbox.ledger.requests) == 2
    assert image_to_image(**parameters).status == "generated"


def test_refusals_that_cost_nothing_are_retried_as_often_as_the_policy_says_and_once_in_each_further_try(
    sandbox: Sandbox, photo: Path
) -> None:
    sandbox.play(*[Answer(status=429, reset_in=0.01)] * 20)

    @flow(retries=2, retry_delay_seconds=0)
    def mine() -> None:
        job = validate_job({"image": str(photo), "prompt": "a red mug"})
        generate_image.with_options(retries=1)(job, upload_image(job))

    with pytest.raises(RateLimitError) as ended:
        mine()
    assert (len(sandbox.ledger.requests), ended.value.requests_sent, ended.value.possibly_billed_usd) == (4, 4, 0)


def test_what_an_earlier_try_paid_is_told_once_though_a_later_one_finds_it(sandbox: Sandbox, photo: Path) -> None:
    @flow(retries=1, retry_delay_seconds=0)
    def mine() -> list[ArchivedImage]:
        made = [picture(photo), picture(photo, name="copy"), picture(photo, name="other", seed=200)]
        if flow_run.run_count == 1:
            raise RuntimeError("something of the user's own")
        return made

    made = mine()
    assert [each.status for each in made] == ["generated", "reused", "generated"]
    assert [each.cost_usd for each in made] == [Decimal("0.05"), Decimal("0.00"), Decimal("0.05")]
    assert sum(each.cost_usd for each in made) == sandbox.ledger.billed_usd
    assert sum(each.attempts for each in made) == len(sandbox.ledger.requests) == 2


def test_a_picture_that_an_earlier_try_paid_and_did_not_archive_is_taken_up_at_once_and_told_as_paid(
    sandbox: Sandbox, photo: Path
) -> None:
    @flow(retries=1, retry_delay_seconds=0)
    def mine() -> ArchivedImage:
        job = validate_job({"image": str(photo), "prompt": "a red mug"})
        generated = generate_image(job, upload_image(job))
        if flow_run.run_count == 1:
            raise RuntimeError("something of the user's own, between the two")
        return archive_image(generated)

    made = mine()
    assert (made.status, made.cost_usd, made.attempts) == ("generated", Decimal("0.05"), 1)
    assert sandbox.ledger.billed == 1


def test_a_random_seed_is_drawn_once_for_all_tries_of_a_flow_run_and_anew_for_the_next(
    sandbox: Sandbox, photo: Path
) -> None:
    @flow(retries=2, retry_delay_seconds=0)
    def mine() -> list[ArchivedImage]:
        made = [picture(photo, seed="random") for _ in range(2)]
        made.append(produce_asset({"image": str(photo), "prompt": "a red mug", "seed": "random"}))
        if flow_run.run_count < 3:
            raise RuntimeError("something of the user's own")
        return made

    first, second = mine(), mine()
    seeds = [each.seed for each in (*first, *second)]
    assert len(set(seeds)) == len(seeds) == sandbox.ledger.billed == 6


@pytest.fixture
def campaign(photo: Path) -> Callable[..., str]:
    def write(count: int, **fields: Any) -> str:
        return write_campaign(photo, mugs(photo, count, "mug {}", **fields))

    return write


def run(manifest: str, retries: int, **parameters: Any) -> BatchResult:
    try:
        return refresh_assets.with_options(retries=retries, retry_delay_seconds=0)(manifest, **parameters)
    except BatchError as error:
        return error.result


def test_a_budget_holds_for_all_tries_of_a_flow_run(sandbox: Sandbox, campaign: Callable[..., str]) -> None:
    sandbox.play(*[LOST] * 12)
    result = run(campaign(3), 3, budget_usd=Decimal("0.10"), max_concurrency=1)
    assert (result.cost_usd, result.possibly_billed_usd) == (Decimal("0.00"), Decimal("0.10"))
    agrees(result, sandbox)
    assert result.stopped is not None
    assert "the budget of 0.10 USD is reached" in result.stopped


def test_a_batch_tells_what_all_its_tries_have_paid(sandbox: Sandbox, campaign: Callable[..., str]) -> None:
    sandbox.play(Answer(), LOST, LOST, Answer(status=400), Answer(status=400))
    result = run(campaign(4), 2, max_concurrency=1)
    assert (result.generated, result.failed) == (4, 0)
    assert (result.cost_usd, result.possibly_billed_usd) == (Decimal("0.20"), Decimal("0.10"))
    agrees(result, sandbox)


def test_an_inbox_that_an_earlier_try_has_emptied_tells_what_that_has_paid(sandbox: Sandbox, photo: Path) -> None:
    inbox = photo.parent / "inbox"
    inbox.mkdir()
    for name in ("cup", "pot"):
        shutil.copy(photo, inbox / f"{name}.jpg")
    sandbox.play(Answer(), Answer(status=400), Answer(status=400))
    visit = process_inbox.with_options(retries=1, retry_delay_seconds=0)
    with pytest.raises(BatchError) as ended:
        visit(
            *(str(inbox), "a {{ (stem) }}"),
            settle_seconds=0.05,
            move_done=True,
            max_concurrency=1,
            fail_run_on_failures=True,
        )
    result = ended.value.result
    assert (result.total, result.failed) == (1, 1), "what is done is wanted no longer"
    agrees(result, sandbox)


class Declines(Run):
    """A command at whose terminal a person has had enough."""

    def ask(self, question: Question) -> approval.Reply:
        """Stops the run."""
        return approval.Reply("stop")


def test_a_batch_that_nobody_approves_in_its_next_try_tells_what_the_earlier_one_has_paid(
    sandbox: Sandbox, campaign: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    sandbox.play(LOST, LOST, Answer(status=400))
    command = Declines()
    with heard_by(command):  # Prefect's engine raises what the first try ended with
        run(campaign(2), 1, max_concurrency=1, approve_above_usd=Decimal("0.10"))
    assert command.result is not None
    assert command.result.not_started == 2
    agrees(command.result, sandbox)
    assert "earlier tries of this run have paid 0.00 USD and may have been billed 0.10 USD more" in caplog.text


class Unplugs(Run):
    """A command whose source image is gone when a try has ended."""

    def __init__(self, photo: Path) -> None:
        super().__init__()
        self.photo = photo

    def ended(self, ledger: Ledger, result: BatchResult | None = None) -> None:
        """Removes the image."""
        super().ended(ledger, result)
        self.photo.unlink(missing_ok=True)


def test_a_command_tells_what_an_earlier_try_may_have_been_billed_though_the_next_one_does_not_come_to_paying(
    sandbox: Sandbox, photo: Path
) -> None:
    sandbox.play(LOST, LOST)
    command = Unplugs(photo)
    with heard_by(command), pytest.raises(SourceImageError):
        image_to_image.with_options(retries=1, retry_delay_seconds=0)(image=str(photo), prompt="a red mug")
    assert command.ledger.totals == Totals(2, possibly_billed_usd=sandbox.ledger.billed_usd)


def test_random_seeds_of_a_batch_stay_in_all_its_tries(sandbox: Sandbox, campaign: Callable[..., str]) -> None:
    sandbox.play(Answer(), Answer(status=400))
    result = run(campaign(2, seed="random", image_weight=70), 1, max_concurrency=1)
    assert (result.generated, result.cost_usd, sandbox.ledger.billed) == (2, Decimal("0.10"), 2)


def test_a_batch_in_a_flow_that_is_retried_keeps_to_one_budget(sandbox: Sandbox, campaign: Callable[..., str]) -> None:
    sandbox.play(*[LOST] * 12)
    manifest, ends = campaign(3), []

    @flow(retries=2, retry_delay_seconds=0)
    def around() -> BatchResult:
        try:
            return refresh_assets(manifest, budget_usd=Decimal("0.10"), max_concurrency=1)
        except BatchError as error:
            ends.append(error.result)
            raise

    with pytest.raises(BatchError):
        around()
    assert len(ends) == 3
    for each in ends:
        agrees(each, sandbox)
    assert sandbox.ledger.billed_usd == Decimal("0.10")


def test_two_tasks_of_a_flow_run_that_want_the_same_picture_at_once_pay_once(sandbox: Sandbox, photo: Path) -> None:
    @flow
    def mine() -> list[ArchivedImage]:
        job = {"image": str(photo), "prompt": "a red mug"}
        return [each.result() for each in [produce_asset.submit({**job, "name": name}) for name in "abc"]]

    made = mine()
    assert sorted(each.status for each in made) == ["generated", "reused", "reused"]
    assert sandbox.ledger.billed == 1


def test_the_tasks_run_in_processes_too(sandbox: Sandbox, photo: Path) -> None:
    @flow(task_runner=ProcessPoolTaskRunner(max_workers=2))  # type: ignore[arg-type]
    def mine() -> list[ArchivedImage]:
        job = validate_job.submit({"image": str(photo), "prompt": "a red mug"})
        one = archive_image.submit(generate_image.submit(job, upload_image.submit(job)))  # type: ignore[call-overload]
        more = produce_asset.submit({"image": str(photo), "prompt": "a blue mug"})
        return [one.result(), more.result()]

    assert [each.status for each in mine()] == ["generated", "generated"]
    assert sandbox.ledger.billed == 2


@pytest.mark.slow
def test_prefects_own_setting_pays_no_more_on_the_command_line(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(*[LOST] * 12)
    done = subprocess.run(
        [sys.executable, "-m", "prefect_segmind", "generate", str(photo), "a red mug", "--json"],
        env={**os.environ, "PREFECT_FLOWS_DEFAULT_RETRIES": "3"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    told = json.loads(done.stdout)
    assert (done.returncode, told["attempts"], told["possibly_billed_usd"]) == (1, 2, "0.10"), done.stderr
    assert len(sandbox.ledger.requests) == 2


def test_a_batch_stops_after_so_many_answers_without_a_picture_whatever_has_it_run_again(
    sandbox: Sandbox, campaign: Callable[..., str]
) -> None:
    sandbox.play(*[Answer(kind="html")] * 12)
    result = run(campaign(8), 2, max_concurrency=1)
    assert sandbox.ledger.billed == 3
    agrees(result, sandbox)
    assert result.stopped is not None
    assert "3 paid answers in a row held no picture" in result.stopped
    assert "a new run begins anew" in result.stopped


def test_a_batch_whose_unreadable_answers_are_read_by_now_goes_on_in_its_next_try(
    sandbox: Sandbox, campaign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_segmind.api.client._LINK_WAITS", ())
    real = vars(client)["download"]

    def down(*arguments: Any, **more: Any) -> object:
        if flow_run.run_count == 1:
            raise DownloadError("the network is down")
        return real(*arguments, **more)

    monkeypatch.setattr("prefect_segmind.api.client.download", down)
    sandbox.play(*[Answer(kind="json_url")] * 3)
    result = run(campaign(5), 1, max_concurrency=1)
    assert (result.failed, result.not_started, result.stopped) == (0, 0, None)
    agrees(result, sandbox)
    assert sandbox.ledger.billed == 5


def test_random_seeds_stay_in_all_tries_of_a_flow_around_a_batch(
    sandbox: Sandbox, campaign: Callable[..., str]
) -> None:
    sandbox.play(Answer(), Answer(status=400))
    manifest = campaign(2, seed="random")

    @flow(retries=1, retry_delay_seconds=0)
    def around() -> list[BatchResult]:
        return [refresh_assets(manifest, max_concurrency=1) for _ in range(2)]

    results = around()
    assert sandbox.ledger.billed == 4, "each call draws its own"
    assert sum(each.cost_usd for each in results) == sandbox.ledger.billed_usd


def test_random_seeds_stay_in_all_tries_of_a_flow_around_single_pictures(sandbox: Sandbox, photo: Path) -> None:
    @flow(retries=1, retry_delay_seconds=0)
    def around() -> list[ArchivedImage]:
        made = [image_to_image(image=str(photo), prompt="a red mug", seed="random") for _ in range(2)]
        if flow_run.run_count == 1:
            raise RuntimeError("something of the user's own")
        return made

    made = around()
    assert len({each.seed for each in made}) == sandbox.ledger.billed == 2
    assert sum(each.cost_usd for each in made) == sandbox.ledger.billed_usd


def test_what_an_earlier_try_paid_is_told_once_by_all_the_flows_that_the_next_one_calls(
    sandbox: Sandbox, photo: Path
) -> None:
    @flow(retries=1, retry_delay_seconds=0)
    def around() -> list[ArchivedImage]:
        made = [image_to_image(image=str(photo), prompt="a red mug", name=name) for name in "ab"]
        if flow_run.run_count == 1:
            raise RuntimeError("something of the user's own")
        return made

    made = around()
    assert [each.status for each in made] == ["generated", "reused"]
    assert sum(each.cost_usd for each in made) == sandbox.ledger.billed_usd


def test_a_budget_holds_in_all_tries_for_pictures_that_are_known_by_an_older_spelling(
    sandbox: Sandbox, photo: Path, tmp_path: Path
) -> None:
    assets = [{"name": f"mug/{n}", "image": photo.name, "prompt": f"mug {n} "} for n in range(3)]
    manifest = tmp_path / "campaign.jsonl"
    manifest.write_text("".join(f"{json.dumps(each)}\n" for each in assets))
    for each in assets:
        job, _ = up_to_upload(photo, prompt=each["prompt"], name=each["name"])
        assert job.earlier
        lost = Attempt(run="long ago", sent_at=datetime.now(UTC), status=502, reason="lost", possibly_billed=True)
        before = Record(fingerprint=job.earlier[0].fingerprint, attempts=(lost,))
        Services().archive.write(before, None)
    sandbox.play(*[LOST] * 12)
    result = run(str(manifest), 2, max_concurrency=1, budget_usd=Decimal("0.10"))
    agrees(result, sandbox)
    assert sandbox.ledger.billed_usd == Decimal("0.10")
