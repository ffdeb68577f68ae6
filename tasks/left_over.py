"""Each run archives what earlier runs have left in the outbox, and says so in its log."""

from __future__ import annotations

from prefect.runtime import flow_run

from prefect_segmind.pipeline.archive import Archiving
from prefect_segmind.pipeline.left_over import archive_left_over
from prefect_segmind.services import Services
from prefect_segmind.tasks.run_context import run_logger, this_run

SHOWN = 10
"""How many pictures the log names."""


def archive_what_is_left_over(services: Services) -> None:
    """Archives the paid pictures in the outbox that no live run is about to archive; it never fails the run.

    Args:
        services: The services of the run.
    """
    log = run_logger()
    try:
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
