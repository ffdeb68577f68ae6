"""How fast a batch is, and how much memory it takes: `refresh_assets` against the sandbox, on this machine.

    .venv/bin/python benchmarks/refresh.py speed      # 640 assets, 64 at once, 2 s each: wall time over the ideal 20 s
    .venv/bin/python benchmarks/refresh.py memory     # peak memory of 200 and of 2,000 assets

The flow, Prefect's server and the sandbox run in separate processes on this machine. Nothing is paid. The sandbox
answers with sketches, so that drawing pictures is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVER = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}

# As in the command.
TERMINAL = {"PREFECT_LOGGING_HANDLERS_CONSOLE_CLASS": "prefect_segmind.cli.terminal.QuietConsole"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "child"])
    parser.add_argument("--assets", type=int, default=640)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--latency", type=float, default=2.0)
    parser.add_argument("--archive", default="local", choices=["local", "s3"])
    given = parser.parse_args()
    if given.what == "child":
        child(given.assets, given.at_once)
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with prefect_server(home) as api, sandbox(home, given.latency if given.what == "speed" else 0.2) as environment:
            environment |= {"PREFECT_API_URL": api, "PREFECT_HOME": str(home / "prefect"), **TERMINAL}
            if given.archive == "local":
                environment["PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE"] = str(home / "archive")
            if given.what == "speed":
                ideal = given.assets * given.latency / given.at_once
                before = processor_seconds()
                found = run(environment, given.assets, given.at_once)
                busy = [after - then for after, then in zip(processor_seconds(), before, strict=True)]
                found["busy_percent"] = round(100 * busy[0] / sum(busy))
                print(f"{found['wall']:.1f} s wall, {found['wall'] / ideal:.2f} × the ideal {ideal:.1f} s; {found}")
            else:
                few, many = run(environment, 200, given.at_once), run(environment, 2000, given.at_once)
                print(f"200 assets: {few['peak_mb']:.0f} MB at the most, 2,000: {many['peak_mb']:.0f} MB; {few} {many}")


def run(environment: dict[str, str], assets: int, at_once: int) -> dict[str, float]:
    """Runs the flow in a separate process, and returns what that has measured."""
    command = [sys.executable, __file__, "child", "--assets", str(assets), "--at-once", str(at_once)]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(assets: int, at_once: int) -> None:
    """Runs and measures the flow, and prints the measurements as JSON."""
    from prefect_segmind import refresh_assets
    from prefect_segmind.sandbox import sample_photo

    folder = Path(tempfile.mkdtemp())
    (folder / "photo.jpg").write_bytes(sample_photo())
    rows = (f"{assets}/{n:05},photo.jpg,a red mug of {assets},{n + 100}\n" for n in range(assets))
    (folder / "batch.csv").write_text("name,image,prompt,seed\n" + "".join(rows))
    before, started = time.process_time(), time.monotonic()
    result = refresh_assets(str(folder / "batch.csv"), max_concurrency=at_once)
    wall = time.monotonic() - started
    assert result.generated == assets, result.sentence()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu = (time.process_time() - before) / assets * 1000
    print(json.dumps({"wall": round(wall, 2), "peak_mb": round(peak, 1), "cpu_ms_an_asset": round(cpu, 1)}))


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """Runs Prefect's server with the settings that a batch needs, and yields its address."""
    port = free_port()
    environment = {**os.environ, **SERVER, "PREFECT_HOME": str(home / "prefect"), "PREFECT_SERVER_API_PORT": str(port)}
    prefect = Path(sys.executable).with_name("prefect")
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen([prefect, "server", "start"], env=environment, stdout=log, stderr=log)
    try:
        api = f"http://127.0.0.1:{port}/api"
        wait_for(f"{api}/health")
        yield api
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def sandbox(home: Path, latency: float) -> Iterator[dict[str, str]]:
    """Runs the sandbox, and yields the environment variables that point at it."""
    port, s3_port = free_port(), free_port()
    command = [sys.executable, "-m", "prefect_segmind", "sandbox", "--folder", str(home / "sandbox"), "--sketch"]
    command += ["--port", str(port), "--s3-port", str(s3_port), "--latency", str(latency), "--credits", "100000"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    environment: dict[str, str] = {}
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if line.startswith("export "):
                name, _, value = line.removeprefix("export ").strip().partition("=")
                environment[name] = value.strip("'")
            if line.startswith("export PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE"):
                break
        yield environment
    finally:
        server.terminate()
        server.wait(30)


def processor_seconds() -> tuple[float, float]:
    """Busy and idle seconds of all processors together."""
    user, nice, system, idle, wait, *_ = map(float, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return user + nice + system, idle + wait


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(address: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address):
                return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main()
