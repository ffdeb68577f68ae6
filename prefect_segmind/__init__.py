"""Prefect tasks and flows for Segmind's Ideogram 2a image-to-image API. A picture is paid for once.

The names below are loaded when they are first used, so that importing the package is quick and a command can set
Prefect up before Prefect is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from prefect_segmind._version import __version__

if TYPE_CHECKING:
    from prefect_segmind.api.client import SegmindClient
    from prefect_segmind.api.request import ImageToImageRequest
    from prefect_segmind.api.resolutions import Resolution
    from prefect_segmind.batch.tally import BatchError, BatchResult
    from prefect_segmind.credentials import SegmindCredentials
    from prefect_segmind.errors import SegmindError
    from prefect_segmind.flows.explore_variations import explore_variations
    from prefect_segmind.flows.image_to_image import image_to_image
    from prefect_segmind.flows.process_inbox import process_inbox
    from prefect_segmind.flows.reconcile import reconcile
    from prefect_segmind.flows.refresh_assets import refresh_assets
    from prefect_segmind.jobs.job import Job, parse_job
    from prefect_segmind.pipeline.archive import ArchivedImage
    from prefect_segmind.pipeline.pay import GeneratedImage
    from prefect_segmind.pipeline.unsettled import Reconciled
    from prefect_segmind.pipeline.upload import UploadedImage
    from prefect_segmind.pipeline.validate import ValidatedJob
    from prefect_segmind.settings import SegmindSettings
    from prefect_segmind.tasks.image_to_image import (
        archive_image,
        generate_image,
        publish_image,
        upload_image,
        validate_job,
    )
    from prefect_segmind.tasks.produce_asset import produce_asset

__all__ = [
    "ArchivedImage",
    "BatchError",
    "BatchResult",
    "GeneratedImage",
    "ImageToImageRequest",
    "Job",
    "Reconciled",
    "Resolution",
    "SegmindClient",
    "SegmindCredentials",
    "SegmindError",
    "SegmindSettings",
    "UploadedImage",
    "ValidatedJob",
    "__version__",
    "archive_image",
    "explore_variations",
    "generate_image",
    "image_to_image",
    "parse_job",
    "process_inbox",
    "produce_asset",
    "publish_image",
    "reconcile",
    "refresh_assets",
    "upload_image",
    "validate_job",
]

_HOMES = {
    "pipeline.archive": ("ArchivedImage",),
    "batch.tally": ("BatchError", "BatchResult"),
    "api.client": ("SegmindClient",),
    "credentials": ("SegmindCredentials",),
    "errors": ("SegmindError",),
    "flows": ("explore_variations", "image_to_image", "process_inbox", "reconcile", "refresh_assets"),
    "pipeline.pay": ("GeneratedImage",),
    "api.request": ("ImageToImageRequest",),
    "jobs.job": ("Job", "parse_job"),
    "api.resolutions": ("Resolution",),
    "settings": ("SegmindSettings",),
    "tasks": ("archive_image", "generate_image", "produce_asset", "publish_image", "upload_image", "validate_job"),
    "pipeline.unsettled": ("Reconciled",),
    "pipeline.upload": ("UploadedImage",),
    "pipeline.validate": ("ValidatedJob",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
