"""What may be asked for, and how a mistake is told: all at once, each with what would be right."""

from __future__ import annotations

import json
import pickle
from collections import UserDict
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prefect_segmind.api.request import ImageToImageRequest, MagicPromptOption, StyleType
from prefect_segmind.api.resolutions import Resolution
from prefect_segmind.errors import InvalidJobError
from prefect_segmind.jobs.job import ALLOWED, Job, explain, name_from_image, nearest_value, parse_job, suffix_from_image
from prefect_segmind.text import as_written, spelled

JOB = {"image": "photos/mug.jpg", "prompt": "a red mug"}
BODY = {"image_file": "https://b.example/mug.jpg?X-Amz-Signature=abc", "prompt": "a red mug"}
TEXT = st.text(max_size=30)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)


def job(**fields: object) -> Job:
    return parse_job({**JOB, **fields})


def mistakes(**fields: object) -> list[str]:
    """The lines of the message, one for each mistake; `image` and `prompt` are there unless they are None."""
    values = {name: value for name, value in {**JOB, **fields}.items() if value is not None}
    with pytest.raises(InvalidJobError) as caught:
        parse_job(values)
    first, *lines = str(caught.value).split("\n  ")
    many = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    assert first == f"The job has {many}; nothing was uploaded or paid."
    return lines


def mistake(**fields: object) -> str:
    (line,) = mistakes(**fields)
    return line


# --- the request is the provider's ------------------------------------------------------------------------------------


def test_the_request_has_the_eight_fields_of_the_api_with_its_defaults():
    assert ImageToImageRequest.model_validate(BODY).model_dump() == {
        "image_file": BODY["image_file"],
        "prompt": "a red mug",
        "image_weight": 50,
        "magic_prompt_option": MagicPromptOption.AUTO,
        "negative_prompt": None,
        "resolution": "RESOLUTION_1024_1024",
        "seed": None,
        "style_type": StyleType.GENERAL,
    }


def test_the_body_is_json_and_leaves_out_what_is_not_given():
    request = ImageToImageRequest.model_validate({**BODY, "style_type": "ANIME", "negative_prompt": "  "})
    assert json.loads(json.dumps(request.body())) == {
        **BODY,
        "image_weight": 50,
        "magic_prompt_option": "AUTO",
        "resolution": "RESOLUTION_1024_1024",
        "style_type": "ANIME",
    }


def test_all_that_is_given_is_sent():
    full = {
        **BODY,
        "image_weight": 1,
        "magic_prompt_option": "OFF",
        "negative_prompt": "blur",
        "resolution": "RESOLUTION_1280_800",
        "seed": 999_999,
        "style_type": "RENDER_3D",
    }
    assert ImageToImageRequest.model_validate(full).body() == full


@pytest.mark.parametrize("model", [ImageToImageRequest, Job])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("image_weight", value) for value in (1, 50, 100)),
        *(("magic_prompt_option", value) for value in ("AUTO", "ON", "OFF")),
        *(("seed", value) for value in (None, 100, 999_999)),
        *(("style_type", value) for value in ("GENERAL", "REALISTIC", "DESIGN", "RENDER_3D", "ANIME")),
        *(("resolution", each.value) for each in Resolution),
        *(("negative_prompt", value) for value in (None, "blur")),
    ],
)
def test_every_value_of_the_api_is_taken(model, field, value):
    assert getattr(model.model_validate({**JOB_OR_BODY[model], field: value}), field) == value


@pytest.mark.parametrize("model", [ImageToImageRequest, Job])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("image_weight", value) for value in (0, 101, -1, 50.5, "half", True, None, [50])),
        *(("magic_prompt_option", value) for value in ("auto", "", "YES", True, None)),
        *(("negative_prompt", value) for value in (5, ["blur"])),
        *(("prompt", value) for value in ("", " \n", None, 5)),
        *(("resolution", value) for value in ("RESOLUTION_800_1280", "1024x1024", "", None, 1024, "auto")),
        *(("seed", value) for value in (99, 1_000_000, 0, -1, 100.5, "any", True, False)),
        *(("style_type", value) for value in ("realistic", "PHOTO", "", None)),
        ("steps", 30),
    ],
)
def test_no_other_value_is_taken(model, field, value):
    with pytest.raises(ValidationError) as caught:
        model.model_validate({**JOB_OR_BODY[model], field: value})
    assert {each["loc"][0] for each in caught.value.errors()} == {field}


JOB_OR_BODY = {ImageToImageRequest: BODY, Job: JOB}


@pytest.mark.parametrize(
    ("model", "field", "value", "taken"),
    [
        (Job, "resolution", "AUTO", True),
        (Job, "seed", "random", True),
        (ImageToImageRequest, "resolution", "AUTO", False),
        (ImageToImageRequest, "seed", "random", False),
    ],
)
def test_auto_and_random_are_for_people_and_not_for_the_api(model, field, value, taken):
    if taken:
        assert getattr(model.model_validate({**JOB_OR_BODY[model], field: value}), field) == value
    else:
        with pytest.raises(ValidationError):
            model.model_validate({**JOB_OR_BODY[model], field: value})


@pytest.mark.parametrize("resolution", ["RESOLUTION_800_1280", "RESOLUTION_2048_2048"])
def test_an_unlisted_resolution_goes_through_where_that_is_allowed(resolution):
    assert parse_job({**JOB, "resolution": resolution}, allow_unlisted_resolution=True).resolution == resolution
    context = {"allow_unlisted_resolution": True}
    request = ImageToImageRequest.model_validate({**BODY, "resolution": resolution}, context=context)
    assert request.resolution == resolution


@pytest.mark.parametrize("resolution", ["RESOLUTION_0_800", "2048x2048", "resolution_800_1280", ""])
def test_even_then_it_must_be_a_resolution(resolution):
    with pytest.raises(InvalidJobError, match="resolution: "):
        parse_job({**JOB, "resolution": resolution}, allow_unlisted_resolution=True)


def test_enums_and_numbers_written_as_text_are_taken_too():
    taken = job(resolution=Resolution.RESOLUTION_1280_800, style_type=StyleType.ANIME, image_weight="70", seed="4242")
    assert taken == job(resolution="RESOLUTION_1280_800", style_type="ANIME", image_weight=70, seed=4242)
    assert json.loads(taken.model_dump_json())["resolution"] == "RESOLUTION_1280_800"


@pytest.mark.parametrize("value", [job(), ImageToImageRequest.model_validate(BODY)])
def test_neither_changes_once_it_is_made(value):
    with pytest.raises(ValidationError, match="frozen"):
        value.prompt = "a blue mug"


@pytest.mark.parametrize("value", [job(name="hero/summer", seed="random", resolution="AUTO"), job()])
def test_a_job_is_read_as_it_was_written(value):
    assert Job.model_validate_json(value.model_dump_json()) == value
    assert Job.model_validate(value) == value


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_every_mistake_is_told_at_once():
    lines = mistakes(
        name="../up",
        image=None,
        prompt=" ",
        image_weight=150,
        magic_prompt_option="of",
        negative_prompt=5,
        resolution="RESOLUTION_800_1280",
        seed=7,
        style_type="realistic",
        allow_extreme_ratio="perhaps",
        promt="a red mug",
    )
    assert [line.split(":")[0] for line in lines] == [*list(ALLOWED)[:2], *list(ALLOWED)[3:], "promt"]


@pytest.mark.parametrize(
    ("field", "value", "shown", "nearest"),
    [
        ("resolution", "RESOLUTION_800_1280", "'RESOLUTION_800_1280'", "RESOLUTION_768_1280"),
        ("resolution", "1920x1080", "'1920x1080'", "RESOLUTION_1280_720"),
        ("resolution", "auto", "'auto'", "AUTO"),
        ("resolution", "wide", "'wide'", None),
        ("style_type", "realistic", "'realistic'", "REALISTIC"),
        ("style_type", "render 3d", "'render 3d'", "RENDER_3D"),
        ("style_type", "Render-3D", "'Render-3D'", "RENDER_3D"),
        ("style_type", "watercolour", "'watercolour'", None),
        ("magic_prompt_option", "off", "'off'", "OFF"),
        ("magic_prompt_option", MagicPromptOption, None, None),
        ("magic_prompt_option", StyleType.ANIME, "'ANIME'", None),
        ("image_weight", 150, "150", "100"),
        ("image_weight", -3, "-3", "1"),
        ("image_weight", 0, "0", "1"),
        ("image_weight", 49.6, "49.6", "50"),
        ("image_weight", "half", "'half'", None),
        ("image_weight", True, "True", None),
        ("image_weight", 10**30, str(10**30), None),
        ("seed", 7, "7", "100"),
        ("seed", 1_000_000, "1000000", "999999"),
        ("seed", "Random", "'Random'", "random"),
        ("seed", "randm", "'randm'", "random"),
        ("seed", "lucky", "'lucky'", None),
        ("seed", False, "False", None),
        ("prompt", "  ", "'  '", None),
        ("prompt", ["a red mug"], "['a red mug']", None),
        ("prompt", "\ud800", "'\\ud800'", None),
        ("negative_prompt", 5, "5", None),
        ("negative_prompt", "\ud800", "'\\ud800'", None),
        ("allow_extreme_ratio", "perhaps", "'perhaps'", None),
        ("image", "", "''", None),
        ("image", 5, "5", None),
        ("image", "caf\udce9.jpg", "'caf\\udce9.jpg'", None),
        ("image", b"mug.jpg", "b'mug.jpg'", None),
        ("image", "ftp://b.example/mug.jpg", "'ftp://b.example/mug.jpg'", None),
        ("image", "s3://bucket", "'s3://bucket'", None),
        ("image", "s3://bucket/", "'s3://bucket/'", None),
        ("image", "https:///mug.jpg", "'https:///mug.jpg'", None),
        ("image", "http://[::1/mug.jpg", "'http://[::1/mug.jpg'", None),
        ("name", "../up", "'../up'", None),
    ],
)
def test_a_mistake_names_field_value_what_is_allowed_and_the_nearest_right_value(field, value, shown, nearest):
    line = mistake(**{field: value})
    shown = shown or repr(value)
    expected = f"{field}: {shown} is not allowed; allowed is {ALLOWED[field]}."
    assert line == expected + (f" Did you mean {nearest}?" if nearest else "")


@settings(deadline=None)
@given(st.sampled_from(["image_weight", "seed", "style_type", "magic_prompt_option", "resolution"]), ANY)
def test_a_value_that_is_proposed_is_a_right_one(field, value):
    nearest = nearest_value(field, value)
    assert nearest is None or str(getattr(job(**{field: nearest}), field)) in (nearest, f"{type_of(field)}.{nearest}")


def type_of(field: str) -> str:
    return {"style_type": "StyleType", "magic_prompt_option": "MagicPromptOption"}.get(field, "")


@pytest.mark.parametrize("field", ["image", "prompt"])
def test_a_field_that_is_missing_is_told_with_what_it_takes(field):
    assert mistake(**{field: None}) == f"{field}: missing; needed is {ALLOWED[field]}"


@pytest.mark.parametrize(
    ("field", "near"),
    [("promt", "prompt"), ("PROMPT", "prompt"), ("style-type", "style_type"), ("imageWeight", "image_weight")],
)
def test_a_misspelt_field_is_told_with_the_right_one(field, near):
    assert mistake(**{field: "x"}) == f"{field}: there is no such field. Did you mean {near}?"


def test_a_field_that_is_like_none_is_told_with_all():
    assert mistake(zzz=1) == f"zzz: there is no such field; allowed is one of {', '.join(Job.model_fields)}"


def test_what_is_no_job_at_all_is_told_too():
    with pytest.raises(
        InvalidJobError, match=r"job: \['mug.jpg'\] is not allowed; allowed is an object of named fields\."
    ):
        parse_job(["mug.jpg"])  # type: ignore[arg-type]


def test_a_long_value_is_cut():
    line = mistake(image=["x" * 500])
    assert line.startswith("image: ['xxx")
    assert "…" in line
    assert len(line) < 250


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType])
@pytest.mark.parametrize("name", [{}, {"name": "hero"}])
def test_any_mapping_can_be_a_job(kind, name):
    assert parse_job(kind({**JOB, **name})) == job(**name)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*Job.model_fields, "promt"]) | TEXT, ANY, max_size=6))
def test_whatever_is_asked_for_is_a_job_or_explained(values):
    try:
        made = parse_job(values)
    except InvalidJobError as error:
        made, explained = None, str(error).partition("\n  ")[2]
    if made is None:
        assert explained
    else:
        assert Job.model_validate_json(made.model_dump_json()) == made


def test_explain_works_for_a_request_too():
    with pytest.raises(ValidationError) as caught:
        ImageToImageRequest.model_validate({"prompt": "a red mug", "image_weight": 101})
    assert explain(caught.value, ImageToImageRequest) == [
        "image_file: missing; needed is a URI that the provider can GET",
        "image_weight: 101 is not allowed; allowed is an integer from 1 to 100. Did you mean 100?",
    ]


# --- no secret in a message -------------------------------------------------------------------------------------------

SECRETS = ["HIDDENWORD", "SG_0123456789abcdef"]


@pytest.mark.parametrize(
    "image",
    [
        "https://b.example/mug.jpg?X-Amz-Signature=HIDDENWORD",
        "https://b.example/mug.jpg?x-amz-signature=HIDDENWORD&X-Amz-Expires=60",
        "https://b.example/my mug.jpg?X-Amz-Signature=HIDDENWORD",
        "https://b.example/it's.jpg?X-Amz-Signature=HIDDENWORD",
        "https://storage.example/k.jpg?X-Goog-Signature=HIDDENWORD",
        "https://cdn.example/k.jpg?Expires=1&Signature=HIDDENWORD&Key-Pair-Id=K",
        "https://blob.example/k.jpg?sv=1&sig=HIDDENWORD",
        "https://user:HIDDENWORD@b.example/mug.jpg",
        "https://HIDDENWORD@b.example/mug.jpg",
        "https://user:HIDDENWORD" + "x" * 100 + "@b.example/mug.jpg",
        "s3://AKIA0:HIDDENWORD@bucket/mug.jpg",
    ],
)
def test_an_address_with_a_secret_in_it_is_refused_and_not_shown(image):
    line = mistake(image=image)
    assert "HIDDENWORD" not in line
    assert "holds a secret, which the run's parameters would keep; give the s3:// address instead" in line


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["see https://b.example/k?X-Amz-Signature=HIDDENWORD"]},
        {"prompt": ["x" * 50 + " https://user:HIDDENWORD" + "x" * 100 + "@b.example"]},
        {"image": "ftp://user:HIDDENWORD@b.example/k?X-Amz-Signature=HIDDENWORD"},
        {"image": b"https://b.example/k?X-Amz-Signature=HIDDENWORD"},
        {"image": PurePosixPath("https://b.example/k?X-Amz-Signature=HIDDENWORD"), "seed": 7},
        {"name": "https://b.example/k?X-Amz-Signature=HIDDENWORD"},
        {"style_type": "SG_0123456789abcdef"},
        {"SG_0123456789abcdef": 1},
        {"seed": {"https://b.example/k?token=HIDDENWORD": 1}},
    ],
)
def test_no_mistake_shows_a_secret(fields):
    text = "\n".join(mistakes(**fields))
    assert not [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (ImageToImageRequest, {"image_file": "https://b.example/k?X-Amz-Signature=HIDDENWORD"}),
        (Job, {"prompt": "a red mug", "image": "https://b.example/k?X-Amz-Signature=HIDDENWORD"}),
        (Job, {"image": "https://user:HIDDENWORD@b.example/k"}),
    ],
)
def test_not_even_an_error_of_pydantic_shows_one(model, values):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    assert "HIDDENWORD" not in str(caught.value)


# --- where the image lies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        "mug.jpg",
        "/photos/Summer mug?.jpg",
        "C:\\photos\\mug.jpg",
        "s3://bucket/inbox/mug.jpg",
        "s3://bucket/my mug.jpg",
        "s3://bucket/mug #1.jpg",
        "s3://bucket/50%25 off?.jpg",
        "s3://bucket/mug.jpg?token=5&X-Amz-Signature=6",
        "s3://bucket//a//mug@home+.jpg",
        "s3://bucket/[mug.jpg",
        "s3://bucket/?",
        "http://b.example/mug.jpg",
        "https://b.example:8443/mug.jpg?size=large&page=2",
    ],
)
def test_an_image_stays_where_it_is_said_to_be(image):
    assert job(image=image).image == image


@pytest.mark.parametrize("image", [Path("photos/mug.jpg"), PurePosixPath("photos/mug.jpg")])
def test_an_image_may_be_a_path(image):
    assert job(image=image) == job()


@pytest.mark.parametrize(
    ("image", "kept"),
    [("HTTPS://b.example/Mug.jpg", "https://b.example/Mug.jpg"), ("S3://Bucket/Mug.jpg", "s3://Bucket/Mug.jpg")],
)
def test_a_scheme_in_capitals_is_the_same_scheme(image, kept):
    assert job(image=image).image == kept


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mug", "hero/summer", "2025/März/tasse 1", "a.b", "x" * 200, "日" * 66])
def test_a_name_is_a_path_of_safe_segments(name):
    assert job(name=name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../up",
        "a/../b",
        "/etc",
        "a//b",
        "a/",
        ".hidden",
        "a/.segmind",
        "a/b.",
        "a /b",
        " ",
        "a/ /b",
        "a\nb",
        "a\x00b",
        "a\x85b",
        "a\\b",
        "c:a",
        "a*",
        "what?",
        'a"b',
        "a<b",
        "a>b",
        "a|b",
        "x" * 201,
        "日" * 67,
        5,
        "con",
        "a/NUL",
        "aux.txt",
        "com1/mug",
        "LPT³",
        "Prn .x",
        "CONIN$",
        "a\ud800",
        "mug\u202egpj",
        "a\u2028b",
    ],
)
def test_every_other_name_is_refused(name):
    assert mistake(name=name).startswith("name: ")


ODD = st.text(st.characters() | st.sampled_from("/\\.:~*?%#@[] \0\n\ud800\udce9\u202e\u2028"), max_size=40)
STARTS = [
    "",
    "~",
    "/",
    "//",
    "C:\\",
    "\\\\?\\",
    "../",
    "http:",
    "http://",
    "https://[",
    "https://xn--",
    "file:///",
    "s3://",
]
DEVICES = st.sampled_from(["con", "NUL", "a/aux", "com1.txt", "lpt9 ", "conout$"])


@settings(max_examples=500, deadline=None)
@given(st.builds("{}{}".format, st.sampled_from(STARTS), ODD | DEVICES), ODD | DEVICES | st.none())
def test_an_odd_name_or_place_is_a_job_that_every_disk_can_hold_or_a_mistake(image, name):
    try:
        made = parse_job({**JOB, "image": image, "name": name})
    except InvalidJobError:
        return
    assert Job.model_validate_json(made.model_dump_json()) == made
    for segment in made.name.split("/"):
        assert not PureWindowsPath(segment).is_reserved()
        assert not set(segment) & set('\\:*?"<>|\0\u202e\u2028')
        assert 0 < len(segment.encode()) <= 200
        assert segment.strip(" .")


@pytest.mark.parametrize(
    "image", ["a\0b.jpg", "s3://b/a\0b", "https://b.example/a\nb.jpg", "x" * 4097, "s3://b/" + "日" * 1366]
)
def test_what_is_no_path_and_no_address_is_refused(image):
    line = mistake(image=image, name="mug")
    assert line.startswith("image: ")
    assert len(line) < 300


def test_folders_for_names_can_be_made_on_any_disk(tmp_path):
    (tmp_path / job(name="日" * 66).name).mkdir()
    (tmp_path / name_from_image("日" * 80 + ".jpg")).mkdir()


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("mug.jpg", "mug"),
        ("/photos/Summer mug.final.jpg", "Summer mug.final"),
        ("C:\\photos\\mug.jpg", "mug"),
        ("s3://bucket/inbox/mug.jpg", "mug"),
        ("https://b.example/a%20mug.jpg?size=large#top", "a mug"),
        ("s3://bucket/photos/mug #1.jpg", "mug #1"),
        ("S3://bucket/photos/mug #2.jpg", "mug #2"),
        ("s3://bucket/photos/50%25 off?.jpg", "50%25 off"),
        ("s3://bucket/a%20mug+cup;v=1&x.jpg?token=5", "a%20mug+cup;v=1&x"),
        ("s3://bucket/photos?/a\\b.jpg", "a-b"),
        ("s3://bucket//a:b//mug.jpg", "mug"),
        ("s3://bucket/[mug.jpg", "[mug"),
        ("https://b.example/..%2F..%2Fetc%2Fpasswd", "passwd"),
        ("https://b.example/mug%00%0A.jpg", "mug"),
        ("what?*.jpg", "what"),
        ("a?b.jpg", "a-b"),
        (".hidden.png", "hidden"),
        ("- mug -.jpg", "mug"),
        ("s3://bucket", "image"),
        ("...", "image"),
        ("", "image"),
        ("http://[::1/mug.jpg", "image"),
        ("con.jpg", "image-con"),
        ("photos/NUL", "image-NUL"),
        ("com1.final.jpg", "image-com1.final"),
        ("console.jpg", "console"),
        ("mug\u202egpj.exe", "mug-gpj"),
        ("x" * 119 + " yz.jpg", "x" * 119),
        ("日" * 80 + ".jpg", "日" * 40),
    ],
)
def test_a_name_left_out_is_the_image_s_stem_made_safe(image, name):
    assert name_from_image(image) == name


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        ("photos/cup.JPG", "jpg"),
        ("C:\\v1.2\\cup", ""),
        ("photos.d/cup", ""),
        (".hidden", ""),
        ("cup.tar.gz", "gz"),
        ("a.p?g ", "p-g"),
        ("s3://bucket.d/a#b?c.d/cup.PNG", "png"),
        ("https://b.example/cup%2Ewebp?x=.png", "webp"),
        ("http://[", ""),
    ],
)
def test_the_suffix_of_an_image_is_safe_in_a_name(image, suffix):
    assert suffix_from_image(image) == suffix


@settings(deadline=None)
@given(st.text(max_size=300) | st.from_regex(r"(https?|s3)://\S{1,200}", fullmatch=True))
def test_every_image_has_a_name_that_is_allowed(image):
    name = name_from_image(image)
    assert job(name=name).name == name
    assert "/" not in name


@pytest.mark.parametrize("name", [None, ""])
def test_an_empty_name_is_a_name_left_out(name):
    assert parse_job({**JOB, "name": name}).name == "mug"
    assert job(image="s3://bucket/cup.png").name == "cup"


@pytest.mark.parametrize("name", [None, ""])
@pytest.mark.parametrize("image", [5, None])
def test_an_empty_name_is_no_mistake_beside_that_of_the_image(name, image):
    with pytest.raises(InvalidJobError, match="1 mistake;"):
        parse_job({"prompt": "a red mug", "name": name, "image": image})


# --- one spelling -----------------------------------------------------------------------------------------------------

BLANKS = [" ", "\t", "\u00a0", "\u202f", "\u3000", "\u200b", "\ufeff", "\u2060", "\r\n", " \u00a0\r"]


@pytest.mark.parametrize("blank", BLANKS)
def test_blanks_around_a_text_make_no_other_job(blank):
    clean = job(name="a mug", negative_prompt="blur", style_type="ANIME", resolution="AUTO", seed="random")
    fields = {field: f"{blank}{value}{blank}" for field, value in clean.model_dump(mode="json").items() if value}
    spaced = parse_job({**fields, "image_weight": 50, "allow_extreme_ratio": False})
    assert spaced == clean
    assert spaced.parameters() == clean.parameters()


def test_a_text_composed_or_not_is_the_same_job():
    assert job(name="ta\u0301sse", prompt="cafe\u0301", negative_prompt="o\u0308") == job(
        name="t\u00e1sse", prompt="caf\u00e9", negative_prompt="\u00f6"
    )


def test_lines_end_in_one_way():
    assert job(prompt="one\r\ntwo\rthree").prompt == "one\ntwo\nthree"


def test_what_is_blank_inside_of_a_text_stays():
    assert job(prompt="a\u00a0red  mug").prompt == "a\u00a0red  mug"


def test_the_form_of_a_key_is_left_alone():
    key = "s3://bucket/cafe\u0301.jpg"
    assert job(image=f" {key} ").image == key
    assert job(image=key).name == name_from_image(key) == "caf\u00e9"


def test_a_job_remembers_how_its_texts_were_written_wherever_it_goes():
    one = job(prompt="a red mug ", negative_prompt=" blur")
    assert one.written == {"prompt": "a red mug ", "negative_prompt": " blur"}
    for again in (Job.model_validate_json(one.model_dump_json()), pickle.loads(pickle.dumps(one)), one.model_copy()):
        assert (again, again.written, again.prompt) == (one, one.written, "a red mug")
    assert hash(one) == hash(job(prompt="a red mug", negative_prompt="blur"))
    assert job(negative_prompt="  ").written == {}


@settings(deadline=None)
@given(st.text(max_size=20))
def test_a_spelling_is_final(text):
    once = spelled(text)
    assert spelled(str(once)) == once
    assert as_written(once) == text


def test_a_text_remembers_how_it_was_written_on_its_way_between_processes():
    again = pickle.loads(pickle.dumps(spelled("a mug\u00a0")))
    assert (again, again.written) == ("a mug", "a mug\u00a0")


def test_a_job_that_nobody_has_checked_was_written_as_it_stands():
    assert Job.model_construct(name="mug", image="mug.jpg", prompt="a mug ").written == {}
