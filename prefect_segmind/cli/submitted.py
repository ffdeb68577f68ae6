"""Whether a command that has ended leaves a request at the provider whose picture can be fetched without payment."""

from __future__ import annotations

from prefect_segmind.cli.output import interrupted_by
from prefect_segmind.errors import SubmittedError
from prefect_segmind.flows.dispatch import in_time
from prefect_segmind.limits.ledger import Ledger
from prefect_segmind.services import Services


def has_submitted(error: BaseException, ledger: Ledger, archive: str | None) -> bool:
    """Whether the provider has accepted a request of a command and not finished it.

    An interrupt does not say it, the picture's record does. An archive that does not answer is not waited for.

    Args:
        error: The error that ended the command.
        ledger: The ledger of its requests.
        archive: `s3://bucket/prefix` or a folder; that of the settings if None.
    """
    if not interrupted_by(error) or not ledger.totals.possibly_billed_usd:
        return isinstance(error, SubmittedError)
    submitted: list[bool] = []

    def look() -> None:
        for found in map(Services(archive=archive).archive.read, ledger.pictures):
            submitted.extend(each.is_submitted for each in (found.record.attempts if found else ()))

    in_time(look)
    return any(submitted)
