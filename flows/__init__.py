"""Prefect flows that compose the tasks."""

from prefect_segmind.flows.image_to_image import image_to_image

__all__ = ["image_to_image"]
