"""Prefect tasks: one for each stage of a job, to use one by one in a flow of your own, and one for all of them."""

from prefect_segmind.tasks.image_to_image import (
    archive_image,
    generate_image,
    publish_image,
    upload_image,
    validate_job,
)
from prefect_segmind.tasks.produce_asset import produce_asset

__all__ = ["archive_image", "generate_image", "produce_asset", "publish_image", "upload_image", "validate_job"]
