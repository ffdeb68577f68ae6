"""The walk of a job without Prefect, for tests of the stages: the same parts, put together from the same settings."""

from __future__ import annotations

import logging
import uuid
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from prefect_segmind.archive import leases
from prefect_segmind.archive.record import OnKept, OnUnknown, Record, Run
from prefect_segmind.jobs.job import parse_job
from prefect_segmind.limits.admission import Gate
from prefect_segmind.limits.ledger import NOTHING, Ledger
from prefect_segmind.limits.retry import RetryPolicy
from prefect_segmind.pipeline.archive import ArchivedImage, Archiving
from prefect_segmind.pipeline.pay import GeneratedImage
from prefect_segmind.pipeline.pipeline import Pipeline
from prefect_segmind.pipeline.upload import UploadedImage
from prefect_segmind.pipeline.validate import ValidatedJob, validate
from prefect_segmind.services import Services
from tests.support.logs import listening

LOG = logging.getLogger("tests.walk")


def up_to_upload(image: str | Path, **fields: Any) -> tuple[ValidatedJob, UploadedImage]:
    fields = {"prompt": "a red mug", **fields}
    services = Services()
    job = validate(parse_job({"image": str(image), **fields}), services.reader)
    return job, services.uploads.upload(job, services.reader)


def pipeline(
    archive: str | None = None,
    *,
    on_unknown: OnUnknown = "repay",
    on_kept: OnKept = "wait",
    ledger: Ledger | None = None,
    policy: RetryPolicy | None = None,
    gate: Gate | None = None,
    unseen: set[str] | None = None,
) -> Pipeline:
    """What takes jobs through all stages; a run of its own."""
    return Services(archive=archive).pipeline(
        gate or Gate(ledger=ledger), on_unknown=on_unknown, on_kept=on_kept, policy=policy, unseen=unseen
    )


def with_gate(opened: Pipeline, gate: Gate | None = None) -> Pipeline:
    """The same pipeline behind another gate, which limits nothing if it is left out."""
    return replace(opened, cashier=replace(opened.cashier, gate=gate or Gate(ledger=opened.ledger)))


def generate(
    job: ValidatedJob,
    uploaded: UploadedImage,
    *,
    run: str | None = None,
    archive: str | None = None,
    on_unknown: OnUnknown = "repay",
    on_kept: OnKept = "wait",
    said: list[str] | None = None,
    ledger: Ledger | None = None,
) -> GeneratedImage:
    """One request; a failed one is raised as it is."""
    log = logging.Logger("tests.walk") if said is None else listening(said)
    opened = pipeline(archive, on_unknown=on_unknown, on_kept=on_kept, ledger=ledger)
    return opened.generate(job, lambda: uploaded, Run(run or uuid.uuid4().hex), log)


def record_of(fingerprint: str) -> Record:
    found = Services().archive.read(fingerprint)
    assert found is not None
    return found.record


def paid_usd(record: Record) -> Decimal:
    """What all requests in a record have cost."""
    return sum((each.cost_usd or NOTHING for each in record.attempts), NOTHING)


def archive_picture(generated: GeneratedImage) -> ArchivedImage:
    services = Services(archive=generated.archive)
    return Archiving(services.archive, services.outbox).archive_picture(generated)


def walk(
    image: str | Path, *, on_unknown: OnUnknown = "repay", on_kept: OnKept = "wait", **fields: Any
) -> ArchivedImage:
    return archive_picture(generate(*up_to_upload(image, **fields), on_unknown=on_unknown, on_kept=on_kept))


def left(photo: Path, **fields: Any) -> GeneratedImage:
    """A picture that a run has paid for, and could not archive before it ended."""
    generated = generate(*up_to_upload(photo, **fields))
    leases._claims.clear()
    return generated
