"""Markdown for Prefect's pages: text that stays text, tables, and small pictures inside the page itself.

The pictures are `data:` JPEGs, so that they never expire and hold no signed address.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping

from prefect_segmind.normalisation import thumbnail


def cell(text: str) -> str:
    """Text that stays text in a table."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", " ".join(text.split()))


def table(facts: Mapping[str, str]) -> list[str]:
    """The lines of a table of two columns."""
    return ["| | |", "| --- | --- |", *(f"| {name} | {cell(value)} |" for name, value in facts.items())]


def picture(title: str, image: bytes, width: int) -> str:
    """A small copy of a picture.

    Args:
        title: What it is called, for those who do not see it.
        image: The encoded picture.
        width: Of the copy, in pixels, at most.
    """
    return f"![{title}](data:image/jpeg;base64,{base64.b64encode(thumbnail(image, width)).decode()})"
