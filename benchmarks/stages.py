"""CPU time of the four stages without Prefect, of the sandbox's API and of its S3 server.

    .venv/bin/python benchmarks/stages.py --jobs 640 --at-once 64 --latency 2 --archive local s3

The sandbox runs in a separate process and answers with sketches, unless `--drawn`; uploads go through its S3. CPU times
are reproducible, wall times depend on the load of the machine. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import io
import logging
import multiprocessing
import os
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from PIL import Image

from prefect_segmind.archive.record import Run
from prefect_segmind.jobs.job import parse_job
from prefect_segmind.limits.admission import Gate
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.validate import InspectedSource, inspect_source, resolve
from prefect_segmind.sandbox import Sandbox, sample_photo
from prefect_segmind.services import Services

LOG = logging.getLogger("benchmarks")


@dataclass
class Stages:
    """The stages of a job.

    Attributes:
        pipeline: The pipeline, shared by all jobs.
        spent: Seconds of CPU by stage.
    """

    pipeline: Pipeline
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def walk(self, image: str, seed: int, inspected: InspectedSource | None) -> ArchivedImage:
        """Takes one job from its validation to the archive.

        Args:
            image: The source image.
            seed: The seed, which also names the job.
            inspected: The inspected source; None to inspect it for this job.

        Returns:
            The archived picture.
        """
        with self._timed("validate"):
            job = parse_job({"image": image, "prompt": "a red mug", "seed": seed, "name": f"set/{seed}"})
            validated = resolve(job, inspected or inspect_source(image, self.pipeline.reader))
        with self._timed("upload"):
            uploaded = self.pipeline.upload(validated)
        with self._timed("generate"):
            generated = self.pipeline.generate(validated, lambda: uploaded, Run(uuid.uuid4().hex), LOG)
        with self._timed("archive"):
            return self.pipeline.archiving.archive_picture(generated)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.thread_time()
        yield
        self.spent[stage] += time.thread_time() - started


def measure(
    archive: str | None, jobs: int, at_once: int, window: int, photo: Path, inspect_each: bool
) -> tuple[Stages, float]:
    """Measures a number of jobs.

    Args:
        archive: The archive; that of the settings if None.
        jobs: How many jobs.
        at_once: Requests at once, at most.
        window: Threads.
        photo: The source image.
        inspect_each: Whether to inspect the source for each job.

    Returns:
        The CPU time of the stages, and the wall time in seconds.
    """
    pipeline = Services(archive=archive).pipeline(Gate(max_concurrency=at_once))
    stages = Stages(pipeline)
    stages.walk(str(photo), 99_999, None)  # uploads the source, probes the store, does late imports
    stages.spent.clear()
    inspected = None if inspect_each else inspect_source(str(photo), pipeline.reader)
    started = time.monotonic()
    with ThreadPoolExecutor(window) as pool:
        done = list(pool.map(lambda seed: stages.walk(str(photo), seed, inspected), range(100_000, 100_000 + jobs)))
    assert {each.status for each in done} == {"generated"}
    return stages, time.monotonic() - started


def serve(folder: Path, latency: float, sketch: bool, talk: Connection) -> None:
    """Runs the sandbox: sends its environment and S3 process once, then its CPU time on each request."""
    with Sandbox(folder, latency=latency, credits="1000000", sketch=sketch) as sandbox:
        assert sandbox.s3 is not None
        talk.send((sandbox.environment(), sandbox.s3.pid))
        while talk.recv():
            talk.send(time.process_time())


def cpu_of(pid: int) -> float:
    """The CPU time of a process in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def source_photo(path: Path, size: tuple[int, int]) -> None:
    """Writes a JPEG of about a megabyte."""
    with Image.open(io.BytesIO(sample_photo())) as image:
        image.resize(size).save(path, quality=98)


def main() -> None:
    """Measures a batch for each kind of archive, and prints the results."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--jobs", type=int, default=200)
    options.add_argument("--at-once", type=int, default=64, help="requests at once")
    options.add_argument("--window", type=int, help="jobs under way, each in a thread; twice as many if left out")
    options.add_argument("--latency", type=float, default=2.0, help="seconds that a picture takes")
    options.add_argument("--archive", nargs="+", choices=("local", "s3"), default=("local", "s3"))
    options.add_argument("--drawn", action="store_true", help="real pictures of the sandbox instead of sketches")
    options.add_argument("--inspect-each", action="store_true", help="inspect the source for each job, not once")
    given = options.parse_args()
    window = given.window or 2 * given.at_once
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as home:
        photo = Path(home, "mug.jpg")
        source_photo(photo, (2400, 1600))
        talk, theirs = spawn.Pipe()
        served = spawn.Process(target=serve, args=(Path(home), given.latency, not given.drawn, theirs))
        served.start()
        environment, s3_pid = talk.recv()
        os.environ.update(environment)

        def clocks() -> tuple[float, float, float]:
            talk.send(True)
            return time.process_time(), talk.recv(), cpu_of(s3_pid)

        megabytes = photo.stat().st_size / 1e6
        print(f"{given.jobs} jobs, {given.at_once} at once, source {megabytes:.2f} MB; CPU in ms a job")
        for kind in given.archive:
            place = str(Path(home, "archive")) if kind == "local" else None
            before = clocks()
            stages, wall = measure(place, given.jobs, given.at_once, window, photo, given.inspect_each)
            here, api, s3 = (1000 * (b - a) / given.jobs for a, b in zip(before, clocks(), strict=True))
            ideal = -(-given.jobs // given.at_once) * given.latency
            each = ", ".join(f"{stage} {1000 * spent / given.jobs:.1f}" for stage, spent in stages.spent.items())
            print(f"{kind:5}  wall {wall:.1f} s" + (f" = {wall / ideal:.2f} x {ideal:.1f} s" if ideal else ""))
            print(f"       all {here + api + s3:.1f} = stages {here:.1f} + sandbox {api:.1f} + rclone {s3:.1f}")
            print(f"       stages: {each}")
        talk.send(False)
        served.join()


if __name__ == "__main__":
    main()
