"""Patterns of images: what they match, in time that does not depend on the number of their stars."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefect_segmind.manifest.image_paths import Images, _wanted

SEGMENTS = st.text("ab*?.", max_size=5) | st.just("**")
NAMES = st.text("ab.", max_size=4)


def matches(pattern: list[str], name: list[str]) -> bool:
    """Whether a pattern matches, step by step: slow and plain."""
    if not pattern or not name:
        return not pattern and not name
    first, *rest = pattern
    if first == "**":
        if rest:
            return matches(rest, name) or (not name[0].startswith(".") and matches(pattern, name[1:]))
        return not any(each.startswith(".") for each in name)
    text = re.escape(first).replace(r"\*", ".*").replace(r"\?", ".")
    return not name[0].startswith(".") and bool(re.fullmatch(text, name[0])) and matches(rest, name[1:])


@settings(max_examples=1000, deadline=None)
@given(st.lists(SEGMENTS, min_size=1, max_size=5), st.lists(NAMES, min_size=1, max_size=5))
@example(["**"], ["a"])
@example(["**", "**"], ["a", "b"])
@example(["a", "**", "b"], ["a", "b"])
@example(["**", "a", "**", "*b"], ["b", "a", "a", "ab"])
@example(["a*a*b"], ["aab"])
def test_a_pattern_matches_what_it_says(pattern: list[str], name: list[str]) -> None:
    assert bool(_wanted("/".join(pattern)).fullmatch("/".join(name))) is matches(pattern, name)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("a*" * 100 + "b", "a" * 4000),
        ("*a" * 100, "a" * 4000 + "b"),
        ("*" * 500 + "b", "a" * 4000),
        ("?*" * 100 + "b", "a" * 4000),
        ("**/" * 100 + "b", "a/" * 2000 + "a"),
        ("**/a/" * 100 + "b", "a/" * 2000 + "a"),
        ("**/*a*/" * 100 + "b", "aaa/" * 1000 + "a"),
        ("**/a*/**/" * 50 + "*b*c*d", "aaa/" * 1000 + "b" * 1000),
    ],
)
def test_a_pattern_of_many_stars_is_matched_at_once(pattern: str, name: str) -> None:
    # One that tried all ways to share a name among the stars would not end within the time-out of the tests, or ever.
    assert _wanted(pattern).fullmatch(name) is None


def test_a_folder_is_searched_with_a_pattern_of_many_stars(tmp_path: Path) -> None:
    (tmp_path / ("a" * 200 + ".jpg")).touch()
    (tmp_path / ("a" * 200 + "b.jpg")).touch()
    (found,) = Images(str(tmp_path / "m.yaml"), lambda: pytest.fail("S3")).find("a*" * 60 + "b.jpg", True)
    assert found.location.endswith("ab.jpg")
