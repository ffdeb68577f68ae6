"""The 78 resolutions of Ideogram 2a, and which of them crops a picture least.

The provider documents the first ten; the rest are from Ideogram's own list. The model first crops its input to the
ratio of the resolution, so the ratio decides how much of the source is lost.
"""

from __future__ import annotations

import re
from enum import StrEnum
from functools import lru_cache

AUTO = "AUTO"
"""The value in a job for the resolution whose ratio is nearest to the source image's."""

DEFAULT_RESOLUTION = "RESOLUTION_1024_1024"
"""The API's own default."""


class Resolution(StrEnum):
    """A size in pixels that the model can make, named `RESOLUTION_<width>_<height>`."""

    RESOLUTION_512_1536 = "RESOLUTION_512_1536"
    RESOLUTION_576_1408 = "RESOLUTION_576_1408"
    RESOLUTION_576_1472 = "RESOLUTION_576_1472"
    RESOLUTION_576_1536 = "RESOLUTION_576_1536"
    RESOLUTION_640_1024 = "RESOLUTION_640_1024"
    RESOLUTION_640_1344 = "RESOLUTION_640_1344"
    RESOLUTION_640_1408 = "RESOLUTION_640_1408"
    RESOLUTION_640_1472 = "RESOLUTION_640_1472"
    RESOLUTION_640_1536 = "RESOLUTION_640_1536"
    RESOLUTION_704_1152 = "RESOLUTION_704_1152"
    RESOLUTION_704_1216 = "RESOLUTION_704_1216"
    RESOLUTION_704_1280 = "RESOLUTION_704_1280"
    RESOLUTION_704_1344 = "RESOLUTION_704_1344"
    RESOLUTION_704_1408 = "RESOLUTION_704_1408"
    RESOLUTION_704_1472 = "RESOLUTION_704_1472"
    RESOLUTION_720_1280 = "RESOLUTION_720_1280"
    RESOLUTION_736_1312 = "RESOLUTION_736_1312"
    RESOLUTION_768_1024 = "RESOLUTION_768_1024"
    RESOLUTION_768_1088 = "RESOLUTION_768_1088"
    RESOLUTION_768_1152 = "RESOLUTION_768_1152"
    RESOLUTION_768_1216 = "RESOLUTION_768_1216"
    RESOLUTION_768_1232 = "RESOLUTION_768_1232"
    RESOLUTION_768_1280 = "RESOLUTION_768_1280"
    RESOLUTION_768_1344 = "RESOLUTION_768_1344"
    RESOLUTION_832_960 = "RESOLUTION_832_960"
    RESOLUTION_832_1024 = "RESOLUTION_832_1024"
    RESOLUTION_832_1088 = "RESOLUTION_832_1088"
    RESOLUTION_832_1152 = "RESOLUTION_832_1152"
    RESOLUTION_832_1216 = "RESOLUTION_832_1216"
    RESOLUTION_832_1248 = "RESOLUTION_832_1248"
    RESOLUTION_864_1152 = "RESOLUTION_864_1152"
    RESOLUTION_896_960 = "RESOLUTION_896_960"
    RESOLUTION_896_1024 = "RESOLUTION_896_1024"
    RESOLUTION_896_1088 = "RESOLUTION_896_1088"
    RESOLUTION_896_1120 = "RESOLUTION_896_1120"
    RESOLUTION_896_1152 = "RESOLUTION_896_1152"
    RESOLUTION_960_832 = "RESOLUTION_960_832"
    RESOLUTION_960_896 = "RESOLUTION_960_896"
    RESOLUTION_960_1024 = "RESOLUTION_960_1024"
    RESOLUTION_960_1088 = "RESOLUTION_960_1088"
    RESOLUTION_1024_640 = "RESOLUTION_1024_640"
    RESOLUTION_1024_768 = "RESOLUTION_1024_768"
    RESOLUTION_1024_832 = "RESOLUTION_1024_832"
    RESOLUTION_1024_896 = "RESOLUTION_1024_896"
    RESOLUTION_1024_960 = "RESOLUTION_1024_960"
    RESOLUTION_1024_1024 = "RESOLUTION_1024_1024"
    RESOLUTION_1088_768 = "RESOLUTION_1088_768"
    RESOLUTION_1088_832 = "RESOLUTION_1088_832"
    RESOLUTION_1088_896 = "RESOLUTION_1088_896"
    RESOLUTION_1088_960 = "RESOLUTION_1088_960"
    RESOLUTION_1120_896 = "RESOLUTION_1120_896"
    RESOLUTION_1152_704 = "RESOLUTION_1152_704"
    RESOLUTION_1152_768 = "RESOLUTION_1152_768"
    RESOLUTION_1152_832 = "RESOLUTION_1152_832"
    RESOLUTION_1152_864 = "RESOLUTION_1152_864"
    RESOLUTION_1152_896 = "RESOLUTION_1152_896"
    RESOLUTION_1216_704 = "RESOLUTION_1216_704"
    RESOLUTION_1216_768 = "RESOLUTION_1216_768"
    RESOLUTION_1216_832 = "RESOLUTION_1216_832"
    RESOLUTION_1232_768 = "RESOLUTION_1232_768"
    RESOLUTION_1248_832 = "RESOLUTION_1248_832"
    RESOLUTION_1280_704 = "RESOLUTION_1280_704"
    RESOLUTION_1280_720 = "RESOLUTION_1280_720"
    RESOLUTION_1280_768 = "RESOLUTION_1280_768"
    RESOLUTION_1280_800 = "RESOLUTION_1280_800"
    RESOLUTION_1312_736 = "RESOLUTION_1312_736"
    RESOLUTION_1344_640 = "RESOLUTION_1344_640"
    RESOLUTION_1344_704 = "RESOLUTION_1344_704"
    RESOLUTION_1344_768 = "RESOLUTION_1344_768"
    RESOLUTION_1408_576 = "RESOLUTION_1408_576"
    RESOLUTION_1408_640 = "RESOLUTION_1408_640"
    RESOLUTION_1408_704 = "RESOLUTION_1408_704"
    RESOLUTION_1472_576 = "RESOLUTION_1472_576"
    RESOLUTION_1472_640 = "RESOLUTION_1472_640"
    RESOLUTION_1472_704 = "RESOLUTION_1472_704"
    RESOLUTION_1536_512 = "RESOLUTION_1536_512"
    RESOLUTION_1536_576 = "RESOLUTION_1536_576"
    RESOLUTION_1536_640 = "RESOLUTION_1536_640"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return resolution_size(self.value)


def resolution_size(resolution: str) -> tuple[int, int]:
    """Width and height in pixels of a resolution, listed or not.

    Args:
        resolution: Such as `RESOLUTION_1280_800`.

    Raises:
        ValueError: It is not of the form `RESOLUTION_<width>_<height>`.

    Example:
        >>> resolution_size("RESOLUTION_1280_800")
        (1280, 800)
    """
    match = re.fullmatch(r"RESOLUTION_([1-9][0-9]{1,4})_([1-9][0-9]{1,4})", resolution)
    if match is None:
        raise ValueError(f"{resolution!r} is not of the form RESOLUTION_<width>_<height>")
    return int(match[1]), int(match[2])


def crop_loss(width: int, height: int, resolution: str) -> float:
    """The share of an image's area, 0 to 1, that is cropped away to reach the ratio of a resolution.

    Args:
        width: The width of the image in pixels, after its EXIF rotation.
        height: Its height.
        resolution: The resolution to crop to.

    Raises:
        ValueError: The resolution is not of the form `RESOLUTION_<width>_<height>`.

    Example:
        >>> round(crop_loss(1920, 1080, "RESOLUTION_1024_1024"), 2)
        0.44
    """
    target_width, target_height = resolution_size(resolution)
    source, target = width * target_height, target_width * height
    return 1 - min(source, target) / max(source, target)


@lru_cache(maxsize=1024)  # a batch asks for the same few sizes again and again
def nearest_resolution(width: int, height: int) -> Resolution:
    """The resolution that crops an image least; on equal ratios the larger one.

    Args:
        width: The width of the image in pixels, after its EXIF rotation.
        height: Its height.

    Example:
        >>> nearest_resolution(4000, 3000).value
        'RESOLUTION_1152_864'
    """
    return min(Resolution, key=lambda each: (crop_loss(width, height, each.value), -each.size[0] * each.size[1]))


def similar_resolution(text: str) -> Resolution | None:
    """The listed resolution to suggest for a mistaken one.

    Args:
        text: The mistaken resolution.

    Returns:
        The one with the nearest sides, or if none is near, the nearest ratio; None if the text has no two numbers.

    Example:
        >>> similar_resolution("RESOLUTION_800_1280").value, similar_resolution("1920x1080").value
        ('RESOLUTION_768_1280', 'RESOLUTION_1280_720')
    """
    match = re.search(r"([1-9]\d{1,4})\D+([1-9]\d{1,4})", text)
    if match is None:
        return None
    width, height = int(match[1]), int(match[2])
    distance, near = min((abs(each.size[0] - width) + abs(each.size[1] - height), each) for each in Resolution)
    return near if distance <= 128 else nearest_resolution(width, height)
