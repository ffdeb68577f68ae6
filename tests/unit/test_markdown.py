"""Markdown for Prefect's pages: nothing in a text is markup, and nothing of it is cut off."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from prefect_segmind.reporting.markdown import before_and_after, cell, table
from prefect_segmind.sandbox import sample_photo
from prefect_segmind.text import visible


def test_text_stays_text() -> None:
    assert cell("a | b_c\n<b>*x*") == r"a \| b\_c \<b\>\*x\*"


NASTY = (
    "a[/]",
    "[red]",
    "[bold",
    "|",
    "`x`",
    "a\nb",
    "<script>alert(1)</script>",
    "x" * 200,
    "mug\u202egpj",
    "{name}",
    "%s",
)
TEXTS = st.text() | st.text(alphabet="[]()`*_~<>&|#!-+=.:;{}$\\/\"' \n\u202e1a") | st.sampled_from(NASTY)


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_any_text_is_shown_literally(text: str) -> None:
    shown = visible(" ".join(text.split()))
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    pages = {
        "a: ": [f"- **a**: {cell(text)}"],
        "": [f"- {cell(text)}"],
        "a": table({"a": text}),
        "a ": [f"# a {cell(text)}"],
    }
    for before, lines in pages.items():
        tokens = [each for each in page.parse("\n".join(lines)) if each.type == "inline"]
        inner = [child for each in tokens for child in each.children or ()]
        assert {each.type for each in inner} <= {"text", "text_special", "strong_open", "strong_close", "html_inline"}
        assert {each.content for each in inner if each.type == "html_inline"} <= {"<wbr>"}
        told = "".join(each.content for each in inner if each.type != "html_inline")
        assert told.strip() == (before + shown).strip()


def test_what_is_too_long_for_a_line_may_be_broken_and_is_copied_whole() -> None:
    place = "s3://bucket/" + "campaign_" * 12 + "mug.png"
    told = cell(f"archived at {place}, paid")
    assert told.count("<wbr>") >= 2
    assert told.replace("<wbr>", "").replace("\\", "") == f"archived at {place}, paid"
    assert "<wbr>" not in cell("s3://bucket/campaign/mug.png"), "what fits is left alone"
    assert "<wbr>" not in cell("https://cdn.example/" + "a" * 100), "nor does a link lead to half of its address"


@pytest.mark.parametrize("sizes", [((600, 400), (300, 300)), ((200, 100), (400, 900)), ((400, 400), (400, 400))])
def test_before_and_after_are_shown_in_one_size_whatever_their_shapes(sizes: tuple[tuple[int, int], ...]) -> None:
    before, after = (sample_photo(each) for each in sizes)
    row = before_and_after(before, after, 320)[-1]
    shown = [Image.open(BytesIO(base64.b64decode(each))).size for each in re.findall(r"base64,([^)]+)", row)]
    assert len(shown) == 2
    assert shown[0] == shown[1]
    assert shown[0][0] == 320


def test_a_picture_that_cannot_be_read_leaves_the_other(photo: Path) -> None:
    row = before_and_after(None, photo.read_bytes(), 320)[-1]
    assert row.startswith("| cannot be read now | ![after](data:image/jpeg;base64,")
    assert before_and_after(b"no picture", b"", 320)[-1] == "| cannot be read now | cannot be read now |"
