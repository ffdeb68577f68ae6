"""The task of batches: an asset from its check to the archive in one task run, the same stages as the four tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled

from prefect_segmind import services
from prefect_segmind.archive.record import OnUnknown
from prefect_segmind.errors import NotStartedError
from prefect_segmind.jobs.job import Job, parse_job
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.money import usd
from prefect_segmind.pipeline import pipeline
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.reporting import events
from prefect_segmind.settings import load_settings
from prefect_segmind.tasks.retry_delays import ServerPacedDelays, retry_if_decided
from prefect_segmind.tasks.run_context import (
    failures_reported,
    flow_runs,
    mention_conditions,
    refreshed_at,
    run_id,
    run_name,
    task_policy,
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

    In `refresh_assets` it works with what the batch shares; the other parameters matter elsewhere.

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
    log, produces = get_run_logger(), pipeline.shared.get()
    try:
        with failures_reported(job):
            if produces is None:
                generation = services.open_generation(
                    archive, upload_to, credentials_block, on_unknown=on_unknown, policy=task_policy()
                )
                mention_conditions(generation.archive)
                publisher = services.open_publisher(publish_to, refreshed_at(), flow_run.id)
                produces = services.open_production(generation, upload_to, credentials_block, publisher)
            if isinstance(job, Mapping):
                job = parse_job(job, allow_unlisted_resolution=load_settings().allow_unlisted_resolution)
            if isinstance(job, Job):
                job = with_seed(job)  # a retry is for the same picture
            archived = produces.produce(
                *(job, run_id(), flow_run.id, flow_runs()),
                say=log.info,
                warn=log.warning,
                unpublished=events.asset_archived,
            )
    except NotStartedError as stopped:
        if stopped.possibly_billed_usd:
            raise
        return cast(ArchivedImage, Cancelled(message=str(stopped), data=stopped))  # nothing of it has failed
    events.asset_archived(archived)
    log.info("%s: %s, %s USD", archived.status, archived.image, usd(archived.cost_usd))
    return archived
