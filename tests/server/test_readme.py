"""The README and the pages of docs/ are true: examples run, failures are what happens, settings are the settings.

What a page names exists: commands and options, variables, files and headings that links lead to.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import jsonschema
import prefect.settings
import pytest
import yaml
from rich.console import Console

from prefect_segmind import image_to_image, process_inbox, refresh_assets
from prefect_segmind.api.request import ImageToImageRequest
from prefect_segmind.archive.record import Attempt, Record
from prefect_segmind.batch import results
from prefect_segmind.batch.plan import Plan, PlannedJob
from prefect_segmind.batch.tally import planned
from prefect_segmind.cli import commands as cli
from prefect_segmind.cli import output
from prefect_segmind.cli.terminal import print_facts
from prefect_segmind.errors import InvalidJobError
from prefect_segmind.jobs.job import parse_job
from prefect_segmind.reporting import artifacts
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.sandbox.script import Kind
from prefect_segmind.services import Services
from prefect_segmind.settings import PREFIX, SegmindSettings
from tests.support.walk import up_to_upload

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
    if path.name != "CHANGELOG.md"
}
CLOSED = "http://127.0.0.1:9"  # the discard port, where nobody listens


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of a page, without its head."""
    below = DOCS[page].split(f"\n## {heading}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", below, re.M)
    assert rows
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[0].splitlines()[2:]]


Cause = Callable[[Sandbox, pytest.MonkeyPatch, Path], None]
"""Makes the next run of the command on a photo fail."""


def s3_down_after_the_answer(_: Sandbox, monkeypatch: pytest.MonkeyPatch, __: Path) -> None:
    from prefect_segmind.api.client import SegmindClient

    generate = SegmindClient.generate

    def then_s3_is_down(*arguments: Any) -> Any:
        picture = generate(*arguments)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", CLOSED)
        return picture

    monkeypatch.setattr(SegmindClient, "generate", then_s3_is_down)


def kept_by_another_machine(_: Sandbox, __: pytest.MonkeyPatch, photo: Path) -> None:
    fingerprint = up_to_upload(photo)[0].fingerprint
    paid = {"status": 200, "possibly_billed": False, "cost_usd": Decimal("0.05")}
    kept = Attempt(run="theirs", sent_at=datetime.now(UTC), kept="/outbox/mug.jpg on another-machine", **paid)
    Services().archive.write(Record(fingerprint=fingerprint, attempts=(kept,)), None)


def a_file_by_the_name_of_the_job(_: Sandbox, monkeypatch: pytest.MonkeyPatch, photo: Path) -> None:
    archive = photo.parent / "archive"
    archive.mkdir()
    (archive / photo.stem).touch()
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(archive))


def playing(*answers: Answer) -> Cause:
    return lambda sandbox, *_: sandbox.play(*answers)


def setting(name: str, value: str) -> Cause:
    return lambda _, monkeypatch, __: monkeypatch.setenv(name, value)


def without_history(*answers: Answer) -> Cause:
    def cause(sandbox: Sandbox, *_: object) -> None:
        sandbox.history.off = True
        sandbox.play(*answers)

    return cause


def playing_v2(*answers: Answer, patience: str = "60") -> Cause:
    def cause(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
        monkeypatch.setenv("SEGMIND_BASE_URL", sandbox.base_url_v2)
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_READ_TIMEOUT_SECONDS", patience)
        sandbox.play(*answers)

    return cause


CAUSES: dict[str, Cause] = {
    "bad key": setting("SEGMIND_API_KEY", "SG_0000000000000000"),
    "no credits": playing(Answer(status=406, body='{"error": "Insufficient credits: balance 0.01, need 0.05"}')),
    "rejected parameter": playing(Answer(status=406, body='{"error": "Invalid value for parameter seed"}')),
    "rate limit": playing(Answer(status=429, reset_in=1)),
    "rate limit of more than two minutes": playing(Answer(status=429, retry_after="300")),
    "overloaded provider": playing(Answer(status=503, retry_after="1"), Answer(status=529)),
    "gateway time-out, the picture made all the same": playing(Answer(status=504, billed=True)),
    "gateway time-out, nothing made": playing(Answer(status=504)),
    "gateway time-out that the provider does not list": playing(Answer(status=504, listed=False)),
    "the same, twice": playing(*[Answer(status=504, listed=False)] * 2),
    "half a body": playing(Answer(kind="half_body")),
    "no answer": playing(Answer(kind="lost")),
    "half a body, and a request history out of reach": without_history(Answer(kind="half_body", listed=False)),
    "request that fails (v2)": playing_v2(Answer(fails=True)),
    "request that is not finished in time (v2)": playing_v2(Answer(processing=60), patience="1.5"),
    "HTML with 200": playing(Answer(kind="html")),
    "image that is no image": playing(Answer(kind="not_an_image")),
    "link to a picture that cannot be followed": playing(
        Answer(kind="error", status=200, body='{"url": "https://127.0.0.1/a.png?sig=secret"}')
    ),
    "S3 down before the request": setting("AWS_ENDPOINT_URL_S3", CLOSED),
    "S3 down after the answer": s3_down_after_the_answer,
    "disk full in the outbox": setting("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX_MIN_FREE_BYTES", str(10**18)),
    "picture kept by another machine": kept_by_another_machine,
    "name that the archive cannot hold": a_file_by_the_name_of_the_job,
}


def test_the_table_of_failures_has_a_row_for_each_cause_and_no_other() -> None:
    assert [row[0] for row in table("failures", "When something goes wrong")] == list(CAUSES)


@pytest.mark.many
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("row", table("failures", "When something goes wrong"), ids=lambda row: row[0])
def test_each_row_of_the_table_of_failures_is_what_happens(
    row: list[str],
    with_history: Sandbox,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    what, code, seen, paid, _ = row
    CAUSES[what](with_history, monkeypatch, photo)
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
    listed = with_history.history.page({}, "")["data"]
    under_way = sum(each["model_status"] == "PENDING" for each in listed)
    assert found["attempts"] == len(with_history.ledger.requests) + under_way


@pytest.mark.usefixtures("prefect_server")
def test_the_example_with_the_four_tasks_runs(sandbox: Sandbox, photo: Path) -> None:
    code = re.search(r"<!-- example: a test runs this -->\n```python\n(.*?)```", DOCS["flows"], re.S)
    assert code
    names: dict[str, Any] = {"__name__": "example"}
    exec(code[1], names)
    first, second = names["two_styles"](str(photo), "a red mug")
    assert "/mug/realistic/" in first
    assert "/mug/anime/" in second
    assert sandbox.ledger.billed == 2


def manifest_of_the_docs() -> str:
    code = re.search(r"```yaml\n(# yaml-language-server.*?)```", DOCS["manifest"], re.S)
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
    manifest.write_text(manifest_of_the_docs())
    capsys.readouterr()
    assert cli.run(["refresh", str(manifest), "--budget-usd", "5", "--set", "season=autumn", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in found["images"]} == {
        f"{name}/{weight}" for name in ("mug", "inbox/cup", "inbox/pot") for weight in ("w40", "w70")
    }
    told = DOCS["command-line"].partition("`--json` for scripts: one object")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", told)) - {"generated", "reused", "recovered", "submitted", "failed", "error"}
    assert all(each.keys() == named for each in found["images"])
    assert {each.prompt for each in sandbox.ledger.requests} == {
        "a ceramic mug in autumn light",
        "cup on a picnic blanket, autumn light",
        "pot on a picnic blanket, autumn light",
    }
    told = DOCS["command-line"].partition("`refresh --json` prints one object:")[2].partition("With `--dry-run`")[0]
    named = set(re.findall(r"`(\w+)`", told)) - {"status", "name", "stage", "error"}
    assert named == found.keys()


def test_the_manifest_is_what_the_schema_says() -> None:
    schema = json.loads((Path(__file__).parents[2] / "docs" / "manifest.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(manifest_of_the_docs()), schema)


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
    monkeypatch.setattr(output, "SHOWN_JOBS", len(shown))
    capsys.readouterr()
    print_facts(Console(), output.dry_run_facts(planned(plan)))
    assert capsys.readouterr().out in DOCS["manifest"]


def test_the_settings_are_all_there_with_their_defaults() -> None:
    told: dict[str, str] = {}
    for row, defaults, _ in table("settings", "Settings"):
        names = re.findall(r"`(\w+)`", row)
        told.update(zip(names, defaults.split(", ") if len(names) > 1 else [defaults], strict=True))
    real = {name.upper(): field.default for name, field in SegmindSettings.model_fields.items()}
    assert told.keys() == real.keys()
    for name, default in real.items():
        if name != "OUTBOX":
            shown = "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
            assert told[name].lower() == shown.lower(), name


def test_the_exit_codes_are_the_ones_of_the_command_line() -> None:
    told = re.findall(r"^\| (\d+) \| (.+?) \|$", DOCS["command-line"], re.M)
    assert [int(code) for code, _ in told] == [
        *(output.DONE, output.FAILED, output.BAD_INPUT, output.ACCOUNT_REFUSED, output.NO_MONEY),
        output.INTERRUPTED,
    ]


def test_the_picture_is_there_and_small() -> None:
    picture = Path(__file__).parents[2] / "docs" / "before-after.jpg"
    assert picture.name in README
    assert picture.stat().st_size < 200_000


@pytest.mark.usefixtures("prefect_server")
def test_the_two_flows_run_as_they_are_called(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mug.jpg", "inbox/cup.jpg"):
        path = photo.parent / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo.read_bytes())
    (photo.parent / "campaign.yaml").write_text(manifest_of_the_docs())
    monkeypatch.chdir(photo.parent)
    one, many, _ = re.findall(r"```python\n(.*?)```", DOCS["flows"], re.S)
    capsys.readouterr()
    exec(one, {})
    assert capsys.readouterr().out.startswith("generated 0.05 s3://")
    exec(many, {})
    assert capsys.readouterr().out == "4 0 0 0.20 None\n"
    assert sandbox.ledger.billed == 5


def test_the_parameters_of_the_flow_are_those_of_the_api_with_its_defaults() -> None:
    ours = {name: each.default for name, each in inspect.signature(image_to_image.fn).parameters.items()}
    for name, field in ImageToImageRequest.model_fields.items():
        if name != "image_file":
            assert ours[name] == (inspect.Parameter.empty if field.is_required() else field.default), name


def test_the_command_for_one_picture_has_an_option_for_every_parameter_of_the_flow() -> None:
    flow, command = (inspect.signature(each).parameters for each in (image_to_image.fn, cli.generate))
    assert {"credentials_block" if name == "block" else name for name in command} - {"output"} == set(flow)
    for name in flow.keys() & command.keys():
        assert command[name].default == flow[name].default, name


def test_a_job_with_mistakes_is_told_them_as_shown() -> None:
    with pytest.raises(InvalidJobError) as told:
        parse_job({"image": "a.jpg", "prompt": "a", "resolution": "RESOLUTION_800_1280", "style_type": "realistic"})
    assert f"```text\n{told.value}\n```" in DOCS["failures"]


def test_the_numbers_of_what_is_named_are_those_of_the_code() -> None:
    flat = {page: " ".join(text.split()) for page, text in DOCS.items()}
    assert f"A dry run names the first {output.SHOWN_JOBS} jobs in this way" in flat["manifest"]
    assert f"the plan in Prefect's UI names the first {artifacts.SHOWN_JOBS}." in flat["manifest"]
    assert f"`images` (the first {results.NAMED}," in flat["command-line"]
    assert f"`not_started_names` (the first {results.NAMED})" in flat["command-line"]


def commands(text: str) -> Iterator[list[str]]:
    """What is to be typed, a command each, without its comments."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        command = ""
        for line in block.splitlines():
            command += line.removesuffix("\\") + "\n"
            if line.endswith("\\") or command.count("'") % 2:
                continue  # goes on in the next line
            yield shlex.split(command, comments=True)
            command = ""
        assert not command


def test_the_readme_is_short_and_begins_with_a_picture() -> None:
    assert len(README.split()) <= 1500
    first_lines = "\n".join(README.splitlines()[:30])
    assert "make demo" in first_lines
    assert "docs/before-after.jpg" in first_lines
    section = README.partition("\n## Why it can be trusted with money\n")[2].partition("\n## ")[0]
    sentences = re.split(r"^\d\. ", section.strip(), flags=re.M)[1:]
    assert len(sentences) == 5
    assert not any(". " in " ".join(each.split()) for each in sentences), "one sentence each"


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([^)\s#]+)", README))
    assert {page for page in PAGES if page != "README.md"} <= linked


def test_the_commands_of_the_readme_name_files_that_a_clone_has() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    for command in commands(README):
        for word in command:
            if "/" in word and "://" not in word and not word.startswith(".venv/"):
                assert word in listed, shlex.join(command)


@pytest.mark.usefixtures("prefect_server")
def test_the_first_commands_of_the_readme_make_pictures(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    section = README.partition("\n## Everything for free: the sandbox\n")[2].partition("\n## ")[0]
    serve, *typed = [each[1:] for each in commands(section) if each[0] == "prefect-segmind"]
    assert serve == ["sandbox"]
    for _ in range(2):
        assert [cli.run(each) for each in typed] == [0] * len(typed), capsys.readouterr().err
        assert sandbox.ledger.billed == 4, "the picture, and the three of the campaign; nothing the second time"


@pytest.mark.usefixtures("prefect_server")
def test_the_example_of_the_readme_runs(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    capsys.readouterr()
    exec(example, {})
    assert capsys.readouterr().out.startswith("generated 0.05 s3://")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_is_shown_is_understood(page: str) -> None:
    typed = [each[1:] for each in commands(PAGES[page]) if each[0] == "prefect-segmind"]
    typed += [shlex.split(text)[1:] for text in re.findall(r"`(prefect-segmind [a-z][^`]*)`", PAGES[page])]
    assert typed or page != "README.md"
    assert "```console" not in PAGES[page], "a prompt in front of a command is copied with it"
    for each in typed:
        cli.app.parse_args(each, exit_on_error=False, print_error=False)


def test_every_option_that_is_named_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (["generate", "--help"], ["refresh", "--help"], ["--help"]):
        assert cli.run(asked) == 0
    there = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    named = set(re.findall(r"`(--[a-z-]+)", "".join(PAGES.values())))
    assert named - there == {"--limit", "--param"}, "which are Prefect's"


@pytest.mark.parametrize("page", PAGES)
def test_every_variable_that_is_named_is_read(page: str) -> None:
    ours = {
        "SEGMIND_API_KEY",
        "SEGMIND_BASE_URL",
        PREFIX,
        *(PREFIX + each.upper() for each in SegmindSettings.model_fields),
    }
    named = set(re.findall(r"\b(?:PREFECT|SEGMIND)_[A-Z0-9_]+", PAGES[page]))
    assert [each for each in sorted(named - ours) if not hasattr(prefect.settings, each)] == []


def anchors(text: str) -> set[str]:
    """The names under which GitHub has the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    links = [each for each in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if "://" not in each]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_keys_of_a_scripted_answer_are_all_there_and_no_other() -> None:
    rows = {tuple(re.findall(r"`(\w+)`", key)): meaning for key, meaning in table("sandbox", "Scripted failures")}
    assert {key for keys in rows for key in keys} == Answer.model_fields.keys()
    told = re.findall(r"`(\w+)`", rows["kind",])
    assert set(told) == set(get_args(Kind)) - {"error"}, "which is what any other status has"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_sandbox_is_told_to_fail_as_shown(sandbox: Sandbox) -> None:
    script, ledger = (each for each in commands(DOCS["sandbox"]) if "/sandbox/" in " ".join(each))

    def said(command: list[str]) -> str:
        ours = [each.replace("http://127.0.0.1:8787", sandbox.base_url.removesuffix("/v1")) for each in command]
        return subprocess.run([*ours, "-fsS"], check=True, capture_output=True, text=True, timeout=30).stdout

    said(script)
    assert [played.status for _ in range(2) if (played := sandbox.script.next_for("any"))] == [429, 502]
    assert json.loads(said(ledger))["requests"] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_every_target_of_make_that_is_named_is_there() -> None:
    named = sorted(set(re.findall(r"\bmake ([a-z-]+)(?=`|  )", README + PAGES["CONTRIBUTING.md"])))
    assert named == ["bench", "bench-quick", "check", "demo", "test", "test-faults", "test-quick"]
    for target in named:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.usefixtures("prefect_server")
def test_the_archive_looks_as_shown(sandbox: Sandbox, photo: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    made = image_to_image(str(photo), "a red mug", name="summer/hero", archive=str(archive))
    section = DOCS["paying-once"].partition("\n## The archive\n")[2].partition("\n## ")[0]
    shown = [line.split()[0] for line in section.splitlines() if line.startswith("{archive}")]
    values = {"archive": archive, "name": made.name, "short": made.fingerprint[:16], "fingerprint": made.fingerprint}
    paths = [each.replace("fingerprint[:16]", "short").format(**values) for each in shown]
    assert sorted(paths) == sorted(f"{archive}/{key}" for key in Services(archive=str(archive)).archive.store.keys(""))
    said = re.search(r"its sidecar: (.*)", section)
    assert said
    keys = json.loads(Path(made.sidecar).read_text()).keys()
    for word in said[1].split(", "):
        assert any(each.startswith(word.removesuffix("s")) or each.endswith(f"_{word}_id") for each in keys), word


def test_the_defaults_that_are_told_are_those_of_the_flows() -> None:
    flat = " ".join("".join(DOCS.values()).split())
    waits, at_once = (
        inspect.signature(each.fn).parameters[name].default
        for each, name in ((process_inbox, "settle_seconds"), (refresh_assets, "max_concurrency"))
    )
    assert (f"`--max-concurrency` requests at once ({at_once})" in flat, waits) == (True, 10)
    assert "A file is taken once it has not changed for ten seconds" in flat


def test_the_python_the_extras_and_the_licence_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in " ".join(README.split())
    installed = re.findall(r"(?:prefect-segmind|\.)\[([a-z,]+)\]\"", "".join(PAGES.values()))
    extras = {each for text in installed for each in text.split(",")}
    assert extras
    assert extras <= project["optional-dependencies"].keys()
    assert README.rstrip().endswith(f"Licence: {project['license']}.")
