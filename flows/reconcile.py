"""The flow that settles an archive: what became of each request whose outcome is unknown is looked up, unpaid."""

from __future__ import annotations

from prefect import flow
from prefect.logging import get_run_logger

from prefect_segmind.errors import SegmindError
from prefect_segmind.pipeline.unsettled import Reconciled
from prefect_segmind.reporting.artifacts import publish_reconciled
from prefect_segmind.tasks.reconcile import look_up_requests


@flow(name="reconcile")
def reconcile(archive: str | None = None, credentials_block: str | None = None) -> Reconciled:
    """Looks up at the provider what became of each request whose outcome is unknown, and archives what was paid for.

    It pays nothing. Pictures that other runs are working on at this moment are left to them.

    Args:
        archive: Whose records are gone through: s3://bucket/prefix or a folder; the worker's setting if left out.
        credentials_block: Name of a SegmindCredentials block; the worker's setting or environment if left out.

    Returns:
        The counts, and what became of each request.

    Raises:
        HistoryError: The provider's request history cannot be read, or none is known for the API's address.
        SegmindError: A picture could not be archived, or a record not be read; or in one of its other classes.
    """
    result = look_up_requests(archive, credentials_block)
    publish_reconciled(result)
    if not result.is_whole:
        raise SegmindError("; ".join((result.sentence(), *result.problems, *result.failures())))
    get_run_logger().info(result.sentence())
    return result


if __name__ == "__main__":
    reconcile.serve(name="on-demand")
