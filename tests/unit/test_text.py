"""Texts as people write them: what surrounds them does not count, and what nobody can see in them is refused."""

from __future__ import annotations

import pytest

from prefect_segmind.errors import ConfigurationError
from prefect_segmind.jobs.job import name_from_image
from prefect_segmind.text import given_text, stripped


@pytest.mark.parametrize(
    ("text", "clean"),
    [(" s3://pictures\r\n", "s3://pictures"), ("\ufeff~/pictures\u200b", "~/pictures"), (" \t", None), (None, None)],
)
def test_a_setting_has_no_blanks_around_it_and_blanks_alone_are_nothing(text: str | None, clean: str | None) -> None:
    assert given_text("archive", text) == clean


def test_a_control_character_inside_a_setting_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigurationError, match=r"^archive: 's3://pic\\x00tures' contains a control character"):
        given_text("archive", "s3://pic\0tures")


@pytest.mark.parametrize("blank", [" ", "\n", "\u200b", "\u00a0"])
def test_the_time_to_strip_a_text_grows_as_its_length(blank: str) -> None:
    text = "a" + blank * 1_000_000 + "b"
    assert stripped(f"{blank}{text}{blank}") == text  # from each blank to the end would take hours
    assert name_from_image(f"a{blank * 1_000_000}b.jpg")[0] == "a"
