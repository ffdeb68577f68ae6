"""What a command prints, in real processes: an output that cannot be written or encoded never fails what was done."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from prefect_segmind.cli import commands, output
from prefect_segmind.cli.streams import UnfailingStream
from prefect_segmind.sandbox import Answer, Sandbox

PROMPT = "Kaffee ☕ für alle"
BARE = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def command(
    *arguments: str | bytes, home: Path, stdout: int = subprocess.PIPE, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs the installed command in a process of its own."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("prefect-segmind")), *arguments],
        env={**os.environ, **(environment or {})},
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
    done = command(*arguments, home=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout.decode(encoding)
    assert "the API answered 502" in done.stderr.decode(encoding)
    assert {each.prompt for each in sandbox.ledger.requests if each.prompt} == {PROMPT}
    again = command(*arguments, "--json", home=tmp_path, environment=environment)
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


def on_a_terminal(*arguments: str, home: Path, width: int, **environment: str) -> tuple[int, list[str]]:
    """Runs the command on a terminal of its own.

    Returns:
        Its exit code, and the lines that are on the screen when it has ended.
    """
    mine, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("prefect-segmind")), *arguments],
        env={**os.environ, "TERM": "xterm", **environment},
        cwd=home,
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    written = b""
    with suppress(OSError):  # the other end is closed
        while some := os.read(mine, 65_536):
            written += some
    os.close(mine)
    return process.wait(60), screen(written.decode(), width)


def screen(written: str, width: int) -> list[str]:
    """What a terminal shows in the end: it knows lines, carriage returns, cursor up, erasing a line, and colours."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
        elif part.startswith("\x1b["):
            if part.endswith("A"):
                row -= int(part[2:-1] or 1)
            elif part.endswith("K"):
                lines[row] = ""
        else:
            for character in part:
                if column == width:
                    row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
                lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
                column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("width", [80, 120])
def test_a_batch_leaves_warnings_what_came_of_it_and_its_address_on_the_screen_and_each_error_once(
    sandbox: Sandbox, photo: Path, tmp_path: Path, width: int
) -> None:
    rows = "".join(f"mug/{n},mug.jpg,a mug number {n},AUTO\n" for n in range(6)) + "lost,lost.jpg,x,AUTO\n"
    (tmp_path / "campaign.csv").write_text("name,image,prompt,resolution\n" + rows)
    sandbox.play(Answer(status=422, body='{"error": "no such mug"}'), prompt="number 1")
    sandbox.play(Answer(status=502), prompt="number 2")
    code, lines = on_a_terminal("refresh", "campaign.csv", "--max-concurrency", "2", home=tmp_path, width=width)
    shown = "\n".join(lines)
    assert code == output.FAILED, shown
    assert re.match(r"\d\d:\d\d:\d\d request 1 of mug/2 failed and may have been billed: ", lines[0]), shown
    assert not [line for line in lines if re.search(r".\d\d:\d\d:\d\d ", line)], shown
    whole = "".join(lines)
    for text, times in {
        **{"the API answered 502": 1, "the API answered 422": 1, "lost.jpg does not exist": 1, "/runs/flow-run/": 1},
        **{"7 assets: 5 generated, 2 failed; paid 0.25 USD": 1},
        **{"planning": 0, "━": 0, "INFO": 0, "ERROR": 0, "Failed(": 0, "Traceback": 0},
    }.items():
        # Where a long line is broken, the blank at the break may be gone.
        assert whole.replace(" ", "").count(text.replace(" ", "")) == times, f"{text}\n{shown}"


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_one_picture_is_told_in_a_few_lines_of_which_none_is_about_how_prefect_works(
    sandbox: Sandbox, photo: Path, tmp_path: Path
) -> None:
    arguments = ("generate", str(photo), "a mug", "--resolution", "AUTO")
    code, lines = on_a_terminal(*arguments, home=tmp_path, width=120)
    assert code == 0, lines
    assert [line.split()[0] for line in lines] == [*("generated", "picture", "sidecar", "size,", "paid", "in")], lines
    code, lines = on_a_terminal(*arguments, "--verbose", home=tmp_path, width=120)
    assert code == 0
    assert any("Beginning flow run" in line for line in lines), "--verbose brings all of Prefect's log back"
    assert all("━" not in line for line in lines)


def test_what_was_wrong_keeps_its_exit_code_though_nobody_reads_it(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = command("generate", "--json", home=tmp_path, stdout=write)
    finally:
        os.close(write)
    assert done.returncode == output.BAD_INPUT, done.stderr


@pytest.mark.parametrize("arguments", [["generate", "caf\udce9.jpg", "x"], ["refresh", "x\udce9.yaml"]])
def test_an_argument_that_is_no_text_is_bad_input_and_not_a_failure(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run([*arguments, "--json"]) == output.BAD_INPUT
    assert "is not text in the encoding" in json.loads(capsys.readouterr().out)["error"]


def test_a_standard_stream_that_was_closed_takes_what_a_child_prints_and_no_file_gets_its_number(
    tmp_path: Path,
) -> None:
    code = """
import subprocess
from prefect_segmind.cli.streams import unfailing_output
with unfailing_output(), open("file", "wb"):
    subprocess.run(["sh", "-c", "echo told"], check=True)
"""
    subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "file").read_bytes() == b""


def test_lone_surrogates_and_what_the_encoding_lacks_are_replaced() -> None:
    for encoding, shown in {"utf-8": "☕?é", "latin-1": "??é", "ascii": "???"}.items():
        buffer = io.BytesIO()
        stream = UnfailingStream(io.TextIOWrapper(buffer, encoding), "standard output")
        print("☕\udcffé", end="", file=stream)
        stream.flush()
        assert buffer.getvalue().decode(encoding) == shown
