"""A picture as the model would make it: computed from the source image, the prompt, the style, the weight and the seed.

No model is at work. The source is cropped as the provider's model crops it, its subject is set into a scene that prompt
and seed choose, and a style goes over both. The same request gives the same bytes. About 50 ms for 1024x1024.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from functools import lru_cache
from random import Random

from PIL import Image, ImageChops, ImageFilter, ImageOps

from prefect_segmind.api.resolutions import resolution_size
from prefect_segmind.sandbox.drawing import scenery, styles
from prefect_segmind.sandbox.drawing.photo import sample_photo

__all__ = ["STYLES", "make_picture", "make_sketch", "sample_photo"]

_UNMARKED = b"." * 64  # gives way to a SHA-256 in hexadecimal

Scene = Callable[[scenery.Size, scenery.Palette, Random], Image.Image]
Finish = Callable[[styles.Draft, Random], Image.Image]

STYLES: dict[str, tuple[Scene, Finish]] = {
    "GENERAL": (scenery.landscape, styles.general),
    "REALISTIC": (scenery.set_table, styles.realistic),
    "DESIGN": (scenery.poster, styles.design),
    "RENDER_3D": (scenery.pedestal, styles.render_3d),
    "ANIME": (scenery.open_sky, styles.anime),
}
"""For each `style_type` of the API the scene behind the subject and the finish over both."""


def make_picture(
    source: bytes,
    *,
    prompt: str,
    image_weight: int,
    style_type: str,
    seed: int,
    resolution: str,
    negative_prompt: str | None = None,
    magic_prompt_option: str = "AUTO",
) -> bytes:
    """The picture for one request, as a JPEG.

    Args:
        source: The input image as a file's bytes: JPEG, PNG or WebP.
        prompt: Chooses palette and composition; words such as `sunset` or `snow` choose the palette by name.
        image_weight: 1 to 100; how much of the source stays. At 90 it is plain to see, at 10 hardly.
        style_type: One of `STYLES`.
        seed: Another seed composes the same words anew.
        resolution: For example `RESOLUTION_1280_800`: the size in pixels; its ratio crops the source.
        negative_prompt: Changes the composition.
        magic_prompt_option: Likewise, as a rewritten prompt would.

    Raises:
        OSError: The source is no image that Pillow can read (`PIL.UnidentifiedImageError` is one of these).
        ValueError: The resolution is malformed.
        KeyError: The style is unknown.
    """
    scene, finisher = STYLES[style_type]
    words = "\0".join((prompt, negative_prompt or "", magic_prompt_option, str(seed)))
    random = Random(hashlib.sha256(words.encode()).hexdigest())
    colours = scenery.palette_for(prompt, random)
    keep = image_weight / 100
    photo, half, subject = _prepared(source, resolution_size(resolution))
    drawn = _redrawn(half, keep, random)
    draft = styles.Draft(
        Image.composite(drawn, scene(half.size, colours, random), _cover(subject, keep)), subject, photo, keep, colours
    )
    answer = io.BytesIO()
    finisher(draft, random).save(answer, "JPEG", quality=90)
    return answer.getvalue()


def make_sketch(source: bytes, *, request: str, resolution: str) -> bytes:
    """The source cropped to a resolution, with a comment that tells requests apart: a picture at next to no cost.

    Args:
        source: As for `make_picture`.
        request: Other requests give other files, the same request gives the same file.
        resolution: As for `make_picture`.

    Raises:
        OSError: The source is no image that Pillow can read.
        ValueError: The resolution is malformed.
    """
    mark = hashlib.sha256(request.encode()).hexdigest().encode()
    return _sketched(source, resolution_size(resolution)).replace(_UNMARKED, mark, 1)


@lru_cache(maxsize=8)
def _sketched(source: bytes, size: scenery.Size) -> bytes:
    answer = io.BytesIO()
    _cropped(source, size).save(answer, "JPEG", quality=90, comment=_UNMARKED)
    return answer.getvalue()


@lru_cache(maxsize=8)
def _prepared(source: bytes, size: scenery.Size) -> tuple[Image.Image, Image.Image, Image.Image]:
    """What all requests for a source and a size share, not to be drawn into: the crop, half of it, and its subject."""
    photo = _cropped(source, size)
    half = photo.reduce(2)
    return photo, half, _subject(half)


def _cropped(source: bytes, size: scenery.Size) -> Image.Image:
    """The source upright, on white where it is transparent, its middle cropped to the size's ratio, resized to it."""
    with Image.open(io.BytesIO(source)) as image:
        image.draft("RGB", size)  # a JPEG much larger than needed is decoded at a fraction of its size
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            clear = image.convert("RGBA")
            white = Image.new("RGBA", clear.size, "white")
            white.alpha_composite(clear)
            opaque = white.convert("RGB")
        else:
            opaque = image if image.mode == "RGB" else image.convert("RGB")
        return ImageOps.fit(opaque, size, Image.Resampling.BILINEAR)


def _subject(picture: Image.Image) -> Image.Image:
    """A mask of what stands out, in the middle, from the background as the left and the right edge show it."""
    small = picture.resize((96, 96), Image.Resampling.BILINEAR)
    contrasts = []
    for left in (0, 90):
        edge = small.resize((1, 96), box=(left, 0, left + 6, 96)).resize((96, 96), Image.Resampling.NEAREST)
        red, green, blue = ImageChops.difference(small, edge).split()
        contrasts.append(ImageChops.lighter(ImageChops.lighter(red, green), blue))
    # Like one of the edges is enough to be background: something may stand at the other.
    contrast = ImageChops.darker(*contrasts).point([min(255, max(0, v - 30) * 8) for v in range(256)])
    centre = Image.radial_gradient("L").resize((96, 96)).point([min(255, max(0, 215 - v) * 4) for v in range(256)])
    solid = ImageChops.multiply(contrast, centre).filter(ImageFilter.MedianFilter(5))
    return solid.filter(ImageFilter.BoxBlur(1)).resize(picture.size, Image.Resampling.BICUBIC)


def _smooth(low: float, high: float, x: float) -> float:
    t = min(1.0, max(0.0, (x - low) / (high - low)))
    return t * t * (3 - 2 * t)


def _cover(subject: Image.Image, keep: float) -> Image.Image:
    """How much of the source covers the scene: the subject appears first, its surroundings at high weights."""
    around, inside = 0.9 * _smooth(0.35, 0.95, keep), 0.04 + 0.96 * _smooth(0.03, 0.42, keep)
    return subject.point([round(255 * (around + max(0.0, inside - around) * v / 255)) for v in range(256)])


def _redrawn(picture: Image.Image, keep: float, random: Random) -> Image.Image:
    """The source as something drawn anew from it: bent and vague at a low weight, as it was at a high one."""
    loose = max(0.0, 0.8 - keep)
    if not loose:
        return picture
    size = picture.size
    if loose >= 0.3:  # it will be blurred so much that half the pixels are enough
        picture = picture.reduce(2)
    width, height = picture.size
    nodes = {
        (x, y): (
            width * x / 4 + (width * 0.07 * loose * random.uniform(-1, 1) if 0 < x < 4 else 0),
            height * y / 4 + (height * 0.07 * loose * random.uniform(-1, 1) if 0 < y < 4 else 0),
        )
        for x in range(5)
        for y in range(5)
    }
    mesh = [
        (
            (width * x // 4, height * y // 4, width * (x + 1) // 4, height * (y + 1) // 4),
            (*nodes[x, y], *nodes[x, y + 1], *nodes[x + 1, y + 1], *nodes[x + 1, y]),
        )
        for x in range(4)
        for y in range(4)
    ]
    bent = picture.transform(picture.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    vague = bent.filter(ImageFilter.BoxBlur(min(picture.size) * 0.04 * loose**2))
    return vague if vague.size == size else vague.resize(size, Image.Resampling.BICUBIC)
