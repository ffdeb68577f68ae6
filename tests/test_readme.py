"""The README tells the truth: its example runs, its failures are what happens, its settings are the settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from rich.console import Console

from prefect_segmind import cli, outcome
from prefect_segmind.batch import planned
from prefect_segmind.console import print_facts
from prefect_segmind.plan import Plan, PlannedJob
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.settings import SegmindSettings

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CLOSED = "http://127.0.0.1:9"  # the discard port, where nobody listens


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    below = README.split(f"\n## {heading}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", below, re.M)
    assert rows
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[0].splitlines()[2:]]


def s3_down_after_the_answer(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect_segmind.client import SegmindClient

    generate = SegmindClient.generate

    def then_s3_is_down(*arguments: Any) -> Any:
        picture = generate(*arguments)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", CLOSED)
        return picture

    monkeypatch.setattr(SegmindClient, "generate", then_s3_is_down)


def playing(*answers: Answer) -> Callable[[Sandbox, pytest.MonkeyPatch], None]:
    return lambda sandbox, _: sandbox.play(*answers)


def setting(name: str, value: str) -> Callable[[Sandbox, pytest.MonkeyPatch], None]:
    return lambda _, monkeypatch: monkeypatch.setenv(name, value)


CAUSES: dict[str, Callable[[Sandbox, pytest.MonkeyPatch], None]] = {
    "bad key": setting("SEGMIND_API_KEY", "SG_0000000000000000"),
    "no credits": playing(Answer(status=406, body='{"error": "Insufficient credits: balance 0.01, need 0.05"}')),
    "rejected parameter": playing(Answer(status=406, body='{"error": "Invalid value for parameter seed"}')),
    "rate limit": playing(Answer(status=429, reset_in=1)),
    "rate limit of more than two minutes": playing(Answer(status=429, retry_after="300")),
    "overloaded provider": playing(Answer(status=503, retry_after="1"), Answer(status=529)),
    "gateway time-out": playing(Answer(status=504)),
    "gateway time-out, twice": playing(Answer(status=504), Answer(status=504)),
    "half a body": playing(Answer(kind="half_body")),
    "HTML with 200": playing(Answer(kind="html")),
    "image that is no image": playing(Answer(kind="not_an_image")),
    "link to a picture that cannot be followed": playing(
        Answer(kind="error", status=200, body='{"url": "https://127.0.0.1/a.png?sig=secret"}')
    ),
    "S3 down before the request": setting("AWS_ENDPOINT_URL_S3", CLOSED),
    "S3 down after the answer": s3_down_after_the_answer,
    "disk full in the outbox": setting("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX_MIN_FREE_BYTES", str(10**18)),
}


def test_the_table_of_failures_has_a_row_for_each_cause_and_no_other() -> None:
    assert [row[0] for row in table("When something goes wrong")] == list(CAUSES)


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("row", table("When something goes wrong"), ids=lambda row: row[0])
def test_each_row_of_the_table_of_failures_is_what_happens(
    row: list[str],
    sandbox: Sandbox,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    what, code, seen, paid, _ = row
    CAUSES[what](sandbox, monkeypatch)
    capsys.readouterr()
    assert cli.run(["generate", str(photo), "a red mug", "--json"]) == int(code)
    told = capsys.readouterr()
    found = json.loads(told.out)
    everything = told.err + caplog.text + found.get("error", "")
    for text in re.findall(r"`([^`]+)`", seen):
        assert text in everything
    certain, _, possible = paid.partition("possibly ")
    assert found["cost_usd"] == (re.findall(r"[\d.]+", certain) or ["0.00"])[0]
    assert found["possibly_billed_usd"] == (re.findall(r"[\d.]+", possible) or ["0.00"])[0]
    assert found["attempts"] == len(sandbox.ledger.requests)


@pytest.mark.usefixtures("prefect_server")
def test_the_example_with_the_four_tasks_runs(sandbox: Sandbox, photo: Path) -> None:
    code = re.search(r"<!-- example: a test runs this -->\n```python\n(.*?)```", README, re.S)
    assert code
    names: dict[str, Any] = {"__name__": "example"}
    exec(code[1], names)
    first, second = names["two_styles"](str(photo), "a red mug")
    assert "/mug/realistic/" in first
    assert "/mug/anime/" in second
    assert sandbox.ledger.billed == 2


def manifest_of_the_readme() -> str:
    code = re.search(r"```yaml\n(# yaml-language-server.*?)```", README, re.S)
    assert code
    return code[1]


@pytest.mark.usefixtures("prefect_server")
def test_the_manifest_becomes_the_pictures_that_are_told(
    sandbox: Sandbox, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mug.jpg", "inbox/cup.jpg", "inbox/pot.jpg"):
        path = photo.parent / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo.read_bytes())
    manifest = photo.parent / "campaign.yaml"
    manifest.write_text(manifest_of_the_readme())
    capsys.readouterr()
    assert cli.run(["refresh", str(manifest), "--budget-usd", "5", "--set", "season=autumn", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in found["images"]} == {
        f"{name}/{weight}" for name in ("mug", "inbox/cup", "inbox/pot") for weight in ("w40", "w70")
    }
    assert {each.prompt for each in sandbox.ledger.requests} == {
        "a ceramic mug in autumn light",
        "cup on a picnic blanket, autumn light",
        "pot on a picnic blanket, autumn light",
    }
    told = README.partition("`refresh --json` prints one object:")[2].partition("With `--dry-run`")[0]
    named = set(re.findall(r"`(\w+)`", told)) - {"name", "stage", "error"}
    assert named == found.keys()


def test_the_manifest_is_what_the_schema_says() -> None:
    schema = json.loads((Path(__file__).parents[1] / "docs" / "manifest.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(manifest_of_the_readme()), schema)


def test_the_plan_is_told_as_it_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, object]] = [
        {"name": "mug/w40", "needs": "reuse"},
        {"name": "mug/w70", "needs": "generate", "usd": "0.05"},
        {"name": "inbox/cup/w40", "needs": "fail", "problem": "photos/inbox/cup.jpg is empty"},
    ]
    plan = Plan(
        **{"total": 640, "generate": 598, "reuse": 40, "recover": 1, "wait": 0, "fail": 1},
        price_usd=Decimal("0.05"),
        budget_usd=Decimal("25.00"),
        credits_usd=Decimal("41.35"),
        jobs=tuple(PlannedJob.model_validate(each) for each in shown),
    )
    monkeypatch.setattr(outcome, "SHOWN_JOBS", len(shown))
    capsys.readouterr()
    print_facts(Console(), outcome.dry_run_facts(planned(plan)))
    assert capsys.readouterr().out in README


def test_the_settings_are_all_there_with_their_defaults() -> None:
    told = {}
    for row, defaults, _ in table("Settings"):
        names = re.findall(r"`(\w+)`", row)
        told.update(zip(names, defaults.split(", ") if len(names) > 1 else [defaults], strict=True))
    real = {name.upper(): field.default for name, field in SegmindSettings.model_fields.items()}
    assert told.keys() == real.keys()
    for name, default in real.items():
        if name != "OUTBOX":
            shown = "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
            assert told[name].lower() == shown.lower(), name


def test_the_exit_codes_are_the_ones_of_the_command_line() -> None:
    told = re.findall(r"^\| (\d+) \| (.+?) \|$", README, re.M)
    assert [int(code) for code, _ in told] == [
        *(outcome.DONE, outcome.FAILED, outcome.BAD_INPUT, outcome.ACCOUNT_REFUSED, outcome.NO_MONEY),
        outcome.INTERRUPTED,
    ]


def test_the_picture_is_there_and_small() -> None:
    picture = Path(__file__).parents[1] / "docs" / "before-after.jpg"
    assert picture.name in README
    assert picture.stat().st_size < 200_000
