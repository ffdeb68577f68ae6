"""What an inbox promises, tried on a disk, on the sandbox's S3 (rclone) and on moto's, with and without conditions.

Nobody waits here: what would happen while an inbox waits is done in its `pause`.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import boto3
import pytest
from botocore.config import Config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moto.s3.exceptions import PreconditionFailed
from moto.s3.responses import S3Response

from prefect_segmind.errors import (
    BucketNotFoundError,
    ConfigurationError,
    StoreAccessError,
    StoreError,
    StoreUnreachableError,
)
from prefect_segmind.inbox import bucket as bucket_module
from prefect_segmind.inbox import folder as folder_module
from prefect_segmind.inbox.inbox import Inbox, InboxFile, Look, Memory
from prefect_segmind.inbox.open_inbox import open_inbox
from prefect_segmind.storage.local import LocalStore
from tests.support.moto_server import moto_server

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")
HOUR = 3600.0


def no_s3() -> NoReturn:
    raise AssertionError("no S3 client is needed")


def no_pause(_: float) -> NoReturn:
    raise AssertionError("there is nothing to wait for")


class Disk:
    """An inbox in a folder; what is put into it is an hour old."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.url, self.s3 = str(folder), no_s3

    def put(self, below: str, data: bytes = b"x", age: float = HOUR) -> None:
        path = self.folder / below
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (then := time.time() - age, then))

    def remove(self, below: str) -> None:
        (self.folder / below).unlink()

    def files(self) -> dict[str, bytes]:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}


class Bucket:
    """An inbox in a bucket, and the hands of other people there."""

    def __init__(self, client: Any, url: str) -> None:
        self.client, self.url = client, url
        self.bucket, _, prefix = url[5:].partition("/")
        self.prefix = f"{prefix}/"

    def s3(self) -> Any:
        return self.client

    def put(self, below: str, data: bytes = b"x", **more: Any) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.prefix + below, Body=data, **more)

    def remove(self, below: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.prefix + below)

    def files(self) -> dict[str, bytes]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {
            key[len(self.prefix) :]: self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys
        }

    def when(self, moment: str, operation: str, do: Callable[[], object]) -> None:
        """Once, `before-send` or `after-call` of an operation of the inbox, somebody else does something."""

        def once(**_: Any) -> None:
            self.client.meta.events.unregister(f"{moment}.s3.{operation}", once)
            do()

        self.client.meta.events.register(f"{moment}.s3.{operation}", once)


@pytest.fixture(scope="module")
def moto() -> Iterator[Any]:
    with moto_server() as endpoint:
        s3(endpoint).create_bucket(Bucket="inboxes")
        yield endpoint


def s3(endpoint: str, key: str = "A", secret: str = "B") -> Any:
    """A client of this test's own, for some listen to what it does."""
    config = Config(signature_version="s3v4", retries={"total_max_attempts": 1})
    pair = {"aws_access_key_id": key, "aws_secret_access_key": secret}
    return session().client("s3", endpoint_url=endpoint, config=config, **pair)  # type: ignore[call-overload]


@cache
def session() -> boto3.session.Session:
    """One for all clients: each reads botocore's models anew, which takes long."""
    return boto3.session.Session(region_name="us-east-1")


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moto refuses copies whose conditions do not hold, which S3 has and moto by itself ignores."""
    copy_object, one_at_a_time = S3Response.copy_object, threading.Lock()

    def conditional(self: Any) -> Any:
        with one_at_a_time:
            bucket, key = self.headers["x-amz-copy-source"].lstrip("/").split("/", 1)
            source = self.backend.get_object(bucket, re.sub("%(..)", _byte, key).encode("latin-1").decode())
            if source is not None and source.etag != self.headers.get("x-amz-copy-source-if-match"):
                raise PreconditionFailed("x-amz-copy-source-If-Match")
            if self.headers.get("If-None-Match") and self.backend.get_object(self.bucket_name, self.parse_key_name()):
                raise PreconditionFailed("If-None-Match")
            return copy_object(self)

    monkeypatch.setattr(S3Response, "copy_object", conditional)


def _byte(found: re.Match[str]) -> str:
    return chr(int(found[1], 16))


KINDS = ["rclone", "moto", "taught"]


@pytest.fixture(params=["disk", *KINDS])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "disk":
        return Disk(tmp_path / "inbox")
    return request.getfixturevalue("bucket_of")(request.param)


@pytest.fixture
def bucket_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Bucket]:
    def make(kind: str) -> Bucket:
        if kind == "rclone":
            known = request.getfixturevalue("sandbox").environment()
            client = s3(*(known[f"AWS_{name}"] for name in ("ENDPOINT_URL_S3", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY")))
            return Bucket(client, f"s3://segmind/{tmp_path.parent.name}-{tmp_path.name}/inbox")
        if kind == "taught":
            request.getfixturevalue("taught")
        return Bucket(s3(request.getfixturevalue("moto")), f"s3://inboxes/{tmp_path.name}-{kind}/inbox")

    return make


@pytest.fixture(params=KINDS)
def bucket(request: pytest.FixtureRequest, bucket_of: Callable[[str], Bucket]) -> Bucket:
    return bucket_of(request.param)


def opened(place: Any, **more: Any) -> Inbox:
    return open_inbox(place.url, place.s3, **more)


def look(place: Any, meanwhile: Callable[[], object] = lambda: None) -> Look:
    return opened(place).look(10, lambda _: meanwhile())


def settled(place: Any) -> list[str]:
    return [file.below for file in look(place).settled]


def only(place: Any) -> InboxFile:
    (file,) = look(place).settled
    return file


# --- what lies there --------------------------------------------------------------------------------------------------


def test_images_of_all_folders_are_found_in_order_and_other_files_are_named(place):
    names = [
        "cup.jpg",
        "B.PNG",
        "summer/cup.Jpeg",
        "summer/deep/er/x.heic",
        "a.b/v1.2.tiff",
        "z.webp",
        "j.jfif",
        "s.jp2",
        "DSC1.HIF",
    ]
    for below in (*names, "notes.txt", "summer/README", "cup.jpg.bak"):
        place.put(below)
    found = look(place)
    assert [file.below for file in found.settled] == sorted(names)
    assert [file.location for file in found.settled] == [f"{place.url}/{below}" for below in sorted(names)]
    assert found.unsettled == ()
    assert found.ignored == ("cup.jpg.bak", "notes.txt", "summer/README")


@pytest.mark.parametrize(
    "below",
    [
        ".cup.jpg",
        ".hidden/cup.jpg",
        "a/.h/b/cup.jpg",
        "~cup.jpg",
        "cup.jpg~",
        "cup.jpg.part",
        "cup.jpg.PARTIAL",
        "cup.jpg.tmp",
        "cup.jpg.crdownload",
        "cup.jpg.download/cup.jpg",
        "cup.jpg.filepart",
        "done/cup.jpg",
        "done/summer/notes.txt",
        "failed/cup.jpg",
        "@eaDir/cup.jpg/SYNOFILE_THUMB_XL.jpg",
        "#recycle/cup.jpg",
        "a/Thumbs.db",
        "desktop.ini",
    ],
)
def test_what_is_hidden_half_there_or_done_is_passed_over(below, tmp_path, moto):
    for place in (Disk(tmp_path / "inbox"), Bucket(s3(moto), f"s3://inboxes/{tmp_path.name}/inbox")):
        place.put(below)
        place.put("a/done/cup.jpg")  # only the top one is ours
        place.put("donee.jpg")
        found = look(place)
        assert [file.below for file in found.settled] == ["a/done/cup.jpg", "donee.jpg"]
        assert found.ignored == ()


def test_the_folder_for_what_is_done_may_have_another_name(place):
    place.put("done/cup.jpg")
    place.put("fertig/mug.jpg")
    inbox = opened(place, done="fertig")
    (file,) = inbox.look(0, lambda _: None).settled
    assert file.below == "done/cup.jpg"
    assert inbox.move_done(file) == f"{place.url}/fertig/done/cup.jpg"
    for done in ("", "..", ".", "a/b", "a\\b"):
        with pytest.raises(ConfigurationError, match=r"inbox: .* write one name, such as done"):
            opened(place, done=done)
        with pytest.raises(ConfigurationError, match=r"inbox: .* write one name, such as failed"):
            opened(place, failed=done)


def test_an_empty_inbox_makes_nobody_wait(place):
    assert opened(place).look(10, no_pause) == Look((), (), ())
    place.put("notes.txt")
    place.put("done/cup.jpg")
    assert opened(place).look(10, no_pause) == Look((), (), ("notes.txt",))


def test_a_look_waits_once_for_as_long_as_it_is_told(place):
    place.put("cup.jpg")
    waited: list[float] = []
    opened(place).look(2.5, waited.append)
    assert waited == [2.5]


def test_the_version_changes_with_the_file(place):
    place.put("cup.jpg", b"one")
    first = only(place)
    assert only(place) == first
    place.put("cup.jpg", b"two", **({"age": 2 * HOUR} if isinstance(place, Disk) else {}))
    assert only(place).version != first.version


# --- what is still being written --------------------------------------------------------------------------------------


def test_what_grows_appears_or_is_empty_is_not_settled_and_what_vanishes_is_gone(place):
    for below in ("cup.jpg", "grows.jpg", "vanishes.jpg"):
        place.put(below, b"half")
    place.put("empty.jpg", b"", **({"age": HOUR - 60} if isinstance(place, Disk) else {}))

    def meanwhile() -> None:
        place.put("grows.jpg", b"half and half")
        place.put("new.jpg")
        place.remove("vanishes.jpg")

    found = look(place, meanwhile)
    assert [file.below for file in found.settled] == ["cup.jpg"]
    assert found.unsettled == ("empty.jpg", "grows.jpg", "new.jpg")
    assert settled(place) == ["cup.jpg", "grows.jpg", "new.jpg"]


def test_another_content_of_the_same_size_is_not_settled(place):
    place.put("cup.jpg", b"one")
    assert look(place, lambda: place.put("cup.jpg", b"two")).unsettled == ("cup.jpg",)


def test_an_empty_file_is_still_being_written_for_an_hour_and_then_it_is_bad(tmp_path):
    place = Disk(tmp_path / "inbox")
    for below, age in {"new.jpg": 0.0, "young.jpg": HOUR - 60, "old.jpg": HOUR + 1, "a/older.jpg": 9e8}.items():
        place.put(below, b"", age)
    found = opened(place).look(10, no_pause)  # what is empty is not what is waited for
    assert [file.below for file in found.empty] == ["a/older.jpg", "old.jpg"]
    assert (found.unsettled, found.settled) == (("new.jpg", "young.jpg"), ())
    place.put("cup.jpg")
    found = look(place, lambda: place.put("old.jpg", b"filled after all", 20))
    assert [file.below for file in found.empty] == ["a/older.jpg"]
    assert found.unsettled == ("new.jpg", "old.jpg", "young.jpg")


def test_an_empty_file_is_not_kept_young_by_a_clock_that_runs_ahead(tmp_path, monkeypatch):
    place = Disk(tmp_path / "inbox")
    place.put("empty.jpg", b"", -9e8)
    assert opened(place).look(10, no_pause).empty == ()
    now = time.time() + HOUR + 60
    monkeypatch.setattr(time, "time", lambda: now)
    assert [file.below for file in opened(place).look(10, no_pause).empty] == ["empty.jpg"]


def test_an_empty_object_is_bad_after_an_hour_by_the_store_s_own_clock(bucket, monkeypatch):
    bucket.put("empty.jpg", b"")
    monkeypatch.setattr(bucket_module, "time", SimpleNamespace(time=lambda: 9e9))  # this machine's says nothing
    assert opened(bucket).look(10, no_pause).unsettled == ("empty.jpg",)

    real = bucket.client.get_paginator

    def paginator(name: str) -> Any:
        pages = real(name)

        class Later:
            def paginate(self, **what: Any) -> Iterator[Any]:
                for page in pages.paginate(**what):
                    date = format_datetime(datetime.now(UTC) + timedelta(seconds=HOUR + 5), usegmt=True)
                    page["ResponseMetadata"]["HTTPHeaders"]["date"] = date
                    yield page

        return Later()

    monkeypatch.setattr(bucket.client, "get_paginator", paginator)
    assert [file.below for file in opened(bucket).look(10, no_pause).empty] == ["empty.jpg"]


def test_nobody_waits_where_nothing_is_new(place):
    place.put("cup.jpg", b"one")
    place.put("sub/mug.jpg", b"mug")
    known = {file.below: file.version for file in look(place).settled}

    def again() -> Look:
        return opened(place).look(10, no_pause, lambda: known)

    assert [file.below for file in again().settled] == ["cup.jpg", "sub/mug.jpg"]
    place.remove("cup.jpg")
    assert [file.below for file in again().settled] == ["sub/mug.jpg"]
    place.put("sub/mug.jpg", b"another one", **({"age": 2 * HOUR} if isinstance(place, Disk) else {}))
    with pytest.raises(AssertionError, match="nothing to wait for"):
        again()
    place.put("new.jpg")
    waited: list[float] = []
    found = opened(place).look(10, waited.append, lambda: known)
    assert (waited, len(found.settled)) == ([10], 2)


def test_an_empty_inbox_asks_nobody_what_is_known(place):
    assert opened(place).look(10, no_pause, no_s3) == Look((), (), ())


def test_a_memory_keeps_what_it_is_told_and_forgets_what_it_is_not(tmp_path):
    store = LocalStore(tmp_path / "archive")
    cup, mug = InboxFile("/in/cup.jpg", "cup.jpg", "1 x"), InboxFile("/in/mug.jpg", "mug.jpg", "2 y")
    Memory(store, "/in", "shop").keep([cup], [mug])
    memory = Memory(store, "/in", "shop")
    assert memory.settled() == {"cup.jpg": "1 x"}
    assert (memory.has_reported(mug), memory.has_reported(cup)) == (True, False)
    assert not memory.has_reported(replace(mug, version="2 z")), "it has changed"
    for other in (Memory(store, "/in", "sale"), Memory(store, "/other", "shop")):
        assert (other.settled(), other.has_reported(mug)) == ({}, False)
    memory.keep([], [])
    assert not Memory(store, "/in", "shop").has_reported(mug)


def test_a_memory_that_has_not_changed_is_not_written(tmp_path, monkeypatch):
    store = LocalStore(tmp_path / "archive")
    cup = InboxFile("/in/cup.jpg", "cup.jpg", "1 x")
    Memory(store, "/in", "shop").keep([cup], [])
    monkeypatch.setattr(LocalStore, "put", no_s3)
    Memory(store, "/in", "shop").keep([cup], [])


def test_a_memory_that_makes_no_sense_is_none(tmp_path):
    store = LocalStore(tmp_path / "archive")
    cup = InboxFile("/in/cup.jpg", "cup.jpg", "1 x")
    Memory(store, "/in", "shop").keep([cup], [cup])
    (path,) = (tmp_path / "archive" / ".segmind" / "inbox").iterdir()
    path.write_text('{"settled": [')
    assert Memory(store, "/in", "shop").settled() == {}
    path.write_text('{"settled": {"cup.jpg": 5}}')
    assert not Memory(store, "/in", "shop").has_reported(cup)


def test_a_file_that_was_written_just_now_is_not_settled_on_disk(tmp_path):
    place = Disk(tmp_path / "inbox")
    place.put("cup.jpg", age=5)
    assert look(place).unsettled == ("cup.jpg",)
    place.put("cup.jpg", age=11)
    assert settled(place) == ["cup.jpg"]


def test_a_clock_that_runs_ahead_holds_no_file_back(tmp_path):
    place = Disk(tmp_path / "inbox")
    place.put("cup.jpg", age=-HOUR)
    assert settled(place) == ["cup.jpg"]
    assert look(place, lambda: place.put("cup.jpg", age=-HOUR - 1)).settled == ()


def test_a_real_writer_is_waited_for(tmp_path):
    place = Disk(tmp_path / "inbox")
    with (place.folder / "cup.jpg").open("wb", buffering=0) as file:
        stop = threading.Event()

        def write() -> None:
            while not stop.wait(0.02):
                file.write(b"x" * 1000)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            time.sleep(0.1)
            assert opened(place).look(0.3).unsettled == ("cup.jpg",)
        finally:
            stop.set()
            writer.join()
    assert [file.below for file in opened(place).look(0.3).settled] == ["cup.jpg"]


# --- moving -----------------------------------------------------------------------------------------------------------


def test_what_is_done_moves_to_done_and_keeps_its_folder(place):
    place.put("summer/cup.jpg", b"a cup")
    place.put("mug.jpg", b"a mug")
    cup = next(file for file in look(place).settled if file.below == "summer/cup.jpg")
    assert opened(place).move_done(cup) == f"{place.url}/done/summer/cup.jpg"
    assert place.files() == {"done/summer/cup.jpg": b"a cup", "mug.jpg": b"a mug"}
    assert settled(place) == ["mug.jpg"]
    assert opened(place).move_done(cup) is None


def test_what_has_failed_moves_to_failed_and_is_passed_over_there(place):
    place.put("summer/cup.jpg", b"a cup")
    inbox = opened(place)
    assert inbox.move_failed(only(place)) == f"{place.url}/failed/summer/cup.jpg"
    assert place.files() == {"failed/summer/cup.jpg": b"a cup"}
    assert inbox.look(10, no_pause) == Look((), (), ())


def test_nothing_in_done_is_ever_replaced(place):
    moved = []
    for data in (b"one", b"two", b"three", b"two", b"one"):
        place.put("cup.jpg", data)
        moved.append(opened(place).move_done(only(place)))
    digests = [hashlib.sha256(data).hexdigest()[:8] for data in (b"two", b"three")]
    first, second, third = "done/cup.jpg", f"done/cup-{digests[0]}.jpg", f"done/cup-{digests[1]}.jpg"
    assert moved == [f"{place.url}/{below}" for below in (first, second, third, second, first)]
    assert place.files() == {first: b"one", second: b"two", third: b"three"}


def test_a_name_that_only_looks_like_the_content_is_not_trusted(place):
    digest = hashlib.sha256(b"mine").hexdigest()[:8]
    others = {"done/cup.jpg": b"other", f"done/cup-{digest}.jpg": b"", f"done/cup-{digest}-2.jpg": b"2"}
    for below, data in {**others, "cup.jpg": b"mine"}.items():
        place.put(below, data)
    assert opened(place).move_done(only(place)) == f"{place.url}/done/cup-{digest}-3.jpg"
    assert place.files() == {**others, f"done/cup-{digest}-3.jpg": b"mine"}


def test_what_was_replaced_since_it_was_looked_at_stays(place):
    place.put("cup.jpg", b"one")
    file = only(place)
    place.put("cup.jpg", b"two")
    assert opened(place).move_done(file) is None
    assert place.files() == {"cup.jpg": b"two"}


def test_a_new_upload_between_look_and_rename_goes_back(tmp_path, monkeypatch):
    place = Disk(tmp_path / "inbox")
    place.put("a/cup.jpg", b"one")
    file, real = only(place), Path.replace
    uploads = iter([b"two", b"three"])

    def replace(self: Path, target: Path) -> Path:
        if self.name == "cup.jpg":  # somebody uploads in the very moment before, and once more after
            place.put("a/cup.jpg", next(uploads))
            moved = real(self, target)
            place.put("a/cup.jpg", next(uploads))
            return moved
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        assert opened(place).move_done(file) is None
    back = f"a/cup-{hashlib.sha256(b'two').hexdigest()[:8]}.jpg"
    assert place.files() == {"a/cup.jpg": b"three", back: b"two"}
    assert settled(place) == [back, "a/cup.jpg"]


def test_a_file_that_vanishes_in_the_moment_of_the_rename_is_gone(tmp_path, monkeypatch):
    place = Disk(tmp_path / "inbox")
    place.put("cup.jpg")
    file = only(place)

    def mkdir(self: Path, **_: Any) -> None:
        place.remove("cup.jpg")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        assert opened(place).move_done(file) is None


def test_of_many_runs_that_move_the_same_files_nothing_is_lost(place):
    names = [f"{number}.jpg" for number in range(5)]
    for below in names:
        place.put(below, below.encode())
        place.put(f"done/{below}", b"older")
    files = look(place).settled
    with ThreadPoolExecutor(8) as pool:
        moved = list(pool.map(lambda file: opened(place).move_done(file), files * 4))
    assert {each for each in moved if each}
    left = place.files()
    for below in names:
        assert below not in left
        assert left[f"done/{below}"] == b"older"
        copies = list(left.values()).count(below.encode())
        assert copies == 1 or (copies and "segmind" in place.url)  # rclone shows half a copy: another one may be made


def test_no_two_runs_get_the_same_name(tmp_path):
    place = Disk(tmp_path / "inbox")
    for number in range(40):
        place.put(f"{number}/cup.jpg", b"%d" % number)
    held = [place.folder / str(number) / "cup.jpg" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: folder_module._give_name(path, place.folder / "cup.jpg"), held))
    assert sorted(place.files().values()) == sorted(b"%d" % number for number in range(40))


def test_a_new_upload_before_the_copy_stays(bucket):
    bucket.put("cup.jpg", b"one")
    file = only(bucket)
    bucket.when("before-send", "CopyObject", lambda: bucket.put("cup.jpg", b"two"))
    opened(bucket).move_done(file)
    assert bucket.files()["cup.jpg"] == b"two"
    assert settled(bucket) == ["cup.jpg"]


def test_where_conditions_hold_a_new_upload_before_the_copy_is_not_copied(bucket_of):
    bucket = bucket_of("taught")
    bucket.put("cup.jpg", b"one")
    file = only(bucket)
    bucket.when("before-send", "CopyObject", lambda: bucket.put("cup.jpg", b"two"))
    assert opened(bucket).move_done(file) is None
    assert bucket.files() == {"cup.jpg": b"two"}


@pytest.mark.parametrize("data", [b"two", b"something longer"])
def test_a_new_upload_between_copy_and_delete_stays(bucket, data):
    bucket.put("cup.jpg", b"one")
    file = only(bucket)
    bucket.when("after-call", "CopyObject", lambda: bucket.put("cup.jpg", data))
    assert opened(bucket).move_done(file) == f"{bucket.url}/done/cup.jpg"
    assert bucket.files() == {"cup.jpg": data, "done/cup.jpg": b"one"}


@pytest.mark.parametrize("kind", ["moto", "taught"])
def test_where_conditions_hold_a_new_upload_in_the_moment_of_the_delete_stays(bucket_of, kind):
    bucket = bucket_of(kind)
    bucket.put("cup.jpg", b"one")
    file = only(bucket)
    bucket.when("before-send", "DeleteObject", lambda: bucket.put("cup.jpg", b"two"))
    assert opened(bucket).move_done(file) == f"{bucket.url}/done/cup.jpg"
    assert bucket.files() == {"cup.jpg": b"two", "done/cup.jpg": b"one"}


def test_where_conditions_hold_a_target_of_the_same_moment_is_not_replaced(bucket_of):
    bucket = bucket_of("taught")
    bucket.put("cup.jpg", b"mine")
    file = only(bucket)
    bucket.when("before-send", "CopyObject", lambda: bucket.put("done/cup.jpg", b"theirs"))
    digest = hashlib.sha256(b"mine").hexdigest()[:8]
    assert opened(bucket).move_done(file) == f"{bucket.url}/done/cup-{digest}.jpg"
    assert bucket.files() == {"done/cup.jpg": b"theirs", f"done/cup-{digest}.jpg": b"mine"}


def test_what_vanishes_before_the_copy_is_gone(bucket):
    bucket.put("cup.jpg")
    file = only(bucket)
    bucket.when("before-send", "CopyObject", lambda: bucket.remove("cup.jpg"))
    assert opened(bucket).move_done(file) is None
    assert bucket.files() == {}


def test_type_and_metadata_move_along(bucket):
    bucket.put("cup.jpg", ContentType="image/jpeg", Metadata={"by": "anna"})
    opened(bucket).move_done(only(bucket))
    head = bucket.client.head_object(Bucket=bucket.bucket, Key=f"{bucket.prefix}done/cup.jpg")
    assert head["ContentType"] == "image/jpeg"
    assert {name.lower(): value for name, value in head["Metadata"].items()}["by"] == "anna"


@pytest.mark.parametrize("status", [400, 501])
def test_a_server_that_does_not_know_the_conditions_moves_without_them(bucket_of, status):
    bucket = bucket_of("moto")
    bucket.put("cup.jpg")
    refused: list[str] = []

    def refuse(request: Any, event_name: str, **_: Any) -> Any:
        if {"If-None-Match", "If-Match"} & set(request.headers):
            refused.append(event_name.rpartition(".")[2])
            return answer(request.url, status, "NotImplemented")
        return None

    bucket.client.meta.events.register("before-send.s3", refuse)
    assert opened(bucket).move_done(only(bucket)) == f"{bucket.url}/done/cup.jpg"
    assert bucket.files() == {"done/cup.jpg": b"x"}
    assert refused == ["CopyObject", "DeleteObject"]


def answer(url: str, status: int, code: str) -> Any:
    from botocore.awsrequest import AWSResponse

    class Raw:
        def stream(self, **_: Any) -> Iterator[bytes]:
            yield f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()

    return AWSResponse(url, status, {}, Raw())  # type: ignore[arg-type]


def test_a_boto3_without_conditional_copies_moves_without_them(bucket_of):
    bucket = bucket_of("moto")
    bucket.put("cup.jpg")
    members = bucket.client.meta.service_model.operation_model("CopyObject").input_shape.members
    condition = members.pop("IfNoneMatch")
    try:
        assert opened(bucket).move_done(only(bucket)) == f"{bucket.url}/done/cup.jpg"
    finally:
        members["IfNoneMatch"] = condition
    assert bucket.files() == {"done/cup.jpg": b"x"}


@pytest.mark.parametrize("operation", ["HeadObject", "CopyObject", "DeleteObject"])
def test_a_refused_move_is_told_and_loses_nothing(bucket_of, operation):
    bucket = bucket_of("moto")
    bucket.put("cup.jpg")
    file = only(bucket)
    bucket.client.meta.events.register(
        f"before-send.s3.{operation}", lambda request, **_: answer(request.url, 403, "AccessDenied")
    )
    told = rf"cannot (read|copy|delete) {bucket.url}/cup.jpg.*(access denied|403)"
    with pytest.raises(StoreError if operation == "HeadObject" else StoreAccessError, match=told):
        opened(bucket).move_done(file)
    assert bucket.files()["cup.jpg"] == b"x"


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = ["a b+c%20d%.jpg", "ü'\"é 猫.jpg", "a&b=c?d#e.jpg", "x;y:z,@!$()*.jpg", "[a]{b}^`~c|<d>.jpg", "e\u0301.jpg"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=posix) for name in NAMES])
def test_every_name_is_found_and_moves(place, name):
    below = f"an {name} folder/{name}"
    for data in (b"one", b"two"):
        place.put(below, data)
        file = only(place)
        assert (file.below, file.location) == (below, f"{place.url}/{below}")
        assert opened(place).move_done(file) is not None
    assert sorted(place.files().values()) == [b"one", b"two"]
    assert all(each.startswith(f"done/an {name} folder/") for each in place.files())


one_client = cache(s3)
segments = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=20)


@posix
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(segments)
def test_every_visible_name_of_an_image_is_found_and_moves(moto, tmp_path_factory, segment):
    disk = Disk(tmp_path_factory.mktemp("any") / "inbox")
    for place in (disk, Bucket(one_client(moto), f"s3://inboxes/{disk.folder.parent.name}/inbox")):
        place.put(f"x{segment}.jpg", b"data")
        file = only(place)
        assert opened(place).move_done(file) == f"{place.url}/done/x{segment}.jpg"
        assert place.files() == {f"done/x{segment}.jpg": b"data"}


@posix
def test_the_longest_name_of_a_disk_moves_too(tmp_path):
    place = Disk(tmp_path / "inbox")
    name = "猫" * 83 + "x.jpg"
    assert len(name.encode()) == 254
    for data in (b"one", b"two", b"three"):
        place.put(name, data)
        assert opened(place).move_done(only(place))
    assert len(place.files()) == 3


# --- the disk ---------------------------------------------------------------------------------------------------------


@posix
def test_links_are_neither_followed_nor_taken(tmp_path):
    place = Disk(tmp_path / "inbox")
    place.put("a/cup.jpg")
    (place.folder / "a" / "up").symlink_to(place.folder)
    (place.folder / "b.jpg").symlink_to(place.folder / "a" / "cup.jpg")
    (place.folder / "broken.jpg").symlink_to("nowhere")
    os.mkfifo(place.folder / "pipe.jpg")
    found = look(place)
    assert [file.below for file in found.settled] == ["a/cup.jpg"]
    assert found.ignored == ("a/up", "b.jpg", "broken.jpg", "pipe.jpg")


@posix
def test_the_inbox_itself_may_be_a_link_or_hidden(tmp_path, monkeypatch):
    place = Disk(tmp_path / ".inbox")
    place.put("cup.jpg")
    (tmp_path / "link").symlink_to(place.folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given_as in ("link", "./link/", "~/link", (tmp_path / "link").as_uri()):
        (file,) = open_inbox(given_as, no_s3).look(10, lambda _: None).settled
        assert file.location == str(tmp_path / "link" / "cup.jpg")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_cannot_be_written_down_is_told(tmp_path):
    place = Disk(tmp_path / "inbox")
    (place.folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    assert opened(place).look(10, no_pause).ignored == ("caf\\udce9.jpg",)
    place.put("cup.jpg")
    (place.folder / os.fsdecode(b"caf\xe9")).mkdir()
    (place.folder / os.fsdecode(b"caf\xe9") / "mug.jpg").write_bytes(b"x")
    (place.folder / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"x")
    found = look(place)
    assert [file.below for file in found.settled] == ["cup.jpg"]
    assert found.ignored == ("caf\\udce9.jpg", "caf\\udce9.txt", "caf\\udce9/mug.jpg")
    assert found.unreadable == tuple(f"caf\\udce9{each}.jpg: its name is not UTF-8; rename it" for each in ("", "/mug"))


def test_an_inbox_that_is_none_is_told_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "inbox").mkdir()
    (tmp_path / "cup.jpg").touch()

    def told(place: str) -> str:
        with pytest.raises(ConfigurationError) as caught:
            open_inbox(place, no_s3)
        return str(caught.value)

    todo = "create the folder or correct its path"
    missing, here = str(tmp_path / "inbx"), str(tmp_path / "x" / "y")
    assert told(missing) == f"inbox: {missing} does not exist (did you mean inbox?); {todo}"
    assert told(here) == f"inbox: {here} does not exist (looked in {tmp_path / 'x'}); {todo}"
    file = str(tmp_path / "cup.jpg")
    assert told(file) == f"inbox: {file} is a file; name the folder that it is in"
    assert re.match(
        r"inbox: unsupported location 'http://b.example/in': use s3://bucket/prefix", told("http://b.example/in")
    )
    assert told("").startswith("inbox: unsupported location ''")
    assert told("~nobody-here/in").startswith("inbox: unsupported location '~nobody-here/in'")
    assert told("s3://").startswith("inbox: 's3://' is not an S3 address")
    assert "cannot be read" in told("x" * 300)


def test_an_inbox_that_goes_away_is_no_empty_one(tmp_path):
    place = Disk(tmp_path / "inbox")
    inbox = opened(place)
    place.folder.rmdir()
    with pytest.raises(StoreError, match=rf"cannot read the inbox {re.escape(place.url)}: No such file.*; check"):
        inbox.look(10, no_pause)


def test_folders_and_files_that_go_away_while_they_are_listed_are_gone(tmp_path, monkeypatch):
    place = Disk(tmp_path / "inbox")
    for below in ("cup.jpg", "gone.jpg", "sub/mug.jpg"):
        place.put(below)
    real = Path.lstat

    def lstat(self: Path) -> os.stat_result:
        if self.name == "gone.jpg":
            self.unlink(missing_ok=True)
        facts = real(self)
        if self.name == "sub":
            (self / "mug.jpg").unlink()
            self.rmdir()
        return facts

    with monkeypatch.context() as patch:
        patch.setattr(Path, "lstat", lstat)
        assert settled(place) == ["cup.jpg"]


def refusing(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """A folder that this user may not list, though root may list each."""
    real = os.scandir

    def scandir(which: Any) -> Any:
        if str(which) == str(path):
            raise PermissionError(13, "Permission denied", str(which))
        return real(which)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_folder_in_it_that_cannot_be_listed_is_told_and_stands_in_no_others_way(tmp_path, monkeypatch):
    place = Disk(tmp_path / "inbox")
    for below in ("a/cup.jpg", "sub/deep/mug.jpg", "sub/pot.jpg", "z.jpg"):
        place.put(below)
    with monkeypatch.context() as patch:
        refusing(patch, place.folder / "sub" / "deep")
        found = look(place)
    assert [file.below for file in found.settled] == ["a/cup.jpg", "sub/pot.jpg", "z.jpg"]
    assert found.ignored == ("sub/deep",)
    assert found.unreadable == ("sub/deep: it cannot be read: Permission denied; check its owner and mode",)
    assert len(settled(place)) == 4


def test_an_inbox_of_which_nothing_else_is_there_is_told_too(tmp_path, monkeypatch):
    place = Disk(tmp_path / "inbox")
    place.put("sub/cup.jpg")
    with monkeypatch.context() as patch:
        refusing(patch, place.folder / "sub")
        assert opened(place).look(10, no_pause).ignored == ("sub",)


def test_an_inbox_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    place = Disk(tmp_path / "inbox")
    place.put("sub/cup.jpg")
    with monkeypatch.context() as patch:
        refusing(patch, place.folder)
        with pytest.raises(StoreError, match=r"cannot read the inbox .*: Permission denied; check the owner and mode"):
            opened(place).look(10, no_pause)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX only")
def test_real_permissions_hide_what_they_hide_and_nothing_else():
    with tempfile.TemporaryDirectory() as name:  # one that everybody may enter
        Path(name).chmod(0o755)
        place = Disk(Path(name) / "inbox")
        for below in ("cup.jpg", "closed/mug.jpg", "names only/pot.jpg", "open/bowl.jpg"):
            place.put(below)
        (place.folder / "closed").chmod(0o000)
        (place.folder / "names only").chmod(0o444)
        root = os.geteuid()
        if root == 0:
            os.seteuid(65534)
        try:
            found = look(place)
        finally:
            os.seteuid(root)
            for each in ("closed", "names only"):
                (place.folder / each).chmod(0o755)
    assert [file.below for file in found.settled] == ["cup.jpg", "open/bowl.jpg"]
    assert found.ignored == ("closed", "names only/pot.jpg")
    assert [line.partition(": ")[0] for line in found.unreadable] == list(found.ignored)


def test_a_move_that_the_disk_refuses_is_told_and_loses_nothing(tmp_path, monkeypatch):
    place = Disk(tmp_path / "inbox")
    place.put("cup.jpg")
    file = only(place)
    place.put("done", b"a file, where a folder should be")
    with pytest.raises(StoreError, match=r"cannot move .*cup\.jpg to .*done.*: File exists; check the folder"):
        opened(place).move_done(file)
    place.remove("done")

    def refuse(self: Path, target: Path) -> NoReturn:
        raise OSError(18, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(StoreError, match=r"Invalid cross-device link; .* on one disk"):
            opened(place).move_done(file)
    assert place.files() == {"cup.jpg": b"x"}


def test_a_move_that_stops_half_way_says_where_the_file_is(tmp_path, monkeypatch):
    place = Disk(tmp_path / "inbox")
    place.put("cup.jpg", b"a cup")
    file = only(place)

    def refuse(self: Path, mode: str) -> NoReturn:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(StoreError, match=r"done/moving-\w+\.jpg to .*No space left") as caught:
            opened(place).move_done(file)
    ((below, data),) = place.files().items()
    assert below in str(caught.value)
    assert data == b"a cup"


def test_an_inbox_on_disk_does_not_load_boto3(tmp_path):
    code = f"""
import sys, prefect_segmind.inbox.open_inbox as i
i.open_inbox({str(tmp_path)!r}, None).look(0)
print([name for name in ("boto3", "botocore", "prefect") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- buckets ----------------------------------------------------------------------------------------------------------


def test_a_prefix_is_a_folder_and_not_the_start_of_a_name(bucket):
    bucket.put("cup.jpg")
    beside = Bucket(bucket.client, f"{bucket.url}-old")
    beside.put("x.jpg")
    for url in (bucket.url, f"{bucket.url}/", f"S3{bucket.url[2:]}"):
        found = open_inbox(url, bucket.s3).look(0, lambda _: None)
        assert [file.location for file in found.settled] == [f"{bucket.url}/cup.jpg"]


def test_markers_of_folders_are_nothing(bucket_of):
    bucket = bucket_of("moto")
    for below in ("", "sub/", "sub/cup.jpg"):
        bucket.put(below)
    assert look(bucket).ignored == ()
    assert settled(bucket) == ["sub/cup.jpg"]


def test_a_whole_bucket_may_be_an_inbox(moto):
    client = s3(moto)
    client.create_bucket(Bucket="whole")
    bucket = Bucket(client, "s3://whole")
    bucket.prefix = ""
    bucket.put("cup.jpg")
    assert only(bucket).location == "s3://whole/cup.jpg"
    assert opened(bucket).move_done(only(bucket)) == "s3://whole/done/cup.jpg"
    assert bucket.files() == {"done/cup.jpg": b"x"}


def test_more_than_a_page_is_read(bucket_of):
    bucket = bucket_of("moto")
    for number in range(7):
        bucket.put(f"{number}.jpg")
    asked: list[Any] = []

    def two_a_page(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        asked.append(params)
        return {**params, "MaxKeys": 2}

    bucket.client.meta.events.register("provide-client-params.s3.ListObjectsV2", two_a_page)
    assert settled(bucket) == [f"{number}.jpg" for number in range(7)]
    assert len(asked) == 2 * 4


def test_an_object_of_several_parts_moves(bucket_of):
    bucket = bucket_of("moto")
    what = {"Bucket": bucket.bucket, "Key": f"{bucket.prefix}cup.jpg"}
    upload = bucket.client.create_multipart_upload(**what)["UploadId"]
    etag = bucket.client.upload_part(**what, UploadId=upload, PartNumber=1, Body=b"a cup")["ETag"]
    parts = {"Parts": [{"ETag": etag, "PartNumber": 1}]}
    bucket.client.complete_multipart_upload(**what, UploadId=upload, MultipartUpload=parts)
    assert only(bucket).version.endswith("-1")
    opened(bucket).move_done(only(bucket))
    assert bucket.files() == {"done/cup.jpg": b"a cup"}


def test_a_missing_bucket_is_told_and_never_an_empty_inbox(bucket):
    inbox = open_inbox("s3://no-such-bucket/inbox", bucket.s3)
    with pytest.raises(BucketNotFoundError, match="cannot list s3://no-such-bucket/inbox"):
        inbox.look(10, no_pause)


def test_a_server_that_is_down_is_told():
    inbox = open_inbox("s3://bucket/inbox", lambda: s3("http://127.0.0.1:1"))
    with pytest.raises(StoreUnreachableError):
        inbox.look(10, no_pause)
    with pytest.raises(StoreUnreachableError):
        inbox.move_done(InboxFile("s3://bucket/inbox/cup.jpg", "cup.jpg", "1 x"))
