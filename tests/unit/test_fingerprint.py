"""Two jobs have the same fingerprint exactly when they ask for the same picture."""

from __future__ import annotations

import hashlib
import inspect
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_segmind.api.request import ENDPOINT, MagicPromptOption, StyleType
from prefect_segmind.api.resolutions import Resolution
from prefect_segmind.jobs.fingerprint import canonical_json, derived_seed, fingerprint
from prefect_segmind.jobs.job import Job

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
SOURCE = st.binary(max_size=8).map(lambda content: hashlib.sha256(content).hexdigest())
FIELDS: dict[str, st.SearchStrategy[object]] = {
    "prompt": TEXT,
    "image_weight": st.integers(1, 100),
    "magic_prompt_option": st.sampled_from([each.value for each in MagicPromptOption]),
    "negative_prompt": TEXT,
    "resolution": st.sampled_from([each.value for each in Resolution]),
    "seed": st.integers(100, 999_999),
    "style_type": st.sampled_from([each.value for each in StyleType]),
}
PARAMETERS = st.fixed_dictionaries(FIELDS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def job_parameters(**fields: object) -> dict[str, object]:
    return Job.model_validate({"image": "mug.jpg", "prompt": "a red mug", **fields}).parameters()


# --- what does not change it ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(SOURCE, PARAMETERS, st.randoms())
def test_the_order_of_the_parameters_does_not_matter(source, parameters, random):
    shuffled = list(parameters.items())
    random.shuffle(shuffled)
    assert fingerprint(source, dict(shuffled)) == fingerprint(source, parameters)
    assert derived_seed(source, dict(shuffled)) == derived_seed(source, parameters)


@settings(deadline=None)
@given(SOURCE, PARAMETERS, st.sampled_from(["negative_prompt", "seed"]))
def test_a_parameter_that_is_left_out_is_the_same_as_none(source, parameters, name):
    without = {key: value for key, value in parameters.items() if key != name}
    assert fingerprint(source, {**without, name: None}) == fingerprint(source, without)
    assert derived_seed(source, {**without, name: None}) == derived_seed(source, without)


@pytest.mark.parametrize("function", [fingerprint, derived_seed])
def test_attempt_name_host_and_key_cannot_matter_because_they_are_not_asked_for(function):
    assert list(inspect.signature(function).parameters) == ["source", "parameters"]


@settings(deadline=None)
@given(
    name=st.from_regex(r"[a-z]{1,9}(/[a-z]{1,9}){0,2}", fullmatch=True),
    image=st.sampled_from(["mug.jpg", "s3://bucket/mug.jpg", "https://a.example/mug.jpg"]),
    extreme=st.booleans(),
)
def test_neither_name_nor_place_nor_permission_enters_a_job_s_parameters(name, image, extreme):
    parameters = job_parameters(name=name, image=image, allow_extreme_ratio=extreme)
    assert parameters == job_parameters()
    assert not {"name", "image", "allow_extreme_ratio"} & set(parameters)


def test_every_parameter_of_the_api_but_the_image_enters():
    assert set(job_parameters(negative_prompt="blur", seed=100)) == set(FIELDS)


def test_a_default_that_is_written_down_is_the_same_job():
    written = job_parameters(
        image_weight=50,
        magic_prompt_option="AUTO",
        negative_prompt=" ",
        resolution="RESOLUTION_1024_1024",
        seed=None,
        style_type="GENERAL",
    )
    assert fingerprint("0" * 64, written) == fingerprint("0" * 64, job_parameters())


# --- what changes it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_every_parameter_changes_it(name, data):
    source, parameters = data.draw(SOURCE), data.draw(PARAMETERS)
    other = data.draw(FIELDS[name].filter(lambda value: value != parameters[name]))
    assert fingerprint(source, {**parameters, name: other}) != fingerprint(source, parameters)


@settings(deadline=None)
@given(SOURCE, SOURCE, PARAMETERS)
def test_the_source_s_content_changes_it(one, other, parameters):
    assert (fingerprint(one, parameters) == fingerprint(other, parameters)) == (one == other)


def test_the_endpoint_is_in_it():
    what = {"endpoint": ENDPOINT, "parameters": {"prompt": "é"}, "source": "00"}
    assert fingerprint("00", {"prompt": "é"}) == hashlib.sha256(canonical_json(what)).hexdigest()
    assert ENDPOINT == "ideogram-2a-img-2-img"


def test_fingerprints_of_today_are_found_again_tomorrow():
    """Archives hold them: should this test fail, every paid picture would be paid for once more."""
    parameters = job_parameters(seed=4242, negative_prompt="blur", style_type="RENDER_3D")
    assert fingerprint("ab" * 32, parameters) == "8b2f056c562e4c20ea254606de600877d2e39f4938fbe3e08040cf1f4e186321"
    assert derived_seed("ab" * 32, job_parameters()) == 736691


# --- derived seeds ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(SOURCE, PARAMETERS)
def test_a_derived_seed_is_one_that_the_api_takes_and_always_the_same(source, parameters):
    seed = derived_seed(source, parameters)
    assert 100 <= seed <= 999_999
    assert derived_seed(source, parameters) == seed


def test_derived_seeds_of_different_sources_differ():
    seeds = {derived_seed(f"{number:064x}", {"prompt": "a red mug"}) for number in range(100)}
    assert len(seeds) == 100
    assert max(seeds) - min(seeds) > 500_000


@pytest.mark.parametrize("change", [{"prompt": "a blue mug"}, {"image_weight": 51}, {"style_type": "ANIME"}])
def test_derived_seeds_of_different_jobs_differ(change):
    assert derived_seed("0" * 64, job_parameters(**change)) != derived_seed("0" * 64, job_parameters())


# --- canonical JSON ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(JSON)
def test_canonical_json_keeps_its_value(value):
    assert json.loads(canonical_json(value)) == value


def test_canonical_json_has_sorted_keys_no_spaces_and_utf_8():
    assert canonical_json({"b": [1, 2], "a": "日本"}) == '{"a":"日本","b":[1,2]}'.encode()
