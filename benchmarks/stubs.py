"""The stubs as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from benchmarks.stub_api import FIRST

ROOT = Path(__file__).parents[1]
"""The repository."""


class Stub:
    """A stub that runs while it is a context.

    Args:
        kind: Which one.
        arguments: Its arguments, such as `--latency`.
        on_first: Is called when the first request for a picture has reached the API.

    Attributes:
        port: Its port.
        url: Its address.
        pid: The id of its process.
    """

    def __init__(
        self, kind: Literal["api", "s3"], *arguments: str, on_first: Callable[[], None] = lambda: None
    ) -> None:
        self._stats = "/stats" if kind == "api" else "/-stats"
        self._command = [sys.executable, "-m", f"benchmarks.stub_{kind}", *arguments]
        self._on_first = on_first
        self._listener = threading.Thread(target=self._listen)

    def __enter__(self) -> Stub:
        self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url, self.pid = f"http://127.0.0.1:{self.port}", self._process.pid
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.terminate()
            self._listener.join()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == FIRST:
                self._on_first()

    def stats(self) -> dict[str, Any]:
        """Its figures."""
        with urllib.request.urlopen(self.url + self._stats) as answer:
            found: dict[str, Any] = json.load(answer)
        return found
