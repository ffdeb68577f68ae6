"""A sample product photo, drawn by code, so that a demonstration needs no file and no download."""

from __future__ import annotations

import io
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from prefect_segmind.sandbox.drawing.scenery import Colour, Size, gradient, halo, noise


def sample_photo(size: Size = (1536, 1024)) -> bytes:
    """A ceramic mug on a wooden table in soft window light, as a JPEG; always the same bytes for a size.

    Args:
        size: Width and height in pixels.
    """
    width, height = size
    random = Random(7)
    canvas = _room(size, random)
    unit = min(width / 1.5, height)
    centre, foot = width * 0.5, height * 0.8
    _shadow(canvas, (0.98, 0.12), (centre + unit * 0.16, foot - unit * 0.01), unit * 0.42, 150, unit * 0.03)
    _shadow(canvas, (0.62, 0.13), (centre + unit * 0.02, foot - unit * 0.012), unit * 0.48, 210, unit * 0.012)
    _mug(canvas, centre, foot, unit)
    _tint(canvas, (255, 236, 205), halo(size, (width * 0.12, height * 0.05), width * 0.7), 0.22)
    edge = Image.radial_gradient("L").point([max(0, v - 120) for v in range(256)]).resize(size)
    _tint(canvas, (40, 26, 20), edge, 0.5)
    grain = noise(size, random).point([121 + v // 18 for v in range(256)])
    answer = io.BytesIO()
    ImageChops.soft_light(canvas, Image.merge("RGB", (grain,) * 3)).save(answer, "JPEG", quality=92)
    return answer.getvalue()


def _tint(canvas: Image.Image, colour: Colour, mask: Image.Image, strength: float) -> None:
    canvas.paste(colour, (0, 0), mask.point([round(v * strength) for v in range(256)]))


def _room(size: Size, random: Random) -> Image.Image:
    """The wall with the light of a window on it, blurred leaves, and the table."""
    width, height = size
    canvas = gradient([(214, 200, 184), (226, 213, 197), (216, 199, 180)], size)
    _tint(canvas, (255, 247, 232), halo(size, (width * 0.22, height * 0.16), width * 0.6), 0.85)
    panes = Image.new("L", size)
    pen = ImageDraw.Draw(panes)
    for n in range(3):
        x = width * (0.3 + n * 0.13)
        corners = [(x, 0), (x + width * 0.1, 0), (x + width * 0.2, height * 0.6), (x + width * 0.1, height * 0.6)]
        pen.polygon(corners, fill=150)
    _tint(canvas, (255, 244, 222), panes.filter(ImageFilter.GaussianBlur(width * 0.012)), 0.45)
    leaves = Image.new("L", size)
    pen = ImageDraw.Draw(leaves)
    for _ in range(16):
        x, y = width * random.uniform(0.89, 1.04), height * random.uniform(0.05, 0.55)
        long, wide = height * random.uniform(0.05, 0.09), height * random.uniform(0.02, 0.035)
        leaf = Image.new("L", (int(long * 2), int(long * 2)))
        ImageDraw.Draw(leaf).ellipse((0, long - wide, long * 2, long + wide), fill=random.randint(140, 235))
        leaf = leaf.rotate(random.uniform(-70, 70))
        leaves.paste(255, (int(x - long), int(y - long)), leaf)
    _tint(canvas, (96, 122, 92), leaves.filter(ImageFilter.GaussianBlur(height * 0.014)), 0.75)
    edge = round(height * 0.62)
    table = gradient([(196, 150, 108), (178, 128, 86), (146, 98, 62)], (width, height - edge))
    for cells, strength in (((6, 90), 0.5), ((24, 300), 0.35)):
        grain = noise(cells, random).resize(table.size, Image.Resampling.BICUBIC)
        table = Image.blend(table, ImageChops.soft_light(table, Image.merge("RGB", (grain,) * 3)), strength)
    _tint(table, (255, 226, 184), halo(table.size, (width * 0.3, 0), width * 0.45), 0.5)
    soft = Image.new("L", size)
    soft.paste(255, (0, edge, width, height))
    full = canvas.copy()
    full.paste(table, (0, edge))
    full.paste(table.crop((0, 0, width, 1)).resize((width, 12)), (0, edge - 12))
    return Image.composite(full, canvas, soft.filter(ImageFilter.GaussianBlur(3)))


def _shadow(
    canvas: Image.Image, axes: tuple[float, float], centre: tuple[float, float], unit: float, depth: int, blur: float
) -> None:
    mask = Image.new("L", canvas.size)
    box = (
        centre[0] - axes[0] * unit,
        centre[1] - axes[1] * unit,
        centre[0] + axes[0] * unit,
        centre[1] + axes[1] * unit,
    )
    ImageDraw.Draw(mask).ellipse(box, fill=depth)
    canvas.paste((62, 36, 22), (0, 0), mask.filter(ImageFilter.GaussianBlur(blur)))


def _lit(size: Size, stops: tuple[Colour, ...]) -> Image.Image:
    """A surface shaded from left to right, as round bodies are."""
    return gradient(stops, (size[1], size[0])).transpose(Image.Transpose.ROTATE_90)


def _mug(canvas: Image.Image, centre: float, foot: float, unit: float) -> None:
    """A glazed mug with a raw clay foot, coffee in it and a handle, drawn at twice the size and reduced."""
    width, height = canvas.size
    large = (width * 2, height * 2)
    cx, bottom, tall = centre * 2, foot * 2, unit * 0.46 * 2
    top, rx, rim, low = bottom - tall, unit * 0.42, unit * 0.085, unit * 0.38

    def oval(pen: ImageDraw.ImageDraw, y: float, across: float, down: float, fill: int) -> None:
        pen.ellipse((cx - across, y - down, cx + across, y + down), fill=fill)

    def layer(colours: tuple[Colour, ...], mask: Image.Image, box: tuple[float, float]) -> None:
        """Paints a shaded surface that spans the box's left and right edge (in large pixels) through the mask."""
        left, right = (round(each / 2) for each in box)
        shade = Image.new("RGB", canvas.size, colours[0])
        shade.paste(_lit((right - left, height), colours), (left, 0))
        canvas.paste(shade, (0, 0), mask.reduce(2))

    glaze: tuple[Colour, ...] = (
        (52, 104, 108), (112, 176, 172), (84, 156, 154), (54, 124, 126), (34, 92, 98), (22, 64, 72), (44, 88, 92),
    )  # fmt: skip
    clay: tuple[Colour, ...] = ((224, 214, 198), (252, 246, 236), (238, 229, 214), (206, 192, 174), (150, 134, 118))

    handle = Image.new("L", large)
    pen = ImageDraw.Draw(handle)
    hx, hy, ha, hd = cx + rx * 0.98, top + tall * 0.47, unit * 0.23, unit * 0.3
    pen.ellipse((hx - ha, hy - hd, hx + ha, hy + hd), fill=255)
    pen.ellipse((hx - ha * 0.62, hy - hd * 0.68, hx + ha * 0.62, hy + hd * 0.68), fill=0)
    layer(glaze[2:6], handle, (hx, hx + ha))
    inner = ImageChops.subtract(handle, ImageChops.offset(handle, -round(unit * 0.02), -round(unit * 0.02)))
    _tint(canvas, (16, 50, 58), inner.filter(ImageFilter.GaussianBlur(unit * 0.014)).reduce(2), 0.6)
    outer = ImageChops.subtract(handle, ImageChops.offset(handle, round(unit * 0.012), round(unit * 0.014)))
    _tint(canvas, (190, 232, 226), outer.filter(ImageFilter.GaussianBlur(unit * 0.008)).reduce(2), 0.55)

    body = Image.new("L", large)
    pen = ImageDraw.Draw(body)
    turn = bottom - rim * 0.6
    pen.polygon([(cx - rx, top), (cx + rx, top), (cx + low, turn), (cx - low, turn)], fill=255)
    oval(pen, turn, low, rim * 0.9, 255)
    layer(clay, body, (cx - rx, cx + rx))
    dipped = body.copy()
    line = bottom - tall * 0.2
    below = Image.new("L", large)
    ImageDraw.Draw(below).rectangle((0, line, large[0], large[1]), fill=255)
    oval(ImageDraw.Draw(below), line, rx, rim, 0)
    dipped = ImageChops.subtract(dipped, below)
    layer(glaze, dipped, (cx - rx, cx + rx))
    shine = Image.new("L", large)
    pen = ImageDraw.Draw(shine)
    pen.rounded_rectangle((cx - rx * 0.72, top + tall * 0.2, cx - rx * 0.6, top + tall * 0.7), rx * 0.06, fill=210)
    pen.rounded_rectangle((cx - rx * 0.54, top + tall * 0.22, cx - rx * 0.5, top + tall * 0.62), rx * 0.02, fill=130)
    _tint(canvas, (255, 255, 250), shine.filter(ImageFilter.GaussianBlur(unit * 0.012)).reduce(2), 0.75)

    mouth = Image.new("L", large)
    oval(ImageDraw.Draw(mouth), top, rx, rim, 255)
    layer(((150, 206, 200), (176, 226, 220), (120, 182, 178), (84, 148, 148)), mouth, (cx - rx, cx + rx))
    inside = Image.new("L", large)
    oval(ImageDraw.Draw(inside), top + rim * 0.04, rx * 0.93, rim * 0.86, 255)
    layer(((14, 44, 50), (30, 74, 80), (60, 118, 120), (96, 160, 158)), inside, (cx - rx, cx + rx))
    coffee = Image.new("L", large)
    oval(ImageDraw.Draw(coffee), top + rim * 0.42, rx * 0.9, rim * 0.72, 255)
    coffee = ImageChops.multiply(coffee, inside)
    layer(((58, 32, 20), (92, 54, 32), (120, 76, 46), (84, 48, 28)), coffee, (cx - rx, cx + rx))
    crema = Image.new("L", large)
    pen = ImageDraw.Draw(crema)
    oval(pen, top + rim * 0.42, rx * 0.86, rim * 0.66, 200)
    oval(pen, top + rim * 0.46, rx * 0.72, rim * 0.5, 0)
    crema = ImageChops.multiply(crema.filter(ImageFilter.GaussianBlur(unit * 0.012)), inside)
    _tint(canvas, (206, 150, 98), crema.reduce(2), 0.6)
    _steam(canvas, (cx / 2, top / 2), unit)


def _steam(canvas: Image.Image, mouth: tuple[float, float], unit: float) -> None:
    mask = Image.new("L", canvas.size)
    pen = ImageDraw.Draw(mask)
    for side in (-0.07, 0.03, 0.1):
        x, y = mouth[0] + side * unit, mouth[1]
        for n in range(14):
            drift = unit * 0.022 * (1 if n // 4 % 2 else -1) * (n % 4) / 4
            r = unit * (0.008 + n * 0.0012)
            cy = y - n * unit * 0.018
            pen.ellipse((x + drift - r, cy - r, x + drift + r, cy + r), fill=max(0, 120 - n * 8))
    _tint(canvas, (255, 252, 246), ImageOps.autocontrast(mask.filter(ImageFilter.GaussianBlur(unit * 0.018))), 0.28)
