"""The flow of one picture, end to end."""

from __future__ import annotations

from prefect import flow
from prefect.runtime import flow_run

from prefect_segmind.api.resolutions import DEFAULT_RESOLUTION
from prefect_segmind.archive.record import OnKept, OnUnknown
from prefect_segmind.flows.form_choices import MagicPromptChoice, ResolutionChoice, Seed, StyleChoice
from prefect_segmind.jobs.job import name_from_image
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.reporting.artifacts import publish_before_after
from prefect_segmind.reporting.listener import listener
from prefect_segmind.services import Services
from prefect_segmind.tasks import archive_image, generate_image, publish_image, upload_image, validate_job
from prefect_segmind.tasks.run_context import run_ledger


def _flow_run_name() -> str:
    values = flow_run.parameters
    return f"image-to-image {values.get('name') or name_from_image(str(values.get('image')))}"


@flow(name="image-to-image", flow_run_name=_flow_run_name)
def image_to_image(
    image: str,
    prompt: str,
    name: str | None = None,
    image_weight: int = 50,
    style_type: StyleChoice = "GENERAL",
    resolution: ResolutionChoice = DEFAULT_RESOLUTION,
    seed: Seed = None,
    magic_prompt_option: MagicPromptChoice = "AUTO",
    negative_prompt: str | None = None,
    allow_extreme_ratio: bool = False,
    archive: str | None = None,
    upload_to: str | None = None,
    publish_to: str | None = None,
    credentials_block: str | None = None,
    on_unknown: OnUnknown = "repay",
    on_kept: OnKept = "wait",
) -> ArchivedImage:
    """Makes one picture of an image and a prompt, pays for it once, and archives it.

    The same job run again finds the picture in the archive and pays nothing.

    Args:
        image: The source image: a path on the worker, s3://bucket/key, or an http(s):// address. JPEG, PNG and WebP go
            up as they are; most other formats are converted.
        prompt: What the picture should show.
        name: Where the picture goes in the archive, hero/summer for example; the image's name if left out.
        image_weight: 1 to 100; higher keeps more of the source image.
        style_type: The style of the picture.
        resolution: Size of the picture in pixels; AUTO chooses the one that crops the source image least.
        seed: 100 to 999999; random draws a fresh one, so that each run pays for another picture. Left out, it is
            derived from the job, so that the same job is the same picture.
        magic_prompt_option: Whether the model may rewrite the prompt; OFF is reproducible.
        negative_prompt: What the picture should not show; the model may ignore it.
        allow_extreme_ratio: Whether an image wider or taller than 3 to 1 is taken.
        archive: Where pictures go: s3://bucket/prefix or a folder; the worker's setting if left out.
        upload_to: Where source images go for the provider to read them: s3://bucket/prefix; the worker's setting if
            left out.
        publish_to: Where the finished picture is copied to, under an address that stays: s3://bucket/live gives
            live/{name}.png.
        credentials_block: Name of a SegmindCredentials block; the worker's setting or environment if left out.
        on_unknown: Whether to send another request (repay) or not (fail) after one, of this run or an earlier one, that
            may have been billed.
        on_kept: Whether to wait or to pay once more (repay) for a picture that is paid for and lies in the outbox of
            another machine.

    Returns:
        Where the picture is, what this run paid for it, and whether it was made or found.

    Raises:
        SegmindError: In one of its classes; the message names what is wrong and what to do.
    """
    listener().began(str(flow_run.id))
    services = Services(
        archive=archive, upload_to=upload_to, publish_to=publish_to, credentials_block=credentials_block
    )
    _ = services.credentials  # what is not configured fails before anything is done
    services.check()
    services.check_event_source(image)
    try:
        job = validate_job(
            {
                "name": name,
                "image": image,
                "prompt": prompt,
                "image_weight": image_weight,
                "style_type": style_type,
                "resolution": resolution,
                "seed": seed,
                "magic_prompt_option": magic_prompt_option,
                "negative_prompt": negative_prompt,
                "allow_extreme_ratio": allow_extreme_ratio,
            },
            credentials_block,
        )
        uploaded = upload_image(job, upload_to, credentials_block)
        generated = generate_image(job, uploaded, archive, upload_to, credentials_block, on_unknown, on_kept)
        archived = archive_image(generated)
        if publish_to is not None:
            archived = publish_image(archived, publish_to, archive)
        publish_before_after(job, archived, generated, services.archive, services.reader)
        return archived
    finally:
        listener().ended(run_ledger())


if __name__ == "__main__":
    image_to_image.serve(name="on-demand")
