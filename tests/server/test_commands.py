"""The command line, as people and scripts see it: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import certifi
import httpx
import pytest

from prefect_segmind import __version__
from prefect_segmind.__main__ import main
from prefect_segmind.cli import commands, output
from prefect_segmind.credentials import load_credentials
from prefect_segmind.errors import ConfigurationError
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from tests.support.ports import listens
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_server")
KEYS = {
    *("status", "name", "image", "sidecar", "fingerprint", "sha256", "width", "height", "seed"),
    *("cost_usd", "possibly_billed_usd", "attempts", "published"),
}


def generate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Runs `generate … --json`; standard output must be one JSON object and nothing else."""
    capsys.readouterr()
    code = commands.run(["generate", *arguments, "--json"])
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found.keys() == (KEYS if code == 0 else KEYS | {"error"})
    return code, found, told.err


def test_json_tells_a_generated_picture_and_then_a_reused_one(
    sandbox: Sandbox, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, first, _ = generate(capsys, str(photo), "a red mug")
    assert (code, first["status"], first["name"], first["attempts"]) == (0, "generated", "mug", 1)
    assert (first["cost_usd"], first["possibly_billed_usd"]) == ("0.05", "0.00")
    assert (first["width"], first["height"]) == (1024, 1024)
    assert first["image"].startswith("s3://")
    assert first["sidecar"].endswith(".json")
    code, second, _ = generate(capsys, str(photo), "a red mug")
    assert (code, second["status"], second["cost_usd"], second["attempts"]) == (0, "reused", "0.00", 0)
    assert second["sha256"] == first["sha256"]


def test_every_parameter_of_the_api_has_an_option(
    sandbox: Sandbox, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "--name": "spring/hero",
        "--image-weight": "70",
        "--style-type": "DESIGN",
        "--resolution": "RESOLUTION_640_1024",
        "--seed": "4711",
        "--magic-prompt-option": "OFF",
        "--negative-prompt": "text",
        "--archive": str(tmp_path / "archive"),
        "--upload-to": os.environ["PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO"] + "/here",
        "--on-unknown": "fail",
    }
    code, found, _ = generate(capsys, str(photo), "a hat", *(part for each in options.items() for part in each))
    assert (code, found["seed"], found["width"], found["name"]) == (0, 4711, 640, "spring/hero")
    sidecar = json.loads(Path(found["sidecar"]).read_text())
    (attempt,) = sidecar["attempt_log"]
    assert attempt.keys() == {"sent_at", "status", "reason", "wait_seconds", "possibly_billed"}
    assert (attempt["status"], attempt["possibly_billed"]) == (200, False)
    assert sidecar["request"].pop("image_file").startswith(options["--upload-to"] + "/")
    assert sidecar["request"] == {
        "prompt": "a hat",
        "image_weight": 70,
        "style_type": "DESIGN",
        "resolution": "RESOLUTION_640_1024",
        "seed": 4711,
        "magic_prompt_option": "OFF",
        "negative_prompt": "text",
    }


def test_a_local_image_without_a_place_to_upload_to_is_bad_input_and_says_what_to_set(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO")
    code, found, told = generate(capsys, str(photo), "a red mug")
    assert (code, found["status"], found["cost_usd"]) == (output.BAD_INPUT, "failed", "0.00")
    for name in ("--upload-to", "PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO"):
        assert name in found["error"]
    assert "This run paid nothing." in told


@pytest.mark.many
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such.jpg", "a mug"], "no-such.jpg does not exist"),
        (["PHOTO", "a mug", "--style-type", "realistic"], "Did you mean REALISTIC?"),
        (["PHOTO", "a mug", "--resolution", "RESOLUTION_800_1280"], "Did you mean RESOLUTION_768_1280?"),
        (["PHOTO", "a mug", "--seed", "5"], "Did you mean 100?"),
        (["PHOTO", "a mug", "--seed", "soon"], "seed: 'soon' is not allowed"),
        (["PHOTO", "a mug", "--image-weight", "heavy"], "heavy"),
        (["PHOTO"], "PROMPT"),
        (["PHOTO", "a mug", "--no-such-option", "1"], "no-such-option"),
        (["PHOTO", "a mug", "--on-unknown", "hope"], "hope"),
        (["PHOTO", "a mug", "--name", "../escape"], "name: '../escape' is not allowed"),
        (["PHOTO", "a mug", "--archive", "ftp://somewhere"], "ftp://somewhere"),
        (["PHOTO", "a mug", "--block", "nobody"], "nobody"),
        (["https://x.example/a.jpg?X-Amz-Signature=abc", "a mug"], "holds a secret"),
    ],
)
def test_bad_input_is_exit_code_2_and_reaches_nobody(
    sandbox: Sandbox, photo: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, _ = generate(capsys, *(str(photo) if each == "PHOTO" else each for each in arguments))
    assert (code, found["status"]) == (output.BAD_INPUT, "failed")
    assert said in found["error"]
    assert sandbox.ledger.requests == ()


@pytest.mark.many
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        *[(Answer(status=each), output.FAILED) for each in (400, 405, 422, 500)],
        *[(Answer(status=each), output.ACCOUNT_REFUSED) for each in (401, 403, 404, 410)],
        (Answer(status=406, body='{"error": "Insufficient credits: balance 0.01, need 0.05"}'), output.NO_MONEY),
        (Answer(status=406, body='{"error": "Invalid value for parameter style_type"}'), output.FAILED),
        (Answer(status=406, body='{"error": "Content-Type must be application/json"}'), output.FAILED),
        (Answer(kind="html"), output.FAILED),
    ],
    ids=lambda each: str(each.status) if isinstance(each, Answer) else str(each),
)
def test_exit_codes_tell_the_account_from_the_money_from_the_rest(
    sandbox: Sandbox, photo: Path, answer: Answer, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    sandbox.play(answer)
    got, found, _ = generate(capsys, str(photo), "a red mug")
    assert (got, found["attempts"], found["possibly_billed_usd"]) == (code, 1, "0.00")
    assert found["cost_usd"] == ("0.05" if answer.kind == "html" else "0.00"), "what was answered whole is paid for"
    assert found["fingerprint"]


def test_an_answer_that_is_no_picture_is_named_by_its_full_path_and_recovered_once_it_can_be_read(
    sandbox: Sandbox, photo: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    link = f"{sandbox.base_url}/results/gone.jpg?X-Amz-Signature=feedbeef"
    sandbox.play(Answer(kind="error", status=200, body=json.dumps({"image_url": link})))
    code, found, err = generate(capsys, str(photo), "a red mug")
    (kept,) = Path(os.environ["PREFECT_INTEGRATIONS_SEGMIND_OUTBOX"]).rglob("*.answer")
    assert (code, found["cost_usd"], found["possibly_billed_usd"]) == (output.FAILED, "0.05", "0.00")
    assert str(kept) in found["error"]
    assert link in kept.read_text()
    code, refused, more = generate(capsys, str(photo), "a red mug", "--on-unknown", "fail")
    assert (code, refused["cost_usd"], sandbox.ledger.billed) == (output.FAILED, "0.00", 1)
    assert str(kept) in refused["error"]
    assert "feedbeef" not in err + more + caplog.text + json.dumps([found, refused])
    kept.write_bytes(photo.read_bytes())  # as if the link had come to life
    code, again, _ = generate(capsys, str(photo), "a red mug", "--on-unknown", "fail")
    assert (code, again["status"], again["cost_usd"], again["attempts"]) == (output.DONE, "recovered", "0.00", 0)
    assert sandbox.ledger.billed == 1


def test_an_archive_that_fails_after_the_answer_tells_what_was_paid_and_where_the_picture_is(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "archive"
    (archive / "mug").mkdir(parents=True)
    put = Services(archive=str(archive)).archive.store.__class__.put

    def full(self: Any, key: str, *arguments: Any, **options: Any) -> str:
        if not key.startswith(".segmind"):
            from prefect_segmind.errors import StoreError

            raise StoreError("the disk of the archive is full")
        return put(self, key, *arguments, **options)

    with monkeypatch.context() as now:
        now.setattr("prefect_segmind.storage.local.LocalStore.put", full)
        code, found, told = generate(capsys, str(photo), "a red mug", "--archive", str(archive))
    assert (code, found["cost_usd"], found["attempts"]) == (output.FAILED, "0.05", 1)
    assert str(tmp_path / "outbox") in found["error"]
    assert "Paid: 0.05 USD" in told
    code, found, _ = generate(capsys, str(photo), "a red mug", "--archive", str(archive))
    assert (code, found["status"], found["cost_usd"]) == (0, "recovered", "0.00")
    assert sandbox.ledger.billed == 1


def test_people_get_a_few_lines_and_no_traceback_unless_they_ask(
    sandbox: Sandbox, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run(["generate", str(photo), "a red mug"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"generated +mug\n", out)
    assert "0.05 USD in 1 request\n" in out
    sandbox.play(Answer(status=502), Answer(status=502))
    assert commands.run(["generate", str(photo), "another mug", "--verbose"]) == output.FAILED
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "possibly billed: 0.10 USD" in err


def test_an_interrupt_before_a_request_does_not_speak_of_a_bill(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "image_to_image", interrupted)
    code, found, told = generate(capsys, str(photo), "a red mug")
    assert code == 130
    assert found["error"] == "interrupted; the same command again goes on from here"
    assert found["error"] in told


def test_an_interrupt_while_the_api_works_tells_what_may_have_been_paid(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*what: Any) -> None:
        before_sending = what[-1]
        before_sending()
        raise KeyboardInterrupt

    with monkeypatch.context() as now:
        now.setattr("prefect_segmind.api.client.SegmindClient.generate", interrupted)
        code, found, told = generate(capsys, str(photo), "a red mug")
    assert (code, found["attempts"], found["possibly_billed_usd"]) == (130, 1, "0.05")
    assert found["fingerprint"]
    assert found["error"].startswith("interrupted; a request that was under way may be billed")
    assert "the same command again" in told
    assert "possibly billed: 0.05 USD" in told


@pytest.mark.parametrize("by", ["SIGTERM", "SIGHUP"])
def test_an_interrupt_names_the_signal(
    sandbox: Sandbox, photo: Path, by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "image_to_image", lambda **_: signal.raise_signal(signal.Signals[by]))
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        code, found, told = generate(capsys, str(photo), "a red mug")
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert code == 130
    assert found["error"] == f"interrupted; the same command again goes on from here (it was ended by {by})"
    assert found["error"] in told


def test_an_interrupt_before_a_command_has_begun_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupted)
    with patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == output.INTERRUPTED


def test_check_says_ok_for_all_that_works(sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["check"]) == 0
    out = capsys.readouterr().out
    for title in ("key and credits", "API version", "upload place", "versions", "Prefect server"):
        assert re.search(rf"^ok +{title}: ", out, re.M), out
    assert re.search(r"^mind archive: .* ignores conditional writes", out, re.M)
    assert sandbox.ledger.billed == 0


def test_check_says_for_each_thing_that_does_not_work_what_to_do(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEGMIND_API_KEY", "SG_0000000000000000")
    monkeypatch.delenv("PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", "s3://no-such-bucket/x")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX", str(tmp_path / "file"))
    assert commands.run(["check"]) == output.ACCOUNT_REFUSED
    out = capsys.readouterr().out
    for title, remedy in {
        "key and credits": "set SEGMIND_API_KEY",
        "upload place": "set PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO",
        "archive": "create it",
        "outbox": "set PREFECT_INTEGRATIONS_SEGMIND_OUTBOX",
    }.items():
        assert re.search(rf"^bad +{title}: .*{remedy}", out, re.M), out


def test_check_tells_whether_the_request_history_can_be_read_and_what_to_do(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history = "PREFECT_INTEGRATIONS_SEGMIND_HISTORY_URL"

    def line() -> tuple[int, str]:
        code = commands.run(["check"])
        return code, next(each for each in capsys.readouterr().out.splitlines() if " request history: " in each)

    code, told = line()
    assert (code, told.split()[0]) == (output.DONE, "mind")
    assert f"switched off by {history}" in told
    monkeypatch.setenv(history, "")
    assert line() == (output.DONE, f"ok   request history: can be read ({sandbox.history_url})")
    monkeypatch.setenv(history, sandbox.history_url + "-gone")
    code, told = line()
    assert (code, told.split()[0]) == (output.FAILED, "bad")
    assert "404" in told
    assert history in told
    monkeypatch.setenv(history, "")
    monkeypatch.setenv("SEGMIND_BASE_URL", "https://gateway.example/v1")
    _, told = line()
    assert told.startswith("mind request history: none is known for https://gateway.example/v1")
    assert f"set {history}" in told


def test_check_tells_the_version_of_the_api_and_when_v2_is_the_better_choice(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.run(["check"])
    assert re.search(r"^ok +API version: v1 .* end SEGMIND_BASE_URL in /v2", capsys.readouterr().out, re.M)
    monkeypatch.setenv("SEGMIND_BASE_URL", sandbox.base_url_v2)
    assert commands.run(["check"]) == output.DONE
    out = capsys.readouterr().out
    assert re.search(r"^ok +API version: v2 .* the next run fetches", out, re.M)
    assert re.search(r"^ok +key and credits: ", out, re.M), "credits are asked of v1"
    monkeypatch.setenv("SEGMIND_BASE_URL", sandbox.base_url.replace("/v1", "/v3"))
    commands.run(["check"])
    assert re.search(r"^mind +API version: .*/v3 names none: end .* in /v1 or in /v2", capsys.readouterr().out, re.M)


def test_check_finds_an_upload_place_whose_signed_addresses_cannot_be_read(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_PUBLIC_BASE_URL", sandbox.base_url)
    assert commands.run(["check"]) == output.FAILED
    assert re.search(r"^bad +upload place: .* answers 404", capsys.readouterr().out, re.M)


def test_check_tells_versions_that_break_prefect(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("prefect_segmind.cli.check.version", lambda name: {"sqlalchemy": "2.1.0"}.get(name, "0"))
    assert commands.run(["check"]) == output.BAD_INPUT
    assert re.search(r"^bad +versions: .*pip install", capsys.readouterr().out, re.M)


def test_check_says_which_way_the_api_is_reached(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", certifi.where())
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost,::1")
    commands.run(["check"])
    assert "the API is reached directly, with the certificates of SSL_CERT_FILE" in capsys.readouterr().out
    monkeypatch.setenv("SEGMIND_BASE_URL", "https://api.example/v1")
    commands.run(["check"])
    assert "the API is reached through the proxy of the environment" in capsys.readouterr().out


def test_check_minds_an_outbox_that_dies_with_its_container(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("prefect_segmind.cli.check._in_container", lambda: True)
    monkeypatch.setattr("os.path.ismount", lambda path: False)
    commands.run(["check"])
    assert re.search(r"^mind outbox: .* mount a volume there", capsys.readouterr().out, re.M)


def test_help_and_version_cost_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert commands.run(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--image-weight", "--name", "--archive", "--upload-to", "--block", "--json", "--on-unknown"):
        assert option in out


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the installed command in a process of its own."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("prefect-segmind")), *arguments],
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_generate_works_with_no_server_configured_and_its_standard_output_is_only_json(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command("generate", str(photo), "a red mug", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "generated"
    sandbox.play(Answer(status=500))
    monkeypatch.delenv("PREFECT_API_URL")  # Prefect starts a temporary server, with a database of its own
    failed = command("generate", str(photo), "a hat", "--json", cwd=tmp_path, PREFECT_HOME=str(tmp_path / "prefect"))
    assert (tmp_path / "prefect" / "prefect.db").is_file()
    assert failed.returncode == output.FAILED
    assert json.loads(failed.stdout)["status"] == "failed"
    assert "Traceback" not in failed.stderr
    assert failed.stderr.count("the API answered 500") == 1
    assert "INFO" not in failed.stderr
    assert re.search(r"in the UI: .*prefect .*server start, then http://127.0.0.1:4200/runs/flow-run/", failed.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "a hang-up"])
def test_the_sandbox_prints_exports_that_point_the_plugin_at_it(photo: Path, tmp_path: Path, how: str) -> None:
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("prefect-segmind")), "sandbox", "--port", "0", "--s3-port", "0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        told = ""
        while "SEGMIND_ARCHIVE=" not in told:
            told += process.stdout.readline()
        exports = {name: shlex.split(value)[0] for name, value in re.findall(r"^export (\w+)=(.+)$", told, re.M)}
        done = command("generate", str(photo), "a red mug", "--json", cwd=tmp_path, **exports)
        assert json.loads(done.stdout)["status"] == "generated"
        ledger = httpx.get(exports["SEGMIND_BASE_URL"].removesuffix("/v1") + "/sandbox/ledger").json()
        assert ledger["billed"] == 1
    finally:
        process.send_signal(signal.SIGHUP if how == "a hang-up" else signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert "1 pictures billed" in out
    assert process.returncode == 0
    port = httpx.URL(exports["AWS_ENDPOINT_URL_S3"]).port
    assert port
    until(lambda: not listens(port), 10, why=lambda: "the S3 server outlives the sandbox")


def test_the_sandbox_is_used_even_where_a_file_names_another_account(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A demo must never pay from the account that a project's `prefect.toml` names."""
    (tmp_path / "prefect.toml").write_text('[integrations.segmind]\ncredentials_block = "production"\n')
    monkeypatch.chdir(tmp_path)
    assert load_credentials().base_url == sandbox.base_url
    monkeypatch.delenv("PREFECT_INTEGRATIONS_SEGMIND_CREDENTIALS_BLOCK")
    with pytest.raises(ConfigurationError, match="production"):
        load_credentials()


@pytest.mark.slow
def test_a_prefect_server_that_does_not_answer_is_named_with_its_setting(sandbox: Sandbox, photo: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect_segmind", "generate", str(photo), "a red mug"],
        env={**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == output.FAILED
    assert "PREFECT_API_URL: Prefect's server at http://127.0.0.1:9/api does not answer: start it" in done.stderr
    assert sandbox.ledger.billed == 0
