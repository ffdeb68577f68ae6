"""Reading pictures: source images and what must change in them, and the pictures that the API returns.

Any bytes result in a picture or in one of the documented errors. The limits of the API (JPEG, PNG or WebP, at most
10 MB) are from the provider's documentation; 25 megapixels and side ratios up to 3:1 are this package's own, far above
what a model that works at about one megapixel can use.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from PIL import ExifTags, Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from pydantic import BaseModel, ConfigDict

from prefect_segmind.errors import SourceImageError
from prefect_segmind.images.container import full_pages, is_truncated, split_png, strip_metadata
from prefect_segmind.images.memory import MEMORY, bytes_to_decode

MAX_BYTES: Final = 10_000_000
"""The largest file that the API accepts, according to the provider's documentation."""
MAX_PIXELS: Final = 25_000_000
"""A picture with more pixels is scaled down before it is uploaded."""
BOMB_PIXELS: Final = 178_956_970
"""A picture with more pixels is not decoded: the number at which Pillow raises DecompressionBombError by default."""
MAX_RATIO: Final = 3
"""The longer side over the shorter one; the resolutions of the model reach from 1:3 to 3:1."""

# A closed list: Pillow's other readers guess at bytes without a signature (TGA) or start programs (EPS starts
# Ghostscript). An MPO is a phone's JPEG with more pictures behind it: opened by the JPEG reader, and a JPEG to others.
_FORMATS: Final = {
    "JPEG": ("image/jpeg", "jpg"),
    "PNG": ("image/png", "png"),
    "WEBP": ("image/webp", "webp"),
    "MPO": ("image/jpeg", "jpg"),
    "GIF": ("image/gif", "gif"),
    "TIFF": ("image/tiff", "tiff"),
    "BMP": ("image/bmp", "bmp"),
    "AVIF": ("image/avif", "avif"),
    "HEIF": ("image/heif", "heif"),
}
_HEIF_SEQUENCES: Final = (b"hevc", b"hevx", b"hevm", b"hevs", b"msf1")
_HEIF_BRANDS: Final = (b"heic", b"heix", b"heim", b"heis", b"mif1", *_HEIF_SEQUENCES)
_JPEG_2000: Final = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
_TIFF_PIXELS: Final = BOMB_PIXELS // 2  # with more, Pillow's TIFF decoder issues a warning (see `open_picture`)
_SAVE_AS: Final = "save it as PNG or JPEG"
# How decoders word that they do not support a file, which may well be intact.
_UNSUPPORTED: Final = re.compile(r"(?i)unsupported|not (yet )?supported|cannot handle|unknown (pixel mode|compression)")
_Reader = Callable[[BytesIO, str], ImageFile.ImageFile]

Image.init()  # registers the readers once, at import, instead of in whichever thread comes first


class BrokenPicture(ValueError):
    """Bytes that do not decode to a picture.

    Attributes:
        truncated: True if the picture provably lacks its end; False if it is damaged, unsupported, or not a picture.
        remedy: What the owner of such a source image can do.
    """

    def __init__(self, message: str, remedy: str = "save it as PNG or JPEG in RGB", truncated: bool = False) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.truncated = truncated


class _FileFacts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    width: int
    height: int
    size_bytes: int
    sha256: str


class SourceImage(_FileFacts):
    """An inspected source image.

    Attributes:
        format: Pillow's name of its format, such as JPEG.
        width: In pixels, after the EXIF rotation.
        height: In pixels, after the EXIF rotation.
        size_bytes: The size of the file.
        sha256: The SHA-256 of the file, in hexadecimal.
        changes: What is changed before the upload, each worded to follow "the image is"; empty if nothing is.
    """

    changes: tuple[str, ...] = ()


class Picture(_FileFacts):
    """A picture that the API returned, by its bytes and not by the headers of the response.

    Attributes:
        format: Pillow's name of its format, such as JPEG.
        width: In pixels, as stored.
        height: In pixels, as stored.
        size_bytes: The size of the file.
        sha256: The SHA-256 of the file, in hexadecimal.
        content_type: Such as image/jpeg.
        extension: Of a file of this format, such as jpg.
    """

    content_type: str
    extension: str


def inspect(data: bytes, label: str, *, allow_extreme_ratio: bool = False) -> SourceImage:
    """Decodes a source image fully and finds what must change before the API accepts it.

    Args:
        data: The file.
        label: The user's name for it, for messages.
        allow_extreme_ratio: Whether side ratios beyond 1:3 and 3:1 are accepted.

    Returns:
        The facts about it, and the changes.

    Raises:
        SourceImageError: It is empty, truncated, damaged, animated, too large to decode, too long and narrow, or not a
            picture in a supported format.

    Example:
        >>> canvas = BytesIO()
        >>> Image.new("CMYK", (640, 480)).save(canvas, "JPEG")
        >>> inspect(canvas.getvalue(), "ad.jpg").changes
        ('converted from CMYK to RGB',)
    """
    try:
        image = open_picture(data)
        if _has_several(image, data):
            remedy = "save the picture to use as PNG or JPEG"
            raise BrokenPicture(f"is animated or has several pages ({image.format})", remedy)
        facts = _facts(image, data)
        with _checked_whole(image, data):
            orientation = exif_orientation(image)
            width, height = (facts["width"], facts["height"])[:: 1 if orientation < 5 else -1]
            changes = tuple(_changes(image, data, (width, height), orientation))
    except BrokenPicture as broken:
        raise SourceImageError(f"image: {label} {broken}; {broken.remedy}") from None
    if max(width, height) > MAX_RATIO * min(width, height) and not allow_extreme_ratio:
        raise SourceImageError(
            f"image: {label} has {width}×{height} pixels, and the model's side ratios end at 1:3 and 3:1; "
            "crop it, or set allow_extreme_ratio to let the model crop it"
        )
    return SourceImage(**{**facts, "width": width, "height": height}, changes=changes)


def read_picture(path: Path) -> Picture:
    """Decodes all the data of a picture that the API returned.

    Args:
        path: The file.

    Returns:
        The facts about it.

    Raises:
        BrokenPicture: It does not decode; its `truncated` is True if it provably lacks its end.
        OSError: The file cannot be read.
    """
    return picture_of(path.read_bytes())


def picture_of(data: bytes) -> Picture:
    """Decodes all the data of a picture that the API returned.

    Args:
        data: The file.

    Returns:
        The facts about it.

    Raises:
        BrokenPicture: It does not decode; its `truncated` is True if it provably lacks its end.
    """
    image = open_picture(data)
    facts = _facts(image, data)
    content_type, extension = file_type(facts["format"])
    with _checked_whole(image, data):
        pass
    return Picture(**facts, content_type=content_type, extension=extension)


@contextmanager
def _checked_whole(image: ImageFile.ImageFile, data: bytes) -> Iterator[None]:
    """Decodes all the data of an opened picture, and keeps the memory for it taken until the end of the block."""
    pixels = decoded_pixels(image, data)
    if image.format in ("JPEG", "MPO"):
        with decoding(data):
            # All of its data is still read, so that damage shows, but at an eighth of the size.
            image.draft(None, (1, 1))
    with MEMORY.taken(bytes_to_decode(image, pixels, data)):
        load_picture(image, data)
        yield


def decoded_pixels(image: ImageFile.ImageFile, data: bytes) -> int:
    """The number of pixels that are decoded of a picture.

    Args:
        image: The picture, as `open_picture` returns it.
        data: The file.
    """
    return max(width * height for width, height in (image.size, *_coded_sizes(image, data)))


def _facts(image: ImageFile.ImageFile, data: bytes) -> dict[str, Any]:
    """The fields of `_FileFacts`."""
    size = dict(zip(("width", "height"), image.size, strict=True))
    return {"format": image.format, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **size}


def file_type(format: str) -> tuple[str, str]:
    """The content type and the file extension of a format.

    Args:
        format: Pillow's name of it, such as JPEG.

    Returns:
        The two, such as `("image/jpeg", "jpg")`.
    """
    return _FORMATS[format]


def open_picture(data: bytes) -> ImageFile.ImageFile:
    """Reads the header of a picture, as `Image.open` does but for its warning about large pictures.

    Silencing that warning takes a global setting of Pillow or a warnings filter, which is not thread-safe; so the
    reader is called directly, and the size is checked here, before anything is decoded.

    Args:
        data: The file.

    Returns:
        The picture, not decoded yet.

    Raises:
        BrokenPicture: It is not a picture in a supported format, or has too many pixels.
    """
    reader = _reader(data)
    with decoding(data):
        image = _read_header(reader, data)
        limit = _TIFF_PIXELS if image.format == "TIFF" else BOMB_PIXELS
        for width, height in (image.size, *_coded_sizes(image, data)):
            if width * height > limit:
                remedy = f"scale it down, or {_SAVE_AS}" if limit < BOMB_PIXELS else "scale it down"
                raise BrokenPicture(f"has more than {limit:,} pixels ({width}×{height})", remedy)
    if image.mode in ("LAB", "I", "F"):
        what = "in the LAB colour space" if image.mode == "LAB" else "in greys of 32 bits"
        raise BrokenPicture(f"is {what}, which is not supported", _SAVE_AS)
    return image


def _reader(data: bytes) -> _Reader:
    """The class that reads a file, by its first bytes."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and b"avif" not in data[:64]:
        try:
            # Called directly and not registered with Pillow, whose list of formats belongs to the whole process.
            from pillow_heif import HeifImageFile
        except ImportError:
            remedy = "run pip install 'prefect-segmind[heif]', or save it as JPEG"
            raise BrokenPicture("is HEIC or HEIF, which needs the extra heif", remedy) from None
        return HeifImageFile
    for name in _FORMATS:
        reader, accepts = Image.OPEN.get(name, (None, None))
        # `accepts` returns a string, the reason, if this build of Pillow lacks the format.
        if reader is not None and accepts is not None and accepts(data[:16]) is True:
            return reader
    if data.startswith(_JPEG_2000):
        raise BrokenPicture("is JPEG 2000, which is not supported", _SAVE_AS)
    raise BrokenPicture("is empty" if not data else "is not an image in a supported format")


def _coded_sizes(image: ImageFile.ImageFile, data: bytes) -> list[tuple[int, int]]:
    """The sizes in which a HEIF file is decoded, from its `ispe` boxes: `image.size` is the size after cropping."""
    if image.format != "HEIF":
        return []
    sizes = re.findall(rb"ispe\0{4}(.{4})(.{4})", data, re.DOTALL)
    return [(int.from_bytes(width), int.from_bytes(height)) for width, height in sizes]


def _read_header(reader: _Reader, data: bytes) -> ImageFile.ImageFile:
    """Opens a file, even with damaged metadata, at the first page that is a picture in its own right."""
    if data.startswith(b"\x89PNG"):
        parts = split_png(data)
        image = reader(BytesIO(parts.pixels), "")
        image.info.update(parts.info)
        return image
    try:
        image = reader(BytesIO(data), "")
    except Exception:
        plain = strip_metadata(data)
        if plain == data:
            raise
        return reader(BytesIO(plain), "")
    if isinstance(image, TiffImageFile) and (page := next(iter(full_pages(data)), 0)):
        image.seek(page)  # past the previews
    return image


def _has_several(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether it is not clear which picture of a file to use; in an MPO, or a TIFF with a preview, it is."""
    if image.format == "PNG":
        with decoding(data):
            return split_png(data).animated
    if image.format == "TIFF":
        return len(full_pages(data)) > 1
    if image.format == "HEIF":  # one picture is marked as primary; others are of a burst, or for the other eye
        return data[8:12] in _HEIF_SEQUENCES
    return image.format != "MPO" and getattr(image, "is_animated", False)


def load_picture(image: ImageFile.ImageFile, data: bytes) -> ImageFile.ImageFile:
    """Decodes an opened picture.

    Args:
        image: The picture, as `open_picture` returns it.
        data: The file.

    Returns:
        The same object.

    Raises:
        BrokenPicture: It does not decode.
    """
    with decoding(data):
        image.load()
        if _is_deep(image, data):
            image.info.pop("transparency", None)  # a 16-bit colour, which Pillow would look for among 8-bit ones
        if image.format in ("PNG", "HEIF") and is_truncated(data):
            raise EOFError("no end")  # which their decoders tolerate
    return image


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether a channel has more than 8 bits by the header of a PNG (IHDR) or HEIF: the mode does not show it."""
    return data[24] == 16 if image.format == "PNG" else image.info.get("bit_depth", 8) > 8


@contextmanager
def decoding(data: bytes) -> Iterator[None]:
    """Turns the exceptions of a decoder into BrokenPicture.

    Args:
        data: The file that is decoded.

    Raises:
        BrokenPicture: The decoder raised any exception but MemoryError, which is not about the picture.
    """
    try:
        yield
    except (BrokenPicture, MemoryError):
        raise
    except Exception as error:
        why = str(error) or type(error).__name__
        if is_truncated(data):
            message = f"is cut short (truncated: {why})"
            raise BrokenPicture(message, "copy or export it again", truncated=True) from error
        if data[:2] in (b"II", b"MM") and isinstance(error, SyntaxError):
            why = f"unsupported TIFF: {why}"  # for lack of an entry in Pillow's tables
        if _UNSUPPORTED.search(why):
            raise BrokenPicture(f"has pixels in a form that is not supported ({why})") from error
        raise BrokenPicture(f"is damaged ({why})") from error


def _changes(image: ImageFile.ImageFile, data: bytes, size: tuple[int, int], orientation: int) -> Iterator[str]:
    """The `SourceImage.changes` of a loaded picture whose size after the EXIF rotation is `size`."""
    if image.format == "MPO":
        yield "reduced to the first of its pictures (MPO)"
    elif image.format not in ("JPEG", "PNG", "WEBP"):
        yield f"converted from {image.format}"
    if image.format == "HEIF" and getattr(image, "is_animated", False):
        yield "reduced to its primary picture (HEIF)"
    if orientation > 1:
        yield "rotated by its EXIF orientation"
    if _has_malformed_metadata(image, data):
        yield "stripped of metadata that other readers refuse"
    if image.mode == "CMYK":  # YCCK as well, by Pillow's decoder
        yield "converted from CMYK to RGB"
    if image.mode.startswith("I;16") or _is_deep(image, data):
        yield "reduced to 8 bits a channel"
    fitted = fitted_size(size, MAX_PIXELS)
    if fitted != size:
        yield f"scaled from {size[0]}×{size[1]} to {fitted[0]}×{fitted[1]} pixels"
    if len(data) > MAX_BYTES:
        yield f"made smaller than {MAX_BYTES // 1_000_000} MB (it has {len(data) / 1_000_000:.1f})"


def _has_malformed_metadata(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether the provider may refuse the file for its metadata, as common readers do."""
    if image.format == "PNG":
        return split_png(data).malformed
    if image.format in ("JPEG", "WEBP"):
        try:
            Image.OPEN[image.format][0](BytesIO(data), "")
        except Exception:  # noqa: BLE001 - readers raise exceptions of any kind, as in `_read_header`
            return True
    return False


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture.

    Args:
        image: The picture.

    Returns:
        1 to 8; 1 if there is none or EXIF is damaged, as in viewers.
    """
    with suppress(Exception):  # damaged EXIF can raise anything, and does not affect the picture
        found = image.getexif().get(ExifTags.Base.Orientation)
        if found is not None and found in range(2, 9):
            return int(found)
    return 1


def fitted_size(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """The size within a number of pixels and in the same ratio; rounding never takes it beyond 3:1 if it was within.

    Args:
        size: Width and height.
        pixels: The largest number of pixels.

    Returns:
        Width and height; `size` itself if it fits.
    """
    long, short = max(size), min(size)
    if long * short <= pixels:
        return size
    factor = math.sqrt(pixels / (long * short))
    fitted_short = max(1, int(short * factor))
    fitted_long = min(int(long * factor), pixels)
    if long <= MAX_RATIO * short:
        fitted_long = min(fitted_long, MAX_RATIO * fitted_short)
    return (fitted_long, fitted_short) if size[0] == long else (fitted_short, fitted_long)
