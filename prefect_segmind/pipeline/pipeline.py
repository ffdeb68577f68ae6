"""A job from its check to the archive in one piece, with parts that the jobs of a run share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from decimal import Decimal

from prefect_segmind.archive.record import FlowRuns
from prefect_segmind.errors import SegmindError
from prefect_segmind.jobs.job import Job
from prefect_segmind.pipeline.archive import ArchivedImage, Archiving
from prefect_segmind.pipeline.look_up import Generation
from prefect_segmind.pipeline.publish import Publisher
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.upload import UploadedImage, Uploads
from prefect_segmind.pipeline.validate import ValidatedJob, validate

KEPT = 10_000
"""Uploads that are remembered; jobs of one image mostly follow each other."""


@dataclass(frozen=True)
class Production:
    """All that jobs need on their way. Threads may share it.

    Attributes:
        reader: Reads source images.
        uploads: Puts them up.
        generation: Pays.
        archiving: Archives.
        publisher: Publishes, where that is asked for.
        price_usd: What a picture is expected to cost.
    """

    reader: SourceReader
    uploads: Uploads
    generation: Generation
    archiving: Archiving
    publisher: Publisher | None
    price_usd: Decimal
    _uploaded: dict[tuple[str, str], Future[UploadedImage]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def upload(self, job: ValidatedJob) -> UploadedImage:
        """Uploads a job's source image; one that several jobs of the run share is uploaded once.

        Raises:
            SegmindError: As `Uploads.upload`.
        """
        key, mine = (job.job.image, job.source_sha256), Future[UploadedImage]()
        while True:
            with self._lock:
                found = self._uploaded.setdefault(key, mine)
                if len(self._uploaded) > KEPT:
                    self._uploaded.pop(next(iter(self._uploaded)))
            if found is mine:
                break
            with suppress(SegmindError):  # another job's failure is no reason for this one to fail
                return found.result()
        try:
            mine.set_result(self.uploads.upload(job, self.reader))
        except BaseException as error:  # noqa: BLE001 (raised below)
            with self._lock:
                self._uploaded.pop(key, None)
            mine.set_exception(error)
        return mine.result()

    def produce(
        self,
        job: Job | ValidatedJob,
        run: str,
        flow_run_id: str | None = None,
        flow_runs: FlowRuns = (),
        *,
        say: Callable[[str], None] = print,
        warn: Callable[[str], None] = print,
        unpublished: Callable[[ArchivedImage], None] = lambda _: None,
    ) -> ArchivedImage:
        """Takes a job through all its stages.

        Args:
            job: What is asked for. One that is validated already has told its warnings.
            run: Identifies the run across its retries.
            flow_run_id: The Prefect flow run, for the sidecar.
            flow_runs: The flow run, as `Generation.generate` takes it.
            say: Takes a line for the log.
            warn: Takes a line that a person should see.
            unpublished: Takes what is archived where publishing it fails.

        Raises:
            SegmindError: In one of its classes; its `stage` says where.
        """
        with _stage("validate"):
            if isinstance(job, Job):
                job = validate(job, self.reader, price_usd=self.price_usd)
                for warning in job.warnings:
                    warn(warning)

        def upload() -> UploadedImage:
            with _stage("upload"):
                uploaded = self.upload(job)
            for warning in uploaded.warnings:
                warn(warning)
            return uploaded

        with _stage("generate"):
            generated = replace(self.generation, say=say, warn=warn).generate(job, upload, run, flow_runs)
        with _stage("archive"):
            archived = self.archiving.archive_picture(generated, flow_run_id)
        if self.publisher is None:
            return archived
        with _stage("publish"):
            try:
                return self.publisher.publish(archived, self.archiving.archive, say)
            except SegmindError:
                unpublished(archived)
                raise


@contextmanager
def _stage(name: str) -> Iterator[None]:
    try:
        yield
    except SegmindError as error:
        error.stage = error.stage or name
        raise


shared: ContextVar[Production | None] = ContextVar("segmind_production", default=None)
"""What the assets of a batch share, opened once for all of them: S3, uploads, and the gate of their requests."""
