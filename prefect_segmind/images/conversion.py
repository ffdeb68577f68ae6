"""Converting pictures: a source image for the API, and thumbnails for reports.

The result is always upright, in sRGB, of 8 bits a channel and without metadata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from PIL import Image, ImageCms, ImageOps
from PIL.Image import Transpose

from prefect_segmind.images.inspection import (
    MAX_BYTES,
    MAX_PIXELS,
    MAX_RATIO,
    SourceImage,
    decoded_pixels,
    decoding,
    exif_orientation,
    file_type,
    fitted_size,
    load_picture,
    open_picture,
)
from prefect_segmind.images.memory import MEMORY, bytes_to_convert, bytes_to_decode, bytes_to_make

_PROFILE_MODES: Final = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}  # colour spaces in an ICC profile's header
# How to turn a picture with one of the orientations 2 to 8 of the EXIF standard.
_MIRRORED_OR_HALF: Final = (Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM)
_QUARTERS: Final = (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)
_TURNS: Final = dict(enumerate(_MIRRORED_OR_HALF + _QUARTERS, start=2))


@dataclass(frozen=True)
class PreparedImage:
    """A source image as it is uploaded.

    Attributes:
        data: A JPEG, PNG or WebP of at most `MAX_BYTES`.
        content_type: Such as image/jpeg.
        extension: Of a file of this format, such as jpg.
        sha256: The SHA-256 of `data`, in hexadecimal.
    """

    data: bytes
    content_type: str
    extension: str
    sha256: str


def prepare(data: bytes, source: SourceImage) -> PreparedImage:
    """Converts a source image into the file to upload; a source that needs no changes stays as it is.

    A converted copy is upright, in sRGB, of 8 bits a channel and without metadata: a JPEG if it is opaque, else a PNG,
    or a WebP if the PNG would be too large. If it is still too large, it is scaled down. The same source makes the same
    copy.

    Args:
        data: The file.
        source: The result of `inspect` for the same file.

    Returns:
        The file to upload.

    Raises:
        BrokenPicture: It is not the file that was inspected, and does not decode.

    Example:
        >>> from prefect_segmind.images.inspection import inspect
        >>> canvas = BytesIO()
        >>> Image.new("L", (640, 480)).save(canvas, "BMP")
        >>> prepare(canvas.getvalue(), inspect(canvas.getvalue(), "ad.bmp")).content_type
        'image/jpeg'
    """
    if not source.changes:
        return PreparedImage(data, *file_type(source.format), source.sha256)
    image = open_picture(data)
    needed = bytes_to_decode(image, decoded_pixels(image, data), data) + bytes_to_convert(image)
    with MEMORY.taken(needed + bytes_to_make(min(image.width * image.height, MAX_PIXELS))), decoding(data):
        load_picture(image, data)
        upright = upright_srgb(image, fitted_size(image.size, MAX_PIXELS))
        file, format = _encode(upright)
        while len(file) > MAX_BYTES:
            # A file shrinks about as its pixels do; with a tenth to spare, one round is enough for most.
            pixels = int(upright.width * upright.height * 0.9 * MAX_BYTES / len(file))
            upright = upright.resize(fitted_size(upright.size, pixels), Image.Resampling.LANCZOS)
            file, format = _encode(upright)
    return PreparedImage(file, *file_type(format), hashlib.sha256(file).hexdigest())


def thumbnail(data: bytes, max_width: int = 380) -> bytes:
    """Makes a small JPEG of a picture: upright, transparency on white, never larger than the picture.

    Args:
        data: The picture.
        max_width: In pixels; the height is at most three times as much.

    Returns:
        The JPEG.

    Raises:
        BrokenPicture: It does not decode.
    """
    image = open_picture(data)
    pixels = decoded_pixels(image, data)
    with decoding(data):
        # A JPEG is then decoded at an eighth to a half of its size, and of a HEIF the thumbnail that suffices.
        image.draft(None, (max_width, max_width))
    with MEMORY.taken(bytes_to_decode(image, pixels, data) + bytes_to_convert(image)), decoding(data):
        load_picture(image, data)
        width, height = image.size if exif_orientation(image) < 5 else image.size[::-1]
        scale = min(1.0, max_width / width, MAX_RATIO * max_width / height)
        small = upright_srgb(image, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        return encoded(on_white(small), "JPEG", quality=80)


def equal_thumbnails(pictures: Sequence[bytes], width: int) -> list[bytes]:
    """Makes small JPEGs of pictures, all of one size, for showing side by side, padded with grey.

    Args:
        pictures: The pictures.
        width: In pixels; the height is that of the tallest, at most three times as much.

    Returns:
        The JPEGs, in the same order.

    Raises:
        BrokenPicture: One does not decode.
    """
    small = [Image.open(BytesIO(thumbnail(each, width))) for each in pictures]
    height = min(MAX_RATIO * width, max(width * each.height / each.width for each in small))
    size = width, round(height)
    return [encoded(ImageOps.pad(each, size, color="#808080"), "JPEG", quality=80) for each in small]


def upright_srgb(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Converts a loaded picture to upright sRGB of 8 bits a channel without metadata.

    Args:
        image: The picture.
        size: The size to scale it to, before it is turned.

    Returns:
        A picture in the mode RGB, or RGBA if it is not opaque.
    """
    profile, turn = image.info.get("icc_profile"), _TURNS.get(exif_orientation(image))
    plain = _eight_bits(image)
    if plain.size != size:
        # First of all, as the rest is slow on large pictures; Pillow weights colours by alpha here.
        plain = plain.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    alpha = plain.getchannel("A") if plain.mode == "RGBA" else None
    result = _to_srgb(plain.convert("RGB") if alpha else plain, profile)
    if alpha and alpha.getextrema() != (255, 255):
        result.putalpha(alpha)
    if turn is not None:
        result = result.transpose(turn)
    result.info = {}  # Pillow's encoders would write some of it: GPS, comments, profiles
    return result


def _eight_bits(image: Image.Image) -> Image.Image:
    """Converts a loaded picture to L, RGB, RGBA or CMYK."""
    if image.mode.startswith("I;16"):  # scaled, as Pillow's own `convert` clips everything above 255
        return image.convert("I").convert("F").point(lambda value: value * (255 / 65_535) + 0.5).convert("L")
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts an L, RGB or CMYK picture to RGB, through its embedded colour profile if that fits the channels."""
    mode = _PROFILE_MODES.get(profile[16:20]) if profile else None
    if profile and mode and (mode == "CMYK") == (image.mode == "CMYK"):
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a damaged profile is ignored
            source, target = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image.convert(mode), source, target, outputMode="RGB")
            return converted or image.convert("RGB")
    return image.convert("RGB")


def _encode(image: Image.Image) -> tuple[bytes, str]:
    """Encodes a converted picture; returns the file and its format. The side limits are those of JPEG and WebP."""
    if image.mode == "RGB" and max(image.size) <= 65_500:
        return encoded(image, "JPEG", quality=95, subsampling=0), "JPEG"
    png = encoded(image, "PNG")
    if len(png) > MAX_BYTES and max(image.size) <= 16_383:
        return encoded(image, "WEBP", quality=95), "WEBP"
    return png, "PNG"


def on_white(image: Image.Image) -> Image.Image:
    """Puts a transparent picture on white; one without transparency stays as it is.

    Args:
        image: The picture, in the mode RGB or RGBA.

    Returns:
        A picture in the mode RGB.
    """
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def encoded(image: Image.Image, format: str, **options: int) -> bytes:
    """Encodes a picture.

    Args:
        image: The picture.
        format: Pillow's name of the format, such as JPEG.
        options: Pillow's options for it.

    Returns:
        The file.

    Raises:
        OSError: Pillow cannot encode it.
        ValueError: The same.
    """
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
