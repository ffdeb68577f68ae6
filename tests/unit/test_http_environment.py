"""A proxy or certificates that the environment names are used, or refused by the name of their variable."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest

from prefect_segmind.api.client import SegmindClient
from prefect_segmind.cli import commands, output
from prefect_segmind.credentials import load_credentials
from prefect_segmind.errors import ConfigurationError
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services
from prefect_segmind.storage.http_environment import check_environment, proxy_for, ssl_context

WRONG = [
    ("SSL_CERT_FILE", "/no/such/file"),
    ("SSL_CERT_FILE", os.devnull),
    ("SSL_CERT_FILE", os.sep),
    ("SSL_CERT_DIR", "/no/such/folder"),
    ("ALL_PROXY", "socks5://127.0.0.1:1080"),
    ("HTTPS_PROXY", "socks5h://me:password@127.0.0.1:1080"),
    ("HTTP_PROXY", "socks4://127.0.0.1:1080"),
    ("HTTPS_PROXY", "http://me:password@proxy:port"),
    ("https_proxy", "http://me:pass/word@proxy:3128"),
    ("HTTPS_PROXY", "http://"),
    ("HTTPS_PROXY", "http://proxy:99999"),
    ("HTTPS_PROXY", " http://proxy:3128"),
    ("NO_PROXY", "[::1]"),
    ("NO_PROXY", "localhost,[::1]:8080"),
    ("no_proxy", "10.0.0.0/8,fe80::/10"),
    ("NO_PROXY", "example.com:port"),
]


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.lower().endswith("_proxy") or name.startswith("SSL_CERT_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_variable_is_named_with_what_to_do(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if value.startswith("socks"):
        monkeypatch.setattr("prefect_segmind.storage.http_environment.find_spec", lambda _: None)
    monkeypatch.setenv(name, value)
    for made in (check_environment, lambda: SegmindClient("SG_0123456789", "https://api.example/v1")):
        with pytest.raises(ConfigurationError, match=f"^{name}: .*(name|write)") as caught:
            made()
        assert "pass" not in str(caught.value).replace("a password", "")


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_the_sandbox_on_this_machine_needs_none_of_them(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    SegmindClient("SG_0123456789", "http://127.0.0.1:8787/v1").close()


@pytest.mark.parametrize(
    ("name", "value"), [("SSL_CERT_FILE", "/no/such/file"), ("NO_PROXY", "[::1]"), ("ALL_PROXY", "socks4://x")]
)
def test_check_and_all_commands_say_it_without_a_traceback(
    name: str,
    value: str,
    sandbox: Sandbox,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    assert commands.run(["check"]) == output.BAD_INPUT
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"bad  proxy and certificates: {name}: ")
    assert [line for line in lines if line.startswith(f"bad  Prefect server: {name}: ")]
    (manifest := photo.with_suffix(".csv")).write_text(f"image,prompt\n{photo.name},a mug\n")
    for command in (["generate", str(photo), "a mug"], ["refresh", str(manifest)], ["demo", "--folder", str(photo)]):
        assert commands.run(command) == output.BAD_INPUT
        said = capsys.readouterr()
        assert f"{name}: " in said.err
        assert "Traceback" not in said.out + said.err
    assert not sandbox.ledger.requests


def test_a_block_that_cannot_be_asked_for_is_told_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "[::1]")
    with pytest.raises(ConfigurationError, match=r"^NO_PROXY: "):
        load_credentials("marketing")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_S3_BLOCK", "aws-credentials/prod")
    with pytest.raises(ConfigurationError, match=r"^NO_PROXY: "):
        _ = Services().s3


URLS = ["https://api.example.com/v1", "https://example.com", "https://notexample.com", "https://example.com:8443",
        "http://10.0.0.8/", "https://[::1]/", "https://localhost/"]  # fmt: skip


@pytest.mark.parametrize(
    "entries",
    ["", "example.com", ".example.com", "example.com:8443", "10.0.0.8", "::1", "localhost", "*", "a.b, example.com",
     "https://example.com", "other.org,"],
)  # fmt: skip
def test_the_proxy_is_the_one_that_httpx_would_take(entries: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://one:1")
    monkeypatch.setenv("ALL_PROXY", "two:2")
    monkeypatch.setenv("NO_PROXY", entries)
    with httpx.Client() as client:
        for url in URLS:
            through = client._transport_for_url(httpx.URL(url)) is not client._transport
            proxy = proxy_for(url)
            assert (proxy is not None) is through, url
            if proxy:
                assert proxy.url.host == ("one" if url.startswith("https") else "two")


def test_addresses_may_be_excepted_by_their_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://one:1")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8")
    assert proxy_for("https://10.1.2.3/") is None
    assert proxy_for("https://11.1.2.3/")


def test_certificates_are_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ssl_context() is ssl_context() is ssl_context(from_environment=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert ssl_context() is ssl_context() is not ssl_context(from_environment=False)
