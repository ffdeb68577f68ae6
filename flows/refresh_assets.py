"""The flow of many pictures: a manifest is planned, then produced, as fast as the API allows and within a budget."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from datetime import datetime, timezone
from decimal import Decimal
from functools import partial
from pathlib import PurePosixPath
from typing import Any, cast
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_segmind import configuration
from prefect_segmind.archive import Archive
from prefect_segmind.batch import BatchError, BatchResult, Tally, planned
from prefect_segmind.credentials import load_credentials
from prefect_segmind.errors import (
    ApiError,
    BudgetReachedError,
    ConfigurationError,
    InvalidKeyError,
    RunCancelledError,
    SegmindError,
    StoreError,
)
from prefect_segmind.gate import Gate
from prefect_segmind.manifest import MAX_ASSETS
from prefect_segmind.manifest_source import load_manifest
from prefect_segmind.manifest_text import MAX_TEXT, write_manifest
from prefect_segmind.outbox import Outbox
from prefect_segmind.plan import Plan, make_plan
from prefect_segmind.production import shared
from prefect_segmind.record import OnUnknown
from prefect_segmind.report import publish_batch, publish_plan
from prefect_segmind.request import Job
from prefect_segmind.retry import RetryPolicy
from prefect_segmind.settings import load_settings
from prefect_segmind.spool import Spool
from prefect_segmind.tasks import produce_asset
from prefect_segmind.tasks.attempts import mention_conditions
from prefect_segmind.validation import ValidatedJob

WATCH_SECONDS = 10.0
"""Seconds between two lines of progress, and between two looks whether the run was cancelled in Prefect."""

POLICY = RetryPolicy(rate_limit_retries=20)
"""A rate limit meets any of the assets, and is none of its faults."""
_PATIENT = produce_asset.with_options(retries=POLICY.retries + (POLICY.rate_limit_retries or 0))
_ENDED_BY = {"KeyboardInterrupt": "Ctrl-C", "TerminationSignal": "SIGTERM"}
THREADS = 4096
"""More than are ever made: they are made as they are needed, and the gate bounds how many assets are under way."""


def _flow_run_name() -> str:
    return f"refresh-assets {PurePosixPath(str(flow_run.parameters.get('manifest'))).stem}"


@flow(name="refresh-assets", flow_run_name=_flow_run_name, task_runner=ThreadPoolTaskRunner(max_workers=THREADS))  # type: ignore[arg-type]
def refresh_assets(
    manifest: str,
    archive: str | None = None,
    upload_to: str | None = None,
    variables: dict[str, Any] | None = None,
    max_concurrency: int = 16,
    requests_per_minute: int | None = None,
    budget_usd: Decimal | None = None,
    dry_run: bool = False,
    on_unknown: OnUnknown = "repay",
    fail_run_on_failures: bool = True,
    credentials_block: str | None = None,
) -> BatchResult:
    """Makes the pictures of a manifest, pays for each once, and archives them. Run it again after whatever happened.

    Args:
        manifest: What to make: a YAML, JSON, JSON Lines or CSV file, a path on the worker or s3://bucket/key.
        archive: Where pictures go: s3://bucket/prefix or a folder; the worker's setting if left out.
        upload_to: Where source images go for the provider to read them: s3://bucket/prefix; the worker's setting if
            left out.
        variables: Values for the manifest's templates, such as {"season": "autumn"}; they win over the manifest's own
            vars, not over an asset's.
        max_concurrency: Requests to the API at once, at most.
        requests_per_minute: Requests to the API in any minute, at most; the API's own limit is kept in any case.
        budget_usd: What the run may spend. What may have been billed counts as spent. At the limit nothing new is
            sent, and the rest is reported as not started.
        dry_run: Only plan: what would be made, and what it would cost.
        on_unknown: Whether to send another request (repay) or not (fail) after one, of this run or an earlier one, that
            may have been billed.
        fail_run_on_failures: Whether the run ends as Failed where assets failed or the budget was reached; otherwise it
            is Completed, and the result tells.
        credentials_block: Name of a SegmindCredentials block; the worker's setting or environment if left out.

    Returns:
        The counts, the cost, and what came of each asset.

    Raises:
        ManifestError: The manifest has mistakes; the message has a line for each. Nothing was paid.
        BatchError: Not all assets were made; its `result` tells which were.
        SegmindError: In one of its other classes, before anything was paid.
    """
    _check(max_concurrency, requests_per_minute, budget_usd)
    if not dry_run:
        load_credentials(credentials_block)  # what is not configured is said before anything is done
    opened, settings, log = configuration.open_archive(archive), load_settings(), get_run_logger()
    unlisted = settings.allow_unlisted_resolution
    with (
        load_manifest(manifest, variables, s3=configuration.s3_client, allow_unlisted_resolution=unlisted) as asked,
        Spool[Job | ValidatedJob](ValidatedJob, Job) as entries,
        Spool(Job) as failed_jobs,
    ):
        for warning in asked.warnings:
            log.warning(warning)
        plan = make_plan(
            asked.jobs,
            entries,
            reader=configuration.source_reader(credentials_block),
            archive=opened,
            outbox=configuration.open_outbox(opened),
            price_usd=settings.price_usd,
            on_unknown=on_unknown,
        ).model_copy(update={"budget_usd": budget_usd, "credits_usd": _credits(credentials_block)})
        _tell(plan)
        publish_plan(plan, manifest)
        if dry_run:
            return planned(plan)
        gate = Gate(
            max_concurrency=max_concurrency,
            requests_per_minute=requests_per_minute,
            budget_usd=budget_usd,
            longest_wait_seconds=settings.longest_wait_seconds,
            say=log.warning,
        )
        generation = configuration.open_generation(
            archive, upload_to, credentials_block, on_unknown=on_unknown, policy=POLICY, gate=gate
        )
        mention_conditions(opened)
        token = shared.set(configuration.open_production(generation, upload_to, credentials_block))
        tally = Tally(plan, failed_jobs)
        try:
            _produce(entries, gate, tally, settings.grace_seconds)
            result = tally.result(_keep_failed(failed_jobs, opened, generation.outbox), gate.stopped)
            publish_batch(result, manifest, opened, credentials_block)
            return cast(BatchResult, _ended(result, gate.stopped, fail_run_on_failures))
        except BatchError:
            raise
        except BaseException as error:
            # Whatever ends the run, what it has paid is told.
            tally.close(gate.budget)
            result = tally.result(_keep_failed(failed_jobs, opened, generation.outbox), gate.stopped)
            log.warning(result.sentence())
            vars(error)["batch"] = BatchError(result.sentence(), result, gate.stopped)
            raise
        finally:
            shared.reset(token)


def _check(max_concurrency: int, requests_per_minute: int | None, budget_usd: Decimal | None) -> None:
    """Refuses limits that make no sense, before anything is read."""
    if not 1 <= max_concurrency <= 512:
        raise ConfigurationError(f"max_concurrency: {max_concurrency} is not allowed; allowed is 1 to 512")
    if requests_per_minute is not None and requests_per_minute < 1:
        raise ConfigurationError(f"requests_per_minute: {requests_per_minute} is not allowed; allowed is 1 or more")
    if budget_usd is not None and not (budget_usd.is_finite() and budget_usd >= 0):
        raise ConfigurationError(f"budget_usd: {budget_usd} is not allowed; allowed is 0 or more")


def _credits(credentials_block: str | None) -> Decimal | None:
    """What the account has; None where there is no key yet, or the API does not tell.

    Raises:
        InvalidKeyError: The key is refused.
    """
    try:
        with load_credentials(credentials_block).get_client() as client:
            return client.credits()
    except InvalidKeyError:
        raise  # every request would be refused like this one
    except (ApiError, ConfigurationError) as error:
        get_run_logger().info("the account's credits are not known: %s", error)
        return None


def _tell(plan: Plan) -> None:
    """Puts the plan into the run's log."""
    log = get_run_logger()
    log.info("%s", "; ".join(f"{title}: {text}" for title, text in plan.facts().items()))
    for warning, count in plan.warnings:
        log.warning("%s asset%s: %s", count, "s" * (count != 1), warning)
    for name, problem in plan.problems:
        log.warning("%s will fail, unpaid: %s", name, problem)
    for shortfall in plan.shortfalls():
        log.warning(shortfall)


def _produce(entries: Spool[Job | ValidatedJob], gate: Gate, tally: Tally, grace_seconds: float) -> None:
    """Starts one task run for each asset, a bounded number at a time, and waits for the last.

    Interrupted, it sends nothing new, and gives what is in flight the grace to end and be archived.
    """
    with _watched(gate, tally):
        try:
            for entry in entries:
                if not gate.enter():
                    break
                tally.start(entry)
                _PATIENT.submit(entry).add_done_callback(partial(_end, entry, gate, tally))
            tally.wait()
        except BaseException as error:
            gate.stop(RunCancelledError(f"the run was ended by {_ENDED_BY.get(type(error).__name__, 'an error')}"))
            get_run_logger().warning(
                "nothing new is sent; %s in flight have %.0f s to end", gate.in_flight, grace_seconds
            )
            tally.wait(grace_seconds)
            raise


def _end(entry: Job | ValidatedJob, gate: Gate, tally: Tally, future: PrefectFuture[Any]) -> None:
    """Takes down what came of an asset, in the thread that worked on it."""
    try:
        outcome = future.result(raise_on_failure=False)
    except BaseException as error:  # noqa: BLE001
        outcome = error
    try:
        tally.end(entry, outcome)
    finally:
        gate.leave()


@contextmanager
def _watched(gate: Gate, tally: Tally) -> Iterator[None]:
    """Tells how far the run is while it goes on, in the log and in an artifact, and notices a cancellation."""
    ended = threading.Event()
    watch = threading.Thread(target=copy_context().run, args=(_watch, gate, tally, ended), name="segmind-watch")
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(gate: Gate, tally: Tally, ended: threading.Event) -> None:
    log, run_id, last = get_run_logger(), UUID(str(flow_run.id)), ""
    artifact: UUID | None = None
    over = False
    while not over:
        over = ended.wait(WATCH_SECONDS)
        try:
            progress = tally.progress
            if progress.sentence() != last and (not over or artifact):
                last, percent = progress.sentence(), 100 * progress.done / max(1, progress.total)
                if artifact is None:
                    key = f"refresh-assets-{str(run_id)[:8]}"
                    artifact = cast(UUID, create_progress_artifact(percent, key, last))
                else:
                    update_progress_artifact(artifact, percent, description=last)
                log.info(last)
            if over:
                break
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(run_id).state
            if state is not None and (state.is_cancelling() or state.is_cancelled()):
                gate.stop(RunCancelledError("the run was cancelled in Prefect"))
        except Exception as error:  # noqa: BLE001
            log.debug("Prefect's server does not answer: %s", error)  # what is paid for does not depend on it


def _keep_failed(jobs: Spool[Job], archive: Archive, outbox: Outbox) -> str | None:
    """Writes the failed jobs as a manifest to run again, into the archive, or beside the outbox if that is down."""
    log = get_run_logger()
    if not len(jobs):
        return None
    name, kind, data = "failed.yaml", "application/yaml", b""
    if len(jobs) <= MAX_ASSETS:
        data = "".join(write_manifest(job.model_dump(mode="json") for job in jobs)).encode()
    if not 0 < len(data) <= MAX_TEXT:  # more than is read of YAML
        lines = ('{"templates": false}', *(job.model_dump_json() for job in jobs))
        name, kind, data = "failed.jsonl", "application/jsonl", "\n".join(lines).encode()
    key = f"runs/{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{str(flow_run.id)[:8]}/{name}"
    try:
        archive.store.put(f".segmind/{key}", data, kind, if_absent=True)
        return archive.store.uri(f".segmind/{key}")
    except StoreError as refused:
        path = outbox.folder.parent / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            log.warning("the failed jobs cannot be written, neither to the archive (%s) nor here (%s)", refused, error)
            return None
        log.warning("the failed jobs are written to %s, for the archive says: %s", path, refused)
        return str(path)


def _ended(result: BatchResult, stopped: SegmindError | None, fail_run_on_failures: bool) -> BatchResult | State[Any]:
    """Ends the run as it deserves: Completed, Cancelled, or Failed with an error that has the result."""
    told = result.sentence() + (f"; {stopped}" if stopped else "")
    told += f"; the failed ones are in {result.failed_manifest}, to run again" if result.failed_manifest else ""
    error = BatchError(told, result, stopped)
    if isinstance(stopped, RunCancelledError):
        return Cancelled(message=told, data=error)  # who called the flow gets the error
    wanted = fail_run_on_failures and (result.failed or stopped)
    if wanted or (stopped and not isinstance(stopped, BudgetReachedError)):
        raise error
    get_run_logger().info(told)
    return result


if __name__ == "__main__":
    refresh_assets.serve(name="on-demand")
