"""Prefect tasks, one for each stage of a job: use them one by one in a flow of your own."""

from prefect_segmind.tasks.image_to_image import archive_image, generate_image, upload_image, validate_job

__all__ = ["archive_image", "generate_image", "upload_image", "validate_job"]
