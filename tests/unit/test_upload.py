"""Uploads: the provider finds the right image, at an address that stands nowhere."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import pillow_heif
import pytest
from PIL import Image

from prefect_segmind.errors import ConfigurationError, SourceImageError, StoreCredentialsError
from prefect_segmind.jobs.job import parse_job
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.upload import UploadedImage, Uploads
from prefect_segmind.pipeline.validate import ValidatedJob, validate
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services
from prefect_segmind.settings import load_settings
from tests.support.walk import generate, up_to_upload
from tests.support.wire import Wire, http


def stored(uri: str) -> tuple[bytes, str]:
    """What lies at an address, and its content type."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    found = Services().s3.get_object(Bucket=bucket, Key=key)
    return found["Body"].read(), found["ContentType"]


def put(data: bytes, key: str) -> str:
    Services().s3.put_object(Bucket="segmind", Key=key, Body=data)
    return f"s3://segmind/{key}"


@pytest.fixture
def puts(sandbox: Sandbox) -> list[str]:
    """The key of each object that is written from here on."""
    written: list[str] = []
    events = Services().s3.meta.events
    events.register("before-parameter-build.s3.PutObject", lambda params, **_: written.append(params["Key"]))
    return written


@pytest.fixture(params=["bmp", "heic"])
def unaccepted(photo: Path, request: pytest.FixtureRequest) -> Path:
    """A photo in a format that the API does not take."""
    path = photo.with_suffix(f".{request.param}")
    with Image.open(photo) as image:
        if request.param == "heic":
            pillow_heif.from_pillow(image).save(path)
        else:
            image.save(path)
    return path


def no_s3() -> None:
    raise AssertionError("S3 was asked")


HERE = SourceReader(s3=no_s3, allow_loopback=True)  # type: ignore[arg-type]


def validated(image: str | Path) -> ValidatedJob:
    return validate(parse_job({"image": str(image), "prompt": "x"}), HERE)


class TestUploading:
    def test_an_image_lies_under_its_contents_hash_with_its_type(self, sandbox: Sandbox, photo: Path) -> None:
        _, uploaded = up_to_upload(photo)
        data = photo.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        place = load_settings().upload_to
        assert uploaded == UploadedImage(
            uri=f"{place}/{sha256}.jpg", sha256=sha256, size_bytes=len(data), uploaded=True, warnings=()
        )
        assert stored(uploaded.uri) == (data, "image/jpeg")

    def test_what_is_there_already_is_not_sent_again(self, sandbox: Sandbox, photo: Path, puts: list[str]) -> None:
        first, second = up_to_upload(photo)[1], up_to_upload(photo, prompt="another")[1]
        assert (first.uploaded, second.uploaded) == (True, False)
        assert second.uri == first.uri
        assert len(puts) == 1

    def test_a_damaged_copy_is_replaced(self, sandbox: Sandbox, photo: Path, puts: list[str]) -> None:
        uri = up_to_upload(photo)[1].uri
        put(b"damaged", uri.removeprefix("s3://segmind/"))
        assert up_to_upload(photo)[1].uploaded
        assert stored(uri)[0] == photo.read_bytes()

    def test_a_normalised_copy_is_what_the_api_gets(self, sandbox: Sandbox, unaccepted: Path) -> None:
        job, uploaded = up_to_upload(unaccepted, resolution="RESOLUTION_640_1024")
        data, content_type = stored(uploaded.uri)
        assert uploaded.uri.endswith(f"/{uploaded.sha256}.jpg")
        assert content_type == "image/jpeg"
        assert Image.open(BytesIO(data)).format == "JPEG"
        assert hashlib.sha256(data).hexdigest() == uploaded.sha256 != job.source_sha256
        generate(job, uploaded)
        assert sandbox.ledger.requests[0].image_sha256 == uploaded.sha256

    def test_a_source_that_has_changed_since_it_was_validated_is_refused(
        self, sandbox: Sandbox, photo: Path, puts: list[str]
    ) -> None:
        job = validated(photo)
        photo.write_bytes(photo.read_bytes() + b"\0")
        with pytest.raises(SourceImageError, match="has changed since it was validated"):
            Services().uploads.upload(job, HERE)
        assert puts == []

    def test_no_place_is_an_error_that_names_the_option_and_the_variable(self, photo: Path) -> None:
        with pytest.raises(ConfigurationError) as caught:
            Uploads(no_s3).upload(validated(photo), HERE)  # type: ignore[arg-type]
        for name in ("--upload-to", "upload_to", "PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO"):
            assert name in str(caught.value)

    @pytest.mark.parametrize("place", ["uploads", "/srv/uploads", "https://bucket.example/uploads"])
    def test_a_place_that_the_provider_cannot_read_is_an_error(self, place: str, photo: Path) -> None:
        with pytest.raises(ConfigurationError, match="is not in S3"):
            Uploads(no_s3, place).upload(validated(photo), HERE)  # type: ignore[arg-type]

    def test_the_scheme_of_a_place_may_be_in_capitals(self, sandbox: Sandbox, photo: Path) -> None:
        uploads = replace(Services(upload_to="S3://segmind/capitals").uploads, public_base_url="https://cdn.example")
        uploaded = uploads.upload(validated(photo), HERE)
        assert uploaded.uri == f"s3://segmind/capitals/{uploaded.sha256}.jpg"
        assert uploads.address(uploaded.uri) == f"https://cdn.example/{uploaded.sha256}.jpg"


class TestRemoteSources:
    def test_an_object_that_needs_no_change_stays_where_it_is(
        self, sandbox: Sandbox, photo: Path, puts: list[str]
    ) -> None:
        uri = put(photo.read_bytes(), "inbox/mug.jpg")
        puts.clear()
        job, uploaded = up_to_upload(uri)
        assert (uploaded.uri, uploaded.sha256, uploaded.uploaded) == (uri, job.source_sha256, False)
        assert puts == []

    def test_an_object_that_needs_a_change_is_copied_and_left_as_it_is(
        self, sandbox: Sandbox, unaccepted: Path, puts: list[str]
    ) -> None:
        uri = put(unaccepted.read_bytes(), f"inbox/mug{unaccepted.suffix}")
        puts.clear()
        _, uploaded = up_to_upload(uri)
        assert uploaded.uri.endswith(f"/uploads/{uploaded.sha256}.jpg")
        assert stored(uri)[0] == unaccepted.read_bytes()
        assert len(puts) == 1

    def test_an_address_that_needs_no_change_is_passed_on_without_s3(self, photo: Path) -> None:
        uploads = Uploads(no_s3)  # type: ignore[arg-type]
        with Wire(http(photo.read_bytes())) as server:
            url = f"{server.url}/mug.jpg"
            uploaded = uploads.upload(validated(url), HERE)
        assert (uploaded.uri, uploaded.uploaded) == (url, False)
        assert uploaded.size_bytes == photo.stat().st_size
        assert uploads.address(url) == url


class TestAddresses:
    def test_a_signed_one_lives_for_the_set_seconds_and_anybody_can_get_it(
        self, sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_PRESIGNED_SECONDS", "77")
        _, uploaded = up_to_upload(photo)
        address = Services().uploads.address(uploaded.uri)
        assert parse_qs(urlsplit(address).query)["X-Amz-Expires"] == ["77"]
        with urlopen(address) as answer:
            assert answer.read() == photo.read_bytes()

    def test_a_public_place_needs_no_signature(self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO", "s3://segmind/public/")
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_PUBLIC_BASE_URL", "https://cdn.example/p/")
        uploads = Services().uploads
        assert uploads.address("s3://segmind/public/a b/ü?.jpg") == "https://cdn.example/p/a%20b/%C3%BC%3F.jpg"
        for other in ("s3://segmind/publicity/a.jpg", "s3://segmind/private/a.jpg"):
            assert "X-Amz-Signature" in uploads.address(other)


@pytest.fixture
def credentials_for(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes AWS credentials come from a process that says how long they live, as with SSO or an assumed role."""

    def set_up(seconds: int) -> None:
        assert sandbox.s3
        said = tmp_path / "credentials.json"
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        keys = {"AccessKeyId": sandbox.s3.access_key, "SecretAccessKey": sandbox.s3.secret_key}
        said.write_text(json.dumps({"Version": 1, "Expiration": until.isoformat(), **keys}))
        script = tmp_path / "say.py"
        script.write_text(f"print(open({str(said)!r}).read())")
        config = tmp_path / "aws-config"
        config.write_text(f"[default]\ncredential_process = {sys.executable} {script}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    return set_up


class TestCredentialsThatExpire:
    def test_before_the_address_does_are_warned_about(
        self, photo: Path, credentials_for: Callable[[int], None]
    ) -> None:
        credentials_for(1800)
        for image in (str(photo), up_to_upload(photo)[1].uri):
            (warning,) = up_to_upload(image)[1].warnings
            assert warning.endswith("s, sooner than the 3600 s for which the address should be valid")

    def test_after_the_address_does_are_fine(self, photo: Path, credentials_for: Callable[[int], None]) -> None:
        credentials_for(7200)
        assert up_to_upload(photo)[1].warnings == ()

    def test_are_no_matter_where_nothing_is_signed(
        self, photo: Path, credentials_for: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_PUBLIC_BASE_URL", "https://cdn.example")
        credentials_for(1800)
        assert up_to_upload(photo)[1].warnings == ()

    def test_and_have_expired_are_an_error_that_says_so(
        self, photo: Path, credentials_for: Callable[[int], None]
    ) -> None:
        credentials_for(-10)
        with pytest.raises(StoreCredentialsError, match="no usable S3 credentials"):
            up_to_upload(photo)
