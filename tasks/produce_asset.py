"""One task run for one asset, from validation to publishing: the same stages as the single tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled

from prefect_segmind.archive.record import OnKept, OnUnknown
from prefect_segmind.errors import NotStartedError, SegmindError
from prefect_segmind.jobs.job import Job, parse_job
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.reporting import events
from prefect_segmind.services import Services
from prefect_segmind.tasks.failures import failures_reported
from prefect_segmind.tasks.left_over import archive_what_is_left_over
from prefect_segmind.tasks.retry_delays import ServerPacedDelays, retry_if_decided, retry_in_batch_if_decided
from prefect_segmind.tasks.run_context import open_pipeline, run_logger, run_name, this_run, with_seed


@task(
    task_run_name=run_name,
    retries=RetryPolicy().retries,
    retry_delay_seconds=ServerPacedDelays(),
    retry_condition_fn=retry_if_decided,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def produce_asset(
    job: Job | ValidatedJob | Mapping[str, Any],
    archive: str | None = None,
    upload_to: str | None = None,
    credentials_block: str | None = None,
    on_unknown: OnUnknown = "repay",
    publish_to: str | None = None,
    on_kept: OnKept = "wait",
) -> ArchivedImage:
    """Validates, uploads, generates, archives and publishes one asset in one task run.

    Args:
        job: A `Job`, its fields as a mapping, or a validated job.
        archive: `s3://bucket/prefix` or a folder; the setting if left out.
        upload_to: `s3://bucket/prefix`; the setting if left out.
        credentials_block: Name of a `SegmindCredentials` block; the settings or the environment if left out.
        on_unknown: Whether to send another request (`repay`) or not (`fail`) after one that may have been billed.
        publish_to: `s3://bucket/live`, a folder or a pattern; not published if left out.
        on_kept: Whether to wait or to pay once more (repay) for a picture that is paid for and lies in the outbox of
            another machine.

    Raises:
        SegmindError: In one of its classes; its `stage` is the stage that failed.
    """
    services = Services(
        archive=archive, upload_to=upload_to, publish_to=publish_to, credentials_block=credentials_block
    )
    with failures_reported(job), open_pipeline(services, on_unknown, on_kept) as pipeline:
        if isinstance(job, Mapping):
            job = parse_job(job, allow_unlisted_resolution=services.settings.allow_unlisted_resolution)
        archived = _produce(job, pipeline)
    archive_what_is_left_over(services)
    return archived


class _Errand:
    """An asset on its way through a task run, and what comes of it.

    Prefect looks through all that a task is given, and all that it returns, for results of other runs. It finds nothing
    to look through in an object like this.
    """

    def __init__(self, job: Job | ValidatedJob) -> None:
        self.job = job
        self.name = job.name
        self.archived: ArchivedImage | None = None
        self.stopped: NotStartedError | None = None


def task_of_batch(pipeline: Pipeline, policy: RetryPolicy) -> Callable[[Job | ValidatedJob], ArchivedImage]:
    """What produces an asset of a batch, in a task run over the batch's pipeline.

    Args:
        pipeline: The batch's, with one gate and one ledger for all assets.
        policy: How often a failed request is retried.

    Returns:
        A function that takes an asset and returns its picture. It raises what the task run has failed with, or a
        `NotStartedError` if the batch had stopped before anything was sent: then the task run is Cancelled.
    """

    @task(
        name=produce_asset.name,
        task_run_name=run_name,
        retries=policy.retries + (policy.rate_limit_retries or 0),
        retry_delay_seconds=ServerPacedDelays(),
        retry_condition_fn=retry_in_batch_if_decided,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def produce_asset_of_batch(errand: _Errand) -> State[None] | None:
        """Validates, uploads, generates, archives and publishes one asset of a batch."""
        try:
            with failures_reported(errand.job, in_batch=True):
                errand.archived = _produce(errand.job, pipeline)
        except NotStartedError as stopped:
            if stopped.possibly_billed_usd:
                raise
            errand.stopped = stopped
            return Cancelled(message=str(stopped))  # it has not failed
        return None

    def produce(job: Job | ValidatedJob) -> ArchivedImage:
        errand = _Errand(job)
        produce_asset_of_batch(errand)
        if errand.archived is None:
            raise errand.stopped or SegmindError(f"{job.name}: its task run ended without a picture; run it again")
        return errand.archived

    return produce


def _produce(job: Job | ValidatedJob, pipeline: Pipeline) -> ArchivedImage:
    log = run_logger()
    if isinstance(job, Job):
        job = with_seed(job)  # a retry is for the same picture
    archived = pipeline.produce(job, this_run(), log, flow_run_id=flow_run.id, unpublished=events.asset_archived)
    events.asset_archived(archived)
    log.info("%s: %s, %s USD", archived.status, archived.image, usd(archived.cost_usd))
    return archived
