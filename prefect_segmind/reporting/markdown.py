"""Markdown for Prefect's pages: text that stays text, tables, and small pictures inside the page itself.

The pictures are `data:` JPEGs, so that they never expire and hold no signed address.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from contextlib import suppress

from prefect_segmind.images.conversion import equal_thumbnails, thumbnail

_UNBROKEN = re.compile(r"[^-]{70,}")
"""Letters without a place where a browser breaks a line: Prefect's UI cuts them off at its edge."""


def cell(text: str) -> str:
    """Text that stays text in a table; where it is too long for a line it may be broken, and is copied whole."""
    words = (word if word.startswith("http") else _UNBROKEN.sub(_breakable, word) for word in text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", " ".join(words)).replace("\0", "<wbr>")


def _breakable(found: re.Match[str]) -> str:
    return re.sub(r"(.{35})(?=.)", "\\1\0", found[0])


def table(facts: Mapping[str, str]) -> list[str]:
    """The lines of a table of two columns."""
    return ["| | |", "| --- | --- |", *(f"| {name} | {cell(value)} |" for name, value in facts.items())]


def listing(facts: Mapping[str, str]) -> list[str]:
    """The lines of a list, for texts of any length: in a table Prefect's UI cuts them off."""
    return [f"- **{name}**: {cell(value)}" for name, value in facts.items()]


def before_and_after(before: bytes | None, after: bytes | None, width: int) -> list[str]:
    """The lines of a table of two pictures and nothing else, so that both are shown in one size.

    Args:
        before: The source image, encoded; None or what does not decode is said to be unreadable.
        after: The picture, likewise.
        width: Of each copy, in pixels.
    """
    shown: dict[str, str] = {}
    pictures = {"before": before, "after": after}
    try:
        copies = equal_thumbnails([each or b"" for each in pictures.values()], width)
        shown = {title: _inline(title, copy) for title, copy in zip(pictures, copies, strict=True)}
    except (ValueError, OSError):  # one of them; the other is shown
        for title, image in pictures.items():
            with suppress(ValueError, OSError):
                shown[title] = picture(title, image or b"", width)
    cells = (shown.get(title, "cannot be read now") for title in pictures)
    # The longest word of both titles is the same, or a narrow page would make one column wider.
    return ["| picture before | picture after |", "| --- | --- |", f"| {' | '.join(cells)} |"]


def picture(title: str, image: bytes, width: int) -> str:
    """A small copy of a picture.

    Args:
        title: What it is called, for those who do not see it.
        image: The encoded picture.
        width: Of the copy, in pixels, at most.
    """
    return _inline(title, thumbnail(image, width))


def _inline(title: str, jpeg: bytes) -> str:
    return f"![{title}](data:image/jpeg;base64,{base64.b64encode(jpeg).decode()})"
