"""Prefect's server as somebody runs it who follows the README: SQLite, and the two settings of the recorder."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.processes import BenchError, clean_environment, cpu_seconds

SETTINGS = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}
_IDLE = 0.1
"""Seconds of CPU in one second below which the server has nothing more to record. Its services alone take some 0.02."""


class PrefectServer:
    """A server that runs.

    Args:
        pid: The id of its process.
        api: The address of its API.
    """

    def __init__(self, pid: int, api: str) -> None:
        self._pid = pid
        self.api = api

    def cpu_seconds(self) -> float:
        """What it has used by now."""
        return cpu_seconds(self._pid)

    def settle(self, seconds: float = 90) -> None:
        """Waits until it has recorded what it was told: it does so after it has answered, and after a run has ended.

        Args:
            seconds: How long to wait at most.
        """
        end, quiet = time.monotonic() + seconds, 0
        while quiet < 3 and time.monotonic() < end:
            before = self.cpu_seconds()
            time.sleep(1)
            quiet = quiet + 1 if self.cpu_seconds() - before < _IDLE else 0


@contextmanager
def prefect_server(home: Path) -> Iterator[PrefectServer]:
    """Runs a server with an empty database.

    Args:
        home: Its folder.

    Raises:
        BenchError: It does not start.
    """
    port = _free_port()
    environment = clean_environment(**SETTINGS, PREFECT_HOME=str(home), PREFECT_SERVER_API_PORT=str(port))
    command = [sys.executable, "-m", "prefect", "server", "start"]
    home.mkdir()
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log)
    server = PrefectServer(process.pid, f"http://127.0.0.1:{port}/api")
    try:
        _wait_for(f"{server.api}/health", process, home / "server.log")
        server.settle()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise BenchError(f"Prefect's server did not start\n{log.read_text()[-2000:]}") from None
            time.sleep(0.2)
