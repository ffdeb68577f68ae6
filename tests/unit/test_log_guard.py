"""No line that a library logs shows a key or a signature, at any level, in any configuration of logging."""

from __future__ import annotations

import logging
import logging.config
from collections.abc import Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from botocore.auth import SigV4Auth

from prefect_segmind.cli import check
from prefect_segmind.log_guard import LIBRARIES, guard_logs
from prefect_segmind.pipeline.upload import Uploads
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from prefect_segmind.storage.http import Destination, DownloadError, download
from prefect_segmind.storage.s3 import presign_uri
from tests.support.walk import walk


@pytest.fixture
def lines() -> Iterator[StringIO]:
    """All that is logged, by every logger at every level."""
    written, root = StringIO(), logging.getLogger()
    factory, handler = logging.getLogRecordFactory(), logging.StreamHandler(written)
    levels = {name: logging.getLogger(name).level for name in ["root", *root.manager.loggerDict]}
    for name in [name for name, level in levels.items() if level]:
        logging.getLogger(name).setLevel(logging.DEBUG)
    root.addHandler(handler)
    yield written
    root.removeHandler(handler)
    for name in ["root", *root.manager.loggerDict]:  # those too that a test has made or configured
        logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))
    logging.setLogRecordFactory(factory)


@pytest.fixture
def signatures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The signatures of all that is signed."""
    made: list[str] = []
    sign, address = SigV4Auth.signature, Uploads.address

    def signed(self: Any, *arguments: Any) -> str:
        made.append(sign(self, *arguments))
        return made[-1]

    def addressed(self: Uploads, uri: str) -> str:
        signed = address(self, uri)
        made.extend(parse_qs(urlsplit(signed).query)["X-Amz-Signature"])
        return signed

    monkeypatch.setattr(SigV4Auth, "signature", signed)
    monkeypatch.setattr(Uploads, "address", addressed)
    return made


@pytest.mark.no_cover  # thousands of lines are redacted, and to trace that takes a minute
def test_a_whole_walk_logs_neither_a_key_nor_a_signature(
    sandbox: Sandbox, photo: Path, lines: StringIO, signatures: list[str]
) -> None:
    sandbox.play(Answer(kind="json_url"))
    archived = walk(photo)
    signed = presign_uri(archived.image, Services().s3, 600)
    download(signed, BytesIO(), limit=10_000_000, destination=Destination(allow_loopback=True))
    with pytest.raises(DownloadError, match="403"):
        download(f"{signed}0", BytesIO(), limit=10_000_000, destination=Destination(allow_loopback=True))
    for _, run in [each for each in check.all_checks(None, None, None) if each[0] != "Prefect server"]:
        run()
    assert sandbox.s3 is not None
    text = lines.getvalue()
    for secret in (sandbox.api_key, sandbox.s3.secret_key, *signatures):
        assert secret not in text
        assert secret.removeprefix("SG_") not in text
    assert len(signatures) > 10
    assert "send_request_headers.started" in text
    assert "CanonicalRequest" in text


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_what_a_library_logs_in_any_form_is_redacted(lines: StringIO, library: str) -> None:
    guard_logs()
    log = logging.getLogger(f"{library}.part.of.it")
    address = "https://user:hunter2@b.example/k?X-Amz-Signature=hunter2"
    log.debug("%s and %r", address, {"x-api-key": "hunter2", "Authorization": b"AWS4 Credential=1, Signature=hunter2"})
    log.info("headers %s", [(b"x-api-key", b"hunter2"), (b"Host", b"b.example")])
    log.warning('"GET /k?w=1&X-Amz-Security-Token=hunter2 HTTP/1.1" 200')
    log.error("Signature:\n%s", b"hunter2".hex() * 5)
    log.error("<SecretAccessKey>hunter2</SecretAccessKey><SessionToken>hunter2</SessionToken>")
    log.error("a wrong %d", address)
    try:
        raise httpx.ConnectError(f"cannot reach {address}")
    except httpx.ConnectError:
        log.exception("it failed")
    text = lines.getvalue()
    assert "hunter2" not in text
    assert b"hunter2".hex() not in text
    assert "b.example" in text
    assert "ConnectError: cannot reach" in text
    assert "(b'Host', b'b.example')" in text


def test_the_log_of_everybody_else_is_left_as_it_is(lines: StringIO) -> None:
    guard_logs()
    logging.getLogger("mine").info("https://b.example/k?v=%d", 5)
    assert "https://b.example/k?v=5" in lines.getvalue().splitlines()


def test_a_configuration_of_logging_neither_loses_the_guard_nor_is_lost(lines: StringIO) -> None:
    marked: list[str] = []
    made = logging.getLogRecordFactory()

    def marking(*args: Any, **kwargs: Any) -> logging.LogRecord:
        marked.append(args[0])
        return made(*args, **kwargs)

    logging.setLogRecordFactory(marking)
    guard_logs()
    guard_logs()
    names = {"httpx": {"level": "DEBUG"}, "botocore": {"level": "DEBUG"}}
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "loggers": names})
    logging.getLogger("httpx").info("https://b.example/k?sig=hunter2")
    assert marked.count("httpx") == 1  # the threads of other tests may log something too
    assert "https://b.example/k?…" in lines.getvalue().splitlines()
