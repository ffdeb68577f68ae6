"""A contact sheet: one picture of a grid of pictures, to choose from at a glance.

Knows Pillow and nothing else. Each picture is asked for once and reduced at once, so that a sheet of large pictures
takes little memory.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect
from collections.abc import Callable, Sequence
from io import BytesIO
from math import ceil, sqrt
from statistics import median_low
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from prefect_segmind.images.conversion import thumbnail
from prefect_segmind.images.inspection import MAX_RATIO, BrokenPicture

MAX_SIDE: Final = 4000
"""The longer side of a sheet in pixels, unless its cells would become too small to tell anything."""
MAX_LABELS: Final = 500
"""The most rows, and the most columns: with many more, a sheet may be larger than a JPEG can be."""

# A unit is the side of a square cell; cells of another shape have about the same area.
_SMALLEST, _LARGEST = 48, 320
_SMALLEST_SOURCE: Final = 150  # pixels across, however small the cells are
_MAX_CHARACTERS: Final = 1000  # of a label: more than fits anywhere
_PAPER, _MOUNT, _EMPTY = (250, 249, 247), (239, 237, 233), (228, 226, 222)
_INK, _PALE = (38, 38, 42), (118, 115, 110)
_NONE, _UNREADABLE = "none", "cannot be read"  # what a cell without a picture says
# What the font lacks and has a plain spelling that Unicode's own decomposition does not give.
_PLAIN: Final = str.maketrans(
    {"×": "x", "‐": "-", "–": "-", "—": "-", "−": "-", "ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "€": "EUR"}
    | {"Æ": "AE", "Œ": "OE", "Ø": "O", "Ł": "L"}
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
        picture: The encoded picture of a row and a column, counted from 0; None where there is none. Called once per
            cell, row by row; what it raises goes through.
        source: The picture that all were made of; it is shown in the top left corner.
        title: Is shown above the grid.

    Returns:
        A JPEG of about 320 pixels per cell, or as much less as it takes to have at most `MAX_SIDE` on the longer side.
        With more than about 60 rows or columns it grows beyond, as cells stay large enough to be of use. A picture that
        does not decode is a cell that says so.

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
    # Twice as wide as it is shown at most, so that the loss of the thumbnail's own JPEG is not seen.
    width = 2 * max(_SMALLEST, min(_LARGEST, int(MAX_SIDE / sqrt(len(rows) * len(columns)))))
    original = None if source is None else _reduced(source, width)
    grid = [[_reduced(picture(row, column), width) for column in range(len(columns))] for row in range(len(rows))]
    ratio = _usual_ratio([each for line in grid for each in line]) or _usual_ratio([original]) or 1.0
    source_ratio = None if original is None else _usual_ratio([original]) or ratio
    names, headings, heading = [_plain(each) for each in rows], [_plain(each) for each in columns], _plain(title)

    def laid_out(unit: int) -> _Layout:
        return _Layout(unit, ratio, names, headings, heading, source_ratio)

    units = range(_SMALLEST, _LARGEST + 1)
    fitting = bisect(units, MAX_SIDE, key=lambda unit: max(laid_out(unit).size))
    return _drawn(laid_out(units[max(0, fitting - 1)]), grid, original)


class _Layout:
    """Where everything is on a sheet whose cells have the area of `unit` by `unit` pixels."""

    def __init__(
        self, unit: int, ratio: float, rows: list[str], columns: list[str], title: str, source_ratio: float | None
    ) -> None:
        # The more cells, the larger the letters are against them, as the sheet is then looked at from further away.
        share = min(0.12, 0.07 + 0.005 * max(len(rows), len(columns)))
        self.text = _Text(max(13, round(unit * share)))
        self.large = _Text(round(self.text.size * 1.7))
        self.cell = width, height = round(unit / sqrt(ratio)), round(unit * sqrt(ratio))
        self.gap = gap = max(4, unit // 20)
        self.margin = margin = max(16, unit // 7)

        # The left column is as wide as the labels need, within reason, and as the source, which is as large as a cell.
        widest = ceil(max(map(self.text.width, rows)))
        gutter = min(widest, max(width, 12 * self.text.size))
        self.source = (0, 0)
        if source_ratio is not None:
            shown = max(width, _SMALLEST_SOURCE)
            gutter = max(gutter, shown)
            self.source = _fitted(1, source_ratio, (shown, round(shown * ratio)))
        self.left = margin + (gutter + 2 * gap if gutter else 0)
        across = len(columns) * (width + gap) - gap

        self.row_labels = [self.text.lines(each, gutter, max(1, height // self.text.line)) for each in rows]
        self.column_labels = [self.text.lines(each, width, 2) for each in columns]
        # Beside the source where there is one, else above everything.
        self.title_left = margin if source_ratio is None else self.left
        self.title = self.large.lines(title, self.left + across - self.title_left, 3, from_middle=False)

        band = len(self.title) * self.large.line
        if band and source_ratio is None:
            band += gap
        labels = max(map(len, self.column_labels))
        if source_ratio is not None:
            band = max(band, self.source[1]) + gap // 2
            labels = max(1, labels)  # for the word under the source
        self.label_bottom = margin + band + labels * self.text.line
        self.top = self.label_bottom + (gap // 2 if labels else 0)
        self.size = (self.left + across + margin, self.top + len(rows) * (height + gap) - gap + margin)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """The top left corner of a cell."""
        return self.left + column * (self.cell[0] + self.gap), self.top + row * (self.cell[1] + self.gap)


class _Text:
    """The font at a size: how wide a text is, and how to make it fit."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.line = round(size * 1.25)  # from one line to the next
        self.font = ImageFont.load_default(size)

    def width(self, text: str) -> float:
        return self.font.getlength(text)

    def lines(self, text: str, width: int, count: int, *, from_middle: bool = True) -> list[str]:
        """A text in at most so many lines; what does not fit is left out, from the middle of a line or its end.

        Labels differ at the end as often as at the start, so both ends stay; of a title, the start says most.
        """
        words, lines = text.split(), list[str]()
        while words:
            taken = 1
            while taken < len(words) and self.width(" ".join(words[: taken + 1])) <= width:
                taken += 1
            if len(lines) == count - 1:
                taken = len(words)
            lines.append(self._shortened(" ".join(words[:taken]), width, from_middle))
            words = words[taken:]
        return lines

    def _shortened(self, text: str, width: int, from_middle: bool) -> str:
        if self.width(text) <= width:
            return text

        def cut(kept: int) -> str:
            return _cut(text, kept, kept // 2 if from_middle else 0)

        fitting = bisect(range(len(text)), width, key=lambda kept: ceil(self.width(cut(kept))))
        return cut(max(0, fitting - 1))


def _drawn(layout: _Layout, grid: list[list[bytes | str]], source: bytes | str | None) -> bytes:
    """The sheet as a JPEG."""
    sheet = Image.new("RGB", layout.size, _PAPER)
    pen, text, margin = ImageDraw.Draw(sheet), layout.text, layout.margin
    _write(pen, layout.large, layout.title, (layout.title_left, margin - layout.large.size // 6))
    if source is not None:
        _mount(sheet, layout, source, (margin, margin), layout.source)
        _write(pen, text, ["source"], (margin, margin + layout.source[1] + layout.gap // 2), _PALE)
    for column, lines in enumerate(layout.column_labels):
        _write(pen, text, lines, (layout.corner(0, column)[0], layout.label_bottom - len(lines) * text.line))
    for row, lines in enumerate(layout.row_labels):
        middle = layout.corner(row, 0)[1] + (layout.cell[1] - len(lines) * text.line) // 2
        _write(pen, text, lines, (margin, middle))
        for column, content in enumerate(grid[row]):
            _mount(sheet, layout, content, layout.corner(row, column), layout.cell)
    file = BytesIO()
    sheet.save(file, "JPEG", quality=88, subsampling=0)
    return file.getvalue()


def _mount(
    sheet: Image.Image, layout: _Layout, content: bytes | str, corner: tuple[int, int], size: tuple[int, int]
) -> None:
    """Fills a cell with a thumbnail, or with the words that stand for it."""
    (left, top), (width, height) = corner, size
    box = (left, top, left + width, top + height)
    if isinstance(content, str):
        sheet.paste(_EMPTY, box)
        lines = layout.text.lines(content, width - layout.gap, max(1, height // layout.text.line))
        above = top + (height - len(lines) * layout.text.line) // 2
        _write(ImageDraw.Draw(sheet), layout.text, lines, (left + width // 2, above), _PALE, "ma")
        return
    sheet.paste(_MOUNT, box)
    with Image.open(BytesIO(content)) as image:
        shown = _fitted(image.width, image.height, size)
        if abs(shown[0] - width) <= 1 and abs(shown[1] - height) <= 1:
            shown = size  # rather than a thin line of the mount along one side
        fitted = image.resize(shown, Image.Resampling.LANCZOS)
    sheet.paste(fitted, (left + (width - shown[0]) // 2, top + (height - shown[1]) // 2))


def _write(
    pen: ImageDraw.ImageDraw,
    text: _Text,
    lines: list[str],
    start: tuple[int, int],
    colour: tuple[int, int, int] = _INK,
    anchor: str = "la",
) -> None:
    for number, line in enumerate(lines):
        pen.text((start[0], start[1] + number * text.line), line, colour, text.font, anchor)


def _reduced(data: bytes | None, width: int) -> bytes | str:
    """A thumbnail, or the words that stand for it."""
    if data is None:
        return _NONE
    try:
        return thumbnail(data, width)
    except BrokenPicture:
        return _UNREADABLE


def _usual_ratio(thumbnails: Sequence[bytes | str | None]) -> float | None:
    """The height over the width that pictures have in the middle, within 1:3 and 3:1; None where there are none."""
    ratios = []
    for each in thumbnails:
        if isinstance(each, bytes):
            with Image.open(BytesIO(each)) as image:
                ratios.append(image.height / image.width)
    return min(MAX_RATIO, max(1 / MAX_RATIO, median_low(ratios))) if ratios else None


def _plain(text: str) -> str:
    """A label in characters that the font has where possible, on one line, without controls, of bounded length."""
    spaced = " ".join(unicodedata.normalize("NFKD", text.translate(_PLAIN)).split())
    kept = "".join(each for each in spaced if unicodedata.category(each) not in ("Cc", "Cf", "Cs", "Mn", "Me"))
    return kept if len(kept) <= _MAX_CHARACTERS else _cut(kept, _MAX_CHARACTERS, _MAX_CHARACTERS // 2)


def _cut(text: str, kept: int, at_end: int) -> str:
    """A text with only so many of its characters, of which so many are at its end, and an ellipsis for the rest."""
    return text[: kept - at_end].rstrip() + "…" + text[len(text) - at_end :].lstrip()


def _fitted(width: float, height: float, box: tuple[int, int]) -> tuple[int, int]:
    """The largest size in the ratio of `width` to `height` that a box holds."""
    scale = min(box[0] / width, box[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))
