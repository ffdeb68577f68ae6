"""One real Prefect server for all workers of a test run: the first test that needs it starts it.

Where it will listen is decided before Prefect is imported, and stands in PREFECT_API_URL from then on. So all settings
and all processes that the tests start agree on it, and none starts a temporary server of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx

from tests.support.ports import free_port
from tests.support.waiting import until

FOLDER = "PREFECT_SEGMIND_TEST_RUN"
"""The variable with the folder that the workers of a run share."""
HOMES = "PREFECT_SEGMIND_TEST_HOMES"
"""The variable with the folder of Prefect's homes, and so of its databases."""
MEMORY = Path("/dev/shm")
ROOM_BYTES = 2_000_000_000
"""The free space in memory without which the databases are on disk."""

SERVER = """
import os, runpy, signal, sys, threading, time

def end_with_the_run(run):
    try:
        while True:
            os.kill(run, 0)
            time.sleep(1)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_the_run, args=(int(sys.argv.pop()),), daemon=True).start()
runpy.run_module("prefect", run_name="__main__", alter_sys=True)
"""


def prepare() -> None:
    """Decides, once for all workers, where the server keeps its files and where it listens.

    Its database is in memory where there is room, so that a disk that is slow to sync keeps no writer waiting.
    """
    folder = tempfile.mkdtemp(prefix="prefect-segmind-tests-")
    in_memory = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM_BYTES
    os.environ |= {
        FOLDER: folder,
        HOMES: tempfile.mkdtemp(prefix="prefect-segmind-tests-", dir=MEMORY if in_memory else folder),
        "PREFECT_SEGMIND_TEST_RUN_PID": str(os.getpid()),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        # SQLite waits for a lock for 60 s, and Prefect's clients for an answer as long: they would ask again for what
        # is done, and a state that is set twice uses a retry of a flow.
        "PREFECT_API_REQUEST_TIMEOUT": "240",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def folder() -> Path:
    """What the workers of this run share."""
    return Path(os.environ[FOLDER])


def homes() -> Path:
    """Where the server and the workers of this run have their PREFECT_HOME."""
    return Path(os.environ[HOMES])


def home() -> Path:
    """The server's PREFECT_HOME, with its database and its log."""
    return homes() / "server"


def start() -> None:
    """Starts the server unless another worker has, and waits until it answers."""
    with suppress(FileExistsError):
        home().mkdir()
        _start()
    until(_healthy, 180, why=lambda: (home() / "log").read_text())


def _start() -> None:
    url = httpx.URL(os.environ["PREFECT_API_URL"])
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {
        "PREFECT_HOME": str(home()),
        "PREFECT_SERVER_API_PORT": str(url.port),
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_UI_URL": "https://prefect.example.com",  # which the server names in the messages of automations
        # As the documentation has it for whoever runs a server: it keeps up with many task runs.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    }
    with (home() / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, "server", "start", environment["PREFECT_SEGMIND_TEST_RUN_PID"]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C ends the tests first, then the server
        )
    (home() / "pid").write_text(str(process.pid))


def _healthy() -> bool:
    try:
        return httpx.get(os.environ["PREFECT_API_URL"] + "/health", trust_env=False).is_success
    except httpx.HTTPError:
        return False


def stop() -> None:
    """Ends the server if there is one, and removes what the run has shared."""
    with suppress(FileNotFoundError, ProcessLookupError):
        pid = int((home() / "pid").read_text())
        for how in (signal.SIGTERM, signal.SIGKILL):
            os.kill(pid, how)
            end = time.monotonic() + 10
            while time.monotonic() < end:
                with suppress(ChildProcessError):  # it is the child of a worker that has ended
                    os.waitpid(pid, os.WNOHANG)
                os.kill(pid, 0)
                time.sleep(0.05)
    for each in (homes(), folder()):
        shutil.rmtree(each, ignore_errors=True)
