"""The command `prefect-segmind reconcile`: what became of the requests of an archive whose outcome is unknown."""

from __future__ import annotations

import uuid

from prefect.logging import get_logger
from rich.table import Table
from rich.text import Text

from prefect_segmind.archive.record import Run
from prefect_segmind.limits.admission import Gate
from prefect_segmind.pipeline.unsettled import TITLES, Reconciled, reconcile_archive
from prefect_segmind.services import Services
from prefect_segmind.text import visible

SHOWN_REASONS = 10
"""Reasons and problems that the terminal shows; the JSON has all of them."""


def settle(archive: str | None, block: str | None) -> Reconciled:
    """Looks up the requests of an archive, and archives what was paid for; no Prefect server is needed.

    Args:
        archive: `s3://bucket/prefix` or a folder; the setting if None.
        block: Name of a `SegmindCredentials` block; that of the settings if None.

    Raises:
        SegmindError: As for `reconcile_archive`; or in one of its classes, if something is not configured.
    """
    log, services = get_logger("segmind"), Services(archive=archive, credentials_block=block)
    pipeline = services.pipeline(Gate(log=log), log=log)
    return reconcile_archive(pipeline, Run(uuid.uuid4().hex), log)


def table(result: Reconciled) -> Table:
    """The requests as a table: name, when it was sent, outcome, USD.

    Args:
        result: The requests.
    """
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in TITLES:
        number = title == "USD"
        shown.add_column(title, justify="right" if number else "left", overflow="fold", no_wrap=title != "name")
    for each in result.pictures:
        shown.add_row(*(Text(visible(cell)) for cell in each.cells()))
    return shown


def facts(result: Reconciled) -> dict[str, str]:
    """The lines that the terminal shows below the table, by title.

    Args:
        result: The requests.
    """
    told = {"result": result.sentence(), "archive": result.archive}
    reasons = [*result.failures(), *result.problems]
    told |= {f"failed {number}": each for number, each in enumerate(reasons[:SHOWN_REASONS], start=1)}
    return told | ({"and": f"{len(reasons) - SHOWN_REASONS} more"} if len(reasons) > SHOWN_REASONS else {})
