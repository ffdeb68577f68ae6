"""The command `prefect-segmind outbox`: what was paid for on this machine and is not archived yet."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal

from humanize import naturaldelta, naturalsize
from pydantic import BaseModel, ConfigDict

from prefect_segmind.archive.outbox import Outbox, Waiting
from prefect_segmind.archive.record import Run
from prefect_segmind.errors import SegmindError
from prefect_segmind.money import usd
from prefect_segmind.pipeline.archive import Archiving
from prefect_segmind.pipeline.left_over import UNKNOWN_JOB, LeftOver, archive_left_over
from prefect_segmind.services import Services, outboxes
from prefect_segmind.settings import load_settings


class InOutbox(BaseModel):
    """A file that was paid for.

    Attributes:
        path: The file in the outbox.
        name: The name of its job; None if that is not known.
        archive: The archive that it is for; None if that is not known.
        fingerprint: The fingerprint of its job.
        kind: `picture`, or `answer` for one that could not be read as a picture.
        size_bytes: Its size.
        written: When it was written, UTC.
        cost_usd: What was paid for it; None if that is not known.
        image: The address of the picture in the archive; None if it was not archived now.
        problem: Why it could not be archived; None if it was, or nobody asked for that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    name: str | None
    archive: str | None
    fingerprint: str
    kind: str
    size_bytes: int
    written: datetime
    cost_usd: Decimal | None
    image: str | None = None
    problem: str | None = None

    def sentence(self) -> str:
        """What it is and what became of it, in one line."""
        cost = "unknown cost" if self.cost_usd is None else f"{usd(self.cost_usd)} USD"
        age = naturaldelta(datetime.now(UTC) - self.written)
        what = f"{self.name or 'an unknown job'}, {self.kind}, {cost}, {naturalsize(self.size_bytes)}, {age} old"
        where = f"archived: {self.image}" if self.image else self.path
        archive = "" if self.image else f", for {self.archive or 'an archive that is not known'}"
        return f"{what}{archive}: {where}" + (f"; {self.problem}" if self.problem else "")


def look(*, archive: bool) -> list[InOutbox]:
    """Lists what is in the outboxes of this machine, the oldest first.

    Args:
        archive: Whether to archive the pictures, each in its archive under the name of its job.

    Raises:
        ConfigurationError: A setting is wrong.
        OutboxError: An outbox cannot be read.
    """
    found: list[InOutbox] = []
    for outbox in outboxes(load_settings()):
        waiting = outbox.waiting()
        ends = _archive(outbox, waiting) if archive else LeftOver({}, {})
        found += _described(waiting, ends)
    return sorted(found, key=lambda each: each.written)


def _archive(outbox: Outbox, waiting: list[Waiting]) -> LeftOver:
    ends = LeftOver({}, {})
    for place in {each.asked.archive for each in waiting if each.asked.archive}:
        try:
            archiving = Archiving(Services(archive=place).archive, outbox)
            archived, stayed = archive_left_over(archiving, Run(uuid.uuid4().hex))
        except SegmindError as error:
            mine = (each.path for each in waiting if each.asked.archive == place and not each.is_answer)
            stayed, archived = dict.fromkeys(mine, str(error)), {}
        ends.archived.update(archived)
        ends.stayed.update(stayed)
    for each in waiting:
        if not (each.is_answer or each.asked.archive):
            ends.stayed.setdefault(each.path, UNKNOWN_JOB)
    return ends


def _described(waiting: list[Waiting], ends: LeftOver) -> Iterator[InOutbox]:
    for each in waiting:
        archived = ends.archived.get(each.path)
        if not (archived or each.path.exists()):
            continue  # the archive had it already, or has it from another run by now
        yield InOutbox(
            path=str(each.path),
            name=each.asked.name,
            archive=each.asked.archive,
            fingerprint=each.fingerprint,
            kind="answer" if each.is_answer else "picture",
            size_bytes=each.size_bytes,
            written=each.written,
            cost_usd=each.cost_usd,
            image=archived.image if archived else None,
            problem=ends.stayed.get(each.path),
        )
