"""What processes of this machine have used, by Linux's /proc and by the exit of a child."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

FOREIGN = ("AWS_", "PREFECT_", "SEGMIND_")
"""What of the environment would reach the processes that are measured, and may not."""


class BenchError(Exception):
    """A process that did not do what it was to do, with the end of what it has said."""


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without settings of whoever runs the benchmark: keys, profiles, servers, proxies.

    Args:
        more: Variables to add.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN) and not name.lower().endswith("_proxy") and name != "PYTHONDONTWRITEBYTECODE"
    }
    return kept | more


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process and all below it, those that have ended included.

    Args:
        pid: Its id.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    spent = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # what has just ended
            spent += sum(map(cpu_seconds, map(int, (task / "children").read_text().split())))
    return spent


def busy_seconds() -> float:
    """User and system seconds of all processes of the machine since it was started."""
    user, nice, system, *_ = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    return sum(map(int, (user, nice, system))) / os.sysconf("SC_CLK_TCK")


class Use(NamedTuple):
    """What a process has used from its start to its end, with all that it has started.

    Attributes:
        code: Its exit code.
        wall: Seconds.
        cpu: User and system seconds.
        peak_mb: The most memory that was resident at once, in MB, of the process or of one that it has started.
    """

    code: int
    wall: float
    cpu: float
    peak_mb: float


class Measured:
    """A process under measurement: started with the context, and killed with it if it has not ended.

    Args:
        command: The command line.
        environment: Its whole environment.
        folder: Its working directory.
        output: Where its output goes.
        seconds: How long it may take; then it is killed.

    Attributes:
        pid: Its id.
        began: When it was started, by `time.monotonic`.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, output: IO[str], seconds: float
    ) -> None:
        self.began = time.monotonic()
        self._process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        self.pid = self._process.pid
        self._timer = threading.Timer(seconds, self._process.kill)

    def __enter__(self) -> Measured:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()

    def wait(self) -> Use:
        """Waits for its end."""
        _, status, used = os.wait4(self.pid, 0)
        wall = time.monotonic() - self.began
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return Use(self._process.returncode, wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6)
