"""An archive reads only what is its own, and never takes one address for another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import boto3
import pytest

from prefect_segmind.archive.archive import Archive
from prefect_segmind.errors import PreconditionFailedError, StoreError
from prefect_segmind.storage.local import LocalStore
from prefect_segmind.storage.open_store import open_store


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(LocalStore(tmp_path / "archive"))


def test_what_an_address_of_the_archive_holds_is_read(archive: Archive) -> None:
    for key in ("hero/summer.png", "ä #1?.json"):
        archive.store.put(key, key.encode(), "image/png")
        assert archive.content(archive.store.uri(key)) == key.encode()
    assert archive.content(archive.store.uri("hero/winter.png")) is None


@pytest.mark.parametrize("other", ["archive2", "archiv", "other", ""])
def test_the_address_of_another_place_is_refused_though_a_picture_of_that_name_is_here(
    other: str, archive: Archive, tmp_path: Path
) -> None:
    for key in ("hero/summer.png", "2/hero/summer.png", "summer.png"):
        archive.store.put(key, b"of this archive", "image/png")
    elsewhere = LocalStore(tmp_path / other).uri("hero/summer.png")
    with pytest.raises(StoreError, match=f"{re.escape(elsewhere)} is not in the archive {re.escape(archive.url)}"):
        archive.content(elsewhere)


@pytest.mark.parametrize(
    ("url", "uri"),
    [
        ("s3://pictures/live", "s3://pictures/live2/hero.png"),
        ("s3://pictures/live", "s3://pictures2/live/hero.png"),
        ("s3://pictures", "/srv/pictures/hero.png"),
        ("/srv/pictures", "s3://pictures/hero.png"),
        ("/srv/pictures", "/srv/pictures"),
    ],
)
def test_no_request_is_sent_for_the_address_of_another_place(url: str, uri: str) -> None:
    client = boto3.client("s3", "eu-west-1", endpoint_url="http://127.0.0.1:1")
    with pytest.raises(StoreError, match=f"{re.escape(uri)} is not in the archive {re.escape(url)}"):
        Archive(open_store(url, client)).content(uri)


class Refusing(LocalStore):
    """A folder that refuses every write on a condition, whether it holds or not."""

    def put(self, key: str, data: bytes, content_type: str, *, if_absent: bool = False, **more: Any) -> str:
        if if_absent:
            raise PreconditionFailedError("another write was in progress")
        return super().put(key, data, content_type, **more)


def test_a_sidecar_that_was_refused_and_is_not_there_is_an_error(tmp_path: Path) -> None:
    archive = Archive(Refusing(tmp_path))
    with pytest.raises(StoreError):
        archive.put_sidecar("hero/ab.png", {})
    archive.store.put("hero/ab.json", b"{}", "application/json")
    assert archive.put_sidecar("hero/ab.png", {"another": 1}) == "hero/ab.json"


def test_an_address_cannot_leave_the_archive(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    with pytest.raises(StoreError, match="is not a key"):
        archive.content(f"{archive.store.uri('x')[:-1]}../secret.png")
