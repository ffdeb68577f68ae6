"""The composition root: opens what parameters, settings and blocks name, once for a run."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from prefect.blocks.core import Block
from prefect.context import FlowRunContext
from prefect.runtime import deployment

from prefect_segmind.api.history import history_url
from prefect_segmind.api.origin import is_v2, on_loopback
from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.budgets import Budgets
from prefect_segmind.archive.leases import clock
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.archive.record import Attempt, OnKept, OnUnknown, Run
from prefect_segmind.credentials import SegmindCredentials, load_base_url, load_credentials
from prefect_segmind.errors import ConfigurationError, HistoryError, InvalidJobError, OutboxError
from prefect_segmind.jobs.job import shown
from prefect_segmind.limits.account import Account, Announcement, Budget, BudgetLeft, checked_name
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.purse import Purse
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.log_guard import guard_logs
from prefect_segmind.pipeline.archive import Archiving
from prefect_segmind.pipeline.look_up import LookUp
from prefect_segmind.pipeline.pay import Cashier
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.poll import Poller
from prefect_segmind.pipeline.publish import Publisher, Publishing, split_publish_to
from prefect_segmind.pipeline.reconcile import Reconciler, can_ask
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.upload import Uploads
from prefect_segmind.settings import PREFIX, SegmindSettings, load_settings
from prefect_segmind.storage.disk_errors import disk_errors
from prefect_segmind.storage.http_environment import check_environment
from prefect_segmind.storage.open_store import is_relative, is_s3, open_store
from prefect_segmind.storage.store import Store
from prefect_segmind.text import given_text, stripped

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_LOG = logging.getLogger(__name__)
_DELETED = re.compile(r"[/\\](tmp[a-z0-9_]{8}prefect|runner_storage)([/\\]|$)")
"""Temporary folders in which a process worker or a runner keeps a run's code and working directory."""


class Services:
    """What the parameters and settings of one run name, each opened once, when it is first used.

    A parameter wins over its setting.

    Args:
        archive: `s3://bucket/prefix` or a folder.
        upload_to: `s3://bucket/prefix`.
        publish_to: `s3://bucket/live`, a folder, or a pattern such as `s3://bucket/live/{name}.jpg`.
        credentials_block: Name of a `SegmindCredentials` block.
        budget_name: The name of a campaign's budget, which all runs share that name it.
        budget_usd: With a name, the campaign's limit.

    Attributes:
        publish_to: As above; None where nothing is published.

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
        budget_name: str | None = None,
        budget_usd: Decimal | None = None,
    ) -> None:
        self.publish_to = publish_to
        self._budget_name = budget_name
        self._budget_usd = budget_usd
        self._archive = archive
        self._upload_to = upload_to
        self._credentials_block = credentials_block

    @cached_property
    def settings(self) -> SegmindSettings:
        """The settings.

        Raises:
            ConfigurationError: A setting is wrong.
        """
        return load_settings()

    @cached_property
    def credentials(self) -> SegmindCredentials:
        """The key and the API's address, from the named block or the environment.

        Raises:
            ConfigurationError: There is no key, or no such block.
        """
        return load_credentials(self._credentials_block)

    @cached_property
    def s3(self) -> S3Client:
        """The S3 client, from the block that the settings name or from boto3's own chain.

        Raises:
            ConfigurationError: The block cannot be loaded, or has no S3 client.
            StoreCredentialsError: The AWS profile does not exist.
        """
        return _s3_client(self.settings.s3_block, self.settings.s3_encryption, _aws_environment())

    @cached_property
    def _named_archive(self) -> Store:
        """The store of the archive, by the name that was given to it."""
        place = given_text("archive", self._archive) or self.settings.archive
        if not place:
            raise ConfigurationError(
                "archive: no archive is named; give s3://bucket/prefix or a folder with --archive, the flow's archive "
                "or PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE"
            )
        place = lasting(place, "archive" if self._archive else f"{PREFIX}ARCHIVE")
        return open_store(place, self.s3 if is_s3(place) else None)

    @cached_property
    def archive(self) -> Archive:
        """The archive, by its one address: links to its folder are followed here.

        Raises:
            ConfigurationError: None is named; or, in a run of a deployment, the folder may not outlast the run.
        """
        settings = self.settings
        return _archive(self._named_archive.url, settings.s3_block, settings.s3_encryption, _aws_environment())

    @cached_property
    def outbox(self) -> Outbox:
        """The outbox. Each archive has its own, so that no archive takes the pictures that wait for another.

        Earlier versions had one for each name of a folder; that of the given name is looked into too.

        Raises:
            ConfigurationError: As for `archive`; or, in a run of a deployment, the folder may not outlast the run.
        """
        names = self.archive.url, self._named_archive.uri("x").removesuffix("x").rstrip("/\\")
        folder, before = (
            outbox_folder(self.settings) / hashlib.sha256(name.encode()).hexdigest()[:16] for name in names
        )
        also = (before,) if before != folder and before.is_dir() else ()
        return Outbox(folder, self.settings.outbox_min_free_bytes, also)

    @cached_property
    def uploads(self) -> Uploads:
        """Puts source images where the provider can read them."""
        return Uploads(
            s3=lambda: self.s3,
            place=given_text("upload_to", self._upload_to) or self.settings.upload_to,
            presigned_seconds=self.settings.presigned_seconds,
            public_base_url=self.settings.public_base_url,
        )

    @cached_property
    def reader(self) -> SourceReader:
        """Reads source images; those at a loopback address only where the API has one too."""
        return SourceReader(
            s3=lambda: self.s3,
            allow_private=self.settings.allow_private_sources,
            allow_loopback=on_loopback(load_base_url(self._credentials_block)),
        )

    @cached_property
    def publishing(self) -> Publishing | None:
        """Copies pictures to stable addresses; None where `publish_to` is not given.

        Raises:
            ConfigurationError: The address is of another kind; or, in a run of a deployment, the folder may not outlast
                the run.
        """
        if self.publish_to is None:
            return None
        place, pattern = split_publish_to(given_text("publish_to", self.publish_to) or "")
        place = lasting(place, "publish_to")
        store = open_store(place, self.s3 if is_s3(place) else None)
        return Publishing(store, pattern, self.settings.publish_cache_control)

    def check(self) -> None:
        """Opens what a run needs to keep its pictures, so that a mistake fails it before anything is done.

        Raises:
            ConfigurationError: The message names the parameter or the setting.
        """
        _ = self.outbox, self.publishing
        if self.budgets and not self.archive.store.conditional:
            raise ConfigurationError(
                f"{self.budgets[0].setting}: a shared budget needs an archive whose store honours conditional writes, "
                f"and {self.archive.url} has none; nothing was paid: use an archive in a folder or at a provider such "
                "as S3 that honours them, or a budget for each run (budget_usd alone)"
            )

    @cached_property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets that the run shares with others, in the order in which it draws from them.

        Raises:
            ConfigurationError: A name or a limit is not allowed, or one is given without the other.
        """
        settings, found = self.settings, list[Budget]()
        zone = ZoneInfo(settings.budget_timezone)
        if settings.daily_budget_usd is not None:
            found.append(Budget("daily", settings.daily_budget_usd, f"{PREFIX}DAILY_BUDGET_USD", zone=zone))
        if settings.monthly_budget_usd is not None:
            found.append(Budget("monthly", settings.monthly_budget_usd, f"{PREFIX}MONTHLY_BUDGET_USD", zone=zone))
        if name := given_text("budget_name", self._budget_name):
            if self._budget_usd is None:
                raise ConfigurationError("budget_name: a shared budget needs its limit; give budget_usd too")
            found.append(Budget("campaign", self._budget_usd, "budget_name", checked_name(name)))
        return tuple(found)

    def budgets_left(self, now: datetime | None = None) -> list[BudgetLeft]:
        """What each shared budget has left.

        Args:
            now: The time, aware; the present one if None.

        Raises:
            ConfigurationError: As for `budgets`.
            StoreError: An account cannot be read.
        """
        book, now = Budgets(self.archive), now or datetime.now(UTC)
        accounts = ((each, book.read(each.account(now))) for each in self.budgets)
        return [
            BudgetLeft(
                title=budget.title,
                limit_usd=budget.limit_usd,
                left_usd=max(Decimal(0), account.left_usd(budget.limit_usd)),
                held_usd=account.held_usd,
            )
            for budget, account in accounts
        ]

    def purse(
        self,
        run: str,
        *,
        pictures: int = 1,
        requests_per_minute: int | None = None,
        announce: Callable[[Budget, Account, Announcement], None] = lambda *_: None,
        log: logging.Logger = _LOG,
    ) -> Purse | None:
        """What a run may spend of the budgets that it shares with others; None where it shares none. Close it.

        Args:
            run: The flow run or task run, for people who read an account.
            pictures: How many pictures it is going to pay for.
            requests_per_minute: The limit of requests, which is shared too.
            announce: Called with each threshold of a budget that the run crosses.
            log: Logs when it waits for others.

        Raises:
            ConfigurationError: As for `budgets` and `check`.
        """
        if not self.budgets:
            return None
        self.check()
        return Purse(
            Budgets(self.archive),
            self.budgets,
            run=run,
            pictures=pictures,
            requests_per_minute=requests_per_minute,
            announce=announce,
            clock=clock,
            log=log,
        )

    def check_event_source(self, image: str) -> None:
        """Checks that the image of a run that an event began is where events may have theirs. Others may be anywhere.

        Args:
            image: The image as given.

        Raises:
            InvalidJobError: It is elsewhere.
        """
        allowed = self.settings.event_sources
        starts = tuple(each.strip() for each in allowed.split(","))
        if allowed != "any" and began_by_event() and not stripped(image).lower().startswith(starts):
            raise InvalidJobError(
                f"image: {shown(image)} is not allowed in an event; its image begins with {' or '.join(starts)} "
                f"({PREFIX}EVENT_SOURCES)"
            )

    @cached_property
    def can_ask(self) -> Callable[[Attempt, Run], bool]:
        """Tells of a request whether a run can ask the provider what became of it, for which no key is needed.

        Raises:
            ConfigurationError: The block cannot be loaded.
        """
        url = load_base_url(self._credentials_block)
        lists = history_url(url, self.settings.history_url) is not None
        return partial(can_ask, lists=lists, polls=is_v2(url))

    def reconciler(self, gate: Gate, log: logging.Logger) -> Reconciler:
        """Asks the provider what became of requests of unknown outcome.

        Args:
            gate: That of the run.
            log: Logs that the provider's history makes the run wait.

        Raises:
            ConfigurationError: There is no key, or the history's address is unusable.
        """

        def sleep(seconds: float) -> None:
            if not gate.rest(seconds):
                raise HistoryError("the provider's request history was not read: the run is being ended")

        return Reconciler(
            poller=Poller(gate, self.settings.read_timeout_seconds),
            history=self.credentials.get_history(self.settings, log, sleep),
            polls=is_v2(self.credentials.base_url),
        )

    def publisher(self, refreshed_at: datetime, run: str) -> Publisher | None:
        """Publishes the pictures of a run; None where `publish_to` is not given.

        Args:
            refreshed_at: When the run was due.
            run: The id of the flow run.

        Raises:
            ConfigurationError: As for `publishing`.
        """
        return Publisher(self.publishing, refreshed_at, run) if self.publishing else None

    def pipeline(
        self,
        gate: Gate,
        *,
        on_unknown: OnUnknown = "repay",
        on_kept: OnKept = "wait",
        policy: RetryPolicy | None = None,
        publisher: Publisher | None = None,
        unseen: set[str] | None = None,
        log: logging.Logger = _LOG,
    ) -> Pipeline:
        """The pipeline that takes jobs through all stages.

        Args:
            gate: Admits each request, and has the run's ledger.
            on_unknown: Whether a picture is paid for again where an earlier request may have been billed.
            on_kept: Whether a picture is paid for again that lies in an outbox out of reach.
            policy: How often a request is retried; the longest wait for a server is a setting.
            publisher: Publishes the pictures; None to leave them in the archive.
            unseen: As for `LookUp`.
            log: As for `reconciler`.

        Raises:
            ConfigurationError: There is no key, or no archive.
        """
        archive, outbox, settings = self.archive, self.outbox, self.settings
        open_client = partial(self.credentials.get_client, settings)
        reconciler = self.reconciler(gate, log)
        policies = on_unknown, on_kept, reconciler.can_ask
        return Pipeline(
            reader=self.reader,
            uploads=self.uploads,
            look_up=LookUp(archive, outbox, open_client, gate.ledger, *policies, unseen or set()),
            cashier=Cashier(
                archive=archive,
                outbox=outbox,
                open_client=open_client,
                address=self.uploads.address,
                reconciler=reconciler,
                on_unknown=on_unknown,
                policy=replace(policy or RetryPolicy(), longest_wait_seconds=settings.longest_wait_seconds),
                gate=gate,
            ),
            archiving=Archiving(archive, outbox),
            publisher=publisher,
            price_usd=settings.price_usd,
        )


def outboxes(settings: SegmindSettings) -> Iterator[Outbox]:
    """The outboxes of all archives on this machine.

    Args:
        settings: The plugin's settings.

    Raises:
        ConfigurationError: As for `outbox_folder`.
        OutboxError: The folder cannot be read.
    """
    folder = outbox_folder(settings)
    with disk_errors(f"outbox: {folder} cannot be read", OutboxError):
        found = sorted(folder.iterdir()) if folder.is_dir() else []
    for each in found:
        if re.fullmatch("[0-9a-f]{16}", each.name) and each.is_dir():
            yield Outbox(each, settings.outbox_min_free_bytes)


def outbox_folder(settings: SegmindSettings) -> Path:
    """The folder in which each archive has its outbox.

    Args:
        settings: The plugin's settings.

    Raises:
        ConfigurationError: In a run of a deployment, the folder may not outlast the run.
    """
    return Path(lasting(str(settings.outbox_folder), f"{PREFIX}OUTBOX" if settings.outbox else "PREFECT_HOME"))


def lasting(place: str, named: str) -> str:
    """Checks that a place outlasts the run. A worker may run a deployment in a folder that it deletes afterwards.

    Args:
        place: A bucket or a folder.
        named: The parameter or the variable that names it.

    Returns:
        The place; a relative folder as an absolute one.

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
    """Whether this is a run of a deployment, or inside one."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return bool(run and run.deployment_id) or deployment.id is not None


def began_by_event() -> bool:
    """Whether an automation began this run, which Prefect's server notes and an event cannot deny."""
    context = FlowRunContext.get()
    begun = context.flow_run.created_by if context and context.flow_run else None
    return begun is not None and begun.type == "AUTOMATION"


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
    check_environment()  # Prefect's client reads it, and fails without naming it
    guard_logs()
    try:
        loaded = Block.load(block, _sync=True)  # type: ignore[call-arg]
        client: S3Client = loaded.get_s3_client()  # type: ignore[union-attr]
    except (ValueError, AttributeError, ImportError) as error:
        raise ConfigurationError(
            f"PREFECT_INTEGRATIONS_SEGMIND_S3_BLOCK: {block!r} cannot be loaded as a block with get_s3_client(), such "
            f"as aws-credentials/prod ({type(error).__name__}: {error})"
        ) from None
    return client


@lru_cache(maxsize=32)
def _archive(place: str, block: str | None, encryption: str | None, environment: _Environment) -> Archive:
    """An archive, cached across runs, so that its store is probed for conditional writes only once."""
    client = _s3_client(block, encryption, environment) if is_s3(place) else None
    return Archive(open_store(place, client))
