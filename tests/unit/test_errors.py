"""Every failure has one class, says what to do, survives pickling, and holds no secret."""

from __future__ import annotations

import copy
import dataclasses
import html
import inspect
import json
import pickle
import re
import string
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from urllib.parse import quote, unquote

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from prefect_segmind import errors
from prefect_segmind.api.picture import Answered
from prefect_segmind.errors import (
    STATUS_ERRORS,
    AccountError,
    ApiError,
    ContentTypeRejectedError,
    Decision,
    InputError,
    InsufficientCreditsError,
    NotAcceptableError,
    NotAnImageError,
    ParameterRejectedError,
    SegmindError,
    StoreError,
    UnexpectedStatusError,
    redact,
    status_error,
)

CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, SegmindError)]


# --- classes ----------------------------------------------------------------------------------------------------------


def full_error(kind: type[SegmindError]) -> SegmindError:
    error = kind("it failed", status=502, retry_after=3.5, possibly_billed=True, request_id="req-1")
    error.fingerprint = "ab" * 32
    error.requests_sent = 4
    error.cost_usd = Decimal("0.05")
    error.possibly_billed_usd = Decimal("0.10")
    error.decision = Decision(2.0, "exponential backoff")
    error.stage = "generate"
    error.answered = Answered(cost_usd=Decimal("0.05"), cost_source="x-cost", at=datetime(2026, 11, 23, tzinfo=UTC))
    return error


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "carry",
    [
        pytest.param(lambda error: pickle.loads(pickle.dumps(error)), id="pickle"),
        pytest.param(copy.copy, id="copy"),
        pytest.param(copy.deepcopy, id="deepcopy"),
    ],
)
def test_an_error_keeps_all_it_knows_on_its_way_between_processes(kind, carry):
    error = full_error(kind)
    carried = carry(error)
    assert type(carried) is kind
    assert str(carried) == "it failed"
    assert vars(carried) == vars(error)
    assert vars(carried).keys() == {each.name for each in dataclasses.fields(kind)}


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_that_knows_nothing_more_says_so(kind):
    error = kind("it failed")
    assert (error.status, error.retry_after, error.request_id, error.fingerprint) == (None,) * 4
    assert (error.decision, error.stage) == (None, None)
    assert error.possibly_billed is False
    assert error.requests_sent == 0
    assert (error.cost_usd, error.possibly_billed_usd) == (Decimal("0.00"), Decimal("0.00"))


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_explains_itself_in_a_docstring(kind):
    assert kind.__doc__
    assert kind.__doc__ != kind.__mro__[1].__doc__


def test_errors_are_told_apart_by_what_a_caller_would_do():
    below = {base: {each.__name__ for each in CLASSES if issubclass(each, base)} for base in (AccountError, InputError)}
    assert below[AccountError] == {
        "AccountError",
        "InvalidKeyError",
        "PermissionDeniedError",
        "EndpointNotFoundError",
        "ModelRetiredError",
    }
    assert below[InputError] == {
        *("InputError", "InvalidJobError", "ManifestError", "SourceImageError", "ConfigurationError")
    }
    assert not [each for each in CLASSES if issubclass(each, ApiError) and issubclass(each, StoreError)]
    assert issubclass(errors.UnsafeImageError, NotAnImageError)
    assert issubclass(errors.ResultLinkError, NotAnImageError)
    asking = (errors.ForgottenError, errors.HistoryError, errors.SubmissionUnknownError)
    assert all(issubclass(each, ApiError) and not issubclass(each, AccountError) for each in asking)


def test_a_link_is_not_gone_unless_that_is_known_and_the_error_keeps_it():
    assert errors.ResultLinkError("no").gone is False
    error = errors.ResultLinkError("no", gone=True, status=200)
    assert (error.with_facts(stage="generate").gone, pickle.loads(pickle.dumps(error)).gone) == (True, True)


# --- statuses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (400, "BadRequestError"),
        (401, "InvalidKeyError"),
        (403, "PermissionDeniedError"),
        (404, "EndpointNotFoundError"),
        (405, "MethodNotAllowedError"),
        (406, "NotAcceptableError"),
        (410, "ModelRetiredError"),
        (422, "UnprocessableError"),
        (429, "RateLimitError"),
        (500, "InternalServerError"),
        (502, "BadGatewayError"),
        (504, "GatewayTimeoutError"),
        (201, "UnexpectedStatusError"),
        (302, "UnexpectedStatusError"),
        (402, "UnexpectedStatusError"),
        (418, "UnexpectedStatusError"),
        (503, "OverloadedError"),
        (529, "OverloadedError"),
        (524, "UnexpectedStatusError"),
    ],
)
def test_a_status_has_one_class(status, name):
    assert status_error(status, "").__name__ == name


def test_every_status_of_the_contract_is_the_status_of_one_class():
    assert sorted(STATUS_ERRORS) == [400, 401, 403, 404, 405, 406, 410, 422, 429, 500, 502, 503, 504, 529]
    assert all(status in kind.statuses for status, kind in STATUS_ERRORS.items())
    assert sum(len(vars(each).get("statuses", ())) for each in CLASSES) == len(STATUS_ERRORS)


@pytest.mark.parametrize(
    "kind",
    [
        *dict.fromkeys(STATUS_ERRORS.values()),
        *(UnexpectedStatusError, InsufficientCreditsError, ParameterRejectedError, ContentTypeRejectedError),
    ],
)
def test_every_class_that_a_status_can_lead_to_says_what_to_do(kind):
    assert vars(kind)["advice"]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Insufficient credits", InsufficientCreditsError),
        ("Insufficient credits. Balance: 0.012, required: 0.05", InsufficientCreditsError),
        ("You don't have enough credits to make this request", InsufficientCreditsError),
        ("INSUFFICIENT_CREDITS", InsufficientCreditsError),
        ("Your team's spend limit has been reached", InsufficientCreditsError),
        ("Monthly quota exceeded", InsufficientCreditsError),
        ("Please top up your account", InsufficientCreditsError),
        ("Please top-up your account", InsufficientCreditsError),
        ("Invalid prompt: 'a credit card on a balanced table'", ParameterRejectedError),
        ('value "spend it all" of parameter prompt is not allowed', ParameterRejectedError),
        ("Invalid Content-Type, expected application/json", ContentTypeRejectedError),
        ("content type must be application/json", ContentTypeRejectedError),
        ("Unsupported media type", ContentTypeRejectedError),
        ("Invalid value for parameter style_type", ParameterRejectedError),
        ("image_weight must be between 1 and 100", ParameterRejectedError),
        ("seed is out of range", ParameterRejectedError),
        ("RESOLUTION_800_1280 is not allowed", ParameterRejectedError),
        ('[{"loc": ["body", "style_type"], "msg": "field required"}]', ParameterRejectedError),
        ("Not Acceptable", NotAcceptableError),
        ("", NotAcceptableError),
    ],
)
def test_the_meanings_of_406_are_told_apart_by_the_providers_words(words, kind):
    assert status_error(406, words) is kind
    assert status_error(406, words.upper()) is kind


def test_words_matter_for_406_only():
    assert status_error(400, "Insufficient credits").__name__ == "BadRequestError"


# --- no secret in a message -------------------------------------------------------------------------------------------

HEX = st.text("0123456789abcdefABCDEF", min_size=16, max_size=16)
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
LEGAL = string.ascii_letters + string.digits + "-._~%!$&()*+,;=:@/"
HOST = st.text(string.ascii_lowercase + string.digits + ".-", min_size=1, max_size=20)
PATH = st.text(LEGAL + "'#", max_size=20)
SIGN = st.text(string.ascii_letters + string.digits + "%-_.~", min_size=8, max_size=40)
QUERY_NAME = st.sampled_from(["X-Amz-Signature", "sig", "token", "Expires", "a'b", "x[]", "p?q"])
ENDS = st.sampled_from(["", "\n", " ", "'", '"', ">", "' ", '", ', "')", "\\n", ")", "<br>", "'}"])
MARK = "MARKOFTHESECRET"


@settings(deadline=None)
@given(ANYTHING, HEX, ANYTHING)
@example("", "0123456789abcdef", "")
@example("x-api-key: ", "0123456789abcdef", "'")
@example("SG_", "0123456789abcdef", "SG_fedcba9876543210")
def test_no_api_key_survives_however_embedded(before, digits, after):
    assume(digits not in before + after)
    assert digits not in redact(f"{before}SG_{digits}{after}")
    assert digits not in str(SegmindError(f"{before}SG_{digits}{after}"))


@settings(deadline=None)
@given(
    before=st.sampled_from(["", "see ", "'", '"', "<a href='", "(", "url=", "x"]),
    scheme=st.sampled_from(["http://", "https://", "HTTPS://", "ftp://", "https:\\/\\/"]),
    host=HOST,
    path=PATH,
    name=QUERY_NAME,
    sign=SIGN,
    end=ENDS,
    after=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
@example("", "https://", "b.example", "/it's", "X-Amz-Signature", "abcdefgh", "", "")
@example("", "https://", "b.example", "'/", "token", "abcdefgh", "'", "")
@example("'", "https://", "b.example", "/k", "a'b", "abcdefgh", "'", "")
def test_no_query_of_a_url_survives_however_embedded(before, scheme, host, path, name, sign, end, after):
    redacted = redact(f"{before}{scheme}{host}{path}?{name}={MARK}{sign}{end}{after}")
    assert MARK not in redacted
    assert redact(redacted) == redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://b.example/k?X-Amz-Signature=ab", "https://b.example/k?…"),
        ("'https://b.example/k?X-Amz-Signature=ab', 'next'", "'https://b.example/k?…', 'next'"),
        ("<a href=https://b.example/k?sig=ab>here</a>", "<a href=https://b.example/k?…>here</a>"),
        ("https://b.example/#/k?token=ab", "https://b.example/#/k?…"),
        ("https://b.example/it's?token=ab", "https://b.example/it's?…"),
        ('{"url": "https:\\/\\/b.example\\/k?token=ab"}', '{"url": "https:\\/\\/b.example\\/k?…"}'),
        (
            "https://b.example/my photo.jpg?X-Amz-Signature=ab&x=1",
            "https://b.example/my photo.jpg?X-Amz-Signature=…&x=1",
        ),
        ("https://b.example/my photo.jpg?a=1&sig=ab", "https://b.example/my photo.jpg?a=1&sig=…"),
        ("https://user:word@b.example/k", "https://…@b.example/k"),
        ("https://user:w@rd@b.example/k", "https://…@b.example/k"),
        ("s3://AKIA0:word@bucket/k", "s3://…@bucket/k"),
        ("a key is SG_0123456789abcdef.", "a key is SG_…."),
    ],
)
def test_the_rest_of_a_text_stays_readable(text, shown):
    assert redact(text) == shown
    assert str(SegmindError(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "is this a question? Yes: https://b.example/k",
        "s3://bucket/inbox/why?.jpg does not exist",
        "S3://bucket/inbox/why?token=5.jpg",
        "write to a@b.example",
        "s3://bucket/a@b.jpg",
        "SG_ is how keys begin",
        "",
    ],
)
def test_what_is_no_secret_is_left_alone(text):
    assert redact(text) == text


def test_secrets_of_another_form_are_taken_out_where_they_are_named():
    assert redact("the key hunter2 of me", "hunter2", "") == "the key … of me"


CODINGS: dict[str, Callable[[str], str]] = {
    "percent": lambda text: quote(text, safe=""),
    "percent, small": lambda text: re.sub("%..", lambda match: match[0].lower(), quote(text, safe="")),
    "percent twice": lambda text: quote(quote(text, safe=""), safe=""),
    "every character": lambda text: "".join(f"%{byte:02X}" for byte in text.encode()),
    "JSON": lambda text: json.dumps(text),
    "JSON in JSON": lambda text: json.dumps({"body": json.dumps({"url": text})}),
    "escapes of JSON": lambda text: "".join(each if each.isalnum() else f"\\u{ord(each):04x}" for each in text),
    "slashes of JSON": lambda text: text.replace("/", "\\/").replace("&", "\\u0026"),
    "HTML": lambda text: f'<a href="{html.escape(text)}">',
    "HTML twice": lambda text: html.escape(html.escape(text)),
    "numbers of HTML": lambda text: "".join(each if each.isalnum() else f"&#{ord(each)};" for each in text),
    "percent in HTML": lambda text: "".join(f"&#x25;{byte:02x}" for byte in text.encode()),
    "small": str.lower,
    "capitals": str.upper,
    "bytes": lambda text: repr(text.encode()),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://b.example/k?w=1&X-Amz-Signature=0123abcdef", "0123abcdef"),
        ("https://b.example/k?sig=ab%20hunter2%26hunter2", "hunter2"),
        ("https://user:hunter2@b.example/k", "hunter2"),
        ("bad value X-Amz-Signature=0123abcdef&x=1", "0123abcdef"),
        ("bad value ?w=1&sig=0123abcdef", "0123abcdef"),
        ('"access_token": "hunter2"', "hunter2"),
        ("{'x-api-key': 'hunter2'}", "hunter2"),
        ("the key SG_0123456789abcdef is", "0123456789abcdef"),
        ("the key is my own key/of+mine", "of+mine"),
        ("a eyJhbGciOi.eyJzdWIiOiIx.c2lnbmF0 b", "eyJzdWIiOiIx"),
    ],
)
def test_no_secret_is_echoed_in_any_coding(text: str, secret: str, coding: str) -> None:
    if "eyJ" in text and coding in ("small", "capitals"):
        return  # then it is no token, and of no use
    redacted = redact(f"the answer: {CODINGS[coding](text)} and more", "own key/of+mine")
    for _ in range(4):
        assert secret not in redacted.lower()
        redacted = html.unescape(unquote(re.sub(r"\\+u00(..)", r"%\1", redacted.replace("\\/", "/"))))
    assert "the answer" in redacted


@pytest.mark.parametrize(
    "text",
    [
        "api_key: missing; set SEGMIND_API_KEY",
        'save one with SegmindCredentials(api_key=…).save("marketing")',
        "https://b.example/50%25%20off.jpg cannot be read",
        "the templates {{ a }} &amp; {% b %} use key=value and s=1, e=2",
        "C:\\u0041\\photos\\x41.jpg",
        "the tokens: none; a password is asked for",
        "100% of it, 5%20",
    ],
)
def test_a_text_that_only_looks_coded_is_left_alone(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("tail", ["", "="])
@pytest.mark.parametrize(
    "unit",
    ["://", "a://b?", "https://a?x'", "?'", "://a@", "%25", "%2525", "\\u0026", "&amp;amp;", "x-amz-", "&sig", "token ",
     "sig=", "authorization ", 'authorization\\"', "eyJabcdefg", "eyJabcdefg.", "sg_", "SG_a", "s3://", "\\/", " "],
)  # fmt: skip
def test_the_time_to_redact_a_text_grows_as_its_length(unit: str, tail: str) -> None:
    # The square of this length would take a quarter of an hour, and pytest's time-out end the test.
    redact(unit * (500_000 // len(unit)) + tail, "SG_0123456789abcdef")
