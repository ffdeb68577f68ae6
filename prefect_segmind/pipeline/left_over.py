"""What is left over in an outbox: paid pictures of jobs that nobody asks for again, archived all the same.

A seed was random, a prompt was corrected, a row was removed: then no run looks for the picture any more. The facts
beside it name its job, so that any run for the same archive can archive it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.leases import held_elsewhere
from prefect_segmind.archive.outbox import Waiting
from prefect_segmind.archive.record import Asked, Run
from prefect_segmind.errors import (
    BucketNotFoundError,
    SegmindError,
    StoreAccessError,
    StoreCredentialsError,
    StoreError,
    StoreUnreachableError,
)
from prefect_segmind.pipeline.archive import ArchivedImage, Archiving
from prefect_segmind.pipeline.pay import GeneratedImage
from prefect_segmind.pipeline.validate import ValidatedJob

OUT_OF_REACH = (BucketNotFoundError, StoreAccessError, StoreCredentialsError, StoreUnreachableError)
"""Errors of an archive that concern all its pictures alike."""
UNKNOWN_JOB = "its job is not known: run the same job again, and it is archived"
"""Why a picture stays that an earlier version has kept, or that a run had just received when it died."""


class LeftOver(NamedTuple):
    """What became of the pictures in an outbox.

    Attributes:
        archived: Those that are in the archive now.
        stayed: Those that are not, with the reason; one that a live run is about to archive is not among them.
    """

    archived: dict[Path, ArchivedImage]
    stayed: dict[Path, str]


def archive_left_over(archiving: Archiving, run: Run, flow_run_id: str | None = None) -> LeftOver:
    """Archives the pictures that earlier runs have left in an outbox, each under the name of its own job.

    It pays nothing, and gives up disk space that killed runs had reserved there. A picture that cannot be archived
    stays where it is; if the archive is out of reach, all do.

    Args:
        archiving: The archive and its outbox.
        run: The run that does it.
        flow_run_id: The Prefect flow run, for the sidecars.

    Raises:
        OutboxError: The outbox cannot be read.
    """
    found = LeftOver({}, {})
    archiving.outbox.give_up_abandoned_space()
    for each in archiving.outbox.waiting():
        if each.is_answer or not _is_for(archiving.archive, each.asked):
            continue
        try:
            if archived := _archive(archiving, each, run, flow_run_id):
                found.archived[each.path] = archived
        except SegmindError as error:
            found.stayed[each.path] = str(error)
            if isinstance(error.__cause__ or error, OUT_OF_REACH):
                break
    return found


def _is_for(archive: Archive, asked: Asked) -> bool:
    """Whether a picture is for this archive, whose folder may have become a link, or for one that is not known."""
    return asked.archive is None or archive.url in (asked.archive, os.path.realpath(asked.archive))


def _archive(archiving: Archiving, each: Waiting, run: Run, flow_run_id: str | None) -> ArchivedImage | None:
    """Archives one picture; None if that is for another run to do, or done."""
    archive, outbox = archiving.archive, archiving.outbox
    found = archive.read(each.fingerprint)
    record = found.record if found else None
    if record is not None and record.state == "done" and record.picture is not None:
        archive.get_picture(record)  # or it is an error: what the outbox has may be all that is left
        outbox.remove(each.fingerprint, record.picture.sha256, record.runs_in_doubt)
        if not each.path.exists():
            return None
        raise StoreError(f"the archive has another picture of the same job, {archive.store.uri(record.image or '')}")
    if held_elsewhere(archive, found, run.id):
        return None
    job = job_of(each.asked)
    if not job or job.fingerprint != each.fingerprint:
        raise StoreError(UNKNOWN_JOB)
    kept = outbox.find(job.fingerprint, seed=job.seed, list_price_usd=job.price_usd, unfinished=True)
    if kept is None:
        return None
    path, entry = kept
    generated = GeneratedImage.paid_before(
        job,
        archive.url,
        run,
        path,
        entry.paid,
        attempts=record.attempts if record else entry.attempts,
        paid_by=entry.run,
        source_uri=entry.source_uri,
    )
    return archiving.archive_picture(generated, flow_run_id)


def job_of(asked: Asked) -> ValidatedJob | None:
    """The job of a picture; None if it is not known, or another version has written it in another form.

    Args:
        asked: What a request for the picture was for.
    """
    try:
        allowed = {"allow_unlisted_resolution": True}
        return ValidatedJob.model_validate(asked.job, context=allowed) if asked.job else None
    except ValidationError:
        return None
