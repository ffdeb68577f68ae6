"""Promises of `prefect_segmind.api.client`, kept over real HTTP on loopback: what comes of whatever the API answers."""

from __future__ import annotations

import base64
import errno
import gzip
import json
import os
import pickle
import random
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import certifi
import httpx
import pytest
from PIL import Image

from prefect_segmind import errors
from prefect_segmind.api import client as room
from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.origin import on_loopback
from prefect_segmind.api.picture import PaidPicture
from prefect_segmind.api.request import ImageToImageRequest
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.credentials import load_credentials
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.sandbox.script import Kind
from prefect_segmind.services import Services
from tests.support.waiting import until
from tests.support.walk import up_to_upload
from tests.support.wire import Wire, http, http_json

KEY = "SG_0123456789abcdef"
ODD_KEY = "a-key-of-another-form-0123456789"
REQUEST = ImageToImageRequest(image_file="https://example.com/mug.jpg", prompt="a red mug", seed=4711)


def encoded(format: str, side: int = 40) -> bytes:
    """A picture that does not compress, so that half of it is half a picture."""
    file = BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(7).randbytes(3 * side * side)).save(file, format)
    return file.getvalue()


PNG, JPEG = encoded("PNG"), encoded("JPEG")
TEXT = base64.b64encode(PNG).decode()


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "picture.part"


FORKS = """
import os, sys
from pathlib import Path
from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.request import ImageToImageRequest
def ended() -> str:
    request = ImageToImageRequest(image_file="https://images.example/a.jpg", prompt="x")
    try:
        with SegmindClient("SG_0123456789abcdef", sys.argv[1], total_timeout=0.3) as client:
            client.generate(request, Path(sys.argv[2]))
    except Exception as error:
        return type(error).__name__
ended()
if os.fork():
    os.wait()
else:
    os.write(1, ended().encode())
    os._exit(0)
"""


def ask(url: str, part: Path, *, key: str = KEY, **options: Any) -> PaidPicture:
    with SegmindClient(key, f"{url}/v1", **options) as client:
        return client.generate(REQUEST, part)


def failure(part: Path, *answers: bytes, key: str = KEY, **options: Any) -> errors.ApiError:
    """What a request ends with on a server that answers so; the key is in no message."""
    with Wire(*answers) as server, pytest.raises(errors.ApiError) as caught:
        ask(server.url, part, key=key, **options)
    assert key not in str(caught.value)
    return caught.value


def set_when_arrived(part: Path, size: int, arrived: threading.Event) -> None:
    """Sets an event once a file has as many bytes."""
    until(lambda: part.exists() and part.stat().st_size >= size, every=0.01)
    arrived.set()


class TestTheRequest:
    def test_it_is_what_the_provider_documents(self, part: Path) -> None:
        with Wire(http(PNG)) as server:
            ask(server.url, part)
        head, _, body = server.requests[0].partition("\r\n\r\n")
        assert head.startswith("POST /v1/ideogram-2a-img-2-img HTTP/1.1\r\n")
        assert f"x-api-key: {KEY}" in head
        assert "content-type: application/json" in head.lower()
        assert json.loads(body) == REQUEST.body()

    def test_slashes_and_spaces_around_the_address_do_no_harm(self, part: Path) -> None:
        with Wire(http(PNG)) as server, SegmindClient(f" {KEY}\n", f" {server.url}/v1// ") as client:
            client.generate(REQUEST, part)
        assert server.requests[0].startswith("POST /v1/ideogram-2a-img-2-img ")
        assert f"x-api-key: {KEY}\r\n" in server.requests[0]

    def test_what_is_meant_for_this_machine_goes_through_no_proxy(
        self, part: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        with Wire(http(PNG)) as server:
            assert ask(server.url, part).width == 40

    def test_clients_share_their_certificates_until_the_environment_names_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def contexts() -> list[ssl.SSLContext]:
            made: list[ssl.SSLContext] = []
            monkeypatch.setattr(httpx, "HTTPTransport", lambda **options: made.append(options["verify"]))
            for url in ("https://api.example/v1", "https://api.example/v1", "http://127.0.0.1:9/v1"):
                SegmindClient(KEY, url)
            return made

        one, same, on_loopback = contexts()
        monkeypatch.setenv("SSL_CERT_FILE", certifi.where())
        other, _, still_on_loopback = contexts()
        assert one is same is not other
        assert on_loopback is still_on_loopback

    @pytest.mark.parametrize("key", ["", "  ", "SG_01\n23", "SG_ 0123", "SG_ключ", "SG_\x7f"])
    def test_a_key_that_is_none_is_refused(self, key: str) -> None:
        with pytest.raises(errors.ConfigurationError, match="api_key") as caught:
            SegmindClient(key)
        assert key not in str(caught.value) or not key.strip()

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "api.segmind.com/v1",
            "ftp://127.0.0.1/v1",
            "https:///v1",
            "http://127.0.0.1:port/v1",
            "http://[::1",
            "https://xn--a/v1",
            "mailto:x",
            "http://127.0.0.1:99999/v1",
            "https://me:secret@127.0.0.1/v1",
            "https://127.0.0.1/v1?x=1",
        ],
    )
    def test_an_address_that_is_none_is_refused_before_anything_is_sent(self, url: str) -> None:
        with pytest.raises(errors.ConfigurationError, match="SEGMIND_BASE_URL") as caught:
            SegmindClient(KEY, url)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("host", ["a" * 70, "a..b", ".a", "%31"])
    def test_a_name_that_only_the_system_finds_unusable_costs_nothing(self, host: str, part: Path) -> None:
        with pytest.raises(errors.ApiUnreachableError, match="cannot be reached") as caught:
            ask(f"https://{host}", part)
        assert not caught.value.possibly_billed

    @pytest.mark.parametrize("url", ["http://api.segmind.com/v1", "http://10.0.0.8/v1", "http://127.0.0.1.example/v1"])
    def test_the_key_is_never_sent_in_the_clear_beyond_this_machine(self, url: str) -> None:
        with pytest.raises(errors.ConfigurationError, match="only https"):
            SegmindClient(KEY, url)

    def test_only_this_machine_is_on_loopback(self) -> None:
        assert all(map(on_loopback, ("http://localhost:1", "http://127.9.9.9", "https://[::1]/v1")))
        assert not any(map(on_loopback, ("https://localhost.example", "https://10.0.0.8", "http://[::1", "", "https:")))


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "kind", "possibly_billed"),
        [
            (400, errors.BadRequestError, False),
            (401, errors.InvalidKeyError, False),
            (403, errors.PermissionDeniedError, False),
            (404, errors.EndpointNotFoundError, False),
            (405, errors.MethodNotAllowedError, False),
            (410, errors.ModelRetiredError, False),
            (422, errors.UnprocessableError, False),
            (429, errors.RateLimitError, False),
            (500, errors.InternalServerError, False),
            (502, errors.BadGatewayError, True),
            (503, errors.OverloadedError, False),
            (504, errors.GatewayTimeoutError, True),
            (529, errors.OverloadedError, False),
        ],
    )
    def test_every_status_has_its_class_and_the_providers_words(
        self, status: int, kind: type[errors.ApiError], possibly_billed: bool, part: Path
    ) -> None:
        error = failure(part, http_json({"error": "Quite so"}, f"{status} X", x_request_id="r-1"))
        assert type(error) is kind
        assert (error.status, error.request_id, error.possibly_billed) == (status, "r-1", possibly_billed)
        assert f"the API answered {status}: Quite so (" in str(error)
        assert not part.exists()

    @pytest.mark.parametrize(
        ("words", "kind"),
        [
            ("Insufficient credits: balance 0.01, need 0.05", errors.InsufficientCreditsError),
            ("Team spend limit reached", errors.InsufficientCreditsError),
            ("image_weight must be between 1 and 100", errors.ParameterRejectedError),
            ("Unsupported Content-Type", errors.ContentTypeRejectedError),
            ("No.", errors.NotAcceptableError),
        ],
    )
    def test_a_406_is_told_apart_by_its_words(self, words: str, kind: type[errors.ApiError], part: Path) -> None:
        assert type(failure(part, http_json({"message": words}, "406 Not Acceptable"))) is kind

    @pytest.mark.parametrize(
        "body", [b'{"detail": "so it is"}', b"<html><title>x</title><h1>so it</h1> is</html>", b"so  it\nis"]
    )
    def test_the_words_are_found_in_json_html_and_plain_text(self, body: bytes, part: Path) -> None:
        assert "the API answered 405: so it is (" in str(failure(part, http(body, "405 No")))

    def test_long_words_are_cut(self, part: Path) -> None:
        assert len(str(failure(part, http(b"x" * 200_000, "500 No")))) < 500

    def test_half_an_error_is_an_error_all_the_same(self, part: Path) -> None:
        error = failure(part, http(b'{"error": "no', "401 No", length=999))
        assert type(error) is errors.InvalidKeyError

    @pytest.mark.parametrize("key", [KEY, ODD_KEY])
    @pytest.mark.parametrize("status", ["401 No", "200 OK"])
    @pytest.mark.parametrize("before", ["the key ", "x" * 290 + " "])
    def test_a_server_that_repeats_the_key_does_not_bring_it_into_a_message(
        self, key: str, status: str, before: str, part: Path
    ) -> None:
        for text in (json.dumps({"error": f"{before}{key} is wrong"}), f"<p>{before}{key}</p>"):
            error = failure(part, http(text.encode(), status), key=key)
            assert key[:10] not in str(error), "nor half of it, where a long text is cut"

    def test_the_wait_that_a_server_asks_for_is_told(self, part: Path) -> None:
        until = datetime.now(UTC) + timedelta(seconds=30)
        for answer in (
            http(b"", "429 Slow Down", Retry_After="30"),
            http(b"", "429 Slow Down", x_rate_limit_reset_at_utc=json.dumps([until.isoformat()])),
        ):
            assert failure(part, answer).retry_after == pytest.approx(30, abs=3)
        assert failure(part, http(b"", "429 Slow Down")).retry_after is None

    def test_a_redirect_is_not_followed_with_the_key(self, part: Path) -> None:
        with Wire(http(PNG)) as other:
            for status in ("302 Found", "307 Temporary Redirect", "308 Permanent Redirect"):
                assert failure(part, http(b"", status, Location=f"{other.url}/v1")).status == int(status[:3])
        assert not other.requests


class TestPictures:
    @pytest.mark.parametrize(
        "answer",
        [
            http(PNG, Content_Type="image/png"),
            http(PNG, Content_Type="application/octet-stream"),
            http(PNG),
            http(gzip.compress(PNG), Content_Encoding="gzip"),
            http_json({"image": TEXT}),
            http_json({"image": f"data:image/png;base64,{TEXT}"}),
            http_json({"output": [TEXT]}),
            http_json({"images": [{"url": f"data:image/png;base64,{TEXT}"}]}),
            http_json({"data": [{"url": None, "is_image_safe": False}, {"url": TEXT, "is_image_safe": True}]}),
            http_json(TEXT),
            http(b"\xef\xbb\xbf\r\n " + json.dumps({"image": TEXT}).encode(), Content_Type="application/json"),
            http(json.dumps([{"url": TEXT}]).encode(), Content_Type="image/png"),
        ],
    )
    def test_every_form_of_a_200_ends_as_the_same_picture_on_disk(self, answer: bytes, part: Path) -> None:
        with Wire(answer) as server:
            picture = ask(server.url, part)
        assert part.read_bytes() == PNG
        assert (picture.content_type, picture.extension, picture.width, picture.height) == ("image/png", "png", 40, 40)
        assert picture.size_bytes == len(PNG)

    def test_every_form_that_the_sandbox_knows_ends_as_the_same_picture(self, sandbox: Sandbox, photo: Path) -> None:
        kinds: list[Kind] = ["image", "json_base64", "json_data_uri", "json_url", "json_images_url", "json_data_url"]
        kinds += ["json_b64_json"]
        sandbox.play(*(Answer(kind=kind) for kind in kinds))
        job, uploaded = up_to_upload(photo, resolution="RESOLUTION_640_1024")
        found = set()
        with load_credentials().get_client() as client:
            for kind in kinds:
                request = job.request(Services().uploads.address(uploaded.uri))
                picture = client.generate(request, photo.with_name(kind))
                found.add((picture.sha256, picture.seed, picture.cost_usd, picture.cost_source, picture.notices))
        assert found == {(picture.sha256, job.seed, Decimal("0.05"), "x-cost", ())}
        assert sandbox.ledger.billed == len(kinds)

    def test_what_the_file_held_before_is_gone(self, part: Path) -> None:
        part.write_bytes(bytes(100_000))
        with Wire(http(PNG)) as server:
            ask(server.url, part)
        assert part.read_bytes() == PNG

    def test_a_lying_content_type_is_corrected_and_told(self, part: Path) -> None:
        with Wire(http(JPEG, Content_Type="image/png; charset=binary")) as server:
            picture = ask(server.url, part)
        assert (picture.content_type, picture.extension) == ("image/jpeg", "jpg")
        assert picture.notices == ("the answer claims image/png; the picture is image/jpeg",)

    @pytest.mark.parametrize(
        ("header", "cost", "source"),
        [
            ("0.04", "0.04", "x-cost"),
            ('["0.0625"]', "0.0625", "x-cost"),
            ("[0.07]", "0.07", "x-cost"),
            ("0", "0", "x-cost"),
            ("gratis", "0.09", "list price"),
            ("-1", "0.09", "list price"),
            ("NaN", "0.09", "list price"),
            ("[]", "0.09", "list price"),
            ("", "0.09", "list price"),
        ],
    )
    def test_the_cost_is_the_answers_where_it_names_a_sensible_one(
        self, header: str, cost: str, source: str, part: Path
    ) -> None:
        with Wire(http(PNG, x_cost=header, x_request_id='["r-7"]')) as server:
            picture = ask(server.url, part, list_price_usd=Decimal("0.09"))
        assert (picture.cost_usd, picture.cost_source, picture.request_id) == (Decimal(cost), source, "r-7")

    @pytest.mark.parametrize(
        ("header", "seed", "noticed"),
        [
            ("4711", 4711, False),
            ('["5000"]', 5000, True),
            ("²", 4711, False),
            ("9" * 5000, 4711, False),
            ("", 4711, False),
        ],
    )
    def test_another_seed_than_the_one_asked_for_is_told(
        self, header: str, seed: int, noticed: bool, part: Path
    ) -> None:
        with Wire(http(PNG, x_seed_value=header)) as server:
            picture = ask(server.url, part)
        assert picture.seed == seed
        expected = ("the provider reports seed 5000 where 4711 was asked for",) if noticed else ()
        assert picture.notices == expected


class TestAnswersWithoutAPicture:
    @pytest.mark.parametrize(
        ("answer", "kind", "words"),
        [
            (http(b"<html><h1>Welcome</h1></html>", Content_Type="text/html"), errors.NotAnImageError, "Welcome"),
            (http(), errors.NotAnImageError, "the body is empty"),
            (http(b"no picture", Content_Type="image/png"), errors.NotAnImageError, "no picture"),
            (http(b"\x00\x01\x02"), errors.NotAnImageError, "without a picture: the file is"),
            (http(b'{"image": '), errors.NotAnImageError, "image"),
            (http_json({"status": "queued"}), errors.NotAnImageError, "queued"),
            (http_json({"image": "not base64!"}), errors.NotAnImageError, "neither a URL nor base64"),
            (http_json({"image": "bm8gcGljdHVyZQ=="}), errors.NotAnImageError, "no picture"),
            (http(b"no gzip", Content_Encoding="gzip"), errors.NotAnImageError, "no gzip"),
            (http(gzip.compress(PNG)[:-9], Content_Encoding="gzip"), errors.NotAnImageError, "decompressed"),
            (
                http_json({"data": [{"url": None, "is_image_safe": False}]}),
                errors.UnsafeImageError,
                "the picture is not safe",
            ),
        ],
    )
    def test_they_have_a_class_and_count_as_paid(
        self, answer: bytes, kind: type[errors.ApiError], words: str, part: Path
    ) -> None:
        error = failure(part, answer, list_price_usd=Decimal("0.09"))
        assert type(error) is kind
        assert (error.status, error.possibly_billed) == (200, False)
        assert error.answered is not None
        assert (error.answered.cost_usd, error.answered.cost_source) == (Decimal("0.09"), "list price")
        assert words in str(error)
        assert part.read_bytes() == answer.partition(b"\r\n\r\n")[2], "what was paid for is there as it came"

    @pytest.mark.parametrize("body", [b"<html>", b'{"data": []}', b'{"image": "bm8gcGljdHVyZQ=="}', b""])
    def test_what_they_have_cost_is_told_where_the_answer_names_it(self, body: bytes, part: Path) -> None:
        error = failure(part, http(body, x_cost='["0.0625"]', x_request_id="r-9", x_seed_value="4711"))
        assert error.answered is not None
        told = error.answered.model_dump(exclude={"at", "content_type"})
        assert told == {"cost_usd": Decimal("0.0625"), "cost_source": "x-cost", "seed": 4711, "request_id": "r-9"}
        assert pickle.loads(pickle.dumps(error)).answered == error.answered

    @pytest.mark.parametrize(
        ("content_type", "body"),
        [
            ("image/jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100)),
            ("image/jxl", b"\xff\x0a" + bytes(range(256))),
            ("video/mp4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2\0\0\0\x08mdat"),
            ("image/svg+xml", b'<svg xmlns="http://www.w3.org/2000/svg"><circle r="9"/></svg>'),
            ("application/x-unheard-of", b"\1\2\3\4" * 100),
            ("image/jxl", gzip.compress(b"\xff\x0a" + bytes(range(256)))),
        ],
    )
    def test_what_this_version_cannot_read_is_kept_as_it_came(
        self, content_type: str, body: bytes, part: Path, tmp_path: Path
    ) -> None:
        outbox = Outbox(tmp_path / "outbox", 0)
        with Wire(http(body, Content_Type=content_type)) as server:
            with pytest.raises(errors.NotAnImageError) as caught, outbox.receive("ab" * 32, "one") as received:
                ask(server.url, received)
            assert caught.value.answered is not None
            kept = outbox.keep_answer(received, caught.value.answered)
        assert kept is not None
        assert kept.read_bytes() == body
        assert caught.value.answered.content_type == content_type
        assert not caught.value.possibly_billed

    @pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "x\x80"])
    def test_a_coding_that_is_not_supported_is_kept_as_it_came(self, coding: str, part: Path) -> None:
        body = gzip.compress(gzip.compress(PNG)) if coding == "gzip, gzip" else b"\x1b\xff\xff" + PNG
        error = failure(part, http(body, Content_Encoding=coding))
        assert type(error) is errors.NotAnImageError
        assert error.answered is not None
        assert part.read_bytes() == body

    @pytest.mark.parametrize(("layers", "status"), [(1, "200 OK"), (2, "200 OK"), (1, "500 No")])
    def test_a_few_bytes_do_not_become_gigabytes(self, layers: int, status: str, part: Path) -> None:
        bomb = b"\0" * 300_000_000
        for _ in range(layers):
            bomb = gzip.compress(bomb)
        with Wire(http(bomb, status, Content_Encoding=", ".join(["gzip"] * layers))) as server:
            code = f"""
import resource, sys
from pathlib import Path
from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.request import ImageToImageRequest
from prefect_segmind.errors import ApiError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with SegmindClient({KEY!r}, {server.url!r}) as client:
    for call in (
        lambda: client.generate(ImageToImageRequest(image_file="x", prompt="x"), Path(sys.argv[1])),
        client.credits,
    ):
        try:
            call()
        except ApiError as error:
            print(type(error).__name__, end=" ")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000)
"""
            command = [sys.executable, "-c", code, str(part)]
            said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        *_, megabytes = said.split()
        assert int(megabytes) < 250, said

    def test_an_answer_that_only_says_it_is_compressed_is_read_as_it_is(self, part: Path) -> None:
        with Wire(http(PNG, Content_Encoding="gzip")) as server:
            assert ask(server.url, part).width == 40
        assert part.read_bytes() == PNG

    def test_their_request_id_is_told_for_a_talk_with_the_provider(self, part: Path) -> None:
        for body in (b"<html>", b'{"data": []}', PNG[: len(PNG) // 2]):
            assert failure(part, http(body, x_request_id="r-9")).request_id == "r-9"

    def test_a_picture_that_ends_early_in_a_whole_answer_is_cut(self, part: Path) -> None:
        error = failure(part, http(PNG[: len(PNG) // 2]))
        assert type(error) is errors.AnswerCutError
        assert (error.status, error.possibly_billed) == (200, True)
        assert part.read_bytes() == PNG[: len(PNG) // 2]

    @pytest.mark.skipif("AVIF" not in Image.SAVE, reason="this Pillow writes no AVIF")
    @pytest.mark.parametrize("form", ["bytes", "base64", "link"])
    def test_a_whole_picture_that_does_not_decode_is_not_called_cut(self, form: str, part: Path) -> None:
        whole = encoded("AVIF")
        start = whole.index(b"mdat") + 4
        odd = whole[:start] + random.Random(3).randbytes(len(whole) - start)
        with Wire(b"") as server:
            link = http_json({"url": f"{server.url}/a.avif"})
            coded = http_json({"image": base64.b64encode(odd).decode()})
            server.answers = {"bytes": [http(odd)], "base64": [coded], "link": [link, http(odd)]}[form]
            with pytest.raises(errors.NotAnImageError, match="the file is damaged") as caught:
                ask(server.url, part)
        assert not caught.value.possibly_billed
        if form == "link":
            assert part.with_suffix(".found").read_bytes() == odd, "the link may not live as long"

    def test_more_than_the_limit_is_not_read_to_its_end(self, part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(room, "ANSWER_LIMIT", 30_000)
        error = failure(part, http(PNG + bytes(5_000_000)))
        assert type(error) is errors.NotAnImageError
        assert "more than 30,000 bytes" in str(error)
        assert error.possibly_billed
        assert error.answered is None
        assert part.stat().st_size < 1_000_000


def pictures() -> dict[str, bytes]:
    """A picture of each format that an API sends, and such that has a lot behind its pixels."""
    found = {format: encoded(format) for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP")}
    file = BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "JPEG", progressive=True)
    found["progressive"] = file.getvalue()
    file = BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "WEBP", lossless=True, exif=b"Exif\0\0" + bytes(300))
    found["WEBP with EXIF"] = file.getvalue()
    return found


PICTURES = pictures()


class TestWhatHadArrived:
    """A connection that breaks costs a picture only if the picture was not there yet."""

    @pytest.mark.parametrize("format", PICTURES)
    @pytest.mark.parametrize(
        "how",
        ["a length that is one too high", "the last chunk is missing", "silence", "a reset", "no length, silence"],
    )
    def test_a_whole_picture_is_used_and_it_is_told(self, how: str, format: str, part: Path) -> None:
        picture = PICTURES[format]
        too_long = http(picture, length=len(picture) + 1, x_cost="0.04")
        chunk = f"{len(picture):x}\r\n".encode() + picture + b"\r\n"
        answer = {
            "the last chunk is missing": b"HTTP/1.1 200 OK\r\nx-cost: 0.04\r\nTransfer-Encoding: chunked\r\n\r\n"
            + chunk,
            "no length, silence": b"HTTP/1.1 200 OK\r\nx-cost: 0.04\r\n\r\n" + picture,
        }.get(how, too_long)
        with Wire(answer, silent="silence" in how, reset=how == "a reset") as server:
            if how == "a reset":
                threading.Thread(target=set_when_arrived, args=(part, len(picture), server.read)).start()
            paid = ask(server.url, part, read_timeout=0.5)
        assert part.read_bytes() == picture
        assert (paid.width, paid.cost_usd) == (40, Decimal("0.04"))
        assert any("the connection broke when the answer had arrived whole" in each for each in paid.notices)

    @pytest.mark.parametrize("form", ["base64", "link", "packed"])
    def test_whole_json_is_used_too(self, form: str, part: Path) -> None:
        with Wire(b"") as server:
            value = {"output": f"{server.url}/a.png"} if form == "link" else {"image": TEXT}
            body = json.dumps(value).encode()
            body = gzip.compress(body) if form == "packed" else body
            server.answers = [http(body, length=len(body) + 1), http(PNG)]
            paid = ask(server.url, part)
        assert part.read_bytes() == PNG
        assert len(paid.notices) == 1

    def test_whole_json_without_a_picture_is_paid_and_kept(self, part: Path) -> None:
        body = json.dumps({"data": [{"url": None, "is_image_safe": False}]}).encode()
        error = failure(part, http(body, length=len(body) + 1))
        assert type(error) is errors.UnsafeImageError
        assert (error.possibly_billed, error.answered is None) == (False, False)
        assert part.read_bytes() == body

    @pytest.mark.parametrize("format", PICTURES)
    def test_a_picture_that_lacks_but_a_byte_is_cut(self, format: str, part: Path) -> None:
        for missing in (1, 2, 3, 9, len(PICTURES[format]) // 2):
            data = PICTURES[format][:-missing]
            error = failure(part, http(data, length=len(data) + missing))
            assert type(error) is errors.AnswerCutError, missing
            assert (error.possibly_billed, error.answered) == (True, None)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b'{"output": "https://cdn.example/a.pn',
            b'{"image": "' + TEXT.encode(),
            b"https://cdn.example/a.png",
            f"data:image/png;base64,{TEXT[:-4]}".encode(),
            gzip.compress(PNG)[:-20],
            b"<html>whole</html>",
            b"12",
        ],
    )
    def test_what_may_go_on_is_cut(self, body: bytes, part: Path) -> None:
        error = failure(part, http(body, length=len(body) + 1))
        assert type(error) is errors.AnswerCutError
        assert error.possibly_billed

    def test_what_cannot_be_read_to_see_whether_it_is_whole_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreadable(_: Path) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        outbox = Outbox(tmp_path / "outbox", 0)
        with Wire(http(PNG, length=len(PNG) + 1)) as server, monkeypatch.context() as disk:
            disk.setattr(Path, "read_bytes", unreadable)
            with (
                pytest.raises(errors.OutboxError, match=r"could not be read from .*Input/output error") as caught,
                outbox.receive("ab" * 32, "one") as received,
            ):
                ask(server.url, received)
        assert caught.value.possibly_billed
        found = outbox.find("ab" * 32, seed=100, list_price_usd=Decimal("0.05"), unfinished=True)
        assert found is not None
        assert found[0].read_bytes() == PNG

    def test_each_piece_is_on_the_disk_before_the_next_one_comes(self, part: Path) -> None:
        with Wire(http(PNG, length=len(PNG) + 1), silent=True) as server:
            asking = threading.Thread(target=ask, args=(server.url, part), kwargs={"read_timeout": 5.0})
            asking.start()
            arrived = threading.Event()
            set_when_arrived(part, len(PNG), arrived)
            assert arrived.is_set()
            assert part.read_bytes() == PNG, "while the server has not closed the connection yet"
            server.hang_up()
            asking.join()


class TestConnections:
    def test_half_a_body_may_have_been_billed(self, part: Path) -> None:
        error = failure(part, http(PNG[:2000], length=len(PNG), x_request_id="r-7"))
        assert type(error) is errors.AnswerCutError
        assert (error.status, error.possibly_billed, error.request_id) == (200, True, "r-7")
        assert "was cut" in str(error)

    def test_a_connection_lost_without_an_answer_may_have_been_billed(self, part: Path) -> None:
        error = failure(part, b"")
        assert type(error) is errors.AnswerCutError
        assert error.possibly_billed

    def test_an_answer_that_is_no_http_may_have_been_billed(self, part: Path) -> None:
        assert type(failure(part, b"SSH-2.0-OpenSSH\r\n\r\n")) is errors.AnswerCutError

    @pytest.mark.parametrize("begun", [b"", http(PNG[:2000], length=len(PNG))])
    def test_a_read_time_out_may_have_been_billed(self, begun: bytes, part: Path) -> None:
        with Wire(begun, silent=True) as server, pytest.raises(errors.AnswerCutError, match="took too long") as caught:
            ask(server.url, part, read_timeout=0.2)
        assert caught.value.possibly_billed

    @pytest.mark.parametrize(
        ("begun", "drip"),
        [
            (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
            (b"HTTP/1.1 200 OK\r\n", b"X: a\r\n"),
            (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
            (b"HTTP/1.1 200 OK\r\n\r\n", b"a"),
            (http(PNG[:2000], length=10**6), b"a"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"a"),
        ],
    )
    def test_an_answer_that_drips_ends_and_may_have_been_billed(self, begun: bytes, drip: bytes, part: Path) -> None:
        with Wire(begun, drip=drip) as server:
            with pytest.raises(errors.AnswerCutError, match=r"took too long: it was not over after 0\.5 s") as caught:
                ask(server.url, part, total_timeout=0.5)
            assert server.gone.wait(10), "and the connection with it"
        assert caught.value.possibly_billed

    def test_answers_that_drip_at_once_each_end_in_their_time_watched_by_one_thread(self, tmp_path: Path) -> None:
        times, ended = (0.9, 0.3, 0.6), list[float]()

        def wait(seconds: float) -> None:
            with Wire(b"HTTP/1.1 200 OK\r\nX: ", drip=b"a") as server:
                with pytest.raises(errors.AnswerCutError, match=rf"it was not over after {seconds} s"):
                    ask(server.url, tmp_path / f"{seconds}.part", total_timeout=seconds)
                ended.append(seconds)

        threads = [threading.Thread(target=wait, args=(each,)) for each in times]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(ended) == sorted(times)
        assert [each.name for each in threading.enumerate()].count("segmind-deadlines") == 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="cannot fork")
    def test_an_answer_that_drips_at_a_copy_of_the_process_ends_too(self, tmp_path: Path) -> None:
        with Wire(b"HTTP/1.1 200 OK\r\nX: ", drip=b"a") as server:
            command = [sys.executable, "-c", FORKS, f"{server.url}/v1", str(tmp_path / "a.part")]
            assert subprocess.run(command, timeout=60, check=True, stdout=subprocess.PIPE).stdout == b"AnswerCutError"

    @pytest.mark.parametrize("status", ["401 No", "502 Bad Gateway"])
    def test_an_error_that_drips_is_judged_by_its_status(self, status: str, part: Path) -> None:
        with Wire(http(b'{"error": "', status, length=10**6), drip=b"a") as server:
            with pytest.raises(errors.ApiError, match="the API answered") as caught:
                ask(server.url, part, total_timeout=0.5)
            assert server.gone.wait(10)
        assert caught.value.status == int(status[:3])
        assert caught.value.possibly_billed is (status == "502 Bad Gateway")

    def test_credits_that_drip_end_too(self) -> None:
        with Wire(http(b'{"credits": 1', length=10**6), drip=b"0") as server:
            with (
                SegmindClient(KEY, server.url, total_timeout=0.5) as client,
                pytest.raises(errors.AnswerCutError, match="took too long") as caught,
            ):
                client.credits()
            assert server.gone.wait(10)
        assert not caught.value.possibly_billed

    def test_tls_that_drips_ends_and_costs_nothing(self, part: Path) -> None:
        # A record of TLS whose length is never reached.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            over = threading.Event()

            def drip() -> None:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.sendall(b"\x16\x03\x03\x3f\xff")
                    while not over.wait(0.005):
                        connection.sendall(b"\x02")

            thread = threading.Thread(target=drip)
            thread.start()
            with pytest.raises(errors.ApiUnreachableError, match="cannot be reached") as caught:
                ask(f"https://127.0.0.1:{listener.getsockname()[1]}", part, total_timeout=0.5)
            over.set()
            thread.join()
        assert not caught.value.possibly_billed

    @pytest.mark.parametrize(
        ("begun", "drip"), [(b"", b""), (b"HTTP/1.1 200 OK\r\nX: ", b"a"), (b"nonsense\r\n\r\n", b"")]
    )
    def test_a_proxy_that_leads_nowhere_costs_nothing(
        self, begun: bytes, drip: bytes, part: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Wire(begun, silent=not drip, drip=drip) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            with pytest.raises(errors.ApiUnreachableError, match="cannot be reached") as caught:
                ask("https://api.invalid", part, read_timeout=0.5, total_timeout=1.0)
        assert proxy.requests[0].startswith("CONNECT api.invalid:443 ")
        assert not caught.value.possibly_billed

    def test_what_forbids_the_request_just_before_it_is_sent_is_raised_as_it_is(self, part: Path) -> None:
        for kind in (errors.PreconditionFailedError, KeyboardInterrupt, ValueError, OverflowError):

            def forbid(kind: type[BaseException] = kind) -> None:
                raise kind("not now")

            with (
                Wire(http(PNG)) as server,
                SegmindClient(KEY, f"{server.url}/v1") as client,
                pytest.raises(kind, match="not now"),
            ):
                client.generate(REQUEST, part, forbid)
            assert not any("POST" in each for each in server.requests)

    def test_it_is_asked_once_whether_to_send_when_the_connection_stands(self, part: Path) -> None:
        asked: list[int] = []
        with Wire(http(PNG)) as server, SegmindClient(KEY, f"{server.url}/v1") as client:
            client.generate(REQUEST, part, lambda: asked.append(len(server.requests)))
        assert asked == [0]
        with socket.create_server(("127.0.0.1", 0)) as gone:
            url = f"http://127.0.0.1:{gone.getsockname()[1]}"
        with SegmindClient(KEY, url) as client, pytest.raises(errors.ApiUnreachableError):
            client.generate(REQUEST, part, lambda: asked.append(1))
        assert asked == [0]

    def test_nobody_listening_costs_nothing(self, part: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            url = f"http://127.0.0.1:{gone.getsockname()[1]}"
        with pytest.raises(errors.ApiUnreachableError, match="cannot be reached") as caught:
            ask(url, part)
        assert (caught.value.possibly_billed, caught.value.status) == (False, None)

    def test_a_name_that_does_not_resolve_costs_nothing(self, part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        with pytest.raises(errors.ApiUnreachableError, match=r"api\.invalid cannot be reached") as caught:
            ask("https://api.invalid", part)
        assert not caught.value.possibly_billed

    def test_a_server_without_tls_costs_nothing(self, part: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]

            def speak_plainly() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65_536)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

            thread = threading.Thread(target=speak_plainly)
            thread.start()
            with pytest.raises(errors.ApiUnreachableError) as caught:
                ask(f"https://127.0.0.1:{port}", part)
            thread.join()
        assert not caught.value.possibly_billed


class TestLinks:
    @pytest.fixture
    def server(self) -> Iterator[Wire]:
        with Wire(b"") as server:
            yield server

    def test_a_link_is_followed_without_the_key(self, server: Wire, part: Path) -> None:
        server.answers = [http_json({"output": f"{server.url}/a.png?sig=1"}, x_cost="0.05"), http(PNG)]
        assert ask(server.url, part).cost_source == "x-cost"
        assert part.read_bytes() == PNG
        assert server.requests[1].startswith("GET /a.png?sig=1 ")
        assert "x-api-key" in server.requests[0].lower()
        assert "x-api-key" not in server.requests[1].lower()
        assert KEY not in server.requests[1]

    @pytest.mark.parametrize("bad", [b"", http(PNG[:2000], length=len(PNG)), http(b"", "503 Busy")])
    def test_a_download_that_failed_is_repeated_for_the_picture_is_paid(
        self, bad: bytes, server: Wire, part: Path
    ) -> None:
        server.answers = [http_json({"url": f"{server.url}/a.png"}), bad, bad, http(PNG)]
        ask(server.url, part)
        assert part.read_bytes() == PNG
        assert [each.split()[0] for each in server.requests] == ["POST", "GET", "GET", "GET"]

    def test_four_failures_are_enough(self, server: Wire, part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(room, "_LINK_WAITS", (0.0, 0.0, 0.0))
        server.answers = [http_json({"url": f"{server.url}/a.png?sig=secret"}, x_request_id="r-3"), b""]
        with pytest.raises(errors.ResultLinkError, match="could not be followed") as caught:
            ask(server.url, part)
        assert len(server.requests) == 5
        assert (caught.value.status, caught.value.possibly_billed, caught.value.request_id) == (200, False, "r-3")
        assert "secret" not in str(caught.value)
        assert json.loads(part.read_bytes()) == {"url": f"{server.url}/a.png?sig=secret"}, "the whole link stays"
        assert not part.with_suffix(".found").exists()

    @pytest.mark.parametrize(
        "link", ["http://10.0.0.8/a.png", "https://169.254.169.254/latest", "http://127.0.0.1:9/a.png", "http://[::1]/"]
    )
    def test_a_link_to_another_private_place_is_refused(self, link: str, server: Wire, part: Path) -> None:
        server.answers = [http_json({"image_url": link})]
        with pytest.raises(errors.ResultLinkError, match="only https and public addresses are allowed"):
            ask(server.url, part)
        assert len(server.requests) == 1

    def test_a_link_to_something_else_is_no_picture(self, server: Wire, part: Path) -> None:
        server.answers = [http_json({"image_url": f"{server.url}/a.png"}), http(b"<html>expired</html>")]
        with pytest.raises(errors.ResultLinkError, match="does not lead to a picture: 'expired'") as caught:
            ask(server.url, part)
        assert not caught.value.possibly_billed

    def test_a_linked_picture_that_was_cut_is_downloaded_again_and_not_paid_for_again(
        self, server: Wire, part: Path
    ) -> None:
        server.answers = [http_json({"image_url": f"{server.url}/a.png"}), http(PNG[: len(PNG) // 2]), http(PNG)]
        ask(server.url, part)
        assert part.read_bytes() == PNG
        assert [each.split()[0] for each in server.requests] == ["POST", "GET", "GET"]

    def test_a_linked_picture_that_had_arrived_whole_when_its_connection_broke_is_used(
        self, server: Wire, part: Path
    ) -> None:
        server.answers = [http_json({"image_url": f"{server.url}/a.png"}), http(PNG, length=len(PNG) + 1)]
        ask(server.url, part)
        assert part.read_bytes() == PNG
        assert [each.split()[0] for each in server.requests] == ["POST", "GET"]

    def test_a_linked_picture_has_a_limit_too(self, server: Wire, part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(room, "ANSWER_LIMIT", 1000)
        server.answers = [http_json({"image_url": f"{server.url}/a.png"}), http(PNG)]
        with pytest.raises(errors.ResultLinkError, match="larger than"):
            ask(server.url, part)


IN_A_SMALL_DISK = f"""
import resource, signal, sys
from pathlib import Path
from prefect_segmind.api.client import SegmindClient
from prefect_segmind.errors import OutboxError
from prefect_segmind.api.request import ImageToImageRequest
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    SegmindClient({KEY!r}, sys.argv[1]).generate(ImageToImageRequest(image_file="x", prompt="x"), Path(sys.argv[2]))
except OutboxError as error:
    print(error.status, error.possibly_billed, error)
"""


class TestDisks:
    @pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
    @pytest.mark.parametrize("form", ["bytes", "base64", "link"])
    def test_a_disk_that_is_full_when_the_answer_comes_is_told_as_such(self, form: str, part: Path) -> None:
        small = {"image": base64.b64encode(PNG).decode()}
        with Wire(b"") as server:
            link = http_json({"url": f"{server.url}/a.png"})
            server.answers = {"bytes": [http(PNG)], "base64": [http_json(small)], "link": [link, http(PNG)]}[form]
            command = [sys.executable, "-c", IN_A_SMALL_DISK, f"{server.url}/v1", str(part)]
            said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        # A link was read to its end, so it is known to be paid; the others were not.
        assert said.startswith(
            f"200 {form != 'link'} outbox: the answered picture could not be written to {part.parent}"
        )
        assert "File too large" in said

    def test_a_folder_that_is_gone_when_the_answer_comes_is_told_as_such(self, tmp_path: Path) -> None:
        with Wire(http(PNG)) as server, pytest.raises(errors.OutboxError, match="could not be written") as caught:
            ask(server.url, tmp_path / "gone" / "picture.part")
        assert caught.value.possibly_billed


class TestCredits:
    def test_free_ones_count_too(self, sandbox: Sandbox) -> None:
        with (
            Wire(http_json({"credits": 1.2, "free-credits": 0.05})) as server,
            SegmindClient(KEY, server.url) as client,
        ):
            assert client.credits() == Decimal("1.25")
        assert server.requests[0].startswith("GET /get-user-credits ")
        with load_credentials().get_client() as client:
            assert client.credits() == Decimal(1000)

    def test_a_wrong_key_is_told(self, sandbox: Sandbox) -> None:
        with SegmindClient(KEY, sandbox.base_url) as client, pytest.raises(errors.InvalidKeyError, match="API key"):
            client.credits()

    @pytest.mark.parametrize(
        "body",
        [b"<html>hello</html>", b"", b"[]", b'"x"', b"null", b'{"credits": "many"}', b'{"credits": NaN}', b"\xff"],
    )
    def test_an_answer_that_tells_nothing_is_an_error(self, body: bytes) -> None:
        with (
            Wire(http(body)) as server,
            SegmindClient(KEY, server.url) as client,
            pytest.raises(errors.ApiUnreachableError, match="without a credit balance") as caught,
        ):
            client.credits()
        assert not caught.value.possibly_billed

    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (b"", errors.AnswerCutError),
            (http(b'{"credits"', length=99), errors.AnswerCutError),
            (http(b"no gzip", Content_Encoding="gzip"), errors.ApiUnreachableError),
            (http_json({"error": "busy"}, "503 Busy"), errors.OverloadedError),
        ],
    )
    def test_whatever_goes_wrong_is_never_billed(self, answer: bytes, kind: type[errors.ApiError]) -> None:
        with Wire(answer) as server, SegmindClient(KEY, server.url) as client, pytest.raises(kind) as caught:
            client.credits()
        assert not caught.value.possibly_billed
        assert "billed" not in str(caught.value)
