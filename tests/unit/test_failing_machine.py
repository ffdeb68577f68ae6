"""What fails on this machine, a full disk above all, is told as that, and not as something of S3 or the network."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.cli import check
from prefect_segmind.errors import (
    ApiUnreachableError,
    ConfigurationError,
    ManifestError,
    OutboxError,
    SegmindError,
    StoreCredentialsError,
    StoreError,
    StoreUnreachableError,
)
from prefect_segmind.inbox.open_inbox import open_inbox
from prefect_segmind.jobs.job import Job
from prefect_segmind.manifest.loading import load_manifest
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services
from prefect_segmind.storage.s3 import S3Store, s3_client
from prefect_segmind.storage.s3_errors import s3_errors
from prefect_segmind.storage.spool import Spool


def failing(code: int, path: str | None = None) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code), path) if path else OSError(code, os.strerror(code))

    return fail


class Full(BytesIO):
    """A temporary file on a disk that fills up."""

    def write(self, data: Any, /) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def put_manifest(sandbox: Sandbox, tmp_path: Path) -> str:
    text = b"image,prompt\ns3://segmind/mug.jpg,a mug\n"
    Services().s3.put_object(Bucket="segmind", Key=f"{tmp_path.name}.csv", Body=text)
    return f"s3://segmind/{tmp_path.name}.csv"


class TestATemporaryFolder:
    @pytest.mark.parametrize(
        "made", [failing(errno.ENOSPC), failing(errno.EDQUOT), Full], ids=["full", "quota", "fills"]
    )
    def test_that_is_full_is_named_where_a_manifest_is_read_from_s3(
        self, made: Any, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = put_manifest(sandbox, tmp_path)
        monkeypatch.setattr(tempfile, "TemporaryFile", made)
        with pytest.raises(StoreError, match=r"cannot use a temporary file: .*TMPDIR") as caught:
            load_manifest(place, None, s3=lambda: Services().s3)
        assert type(caught.value) is StoreError
        assert tempfile.gettempdir() in str(caught.value)
        assert "credentials" not in str(caught.value)

    def test_that_is_missing_is_named(self, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place, missing = put_manifest(sandbox, tmp_path), str(tmp_path / "gone")
        monkeypatch.setattr(tempfile, "tempdir", missing)
        for use in (lambda: load_manifest(place, None, s3=lambda: Services().s3), lambda: Spool(Job)):
            with pytest.raises(StoreError, match=r"No such file or directory.*TMPDIR") as caught:
                use()
            assert missing in str(caught.value)

    def test_that_is_nowhere_to_be_had_is_told_too(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
        with pytest.raises(StoreError, match=r"No usable temporary directory.*TMPDIR"):
            Spool(Job)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StoreError, "No space left on device.*check its disk"),
        (OSError(errno.EIO, "Input/output error"), StoreError, "Input/output error.*check its disk"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), StoreError, "memory"),
        (OSError(errno.EMFILE, "Too many open files"), StoreError, "too many files open.*ulimit"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), StoreUnreachableError, "no answer"),
        (TimeoutError("timed out"), StoreUnreachableError, "no answer"),
        (ValueError("Invalid header value b'AWS4 Credential=KEY'"), ConfigurationError, r"malformed \(ValueError\)"),
        (PermissionError(errno.EACCES, "no", "/home/ann/.aws/config"), StoreCredentialsError, "/home/ann/.aws/config"),
        (
            FileNotFoundError(errno.ENOENT, "no", "/bin/get-key"),
            StoreCredentialsError,
            "/bin/get-key.*AWS_PROFILE",
        ),
    ],
)
def test_a_failure_under_boto_is_told_as_what_it_is(error: Exception, kind: type[SegmindError], words: str) -> None:
    with pytest.raises(SegmindError, match=words) as caught, s3_errors("read s3://b/k"):
        raise error
    assert type(caught.value) is kind
    assert kind is StoreCredentialsError or "credentials" not in str(caught.value)
    assert "Credential=" not in str(caught.value)


def test_connections_that_the_system_has_no_room_for_are_told(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = s3_client()
    monkeypatch.setattr("socket.socket.connect", failing(errno.EMFILE))
    with pytest.raises(StoreError, match="too many files open"):
        S3Store("segmind", "", made).get("k")


def test_a_manifest_on_a_disk_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    (manifest := tmp_path / "m.csv").write_text("image,prompt\n")
    monkeypatch.setattr(Path, "open", lambda *_: Broken())
    with pytest.raises(ManifestError, match="it cannot be read: Input/output error"):
        load_manifest(str(manifest), None, s3=lambda: Services().s3)


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "free some space"), (errno.EXDEV, "on one disk"), (errno.EACCES, "check the owner and mode")],
)
def test_a_file_that_cannot_be_moved_out_of_the_inbox_says_why(
    code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cup.png").write_bytes(b"x")
    inbox = open_inbox(str(tmp_path), lambda: Services().s3)
    (file,) = inbox.look(0).settled
    monkeypatch.setattr(Path, "replace", failing(code))
    with pytest.raises(StoreError, match=f"{os.strerror(code)}; .*{words}"):
        inbox.move_done(file)


class TestAnOutbox:
    def test_that_cannot_be_listed_is_an_error_and_not_empty(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "listdir", failing(errno.EACCES))
        with pytest.raises(OutboxError, match="cannot be read: Permission denied"):
            Outbox(tmp_path).fingerprints()

    def test_whose_remains_cannot_be_removed_does_not_hide_what_failed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def ask() -> None:
            with Outbox(tmp_path).receive("ab" * 32, "run"):
                monkeypatch.setattr(Path, "unlink", failing(errno.EROFS))
                raise ApiUnreachableError("no answer")

        with pytest.raises(ApiUnreachableError):
            ask()


def test_check_says_that_an_upload_place_on_disk_is_none(tmp_path: Path) -> None:
    looks = dict(check.all_checks(None, None, str(tmp_path)))
    with pytest.raises(ConfigurationError, match="is not in S3, so the provider cannot read it"):
        looks["upload place"]()
