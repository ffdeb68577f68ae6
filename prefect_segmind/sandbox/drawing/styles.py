"""The five styles: what each does to a composed picture, from half the final size to the final size."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from prefect_segmind.sandbox.drawing.scenery import Palette, Size, mix, noise


@dataclass(frozen=True)
class Draft:
    """A composed picture before its style.

    Attributes:
        picture: RGB, half the final size.
        subject: Where the subject is, L, the same size.
        photo: The source, cropped, at the final size.
        keep: How much of the source is to be kept, 0 to 1.
        colours: The palette of the prompt.
    """

    picture: Image.Image
    subject: Image.Image
    photo: Image.Image
    keep: float
    colours: Palette

    @property
    def size(self) -> Size:
        """The final width and height in pixels."""
        return self.photo.size


def _soften(picture: Image.Image, radius: int) -> Image.Image:
    """A wide blur, done at a quarter of the size because that is sixteen times cheaper and looks the same."""
    return picture.reduce(4).filter(ImageFilter.BoxBlur(radius)).resize(picture.size, Image.Resampling.BILINEAR)


def _grey(channel: Image.Image) -> Image.Image:
    return Image.merge("RGB", (channel, channel, channel))


def _vignette(picture: Image.Image, strength: float) -> Image.Image:
    dim = Image.radial_gradient("L").point([255 - round(strength * max(0, each - 110)) for each in range(256)])
    return ImageChops.multiply(picture, _grey(dim.resize(picture.size)))


def _graded(draft: Draft, strength: float) -> Image.Image:
    """The picture drawn towards the prompt's palette by its brightness."""
    dark, _, mid, _, bright = draft.colours
    toned = ImageOps.colorize(draft.picture.convert("L"), dark, bright, mid)
    return Image.blend(draft.picture, toned, strength * (1.1 - draft.keep))


def general(draft: Draft, random: Random) -> Image.Image:
    """A painterly illustration: glow, brush strokes, warm edges."""
    picture = _graded(draft, 0.35)
    picture = Image.blend(picture, ImageChops.screen(picture, _soften(picture, 4)), 0.3)
    strokes = noise((320, 80), random).transform(
        picture.size, Image.Transform.AFFINE, (0.22, 0.1, 4, -0.045, 0.1, 26), Image.Resampling.BILINEAR
    )
    picture = Image.blend(picture, ImageChops.overlay(picture, _grey(strokes)), 0.15)
    picture = ImageEnhance.Color(_vignette(picture, 0.6)).enhance(1.2)
    return picture.resize(draft.size, Image.Resampling.BILINEAR)


def realistic(draft: Draft, random: Random) -> Image.Image:
    """A photograph: shallow depth of field, contrast, grain, and the source's own detail at a high weight."""
    picture = _graded(draft, 0.22)
    focus = draft.subject.point([min(255, 30 + v * 2) for v in range(256)])
    picture = Image.composite(picture, _soften(picture, 2), focus)
    curve = [round(255 * (v / 255) ** 2 * (3 - 2 * v / 255) * 0.55 + v * 0.45) for v in range(256)]
    picture = _vignette(picture.point(curve * 3), 0.75)
    large = picture.resize(draft.size, Image.Resampling.BILINEAR)
    if draft.keep > 0.8:
        large = Image.blend(large, draft.photo.point(curve * 3), 0.5)
    grain = noise((512, 512), random).point([112 + v // 8 for v in range(256)])
    tiled = Image.new("L", draft.size)
    for x in range(0, draft.size[0], 512):
        for y in range(0, draft.size[1], 512):
            tiled.paste(grain, (x, y))
    return ImageChops.soft_light(large, _grey(tiled))


def design(draft: Draft, random: Random) -> Image.Image:
    """A screen print: a handful of flat colours with crisp edges."""
    picture = ImageEnhance.Color(_graded(draft, 0.55)).enhance(1.5).filter(ImageFilter.BoxBlur(2))
    picture = ImageOps.autocontrast(picture, cutoff=1)
    inks = picture.resize((96, 96)).quantize(random.choice((7, 8)), Image.Quantize.MAXCOVERAGE)
    large = picture.resize(draft.size, Image.Resampling.BILINEAR)
    return large.quantize(palette=inks, dither=Image.Dither.NONE).convert("RGB")


def render_3d(draft: Draft, random: Random) -> Image.Image:
    """A glossy clay render: relief from the picture's brightness, a soft light and highlights."""
    picture = ImageEnhance.Color(_graded(draft, 0.3)).enhance(1.35).filter(ImageFilter.BoxBlur(2))
    height = picture.convert("L").filter(ImageFilter.BoxBlur(2))
    slope = height.copy()
    slope.paste(height, (3, 3))
    relief = ImageChops.subtract(height, slope, 0.42, 128)
    picture = Image.blend(picture, ImageChops.hard_light(picture, _grey(relief)), 0.75)
    gloss = relief.point([min(255, max(0, v - 168) * 4) for v in range(256)])
    picture = ImageChops.screen(picture, _grey(_soften(gloss, 1).point([round(v * 0.8) for v in range(256)])))
    bright = _soften(picture, 6)
    picture = Image.blend(picture, ImageChops.soft_light(picture, bright), 0.5)
    return picture.resize(draft.size, Image.Resampling.BILINEAR)


def anime(draft: Draft, random: Random) -> Image.Image:
    """A cel: bright flat tones with soft steps and ink lines."""
    # Brightness alone goes in steps: stepping red, green and blue apart makes rainbows of soft gradients.
    light, *hues = ImageEnhance.Color(_graded(draft, 0.3)).enhance(1.7).convert("YCbCr").split()
    light = light.filter(ImageFilter.BoxBlur(1))
    ridge = ImageChops.subtract(light.filter(ImageFilter.BoxBlur(3)), light, 0.12, 0)
    ink = ridge.point([min(215, max(0, v - 34) * 2) for v in range(256)]).resize(draft.size, Image.Resampling.BILINEAR)
    steps, cel = 5, []
    for v in range(256):
        level, rest = divmod((v / 255) ** 0.8 * steps, 1)
        cel.append(round(255 * min(1.0, (level + min(1.0, max(0.0, (rest - 0.4) / 0.2))) / steps)))
    flat, *wide = (each.resize(draft.size, Image.Resampling.BILINEAR) for each in (light, *hues))
    large = Image.merge("YCbCr", (flat.point(cel), *wide)).convert("RGB")
    large.paste(mix(draft.colours[0], (20, 16, 32), 0.5), (0, 0), ink)
    return large
