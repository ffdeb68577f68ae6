"""Turns settings and credentials into the parts that the stages work with."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.blocks.core import Block
from prefect.context import FlowRunContext
from prefect.runtime import deployment

from prefect_segmind.api.client import on_loopback
from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.archive.record import OnUnknown
from prefect_segmind.credentials import load_base_url, load_credentials
from prefect_segmind.errors import ConfigurationError
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.pipeline.archive import Archiving
from prefect_segmind.pipeline.look_up import Generation
from prefect_segmind.pipeline.pipeline import Production
from prefect_segmind.pipeline.publish import Publisher, Publishing, split_publish_to
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.upload import Uploads
from prefect_segmind.settings import PREFIX, load_settings
from prefect_segmind.storage.http_environment import check_environment
from prefect_segmind.storage.open_store import is_relative, is_s3, open_store
from prefect_segmind.text import given_text

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_DELETED = re.compile(r"[/\\](tmp[a-z0-9_]{8}prefect|runner_storage)([/\\]|$)")
"""Where a process worker and a runner keep the code of a run, and its working directory."""


def s3_client() -> S3Client:
    """The S3 client: of the block that the settings name, or of boto3's own chain. Made once for each environment.

    Raises:
        ConfigurationError: The block cannot be loaded or makes no S3 client.
        StoreCredentialsError: The AWS profile does not exist.
    """
    settings = load_settings()
    return _s3_client(settings.s3_block, settings.s3_encryption, _aws_environment())


def open_archive(url: str | None) -> Archive:
    """The archive at a place, or at the one that the settings name.

    Args:
        url: `s3://bucket/prefix` or a folder.

    Raises:
        ConfigurationError: None is named, or in a run of a deployment one that may not outlast it.
    """
    settings = load_settings()
    place = given_text("archive", url) or settings.archive
    if not place:
        raise ConfigurationError(
            "archive: no place for the pictures is named; name s3://bucket/prefix or a folder with --archive, the "
            "flow's archive or PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE"
        )
    place = lasting(place, "archive" if url else f"{PREFIX}ARCHIVE")
    return _archive(place, settings.s3_block, settings.s3_encryption, _aws_environment())


def open_uploads(place: str | None) -> Uploads:
    """The place for source images that is named here or in the settings."""
    settings = load_settings()
    return Uploads(
        s3=lru_cache(maxsize=1)(s3_client),  # which reads the settings each time
        place=given_text("upload_to", place) or settings.upload_to,
        presigned_seconds=settings.presigned_seconds,
        public_base_url=settings.public_base_url,
    )


def open_outbox(archive: Archive | None = None) -> Outbox:
    """The outbox for an archive, a folder in the one that the settings name; that one itself for no archive.

    Each archive has its own, so that no picture that one of them waits for is taken by another.

    Raises:
        ConfigurationError: In a run of a deployment, the folder may not outlast it.
    """
    settings = load_settings()
    folder = Path(lasting(str(settings.outbox_folder), f"{PREFIX}OUTBOX" if settings.outbox else "PREFECT_HOME"))
    if archive is not None:
        folder /= hashlib.sha256(archive.url.encode()).hexdigest()[:16]
    return Outbox(folder, settings.outbox_min_free_bytes)


def source_reader(credentials_block: str | None = None) -> SourceReader:
    """Reads source images; those on this machine's own servers only where the API is there too.

    Args:
        credentials_block: The block that names the API's address, if one does.
    """
    return SourceReader(
        s3=lru_cache(maxsize=1)(s3_client),
        allow_private=load_settings().allow_private_sources,
        allow_loopback=on_loopback(load_base_url(credentials_block)),
    )


def open_generation(
    archive: str | None,
    upload_to: str | None,
    credentials_block: str | None,
    *,
    on_unknown: OnUnknown = "repay",
    policy: RetryPolicy | None = None,
    gate: Gate | None = None,
) -> Generation:
    """What pays for pictures.

    Args:
        archive: As for `open_archive`.
        upload_to: As for `open_uploads`.
        credentials_block: Name of a `SegmindCredentials` block; the settings or the environment if None.
        on_unknown: Whether a picture is paid for again where an earlier request may have been billed.
        policy: How patient the run is; how long a server is waited for is a setting.
        gate: What the requests of a batch pass.

    Raises:
        ConfigurationError: There is no key, or no archive.
    """
    settings, credentials, opened = load_settings(), load_credentials(credentials_block), open_archive(archive)
    return Generation(
        archive=opened,
        outbox=open_outbox(opened),
        open_client=lambda: credentials.get_client(settings),
        address=open_uploads(upload_to).address,
        on_unknown=on_unknown,
        policy=replace(policy or RetryPolicy(), longest_wait_seconds=settings.longest_wait_seconds),
        gate=gate or Gate(),
    )


def open_publisher(
    publish_to: str | None, refreshed_at: datetime | None = None, run: str | None = None
) -> Publisher | None:
    """What publishes pictures at addresses that stay; None where that is not asked for.

    Args:
        publish_to: `s3://bucket/live` or a folder; or a pattern such as `s3://bucket/live/{name}.jpg`.
        refreshed_at: When the refresh was due; now if None.
        run: The flow run.

    Raises:
        ConfigurationError: The address is of no such kind, or in a run of a deployment one that may not outlast it.
    """
    if publish_to is None:
        return None
    place, pattern = split_publish_to(given_text("publish_to", publish_to) or "")
    place = lasting(place, "publish_to")
    store = open_store(place, s3_client() if is_s3(place) else None)
    publishing = Publishing(store, pattern, load_settings().publish_cache_control)
    return Publisher(publishing, refreshed_at or datetime.now(UTC), run or "")


def open_production(
    generation: Generation,
    upload_to: str | None,
    credentials_block: str | None,
    publisher: Publisher | None = None,
) -> Production:
    """Everything that takes a job through all its stages.

    Args:
        generation: What pays.
        upload_to: As for `open_uploads`.
        credentials_block: As for `source_reader`.
        publisher: What publishes, if it is to be done.
    """
    return Production(
        reader=source_reader(credentials_block),
        uploads=open_uploads(upload_to),
        generation=generation,
        archiving=Archiving(generation.archive, generation.outbox),
        publisher=publisher,
        price_usd=load_settings().price_usd,
    )


def lasting(place: str, named: str) -> str:
    """A place that is there when the run is over; a relative folder as an absolute one.

    A worker may run a deployment in a folder that it deletes afterwards, with whatever lies there.

    Args:
        place: A bucket or a folder.
        named: The parameter or the variable that names it.

    Raises:
        ConfigurationError: In a run of a deployment, the folder is relative or in one that Prefect deletes.
    """
    relative = is_relative(place)
    folder = str(Path(place).absolute()) if relative else place
    if (relative or _DELETED.search(folder)) and in_deployment():
        why = "a relative folder" if relative else "in a folder that Prefect deletes"
        raise ConfigurationError(
            f"{named}: {place!r} is {why}, and may be gone with the pictures in it when this deployment's run is "
            "over; nothing was paid: name s3://bucket/prefix or an absolute folder, such as /srv/pictures or ~/pictures"
        )
    return folder


def in_deployment() -> bool:
    """Whether this is a run of a deployment, or within one."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return bool(run and run.deployment_id) or deployment.id is not None


def _aws_environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


@lru_cache(maxsize=8)
def _s3_client(block: str | None, encryption: str | None, _environment: tuple[tuple[str, str], ...]) -> S3Client:
    from prefect_segmind.storage import s3

    client = s3.s3_client() if block is None else _client_of(block)
    s3.ask_for_no_checksums(client)
    s3.encrypt_writes(client, encryption)
    return client


def _client_of(block: str) -> S3Client:
    check_environment()  # Prefect's client reads it, and fails without a word of it
    try:
        loaded = Block.load(block, _sync=True)  # type: ignore[call-arg]
        client: S3Client = loaded.get_s3_client()  # type: ignore[union-attr]
    except (ValueError, AttributeError, ImportError) as error:
        raise ConfigurationError(
            f"PREFECT_INTEGRATIONS_SEGMIND_S3_BLOCK: {block!r} is no block with get_s3_client(), such as "
            f"aws-credentials/prod ({type(error).__name__}: {error})"
        ) from None
    return client


@lru_cache(maxsize=32)
def _archive(
    place: str, _block: str | None, _encryption: str | None, _environment: tuple[tuple[str, str], ...]
) -> Archive:
    return Archive(open_store(place, s3_client() if is_s3(place) else None))
