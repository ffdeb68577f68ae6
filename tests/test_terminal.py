"""What a command prints, in real processes: an output that cannot be written or encoded never fails what was done."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL

from prefect_segmind import cli, outcome
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.terminal import UnfailingStream

PROMPT = "Kaffee ☕ für alle"
BARE = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def command(
    *arguments: str | bytes, home: Path, stdout: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Runs the installed command in a process of its own, against the tests' Prefect server if there is one."""
    server = {"PREFECT_API_URL": url} if (url := PREFECT_API_URL.value()) else {}
    return subprocess.run(
        [str(Path(sys.executable).with_name("prefect-segmind")), *arguments],
        env={**os.environ, **server, "PREFECT_HOME": str(home / "prefect"), **environment},
        cwd=home,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=240,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("environment", "encoding", "shown"),
    [
        (BARE, "ascii", "caf?/f?r"),
        ({"PYTHONIOENCODING": "ascii"}, "ascii", "caf?/f?r"),
        ({"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}, "cp1252", "café/für"),
    ],
    ids=["C locale", "ascii", "cp1252"],
)
def test_a_picture_that_is_made_is_a_success_in_whatever_encoding_it_is_told(
    sandbox: Sandbox, photo: Path, tmp_path: Path, environment: dict[str, str], encoding: str, shown: str
) -> None:
    image = photo.rename(photo.with_name("Für ☕.jpg"))
    sandbox.play(Answer(status=502, body='{"error": "später ☕"}'))
    arguments = ("generate", str(image), PROMPT, "--name", "café/für")
    done = command(*arguments, home=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout.decode(encoding)
    assert "the API answered 502" in done.stderr.decode(encoding)
    assert {each.prompt for each in sandbox.ledger.requests if each.prompt} == {PROMPT}
    again = command(*arguments, "--json", home=tmp_path, **environment)
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout.decode(encoding))
    assert (told["status"], told["name"]) == ("reused", "café/für")


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["people", "json"])
def test_a_batch_that_is_done_is_a_success_though_nobody_reads_it_or_the_disk_is_full(
    sandbox: Sandbox, photo: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "campaign.csv").write_text("name,image,prompt\n" + "".join(f"é{n},mug.jpg,a mug\n" for n in range(3)))
    read, write = os.pipe()
    os.close(read)
    try:
        done = command("refresh", "campaign.csv", *options, home=tmp_path, stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, b"Traceback" in done.stderr, b"Broken pipe" in done.stderr) == (0, False, False)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        done = command("refresh", "campaign.csv", *options, home=tmp_path, stdout=full)
    finally:
        os.close(full)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert b"standard output cannot be written: No space left on device" in done.stderr
    assert sandbox.ledger.billed == 1


def test_what_was_wrong_keeps_its_exit_code_though_nobody_reads_it(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = command("generate", "--json", home=tmp_path, stdout=write)
    finally:
        os.close(write)
    assert done.returncode == outcome.BAD_INPUT, done.stderr


@pytest.mark.parametrize("arguments", [["generate", "caf\udce9.jpg", "x"], ["refresh", "x\udce9.yaml"]])
def test_an_argument_that_is_no_text_is_bad_input_and_not_a_failure(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*arguments, "--json"]) == outcome.BAD_INPUT
    assert "is not text in the encoding" in json.loads(capsys.readouterr().out)["error"]


def test_lone_surrogates_and_what_the_encoding_lacks_are_replaced() -> None:
    for encoding, shown in {"utf-8": "☕?é", "latin-1": "??é", "ascii": "???"}.items():
        buffer = io.BytesIO()
        stream = UnfailingStream(io.TextIOWrapper(buffer, encoding), "standard output")
        print("☕\udcffé", end="", file=stream)  # type: ignore[arg-type]
        stream.flush()
        assert buffer.getvalue().decode(encoding) == shown
