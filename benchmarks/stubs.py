"""The stubs as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Literal

from benchmarks.stub_api import FIRST

ROOT = Path(__file__).parents[1]


class Stub:
    """A stub that runs while it is a context.

    Args:
        kind: Which one.
        arguments: Its arguments, such as `--latency`.

    Attributes:
        port: Its port.
        url: Its address.
    """

    def __init__(self, kind: Literal["api", "s3"], *arguments: str) -> None:
        self._kind = kind
        self._command = [sys.executable, "-m", f"benchmarks.stub_{kind}", *arguments]

    def __enter__(self) -> Stub:
        # Not from this process's folder: a benchmark may be started anywhere.
        self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def wait_for_the_first_request(self) -> bool:
        """Waits until a picture has been asked for; False if the stub has ended without."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip() == FIRST

    def stats(self) -> dict[str, Any]:
        """Its figures."""
        with urllib.request.urlopen(f"{self.url}/{'stats' if self._kind == 'api' else '-stats'}") as answer:
            found: dict[str, Any] = json.load(answer)
        return found
