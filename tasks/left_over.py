"""Each run archives what earlier runs have left in the outbox, and says so in its log."""

from __future__ import annotations

import threading

from prefect.runtime import flow_run

from prefect_segmind.archive.record import FlowRuns
from prefect_segmind.pipeline.archive import Archiving
from prefect_segmind.pipeline.left_over import archive_left_over
from prefect_segmind.services import Services
from prefect_segmind.tasks.run_context import run_logger, this_run

SHOWN = 10
"""How many pictures the log names."""
REMEMBERED = 64
"""Flow runs of which it is remembered that they have looked."""
_looked: dict[tuple[FlowRuns, str], None] = {}
_looking = threading.Lock()


def archive_what_is_left_over(services: Services) -> None:
    """Archives the paid pictures in the outbox that no live run is about to archive; it never fails the run.

    Each try of a flow run does so once, however many tasks it has.

    Args:
        services: The services of the run.
    """
    log, flow_runs = run_logger(), this_run().flow_runs
    try:
        if flow_runs and _has_looked(flow_runs, services.archive.url):
            return
        found = archive_left_over(Archiving(services.archive, services.outbox), this_run(), flow_run.id)
    except Exception as error:  # noqa: BLE001 - the run's own pictures are archived, and the next run tries again
        log.warning("what earlier runs have left in the outbox could not be archived: %s", error)
        return
    if found.archived:
        names = [each.name for each in found.archived.values()]
        log.info(
            "archived %s picture%s that earlier runs had left in the outbox: %s",
            *(len(names), "s" * (len(names) != 1), ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)),
        )
    for path, why in list(found.stayed.items())[:SHOWN]:
        log.warning("a picture that was paid for stays in the outbox, %s: %s", path, why)


def _has_looked(flow_runs: FlowRuns, archive: str) -> bool:
    """Whether a task of this try has looked before; from now on one has."""
    with _looking:
        before = (flow_runs, archive) in _looked
        _looked[flow_runs, archive] = None
        if len(_looked) > REMEMBERED:
            del _looked[next(iter(_looked))]
        return before
