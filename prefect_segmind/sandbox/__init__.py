"""A stand-in for the provider and for S3 on this machine: real HTTP, real S3, real pictures, no money."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import secrets
import socket
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_segmind.errors import ConfigurationError
from prefect_segmind.sandbox.answers import HANG_UP
from prefect_segmind.sandbox.drawing.picture import make_picture, sample_photo
from prefect_segmind.sandbox.history import PATH
from prefect_segmind.sandbox.s3 import REGION, S3Server
from prefect_segmind.sandbox.script import Answer, Script
from prefect_segmind.sandbox.server import SandboxApi
from prefect_segmind.storage.disk_errors import reason

__all__ = ["Answer", "Sandbox", "Script", "make_picture", "sample_photo"]

BUCKET = "segmind"

_START_SECONDS = 20.0
_STOP_SECONDS = 10.0


class Sandbox:
    """The API and an S3 server on loopback, as a context manager.

    Args:
        folder: The S3 server's objects are plain files in `folder/s3`.
        port: The API's port on 127.0.0.1; 0 for a free one.
        s3_port: The S3 server's port; 0 for a free one.
        latency: The least seconds for a picture.
        credits: The account's balance at the start, in USD.
        requests_per_minute: Further requests in a window are answered with 429; None for no limit.
        rate_window: Seconds in that window, for tests that cannot wait a minute.
        sketch: Whether to sketch pictures, at next to no CPU, for load tests.
        s3: Whether to run the S3 server, which needs the extra `sandbox`.

    Attributes:
        api_key: `SG_` and 16 random hex digits.
        base_url: For example `http://127.0.0.1:40123/v1`; empty until it is started.
        base_url_v2: The same with `/v2`.
        history_url: The address of the request history.
        folder: As given.
        ledger: The requests and what they cost.
        script: The queue of scripted answers.
        history: The request history, which can be scripted too, by `history.play`, or switched off, by `history.off`.
        s3: The S3 server, or None.

    Example:
        with Sandbox(Path("sandbox")) as sandbox:
            sandbox.play(Answer(status=429, reset_in=2))
            os.environ.update(sandbox.environment())
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        s3_port: int = 0,
        latency: float = 1.0,
        credits: Decimal | str = "10.00",
        requests_per_minute: int | None = None,
        rate_window: float = 60.0,
        sketch: bool = False,
        s3: bool = True,
    ) -> None:
        self.api_key = "SG_" + secrets.token_hex(8)
        self.base_url = self.base_url_v2 = self.history_url = ""
        self.folder = folder
        self.s3 = S3Server(folder / "s3", port=s3_port, buckets=[BUCKET]) if s3 else None
        self._port = port
        self._api = SandboxApi(
            self.api_key,
            latency=latency,
            credits=credits,
            requests_per_minute=requests_per_minute,
            rate_window=rate_window,
            sketch=sketch,
        )
        self.ledger, self.script, self.history = self._api.ledger, self._api.script, self._api.history
        self._stack = contextlib.ExitStack()

    def play(self, *answers: Answer, prompt: str | None = None) -> None:
        """Queues scripted answers; see `Script.play`."""
        self.script.play(*answers, prompt=prompt)

    def reset(self) -> None:
        """Returns to the state after the start: no requests, also none in flight, no bills, no scripts, no history.

        Raises:
            OSError: The sandbox is not running.
        """
        # As another process does it, as only the thread of the API may change what is in flight.
        connection = http.client.HTTPConnection(urlsplit(self.base_url).netloc, timeout=_STOP_SECONDS)
        with contextlib.closing(connection):
            connection.request("POST", "/sandbox/reset")
            connection.getresponse().read()

    def environment(self) -> dict[str, str]:
        """The environment variables that make this plugin and boto3 use the sandbox, and nothing else.

        The empty ones override settings in files, so that no other account is used, and charged, by mistake.
        """
        variables = {
            "SEGMIND_BASE_URL": self.base_url,
            "SEGMIND_API_KEY": self.api_key,
            "PREFECT_INTEGRATIONS_SEGMIND_CREDENTIALS_BLOCK": "",
            "PREFECT_INTEGRATIONS_SEGMIND_HISTORY_URL": "",
            "PREFECT_INTEGRATIONS_SEGMIND_OUTBOX": str(self.folder.resolve() / "outbox"),
        }
        if self.s3 is not None:
            variables |= {
                "AWS_ENDPOINT_URL_S3": self.s3.endpoint_url,
                "AWS_ACCESS_KEY_ID": self.s3.access_key,
                "AWS_SECRET_ACCESS_KEY": self.s3.secret_key,
                "AWS_SESSION_TOKEN": "",
                "AWS_DEFAULT_REGION": REGION,
                "PREFECT_INTEGRATIONS_SEGMIND_S3_BLOCK": "",
                "PREFECT_INTEGRATIONS_SEGMIND_PUBLIC_BASE_URL": "",
                "PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO": f"s3://{BUCKET}/uploads",
                "PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE": f"s3://{BUCKET}/archive",
            }
        return variables

    def __enter__(self) -> Sandbox:
        """Starts both servers.

        Raises:
            ConfigurationError: A port is taken, or rclone is not installed.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self._api.close)
            if self.s3 is not None:
                stack.enter_context(self.s3)
            self._serve(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _serve(self, stack: contextlib.ExitStack) -> None:
        """Runs the API in a thread, on a socket that is bound here, so that the port is known before it starts."""
        listener = socket.socket()
        if sys.platform != "win32":  # where it lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", self._port))
        except OSError as error:
            listener.close()
            raise ConfigurationError(f"the sandbox cannot listen on port {self._port}: {reason(error)}") from None
        # uvicorn logs scripted cuts as errors; `critical` and no log configuration keep them off the terminal.
        config = uvicorn.Config(
            self._api.app, loop="asyncio", http=_Connection, ws="none", lifespan="off", timeout_graceful_shutdown=1,
            log_config=None, log_level="critical", access_log=False,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="sandbox-api", daemon=True)

        def stop() -> None:
            server.should_exit = True
            thread.join(_STOP_SECONDS)

        stack.callback(stop)
        thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise ConfigurationError("the sandbox's API did not start")
            time.sleep(0.01)
        origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.base_url, self.base_url_v2, self.history_url = f"{origin}/v1", f"{origin}/v2", origin + PATH


class _Connection(H11Protocol):
    """A connection that the application can close without an answer, for which ASGI has no message."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, HANG_UP: transport.abort}
