"""Prefect flows that compose the tasks."""

from prefect_segmind.flows.image_to_image import image_to_image
from prefect_segmind.flows.refresh_assets import refresh_assets

__all__ = ["image_to_image", "refresh_assets"]
