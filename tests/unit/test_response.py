"""Every form of an answer that the provider's words allow is read, and no other breaks the reading."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_segmind.api.response import (
    START_LIMIT,
    TEXT_LIMIT,
    Link,
    answer_error,
    content_type,
    error_text,
    header,
    is_whole_json,
    picture_or_link,
    read_cost,
    request_id,
    wait_asked,
)
from prefect_segmind.errors import (
    InsufficientCreditsError,
    NotAcceptableError,
    NotAnImageError,
    UnsafeImageError,
)

NOW = datetime(2025, 3, 1, 12, 0, 0, tzinfo=UTC)
RESET = "x-rate-limit-reset-at-utc"
KEY = "SG_0123456789abcdef"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) + b"!"
LINK = "https://cdn.example/a.png?token=abc"


# --- headers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ("0.05", "0.05"),
        (" 0.05 ", "0.05"),
        ('["0.05"]', "0.05"),
        ("[0.05]", "0.05"),
        ('["old", "new"]', "new"),
        ('[" padded "]', "padded"),
        ("[]", None),
        ("[null]", None),
        ('[""]', None),
        ("", None),
        ("[not JSON", "[not JSON"),
    ],
)
def test_a_header_is_taken_out_of_the_list_it_comes_in(sent, read):
    assert header({"x-cost": sent}, "x-cost") == read


@pytest.mark.parametrize("kind", [dict, httpx.Headers])
@pytest.mark.parametrize("name", ["x-cost", "X-Cost", "X-COST"])
def test_headers_are_found_in_any_case(kind, name):
    assert header(kind({"other": "1", name: "0.05"}), "x-cost") == "0.05"
    assert header(kind({"other": "1"}), "x-cost") is None


@pytest.mark.parametrize(
    "sent",
    ["[" * 100_000, '[{"a":' * 20_000, "[1" + "0" * 5000 + "]", "[" + "[" * 900 + "]" * 900 + "]", "x" * 100_000],
)
def test_no_header_is_too_deep_or_too_long_to_be_read(sent):
    value = header({"x-cost": sent}, "x-cost")
    assert value is None or len(value) <= 2000
    assert read_cost(value) is None


@pytest.mark.parametrize(
    "sent",
    ["1e-999999", "1e999999", "1e-999999999999", "9e99999999999999999999", "NaN", "sNaN", "-NaN", "Infinity", "-0.05",
     "1000", "9" * 5000, "0x1", "0.05 USD", "", None],
)  # fmt: skip
def test_a_cost_that_cannot_be_one_is_not_known(sent):
    assert read_cost(sent) is None


@pytest.mark.parametrize("key", [KEY, "a-key-of-another-form"])
def test_an_id_that_repeats_the_key_or_controls_a_terminal_is_told_without_that(key):
    headers = {"X-Request-Id": f"r-1\x1b[31m\r\x00\u202e{key}\x85 " + "x" * 5000}
    for value in (request_id(headers, key), answer_error(500, headers, b"", now=NOW, secret=key).request_id):
        assert value is not None
        assert value.startswith("r-1[31m")
        assert value.isprintable()
        assert key not in value
        assert len(value) == 200
    assert request_id({"X-Request-Id": "\x00"}) is None


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ("image/png", "image/png"),
        ("IMAGE/SVG+XML ; charset=utf-8", "image/svg+xml"),
        ("application/vnd.x.y-z", "application/vnd.x.y-z"),
        ("image/" + KEY, ""),
        ("image/a-key", ""),
        ("image/[b](https://c)", ""),
        ("image/" + "x" * 100, ""),
        ("", ""),
    ],
)
def test_a_content_type_is_one_or_nothing(sent, read):
    assert content_type({"content-type": sent}, "a-key") == read


# --- how long to wait -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [RESET, "Retry-After"])
@pytest.mark.parametrize(
    ("text", "wait"),
    [
        ("2025-03-01T12:00:30Z", 30),
        ("2025-03-01t12:00:30z", 30),
        ("2025-03-01T12:00:30", 30),
        ("2025-03-01 12:00:30", 30),
        ("2025-03-01 12:00:30 UTC", 30),
        ("2025-03-01T12:00:30+00:00", 30),
        ("2025-03-01T13:00:30+01:00", 30),
        ("2025-03-01T12:00:30.5Z", 30.5),
        ("2025-03-01T12:00:30.250Z", 30.25),
        ("2025-03-01T12:00:30.250000", 30.25),
        ("2025-03-01T12:00:30.250000+00:00", 30.25),
        ("2025-03-01T12:00:30.2500009Z", 30.25),
        ("2025-03-01T12:00:30.250000123Z", 30.25),
        ("2025-03-02", 43_200),
        ("1740830430", 30),
        ("1740830430.5", 30.5),
        ("1740830430500", 30.5),
        ("Sat, 01 Mar 2025 12:00:30 GMT", 30),
        ("Sat, 01 Mar 2025 12:00:30 -0000", 30),
        ('["2025-03-01T12:00:30Z"]', 30),
        ("2025-03-01T11:59:00Z", 0),
        ("Sat, 01 Mar 2025 11:59:00 GMT", 0),
        ("1740830000", 0),
    ],
)
def test_a_time_is_read_in_every_form(name, text, wait):
    assert wait_asked({name: text}, NOW) == pytest.approx(wait, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "wait"), [("0", 0), ("7", 7), ("1.5", 1.5), (" 7 ", 7), ('["7"]', 7), ("999999999", 999_999_999)]
)
def test_retry_after_may_be_in_seconds(text, wait):
    assert wait_asked({"Retry-After": text}, NOW) == wait


@pytest.mark.parametrize("name", [RESET, "Retry-After"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "soon",
        "-5",
        "1e3",
        "NaN",
        "2025-13-45T00:00:00Z",
        "2025-03-01T99:00",
        "30 Feb",
        "[]",
        "[1, 2",
        "Sat, 99",
    ],
)
def test_what_says_no_time_is_no_wait(name, text):
    assert wait_asked({name: text}, NOW) is None


def test_no_header_no_wait():
    assert wait_asked({}, NOW) is None
    assert wait_asked({"date": "Sat, 01 Mar 2025 12:00:00 GMT"}, NOW) is None


def test_a_reset_is_a_time_and_not_a_number_of_seconds():
    assert wait_asked({RESET: "30"}, NOW) is None


@pytest.mark.parametrize(
    ("reset", "after", "wait"),
    [
        ("2025-03-01T12:00:30Z", "5", 30),
        ("2025-03-01T12:00:05Z", "30", 30),
        ("2025-03-01T12:00:05Z", "Sat, 01 Mar 2025 12:00:30 GMT", 30),
        ("2025-03-01T11:00:00Z", "30", 30),
        ("garbage", "30", 30),
        ("2025-03-01T12:00:30Z", "garbage", 30),
        ("2025-03-01T11:00:00Z", "0", 0),
    ],
)
def test_the_longer_of_two_waits_counts(reset, after, wait):
    assert wait_asked({RESET: reset, "retry-after": after}, NOW) == wait


@settings(deadline=None)
@given(
    skew=st.timedeltas(timedelta(days=-400), timedelta(days=400)),
    wait=st.integers(0, 3600),
    name=st.sampled_from([RESET, "Retry-After"]),
    form=st.sampled_from([format_datetime, datetime.isoformat, lambda time: str(int(time.timestamp()))]),
)
def test_a_wrong_clock_here_does_no_harm_where_the_server_tells_its_own(skew, wait, name, form):
    headers = {"Date": format_datetime(NOW, usegmt=True), name: form(NOW + timedelta(seconds=wait))}
    assert wait_asked(headers, NOW + skew) == wait


@pytest.mark.parametrize("date", ["", "garbage"])
def test_without_the_server_s_clock_the_own_one_counts(date):
    headers = {"date": date, RESET: "2025-03-01T12:00:30Z"}
    assert wait_asked(headers, NOW + timedelta(seconds=10)) == 20


TIME_LIKE = st.text('0123456789-:.+ TZUTCGMSatMr,[]"', max_size=40) | st.text(max_size=20)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([RESET, "retry-after", "date"]), TIME_LIKE))
def test_no_header_breaks_the_reading_of_waits(headers):
    wait = wait_asked(headers, NOW)
    assert wait is None or 0 <= wait < 1e12


# --- what an error says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('{"error": "Invalid API key"}', "Invalid API key"),
        ('{"message": "Too many requests"}', "Too many requests"),
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"error": {"message": "bad seed", "code": 7}}', "bad seed"),
        ('{"error": {"detail": {"message": "deep"}}}', "deep"),
        ('{"error": "", "message": "second"}', "second"),
        ('{"error": null, "detail": "second"}', "second"),
        ('{"error": true, "message": "said elsewhere"}', "said elsewhere"),
        ('{"error": 400, "message": "said elsewhere"}', "said elsewhere"),
        ('{"detail": [{"loc": ["body", "seed"], "msg": "é"}]}', '[{"loc": ["body", "seed"], "msg": "é"}]'),
        ('{"code": 7}', '{"code": 7}'),
        ('"just words"', "just words"),
        ("42", "42"),
        ("{}", "{}"),
        ('{"error": "two\\n lines"}', "two lines"),
        ("<html><head><title>502</title><style>p {}</style></head><h1>Bad  Gateway</h1></html>", "Bad Gateway"),
        ("<!DOCTYPE html><script>if (a < b) {}</script><p>504<br/>Time-out</p><!-- x -->", "504 Time-out"),
        ("upstream connect error", "upstream connect error"),
        ("seed must be > 99 and < 1000000 or so, not >", "seed must be > 99 and < 1000000 or so, not >"),
        ("image_weight < 1 or > 100", "image_weight < 1 or > 100"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_the_words_of_an_error_are_found(body, text):
    assert error_text(body.encode()) == text


def test_bytes_that_are_no_text_are_shown_as_far_as_they_go():
    assert error_text(b"bad \xff byte") == "bad \ufffd byte"


@pytest.mark.parametrize(("length", "cut"), [(TEXT_LIMIT, False), (TEXT_LIMIT + 1, True), (100_000, True)])
def test_a_long_text_is_cut(length, cut):
    text = error_text(json.dumps({"error": "x" * length}).encode())
    assert len(text) == TEXT_LIMIT
    assert text.endswith("…") is cut


@settings(deadline=None)
@given(st.integers(0, TEXT_LIMIT + 20))
def test_not_even_half_a_key_is_left_where_a_text_is_cut(position):
    for key in (KEY, "hunter2hunter2hunter2"):
        text = error_text(f"{'x' * position}{key}".encode(), key)
        assert key[3:7] not in text


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text('[{}]",:<>/ahtml&', max_size=60).map(str.encode))
def test_no_body_breaks_the_reading_of_errors(body):
    assert len(error_text(body)) <= TEXT_LIMIT


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"error":' * 100_000, b'{"image":' * 100_000])
def test_not_even_a_body_without_end_does(body):
    assert len(error_text(body)) <= TEXT_LIMIT
    assert picture_or_link(body) is None
    assert not is_whole_json(body)


@pytest.mark.parametrize("body", [b"[" + b"{}," * 200_000 + b"{}]", b'{"image": [' + b"[]," * 200_000 + b"[]]}"])
def test_json_of_more_values_than_any_answer_has_is_not_taken_apart(body):
    assert picture_or_link(body) is None
    assert not is_whole_json(body)


@pytest.mark.parametrize("part", ["<a", "<script ", "<script>", "</", "<!--", "<style><", "& "])
def test_a_page_of_nothing_but_beginnings_is_read_in_one_pass(part):
    assert len(error_text((part * START_LIMIT).encode()[:START_LIMIT])) <= TEXT_LIMIT


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_packed_error_is_read_too_and_never_more_of_it_than_its_beginning(pack):
    assert error_text(pack(b'{"error": "No credits"}')) == "No credits"
    assert error_text(pack(b"no " * 100_000)).startswith("no no")
    assert error_text(pack(b"no such model")[:-6]).startswith("no such")


# --- the error of an answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "name", "possibly_billed"),
    [
        (400, '{"error": "bad"}', "BadRequestError", False),
        (401, '{"error": "bad"}', "InvalidKeyError", False),
        (403, '{"error": "bad"}', "PermissionDeniedError", False),
        (404, '{"error": "bad"}', "EndpointNotFoundError", False),
        (405, "<h1>Method Not Allowed</h1>", "MethodNotAllowedError", False),
        (406, '{"error": "Insufficient credits"}', "InsufficientCreditsError", False),
        (406, '{"error": "seed must be at least 100"}', "ParameterRejectedError", False),
        (406, '{"error": "bad Content-Type"}', "ContentTypeRejectedError", False),
        (406, "", "NotAcceptableError", False),
        (410, '{"error": "bad"}', "ModelRetiredError", False),
        (422, '{"detail": [{"msg": "unsafe"}]}', "UnprocessableError", False),
        (429, '{"error": "bad"}', "RateLimitError", False),
        (500, '{"error": "bad"}', "InternalServerError", False),
        (502, "<h1>Bad Gateway</h1>", "BadGatewayError", True),
        (504, "<h1>Gateway Time-out</h1>", "GatewayTimeoutError", True),
        (503, "", "OverloadedError", False),
        (529, "", "OverloadedError", False),
    ],
)
def test_an_answer_that_is_no_200_has_its_error(status, body, name, possibly_billed):
    headers = {"x-request-id": '["req-1"]', "Retry-After": "7"}
    error = answer_error(status, headers, body.encode(), now=NOW, secret=KEY)
    assert type(error).__name__ == name
    assert (error.status, error.request_id, error.retry_after) == (status, "req-1", 7)
    assert error.possibly_billed is possibly_billed


def test_what_never_reached_the_model_is_not_possibly_billed():
    possibly = {s for s in range(201, 600) if answer_error(s, {}, b"", now=NOW, secret=KEY).possibly_billed}
    assert possibly >= {502, 504, 520, 522, 524, 599, 201, 204}
    assert not possibly & {*range(300, 502), 503, 505, 511, 521, 523, 525, 526, 529, 530}


@pytest.mark.parametrize("status", [503, 529])
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "Sat, 01 Mar 2025 12:00:09 GMT"}, 9),
        ({"x-rate-limit-reset-at-utc": '["2025-03-01T12:00:11Z"]', "Retry-After": "7"}, 11),
    ],
)
def test_an_overloaded_provider_is_named_and_its_wait_is_read(status, headers, seconds):
    error = answer_error(status, {"Date": "Sat, 01 Mar 2025 12:00:00 GMT", **headers}, b"busy", now=NOW, secret=KEY)
    assert (error.retry_after, error.possibly_billed) == (seconds, False)
    assert "the provider is overloaded" in str(error)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": "No credits"}', f"the API answered 406: No credits ({InsufficientCreditsError.advice})"),
        ("", f"the API answered 406 ({NotAcceptableError.advice})"),
    ],
)
def test_a_message_has_the_provider_s_words_and_what_to_do(body, message):
    assert str(answer_error(406, {}, body.encode(), now=NOW, secret=KEY)) == message


@pytest.mark.parametrize("key", [KEY, "a key of another form"])
def test_a_message_never_holds_the_key_or_a_signature(key):
    body = json.dumps({"error": f"{key} may not read https://b.example/k?X-Amz-Signature=abc123"}).encode()
    text = str(answer_error(403, {}, body, now=NOW, secret=key))
    assert key not in text
    assert "abc123" not in text
    assert "may not read https://b.example/k?…" in text


# --- a picture in JSON ------------------------------------------------------------------------------------------------

CODED = base64.b64encode(PNG).decode()
SHAPES = {
    "image": lambda picture: {"image": picture},
    "output": lambda picture: {"output": picture},
    "url": lambda picture: {"url": picture},
    "image_url": lambda picture: {"image_url": picture},
    "images[].url": lambda picture: {"images": [{"url": picture}]},
    "images[]": lambda picture: {"images": [picture]},
    "data[].url": lambda picture: {"created": "2025", "data": [{"is_image_safe": True, "seed": 7, "url": picture}]},
    "image.url": lambda picture: {"image": {"url": picture}},
    "the second of two": lambda picture: {"data": [{"is_image_safe": False, "url": None}, {"url": picture}]},
    "after an empty one": lambda picture: {"image": "", "output": None, "url": picture},
    "a list": lambda picture: [{"url": picture}],
    "a string": lambda picture: picture,
    "data[].b64_json": lambda picture: {"created": 1, "data": [{"b64_json": picture, "revised_prompt": "a mug"}]},
    "output[]": lambda picture: {"status": "COMPLETED", "output": [picture, picture]},
    "result": lambda picture: {"result": picture},
    "result in words, and a picture": lambda picture: {"result": "success", "results": [{"base64": picture}]},
    "an image in words, and a picture": lambda picture: {"image": "done", "output": "ok", "url": picture},
    "nested in data": lambda picture: {"data": {"images": [{"url": picture}]}},
    "nested in result": lambda picture: {"code": 0, "result": {"images": [picture]}},
}
FORMS = {
    "link": (LINK, Link(LINK)),
    "link in capitals": ("HTTPS://cdn.example/a.png", Link("HTTPS://cdn.example/a.png")),
    "link with space around": (f" {LINK}\n", Link(LINK)),
    "plain link": ("http://127.0.0.1:8787/a.png", Link("http://127.0.0.1:8787/a.png")),
    "base64": (CODED, PNG),
    "base64 in lines": (base64.encodebytes(PNG).decode(), PNG),
    "base64 for URLs": (base64.urlsafe_b64encode(PNG).decode(), PNG),
    "base64 without padding": (CODED.rstrip("="), PNG),
    "data URI": (f"data:image/png;base64,{CODED}", PNG),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_picture_is_found_in_every_shape_and_form(shape, form):
    picture, found = FORMS[form]
    assert picture_or_link(json.dumps(SHAPES[shape](picture)).encode()) == found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("before", ["\n \t", "\ufeff"])
def test_what_stands_before_json_does_no_harm(shape, before):
    assert picture_or_link((before + json.dumps(SHAPES[shape](CODED))).encode()) == PNG


def test_the_form_that_base64_needs_is_really_tested():
    assert CODED.endswith("=")
    assert {"+", "/"} & set(CODED)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=60))
def test_every_picture_comes_out_as_it_went_in(content):
    for coded in (base64.b64encode(content), base64.urlsafe_b64encode(content)):
        assert picture_or_link(json.dumps({"image": coded.decode()}).encode()) == content


@pytest.mark.parametrize(
    "body",
    [
        PNG,
        b"\xff\xd8\xff",
        b"RIFF",
        b"",
        b" ",
        b"<html>",
        b"{",
        b'{"image": ',
        b"[1, 2",
        b'"half',
        b"{\xff}",
        b"42",
        b"null",
    ],
)
def test_what_is_no_json_at_all_is_left_to_others(body):
    assert picture_or_link(body) is None


@pytest.mark.parametrize(
    "found",
    [
        {"is_image_safe": False},
        {"is_image_safe": False, "url": None},
        {"data": [{"is_image_safe": False, "url": None}]},
        {"data": [{"is_image_safe": False, "url": ""}, {"is_image_safe": True, "url": None}]},
        {"image": {"is_image_safe": False}},
        [{"is_image_safe": False}],
    ],
)
def test_an_unsafe_picture_is_an_error_of_its_own(found):
    with pytest.raises(UnsafeImageError, match="the picture is not safe") as caught:
        picture_or_link(json.dumps(found).encode())
    assert (caught.value.status, caught.value.possibly_billed) == (200, False), "what is read whole is paid for"


def test_a_picture_that_came_all_the_same_is_kept_whatever_is_said_about_it():
    assert picture_or_link(json.dumps({"is_image_safe": False, "url": LINK}).encode()) == Link(LINK)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"status": "processing"}, 'holds no picture: {"status": "processing"}'),
        ({"error": "it failed"}, "holds no picture: it failed"),
        ({"error": f"key {KEY}"}, "holds no picture: key SG_…"),
        ({"image": None, "url": "", "data": []}, "holds no picture"),
        ({"data": [{"url": None, "is_image_safe": True}]}, "holds no picture"),
        ({"image": 42, "output": True}, "holds no picture"),
        ({}, "holds no picture"),
        ([], "holds no picture"),
        ("", "holds no picture"),
        ([1, None], "holds no picture"),
        ({"image": "it failed!"}, "neither a URL nor base64"),
        ({"image": "s3://bucket/a.png"}, "neither a URL nor base64"),
        ({"image": "é"}, "neither a URL nor base64"),
        ({"image": "AAAAA"}, "neither a URL nor base64"),
        ("data:image/png;base64,???", "neither a URL nor base64"),
    ],
)
def test_json_without_a_picture_is_an_error(found, words):
    with pytest.raises(NotAnImageError) as caught:
        picture_or_link(json.dumps(found).encode())
    assert words in str(caught.value)
    assert type(caught.value) is NotAnImageError
    assert (caught.value.status, caught.value.possibly_billed) == (200, False), "what is read whole is paid for"


KEYS = st.sampled_from(["image", "output", "url", "image_url", "images", "data", "b64_json", "result"])
BESIDE = st.dictionaries(
    st.sampled_from(["image", "result", "status", "message", "seed", "input"]),
    st.none() | st.integers() | st.sampled_from(["", "success", "done", {}, [], {"url": None}]),
)


@settings(deadline=None)
@given(
    st.sampled_from([*FORMS]),
    st.lists(st.tuples(st.none() | KEYS, BESIDE), max_size=5),
)
def test_any_nesting_of_known_keys_leads_to_the_picture_whatever_words_stand_beside_it(form, levels):
    value: Any
    value, found = FORMS[form]
    for key, beside in levels:
        value = [None, value] if key is None else {**beside, key: value}
    assert picture_or_link(json.dumps(value).encode()) == found


def test_the_source_image_that_an_answer_repeats_is_not_taken_for_the_picture():
    echoed = {"input": {"image": LINK}, "image_file": LINK, "status": "QUEUED"}
    with pytest.raises(NotAnImageError, match="holds no picture"):
        picture_or_link(json.dumps(echoed).encode())


def test_a_link_or_a_data_uri_needs_no_json_around_it():
    assert picture_or_link(f"\ufeff{LINK}?sig=1\n".encode()) == Link(f"{LINK}?sig=1")
    assert picture_or_link(f"data:image/png;base64,{CODED}".encode()) == PNG
    assert picture_or_link(f"{LINK} is where it is".encode()) is None


def test_a_key_of_another_form_is_not_shown_either():
    with pytest.raises(NotAnImageError) as caught:
        picture_or_link(b'{"said": "hunter2"}', "hunter2")
    assert "hunter2" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=9) | st.just(LINK) | st.just(CODED),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["image", "output", "url", "images", "data", "is_image_safe", "x"]), inner)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(JSON.map(json.dumps).map(str.encode) | st.binary(max_size=40))
def test_every_200_is_a_picture_a_link_something_else_or_an_error_of_ours(body):
    found: Any
    try:
        found = picture_or_link(body)
    except NotAnImageError as error:
        found = error
    if isinstance(found, NotAnImageError):
        assert not found.possibly_billed
    else:
        assert found is None or isinstance(found, bytes | Link)
