"""The composition root: opens what settings, parameters and blocks name, once for a run."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.blocks.core import Block
from prefect.context import FlowRunContext
from prefect.runtime import deployment

from prefect_segmind.api.client import SegmindClient, on_loopback
from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.archive.record import OnUnknown
from prefect_segmind.credentials import SegmindCredentials, load_base_url, load_credentials
from prefect_segmind.errors import ConfigurationError
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.pipeline.archive import Archiving
from prefect_segmind.pipeline.look_up import LookUp
from prefect_segmind.pipeline.pay import Cashier
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.publish import Publisher, Publishing, split_publish_to
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.upload import Uploads
from prefect_segmind.settings import PREFIX, SegmindSettings, load_settings
from prefect_segmind.storage.http_environment import check_environment
from prefect_segmind.storage.open_store import is_relative, is_s3, open_store
from prefect_segmind.text import given_text

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_DELETED = re.compile(r"[/\\](tmp[a-z0-9_]{8}prefect|runner_storage)([/\\]|$)")
"""Where a process worker and a runner keep the code of a run, and its working directory."""


class Services:
    """What the settings and the parameters of one run name, each opened when it is first used, and once.

    A parameter that is given comes before its setting.

    Args:
        archive: `s3://bucket/prefix` or a folder.
        upload_to: `s3://bucket/prefix`.
        publish_to: `s3://bucket/live`, a folder, or a pattern such as `s3://bucket/live/{name}.jpg`.
        credentials_block: Name of a `SegmindCredentials` block.

    Attributes:
        publish_to: As above; None where nothing is to be published.

    Example:
        >>> Services(archive="/srv/pictures").archive.url
        '/srv/pictures'
    """

    def __init__(
        self,
        *,
        archive: str | None = None,
        upload_to: str | None = None,
        publish_to: str | None = None,
        credentials_block: str | None = None,
    ) -> None:
        self.publish_to = publish_to
        self._archive = archive
        self._upload_to = upload_to
        self._credentials_block = credentials_block

    @cached_property
    def settings(self) -> SegmindSettings:
        """The settings.

        Raises:
            ConfigurationError: One of them is wrong.
        """
        return load_settings()

    @cached_property
    def credentials(self) -> SegmindCredentials:
        """The key and the API's address: of the block that is named, or of the environment.

        Raises:
            ConfigurationError: There is no key, or no such block.
        """
        return load_credentials(self._credentials_block)

    @cached_property
    def s3(self) -> S3Client:
        """The S3 client: of the block that the settings name, or of boto3's own chain.

        Raises:
            ConfigurationError: The block cannot be loaded or makes no S3 client.
            StoreCredentialsError: The AWS profile does not exist.
        """
        return _s3_client(self.settings.s3_block, self.settings.s3_encryption, _aws_environment())

    @cached_property
    def archive(self) -> Archive:
        """The archive.

        Raises:
            ConfigurationError: None is named, or in a run of a deployment one that may not outlast it.
        """
        place = given_text("archive", self._archive) or self.settings.archive
        if not place:
            raise ConfigurationError(
                "archive: no place for the pictures is named; name s3://bucket/prefix or a folder with --archive, the "
                "flow's archive or PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE"
            )
        place = lasting(place, "archive" if self._archive else f"{PREFIX}ARCHIVE")
        return _archive(place, self.settings.s3_block, self.settings.s3_encryption, _aws_environment())

    @cached_property
    def outbox(self) -> Outbox:
        """The outbox of the archive, so that no picture that one archive waits for is taken by another.

        Raises:
            ConfigurationError: As for `archive`; or in a run of a deployment, the folder may not outlast it.
        """
        folder = outbox_folder(self.settings) / hashlib.sha256(self.archive.url.encode()).hexdigest()[:16]
        return Outbox(folder, self.settings.outbox_min_free_bytes)

    @cached_property
    def uploads(self) -> Uploads:
        """The place for source images."""
        return Uploads(
            s3=lambda: self.s3,
            place=given_text("upload_to", self._upload_to) or self.settings.upload_to,
            presigned_seconds=self.settings.presigned_seconds,
            public_base_url=self.settings.public_base_url,
        )

    @cached_property
    def reader(self) -> SourceReader:
        """Reads source images; those on this machine's own servers only where the API is there too."""
        return SourceReader(
            s3=lambda: self.s3,
            allow_private=self.settings.allow_private_sources,
            allow_loopback=on_loopback(load_base_url(self._credentials_block)),
        )

    @cached_property
    def publishing(self) -> Publishing | None:
        """What copies pictures to addresses that stay; None where that is not asked for.

        Raises:
            ConfigurationError: The address is of no such kind, or in a run of a deployment one that may not outlast it.
        """
        if self.publish_to is None:
            return None
        place, pattern = split_publish_to(given_text("publish_to", self.publish_to) or "")
        place = lasting(place, "publish_to")
        store = open_store(place, self.s3 if is_s3(place) else None)
        return Publishing(store, pattern, self.settings.publish_cache_control)

    def check(self) -> None:
        """Opens what a run needs to keep its pictures, so that what is not configured is said before anything is done.

        Raises:
            ConfigurationError: The message names the parameter or the setting.
        """
        _ = self.outbox, self.publishing

    def publisher(self, refreshed_at: datetime, run: str) -> Publisher | None:
        """What publishes the pictures of a run; None where that is not asked for.

        Args:
            refreshed_at: When the refresh was due.
            run: The flow run.

        Raises:
            ConfigurationError: As for `publishing`.
        """
        return Publisher(self.publishing, refreshed_at, run) if self.publishing else None

    def pipeline(
        self,
        gate: Gate,
        *,
        on_unknown: OnUnknown = "repay",
        policy: RetryPolicy | None = None,
        publisher: Publisher | None = None,
    ) -> Pipeline:
        """Everything that takes a job through all its stages.

        Args:
            gate: What every request passes, with the run's ledger.
            on_unknown: Whether a picture is paid for again where an earlier request may have been billed.
            policy: How patient the run is; how long a server is waited for is a setting.
            publisher: What publishes, if it is to be done.

        Raises:
            ConfigurationError: There is no key, or no archive.
        """
        archive, outbox, credentials, settings = self.archive, self.outbox, self.credentials, self.settings

        def open_client() -> SegmindClient:
            return credentials.get_client(settings)

        return Pipeline(
            reader=self.reader,
            uploads=self.uploads,
            look_up=LookUp(archive, outbox, open_client, gate.ledger, on_unknown),
            cashier=Cashier(
                archive=archive,
                outbox=outbox,
                open_client=open_client,
                address=self.uploads.address,
                on_unknown=on_unknown,
                policy=replace(policy or RetryPolicy(), longest_wait_seconds=settings.longest_wait_seconds),
                gate=gate,
            ),
            archiving=Archiving(archive, outbox),
            publisher=publisher,
            price_usd=settings.price_usd,
        )


def outbox_folder(settings: SegmindSettings) -> Path:
    """The folder in which each archive has its outbox.

    Args:
        settings: Which name it.

    Raises:
        ConfigurationError: In a run of a deployment, the folder may not outlast it.
    """
    return Path(lasting(str(settings.outbox_folder), f"{PREFIX}OUTBOX" if settings.outbox else "PREFECT_HOME"))


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


_Environment = tuple[tuple[str, str], ...]


def _aws_environment() -> _Environment:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


@lru_cache(maxsize=8)
def _s3_client(block: str | None, encryption: str | None, _environment: _Environment) -> S3Client:
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
def _archive(place: str, block: str | None, encryption: str | None, environment: _Environment) -> Archive:
    """Kept from run to run, so that a store is asked once whether it honours conditional writes."""
    client = _s3_client(block, encryption, environment) if is_s3(place) else None
    return Archive(open_store(place, client))
