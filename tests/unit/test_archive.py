"""An archive reads only what is its own, and never takes one address for another."""

from __future__ import annotations

import hashlib
import json
import re
from copy import deepcopy
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefect_segmind.api.picture import PaidPicture
from prefect_segmind.archive.archive import Archive, record_key, sidecar_key
from prefect_segmind.archive.leases import held_elsewhere, this_process
from prefect_segmind.archive.record import Attempt, Holder, Record, Run, past_requests, verdict
from prefect_segmind.errors import PreconditionFailedError, StoreError
from prefect_segmind.money import usd
from prefect_segmind.storage.local import LocalStore
from prefect_segmind.storage.open_store import open_store
from prefect_segmind.storage.s3 import S3Store
from tests.unit.test_store import BUCKET, client, moto, rclone  # noqa: F401


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


@pytest.fixture(params=["disk", "rclone", "moto"])
def any_archive(request: pytest.FixtureRequest, tmp_path: Path) -> Archive:
    if request.param == "disk":
        return Archive(LocalStore(tmp_path / "archive"))
    endpoint = request.getfixturevalue(request.param)
    endpoint = endpoint if isinstance(endpoint, str) else endpoint[0]
    return Archive(S3Store(BUCKET, tmp_path.name, client(endpoint)))


DATA = b"nine bytes"[:9]
KEY = f"hero/{'ab' * 8}.png"


def archived(archive: Archive, data: bytes = DATA, name: str = "hero") -> Record:
    """The record of a picture, which is archived."""
    picture = PICTURE.model_copy(update={"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)})
    key = archive.put_picture(name, "ab" * 32, picture, data)
    return Record(fingerprint="ab" * 32).archived(picture, key, sidecar_key(key))


def test_a_picture_is_told_to_be_there_without_reading_it(
    any_archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = archived(any_archive)
    if isinstance(any_archive.store, S3Store):
        monkeypatch.delattr(S3Store, "get")
    any_archive.check_picture(record)
    assert any_archive.key_for("hero", record) == KEY
    unfinished = Record(fingerprint="ab" * 32)
    assert any_archive.key_for("hero", unfinished) is None


@pytest.mark.parametrize("other", [b"more than nine bytes", b"NINE BYTE"])
def test_a_picture_that_has_changed_is_told_as_far_as_the_store_tells(any_archive: Archive, other: bytes) -> None:
    record = archived(any_archive)
    any_archive.store.put(KEY, other, "image/png")
    facts = any_archive.store.stat(KEY)
    assert facts is not None
    if len(other) == len(DATA) and facts.sha256 is None:
        any_archive.check_picture(record)
        return
    with pytest.raises(StoreError, match=f"{KEY} is no longer the one that was archived, though it was paid for"):
        any_archive.check_picture(record)
    assert any_archive.key_for("hero", record) is None


def test_a_picture_that_is_gone_is_told(any_archive: Archive) -> None:
    record = archived(any_archive)
    gone = record.model_copy(update={"image": KEY.replace(".png", ".jpg")})
    with pytest.raises(StoreError, match=r"\.jpg is gone from the archive, though it was paid for; restore it, or"):
        any_archive.check_picture(gone)
    assert any_archive.key_for("hero", gone) is None


def test_a_copy_under_another_name_is_the_picture_of_that_name(any_archive: Archive) -> None:
    record = archived(any_archive)
    assert any_archive.key_for("other", record) is None
    archived(any_archive, name="other")
    assert any_archive.key_for("other", record) == KEY.replace("hero", "other")


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


HOSTILE: tuple[object, ...] = (
    *(None, True, -1, 10**30, 10**4000, 1.5, 1e300, float("inf"), float("nan"), "", "\0", "../../x", "a" * 100_000),
    *("1e999999", "1e9999999999999", "1e-999999", "NaN", "-Infinity", "2025-01-01T00:00:00", "9999-12-31T23:59:59Z"),
    *([], {}, [[]], {"a": None}, [["flow", 10**30]], ["flow"], json.loads("[" * 150 + "]" * 150)),
)
SEEN = datetime(2025, 3, 1, 12, 0, tzinfo=UTC)
PICTURE = PaidPicture(
    sha256="cd" * 32, format="PNG", content_type="image/png", extension="png", width=9, height=9, size_bytes=99,
    seed=4242, cost_usd=Decimal("0.05"), cost_source="x-cost", paid_at=SEEN,
)  # fmt: skip
ATTEMPTS = (
    Attempt(run="one", sent_at=SEEN, status=502, possibly_billed=True, reason="no", wait_seconds=1.0),
    Attempt(run="two", sent_at=SEEN, possibly_billed=False, cost_usd=Decimal("0.04"), flow_runs=(("flow", 1),)),
)
HOLDER = Holder(run="two", host="another", pid=7, started="now", flow_runs=(("flow", 1),))
RECORDS = (
    Record(fingerprint="ab" * 32, holder=HOLDER, attempts=ATTEMPTS),
    Record(fingerprint="ab" * 32, attempts=ATTEMPTS).archived(PICTURE, "a.png", "a.json"),
)


KNOWN = set(Attempt.model_fields)
"""An unknown field may hold an infinite number, which JSON has not."""


@st.composite
def hostile_records(draw: st.DrawFn) -> bytes:
    """A record in which another machine, or another version, has put something else in some places."""
    whole = json.loads(draw(st.sampled_from(RECORDS)).model_dump_json())
    for _ in range(draw(st.integers(1, 2))):
        at: Any = whole
        while True:
            keys: list[Any] = [*range(len(at))] if isinstance(at, list) else [*at, "of a newer version"]
            key = draw(st.sampled_from(keys))
            inner = at[key] if isinstance(at, list) or key in at else None
            if not (isinstance(inner, dict | list) and inner) or draw(st.integers(0, 3)) == 0:
                break
            at = inner
        at[key] = deepcopy(draw(st.sampled_from(HOSTILE)))
    return json.dumps(whole).encode()


@pytest.mark.parametrize("depth", [200, 1_000, 1_000_000])
@pytest.mark.parametrize(("opening", "closing"), ["[]", ('{"a":', "}")])
def test_a_record_that_is_too_deep_is_told(
    opening: str, closing: str, depth: int, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_segmind.storage.store._WAITS_FOR_A_WRITER", ())
    deep = RECORDS[0].model_dump_json()[:-1] + f', "deep": {opening * depth}1{closing * depth}}}'
    archive.store.put(record_key("ab" * 32), deep.encode(), "application/json")
    with pytest.raises(StoreError, match="cannot be read by this version; it records whether a picture is paid"):
        archive.read("ab" * 32)


def test_the_record_of_another_picture_is_not_taken_for_this_one(archive: Archive) -> None:
    archive.store.put(record_key("cd" * 32), RECORDS[0].model_dump_json().encode(), "application/json")
    with pytest.raises(StoreError, match="is the record of another picture; it records whether a picture is paid"):
        archive.read("cd" * 32)


@pytest.mark.many
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=hostile_records())
def test_a_record_that_was_written_elsewhere_is_used_as_it_is_or_refused(
    data: bytes, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_segmind.storage.store._WAITS_FOR_A_WRITER", ())
    archive.store.put(record_key("ab" * 32), data, "application/json")
    try:
        found = archive.read("ab" * 32)
    except StoreError:
        return
    assert found is not None
    record, run = found.record, Run("me", (("flow", 2),))
    for each in record.attempts:
        assert (SEEN - each.sent_at).total_seconds() is not None
    for past in past_requests(run, record.attempts, Decimal("0.05")):
        assert len(usd(past.totals.cost_usd + past.totals.possibly_billed_usd)) < 200
    held = record.holder is not None and held_elsewhere(archive, found, "me")
    verdict(record, run=run, in_outbox=False, held_elsewhere=held, on_unknown="repay", unreadable=False)
    written = record.claimed_by(this_process(run), SEEN).renewed().with_outcome(status=200, possibly_billed=True)
    for version in (written, written.archived(record.picture or PICTURE, "a.png", "a.json")):
        archive.write(version, None if (now := archive.store.get(record_key("ab" * 32))) is None else now.etag)
        again = archive.read("ab" * 32)
        assert again is not None
        assert [each.model_dump(include=KNOWN) for each in again.record.attempts] == [
            each.model_dump(include=KNOWN) for each in version.attempts
        ]
