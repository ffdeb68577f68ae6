"""A batch that several runs share: which of them has a job, what each reports, and when one is run again.

The run that is asked for plans the batch, writes a manifest for each shard into the archive, and starts a run for each.
A run of a shard writes a report beside its manifest while it works: its sign of life, and at the end its totals.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from decimal import Decimal
from enum import Enum
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_segmind.archive.record import LEASE_SECONDS
from prefect_segmind.batch.results import Failure
from prefect_segmind.jobs.job import Job
from prefect_segmind.limits.ledger import NOTHING, Totals
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.storage.store import Store

MAX_SHARDS = 64
"""The most shards of a batch."""
ATTEMPTS = 3
"""How many runs a shard gets in all, where they crash."""
REPORT_SECONDS = 15.0
"""Seconds between two reports of a shard."""
SILENT_SECONDS = LEASE_SECONDS
"""A run without a new report for so long is dead: Prefect goes on showing one as Running whose worker was killed."""
PENDING_SECONDS = 600.0
"""How long a run may take from its worker to its first line: a container's image is pulled, a machine started."""

_KEY = re.compile(r"([0-9a-f-]{36}):(\d+):(\d+)")
_HEAD = b'{"templates": false}\n'


class ShardKey(NamedTuple):
    """What identifies a run of a shard: the idempotency key of its flow run.

    Attributes:
        run: The id of the flow run that has started it.
        number: Which shard, from 1.
        attempt: Which run of that shard, from 1.

    Example:
        >>> str(ShardKey("00000000-0000-0000-0000-000000000000", 3, 1))
        '00000000-0000-0000-0000-000000000000:3:1'
        >>> ShardKey.parse("00000000-0000-0000-0000-000000000000:3:1").number, ShardKey.parse("nightly")
        (3, None)
    """

    run: str
    number: int
    attempt: int

    def __str__(self) -> str:
        """The key as text."""
        return f"{self.run}:{self.number}:{self.attempt}"

    @classmethod
    def parse(cls, text: str | None) -> ShardKey | None:
        """The key in a text; None if the text is none.

        Args:
            text: The idempotency key of a flow run.
        """
        found = _KEY.fullmatch(text or "")
        return cls(found[1], int(found[2]), int(found[3])) if found else None


class ShardReport(BaseModel):
    """What a run of a shard has done so far.

    Attributes:
        number: How many reports it has written before, so that each is a new version.
        tries: How often the run has begun; more than once where its pool has put it back.
        counts: The number of assets by their status, as in `Progress`.
        requests_sent: The requests that it has sent in all its tries.
        cost_usd: What they have cost.
        possibly_billed_usd: What those of unknown outcome may have cost.
        ended: Whether it has ended in order, and its results are complete.
        stopped: Why it stopped early; None if it did not.
        stopped_by: The class of that error.
        results: The key of its file of results in the archive; None if there is none.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    number: int = 0
    tries: int = 1
    counts: dict[str, int] = {}
    requests_sent: int = 0
    cost_usd: Decimal = NOTHING
    possibly_billed_usd: Decimal = NOTHING
    ended: bool = False
    stopped: str | None = None
    stopped_by: str | None = None
    results: str | None = None

    @property
    def totals(self) -> Totals:
        """Its requests and their cost."""
        return Totals(self.requests_sent, self.cost_usd, self.possibly_billed_usd)


class Fate(Enum):
    """What has become of a run of a shard."""

    WAITS = "it waits for a worker or a place in the work pool"
    WORKS = "it is under way"
    ENDED = "it has ended in order"
    DIED = "it crashed, or nothing is heard of it"
    FAILED = "it ended without its totals, and would again"


def fate(state: str, unchanged_seconds: float, *, has_ended: bool) -> Fate:
    """What has become of a run of a shard. Pure.

    Args:
        state: The type of its state in Prefect, such as `RUNNING`.
        unchanged_seconds: The time since its state or its report was last seen to change.
        has_ended: Whether its report says that it has ended in order.

    Example:
        >>> fate("RUNNING", 20, has_ended=False).name, fate("RUNNING", 90, has_ended=False).name
        ('WORKS', 'DIED')
        >>> fate("CRASHED", 0, has_ended=False).name, fate("CRASHED", 0, has_ended=True).name
        ('DIED', 'ENDED')
        >>> fate("SCHEDULED", 9000, has_ended=False).name, fate("FAILED", 0, has_ended=False).name
        ('WAITS', 'FAILED')
    """
    if state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
        return Fate.ENDED if has_ended else Fate.DIED if state == "CRASHED" else Fate.FAILED
    if state in ("SCHEDULED", "PAUSED"):  # also one that a pool has put back, as Kubernetes' does when a node goes
        return Fate.WAITS
    if state == "PENDING":
        return Fate.DIED if unchanged_seconds > PENDING_SECONDS else Fate.WORKS
    if unchanged_seconds <= SILENT_SECONDS:
        return Fate.WORKS
    return Fate.ENDED if has_ended else Fate.DIED


def shard_of(entry: Job | ValidatedJob, shards: int) -> int:
    """Which shard has a job, from 1: all jobs for one picture are in one.

    Args:
        entry: The job; one that could not be validated is placed by its name.
        shards: The number of shards.
    """
    text = entry.fingerprint if isinstance(entry, ValidatedJob) else sha256(entry.name.encode()).hexdigest()
    return 1 + int(text[:15], 16) % shards


def shares(total: int, shards: int) -> list[int]:
    """A number in as many parts as there are shards, as equal as they can be.

    Args:
        total: The number.
        shards: The number of shards.

    Example:
        >>> shares(170, 4)
        [43, 43, 42, 42]
    """
    least, more = divmod(total, shards)
    return [least + (number < more) for number in range(shards)]


class ShardFolder:
    """The manifests, reports and results of a run's shards, in `.segmind/runs/{run}/shards/` of the archive.

    Args:
        store: The store of the archive.
        run: The run's folder in `.segmind/runs/`.
    """

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self.run = run

    @classmethod
    def of(cls, store: Store, manifest: str) -> ShardFolder:
        """The folder that has the manifest of a shard.

        Args:
            store: The store of the archive.
            manifest: The manifest's address.
        """
        return cls(store, PurePosixPath(manifest.replace("\\", "/")).parent.parent.name)

    def results_of(self, key: ShardKey) -> str:
        """Where a run of a shard keeps its results, below `.segmind/`.

        Args:
            key: Its key.
        """
        return f"runs/{self.run}/shards/{key.number}.{key.attempt}"

    def write_manifest(self, number: int, of: int, jobs: Iterable[bytes]) -> str:
        """Writes the manifest of a shard.

        Args:
            number: Which shard.
            of: The number of shards.
            jobs: Its jobs as JSON.

        Returns:
            The manifest's address.

        Raises:
            StoreError: It cannot be written.
        """
        key = f".segmind/runs/{self.run}/shards/{number}-of-{of}.jsonl"
        self._store.put(key, b"".join((_HEAD, *jobs)), "application/jsonl")
        return self._store.uri(key)

    def write_report(self, key: ShardKey, report: ShardReport) -> None:
        """Writes the report of a run of a shard over the one before.

        Args:
            key: The key of the run.
            report: The report.

        Raises:
            StoreError: It cannot be written.
        """
        self._store.put(self._report(key), report.model_dump_json().encode(), "application/json")

    def report(self, key: ShardKey) -> ShardReport | None:
        """The report of a run of a shard; None if there is none yet, or half of one.

        Args:
            key: The key of the run.

        Raises:
            StoreError: It cannot be read.
        """
        found = self._store.get(self._report(key))
        try:
            return ShardReport.model_validate_json(found.data) if found else None
        except ValidationError:
            return None

    def results(self, report: ShardReport) -> dict[str, bytes] | None:
        """The results of a shard by the names of its jobs, each as JSON; None if they were not written.

        Args:
            report: Its last report.

        Raises:
            StoreError: They cannot be read.
        """
        if report.results is None:
            return None if report.counts else {}
        found = self._store.get(report.results)
        return {_Named.model_validate_json(line).name: line for line in found.data.splitlines()} if found else None

    def _report(self, key: ShardKey) -> str:
        return f".segmind/{self.results_of(key)}/report.json"


class _Named(BaseModel):
    name: str
    status: Literal["generated", "reused", "recovered", "failed", "submitted"]


def parse_result(line: bytes) -> ArchivedImage | Failure:
    """The result of an asset.

    Args:
        line: A line of a file of results.
    """
    kind = Failure if _Named.model_validate_json(line).status in ("failed", "submitted") else ArchivedImage
    return kind.model_validate_json(line)


def added_up(reports: Collection[ShardReport]) -> tuple[Counter[str], Totals]:
    """The counts and the totals of some shards.

    Args:
        reports: Their reports.

    Example:
        >>> one = ShardReport(counts={"generated": 3}, requests_sent=3, cost_usd=Decimal("0.15"))
        >>> counts, totals = added_up([one, one])
        >>> counts["generated"], totals.cost_usd
        (6, Decimal('0.30'))
    """
    counts, totals = Counter[str](), Totals()
    for each in reports:
        counts.update(each.counts)
        totals = totals.plus(each.totals)
    return counts, totals
