"""Markdown for Prefect's UI: escaped text, tables, and small pictures inside the page itself.

Pictures are `data:` JPEGs, so that they never expire and hold no signed address.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from prefect_segmind.images.conversion import equal_thumbnails, thumbnail
from prefect_segmind.text import visible

_UNBROKEN = re.compile(r"[^-]{70,}")
"""Text without a place for a line break, which Prefect's UI cuts off at its edge."""


def cell(text: str) -> str:
    """Text escaped for a table cell; a long word can be broken across lines, and is still copied whole."""
    shown = visible(" ".join(text.split()))
    words = (word if word.startswith("http") else _UNBROKEN.sub(_breakable, word) for word in shown.split(" "))
    escaped = re.sub(r"([\\`*_{}\[\]<>|#!&~$])", r"\\\1", " ".join(words))
    # What only at the beginning of a line makes a list or a heading.
    return re.sub(r"\A(\d*)([-+=.)])(?=[\s=-]|\Z)", r"\1\\\2", escaped).replace("\0", "<wbr>")


def _breakable(found: re.Match[str]) -> str:
    return re.sub(r"(.{35})(?=.)", "\\1\0", found[0])


def table(facts: Mapping[str, str]) -> list[str]:
    """The lines of a table of two columns."""
    return ["| | |", "| --- | --- |", *(f"| {name} | {cell(value)} |" for name, value in facts.items())]


def rows(titles: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table with a title for each column."""
    lines = (titles, ["---"] * len(titles), *([cell(each) for each in row] for row in cells))
    return [f"| {' | '.join(line)} |" for line in lines]


def listing(facts: Mapping[str, str]) -> list[str]:
    """The lines of a list, for texts of any length, which Prefect's UI would cut off in a table."""
    return [f"- **{name}**: {cell(value)}" for name, value in facts.items()]


def before_and_after(before: bytes | None, after: bytes | None, width: int) -> list[str]:
    """The lines of a table of two pictures and nothing else, so that both have the same size.

    Args:
        before: The source image; where it is None or cannot be decoded, the table says so.
        after: The picture; likewise.
        width: The width of each thumbnail in pixels.
    """
    shown: dict[str, str] = {}
    pictures = {"before": before, "after": after}
    try:
        copies = equal_thumbnails([each or b"" for each in pictures.values()], width)
        shown = {title: _inline(title, copy) for title, copy in zip(pictures, copies, strict=True)}
    except (ValueError, OSError):  # one of them cannot be decoded; the other is shown
        for title, image in pictures.items():
            with suppress(ValueError, OSError):
                shown[title] = picture(title, image or b"", width)
    cells = (shown.get(title, "cannot be read now") for title in pictures)
    # Both titles have the same longest word; otherwise one column would be wider on a narrow page.
    return ["| picture before | picture after |", "| --- | --- |", f"| {' | '.join(cells)} |"]


def picture(title: str, image: bytes, width: int) -> str:
    """A thumbnail of a picture.

    Args:
        title: Its alternative text.
        image: The picture, encoded.
        width: The greatest width of the thumbnail in pixels.

    Raises:
        ValueError: The picture cannot be decoded.
        OSError: The picture cannot be decoded.
    """
    return _inline(title, thumbnail(image, width))


def _inline(title: str, jpeg: bytes) -> str:
    return f"![{title}](data:image/jpeg;base64,{base64.b64encode(jpeg).decode()})"
