"""Prefect flows that compose the tasks."""

from prefect_segmind.flows.explore_variations import explore_variations
from prefect_segmind.flows.image_to_image import image_to_image
from prefect_segmind.flows.process_inbox import process_inbox
from prefect_segmind.flows.reconcile import reconcile
from prefect_segmind.flows.refresh_assets import refresh_assets

__all__ = ["explore_variations", "image_to_image", "process_inbox", "reconcile", "refresh_assets"]
