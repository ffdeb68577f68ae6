"""The sidecar: a JSON object beside each picture that tells people and tools where it comes from."""

from __future__ import annotations

from typing import Any

from prefect_segmind._version import __version__
from prefect_segmind.archive.record import Record
from prefect_segmind.money import usd
from prefect_segmind.pipeline.pay import GeneratedImage

_TOLD = {"sent_at", "status", "reason", "wait_seconds", "possibly_billed"}
"""What a sidecar tells of each request; which run sent it from which machine is the record's business."""


def sidecar(
    generated: GeneratedImage, record: Record, flow_run_id: str | None, copied_from: str | None
) -> dict[str, Any]:
    """Builds the sidecar of an archived picture.

    It names places as `s3://` URIs and paths; no key and no signed address is in it.

    Args:
        generated: The picture.
        record: Its record, which has the log of all requests.
        flow_run_id: The Prefect flow run that archives it, if there is one.
        copied_from: URI of the picture that this one is a copy of, under another name; a copy costs nothing.
    """
    job, picture = generated.job, generated.picture
    return {
        "schema_version": 1,
        "fingerprint": job.fingerprint,
        "job": job.job.model_dump(mode="json"),
        "request": {"image_file": generated.source_uri, **job.parameters},
        "source": job.source.model_dump(mode="json") if job.source else {"sha256_of_url": job.source_sha256},
        "output": {
            "sha256": picture.sha256,
            "width": picture.width,
            "height": picture.height,
            "size_bytes": picture.size_bytes,
            "format": picture.format,
            "content_type": picture.content_type,
        },
        "seed": picture.seed,
        "cost_usd": "0.00" if copied_from else usd(picture.cost_usd),
        "cost_source": picture.cost_source,
        "copied_from": copied_from,
        "request_id": picture.request_id,
        "attempt_log": [each.model_dump(mode="json", include=_TOLD) for each in record.attempts],
        "paid_at": picture.paid_at.isoformat(),
        "warnings": [*job.warnings, *picture.notices],
        "flow_run_id": flow_run_id,
        "plugin_version": __version__,
    }
