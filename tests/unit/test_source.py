"""Sources: a source image is read from wherever it lies, or an error says what to do."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from prefect_segmind.errors import SourceImageError, StoreError
from prefect_segmind.pipeline import source
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services
from tests.support.wire import Wire, http


def no_s3() -> None:
    raise AssertionError("S3 was asked for a source that does not lie there")


READER = SourceReader(s3=no_s3, allow_loopback=True)  # type: ignore[arg-type]


def refusal(image: str | Path, reader: SourceReader = READER) -> str:
    with pytest.raises(SourceImageError) as caught:
        reader.read(str(image))
    text = str(caught.value)
    assert text.startswith("image: ")
    return text


class TestLocalFiles:
    def test_are_read_whole(self, photo: Path, photo_bytes: bytes) -> None:
        assert READER.read(str(photo)) == photo_bytes

    def test_are_found_in_the_home(self, photo: Path, photo_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(photo.parent))
        monkeypatch.setenv("USERPROFILE", str(photo.parent))
        assert READER.read("~/mug.jpg") == photo_bytes

    @pytest.mark.parametrize("image", ["~\0", "~\ud800/a", "a\0b", "\ud800", "~nobody\udce9/x", "x" * 5000, "/" * 300])
    def test_of_no_possible_name_are_missing_and_no_error_of_python(self, image: str) -> None:
        with pytest.raises(SourceImageError):
            READER.read(READER.locate(image))

    def test_a_typing_mistake_is_told_with_the_name_that_was_meant(self, photo: Path) -> None:
        wrong = photo.with_name("mgu.jpg")
        assert refusal(wrong) == f"image: {wrong} does not exist (did you mean mug.jpg?)"

    def test_a_missing_file_with_no_near_name_tells_where_it_was_looked_for(self, photo: Path) -> None:
        assert f"looked in {photo.parent}" in refusal(photo.with_name("zebra.tiff"))
        assert f"looked in {photo.parent / 'none'}" in refusal(photo.parent / "none" / "mug.jpg")

    def test_a_folder(self, tmp_path: Path) -> None:
        assert "is a folder; name one image in it" in refusal(tmp_path)

    @pytest.mark.skipif(sys.platform == "win32", reason="has no pipes in folders")
    def test_a_pipe_or_a_device_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", Path("/dev/zero")):
            assert "is not a regular file" in refusal(path)

    def test_a_huge_file_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
        path = tmp_path / "film.mov"
        with path.open("wb") as file:
            file.truncate(source.LOCAL_LIMIT + 1)
        assert "has more than 250 MB; make it smaller" in refusal(path)

    @pytest.mark.skipif(sys.platform != "linux", reason="needs a file that even root cannot read")
    def test_a_file_that_cannot_be_read_tells_why(self) -> None:
        assert "cannot be read: Input/output error" in refusal("/proc/self/mem")

    @pytest.mark.parametrize("image", ["x" * 5000, "a\0b.jpg", "~nobody-of-that-name/mug.jpg", "loop/mug.jpg"])
    def test_a_path_that_is_none_is_a_named_error(
        self, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        if image.startswith("loop"):
            Path("loop").symlink_to("loop")
        refusal(image)


class TestS3:
    def test_an_object_is_read(self, sandbox: Sandbox, photo_bytes: bytes) -> None:
        s3 = Services().s3
        s3.put_object(Bucket="segmind", Key="inbox/mug 1.jpg", Body=photo_bytes)
        assert Services().reader.read("s3://segmind/inbox/mug 1.jpg") == photo_bytes

    def test_a_missing_object_is_named(self, sandbox: Sandbox) -> None:
        with pytest.raises(StoreError, match=r"s3://segmind/inbox/none\.jpg does not exist: check the key"):
            Services().reader.read("s3://segmind/inbox/none.jpg")

    def test_a_large_object_is_refused(self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        Services().s3.put_object(Bucket="segmind", Key="large.jpg", Body=bytes(2000))
        monkeypatch.setattr(source, "REMOTE_LIMIT", 1999)
        with pytest.raises(SourceImageError, match=r"image: .* has 2000 bytes, more than the 1999"):
            Services().reader.read("s3://segmind/large.jpg")


FAILURES = [http(b"", "503 Service Unavailable"), http(b"", "429 Too Many Requests"), http(b"x", length=9), b""]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_WAITS", (0.0, 0.0))


class TestAddresses:
    def test_are_read(self, photo_bytes: bytes) -> None:
        with Wire(http(photo_bytes)) as server:
            assert READER.read(f"{server.url}/mug.jpg") == photo_bytes

    @pytest.mark.parametrize("failure", FAILURES)
    @pytest.mark.usefixtures("impatient")
    def test_one_that_fails_in_a_way_that_may_pass_is_asked_again(self, failure: bytes, photo_bytes: bytes) -> None:
        with Wire(failure, failure, http(photo_bytes)) as server:
            assert READER.read(f"{server.url}/mug.jpg") == photo_bytes
        assert len(server.requests) == 3

    @pytest.mark.parametrize("failure", FAILURES)
    @pytest.mark.usefixtures("impatient")
    def test_one_that_goes_on_failing_is_an_error_and_no_mistake_of_the_job(self, failure: bytes) -> None:
        with (
            Wire(failure) as server,
            pytest.raises(StoreError, match="asked more than once; run again") as caught,
        ):
            READER.read(f"{server.url}/mug.jpg?size=secret")
        assert "secret" not in str(caught.value)
        assert server.url in str(caught.value)
        assert len(server.requests) == 3

    @pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden", "404 Not Found", "410 Gone"])
    def test_one_that_this_machine_may_not_read_is_a_mistake_of_the_job(self, status: str) -> None:
        with Wire(http(b"", status)) as server, pytest.raises(SourceImageError, match="must be readable from here"):
            READER.read(f"{server.url}/mug.jpg")
        assert len(server.requests) == 1

    @pytest.mark.usefixtures("impatient")
    def test_nobody_listening_may_pass(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            url = f"http://127.0.0.1:{gone.getsockname()[1]}/mug.jpg"
        with pytest.raises(StoreError, match="cannot be reached"):
            READER.read(url)

    def test_one_that_lets_wait_for_long_is_not_asked_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(source, "_PATIENCE", -1.0)
        with Wire(http(b"", "503 Service Unavailable")) as server, pytest.raises(StoreError):
            READER.read(f"{server.url}/mug.jpg")
        assert len(server.requests) == 1

    @pytest.mark.parametrize("url", ["http://10.0.0.8/mug.jpg", "http://169.254.169.254/latest/meta-data"])
    def test_a_private_one_is_refused_and_the_setting_that_allows_it_named(self, url: str) -> None:
        assert "set PREFECT_INTEGRATIONS_SEGMIND_ALLOW_PRIVATE_SOURCES=true to allow it" in refusal(url)

    def test_a_private_one_is_read_where_the_setting_allows_it(
        self, sandbox: Sandbox, photo_bytes: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SEGMIND_BASE_URL", "https://api.segmind.com/v1")
        with Wire(http(photo_bytes)) as server:
            refusal(f"{server.url}/mug.jpg", Services().reader)
            monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ALLOW_PRIVATE_SOURCES", "true")
            assert Services().reader.read(f"{server.url}/mug.jpg") == photo_bytes
            assert len(server.requests) == 1

    def test_this_machine_is_read_only_where_the_api_is_on_it_too(
        self, sandbox: Sandbox, photo_bytes: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Wire(http(photo_bytes)) as server:
            assert Services().reader.read(f"{server.url}/mug.jpg") == photo_bytes
            assert "10.0.0.8" in refusal("http://10.0.0.8/mug.jpg", Services().reader)
            monkeypatch.setenv("SEGMIND_BASE_URL", "https://api.segmind.com/v1")
            assert "127.0.0.1" in refusal(f"{server.url}/mug.jpg", Services().reader)
