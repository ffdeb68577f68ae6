"""The command `refresh`, as people and scripts see it."""

from __future__ import annotations

import io
import json
import re
import signal
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.exceptions import TerminationSignal
from rich.console import Console

from prefect_segmind.batch.plan import Plan, PlannedJob
from prefect_segmind.batch.tally import BatchError, BatchResult, Progress, planned
from prefect_segmind.cli import commands, output
from prefect_segmind.cli.listeners import BatchRun
from prefect_segmind.flows import refresh_assets
from prefect_segmind.limits.ledger import Ledger, RequestId
from prefect_segmind.reporting import artifacts
from prefect_segmind.reporting.listener import listener
from prefect_segmind.sandbox import Answer, Sandbox
from tests.support.manifests import mugs, write_campaign

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.many]
KEYS = {
    *("total", "generated", "reused", "recovered", "failed", "not_started", "cost_usd", "possibly_billed_usd"),
    *("planned_usd", "images", "failures", "results", "failed_manifest", "stopped"),
}
IMAGE_KEYS = {
    *("status", "name", "image", "sidecar", "fingerprint", "sha256", "width", "height", "seed"),
    *("cost_usd", "possibly_billed_usd", "attempts", "published"),
}


@pytest.fixture
def manifest(photo: Path) -> str:
    return write_campaign(photo, mugs(photo, 3, "a mug, number {}, {{{{ season }}}}"), vars={"season": "summer"})


def refresh(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Runs `refresh … --json`; standard output must be one JSON object and nothing else."""
    capsys.readouterr()
    code = commands.run(["refresh", *arguments, "--json"])
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found.keys() >= KEYS
    return code, found, told.err


def test_json_tells_of_every_picture_and_of_the_sums(
    sandbox: Sandbox, manifest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, first, _ = refresh(capsys, manifest, "--set", "season=winter", "--max-concurrency", "2")
    assert (code, first["total"], first["generated"], first["cost_usd"]) == (0, 3, 3, "0.15")
    assert all(each.keys() == IMAGE_KEYS for each in first["images"])
    assert {each.prompt for each in sandbox.ledger.requests} == {f"a mug, number {n}, winter" for n in range(3)}
    code, second, _ = refresh(capsys, manifest, "--set", "season=winter")
    assert (code, second["reused"], second["cost_usd"], second["failures"]) == (0, 3, "0.00", [])
    assert sandbox.ledger.billed == 3


def test_a_dry_run_tells_the_same_counts_and_what_it_would_cost(
    sandbox: Sandbox, manifest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, plan, _ = refresh(capsys, manifest, "--dry-run")
    assert (code, plan["total"], plan["generated"], plan["planned_usd"], plan["cost_usd"]) == (0, 3, 3, "0.15", "0.00")
    assert plan["dry_run"] is True
    assert sandbox.ledger.requests == ()
    _, done, _ = refresh(capsys, manifest)
    counts = ("total", "generated", "reused", "recovered", "failed", "not_started", "planned_usd")
    assert {each: plan[each] for each in counts} == {each: done[each] for each in counts}


def test_a_dry_run_with_assets_that_will_fail_is_done_and_names_every_job_with_what_it_needs(
    sandbox: Sandbox, manifest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refresh(capsys, manifest, "--set", "season=winter")
    same = {"image": "mug.jpg", "prompt": "a mug, number 0, winter"}
    text = yaml.safe_load(Path(manifest).read_text())
    text["assets"] += [
        {"name": "again", **same},
        {"name": "new", "image": "mug.jpg", "prompt": "a hat"},
        {"name": "new too", "image": "mug.jpg", "prompt": "a hat"},
        {"name": "lost", "image": "lost.jpg", "prompt": "x"},
    ]
    Path(manifest).write_text(yaml.safe_dump(text))
    code, told, _ = refresh(capsys, manifest, "--set", "season=winter", "--dry-run")
    assert (code, told["failed"], told["cost_usd"], "error" in told) == (0, 1, "0.00", False)
    jobs = told["jobs"]
    assert all(each.keys() == {"name", "needs", "usd", "problem"} for each in jobs)
    assert [(each["name"], each["needs"], each["usd"]) for each in jobs] == [
        *((name, "reuse", "0.00") for name in ("mug/0", "mug/1", "mug/2", "again")),
        *(("new", "generate", "0.05"), ("new too", "reuse", "0.00"), ("lost", "fail", "0.00")),
    ]
    assert "lost.jpg does not exist" in jobs[-1]["problem"]
    assert {each["problem"] for each in jobs[:-1]} == {None}
    assert told["jobs_left_out"] == 0
    assert commands.run(["refresh", manifest, "--set", "season=winter", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "7 assets: would generate 1, reuse 5; 1 would fail; would cost 0.05 USD" in out
    assert not re.search(r"\bpaid 0\.00|\d generated", out)


def test_of_a_long_plan_people_see_the_first_jobs_how_many_more_there_are_and_all_that_will_fail() -> None:
    lost = [("lost", "no such image"), ("gone", "no such image either")]
    plan = Plan(
        **{"total": 1500, "generate": 1498, "reuse": 0, "recover": 0, "wait": 0, "fail": 2},
        price_usd=Decimal("0.05"),
        problems=tuple(lost),
        jobs=(
            PlannedJob(name="lost", needs="fail", problem="no such image"),
            *(PlannedJob(name=f"mug/{n}", needs="generate", usd=Decimal("0.05")) for n in range(999)),
        ),
    )
    facts = output.dry_run_facts(planned(plan))
    assert facts["job 1"] == "lost: fail, no such image"
    assert facts["job 20"] == "mug/18: generate, 0.05 USD"
    assert ("job 21" in facts, facts["and"]) == (False, "1480 more")
    assert facts["fails 1"] == "gone: no such image either"
    assert ("fails 2" in facts, "and fail" in facts) == (False, False)
    told = output.batch(planned(plan))
    assert (len(told["jobs"]), told["jobs_left_out"]) == (1000, 500)


def test_of_a_run_with_many_assets_people_are_told_where_the_result_of_each_one_is() -> None:
    plan = Plan(
        **dict.fromkeys(("total", "generate", "reuse", "recover", "wait", "fail"), 0), price_usd=Decimal("0.05")
    )
    where = {"results": "s3://pictures/.segmind/runs/1/results.jsonl"}
    few = planned(plan).model_copy(update={"dry_run": False, "total": 1000, "failed": 10, **where})
    assert "all results" not in output.batch_facts(few)
    for more in ({"total": 1001}, {"failed": 11}):
        facts = output.batch_facts(few.model_copy(update=more))
        assert facts["all results"] == "s3://pictures/.segmind/runs/1/results.jsonl"


def test_the_plan_in_the_ui_names_the_first_hundred_jobs_and_counts_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda markdown, **_: pages.append(markdown))
    plan = Plan(
        **{"total": 1500, "generate": 1500, "reuse": 0, "recover": 0, "wait": 0, "fail": 0},
        price_usd=Decimal("0.05"),
        jobs=tuple(PlannedJob(name=f"mug/{n}", needs="generate", usd=Decimal("0.05")) for n in range(1000)),
    )
    artifacts.publish_plan(plan, "campaign")
    (page,) = pages
    assert re.findall(r"^- mug/(\d+): generate", page, re.M) == [str(n) for n in range(100)]
    assert "- and 1400 more" in page


def test_people_read_the_plan_and_then_what_came_of_it(
    sandbox: Sandbox, manifest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert commands.run(["refresh", manifest, "--dry-run", "--budget-usd", "0.10"]) == 0
    *plan, address = capsys.readouterr().out.splitlines()
    assert re.search(r"in the UI  http://.+/runs/flow-run/[0-9a-f-]{36}$", address)
    assert [" ".join(line.split()) for line in plan] == [
        "dry run 3 assets: would generate 3; would cost 0.15 USD",
        "plan 3 assets",
        "generate 3, 0.15 USD at 0.05 USD each",
        "budget 0.10 USD",
        "credits 1000.00 USD",
        *(f"job {n + 1} mug/{n}: generate, 0.05 USD" for n in range(3)),
    ]
    sandbox.play(Answer(status=422), prompt="number 1")
    assert commands.run(["refresh", manifest]) == output.FAILED
    told = capsys.readouterr()
    assert "3 assets: 2 generated, 1 failed; paid 0.10 USD" in told.out
    assert "mug/1 (generate): the API answered 422" in told.out
    assert re.search(r"to run again.*failed\.yaml", told.out)
    assert "Traceback" not in told.out + told.err


@pytest.mark.parametrize(
    ("answer", "options", "code", "stopped"),
    [
        (Answer(status=422), [], output.FAILED, None),
        (Answer(status=401), [], output.ACCOUNT_REFUSED, "the API answered 401"),
        (Answer(status=406, body='{"error": "Insufficient credits"}'), [], output.NO_MONEY, "Insufficient credits"),
        (Answer(), ["--budget-usd", "0.10"], output.NO_MONEY, "the budget of 0.10 USD is reached"),
        (Answer(status=429, retry_after="300"), [], output.FAILED, "the API answered 429"),
    ],
    ids=["bad asset", "account", "credits", "budget", "rate limit"],
)
def test_exit_codes_tell_the_account_from_the_money_from_bad_assets(
    sandbox: Sandbox,
    manifest: str,
    capsys: pytest.CaptureFixture[str],
    answer: Answer,
    options: list[str],
    code: int,
    stopped: str | None,
) -> None:
    sandbox.play(answer)
    got, told, _ = refresh(capsys, manifest, "--max-concurrency", "1", *options)
    assert got == code
    assert (stopped in told["stopped"]) if stopped else told["stopped"] is None
    assert told["error"]
    assert told["generated"] == sandbox.ledger.billed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such.yaml"], "no-such.yaml"),
        (["MANIFEST", "--set", "season"], "--set: 'season' is not allowed"),
        (["MANIFEST", "--max-concurrency", "0"], "max_concurrency: 0 is not allowed"),
        (["MANIFEST", "--budget-usd=-1"], "budget_usd: '-1' is not allowed"),
        (["MANIFEST", "--budget-usd", "nan"], "budget_usd: 'nan' is not allowed"),
        (["MANIFEST", "--budget-usd", "inf"], "budget_usd: 'inf' is not allowed"),
        (["MANIFEST", "--budget-usd", "much"], "budget_usd: 'much' is not allowed"),
        (["MANIFEST", "--archive", "ftp://somewhere"], "ftp://somewhere"),
        (["WRONG"], "Did you mean REALISTIC?"),
        (["MANIFEST", "--bogus"], "--bogus"),
        (["MANIFEST", "--max-concurrency", "abc"], "abc"),
    ],
)
def test_bad_input_is_exit_code_2_and_reaches_nobody(
    sandbox: Sandbox, manifest: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Path(manifest).with_name("wrong.csv")
    wrong.write_text("name,image,prompt,style_type\na,mug.jpg,a mug,realistic\n")
    given = [{"MANIFEST": manifest, "WRONG": str(wrong)}.get(each, each) for each in arguments]
    code, told, _ = refresh(capsys, *given)
    assert code == output.BAD_INPUT
    assert said in told["error"]
    assert told["cost_usd"] == "0.00"
    assert sandbox.ledger.requests == ()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, TerminationSignal])
def test_an_interrupt_is_told_as_one_even_if_prefect_fails_on_top_of_it(
    sandbox: Sandbox,
    manifest: str,
    interrupt: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refresh(capsys, manifest)

    def interrupted(**options: Any) -> None:
        result: BatchResult = refresh_assets(**options)
        ledger = Ledger()
        ledger.reserve(Decimal("0.10"))
        ledger.send(Decimal("0.10"), "a picture", RequestId("a run", datetime.now(UTC)))  # it may be billed
        listener().ended(ledger, result.model_copy(update={"cost_usd": Decimal("0.10")}))
        try:
            raise interrupt(signal.SIGTERM)
        except interrupt:
            raise ConnectionError("Prefect's server is gone") from OSError("refused")

    monkeypatch.setattr(commands, "refresh_assets", interrupted)
    code, told, _ = refresh(capsys, manifest)
    assert (code, told["reused"], told["cost_usd"]) == (130, 3, "0.10")
    assert told["error"].startswith("interrupted; a request that was under way may be billed")


def test_the_sums_are_those_of_the_last_try_though_prefect_raises_what_an_earlier_one_has_ended_with(
    sandbox: Sandbox, manifest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def retried(**options: Any) -> None:
        result: BatchResult = refresh_assets(**options)
        raise BatchError("an earlier try", result.model_copy(update={"cost_usd": Decimal("0.00")}))

    monkeypatch.setattr(commands, "refresh_assets", retried)
    code, told, _ = refresh(capsys, manifest)
    assert (code, told["generated"], told["cost_usd"]) == (1, 3, "0.15")


def test_an_interrupt_while_planning_does_not_speak_of_a_bill(
    sandbox: Sandbox, manifest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefect_segmind.services.SourceReader", interrupted)  # the plan is made with it
    code, told, err = refresh(capsys, manifest)
    assert (code, told["total"], sandbox.ledger.requests) == (130, 0, ())
    assert told["error"] == "interrupted; the same command again goes on from here"
    assert "billed" not in err


def test_a_bar_shows_done_reused_failed_money_and_time_left() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    run = BatchRun(console, yes=False)
    with run.bar:
        run.progressed(Progress(10, Counter(generated=2, reused=1, failed=1), Decimal("0.10"), 5.0))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "4/10" in text
    assert "1 reused, 1 failed, 0.10 USD" in text


class Typing(io.StringIO):
    """A terminal at which somebody types."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "code", "billed"),
    [
        ("yes\n", output.DONE, 3),
        ("perhaps\n\n0.10\n", output.DONE, 2),
        ("no\n", output.NO_MONEY, 0),
    ],
)
def test_a_person_is_asked_in_the_terminal_and_the_answer_counts(
    sandbox: Sandbox,
    manifest: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    code: int,
    billed: int,
) -> None:
    monkeypatch.setattr("sys.stdin", Typing(typed))
    found, told, people = refresh(capsys, manifest, "--approve-above-usd", "0.05")
    assert (found, told["generated"], sandbox.ledger.billed) == (code, billed, billed)
    assert "3, 0.15 USD" in people
    assert "a mug, number 0, summer" in people
    assert people.count("This run may cost 0.15 USD. Continue?") == typed.count("\n"), (
        "what is no answer is asked again"
    )
    if not billed:
        assert (told["not_started"], told["cost_usd"]) == (3, "0.00")
        assert "not approved" in told["error"]


def test_the_question_names_no_more_than_the_budget_allows(
    sandbox: Sandbox, manifest: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Typing("no\n"))
    *_, people = refresh(capsys, manifest, "--approve-above-usd", "0.05", "--budget-usd", "0.10")
    assert "This run may cost 0.10 USD. Continue?" in people


def test_yes_asks_nobody(sandbox: Sandbox, manifest: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, people = refresh(capsys, manifest, "--approve-above-usd", "0", "--yes")
    assert (code, told["generated"]) == (output.DONE, 3)
    assert "Continue?" not in people


def test_where_nobody_can_be_asked_nothing_is_paid(
    sandbox: Sandbox, manifest: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    code, told, _ = refresh(capsys, manifest, "--approve-above-usd", "0.05")
    assert code == output.BAD_INPUT
    assert "with --yes" in told["error"]
    assert sandbox.ledger.requests == ()


def test_defaults_and_a_place_to_publish_to_are_options(
    sandbox: Sandbox, manifest: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    live = tmp_path / "live"
    _, told, _ = refresh(
        capsys,
        manifest,
        "--default",
        "style_type=ANIME",
        "--default",
        "seed=4711",
        "--publish-to",
        f"{live}/{{name}}.jpg",
    )
    assert {each["published"] for each in told["images"]} == {str(live / "mug" / f"{n}.jpg") for n in range(3)}
    assert {each["seed"] for each in told["images"]} == {4711}
    code, told, _ = refresh(capsys, manifest, "--default", "seed=many")
    assert (code, "defaults.seed: 'many' is not allowed" in told["error"]) == (output.BAD_INPUT, True)


def test_with_on_unknown_fail_an_asset_whose_request_may_have_been_billed_fails_alone(
    sandbox: Sandbox, manifest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sandbox.play(Answer(status=504), prompt="number 1")
    code, told, _ = refresh(capsys, manifest, "--on-unknown", "fail")
    assert (code, told["generated"], told["failed"], told["possibly_billed_usd"]) == (output.FAILED, 2, 1, "0.05")
    assert len(sandbox.ledger.requests) == 3, "no second one for it"


def test_no_more_requests_are_sent_in_any_minute_than_the_option_says(
    sandbox: Sandbox, manifest: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_segmind.limits.rate_limiter.WINDOW_SECONDS", 2.0)  # a short minute
    code, told, _ = refresh(capsys, manifest, "--requests-per-minute", "1")
    assert (code, told["generated"]) == (output.DONE, 3)
    sent = sorted(each.time for each in sandbox.ledger.requests)
    assert all((after - before).total_seconds() > 1.5 for before, after in pairwise(sent))
