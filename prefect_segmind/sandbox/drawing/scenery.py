"""Palettes and backdrops: the new setting that a prompt and a seed put behind a picture's subject.

Everything is drawn by Pillow's C code at half the final size; hard edges are drawn at twice that and reduced, which
smooths them. The same random generator state gives the same scene.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

Colour = tuple[int, int, int]
Palette = tuple[Colour, ...]
"""Five colours from the darkest to the lightest."""
Size = tuple[int, int]

_PALETTES = {
    "sunset dusk evening romantic autumn coral": "2b1b3d 7a2e5a d9596b f7a072 ffe3b3",
    "ocean sea water beach summer blue pool": "06283d 125b8f 3a9bc1 8fd6e1 eefaf5",
    "forest green jungle garden moss nature plant": "14281d 2f5d3a 6a9a5b b9d08b f6f4d8",
    "neon cyberpunk futuristic club electric": "14083a 4f1d9c d8278f 35c9e8 f4f0ff",
    "winter snow ice christmas cold nordic": "1d2b45 4a6b94 8fb3d4 cfe3f1 fbfdff",
    "gold luxury premium golden amber warm": "2a1a0c 6e4519 c08a3a eec97a fff4d6",
    "spring blossom pastel pink cherry flower": "3b3557 7d6fa3 e493b3 f8c9cf fff5ee",
    "studio minimal white clean grey": "2a2d38 5f6676 a3a7b0 dcd8d0 faf7f1",
    "desert sand terracotta clay wood rustic": "3a1f1a 8c4a32 cf8355 ecbf8e fbead0",
    "mint fresh spa teal tropical lime": "0f3b3a 1f7a72 5fb9a1 b5e3cb f7fcef",
    "berry wine velvet red valentine": "2a0f2e 6d1f52 b83a68 f08a8a ffe5da",
    "night moon star space galaxy midnight": "0b1026 24346b 5561b5 a3a1e6 f2ecff",
}


def palette_for(prompt: str, random: Random) -> Palette:
    """The palette whose words the prompt names first, else one drawn at random.

    Example:
        >>> palette_for("a mug in the snow", Random(1))[-1]
        (251, 253, 255)
    """
    drawn = random.choice(sorted(_PALETTES.values()))
    by_word = {word: colours for words, colours in _PALETTES.items() for word in words.split()}
    named = (by_word[word] for word in prompt.lower().replace(",", " ").split() if word in by_word)
    colours = next(named, drawn)
    return tuple((int(each[:2], 16), int(each[2:4], 16), int(each[4:], 16)) for each in colours.split())


def mix(one: Colour, other: Colour, share: float) -> Colour:
    """A colour between two: the first at share 0, the second at 1."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def gradient(colours: Sequence[Colour], size: Size) -> Image.Image:
    """A smooth vertical gradient through the colours, the first one on top."""
    strip = Image.new("RGB", (1, len(colours)))
    for row, colour in enumerate(colours):
        strip.putpixel((0, row), colour)
    return strip.resize((1, size[1]), Image.Resampling.BICUBIC).resize(size, Image.Resampling.NEAREST)


def noise(size: Size, random: Random) -> Image.Image:
    """Grey noise around 128. `Image.effect_noise` is not used: it cannot be seeded."""
    return Image.frombytes("L", size, random.randbytes(size[0] * size[1]))


def halo(size: Size, centre: tuple[float, float], radius: float) -> Image.Image:
    """A mask that is 255 at the centre and fades to 0 at the radius (pixels)."""
    glow = ImageOps.invert(Image.radial_gradient("L")).point([max(0, round((each - 74) * 1.4)) for each in range(256)])
    side = max(4, round(radius * 0.7))  # all at a quarter of the size: it is smooth anyway
    mask = Image.new("L", (size[0] // 4 + 1, size[1] // 4 + 1))
    mask.paste(glow.resize((side, side)), (round(centre[0] / 4 - side / 2), round(centre[1] / 4 - side / 2)))
    return mask.resize(size, Image.Resampling.BILINEAR)


def _tint(canvas: Image.Image, colour: Colour, mask: Image.Image, strength: float = 1.0) -> None:
    canvas.paste(colour, (0, 0), mask.point([round(each * strength) for each in range(256)]))


def _mask(size: Size, draw: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    """What `draw` draws at twice the size, reduced, so that its edges are smooth."""
    large = Image.new("L", (size[0] * 2, size[1] * 2))
    draw(ImageDraw.Draw(large))
    return large.reduce(2)


def _rolling(size: Size, random: Random, base: float, height: float) -> list[tuple[float, float]]:
    """The outline of everything below a rolling line at `base`; `base` and `height` are shares of the size's height."""
    width, tall = size
    waves = [(random.uniform(0.6, 1.4) * 2**n, random.uniform(0, math.tau), 0.55**n) for n in range(5)]
    line = [
        (x, tall * (base - height * sum(a * math.sin(f * x / width * math.tau + p) for f, p, a in waves)))
        for x in range(0, width + 16, 16)
    ]
    return [(0, tall), *line, (width + 16, tall)]


def landscape(size: Size, colours: Palette, random: Random) -> Image.Image:
    """Misty hills under a low sun, for GENERAL."""
    shadow, deep, mid, light, glow = colours
    canvas = gradient([deep, mid, light, glow, light], size)
    sun = (size[0] * random.uniform(0.2, 0.8), size[1] * random.uniform(0.22, 0.42))
    reach = min(size)
    _tint(canvas, glow, halo(size, sun, reach * 0.6), 0.8)
    spot = reach * random.uniform(0.13, 0.19)
    box = [2 * (sun[0] - spot / 2), 2 * (sun[1] - spot / 2), 2 * (sun[0] + spot / 2), 2 * (sun[1] + spot / 2)]
    _tint(canvas, (255, 252, 240), _mask(size, lambda pen: pen.ellipse(box, fill=255)), 0.9)
    for n, colour in enumerate((mix(light, deep, 0.3), mix(light, deep, 0.6), deep, shadow)):
        mist = mix(colour, light, 0.45 - n * 0.1)
        hill = gradient([mist, mist, mist, colour, colour], size)
        outline = _rolling((size[0] * 2, size[1] * 2), random, 0.52 + n * 0.12, random.uniform(0.05, 0.08))
        mask = Image.new("L", (size[0] * 2, size[1] * 2))
        ImageDraw.Draw(mask).polygon(outline, fill=255)
        canvas.paste(hill, (0, 0), mask.reduce(2))
    return canvas


def set_table(size: Size, colours: Palette, random: Random) -> Image.Image:
    """A table before a wall with lights out of focus, for REALISTIC."""
    shadow, deep, mid, light, glow = colours
    quarter = (max(2, size[0] // 4), max(2, size[1] // 4))
    wall = gradient([shadow, deep, mid], quarter)
    window = (quarter[0] * random.choice((0.15, 0.85)), quarter[1] * 0.18)
    _tint(wall, light, halo(quarter, window, max(quarter) * 0.75), 0.75)
    lights = Image.new("RGB", quarter)
    for _ in range(26):
        radius = quarter[1] * random.uniform(0.02, 0.07)
        x, y = random.uniform(0, quarter[0]), random.uniform(0, quarter[1] * 0.62)
        colour = random.choice((mid, light, glow))
        ring = mix((0, 0, 0), colour, random.uniform(0.25, 0.8))
        spot = Image.new("RGB", quarter)
        ImageDraw.Draw(spot).ellipse((x - radius, y - radius, x + radius, y + radius), fill=ring)
        lights = ImageChops.screen(lights, spot)
    wall = ImageChops.screen(wall, lights.filter(ImageFilter.BoxBlur(1)))
    canvas = wall.resize(size, Image.Resampling.BICUBIC)
    edge = round(size[1] * random.uniform(0.64, 0.7))
    table = gradient([mid, deep, shadow], (size[0], size[1] - edge))
    grain = noise((size[0] // 24 + 2, size[1] - edge), random).resize(table.size, Image.Resampling.BICUBIC)
    table = Image.blend(table, ImageChops.soft_light(table, Image.merge("RGB", (grain,) * 3)), 0.45)
    _tint(table, glow, halo(table.size, (window[0] * 4, 0), max(size) * 0.5), 0.5)
    seam = Image.linear_gradient("L").crop((0, 0, 256, 40)).resize((size[0], 8))
    canvas.paste(table, (0, edge))
    canvas.paste(shadow, (0, edge), seam.point([max(0, 128 - each * 3) for each in range(256)]))
    return canvas


def poster(size: Size, colours: Palette, random: Random) -> Image.Image:
    """Flat geometry in the manner of a poster, for DESIGN."""
    ground, *shapes = random.choice((colours[::-1], colours[3:] + colours[:3], (colours[4], *colours[1:4], colours[0])))
    width, height = size[0] * 2, size[1] * 2
    canvas = Image.new("RGB", (width, height), ground)
    pen = ImageDraw.Draw(canvas)
    lean = random.choice((-1, 1))
    for n in range(3):
        x = width * (0.5 + lean * (0.12 + 0.14 * n))
        broad, shift = width * 0.09, -lean * width * 0.5
        band = [(x, 0), (x + broad, 0), (x + broad + shift, height), (x + shift, height)]
        pen.polygon(band, fill=shapes[(n + 1) % 4])
    cx, cy = width * random.uniform(0.38, 0.62), height * random.uniform(0.36, 0.5)
    for n, share in enumerate((0.4, 0.33, 0.26)):
        radius = min(width, height) * share
        pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=(ground, shapes[2], shapes[1])[n])
    step = min(width, height) // 28
    left, top = (step, height - step * 9) if lean > 0 else (width - step * 9, step)
    for row in range(8):
        for column in range(8):
            x, y = left + column * step, top + row * step
            pen.ellipse((x, y, x + step // 3, y + step // 3), fill=shapes[3])
    quarter = min(width, height) * random.uniform(0.2, 0.3)
    corner = (0, 0) if lean > 0 else (width, height)
    pen.ellipse((corner[0] - quarter, corner[1] - quarter, corner[0] + quarter, corner[1] + quarter), fill=shapes[0])
    pen.rectangle((0, height * 0.88, width, height), fill=shapes[3])
    return canvas.reduce(2)


def ball(side: int, colours: Sequence[Colour]) -> tuple[Image.Image, Image.Image]:
    """A lit sphere and its mask; colours from dark to light."""
    shade = ImageOps.invert(Image.radial_gradient("L")).transform(
        (side, side), Image.Transform.AFFINE, (170 / side, 0, 58, 0, 170 / side, 62), Image.Resampling.BILINEAR
    )
    body = ImageOps.colorize(shade, colours[0], colours[2], colours[1], blackpoint=40, whitepoint=236, midpoint=150)
    return body, _mask((side, side), lambda pen: pen.ellipse((2, 2, side * 2 - 3, side * 2 - 3), fill=255))


def pedestal(size: Size, colours: Palette, random: Random) -> Image.Image:
    """A round pedestal and spheres in a seamless studio, for RENDER_3D."""
    shadow, deep, mid, light, glow = colours
    canvas = gradient([mid, light, light, mid, light], size)
    _tint(canvas, glow, halo(size, (size[0] * 0.5, size[1] * 0.35), max(size) * 0.6), 0.75)
    reach = min(size)
    small = (max(2, size[0] // 4), max(2, size[1] // 4))
    shadows = Image.new("L", small)
    spots = []
    for n in range(5):
        side = max(16, round(reach * random.uniform(0.1, 0.26)))
        x = size[0] * (random.uniform(0.02, 0.3) if n % 2 else random.uniform(0.7, 0.98))
        y = size[1] * random.uniform(0.6, 0.86) if n < 4 else size[1] * random.uniform(0.12, 0.25)
        spots.append((y, x, side))
        if n < 4:
            box = (x - side * 0.4, y + side * 0.32, x + side * 0.75, y + side * 0.62)
            ImageDraw.Draw(shadows).ellipse([each / 4 for each in box], fill=170)
    cx, top, rx, ry, tall = size[0] * 0.5, size[1] * 0.74, reach * 0.4, reach * 0.09, size[1] * 0.14
    foot = (cx - rx * 1.02, top + tall - ry, cx + rx * 1.3, top + tall + ry * 1.5)
    ImageDraw.Draw(shadows).ellipse([each / 4 for each in foot], fill=190)
    _tint(canvas, shadow, shadows.filter(ImageFilter.BoxBlur(5)).resize(size, Image.Resampling.BICUBIC), 0.7)
    side_light = ImageOps.colorize(Image.linear_gradient("L").rotate(90).resize(size), glow, deep, light)
    column = [2 * each for each in (cx - rx, top, cx + rx, top + tall)]
    rim = [2 * each for each in (cx - rx, top - ry, cx + rx, top + ry)]
    base = [2 * each for each in (cx - rx, top + tall - ry, cx + rx, top + tall + ry)]

    def body(pen: ImageDraw.ImageDraw) -> None:
        pen.rectangle(column, fill=255)
        pen.ellipse(base, fill=255)

    canvas.paste(side_light, (0, 0), _mask(size, body))
    _tint(canvas, glow, _mask(size, lambda pen: pen.ellipse(rim, fill=255)))
    for y, x, side in sorted(spots):
        sphere, mask = ball(side, random.choice(((shadow, deep, light), (deep, mid, glow), (mid, light, glow))))
        canvas.paste(sphere, (round(x - side / 2), round(y - side / 2)), mask)
    return canvas


def open_sky(size: Size, colours: Palette, random: Random) -> Image.Image:
    """Towering clouds, rays and petals, for ANIME."""
    _, deep, mid, light, glow = colours
    canvas = gradient([deep, mid, mid, light, glow], size)
    width, height = size[0] * 2, size[1] * 2
    sun = (width * random.choice((0.15, 0.85)), height * 0.08)

    def rays(pen: ImageDraw.ImageDraw) -> None:
        for n in range(0, 18):
            turn = n / 18 * math.tau + random.uniform(-0.05, 0.05)
            ends = [(sun[0] + width * 2 * math.cos(a), sun[1] + width * 2 * math.sin(a)) for a in (turn, turn + 0.14)]
            pen.polygon([sun, *ends], fill=70)

    _tint(canvas, glow, _mask(size, rays), 0.75)
    large = canvas.resize((width, height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    for bank in range(3):
        base = height * (0.5 + bank * 0.13)
        puffs = [
            (x, base - abs(math.sin(x / width * 3 + bank * 2)) * height * 0.16, height * random.uniform(0.12, 0.24))
            for x in range(-width // 8, width + 80, max(24, width // 16))
        ]
        for colour, drop in ((glow if bank == 0 else (255, 255, 255), 0.0), (light if bank < 2 else glow, 0.055)):
            for left, top, across in puffs:
                box = (left, top + height * drop, left + across, top + across + height * drop)
                pen.ellipse(box, fill=colour)
                pen.rectangle((left, top + across / 2 + height * drop, left + across, height), fill=colour)
    pen.polygon(_rolling((width, height), random, 0.84, 0.025), fill=mid)
    pen.polygon(_rolling((width, height), random, 0.93, 0.03), fill=deep)
    for _ in range(34):
        x, y, r = random.uniform(0, width), random.uniform(0, height), min(size) * random.uniform(0.008, 0.024)
        pen.chord((x - r, y - r, x + r, y + r), random.uniform(0, 360), random.uniform(400, 560), fill=(255, 236, 240))
    return large.reduce(2)
