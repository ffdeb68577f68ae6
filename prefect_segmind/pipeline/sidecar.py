"""The sidecar: a JSON object beside each picture that describes its origin to people and tools."""

from __future__ import annotations

from typing import Any

from prefect_segmind._version import __version__
from prefect_segmind.archive.record import Record
from prefect_segmind.money import usd
from prefect_segmind.pipeline.pay import GeneratedImage

_OF_ATTEMPTS = {"sent_at", "status", "reason", "wait_seconds", "possibly_billed"}
"""The fields of each request in a sidecar; the record also has the run and the machine that sent it."""
_OF_OUTPUT = {"sha256", "width", "height", "size_bytes", "format", "content_type"}


def sidecar(
    generated: GeneratedImage, record: Record, flow_run_id: str | None, copied_from: str | None
) -> dict[str, Any]:
    """Builds the sidecar of an archived picture.

    It has locations as `s3://` URIs and paths, but no key and no signed address.

    Args:
        generated: The picture.
        record: Its record, with the log of all requests.
        flow_run_id: The Prefect flow run that archives it; None outside of one.
        copied_from: The URI of the picture of another name that this one is a copy of, at no cost; None for no copy.

    Returns:
        The JSON object.
    """
    job, picture = generated.job, generated.picture
    by_content = job.source_sha256 == job.source.sha256  # an earlier version may have paid for what was at the address
    return {
        "schema_version": 1,
        "fingerprint": job.fingerprint,
        "job": job.job.model_dump(mode="json"),
        "request": {"image_file": generated.source_uri, **job.parameters},
        "source": job.source.model_dump(mode="json") if by_content else {"sha256_of_url": job.source_sha256},
        "output": picture.model_dump(mode="json", include=_OF_OUTPUT),
        "seed": picture.seed,
        "cost_usd": "0.00" if copied_from else usd(picture.cost_usd),
        "cost_source": picture.cost_source,
        "copied_from": copied_from,
        "request_id": picture.request_id,
        "attempt_log": [each.model_dump(mode="json", include=_OF_ATTEMPTS) for each in record.attempts],
        "paid_at": picture.paid_at.isoformat(),
        "warnings": [*job.warnings, *picture.notices],
        "flow_run_id": flow_run_id,
        "plugin_version": __version__,
    }
