"""The first stage: a job is checked against its source image, and its open parameters are resolved. Nothing is paid."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, ConfigDict

from prefect_segmind.api.request import ImageToImageRequest
from prefect_segmind.api.resolutions import AUTO, crop_loss, nearest_resolution
from prefect_segmind.images.inspection import SourceImage, inspect
from prefect_segmind.jobs.fingerprint import derived_seed, fingerprint
from prefect_segmind.jobs.job import Job
from prefect_segmind.money import LIST_PRICE_USD
from prefect_segmind.pipeline.source import SourceReader

CROP_WARNING = 0.10
"""The share of a source's area that may be cropped away without a warning."""


class ValidatedJob(BaseModel):
    """A job that is ready to be paid for.

    Attributes:
        job: The job as it was asked for.
        source: The inspected source image.
        source_sha256: The SHA-256 of its content; for a job in `earlier`, it may be that of its URL.
        parameters: Every parameter of the request except `image_file`, with seed and resolution resolved.
        fingerprint: The SHA-256 that identifies the picture.
        price_usd: The expected price.
        warnings: What people should know before the picture is paid for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: Job
    source: SourceImage
    source_sha256: str
    parameters: dict[str, Any]
    fingerprint: str
    price_usd: Decimal
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the job."""
        return self.job.name

    @property
    def place(self) -> str:
        """The key of the picture and its sidecar in the archive, without an extension."""
        return f"{self.name}/{self.fingerprint[:16]}"

    @property
    def seed(self) -> int:
        """The seed that is sent, 100 to 999999."""
        return int(self.parameters["seed"])

    @property
    def earlier(self) -> tuple[ValidatedJob, ...]:
        """The job as earlier versions may have known it: its picture may have been paid for then, as one of these.

        They took texts as they were written, and an image at an http(s) address that they could not read by the
        SHA-256 of that address.
        """
        sources = [self.source_sha256]
        if self.job.image.startswith(("http://", "https://")) and self.job.resolution != AUTO:
            sources.append(hashlib.sha256(self.job.image.encode()).hexdigest())
        texts = [{}, self.job.written] if self.job.written else [{}]
        others = [(source, written) for source in sources for written in texts][1:]
        return tuple(self._known_by(source, written) for source, written in others)

    def _known_by(self, source: str, written: Mapping[str, str]) -> ValidatedJob:
        parameters = {**self.parameters, **written}
        if self.job.seed is None:
            del parameters["seed"]
            parameters["seed"] = derived_seed(source, parameters)
        was = fingerprint(source, parameters)
        return self.model_copy(update={"source_sha256": source, "parameters": parameters, "fingerprint": was})

    @property
    def known_as(self) -> tuple[ValidatedJob, ...]:
        """The job, and as earlier versions may have known it."""
        return (self, *self.earlier)

    def request(self, image_file: str) -> ImageToImageRequest:
        """The request to send.

        Args:
            image_file: The address of the source image, which the provider can GET.
        """
        fields = {"image_file": image_file, **self.parameters}  # the resolution was checked with the job
        return ImageToImageRequest.model_validate(fields, context={"allow_unlisted_resolution": True})


@dataclass(frozen=True)
class InspectedSource:
    """A source image, apart from the jobs that use it.

    Attributes:
        image: The inspected image.
        warnings: What people should know before a picture of it is paid for.
        location: Where it was found; None if that is the location given.
    """

    image: SourceImage
    warnings: tuple[str, ...] = ()
    location: str | None = None


def inspect_source(image: str, reader: SourceReader, *, allow_extreme_ratio: bool = False) -> InspectedSource:
    """Reads, decodes and hashes a source image.

    Args:
        image: Its location.
        reader: Reads it.
        allow_extreme_ratio: Whether side ratios beyond 1:3 and 3:1 are accepted.

    Raises:
        SourceImageError: It cannot be used; the message says why and what to do.
        StoreError: It is in S3 or at an address, and cannot be read at this moment.
    """
    location = reader.locate(image)
    found = inspect(reader.read(location), image, allow_extreme_ratio=allow_extreme_ratio)
    warnings = tuple(f"the image is {change}" for change in found.changes)
    return InspectedSource(found, warnings, None if location == image else location)


def resolve(job: Job, source: InspectedSource, *, price_usd: Decimal = LIST_PRICE_USD) -> ValidatedJob:
    """Resolves a job's seed, resolution, fingerprint and price.

    Args:
        job: The job; a `random` seed is drawn by chance.
        source: Its source image.
        price_usd: The price of a picture.
    """
    if source.location is not None:
        job = job.model_copy(update={"image": source.location})
    warnings = list(source.warnings)
    parameters = job.parameters()
    parameters["resolution"] = _resolution(job, source.image, warnings)
    if job.negative_prompt:
        warnings.append("negative_prompt may be ignored: Ideogram documents it for other versions than 2a")
    if job.seed is None:
        parameters["seed"] = derived_seed(source.image.sha256, parameters)
    elif job.seed == "random":
        parameters["seed"] = with_drawn_seed(job).seed
    return ValidatedJob(
        job=job,
        source=source.image,
        source_sha256=source.image.sha256,
        parameters=parameters,
        fingerprint=fingerprint(source.image.sha256, parameters),
        price_usd=price_usd,
        warnings=tuple(warnings),
    )


def with_drawn_seed(job: Job, draw_by: str | None = None) -> Job:
    """The job with a number in place of a `random` seed, so that it is the same picture whenever it is validated.

    Args:
        job: The job.
        draw_by: The same text draws the same seed for the same job; if None, it is drawn by chance.
    """
    if job.seed != "random":
        return job
    seed = 100 + secrets.randbelow(999_900) if draw_by is None else derived_seed(draw_by, job.parameters())
    return job.model_copy(update={"seed": seed})


def validate(job: Job, reader: SourceReader, *, price_usd: Decimal = LIST_PRICE_USD) -> ValidatedJob:
    """Inspects a job's source image and resolves its seed, resolution, fingerprint and price.

    Args:
        job: The job.
        reader: Reads the source.
        price_usd: The price of a picture.

    Raises:
        SourceImageError: The source cannot be used; the message says why and what to do.
        StoreError: The source is in S3 or at an address, and cannot be read at this moment.
    """
    source = inspect_source(job.image, reader, allow_extreme_ratio=job.allow_extreme_ratio)
    return resolve(job, source, price_usd=price_usd)


def _resolution(job: Job, source: SourceImage, warnings: list[str]) -> str:
    nearest = nearest_resolution(source.width, source.height).value
    chosen = nearest if job.resolution == AUTO else job.resolution
    lost = crop_loss(source.width, source.height, chosen)
    if lost > CROP_WARNING:
        better = "no resolution crops less"
        if chosen != nearest:
            least = crop_loss(source.width, source.height, nearest)
            better = f"{nearest} would crop {least:.0%} (resolution: AUTO chooses it)"
        warnings.append(f"{chosen} crops {lost:.0%} of the {source.width}×{source.height} image away; {better}")
    return chosen
