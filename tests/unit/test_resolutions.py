"""The 78 resolutions are the provider's, and AUTO takes the one that crops least."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_segmind.api.resolutions import (
    AUTO,
    DEFAULT_RESOLUTION,
    Resolution,
    crop_loss,
    nearest_resolution,
    resolution_size,
    similar_resolution,
)

SIDE = st.integers(1, 20_000)
NAMES = [each.value for each in Resolution]


def test_there_are_78_of_them_and_they_are_the_provider_s_list():
    assert len(NAMES) == 78
    assert len(set(NAMES)) == 78
    # `sha256sum` of the list as it was agreed, one a line.
    digest = hashlib.sha256("".join(f"{name}\n" for name in NAMES).encode()).hexdigest()
    assert digest == "a689d72fd52456b1adc9436d16a9a36f417d5972eca8d0fd8f5d54e79dd6d122"


@pytest.mark.parametrize(
    "name",
    [
        "RESOLUTION_512_1536",
        "RESOLUTION_832_1248",
        "RESOLUTION_1024_1024",
        "RESOLUTION_1280_800",
        "RESOLUTION_1536_640",
    ],
)
def test_samples_of_the_list(name):
    assert Resolution(name).value == name


@pytest.mark.parametrize("name", ["RESOLUTION_800_1280", "RESOLUTION_640_960", "AUTO", "1024x1024"])
def test_what_is_not_on_the_list(name):
    assert name not in Resolution.__members__


def test_every_resolution_is_called_what_it_is():
    for each in Resolution:
        assert each.name == each.value == "RESOLUTION_{}_{}".format(*each.size)
        assert json.loads(json.dumps(each)) == each.value


def test_all_but_one_have_a_mirror():
    sizes = {each.size for each in Resolution}
    assert [size for size in sizes if size[::-1] not in sizes] == [(1280, 800)]


def test_the_default_is_listed_and_auto_is_not():
    assert Resolution(DEFAULT_RESOLUTION).size == (1024, 1024)
    assert AUTO not in NAMES


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1280_800",
        "RESOLUTION_1280",
        "RESOLUTION_0_800",
        "RESOLUTION_012_800",
        "RESOLUTION_1280_8",
        "RESOLUTION_1280_800_",
        "RESOLUTION_1280_800\n",
        "resolution_1280_800",
        "RESOLUTION_1280_123456",
        "RESOLUTION_١٢٨٠_٨٠٠",
    ],
)
def test_what_names_no_size_is_refused_by_its_name(text):
    with pytest.raises(ValueError, match="is not of the form RESOLUTION_<width>_<height>"):
        resolution_size(text)


@settings(deadline=None)
@given(st.integers(10, 99_999), st.integers(10, 99_999))
def test_a_size_is_read_back_from_its_name(width, height):
    assert resolution_size(f"RESOLUTION_{width}_{height}") == (width, height)


@pytest.mark.parametrize(
    ("ratio", "lost"), [((16, 9), 0.44), ((9, 16), 0.44), ((3, 2), 0.33), ((4, 3), 0.25), ((1, 1), 0)]
)
def test_what_the_default_square_crops_away(ratio, lost):
    assert crop_loss(ratio[0] * 100, ratio[1] * 100, DEFAULT_RESOLUTION) == pytest.approx(lost, abs=0.005)


@settings(deadline=None)
@given(SIDE, SIDE, st.sampled_from(NAMES))
def test_the_loss_is_a_share_and_mirrors(width, height, name):
    lost = crop_loss(width, height, name)
    assert 0 <= lost < 1
    target_width, target_height = resolution_size(name)
    assert crop_loss(height, width, f"RESOLUTION_{target_height}_{target_width}") == lost
    assert (lost == 0) == (width * target_height == height * target_width)


@settings(deadline=None)
@given(SIDE, SIDE)
def test_the_nearest_resolution_crops_least_and_is_the_largest_of_its_ratio(width, height):
    chosen = nearest_resolution(width, height)
    least = min(crop_loss(width, height, name) for name in NAMES)
    assert crop_loss(width, height, chosen.value) == least
    same = [each for each in Resolution if crop_loss(width, height, each.value) == least]
    assert chosen.size[0] * chosen.size[1] == max(each.size[0] * each.size[1] for each in same)


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(1 / 3, 3))
def test_between_1_to_3_and_3_to_1_auto_loses_less_than_six_percent(width, ratio):
    height = max(round(width / ratio), -(-width // 3))
    height = min(height, width * 3)
    assert crop_loss(width, height, nearest_resolution(width, height).value) < 0.058


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_a_listed_size_keeps_all_of_itself(name):
    assert crop_loss(*resolution_size(name), nearest_resolution(*resolution_size(name)).value) == 0


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((1000, 1000), "RESOLUTION_1024_1024"),
        ((4000, 3000), "RESOLUTION_1152_864"),
        ((1920, 1080), "RESOLUTION_1280_720"),
        ((1080, 1920), "RESOLUTION_720_1280"),
        ((6000, 4000), "RESOLUTION_1248_832"),
        ((3000, 1000), "RESOLUTION_1536_512"),
        ((10_000, 1000), "RESOLUTION_1536_512"),
    ],
)
def test_auto_for_the_ratios_of_photos(size, name):
    assert nearest_resolution(*size).value == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RESOLUTION_800_1280", "RESOLUTION_768_1280"),
        ("1024x1024", "RESOLUTION_1024_1024"),
        ("1280 × 720", "RESOLUTION_1280_720"),
        ("resolution-1279-801", "RESOLUTION_1280_800"),
        ("1920x1080", "RESOLUTION_1280_720"),
        ("512x512", "RESOLUTION_1024_1024"),
        ("2048 2048", "RESOLUTION_1024_1024"),
        ("16:10", "RESOLUTION_1280_800"),
    ],
)
def test_a_mistaken_size_finds_its_neighbour(text, name):
    assert similar_resolution(text) is Resolution(name)


@pytest.mark.parametrize("text", ["", "square", "1024", "RESOLUTION_", "9_9", "1000000", "00x00"])
def test_what_names_no_two_sides_has_no_neighbour(text):
    assert similar_resolution(text) is None


@settings(deadline=None)
@given(st.sampled_from(list(Resolution)))
def test_a_listed_size_is_its_own_neighbour(resolution):
    assert similar_resolution(resolution.value) is resolution
