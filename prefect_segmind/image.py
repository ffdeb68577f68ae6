"""Pictures: looking at a source image, making it fit for the API, and checking what the API answers.

The one room that knows Pillow. Whatever bytes come in, a picture comes out or a named error does. The limits of the
API (JPEG, PNG or WebP, at most 10 MB) are from the provider's documentation; 25 megapixels and side ratios up to 3:1
are this package's own, far above what a model that works at about one megapixel can use.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final, cast

from PIL import ExifTags, Image, ImageCms, ImageFile
from PIL.Image import Transpose
from PIL.TiffImagePlugin import TiffImageFile
from pydantic import BaseModel, ConfigDict

from prefect_segmind.errors import SourceImageError

MAX_BYTES: Final = 10_000_000
"""The largest file that the API takes, by the provider's documentation."""
MAX_PIXELS: Final = 25_000_000
"""A picture with more pixels is scaled down before it goes up."""
BOMB_PIXELS: Final = 178_956_970
"""A picture with more pixels is not decoded at all: where Pillow raises DecompressionBombError by default."""
MAX_RATIO: Final = 3
"""The longer side over the shorter one; the resolutions of the model reach from 1:3 to 3:1."""

# A closed list: Pillow's other readers guess at bytes without a signature (TGA) or start programs (EPS starts
# Ghostscript). AVIF comes with Pillow 11.3; MPO, a phone's JPEG with more pictures behind it, is the JPEG reader's.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "MPO", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000")
_EXTENSIONS: Final = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}
_HEIC_BRANDS: Final = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_PNG_END: Final = b"IEND\xaeB`\x82"
_PROFILE_MODES: Final = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}  # colour spaces in an ICC profile's header
# What to do for the orientations 2 to 8 of the EXIF standard.
_MIRRORED_OR_HALF: Final = (Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM)
_QUARTERS: Final = (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)
_TURNS: Final = dict(enumerate(_MIRRORED_OR_HALF + _QUARTERS, start=2))

Image.init()  # registers the readers once, at import, instead of in whichever thread comes first


class BrokenPicture(ValueError):
    """Bytes that do not decode to a picture.

    Attributes:
        truncated: True where a picture begins but its data ends early; False where it is something else or damaged.
        remedy: What somebody who has such a source image can do.
    """

    def __init__(self, message: str, remedy: str = "give a JPEG, PNG or WebP in RGB", truncated: bool = False) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.truncated = truncated


class _FileFacts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str  # Pillow's name of it, such as JPEG
    width: int
    height: int
    size_bytes: int
    sha256: str  # of the file as it is, in hexadecimal


class SourceImage(_FileFacts):
    """What inspecting a source image has shown; width and height are pixels after the EXIF rotation.

    `changes` says what is changed before it goes up, each to be read after "the image is"; empty: it goes up as it is.
    """

    changes: tuple[str, ...] = ()


class Picture(_FileFacts):
    """What a picture that the API answered is, by its bytes and not its headers; width and height as stored."""

    content_type: str
    extension: str


@dataclass(frozen=True)
class PreparedImage:
    """A source image as it goes up: a JPEG, PNG or WebP of at most `MAX_BYTES`, its type, and the SHA-256 of `data`."""

    data: bytes
    content_type: str
    extension: str
    sha256: str


def inspect(data: bytes, label: str, *, allow_extreme_ratio: bool = False) -> SourceImage:
    """Decodes a source image fully and says what it is and what must change before the API takes it.

    Args:
        data: The file.
        label: What the user calls it, for messages.
        allow_extreme_ratio: Whether sides beyond 1:3 and 3:1 are let through.

    Raises:
        SourceImageError: It is empty, cut short, no picture, animated, too large to decode, or too long and narrow.

    Example:
        >>> canvas = BytesIO()
        >>> Image.new("CMYK", (640, 480)).save(canvas, "JPEG")
        >>> inspect(canvas.getvalue(), "ad.jpg").changes
        ('converted from CMYK to RGB',)
    """
    try:
        image = _open(data)
        with _decoding(data):
            several = image.format != "MPO" and getattr(image, "is_animated", False)
        if several:
            raise BrokenPicture(
                f"is animated or has several pages ({image.format})", "save the one to use as JPEG or PNG"
            )
        _load(image, data)
        if image.mode == "LAB":  # Pillow converts it through a profile only, and next to nobody has such files
            raise BrokenPicture("has the colour mode LAB")
    except BrokenPicture as broken:
        raise SourceImageError(f"image: {label} {broken}; {broken.remedy}") from None
    orientation = _orientation(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    if max(width, height) > MAX_RATIO * min(width, height) and not allow_extreme_ratio:
        raise SourceImageError(
            f"image: {label} has {width}×{height} pixels, beyond the ratios 1:3 to 3:1 that the model makes; "
            "crop it, or set allow_extreme_ratio to have the model crop it"
        )
    facts = _facts(image, data).model_copy(update={"width": width, "height": height})
    return SourceImage(**facts.model_dump(), changes=tuple(_changes(image, data, (width, height), orientation)))


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
        >>> canvas = BytesIO()
        >>> Image.new("L", (640, 480)).save(canvas, "BMP")
        >>> prepare(canvas.getvalue(), inspect(canvas.getvalue(), "ad.bmp")).content_type
        'image/jpeg'
    """
    if not source.changes:
        return PreparedImage(data, *_type(source.format), source.sha256)
    image = _load(_open(data), data)
    with _decoding(data):
        upright = _upright_srgb(image, _fitted(image.size, MAX_PIXELS))
        encoded, format = _encode(upright)
        while len(encoded) > MAX_BYTES:
            # A file shrinks about as its pixels do; a tenth more makes one round enough for most.
            pixels = int(upright.width * upright.height * 0.9 * MAX_BYTES / len(encoded))
            upright = upright.resize(_fitted(upright.size, pixels), Image.Resampling.LANCZOS)
            encoded, format = _encode(upright)
    return PreparedImage(encoded, *_type(format), hashlib.sha256(encoded).hexdigest())


def read_picture(path: Path) -> Picture:
    """Decodes a picture that the API answered, wholly, and says what it is.

    Args:
        path: Of the file.

    Raises:
        BrokenPicture: It does not decode; `truncated` says whether it begins as a picture and ends early.
        OSError: The file cannot be read.
    """
    data = path.read_bytes()
    image = _load(_open(data), data)
    content_type, extension = _type(str(image.format))
    return Picture(**_facts(image, data).model_dump(), content_type=content_type, extension=extension)


def thumbnail(data: bytes, max_width: int = 380) -> bytes:
    """A small JPEG of a picture for reports: upright, transparency on white, never larger than the picture.

    Args:
        data: The picture.
        max_width: In pixels.

    Raises:
        BrokenPicture: It does not decode.
    """
    image = _open(data)
    with _decoding(data):
        image.draft(None, (max_width, max_width))  # a JPEG is then decoded at an eighth to a half of its size
    _load(image, data)
    with _decoding(data):
        upright_width = image.size[0 if _orientation(image) < 5 else 1]
        scale = min(1.0, max_width / upright_width)
        small = _upright_srgb(image, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        if small.mode == "RGBA":
            white = Image.new("RGBA", small.size, "white")
            small = Image.alpha_composite(white, small).convert("RGB")
        return _saved(small, "JPEG", quality=80)


def _facts(image: ImageFile.ImageFile, data: bytes) -> _FileFacts:
    width, height = image.size
    sha256 = hashlib.sha256(data).hexdigest()
    return _FileFacts(format=str(image.format), width=width, height=height, size_bytes=len(data), sha256=sha256)


def _type(format: str) -> tuple[str, str]:
    """The content type and the extension of a format; an MPO is a JPEG to everybody else."""
    return Image.MIME["JPEG" if format == "MPO" else format], _EXTENSIONS.get(format, format.lower())


def _open(data: bytes) -> ImageFile.ImageFile:
    """Reads a picture's header, as `Image.open` does but for its warning about large pictures.

    To silence that warning takes a global setting of Pillow or a filter of warnings, which is not thread-safe; so the
    registered reader is called directly, and the size is checked here before anything is decoded.
    """
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS and b"avif" not in data[:64]:
        raise BrokenPicture("is HEIC, which is not read here", "convert it to JPEG")
    for name in _FORMATS:
        reader, accepts = Image.OPEN.get(name, (None, None))
        # `accepts` answers with a string, a reason, where this build of Pillow lacks the format.
        if reader is not None and accepts is not None and accepts(data[:16]) is True:
            with _decoding(data):
                image = reader(BytesIO(data), "")
                if not 0 < image.width * image.height <= BOMB_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels")
                return image
    raise BrokenPicture("is empty" if not data else "is not an image of a kind that can be read")


def _load(image: ImageFile.ImageFile, data: bytes) -> ImageFile.ImageFile:
    """Decodes the first frame of an opened picture."""
    with _decoding(data):
        if isinstance(image, TiffImageFile):
            # Its loader would warn of a large picture while it makes room for the pixels; so the room is made here.
            image.im = Image.new(image.mode, (image.tag_v2[256], image.tag_v2[257])).im
        image.load()
        if _is_deep_png(image, data):
            image.info.pop("transparency", None)  # a 16-bit colour, which Pillow would look for among 8-bit ones
        if image.format == "PNG" and _PNG_END not in data:
            raise EOFError("IEND")  # Pillow forgives a missing end once the pixels are there
    return image


def _is_deep_png(image: Image.Image, data: bytes) -> bool:
    """Whether it has 16 bits a channel, by its header (IHDR): Pillow halves 16-bit RGB to 8 and does not tell."""
    return image.format == "PNG" and data[24] == 16


@contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    """Turns whatever a decoder raises over foreign bytes into BrokenPicture."""
    try:
        yield
    except BrokenPicture:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenPicture(f"has not 1 to {BOMB_PIXELS:,} pixels ({error})", "scale it down") from error
    except Exception as error:
        if _ends_early(data):
            raise BrokenPicture("is cut short (truncated)", "copy or export it again", truncated=True) from error
        raise BrokenPicture(f"is damaged ({error or type(error).__name__})") from error


def _ends_early(data: bytes) -> bool:
    """Whether a picture that does not decode lacks its end; where a format does not tell, it is taken to."""
    if data.startswith(b"\xff\xd8"):
        return not data.rstrip(b"\0").endswith(b"\xff\xd9")
    if data.startswith(b"\x89PNG"):
        return _PNG_END not in data
    if data.startswith(b"RIFF"):
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return True


def _changes(image: ImageFile.ImageFile, data: bytes, size: tuple[int, int], orientation: int) -> Iterator[str]:
    """What keeps a picture from going up as it is, in the words of `SourceImage.changes`."""
    if image.format == "MPO":
        yield "reduced to the first of its pictures (MPO)"
    elif image.format not in ("JPEG", "PNG", "WEBP"):
        yield f"converted from {image.format}"
    if orientation > 1:
        yield "rotated by its EXIF orientation"
    if image.mode == "CMYK":  # YCCK as well, by Pillow's decoder
        yield "converted from CMYK to RGB"
    if image.mode[0] in "IF" or _is_deep_png(image, data):
        yield "reduced to 8 bits a channel"
    fitted = _fitted(size, MAX_PIXELS)
    if fitted != size:
        yield f"scaled from {size[0]}×{size[1]} to {fitted[0]}×{fitted[1]} pixels"
    if len(data) > MAX_BYTES:
        yield f"made smaller than {MAX_BYTES // 1_000_000} MB (it has {len(data) / 1_000_000:.1f})"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or EXIF is broken, as viewers take it."""
    with suppress(Exception):  # anybody writes EXIF; whatever is wrong with it, the picture is still a picture
        found = image.getexif().get(ExifTags.Base.Orientation)
        if found in _TURNS:
            return int(found)
    return 1


def _fitted(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """A size of at most so many pixels in the same ratio; never beyond 3:1 by rounding where it was within."""
    long, short = max(size), min(size)
    if long * short <= pixels:
        return size
    factor = math.sqrt(pixels / (long * short))
    fitted_short = max(1, int(short * factor))
    fitted_long = min(int(long * factor), pixels)
    if long <= MAX_RATIO * short:
        fitted_long = min(fitted_long, MAX_RATIO * fitted_short)
    return (fitted_long, fitted_short) if size[0] == long else (fitted_short, fitted_long)


def _upright_srgb(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A loaded picture as RGB, or RGBA where it is not opaque: 8 bits, scaled, in sRGB, upright, without metadata.

    `size` is what to scale to, before the picture is turned.
    """
    profile, turn = image.info.get("icc_profile"), _TURNS.get(_orientation(image))
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
