"""The flow of many pictures: a manifest is planned, then produced, as fast as the API allows and within a budget."""

from __future__ import annotations

from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from prefect_segmind.archive.record import OnKept, OnUnknown
from prefect_segmind.batch.tally import BatchResult
from prefect_segmind.flows.batch_run import Terms, finish_flow, run_batch, run_name
from prefect_segmind.manifest.loading import load_manifest
from prefect_segmind.reporting.listener import listener
from prefect_segmind.services import Services


def _flow_run_name() -> str:
    return run_name(f"refresh-assets {PurePosixPath(str(flow_run.parameters.get('manifest'))).stem}")


@flow(name="refresh-assets", flow_run_name=_flow_run_name)
def refresh_assets(
    manifest: str,
    archive: str | None = None,
    upload_to: str | None = None,
    publish_to: str | None = None,
    variables: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
    max_concurrency: int = 16,
    requests_per_minute: int | None = None,
    budget_usd: Decimal | None = None,
    budget_name: str | None = None,
    approve_above_usd: Decimal | None = None,
    dry_run: bool = False,
    on_unknown: OnUnknown = "repay",
    on_kept: OnKept = "wait",
    fail_run_on_failures: bool = True,
    shards: int = 1,
    credentials_block: str | None = None,
) -> BatchResult:
    """Makes the pictures of a manifest, pays for each once, and archives them. Run it again after whatever happened.

    Args:
        manifest: What to make: a YAML, JSON, JSON Lines or CSV file, a path on the worker or s3://bucket/key.
        archive: Where pictures go: s3://bucket/prefix or a folder; the worker's setting if left out.
        upload_to: Where source images go for the provider to read them: s3://bucket/prefix; the worker's setting if
            left out.
        publish_to: Where each finished picture is copied to, under an address that stays: s3://bucket/live gives
            live/{name}.png.
        variables: Values for the manifest's templates, such as {"season": "autumn"}; they win over the manifest's own
            vars, not over an asset's.
        defaults: Fields for the assets that do not give them, such as {"style_type": "ANIME"}; they win over the
            manifest's own defaults.
        max_concurrency: Requests to the API at once, at most.
        requests_per_minute: Requests to the API in any minute, at most; the API's own limit is kept in any case.
        budget_usd: What the run may spend. What may have been billed counts as spent. At the limit nothing new is
            sent, and the rest is reported as not started.
        budget_name: A name for the budget, which all runs share then that give it and have this archive: budget_usd is
            what they may spend in all.
        approve_above_usd: A run that may cost more pauses and asks a person; the worker's setting if left out.
        dry_run: Only plan: what would be made, and what it would cost.
        on_unknown: Whether to send another request (repay) or not (fail) after one, of this run or an earlier one, that
            may have been billed.
        on_kept: Whether to wait or to pay once more (repay) for a picture that is paid for and lies in the outbox of
            another machine.
        fail_run_on_failures: Whether the run ends as Failed where assets failed or are only submitted, or the budget
            was reached; otherwise it is Completed, and the result names them.
        shards: In how many runs the pictures are made, 1 to 64: this run plans and reports, and starts so many of its
            own deployment, on whatever machines take them. All limits are for all of them together.
        credentials_block: Name of a SegmindCredentials block; the worker's setting or environment if left out.

    Returns:
        The counts, the cost, the first pictures and failures, and the address of a file with all of them.

    Raises:
        ManifestError: The manifest has mistakes; the message has a line for each. Nothing was paid.
        BatchError: Not all assets were made; its `result` has those that were.
        SegmindError: In one of its other classes, before anything was paid.
    """
    listener().began(str(flow_run.id))
    services = Services(
        archive=archive,
        upload_to=upload_to,
        publish_to=publish_to,
        credentials_block=credentials_block,
        budget_name=budget_name,
        budget_usd=budget_usd,
    )
    limits = max_concurrency, requests_per_minute, budget_usd, approve_above_usd
    terms = Terms(services, *limits, on_unknown, on_kept, fail_run_on_failures, dry_run, shards)
    with load_manifest(
        manifest,
        variables,
        defaults=defaults,
        s3=lambda: services.s3,
        allow_unlisted_resolution=services.settings.allow_unlisted_resolution,
    ) as loaded:
        for warning in loaded.warnings:
            get_run_logger().warning(warning)
        ended = run_batch(loaded.jobs, manifest, terms)
    return finish_flow(ended, ended.result, terms)


if __name__ == "__main__":
    refresh_assets.serve(name="on-demand")
