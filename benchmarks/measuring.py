"""One batch, made in one way, and what it took."""

from __future__ import annotations

import csv
import os
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.cells import Cell
from benchmarks.prefect_server import PrefectServer, prefect_server
from benchmarks.processes import BenchError, Measured, Use, busy_seconds, clean_environment, cpu_seconds
from benchmarks.strategies import OURS, Strategy
from benchmarks.stub_api import picture
from benchmarks.stubs import ROOT, Stub

BUCKET = "bench"


@dataclass(frozen=True)
class Result:
    """What a batch took.

    Attributes:
        cell: The batch.
        strategy: The way in which it was made.
        paid: The number of requests for a picture.
        window: Seconds from the first request to the last answer, as the API's stub has seen them.
        wall: Seconds from the start of the process to its end.
        to_first_post: Seconds from the start of the process to its first request for a picture.
        cpu: Seconds of CPU of the process.
        cpu_before: Those of them before the first request.
        server_cpu: Seconds of CPU of Prefect's server; None without one.
        s3: The number of requests to S3 by method.
        peak_mb: The most memory of the process, in MB.
        late: Mean seconds by which the API's stub answered later than it should have.
        stub_busy: The CPU of the busier stub over the window: 1 is a core, which is the most that one can use.
        foreign: The share of the machine's CPU that processes took which have nothing to do with this, 0 to 1.
    """

    cell: Cell
    strategy: Strategy
    paid: int
    window: float
    wall: float
    to_first_post: float
    cpu: float
    cpu_before: float
    server_cpu: float | None
    s3: dict[str, int]
    peak_mb: float
    late: float
    stub_busy: float
    foreign: float

    @property
    def over_ideal(self) -> float:
        """The window over what the API's latency alone makes it."""
        return self.window / self.cell.ideal

    def extrapolated(self, cell: Cell) -> Result:
        """What a larger batch would take, if it went on like this, one picture after the other.

        Args:
            cell: That batch.
        """
        factor, start = cell.assets / self.cell.assets, self.wall - self.window
        return replace(
            self,
            cell=cell,
            paid=cell.assets,
            window=self.window * factor,
            wall=start + self.window * factor,
            cpu=self.cpu_before + (self.cpu - self.cpu_before) * factor,
        )


def measure(cell: Cell, strategy: Strategy, s3_latency: float) -> Result:
    """Makes a batch against stubs and, where it needs one, a server of its own with an empty database.

    Args:
        cell: The batch.
        strategy: The way in which it is made.
        s3_latency: Seconds that S3 takes for a request.

    Raises:
        BenchError: It did not end well or in time, or has made too few pictures, or ours one twice.
        OSError: A stub or the server does not answer.
    """
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        manifest = _manifest(home, cell.assets)
        server = stack.enter_context(prefect_server(home / "prefect")) if strategy.prefect else None
        first = _First()
        api = stack.enter_context(Stub("api", "--latency", str(cell.latency), on_first=first.note))
        s3 = stack.enter_context(Stub("s3", "--latency", str(s3_latency), "--bucket", BUCKET))
        on_s3 = cell.archive == "s3" and strategy.extrapolated is None  # the provider's sample knows no S3
        archive = f"s3://{BUCKET}/archive" if on_s3 else str(home / "archive")
        output = stack.enter_context((home / "output").open("w+"))
        command, environment = strategy.command(manifest, archive, cell), _environment(home, api, s3, server)
        machine, served = _Machine(), server.cpu_seconds() if server else 0.0
        limit = 60 + 3 * strategy.seconds(cell)
        with Measured(command, environment, home, output, limit) as process:
            first.pid = process.pid
            used = process.wait()
        foreign = machine.foreign()
        if server:
            server.settle()
        stats, stored = api.stats(), s3.stats()
        output.seek(0)
        _check(cell, strategy, used, posts := stats["requests"].get("POST", 0), output.read())
        window = stats["last_answer"] - stats["first_request"]
        return Result(
            cell,
            strategy,
            paid=posts,
            window=window,
            wall=used.wall,
            to_first_post=stats["first_request"] - process.began,
            cpu=used.cpu,
            cpu_before=first.cpu,
            server_cpu=server.cpu_seconds() - served if server else None,
            s3=stored["requests"],
            peak_mb=used.peak_mb,
            late=stats["mean_late_seconds"],
            stub_busy=max(stats["cpu_seconds"], stored["cpu_seconds"]) / window,
            foreign=foreign,
        )


class _First:
    """The CPU that a process had used when its first request for a picture came."""

    pid = 0
    cpu = 0.0

    def note(self) -> None:
        """Is called when it has come."""
        with suppress(FileNotFoundError, ProcessLookupError):  # it was killed
            self.cpu = cpu_seconds(self.pid)


class _Machine:
    """The machine from now on."""

    def __init__(self) -> None:
        self._began, self._busy, self._ours = time.monotonic(), busy_seconds(), cpu_seconds(os.getpid())

    def foreign(self) -> float:
        """The share of its CPU that went to processes which this one has not started, 0 to 1."""
        ours, busy = cpu_seconds(os.getpid()) - self._ours, busy_seconds() - self._busy
        return max(0.0, busy - ours) / (time.monotonic() - self._began) / (os.cpu_count() or 1)


def _manifest(home: Path, assets: int) -> Path:
    """A manifest of pictures that differ in prompt and seed, made from one image, which is beside it."""
    (home / "photo.jpg").write_bytes(picture(1200, 800, "jpeg"))
    manifest = home / "batch.csv"
    with manifest.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "image", "prompt", "seed"])
        rows.writerows([f"summer/{n:05}", "photo.jpg", f"a red mug, number {n}", 100 + n] for n in range(assets))
    return manifest


def _environment(home: Path, api: Stub, s3: Stub, server: PrefectServer | None) -> dict[str, str]:
    """The environment of a process that is measured: this checkout's code, and nothing but the stubs to talk to."""
    return clean_environment(
        PYTHONPATH=str(ROOT),
        SEGMIND_API_KEY="SG_0123456789abcdef",
        SEGMIND_BASE_URL=f"{api.url}/v1",
        PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO=f"s3://{BUCKET}/uploads",
        AWS_ENDPOINT_URL_S3=s3.url,
        AWS_ACCESS_KEY_ID="stub",
        AWS_SECRET_ACCESS_KEY="stub",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        PREFECT_HOME=str(home / "prefect-client"),
        **({"PREFECT_API_URL": server.api} if server else {}),
    )


def _check(cell: Cell, strategy: Strategy, used: Use, posts: int, said: str) -> None:
    """Checks that a process has made its batch; and that ours has paid for no picture twice.

    Raises:
        BenchError: It has not.
    """
    if used.code or posts < cell.assets or (strategy is OURS and posts > cell.assets):
        raise BenchError(f"exit code {used.code}, {posts} requests for {cell.assets} pictures\n{said[-2000:]}")
