"""The task of batches: an asset from its check to the archive in one task run, the same stages as the four tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Cancelled
from prefect.tasks import Task

from prefect_segmind.archive.record import OnUnknown
from prefect_segmind.errors import NotStartedError
from prefect_segmind.jobs.job import Job, parse_job
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.reporting import events
from prefect_segmind.services import Services
from prefect_segmind.tasks.failures import failures_reported
from prefect_segmind.tasks.retry_delays import ServerPacedDelays, retry_if_decided, retry_in_batch_if_decided
from prefect_segmind.tasks.run_context import (
    refreshed_at,
    run_ledger,
    run_logger,
    run_name,
    task_policy,
    this_run,
    warn_once_without_conditional_writes,
    with_seed,
)


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
) -> ArchivedImage:
    """Checks, uploads, generates, archives and publishes one asset, in one task run; see the single tasks for each.

    Args:
        job: A `Job`, its fields as a mapping, or a job that is validated already.
        archive: `s3://bucket/prefix` or a folder; the setting if left out.
        upload_to: `s3://bucket/prefix`; the setting if left out.
        credentials_block: Name of a `SegmindCredentials` block; the settings or the environment if left out.
        on_unknown: Whether to send another request (`repay`) or not (`fail`) after one that may have been billed.
        publish_to: Where the picture is published, if it is to be.

    Raises:
        SegmindError: In one of its classes; its `stage` says where.
    """
    services = Services(
        archive=archive, upload_to=upload_to, publish_to=publish_to, credentials_block=credentials_block
    )
    with failures_reported(job):
        pipeline = services.pipeline(
            Gate(ledger=run_ledger()),
            on_unknown=on_unknown,
            policy=task_policy(),
            publisher=services.publisher(refreshed_at(), flow_run.id),
        )
        warn_once_without_conditional_writes(services.archive)
        return _produce(job, pipeline, services.settings.allow_unlisted_resolution)


def task_of_batch(pipeline: Pipeline, policy: RetryPolicy) -> Task[[Job | ValidatedJob], ArchivedImage]:
    """The task that produces the assets of a batch with what they share.

    Args:
        pipeline: What they share: S3, uploads, the gate of their requests, the ledger.
        policy: How patient it is.
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
    def produce_asset_of_batch(job: Job | ValidatedJob) -> ArchivedImage:
        """Checks, uploads, generates, archives and publishes one asset of a batch."""
        try:
            with failures_reported(job, in_batch=True):
                return _produce(job, pipeline)
        except NotStartedError as stopped:
            if stopped.possibly_billed_usd:
                raise
            return cast(ArchivedImage, Cancelled(message=str(stopped), data=stopped))  # nothing of it has failed

    return produce_asset_of_batch


def _produce(
    job: Job | ValidatedJob | Mapping[str, Any], pipeline: Pipeline, allow_unlisted_resolution: bool = False
) -> ArchivedImage:
    log = run_logger()
    if isinstance(job, Mapping):
        job = parse_job(job, allow_unlisted_resolution=allow_unlisted_resolution)
    if isinstance(job, Job):
        job = with_seed(job)  # a retry is for the same picture
    archived = pipeline.produce(job, this_run(), log, flow_run_id=flow_run.id, unpublished=events.asset_archived)
    events.asset_archived(archived)
    log.info("%s: %s, %s USD", archived.status, archived.image, usd(archived.cost_usd))
    return archived
