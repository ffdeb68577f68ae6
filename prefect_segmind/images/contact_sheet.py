"""A contact sheet: one picture of a grid of pictures, to choose from at a glance."""

from __future__ import annotations

import unicodedata
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from math import ceil, sqrt
from statistics import median_low
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from prefect_segmind.images.conversion import thumbnail
from prefect_segmind.images.inspection import MAX_RATIO, BrokenPicture
from prefect_segmind.images.memory import MEMORY, bytes_to_make

MAX_SIDE: Final = 4000
"""The longer side of a sheet in pixels, unless its cells would become too small to be of use."""
MAX_LABELS: Final = 500
"""The most rows, and the most columns: with many more, a sheet may be larger than a JPEG can be."""

_UNITS: Final = range(48, 321)  # sides of a square cell; cells of another shape have about the same area
_SMALLEST_SOURCE: Final = 150  # pixels across, however small the cells are
_MAX_CHARACTERS: Final = 1000  # of a label: more than fits anywhere
_PAPER, _MOUNT, _EMPTY = (250, 249, 247), (239, 237, 233), (228, 226, 222)
_INK, _PALE = (38, 38, 42), (118, 115, 110)
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# What the font lacks and has a plain spelling that Unicode's own decomposition does not give.
_PLAIN: Final = str.maketrans(
    dict(zip("×‐–—−øłØŁ", "x----olOL", strict=True))
    | {"ß": "ss", "æ": "ae", "œ": "oe", "Æ": "AE", "Œ": "OE", "€": "EUR"}
)


def contact_sheet(
    rows: Sequence[str],
    columns: Sequence[str],
    picture: Callable[[int, int], bytes | None],
    *,
    source: bytes | None = None,
    title: str = "",
) -> bytes:
    """Draws pictures in a grid, each in its own ratio, with a label for each row and each column.

    The same input makes the same file. The cells take the shape that most of the pictures have.

    Args:
        rows: The label of each row. Labels that are too long are shortened in the middle; the font has Latin letters
            without accents, so accents are left out and characters of other scripts become boxes.
        columns: The label of each column.
        picture: Returns the encoded picture of a row and a column, counted from 0, or None where there is none. Called
            once per cell, row by row, and reduced at once, so that large pictures take little memory; its exceptions
            propagate.
        source: The picture that all were made from, for the top left corner.
        title: The text above the grid.

    Returns:
        A JPEG of about 320 pixels per cell, or as much less as it takes to have at most `MAX_SIDE` on the longer side.
        With more than about 60 rows or columns it grows beyond, as cells stay large enough to be of use. The cell of a
        picture that does not decode states that.

    Raises:
        ValueError: There are no rows or no columns, or more than `MAX_LABELS`.

    Example:
        >>> red = BytesIO()
        >>> Image.new("RGB", (640, 480), "red").save(red, "PNG")
        >>> sheet = contact_sheet(["ANIME", "DESIGN"], ["weight 30"], lambda row, column: red.getvalue())
        >>> Image.open(BytesIO(sheet)).format
        'JPEG'
    """
    if not rows or not columns:
        raise ValueError("a contact sheet needs at least one row and one column")
    if max(len(rows), len(columns)) > MAX_LABELS:
        raise ValueError(f"a contact sheet has at most {MAX_LABELS} rows and {MAX_LABELS} columns")
    # Up to twice as wide as it is shown, so that the loss of the thumbnail's own JPEG is not seen.
    width = 2 * max(_UNITS[0], min(_UNITS[-1], int(MAX_SIDE / sqrt(len(rows) * len(columns)))))
    original = None if source is None else _reduced(source, width)
    grid = [[_reduced(picture(row, column), width) for column in range(len(columns))] for row in range(len(rows))]
    own = _ratios([original])
    ratio = median_low(_ratios(cell for line in grid for cell in line) or own or [1.0])
    names, headings = [_plain(each) for each in rows], [_plain(each) for each in columns]

    def sheet(unit: int) -> _Sheet:
        return _Sheet(unit, ratio, names, headings, _plain(title), None if original is None else (own or [ratio])[0])

    fitting = bisect(_UNITS, MAX_SIDE, key=lambda unit: max(sheet(unit).size))
    chosen = sheet(_UNITS[max(0, fitting - 1)])
    with MEMORY.taken(bytes_to_make(chosen.size[0] * chosen.size[1])):
        return chosen.draw(grid, original)


class _Sheet:
    """Where everything is on a sheet whose cells have the area of `unit` by `unit` pixels."""

    def __init__(
        self, unit: int, ratio: float, rows: list[str], columns: list[str], title: str, source_ratio: float | None
    ) -> None:
        # The more cells, the larger the letters are against them, as the sheet is then looked at from further away.
        self.text_size = text_size = max(13, round(unit * min(0.12, 0.07 + 0.005 * max(len(rows), len(columns)))))
        self.font, self.title_font = (ImageFont.load_default(size) for size in (text_size, round(text_size * 1.7)))
        self.cell = width, height = round(unit / sqrt(ratio)), round(unit * sqrt(ratio))
        self.gap, self.margin = gap, margin = max(4, unit // 20), max(16, unit // 7)
        self.line = line = round(text_size * 1.25)

        # The left column is as wide as the labels need, within reason, and as the source, which is as large as a cell.
        gutter = min(ceil(max(map(self.font.getlength, rows))), max(width, 12 * text_size))
        self.source = (0, 0)
        if source_ratio is not None:
            shown = max(width, _SMALLEST_SOURCE)
            gutter, self.source = max(gutter, shown), _fitted((1, source_ratio), (shown, round(shown * ratio)))
        self.left = margin + (gutter + 2 * gap if gutter else 0)
        right = self.left + len(columns) * (width + gap) - gap
        self.rows = [_wrapped(each, self.font, gutter, height // line) for each in rows]
        self.columns = [_wrapped(each, self.font, width, 2) for each in columns]
        # Beside the source where there is one, else above everything.
        self.title_left = margin if source_ratio is None else self.left
        self.title = _wrapped(title, self.title_font, right - self.title_left, 3)

        above = len(self.title.splitlines()) * round(text_size * 1.7 * 1.25)
        labels = max(len(each.splitlines()) for each in self.columns)
        if source_ratio is not None:
            above, labels = max(above, self.source[1]) + gap // 2, max(1, labels)  # with the word under the source
        elif above:
            above += gap
        self.top = margin + above + labels * line + (gap // 2 if labels else 0)
        self.size = right + margin, self.top + len(rows) * (height + gap) - gap + margin

    def draw(self, grid: list[list[bytes | str]], source: bytes | str | None) -> bytes:
        """The sheet as a JPEG."""
        sheet = Image.new("RGB", self.size, _PAPER)
        pen, (width, height), gap, margin = ImageDraw.Draw(sheet), self.cell, self.gap, self.margin

        def write(at: tuple[int, int], text: str, anchor: str = "la", colour: tuple[int, int, int] = _INK) -> None:
            pen.text(at, text, colour, self.font, anchor, spacing=self.text_size // 4)

        def mount(content: bytes | str, left: int, top: int, size: tuple[int, int]) -> None:
            box = (left, top, left + size[0], top + size[1])
            if isinstance(content, str):
                sheet.paste(_EMPTY, box)
                words = _wrapped(content, self.font, size[0] - gap, size[1] // self.line)
                write((left + size[0] // 2, top + size[1] // 2), words, "mm", _PALE)
                return
            sheet.paste(_MOUNT, box)
            with Image.open(BytesIO(content)) as image:
                shown = _fitted(image.size, size)
                if max(size[0] - shown[0], size[1] - shown[1]) <= 1:
                    shown = size  # rather than a thin line of the mount along one side
                at = left + (size[0] - shown[0]) // 2, top + (size[1] - shown[1]) // 2
                sheet.paste(image.resize(shown, Image.Resampling.LANCZOS), at)

        top = margin - self.text_size // 4  # so that its letters, not their line, begin where the source does
        pen.text((self.title_left, top), self.title, _INK, self.title_font, "la", spacing=self.text_size // 2)
        if source is not None:
            mount(source, margin, margin, self.source)
            write((margin, margin + self.source[1] + gap // 2), "source", colour=_PALE)
        for column, label in enumerate(self.columns):
            write((self.left + column * (width + gap), self.top - gap // 2), label, "ld")
        for row, label in enumerate(self.rows):
            top = self.top + row * (height + gap)
            write((margin, top + height // 2), label, "lm")
            for column, content in enumerate(grid[row]):
                mount(content, self.left + column * (width + gap), top, self.cell)
        file = BytesIO()
        sheet.save(file, "JPEG", quality=88, subsampling=0)
        return file.getvalue()


def _reduced(data: bytes | None, width: int) -> bytes | str:
    """A thumbnail, or the words that stand for it."""
    try:
        return "none" if data is None else thumbnail(data, width)
    except BrokenPicture:
        return "cannot be read"


def _ratios(thumbnails: Iterable[bytes | str | None]) -> list[float]:
    """The height over the width of each, within 1:3 and 3:1."""
    sizes = [Image.open(BytesIO(each)).size for each in thumbnails if isinstance(each, bytes)]
    return [min(MAX_RATIO, max(1 / MAX_RATIO, height / width)) for width, height in sizes]


def _fitted(size: tuple[float, float], box: tuple[int, int]) -> tuple[int, int]:
    """The largest size in the same ratio that a box holds."""
    scale = min(box[0] / size[0], box[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _plain(text: str) -> str:
    """A label in characters that the font has where possible, on one line, without controls, of bounded length."""
    spaced = " ".join(unicodedata.normalize("NFKD", text.translate(_PLAIN)).split())
    kept = "".join(each for each in spaced if unicodedata.category(each) not in ("Cc", "Cf", "Cs", "Mn", "Me"))
    return kept if len(kept) <= _MAX_CHARACTERS else _cut(kept, _MAX_CHARACTERS)


def _wrapped(text: str, font: _Font, width: int, count: int) -> str:
    """A text in at most `count` lines (or one); a line that does not fit is cut in the middle."""
    lines: list[str] = []
    for word in text.split():
        if lines and (len(lines) >= count or font.getlength(f"{lines[-1]} {word}") <= width):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    for number, line in enumerate(lines):
        if font.getlength(line) > width:
            cuts = [_cut(line, kept) for kept in range(len(line))]
            lines[number] = cuts[max(0, bisect(cuts, width, key=lambda cut: ceil(font.getlength(cut))) - 1)]
    return "\n".join(lines)


def _cut(text: str, kept: int) -> str:
    """The first and the last characters of a text, `kept` in all: labels differ at the end as often as at the start."""
    at_end = kept // 2
    return f"{text[: kept - at_end].rstrip()}…{text[len(text) - at_end :].lstrip()}"
