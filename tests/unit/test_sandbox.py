"""The sandbox's promises, over real HTTP and real S3 on loopback."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from PIL import Image, ImageChops, ImageFilter, ImageStat
from pydantic import ValidationError

from prefect_segmind.api.origin import on_loopback
from prefect_segmind.api.resolutions import Resolution
from prefect_segmind.errors import ConfigurationError
from prefect_segmind.sandbox import Answer, Sandbox, Script, make_picture, sample_photo
from prefect_segmind.sandbox import s3 as s3_module
from prefect_segmind.sandbox.drawing.picture import STYLES, _prepared
from prefect_segmind.sandbox.fetch import FetchError, fetch
from prefect_segmind.sandbox.s3 import S3Server, rclone_binary
from tests.support.asking import HTTP, MODEL, SMALL, ask
from tests.support.ports import listens
from tests.support.waiting import until


@pytest.fixture(scope="session")
def photo() -> bytes:
    return sample_photo()


class Source(BaseHTTPRequestHandler):
    """Where the provider finds the source image; counts what it is asked."""

    content = b""
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        type(self).asked.append(f"{self.command} {self.path}")
        status = int(self.path[2:]) if re.fullmatch(r"/s\d+", self.path) else 200
        bodies = {"/empty": b"", "/text": b"no picture", "/big": b"x" * 10_000_001, "/cut": self.content[:5000]}
        body = bodies.get(self.path, self.content)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://example.com/elsewhere.jpg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def source(photo: bytes) -> Iterator[str]:
    Source.content = photo
    server = ThreadingHTTPServer(("127.0.0.1", 0), Source)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with Sandbox(tmp_path_factory.mktemp("sandbox"), latency=0.0, s3=False) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running: Sandbox) -> Sandbox:
    running.reset()
    return running


def draw(photo: bytes, **fields: Any) -> Image.Image:
    usual = {"prompt": "a mug at sunset", "image_weight": 50, "style_type": "GENERAL", "seed": 4711}
    made = make_picture(photo, **{**usual, "resolution": "RESOLUTION_1024_1024", **fields})
    return Image.open(io.BytesIO(made)).convert("RGB")


def likeness(one: Image.Image, other: Image.Image) -> float:
    """The correlation, -1 to 1, of two pictures' structure: brightness without its large gradients."""
    flat = []
    for picture in (one, other):
        grey = picture.convert("L").resize((64, 64), Image.Resampling.BILINEAR)
        fine = list(grey.tobytes())
        wide = list(grey.filter(ImageFilter.GaussianBlur(8)).tobytes())
        detail = [a - b for a, b in zip(fine, wide, strict=True)]
        mean = sum(detail) / len(detail)
        flat.append([each - mean for each in detail])
    a, b = flat
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def distance(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures' channels, 0 to 255."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


# The picture


def test_the_same_request_gives_the_same_picture(photo: bytes) -> None:
    for style in STYLES:
        assert draw(photo, style_type=style).tobytes() == draw(photo, style_type=style).tobytes()


@pytest.mark.parametrize("style", STYLES)
def test_weight_90_keeps_the_source_and_weight_10_barely(photo: bytes, style: str) -> None:
    with Image.open(io.BytesIO(photo)) as image:
        cropped = image.crop((256, 0, 1280, 1024)).convert("RGB")
    strong, half, weak = (likeness(cropped, draw(photo, style_type=style, image_weight=w)) for w in (90, 50, 10))
    assert strong > 0.75
    assert weak < 0.35
    assert weak < half < strong


def test_each_style_is_visibly_different(photo: bytes) -> None:
    for weight in (10, 50, 90):
        made = {style: draw(photo, style_type=style, image_weight=weight) for style in STYLES}
        for one, other in combinations(STYLES, 2):
            assert distance(made[one], made[other]) > 8, (weight, one, other)


@pytest.mark.parametrize(
    "change",
    [{"seed": 4712}, {"prompt": "a mug in the snow"}, {"negative_prompt": "blur"}, {"magic_prompt_option": "OFF"}],
)
def test_prompt_and_seed_compose_anew(photo: bytes, change: dict[str, Any]) -> None:
    assert distance(draw(photo), draw(photo, **change)) > 3


def test_words_of_the_prompt_choose_the_palette(photo: bytes) -> None:
    mean = {
        word: ImageStat.Stat(draw(photo, prompt=f"a mug, {word}", image_weight=10)).mean
        for word in ("forest", "sunset")
    }
    assert mean["forest"][1] > mean["forest"][2]
    assert mean["sunset"][0] - mean["sunset"][1] > mean["forest"][0] - mean["forest"][1] + 20


@pytest.mark.parametrize("style", STYLES)
def test_what_requests_share_is_kept_and_changes_no_picture(photo: bytes, style: str) -> None:
    _prepared.cache_clear()
    first = draw(photo, style_type=style, image_weight=95)
    draw(photo, style_type=style, image_weight=5)
    assert draw(photo, style_type=style, image_weight=95).tobytes() == first.tobytes()
    assert _prepared.cache_info().hits == 2


@pytest.mark.parametrize("resolution", ["RESOLUTION_512_1536", "RESOLUTION_1536_512", "RESOLUTION_832_960"])
def test_a_picture_has_the_size_of_its_resolution(photo: bytes, resolution: str) -> None:
    for style in STYLES:
        assert draw(photo, style_type=style, resolution=resolution).size == Resolution(resolution).size


def test_the_source_may_be_transparent_or_turned_by_its_exif() -> None:
    clear, white = io.BytesIO(), io.BytesIO()
    Image.new("RGBA", (300, 300), (0, 0, 0, 0)).save(clear, "PNG")
    Image.new("RGB", (300, 300), "white").save(white, "PNG")
    assert draw(clear.getvalue()).tobytes() == draw(white.getvalue()).tobytes()
    turned, upright = io.BytesIO(), io.BytesIO()
    image = Image.linear_gradient("L").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 3
    image.rotate(180).save(turned, "PNG", exif=exif)
    image.save(upright, "PNG")
    assert draw(turned.getvalue()).tobytes() == draw(upright.getvalue()).tobytes()


def test_the_sample_photo_is_always_the_same_jpeg(photo: bytes) -> None:
    with Image.open(io.BytesIO(photo)) as image:
        assert (image.format, image.size) == ("JPEG", (1536, 1024))
    assert sample_photo((384, 256)) == sample_photo((384, 256))


# The API


def test_a_picture_is_answered_billed_and_counted(sandbox: Sandbox, source: str) -> None:
    answer = ask(sandbox, source)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.content)).size == (640, 1024)
    assert answer.headers["x-cost"] == "0.05"
    assert answer.headers["x-remaining-credits"] == "9.95"
    assert answer.headers["x-seed-value"] == "4711"
    assert float(answer.headers["x-generation-time"]) >= 0
    (entry,) = sandbox.ledger.requests
    assert entry.request_id == answer.headers["x-request-id"]
    assert (entry.prompt, entry.seed, entry.status, entry.billed) == ("a mug at sunset", 4711, 200, True)
    assert entry.image_sha256
    assert len(entry.image_sha256) == 64
    assert entry.time.utcoffset() == timedelta(0)
    assert (sandbox.ledger.billed, sandbox.ledger.billed_usd) == (1, Decimal("0.05"))
    assert ask(sandbox, source).content == answer.content


def test_a_seed_is_drawn_when_none_is_sent(sandbox: Sandbox, source: str) -> None:
    seeds = {int(ask(sandbox, source, seed=...).headers["x-seed-value"]) for _ in range(3)}
    assert len(seeds) > 1
    assert all(100 <= seed <= 999_999 for seed in seeds)


@pytest.mark.parametrize("key", ["", "SG_0000000000000000", "schlüssel"])
def test_a_wrong_key_is_refused_with_401(sandbox: Sandbox, source: str, key: str) -> None:
    sandbox.play(Answer(status=504))
    answer = ask(sandbox, source, key=key)
    assert answer.status_code == 401
    assert "key" in answer.json()["error"]
    assert sandbox.ledger.billed == 0
    assert HTTP.get(f"{sandbox.base_url}/get-user-credits", headers={"x-api-key": "no"}).status_code == 401
    assert ask(sandbox, source).status_code == 504  # the script waited for a request with the right key


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_weight", 0),
        ("image_weight", 101),
        ("image_weight", "50"),
        ("image_weight", 50.5),
        ("image_weight", True),
        ("seed", 99),
        ("seed", 1_000_000),
        ("seed", None),
        ("style_type", "OIL"),
        ("magic_prompt_option", "auto"),
        ("resolution", "RESOLUTION_800_1280"),
        ("negative_prompt", None),
        ("prompt", 7),
        ("prompt", ...),
        ("image_file", ...),
        ("image_file", ""),
        ("steps", 20),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(sandbox: Sandbox, source: str, field: str, value: Any) -> None:
    answer = ask(sandbox, source, **{field: value})
    assert answer.status_code == 400
    assert field in answer.json()["error"]
    assert sandbox.ledger.requests[0].status == 400
    assert sandbox.ledger.billed == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff"])
def test_a_body_that_is_no_object_is_refused(sandbox: Sandbox, body: bytes) -> None:
    headers = {"x-api-key": sandbox.api_key, "content-type": "application/json"}
    answer = HTTP.post(f"{sandbox.base_url}/{MODEL}", content=body, headers=headers)
    assert answer.status_code == 400
    assert "body" in answer.json()["error"]


def test_another_content_type_is_refused_with_406(sandbox: Sandbox) -> None:
    headers = {"x-api-key": sandbox.api_key}
    answer = HTTP.post(f"{sandbox.base_url}/{MODEL}", data={"prompt": "x"}, headers=headers)
    assert answer.status_code == 406
    assert "Content-Type" in answer.json()["error"]


def test_another_model_is_404_and_another_method_405(sandbox: Sandbox) -> None:
    answer = HTTP.post(f"{sandbox.base_url}/ideogram-9", json={})
    assert answer.status_code == 404
    assert "ideogram-9" in answer.json()["error"]
    answer = HTTP.get(f"{sandbox.base_url}/{MODEL}")
    assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (405, "text/html")


@pytest.mark.parametrize("path", ["/s404", "/s302", "/s403", "/empty", "/text", "/big", "/cut"])
def test_an_image_that_cannot_be_had_is_400_naming_image_file(sandbox: Sandbox, source: str, path: str) -> None:
    answer = ask(sandbox, source, image_file=source + path)
    assert answer.status_code == 400
    assert "image_file" in answer.json()["error"]
    assert sandbox.ledger.billed == 0
    assert answer.headers["x-remaining-credits"] == "10.00"


def test_an_image_of_too_many_pixels_is_400_too(sandbox: Sandbox, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _prepared.cache_clear()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert ask(sandbox, source).status_code == 400


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.jpg",
        "http://example.com/a.jpg",
        "http://10.0.0.1/a.jpg",
        "http://localhost.example/a.jpg",
        "http://127.0.0.1@example.com/a.jpg",
        "http://[::1/a.jpg",
        "file:///etc/passwd",
        "s3://bucket/a.jpg",
        "a.jpg",
    ],
)
def test_no_request_leaves_the_machine(sandbox: Sandbox, source: str, url: str) -> None:
    answer = ask(sandbox, source, image_file=url)
    assert answer.status_code == 400
    assert "image_file" in answer.json()["error"]


def test_the_image_is_fetched_by_one_get(sandbox: Sandbox, source: str) -> None:
    Source.asked.clear()
    assert ask(sandbox, source, image_file=f"{source}/mug.jpg?X-Amz-Signature=ab%2Bc").status_code == 200
    assert Source.asked == ["GET /mug.jpg?X-Amz-Signature=ab%2Bc"]


FOREIGN_HOSTS = ["evil.example", "evil.example:8787", "127.0.0.1.evil.example", "192.168.0.9", "0.0.0.0", ""]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_request_by_another_name_for_this_machine_is_refused(sandbox: Sandbox, host: str) -> None:
    address = sandbox.base_url.removesuffix("/v1")
    calls = [("POST", "/sandbox/reset"), ("GET", "/sandbox/ledger"), ("GET", "/v1/get-user-credits"), ("GET", "/x")]
    for method, path in calls:
        refused = HTTP.request(method, address + path, headers={"Host": host, "x-api-key": sandbox.api_key})
        assert refused.status_code == 403
        assert "this machine" in refused.json()["error"]


@pytest.mark.parametrize("origin", ["https://evil.example", "http://evil.example:8787", "null", "file://"])
def test_a_page_of_another_origin_can_neither_script_nor_reset_nor_ask_for_a_picture(
    sandbox: Sandbox, source: str, origin: str
) -> None:
    address = sandbox.base_url.removesuffix("/v1")
    ask(sandbox, source)
    before = sandbox.ledger.billed
    simple = {"Origin": origin, "Content-Type": "text/plain", "x-api-key": sandbox.api_key}
    for path in ("/sandbox/reset", "/sandbox/script", f"/v1/{MODEL}"):
        assert HTTP.post(address + path, content=b'{"answers": [{"status": 429}]}', headers=simple).status_code == 403
    assert sandbox.ledger.billed == before > 0
    assert ask(sandbox, source).status_code == 200


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]"])
def test_a_request_of_this_machine_is_answered(sandbox: Sandbox, name: str) -> None:
    port = httpx.URL(sandbox.base_url).port
    address = f"{sandbox.base_url.removesuffix('/v1')}/sandbox/ledger"
    for headers in ({"Host": f"{name}:{port}"}, {"Host": name, "Origin": f"http://{name}:3000"}):
        assert HTTP.get(address, headers=headers).status_code == 200


def test_s3_answers_nothing_that_is_not_signed_for_its_own_name(tmp_path: Path) -> None:
    with S3Server(tmp_path / "store", buckets=["segmind"]) as s3:
        (tmp_path / "store" / "segmind" / "k.txt").write_text("hidden")
        client = boto3.client(
            "s3",
            endpoint_url=s3.endpoint_url,
            aws_access_key_id=s3.access_key,
            aws_secret_access_key=s3.secret_key,
            region_name="us-east-1",
            config=Config(signature_version="s3v4"),
        )
        signed = client.generate_presigned_url("get_object", Params={"Bucket": "segmind", "Key": "k.txt"})
        assert HTTP.get(signed).text == "hidden"
        asked = [HTTP.get(signed, headers={"Host": host}) for host in FOREIGN_HOSTS if host]
        asked += [
            HTTP.request(method, f"{s3.endpoint_url}/segmind/k.txt") for method in ("GET", "PUT", "DELETE", "POST")
        ]
        assert [(each.status_code >= 400, "hidden" in each.text) for each in asked] == [(True, False)] * len(asked)
        assert (tmp_path / "store" / "segmind" / "k.txt").read_text() == "hidden"


def test_only_this_machine_counts_as_loopback() -> None:
    assert all(on_loopback(f"http://{host}/a") for host in ("127.0.0.1", "127.9.9.9", "[::1]", "localhost"))
    others = ("", "0.0.0.0", "8.8.8.8", "localhost.", "example.com")
    assert not any(on_loopback(f"http://{host}/a") for host in others)
    with pytest.raises(FetchError, match="could not be fetched"):
        fetch("http://127.0.0.1:1/nobody-listens")


def test_credits_run_out(tmp_path: Path, source: str) -> None:
    with Sandbox(tmp_path, latency=0.05, credits="0.12", s3=False) as sandbox:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda seed: ask(sandbox, source, seed=seed), range(200, 206)))
        assert sorted(each.status_code for each in answers) == [200, 200, 406, 406, 406, 406]
        last = ask(sandbox, source)
        assert last.json()["error"] == "Insufficient credits: balance 0.02, need 0.05"
        told = HTTP.get(f"{sandbox.base_url}/get-user-credits", headers={"x-api-key": sandbox.api_key})
        assert told.json() == {"credits": 0.02, "free-credits": 0.0}


@pytest.mark.parametrize(("window", "words"), [(60.0, "2 a minute"), (300.0, "2 in 300 s")])
def test_a_rate_limit_tells_when_it_ends(tmp_path: Path, source: str, window: float, words: str) -> None:
    with Sandbox(tmp_path, latency=0, requests_per_minute=2, rate_window=window, s3=False) as sandbox:
        assert [ask(sandbox, source).status_code for _ in range(2)] == [200, 200]
        answer = ask(sandbox, source)
        assert answer.status_code == 429
        ends = datetime.fromisoformat(answer.headers["x-rate-limit-reset-at-utc"])
        assert window - 20 < (ends - datetime.now(UTC)).total_seconds() <= window
        assert words in answer.json()["error"]
        sandbox._api._account._accepted[0] -= window
        assert ask(sandbox, source).status_code == 200


def test_a_sketch_is_a_picture_of_its_request_billed_and_counted(tmp_path: Path, source: str) -> None:
    with Sandbox(tmp_path, latency=0, sketch=True, s3=False) as sandbox:
        Source.asked.clear()
        first, again, other = (
            ask(sandbox, source),
            ask(sandbox, f"{source}/signed-anew"),
            ask(sandbox, source, seed=4712),
        )
        for answer in (first, again, other):
            with Image.open(io.BytesIO(answer.content)) as image:
                image.load()
                assert (image.format, image.size) == ("JPEG", (640, 1024))
        assert first.content == again.content != other.content
        assert len(Source.asked) == 3
        assert ask(sandbox, source, image_file=f"{source}/text").status_code == 400
        assert (sandbox.ledger.billed, sandbox.ledger.billed_usd) == (3, Decimal("0.15"))
        assert len({each.image_sha256 for each in sandbox.ledger.requests if each.billed}) == 1


def test_many_at_once_do_not_wait_for_each_other(tmp_path: Path, source: str) -> None:
    with Sandbox(tmp_path, latency=1.0, s3=False) as sandbox, ThreadPoolExecutor(16) as pool:
        started = time.monotonic()
        answers = list(pool.map(lambda seed: ask(sandbox, source, seed=seed), range(200, 216)))
        took = time.monotonic() - started
    assert {each.status_code for each in answers} == {200}
    assert 1.0 <= took < 16.0, "one after the other they take sixteen seconds, on any machine"


# The script


@pytest.mark.parametrize("status", [400, 403, 406, 410, 422, 429, 500, 502, 504, 599])
def test_a_scripted_error_is_played_once_and_not_billed(sandbox: Sandbox, source: str, status: int) -> None:
    sandbox.play(Answer(status=status))
    answer = ask(sandbox, source)
    assert answer.status_code == status
    assert answer.json()["error"]
    assert sandbox.ledger.billed == 0
    assert ask(sandbox, source).status_code == 200


def test_a_scripted_504_can_be_billed_nevertheless(sandbox: Sandbox, source: str) -> None:
    sandbox.play(Answer(status=504, billed=True), Answer(billed=False))
    assert ask(sandbox, source).status_code == 504
    assert ask(sandbox, source).status_code == 200
    assert [each.billed for each in sandbox.ledger.requests] == [True, False]
    assert sandbox.ledger.billed_usd == Decimal("0.05")


def test_a_scripted_answer_says_when_to_come_back(sandbox: Sandbox, source: str) -> None:
    sandbox.play(Answer(status=429, reset_in=5, retry_after="7", headers={"x-cost": '["0.05"]'}, body="slow down"))
    answer = ask(sandbox, source)
    ends = answer.headers["x-rate-limit-reset-at-utc"]
    assert re.search(r"\.\d{6}\+00:00$", ends)
    assert 3 < (datetime.fromisoformat(ends) - datetime.now(UTC)).total_seconds() <= 5
    assert (answer.headers["retry-after"], answer.headers["x-cost"], answer.text) == ("7", '["0.05"]', "slow down")


def test_answers_go_to_the_prompts_that_they_are_for(sandbox: Sandbox, source: str) -> None:
    sandbox.play(Answer(status=500), prompt="sunset")
    sandbox.play(Answer(status=502))
    assert ask(sandbox, source, prompt="a mug in snow").status_code == 502
    assert ask(sandbox, source).status_code == 500
    assert Script().next_for("anything") is None


@pytest.mark.parametrize(
    ("kind", "content_type"),
    [("html", "text/html"), ("empty", "image/jpeg"), ("not_an_image", "image/jpeg"), ("unsafe", "application/json")],
)
def test_a_200_can_hold_no_picture_and_is_billed(sandbox: Sandbox, source: str, kind: Any, content_type: str) -> None:
    sandbox.play(Answer(kind=kind))
    answer = ask(sandbox, source)
    assert answer.status_code == 200
    assert answer.headers["content-type"].split(";")[0] == content_type
    with pytest.raises(OSError):  # noqa: PT011
        Image.open(io.BytesIO(answer.content))
    assert sandbox.ledger.billed == 1
    if kind == "unsafe":
        assert answer.json()["data"] == [{"url": None, "is_image_safe": False}]


def test_the_bytes_of_a_body_can_be_given(sandbox: Sandbox, source: str) -> None:
    sandbox.script.play(Answer.model_validate({"status": 200, "kind": "not_an_image", "body_base64": "AAECAw=="}))
    assert ask(sandbox, source).content == b"\0\1\2\3"
    with pytest.raises(ValidationError, match="body"):
        Answer.model_validate({"body_base64": "AAECAw=="})


def test_a_picture_can_be_cut_in_the_middle_of_the_connection(
    sandbox: Sandbox, source: str, capfd: pytest.CaptureFixture[str]
) -> None:
    sandbox.play(Answer(kind="half_body"))
    with pytest.raises(httpx.RemoteProtocolError):
        ask(sandbox, source)
    assert sandbox.ledger.billed == 1
    assert capfd.readouterr() == ("", "")


def test_a_picture_can_be_cut_in_a_whole_answer(sandbox: Sandbox, source: str) -> None:
    sandbox.play(Answer(kind="truncated_image"))
    answer = ask(sandbox, source)
    with Image.open(io.BytesIO(answer.content)) as image, pytest.raises(OSError, match="truncated"):
        image.load()


def test_json_answers_hold_the_picture_or_a_link_to_it(sandbox: Sandbox, source: str) -> None:
    picture = ask(sandbox, source).content
    kinds = ("json_base64", "json_data_uri", "json_url", "json_images_url", "json_data_url")
    sandbox.play(*(Answer(kind=kind) for kind in kinds))
    bare, uri, one, images, data = (ask(sandbox, source).json() for _ in kinds)
    assert base64.b64decode(bare["image"]) == picture
    assert uri["image"].startswith("data:image/jpeg;base64,")
    assert base64.b64decode(uri["image"].partition(",")[2]) == picture
    for link in (one["image_url"], images["images"][0]["url"], data["data"][0]["url"]):
        assert link.startswith(f"{sandbox.base_url}/results/")
        assert HTTP.get(link).content == picture
        assert HTTP.get(link, headers={"x-api-key": sandbox.api_key}).status_code == 400
    assert HTTP.get(f"{sandbox.base_url}/results/none.jpg").status_code == 404


def test_old_results_are_dropped(sandbox: Sandbox, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_segmind.sandbox.server._KEPT_RESULTS", 1)
    sandbox.play(Answer(kind="json_url"), Answer(kind="json_url"))
    links = [ask(sandbox, source).json()["image_url"] for _ in range(2)]
    assert [HTTP.get(link).status_code for link in links] == [404, 200]


def test_a_content_type_can_lie(sandbox: Sandbox, source: str) -> None:
    sandbox.play(Answer(content_type="image/png"))
    answer = ask(sandbox, source)
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\xff\xd8")


def test_an_answer_that_comes_too_late_is_billed_all_the_same(sandbox: Sandbox, source: str) -> None:
    sandbox.play(Answer(delay=0.8))
    headers = {"x-api-key": sandbox.api_key}
    body = {"image_file": f"{source}/mug.jpg", "prompt": "late", "resolution": SMALL}
    with pytest.raises(httpx.ReadTimeout):
        HTTP.post(f"{sandbox.base_url}/{MODEL}", json=body, headers=headers, timeout=0.6)
    assert sandbox.ledger.billed == 1


def test_an_answer_cannot_contradict_itself() -> None:
    assert Answer(status=502).kind == "error"
    assert Answer(status=502, kind="html").kind == "html"
    with pytest.raises(ValidationError, match="body"):
        Answer(body="x")
    with pytest.raises(ValidationError):
        Answer.model_validate("x")


def test_another_process_can_script_read_and_reset(sandbox: Sandbox, source: str) -> None:
    control = f"{sandbox.base_url.removesuffix('/v1')}/sandbox"
    order = {"answers": [{"status": 429, "reset_in": 1}, {"status": 500}], "prompt": "sunset"}
    assert HTTP.post(f"{control}/script", json=order).json() == {"queued": 2}
    assert ask(sandbox, source).status_code == 429
    ledger = HTTP.get(f"{control}/ledger").json()
    assert ledger == json.loads(json.dumps(sandbox.ledger.as_dict()))
    assert (ledger["billed"], ledger["billed_usd"], ledger["requests"][0]["status"]) == (0, "0.00", 429)
    assert HTTP.post(f"{control}/script", json={"answers": [{"kind": "nonsense"}]}).status_code == 422
    assert HTTP.post(f"{control}/reset").status_code == 200
    assert sandbox.ledger.requests == ()
    assert ask(sandbox, source).status_code == 200


# The whole


def test_the_sandbox_serves_the_api_and_s3(tmp_path: Path, photo: bytes) -> None:
    with Sandbox(tmp_path, latency=0) as sandbox:
        environment = sandbox.environment()
        assert re.fullmatch(r"SG_[0-9a-f]{16}", environment["SEGMIND_API_KEY"])
        assert environment["SEGMIND_BASE_URL"] == sandbox.base_url
        assert environment["PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO"] == "s3://segmind/uploads"
        assert environment["PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE"] == "s3://segmind/archive"
        s3 = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name=environment["AWS_DEFAULT_REGION"],
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )
        s3.put_object(Bucket="segmind", Key="uploads/mug.jpg", Body=photo, ContentType="image/jpeg")
        assert (tmp_path / "s3/segmind/uploads/mug.jpg").read_bytes() == photo
        url = s3.generate_presigned_url("get_object", Params={"Bucket": "segmind", "Key": "uploads/mug.jpg"})
        answer = ask(sandbox, "", image_file=url)
        assert answer.status_code == 200, answer.text
        tampered = ask(sandbox, "", image_file=url.replace("X-Amz-Expires=3600", "X-Amz-Expires=3601"))
        assert tampered.status_code == 400
        assert "HTTP 403" in tampered.json()["error"]
        stranger = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key="wrong",
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 1}),
        )
        with pytest.raises(ClientError):
            stranger.get_object(Bucket="segmind", Key="uploads/mug.jpg")
        assert sandbox.s3 is not None
        pid = sandbox.s3.pid
        assert pid is not None
    assert sandbox.s3.pid is None
    with pytest.raises(httpx.ConnectError):
        HTTP.get(sandbox.base_url)
    with pytest.raises(httpx.ConnectError):
        HTTP.get(environment["AWS_ENDPOINT_URL_S3"])


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_a_killed_parent_leaves_no_s3_server(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom prefect_segmind.sandbox.s3 import S3Server\n"
        "s = S3Server(pathlib.Path(sys.argv[1])); s.start(); print(s.pid, s.endpoint_url, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    _, url = parent.stdout.readline().split()
    assert HTTP.get(url).status_code == 400  # not signed
    parent.kill()
    parent.communicate()
    until(lambda: not listens(httpx.URL(url).port or 80), 10)
    with pytest.raises(httpx.ConnectError):
        HTTP.get(url)


def test_an_s3_server_may_be_started_from_any_thread_and_stopped_twice(tmp_path: Path) -> None:
    server = S3Server(tmp_path / "new", buckets=["one"])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.start).result()
    try:
        assert HTTP.get(server.endpoint_url).status_code == 400  # not signed
    finally:
        server.stop()
    server.stop()


def test_a_server_that_does_not_go_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "_STOP_SECONDS", 0.05)
    with S3Server(tmp_path) as server:
        process = server._process
        assert process is not None
        monkeypatch.setattr(process, "terminate", lambda: None)
    assert process.returncode not in (None, 0)


def test_without_rclone_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(rclone_binary()).name.startswith("rclone")
    monkeypatch.setattr("prefect_segmind.sandbox.s3.shutil.which", lambda *_, **__: None)
    with pytest.raises(ConfigurationError, match=r"prefect-segmind\[sandbox\]"), Sandbox(tmp_path):
        pass


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=str(port)), Sandbox(tmp_path, port=port, s3=False):
            pass
        with pytest.raises(ConfigurationError, match=str(port)), S3Server(tmp_path, port=port):
            pass


def test_an_api_that_does_not_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    with pytest.raises(ConfigurationError, match="did not start"), Sandbox(tmp_path, s3=False):
        pass
