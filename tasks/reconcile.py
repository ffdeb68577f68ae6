"""The task that looks up, in all records of an archive, what became of requests of unknown outcome."""

from __future__ import annotations

from prefect import task
from prefect.runtime import flow_run

from prefect_segmind.limits.admission import Gate
from prefect_segmind.pipeline.unsettled import Reconciled, reconcile_archive
from prefect_segmind.services import Services
from prefect_segmind.tasks.interrupts import end_run_on_hangup
from prefect_segmind.tasks.run_context import run_logger, this_run, warn_once_without_conditional_writes


@task(persist_result=False)
def look_up_requests(archive: str | None = None, credentials_block: str | None = None) -> Reconciled:
    """Looks up every request of unknown outcome of an archive, and archives what was paid for. It pays nothing.

    Args:
        archive: `s3://bucket/prefix` or a folder; the setting if left out.
        credentials_block: Name of a `SegmindCredentials` block; the settings or the environment if left out.

    Returns:
        What has become known.

    Raises:
        HistoryError: The provider's request history cannot be read, or there is none.
        StoreError: The archive or the outbox cannot be read.
    """
    end_run_on_hangup()
    log, services = run_logger(), Services(archive=archive, credentials_block=credentials_block)
    services.check()
    pipeline = services.pipeline(Gate(log=log), log=log)
    warn_once_without_conditional_writes(services.archive)
    return reconcile_archive(pipeline, this_run(), log, flow_run.id)
