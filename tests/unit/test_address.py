"""No address with a secret in it becomes part of a job, in whatever coding and place; everyday addresses do."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from urllib.parse import parse_qsl, quote, urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefect_segmind.errors import InvalidJobError
from prefect_segmind.jobs.address import PLAIN
from prefect_segmind.jobs.job import Job, parse_job
from prefect_segmind.redaction import is_credential

SECRET = "HIDDENWORD"
NAMES = re.findall(
    r"\S+",
    "Authorization auth hdnts hdnea hdntl auth_key api_key apikey x-api-key key token access_token "
    "refresh_token jwt sig s signature Signature upload_signature Policy Key-Pair-Id X-Amz-Signature X-Amz- "
    "Credential X-Amz-Date X-Amz-Security-Token X-Goog-Signature X-Goog-Credential AWSAccessKeyId "
    "GoogleAccessId se sr sp st e hmac password pwd secret client_secret session JSESSIONID code",
)
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"


def job(image: str) -> Job:
    return parse_job({"image": image, "prompt": "a red mug", "name": "mug"})


def refusal(image: str) -> str:
    with pytest.raises(InvalidJobError) as caught:
        job(image)
    return str(caught.value)


def percent(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


CODINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "capitals": str.upper,
    "small": str.lower,
    "percent": percent,
    "percent twice": lambda name: percent(percent(name)),
    "half": lambda name: name[:1] + percent(name[1:]),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("name", NAMES)
def test_a_credential_is_refused_under_any_usual_name_in_any_coding_and_place(name: str, coding: str) -> None:
    coded = CODINGS[coding](name)
    for end in (
        f"/mug.jpg?{coded}={SECRET}",
        f"/mug.jpg?w=800&{coded}={SECRET}",
        f"/mug.jpg?w=800;{coded}={SECRET}",
        f"/mug.jpg?{coded}[]={SECRET}",
        f"/mug.jpg#{coded}={SECRET}",
        f"/mug.jpg#/k?{coded}={SECRET}",
        f"/mug.jpg;{coded}={SECRET}",
        f"/a;v=1;{coded}={SECRET}/mug.jpg",
        f"/{coded}={SECRET}/mug.jpg",
        f"/mug.jpg%3F{coded}%3D{SECRET}",
        f"/next?url=https%3A%2F%2Fb.example%2Fk%3F{quote(coded)}%3D{SECRET}",
    ):
        said = refusal(f"https://cdn.example{end}")
        assert SECRET not in said
        assert "'https://cdn.example/…'" in said
        assert "s3:// address instead" in said


@pytest.mark.parametrize(
    "address",
    [
        f"https://cdn.example/mug.jpg?w={JWT}",
        f"https://cdn.example/{JWT}/mug.jpg",
        f"https://cdn.example/mug.jpg?{JWT}",
        f"https://cdn.example/mug.jpg?v={percent(JWT)}",
        "https://cdn.example/mug.jpg?v=0123456789abcdef0123456789abcdef",
        "https://cdn.example/mug.jpg?v=dGhpcyBpcyBhIHNlY3JldA",
        "https://cdn.example/mug.jpg?0123456789abcdef",
        "https://cdn.example/mug.jpg?hunter2",
        "https://cdn.example/mug.jpg?=hunter2",
        "https://cdn.example/mug.jpg?unknown=hunter2",
        "https://cdn.example/mug.jpg#dGhpcyBpcyBhIHNlY3JldA",
        "https://user%3Ahunter2%40cdn.example/mug.jpg",
        "https:/cdn.example/mug.jpg?sig=hunter2",
        "https:cdn.example/mug.jpg?sig=hunter2",
    ],
)
def test_what_may_be_a_secret_is_refused_and_not_shown(address: str) -> None:
    said = refusal(address)
    assert not [each for each in ("hunter2", "dGhp", "eyJ", "0123456789abcdef") if each in said]


@pytest.mark.parametrize(
    "address",
    [
        "https://images.example/mug.jpg?w=800&q=80&v=3&auto=format",
        "https://images.example/photo-15?ixlib=rb-4.0.3&auto=format%2Ccompress&fit=crop&crop=faces,edges&w=1200&dpr=2",
        "https://cdn.shop.example/s/files/1/0001/mug_800x.jpg?v=1690000000&width=800",
        "https://shop.example/_next/image?url=%2F_next%2Fstatic%2Fmedia%2Fmug.1a2b3c4d.jpg&w=640&q=75",
        "https://i0.wp.example/blog/mug.jpg?resize=800%2C600&ssl=1",
        "https://s7.example/is/image/shop/mug?wid=800&hei=600&fmt=jpeg&qlt=80,0",
        "https://img.example/mug.jpg?imwidth=800&impolicy=detail",
        "https://images.example/photo-15?ixlib=rb-4.0.3&ixid=M3wxMjA3fDB8MHxwaG90by1wYWdlfHx8fGVufDB8fHx8fA%3D%3D&w=1080",
        "https://images.example/s/1/mug.jpg?fm=jpg&fl=progressive&w=800&fit=fill&f=face&bg=rgb:ffffff",
        "https://cdn.example/mug.png?fit=facearea&facepad=2&fp-x=0.5&fp-y=0.5&max-w=1200",
        "https://s7.example/is/image/shop/mug?$product_large$&wid=800&resMode=sharp2&op_usm=1.75,0.3,2,0",
        "https://shop.example/media/mug.jpg?optimize=medium&bg-color=255,255,255&canvas=700:700&height=700",
        "https://shop.example/images/mug.jpg?sw=800&sh=800&sm=fit",
        "https://cms.example/styles/large/mug.jpg?itok=h2hfZUw2",
        "https://cms.example/media/mug.jpg?anchor=center&mode=crop&c=2&r=10",
        "https://ik.example/mug.jpg?tr=w-400,h-300&updatedAt=1699999999",
        "https://oss.example/mug.jpg?x-oss-process=image/resize,w_800",
        "https://img.example/mug.jpg?1690000000",
        "https://img.example/mug.jpg?download&page=2",
        "https://img.example/mug.jpg?",
        "https://img.example/cdn-cgi/image/width=80,quality=75/mug.jpg",
        "https://img.example/image/upload/c_fill,w_800/v1690000000/mug.jpg#top",
        "https://img.example/0123456789abcdef0123456789abcdef/mug.jpg",
        "https://img.example/mug.jpg?size=large&name=Summer+mug",
    ],
)
def test_an_everyday_address_is_taken(address: str) -> None:
    assert job(address).image == address


TEXT = st.text(string.ascii_letters + string.digits + "-_.,~%=&;+/:?#!'é", max_size=30)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(NAMES) | st.sampled_from(sorted(PLAIN)) | TEXT, TEXT), max_size=3),
    st.sampled_from(["?", "#", ";", "#/k?", "?w=1#"]),
)
@example([("w", "800"), ("q", "80")], "?")
@example([("w", "%25%32%36sig%253Dabc")], "?")
def test_the_query_of_a_job_is_plain(pairs: list[tuple[str, str]], mark: str) -> None:
    try:
        image = job("https://b.example/k" + mark + "&".join("=".join(pair) for pair in pairs)).image
    except InvalidJobError:
        return
    for name, value in parse_qsl(urlsplit(image).query, keep_blank_values=True):
        if name.lower().replace("-", "").replace("_", "") not in PLAIN:
            assert not value
            assert not name.strip(string.digits) or name[0] == name[-1] == "$"
        assert not set(value) & set("=&?#@%;")
    assert not any(is_credential(name) for name in urlsplit(image).fragment.split("=")[:-1])


def test_no_plain_name_is_one_of_a_credential() -> None:
    assert not [name for name in PLAIN if is_credential(name)]
