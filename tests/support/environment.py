"""The wheel, and an environment in which it is installed with all that it declares: made once in a test run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

from tests.support import prefect_server
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]


def built() -> Path:
    """A folder with a wheel and an sdist, the wheel made from the sdist."""

    def build(place: Path) -> None:
        command = [sys.executable, "-m", "build", "--outdir", str(place), str(ROOT)]
        subprocess.run(command, check=True, capture_output=True)

    return _once("dist", build)


def installed() -> Path:
    """An environment with the wheel, the sandbox, and the newest of everything that they declare."""

    def install(place: Path) -> None:
        wheel = next(built().glob("*.whl"))
        venv.create(place, with_pip=True)
        command = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, f"{wheel}[sandbox]"], check=True, cwd=place)

    return _once("installed", install)


def copied(environment: Path, to: Path) -> Path:
    """A copy of an environment, whose commands run in it and not in the original."""
    shutil.copytree(environment, to, symlinks=True)
    for script in (to / "bin").iterdir():
        if script.is_file() and not script.is_symlink() and (text := script.read_bytes()).startswith(b"#!"):
            script.write_bytes(text.replace(bytes(environment), bytes(to), 1))
    return to


def _once(name: str, make: Callable[[Path], None]) -> Path:
    """What one worker makes, and the others wait for."""
    place, done = (prefect_server.folder() / each for each in (name, f"{name}-done"))
    try:
        place.mkdir()
    except FileExistsError:
        until(done.exists, 400)
    else:
        make(place)
        done.touch()
    return place
