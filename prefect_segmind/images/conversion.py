"""Making pictures fit: a source image for the API, and thumbnails for reports.

What comes out is upright, sRGB, 8 bits a channel and free of metadata, whatever went in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Final, cast

from PIL import Image, ImageCms, ImageOps
from PIL.Image import Transpose

from prefect_segmind.images.inspection import (
    MAX_BYTES,
    MAX_PIXELS,
    MAX_RATIO,
    SourceImage,
    decoding,
    exif_orientation,
    file_type,
    fitted_size,
    load_picture,
    open_picture,
)

_PROFILE_MODES: Final = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}  # colour spaces in an ICC profile's header
# What to do for the orientations 2 to 8 of the EXIF standard.
_MIRRORED_OR_HALF: Final = (Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM)
_QUARTERS: Final = (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)
_TURNS: Final = dict(enumerate(_MIRRORED_OR_HALF + _QUARTERS, start=2))


@dataclass(frozen=True)
class PreparedImage:
    """A source image as it goes up: a JPEG, PNG or WebP of at most `MAX_BYTES`, its type, and the SHA-256 of `data`."""

    data: bytes
    content_type: str
    extension: str
    sha256: str


def prepare(data: bytes, source: SourceImage) -> PreparedImage:
    """The file that goes up: the source itself, or a normalised copy where the source needs changes.

    A copy is upright, sRGB, 8 bits a channel and free of metadata; JPEG where it is opaque, else PNG, or WebP where the
    PNG would be too large. What is still too large is scaled down. The same source makes the same copy.

    Args:
        data: The file.
        source: What `inspect` said of the same file.

    Raises:
        BrokenPicture: It is not the file that was inspected, and no picture.

    Example:
        >>> from prefect_segmind.images.inspection import inspect
        >>> canvas = BytesIO()
        >>> Image.new("L", (640, 480)).save(canvas, "BMP")
        >>> prepare(canvas.getvalue(), inspect(canvas.getvalue(), "ad.bmp")).content_type
        'image/jpeg'
    """
    if not source.changes:
        return PreparedImage(data, *file_type(source.format), source.sha256)
    image = load_picture(open_picture(data), data)
    with decoding(data):
        upright = upright_srgb(image, fitted_size(image.size, MAX_PIXELS))
        encoded, format = _encode(upright)
        while len(encoded) > MAX_BYTES:
            # A file shrinks about as its pixels do; a tenth more makes one round enough for most.
            pixels = int(upright.width * upright.height * 0.9 * MAX_BYTES / len(encoded))
            upright = upright.resize(fitted_size(upright.size, pixels), Image.Resampling.LANCZOS)
            encoded, format = _encode(upright)
    return PreparedImage(encoded, *file_type(format), hashlib.sha256(encoded).hexdigest())


def thumbnail(data: bytes, max_width: int = 380) -> bytes:
    """A small JPEG of a picture for reports: upright, transparency on white, never larger than the picture.

    Args:
        data: The picture.
        max_width: In pixels; the height is at most three times as much.

    Raises:
        BrokenPicture: It does not decode.
    """
    image = open_picture(data)
    with decoding(data):
        image.draft(None, (max_width, max_width))  # a JPEG is then decoded at an eighth to a half of its size
    load_picture(image, data)
    with decoding(data):
        width, height = image.size if exif_orientation(image) < 5 else image.size[::-1]
        scale = min(1.0, max_width / width, MAX_RATIO * max_width / height)
        small = upright_srgb(image, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        if small.mode == "RGBA":
            white = Image.new("RGBA", small.size, "white")
            small = Image.alpha_composite(white, small).convert("RGB")
        return _saved(small, "JPEG", quality=80)


def equal_thumbnails(pictures: Sequence[bytes], width: int) -> list[bytes]:
    """Small JPEGs of pictures, all of one size, to be seen side by side; grey fills what a picture does not.

    Args:
        pictures: The pictures.
        width: In pixels; the height is that of the tallest, at most three times as much.

    Raises:
        BrokenPicture: One does not decode.
    """
    small = [Image.open(BytesIO(thumbnail(each, width))) for each in pictures]
    height = min(MAX_RATIO * width, max(width * each.height / each.width for each in small))
    size = width, round(height)
    return [_saved(ImageOps.pad(each, size, color="#808080"), "JPEG", quality=80) for each in small]


def upright_srgb(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A loaded picture as RGB, or RGBA where it is not opaque: 8 bits, scaled, in sRGB, upright, without metadata.

    `size` is what to scale to, before the picture is turned.
    """
    profile, turn = image.info.get("icc_profile"), _TURNS.get(exif_orientation(image))
    plain = _eight_bits(image)
    if plain.size != size:
        # Scaled before the rest, which is slow on large pictures; Pillow weighs colours by alpha here.
        plain = plain.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    alpha = plain.getchannel("A") if plain.mode == "RGBA" else None
    result = _to_srgb(plain.convert("RGB") if alpha else plain, profile)
    if alpha and alpha.getextrema() != (255, 255):
        result.putalpha(alpha)
    if turn is not None:
        result = result.transpose(turn)
    result.info = {}  # GPS, comments, profiles: Pillow's encoders would write some of them again
    return result


def _eight_bits(image: Image.Image) -> Image.Image:
    """A loaded picture as L, RGB, RGBA or CMYK, whatever it was."""
    if image.mode[0] in "IF":
        return _scaled_to_eight_bits(image)
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _scaled_to_eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits or floats as 8 bits, by scaling: Pillow's own `convert` cuts everything above 255 off.

    The range is 16 bits where the mode says so, else the smallest of 0-1 (floats), 0-255 and 0-65535 that holds all
    values, else theirs.
    """
    if image.mode.startswith("I;16"):
        low, high, image = 0.0, 65_535.0, image.convert("I")
    else:
        low, high = cast("tuple[float, float]", image.getextrema())
        tops = (top for top in (1.0, 255.0, 65_535.0) if image.mode == "F" or top > 1)
        low, high = next(((0.0, top) for top in tops if low >= 0 and high <= top), (low, high))
    scale = 255 / (high - low) if high > low and math.isfinite(high - low) else 0.0
    return image.convert("F").point(lambda value: value * scale + (0.5 - low * scale)).convert("L")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An L, RGB or CMYK picture as RGB, through its embedded colour profile where that is one for these channels."""
    mode = _PROFILE_MODES.get(profile[16:20]) if profile else None
    if profile and mode and (mode == "CMYK") == (image.mode == "CMYK"):
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a broken profile is as good as none
            source, target = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image.convert(mode), source, target, outputMode="RGB")
            return converted or image.convert("RGB")
    return image.convert("RGB")


def _encode(image: Image.Image) -> tuple[bytes, str]:
    """A normalised picture as a file, and the name of its format; the numbers are what libjpeg and libwebp can hold."""
    if image.mode == "RGB" and max(image.size) <= 65_500:
        return _saved(image, "JPEG", quality=95, subsampling=0), "JPEG"
    encoded = _saved(image, "PNG")
    if len(encoded) > MAX_BYTES and max(image.size) <= 16_383:
        return _saved(image, "WEBP", quality=95), "WEBP"
    return encoded, "PNG"


def _saved(image: Image.Image, format: str, **options: int) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
