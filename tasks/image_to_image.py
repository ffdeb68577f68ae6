"""The tasks of one picture: validate, upload, generate, archive, and publish where that is asked for.

They pass small records to each other, never pixels. Each logs what it did and what that cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import task
from prefect.runtime import flow_run

from prefect_segmind.archive.record import OnKept, OnUnknown
from prefect_segmind.jobs.job import Job, parse_job
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import ArchivedImage, Archiving
from prefect_segmind.pipeline.pay import GeneratedImage
from prefect_segmind.pipeline.upload import UploadedImage
from prefect_segmind.pipeline.validate import ValidatedJob, validate
from prefect_segmind.reporting import events
from prefect_segmind.services import Services
from prefect_segmind.tasks.failures import failures_reported
from prefect_segmind.tasks.left_over import archive_what_is_left_over
from prefect_segmind.tasks.retry_delays import ServerPacedDelays, retry_if_decided
from prefect_segmind.tasks.run_context import (
    open_pipeline,
    refreshed_at,
    run_logger,
    run_name,
    this_run,
    with_seed,
)


@task(task_run_name=run_name)
def validate_job(job: Job | Mapping[str, Any], credentials_block: str | None = None) -> ValidatedJob:
    """Checks a job and its source image, and fixes seed, resolution, fingerprint and price. Nothing is paid.

    Args:
        job: A `Job`, or its fields as a mapping.
        credentials_block: Name of the block with the API's address; the settings or the environment if left out. A
            source at a loopback address is read only where the API has one too.

    Raises:
        InvalidJobError: Fields are wrong; the message has a line for each.
        SourceImageError: The source image cannot be used.
        StoreError: The source image in S3 or at an address cannot be read at this moment.
    """
    log, services = run_logger(), Services(credentials_block=credentials_block)
    with failures_reported(job, "validate"):
        if not isinstance(job, Job):
            job = parse_job(job, allow_unlisted_resolution=services.settings.allow_unlisted_resolution)
        validated = validate(with_seed(job), services.reader, price_usd=services.settings.price_usd)
    for warning in validated.warnings:
        log.warning(warning)
    found = validated.source
    size = f"{found.width}×{found.height} {found.format}, {found.size_bytes / 1e6:.2f} MB"
    log.info(
        "%s: %s (%s) to %s, seed %s; %s USD if it is not paid for already",
        *(job.name, job.image, size, validated.parameters["resolution"], validated.seed, usd(validated.price_usd)),
    )
    return validated


@task(task_run_name=run_name)
def upload_image(
    job: ValidatedJob, upload_to: str | None = None, credentials_block: str | None = None
) -> UploadedImage:
    """Uploads a job's source image to S3 under its content's hash, unless the same content is there.

    Args:
        job: The validated job.
        upload_to: `s3://bucket/prefix`; the setting if left out.
        credentials_block: As for `validate_job`.

    Raises:
        ConfigurationError: Neither `upload_to` nor its setting is given.
        SourceImageError: The source has changed since it was validated.
        StoreError: S3 refuses or does not answer.
    """
    log, services = run_logger(), Services(upload_to=upload_to, credentials_block=credentials_block)
    with failures_reported(job, "upload"):
        uploaded = services.uploads.upload(job, services.reader)
    for warning in uploaded.warnings:
        log.warning(warning)
    log.info("%s %s", "uploaded to" if uploaded.uploaded else "nothing to upload, it is at", uploaded.uri)
    return uploaded


@task(
    task_run_name=run_name,
    retries=RetryPolicy().retries,
    retry_delay_seconds=ServerPacedDelays(),
    retry_condition_fn=retry_if_decided,
    persist_result=False,
)
def generate_image(
    job: ValidatedJob,
    uploaded: UploadedImage,
    archive: str | None = None,
    upload_to: str | None = None,
    credentials_block: str | None = None,
    on_unknown: OnUnknown = "repay",
    on_kept: OnKept = "wait",
) -> GeneratedImage:
    """Gets a job's picture, by one request to the API unless it is paid for already.

    A failed request is a WARNING and an event `prefect-segmind.attempt.failed`; Prefect waits as long as the server
    asks and runs the task again, where the retry decision says so.

    Args:
        job: The validated job.
        uploaded: Its source image.
        archive: `s3://bucket/prefix` or a folder, with the records of what is paid; the setting if left out.
        upload_to: As for `upload_image`; needed where uploads have a public address.
        credentials_block: Name of a `SegmindCredentials` block; the settings or the environment if left out.
        on_unknown: Whether to send another request (`repay`) or not (`fail`) after one, of this run or an earlier one,
            that may have been billed.
        on_kept: Whether to wait or to pay once more (repay) for a picture that is paid for and lies in the outbox of
            another machine.

    Raises:
        ApiError: The request failed, in one of its classes.
        BudgetReachedError: A budget that is shared with other runs has no room for another picture.
        KeptElsewhereError: It is paid for and lies in the outbox of another machine, and `on_kept` is `wait`.
        OutboxError: The disk is full.
        OutcomeUnknownError: An earlier request may have been billed, and `on_unknown` is `fail`.
        StoreError: The record of the picture cannot be read or written; nothing was paid.
    """
    log = run_logger()
    services = Services(archive=archive, upload_to=upload_to, credentials_block=credentials_block)
    with failures_reported(job), open_pipeline(services, on_unknown, on_kept) as pipeline:
        generated = pipeline.generate(job, lambda: uploaded, this_run(), log)
    if generated.status == "generated":
        log.info("generated in the outbox, %s: %s USD", generated.path, usd(generated.cost_usd))
    return generated


@task(task_run_name=run_name)
def archive_image(generated: GeneratedImage) -> ArchivedImage:
    """Archives a paid picture, its sidecar and its record, and empties the outbox of it and of what is left over.

    Args:
        generated: The picture.

    Raises:
        ArchiveError: The archive cannot be written. The picture is safe; the same job run again archives it unpaid.
    """
    with failures_reported(generated, "archive"):
        services = Services(archive=generated.archive)
        archived = Archiving(services.archive, services.outbox).archive_picture(generated, flow_run.id)
    events.asset_archived(archived)
    run_logger().info("archived: %s (%s)", archived.image, archived.status)
    archive_what_is_left_over(services)
    return archived


@task(task_run_name=run_name)
def publish_image(archived: ArchivedImage, publish_to: str, archive: str | None = None) -> ArchivedImage:
    """Copies an archived picture to a stable address, for a CDN or a CMS, unless a newer refresh has published there.

    Args:
        archived: The picture.
        publish_to: `s3://bucket/live` for `live/{name}.png`, or a pattern such as `s3://bucket/live/{name}.jpg`.
        archive: Where it is archived; the setting if left out.

    Returns:
        The picture, with the address where it is `published`.

    Raises:
        ConfigurationError: `publish_to` is neither.
        StoreError: The archive cannot be read, or `publish_to` cannot be written. The picture is archived; the same
            job run again publishes it unpaid.
    """
    services = Services(archive=archive, publish_to=publish_to)
    with failures_reported(archived, "publish"):
        publisher = services.publisher(refreshed_at(), flow_run.id)
        assert publisher is not None
        return publisher.publish(archived, services.archive, run_logger())
