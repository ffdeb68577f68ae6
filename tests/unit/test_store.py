"""What a store promises, tried on a real disk, on rclone's S3 server and on moto's (which honours conditions)."""

import errno
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import boto3
import httpx
import pytest
from botocore import exceptions as aws
from botocore.awsrequest import AWSResponse
from botocore.config import Config

from prefect_segmind.cli import check
from prefect_segmind.errors import (
    BucketNotFoundError,
    ConfigurationError,
    PreconditionFailedError,
    SegmindError,
    StoreAccessError,
    StoreCredentialsError,
    StoreError,
    StoreUnreachableError,
)
from prefect_segmind.inbox.open_inbox import open_inbox
from prefect_segmind.services import Services
from prefect_segmind.storage import s3
from prefect_segmind.storage.local import LocalStore
from prefect_segmind.storage.open_store import open_store
from prefect_segmind.storage.s3 import S3Store, credentials_expire_in, presign_uri, read, s3_client, split_uri
from prefect_segmind.storage.store import Conditions, Facts, Store
from tests.support.moto_server import moto_server
from tests.support.ports import free_port, listens
from tests.support.waiting import until
from tests.support.wire import Wire, http

KEY_ID, SECRET, BUCKET = "ACCESSKEY", "SECRETKEY123", "stores"
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")


def client(endpoint: str, *, key_id: str = KEY_ID, secret: str = SECRET, **settings: Any) -> Any:
    usual: Any = {"signature_version": "s3v4", "retries": {"total_max_attempts": 1}, "read_timeout": 5}
    config = Config(**usual | settings)
    pair = {"aws_access_key_id": key_id, "aws_secret_access_key": secret}
    return session().client("s3", endpoint_url=endpoint, config=config, **pair)  # type: ignore[call-overload]


@cache
def session() -> boto3.session.Session:
    """One for all clients of the tests: each reads botocore's models anew, which takes long."""
    return boto3.session.Session(region_name="us-east-1")


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [*os.environ]:
        if name.upper().startswith("AWS_") or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Checks keys and signatures; ignores conditions. Its endpoint and the folder behind its bucket."""
    binary = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if binary is None:
        pytest.skip("needs rclone")
    root, port = tmp_path_factory.mktemp("rclone"), free_port()
    (root / BUCKET / "many").mkdir(parents=True)  # before the start: rclone remembers for minutes what a folder holds
    for number in range(1005):
        (root / BUCKET / "many" / f"{number}.png").touch()
    command = [binary, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY_ID},{SECRET}"]
    command += ["--vfs-cache-mode", "off", "--config", os.devnull, str(root)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until(lambda: listens(port))
        yield f"http://127.0.0.1:{port}", root / BUCKET
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """Honours conditions; takes any key."""
    with moto_server() as endpoint:
        client(endpoint).create_bucket(Bucket=BUCKET)
        yield endpoint


@pytest.fixture(params=["disk", "rclone", "moto"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return LocalStore(tmp_path / "archive")
    endpoint = request.getfixturevalue(request.param)
    endpoint = endpoint if isinstance(endpoint, str) else endpoint[0]
    return S3Store(BUCKET, f"/tests/{tmp_path.name}/", client(endpoint))


SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
Handle = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Handle], str]]:
    """Start an HTTP server that answers every request by a function; gives its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(handle: Handle) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # answers `Expect: 100-continue`, for which botocore waits a second

            def log_message(self, *_: Any) -> None: ...

        for verb in ("GET", "PUT", "HEAD", "DELETE"):
            setattr(Handler, f"do_{verb}", handle)
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def refusing(status: int, code: str, message: str = "no") -> Handle:
    def handle(request: BaseHTTPRequestHandler) -> None:
        request.rfile.read(int(request.headers.get("Content-Length", 0)))
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode() if code else b""
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    return handle


# Every store


def test_what_is_put_is_what_is_got(store: Store) -> None:
    etag = store.put("summer/hät 1.png", b"\x00picture", "image/png")
    found = store.get("summer/hät 1.png")
    assert found is not None
    assert (found.data, found.etag) == (b"\x00picture", etag)
    assert 0 <= found.age < 10
    assert store.uri("summer/hät 1.png").replace(os.sep, "/") == f"{store.url}/summer/hät 1.png".replace(os.sep, "/")


def test_what_is_not_there_is_none(store: Store) -> None:
    assert store.get("nothing.json") is None
    assert not store.holds("nothing.json", b"")
    assert list(store.keys("")) == []


def test_a_put_replaces(store: Store) -> None:
    store.put("k", b"one", "text/plain")
    assert store.put("k", b"two", "text/plain") != store.put("k", b"three", "text/plain")
    found = store.get("k")
    assert found is not None
    assert found.data == b"three"


def test_if_absent_does_not_replace(store: Store) -> None:
    store.put("k", b"first", "text/plain", if_absent=True)
    with pytest.raises(PreconditionFailedError, match=r"k.*somebody else"):
        store.put("k", b"second", "text/plain", if_absent=True)
    assert store.holds("k", b"first")


def test_if_match_replaces_only_what_was_read(store: Store) -> None:
    old = store.put("k", b"old", "text/plain", if_absent=True)
    new = store.put("k", b"new", "text/plain", if_match=old)
    with pytest.raises(PreconditionFailedError, match="somebody else"):
        store.put("k", b"mine", "text/plain", if_match=old)
    with pytest.raises(PreconditionFailedError, match="somebody else"):
        store.put("gone", b"mine", "text/plain", if_match=new)
    assert store.holds("k", b"new")
    assert store.get("gone") is None


def test_holds_tells_content_of_the_same_size_apart(store: Store) -> None:
    store.put("k", b"abc", "text/plain")
    assert store.holds("k", b"abc")
    assert not store.holds("k", b"abd")
    assert not store.holds("k", b"abcd")


def test_the_facts_of_an_object_are_its_size_and_its_sha256_where_the_store_has_kept_that(store: Store) -> None:
    store.put("k", b"abc", "text/plain")
    facts = store.stat("k")
    assert facts is not None
    assert facts.size == 3
    assert facts.sha256 in (SHA256_OF_ABC, None)
    assert facts.are_of(3, SHA256_OF_ABC)
    assert not facts.are_of(4, SHA256_OF_ABC)
    assert facts.are_of(3, "0" * 64) == (facts.sha256 is None)
    assert store.stat("gone") is None


def test_keys_are_those_that_start_with_the_prefix(store: Store) -> None:
    for key in ("a/1.png", "a/1.json", "a/b/2.png", "ab.png", ".segmind/x.json"):
        store.put(key, b"x", "text/plain")
    assert sorted(store.keys("a/")) == ["a/1.json", "a/1.png", "a/b/2.png"]
    assert sorted(store.keys("a")) == ["a/1.json", "a/1.png", "a/b/2.png", "ab.png"]
    assert sorted(store.keys("a/1.p")) == ["a/1.png"]
    assert sorted(store.keys(".segmind/")) == [".segmind/x.json"]
    assert list(store.keys("nowhere/")) == []


@pytest.mark.parametrize("place", ["disk", "moto"])
def test_of_racing_threads_exactly_one_wins(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    racers = 8
    if place == "disk":
        store: Store = LocalStore(tmp_path)
    else:
        store = S3Store(BUCKET, tmp_path.name, client(request.getfixturevalue("moto"), max_pool_connections=racers))
    assert store.conditional
    start = threading.Barrier(racers, timeout=60)

    def race(racer: int) -> int:
        won = 0
        for lap in range(10):
            start.wait()
            try:
                store.put(f"lap-{lap}", b"%d" % racer, "text/plain", if_absent=True)
            except PreconditionFailedError:
                continue
            won += 1
        return won

    with ThreadPoolExecutor(racers) as pool:
        assert sum(pool.map(race, range(racers))) == 10


@pytest.mark.parametrize("condition", ["if_absent", "if_match"])
def test_of_racing_processes_exactly_one_wins_on_disk(condition: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    etag = [store.put(f"lap-{lap}", b"old", "text/plain") for lap in range(30) if condition == "if_match"][:1]
    script = (
        "import os, sys, time\n"
        "from prefect_segmind.errors import PreconditionFailedError\n"
        "from prefect_segmind.storage.local import LocalStore\n"
        "store, start, etag = LocalStore(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]\n"
        "condition = dict(if_match=etag[0]) if etag else dict(if_absent=True)\n"
        "time.sleep(max(0, start - time.time()))\n"
        "for lap in range(30):\n"
        "    try: store.put(f'lap-{lap}', str(os.getpid()).encode(), 'text/plain', **condition)\n"
        "    except PreconditionFailedError: continue\n"
        "    print(lap)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(time.time() + 1), *etag]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    won = [int(lap) for racer in racers for lap in racer.communicate(timeout=60)[0].split()]
    assert sorted(won) == list(range(30))


# Opening


def test_opening_a_store_on_disk_does_not_load_boto3() -> None:
    script = """
import sys
from prefect_segmind.storage.open_store import open_store
open_store("x")
print("boto3" in sys.modules)
"""
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "False"


def test_folders_and_buckets_are_opened_by_their_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moto: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for address in ("~/my archive", "my archive", str(tmp_path / "my archive"), (tmp_path / "my archive").as_uri()):
        assert open_store(address).url == str(tmp_path / "my archive")
    assert open_store(f"{tmp_path.as_uri()}/a #1?").url == str(tmp_path / "a #1?")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for address, url in {f"s3://{BUCKET}": f"s3://{BUCKET}", f"s3://{BUCKET}/a/#1?/": f"s3://{BUCKET}/a/#1?"}.items():
        assert open_store(address).url == url
    opened = open_store(f"s3://{BUCKET}", client(moto))
    assert opened.uri("k") == f"s3://{BUCKET}/k"
    opened.put("at/the/root", b"x", "text/plain")
    assert list(opened.keys("at/")) == ["at/the/root"]


@pytest.mark.parametrize("address", ["", "ftp://host/x", "https://b.s3.amazonaws.com/x", "file://host/x", "s3:bucket"])
def test_other_addresses_are_refused_with_what_is_allowed(address: str) -> None:
    with pytest.raises(ConfigurationError, match="s3://bucket"):
        open_store(address)


def test_an_address_whose_quotes_have_become_part_of_it_is_no_folder() -> None:
    for address in ('"s3://bucket/pictures"', "'pictures'"):
        with pytest.raises(ConfigurationError, match="remove the quotes"):
            open_store(address)


@posix
def test_a_home_that_nobody_has_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigurationError, match="unsupported location"):
        open_store("~nobody-of-this-name/archive")


@pytest.mark.parametrize("uri", ["bucket/key", "s3://", "s3:///key", "s3:/bucket/key", "s3://B!/key", "https://b/k"])
def test_a_malformed_s3_address_is_refused(uri: str) -> None:
    with pytest.raises(ConfigurationError, match=r"write s3://bucket/key"):
        split_uri(uri)


def test_a_key_is_taken_as_it_is() -> None:
    assert split_uri("s3://b-1.x/a b/ü?#%20.png") == ("b-1.x", "a b/ü?#%20.png")
    assert split_uri("s3://bucket") == split_uri("s3://bucket/") == ("bucket", "")


# Disk


@pytest.mark.parametrize(
    "key",
    ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/", "a\0b", ".segmind/.lock", "a/.part-x"],
)
def test_a_key_cannot_leave_the_folder_or_touch_what_is_not_an_object(key: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for call in (store.get, store.uri, lambda key: store.put(key, b"x", "text/plain")):
        with pytest.raises(StoreError, match="is not a key"):
            call(key)
    with pytest.raises(StoreError, match="is not a key"):
        list(store.keys("../"))


def test_locks_and_unfinished_files_are_no_objects(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/k", b"x", "text/plain")
    (tmp_path / "a" / ".part-0123").write_bytes(b"half")
    assert (tmp_path / ".segmind" / ".lock").exists()
    assert list(store.keys("")) == ["a/k"]


def test_the_age_in_a_folder_goes_by_the_clock_that_dates_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path / "archive")
    store.put(".segmind/k", b"1", "text/plain")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)  # this machine's, which somebody has set
    found = store.get(".segmind/k")
    assert found is not None
    assert found.age < 60
    left = sorted(each.name for each in (tmp_path / "archive").rglob("*") if each.is_file())
    assert left == [".lock", "k"], "nothing is left of asking"


@posix
def test_a_folder_is_asked_for_the_time_only_where_an_age_is_needed_and_only_where_it_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.put(".segmind/k", b"1", "text/plain")
    opened, fsync = list[int](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: opened.append(descriptor) or fsync(descriptor))  # type: ignore[func-returns-value]
    found = store.get(".segmind/k")
    assert found is not None
    assert opened == []
    assert found.age < 60
    assert len(opened) == 1
    shutil.rmtree(tmp_path / ".segmind")
    assert found.age < 60


def test_the_age_on_disk_is_never_negative(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("k", b"x", "text/plain")
    for shift, low, high in ((-100, 99, 110), (100, 0, 0)):
        os.utime(tmp_path / "k", (0, time.time() + shift))
        found = store.get("k")
        assert found is not None
        assert low <= found.age <= high


@posix
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    LocalStore(tmp_path).put("a/k", b"before", "text/plain")
    script = (
        "import resource, sys\n"
        "from prefect_segmind.storage.local import LocalStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: LocalStore(sys.argv[1]).put('a/k', b'x' * 5000, 'text/plain')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    said = subprocess.check_output([sys.executable, "-c", script, str(tmp_path)], text=True)
    assert said.startswith("StoreError ")
    assert str(tmp_path / "a" / "k") in said
    assert "free some space" in said
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["k"]
    assert (tmp_path / "a" / "k").read_bytes() == b"before"


@posix
def test_a_folder_that_may_not_be_written_or_listed_is_no_empty_folder(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("closed/k", b"x", "text/plain")
    code = (
        "import os, sys\n"
        "from prefect_segmind.storage.local import LocalStore\n"
        "store = LocalStore(sys.argv[1])\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "for call in (lambda: store.get('closed/k'), lambda: list(store.keys('')),\n"
        "             lambda: store.put('closed/n', b'', 'text/plain')):\n"
        "    try: print('got', call())\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    (tmp_path / "closed").chmod(0)
    above = [
        folder for folder in tmp_path.parents if folder.owner() == tmp_path.owner() and folder.stat().st_mode & 1 == 0
    ]
    modes = {folder: folder.stat().st_mode for folder in above}
    try:
        for folder in [tmp_path, *above]:
            folder.chmod(0o755)
        said = subprocess.check_output([sys.executable, "-c", code, str(tmp_path)], text=True).splitlines()
    finally:
        (tmp_path / "closed").chmod(0o700)
        for folder, mode in modes.items():
            folder.chmod(mode)
    assert [line.split()[0] for line in said] == ["StoreAccessError"] * 3
    assert all(str(tmp_path / "closed") in line and "Permission denied" in line for line in said)


def test_other_failures_of_the_disk_name_the_path(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"x", "text/plain")
    with pytest.raises(StoreError, match="cannot write"):
        store.put("a/b", b"x", "text/plain")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="cannot read"):
        store.get("folder")


@posix
def test_a_mount_that_cannot_sync_folders_takes_pictures_and_a_broken_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, fsync, number = LocalStore(tmp_path), os.fsync, errno.EINVAL

    def only_files(descriptor: int) -> None:
        if Path(f"/dev/fd/{descriptor}").is_dir():
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    store.put("a/k", b"x", "text/plain")
    number = errno.EIO
    with pytest.raises(StoreError, match="cannot write"):
        store.put("a/k", b"y", "text/plain")


def test_a_folder_that_goes_away_while_listed_is_no_failure(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for key in ("a/1", "b/1"):
        store.put(key, b"x", "text/plain")
    keys = store.keys("")
    next(keys)
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    shutil.rmtree(tmp_path / "b", ignore_errors=True)
    assert list(keys) == []


# S3


@pytest.mark.parametrize("server", ["rclone", "moto"])
def test_caches_are_told_what_the_writer_says(server: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    endpoint = request.getfixturevalue(server)
    made = client(endpoint if isinstance(endpoint, str) else endpoint[0])
    store = S3Store(BUCKET, f"caches-{tmp_path.name}", made)

    def told() -> str | None:
        head = made.head_object(Bucket=BUCKET, Key=f"caches-{tmp_path.name}/k")
        assert head["ContentType"] == "image/png"
        return head.get("CacheControl")

    etag = store.put("k", b"1", "image/png", if_absent=True, cache_control="no-cache")
    assert told() == "no-cache"
    store.put("k", b"2", "image/png", if_match=etag, cache_control="max-age=60")
    assert told() == "max-age=60"
    store.put("k", b"3", "image/png", cache_control="public")
    assert told() == "public"
    store.put("k", b"4", "image/png")
    assert told() is None


def test_whether_conditions_are_honoured_is_found_out_once(rclone: tuple[str, Path], moto: str) -> None:
    for endpoint, honoured in ((rclone[0], False), (moto, True)):
        store = S3Store(BUCKET, "probe", client(endpoint))
        puts: list[Any] = []
        store._client.meta.events.register("before-send.s3.PutObject", lambda request, puts=puts, **_: puts.append(1))
        assert (store.conditions, store.conditions) == ((honoured, honoured), (honoured, honoured))
        assert store.conditional is honoured
        assert len(puts) == 4, "of each condition one that must not be refused, and one that must be"
        assert S3Store(BUCKET, "probe", client(endpoint)).conditions == store.conditions


def picky_about(endpoint: str, header: str, refusal: tuple[int, str] | None) -> Handle:
    """Forwards to a server that honours all conditions, but refuses writes with this one, or ignores it."""

    def forward(request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in request.headers.items() if name != "Expect"}
        if request.command == "PUT" and headers.pop(header, None) is not None and refusal is not None:
            answer = f"<Error><Code>{refusal[1]}</Code><Message>no</Message></Error>".encode()
            request.send_response(refusal[0])
            request.send_header("Content-Length", str(len(answer)))
            request.end_headers()
            request.wfile.write(answer)
            return
        behind = HTTPConnection(urlsplit(endpoint).netloc)
        behind.request(request.command, request.path, body, headers)
        found = behind.getresponse()
        content = found.read()
        behind.close()
        request.send_response_only(found.status)
        for name, value in found.getheaders():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content)

    return forward


@pytest.mark.parametrize(
    ("header", "refusal"),
    [
        ("If-None-Match", None),
        ("If-None-Match", (501, "NotImplemented")),
        ("If-Match", None),
        ("If-Match", (501, "NotImplemented")),
        ("If-Match", (412, "PreconditionFailed")),  # always, though it holds
    ],
)
def test_a_server_that_honours_one_condition_and_not_the_other_is_known_as_that_and_is_used_as_that(
    header: str, refusal: tuple[int, str] | None, moto: str, serve: Callable[[Handle], str], tmp_path: Path
) -> None:
    store = S3Store(BUCKET, tmp_path.name, client(serve(picky_about(moto, header, refusal))))
    assert store.conditions == (header != "If-None-Match", header != "If-Match")
    assert not store.conditional
    assert header in str(store.conditions.caution)
    etag = store.put("k", b"1", "text/plain", if_absent=True)
    with pytest.raises(PreconditionFailedError):
        store.put("k", b"2", "text/plain", if_absent=True)
    later = store.put("k", b"2", "text/plain", if_match=etag)
    with pytest.raises(PreconditionFailedError):
        store.put("k", b"3", "text/plain", if_match=etag)
    assert store.put("k", b"3", "text/plain", if_match=later)


def test_what_a_store_does_not_honour_is_said_with_what_not_to_do() -> None:
    cautions = [Conditions(*each).caution for each in product((True, False), repeat=2)]
    assert cautions[0] is None
    assert len(set(cautions)) == 4
    assert all("two processes at once" in each for each in cautions if each)


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_a_server_that_does_not_know_the_conditions_does_not_honour_them(
    status: int, code: str, moto: str, serve: Callable[[Handle], str], tmp_path: Path
) -> None:
    both = picky_about(serve(picky_about(moto, "If-Match", (status, code))), "If-None-Match", (status, code))
    store = S3Store(BUCKET, tmp_path.name, client(serve(both)))
    assert store.conditions == (False, False)


def test_a_probe_that_is_denied_is_an_error(serve: Callable[[Handle], str]) -> None:
    with pytest.raises(StoreAccessError):
        _ = S3Store(BUCKET, "", client(serve(refusing(403, "AccessDenied")))).conditional


def test_a_won_claim_whose_answer_was_lost_is_won(moto: str, serve: Callable[[Handle], str], tmp_path: Path) -> None:
    lost: list[str] = []

    def forward(request: BaseHTTPRequestHandler) -> None:
        behind = HTTPConnection(urlsplit(moto).netloc)
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        behind.request(
            request.command,
            request.path,
            body,
            {name: value for name, value in request.headers.items() if name != "Expect"},
        )
        answer = behind.getresponse()
        content = answer.read()
        behind.close()
        if request.command == "PUT" and "/claim" in request.path and not lost:
            lost.append(request.path)
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        request.send_response_only(answer.status)
        for name, value in answer.getheaders():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content)

    store = S3Store(BUCKET, tmp_path.name, client(serve(forward), retries={"mode": "standard", "max_attempts": 3}))
    etag = store.put("claim", b"mine", "text/plain", if_absent=True)
    assert lost
    lost.clear()
    store.put("claim", b"mine, renewed", "text/plain", if_match=etag)
    assert lost
    assert store.holds("claim", b"mine, renewed")


def test_a_folder_has_one_address_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(tmp_path)
    names = ["real", "./real/", "link", "link/", "link/../real", str(tmp_path / "link"), real.as_uri()]
    assert {open_store(each).url for each in names} == {str(real)}
    assert open_store("link").uri("a.png") == str(tmp_path / "link" / "a.png"), "an object is named as asked for"
    assert open_store("new/deep").url == str(tmp_path / "new" / "deep"), "though it does not exist yet"


def test_what_is_in_the_way_of_a_file_is_known_before_it_is_written(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "archive")
    for key in ("a/b.png", "a/b/c.png", "new/deep/c.png"):
        assert store.in_the_way(key) is None
    store.put("a/b.png", b"x", "image/png")
    (tmp_path / "archive" / "broken").symlink_to("nowhere")
    obstacles = {
        "a/b.png/c.png": "archive/a/b.png is no folder",
        "a/b.png/deep/c.png": "archive/a/b.png is no folder",
        "broken/c.png": "archive/broken is no folder",
        "a": "archive/a is a folder",
        f"{'x' * 300}/c.png": "File name too long",
    }
    for key, why in obstacles.items():
        assert why in (store.in_the_way(key) or ""), key
        with pytest.raises(StoreError):
            store.put(key, b"x", "image/png")
    (tmp_path / "file").write_bytes(b"")
    assert "file is no folder" in (LocalStore(tmp_path / "file" / "archive").in_the_way("a.png") or "")
    assert S3Store(BUCKET, "", client("http://127.0.0.1:9")).in_the_way("a.png/b.png") is None


def test_a_disk_that_takes_names_that_differ_only_in_case_for_one_is_known(tmp_path: Path) -> None:
    assert not LocalStore(tmp_path / "archive").folds_case
    (tmp_path / "archive").mkdir()
    (tmp_path / "ARCHIVE").symlink_to("archive")  # as such a disk shows it
    assert LocalStore(tmp_path / "archive").folds_case
    assert not S3Store(BUCKET, "", client("http://127.0.0.1:9")).folds_case


def test_a_bucket_has_one_address_however_it_is_named() -> None:
    names = ["s3://bucket/p", "s3://bucket/p/", "S3://bucket/p", "s3://bucket//p//"]
    assert {open_store(each, client("http://127.0.0.1:9")).url for each in names} == {"s3://bucket/p"}
    assert {open_store(each, client("http://127.0.0.1:9")).url for each in ("s3://bucket", "s3://bucket/")} == {
        "s3://bucket"
    }


class Conflicts:
    """A server that refuses the next writes of `k` because of another write in progress."""

    def __init__(self, refused: int, object: bytes | None = None) -> None:
        self.refused, self.object, self.asked = refused, object, 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if request.command == "PUT" and request.path.endswith("/k"):
            self.asked += 1
            if self.asked <= self.refused:
                return refusing(409, "ConditionalRequestConflict")(request)
            self.object = request.rfile.read(int(request.headers["Content-Length"]))
        elif request.command == "PUT":
            return refusing(412, "PreconditionFailed")(request)
        elif self.object is None:
            return refusing(404, "NoSuchKey")(request)
        request.send_response(200)
        body = b"" if request.command == "PUT" else self.object or b""
        headers = {"ETag": '"e"', "Content-Length": str(len(body)), "Last-Modified": "Wed, 01 Jan 2020 00:00:00 GMT"}
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)
        return None


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_segmind.storage.s3._CONFLICT_WAITS", (0.0, 0.0))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("if_match", [None, '"e"'])
def test_a_write_that_another_one_in_progress_keeps_out_is_tried_again_while_its_condition_holds(
    serve: Callable[[Handle], str], if_match: str | None
) -> None:
    server = Conflicts(2, None if if_match is None else b"before")
    store = S3Store(BUCKET, "", client(serve(lambda request: server.answer(request))))
    assert store.put("k", b"x", "text/plain", if_absent=if_match is None, if_match=if_match) == '"e"'
    assert (server.asked, server.object) == (3, b"x")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("if_match", [None, '"another"'])
def test_a_write_that_another_one_in_progress_has_come_before_has_lost(
    serve: Callable[[Handle], str], if_match: str | None
) -> None:
    server = Conflicts(1, b"theirs")
    with pytest.raises(PreconditionFailedError):
        S3Store(BUCKET, "", client(serve(lambda request: server.answer(request)))).put(
            "k", b"x", "text/plain", if_absent=if_match is None, if_match=if_match
        )
    assert server.object == b"theirs"


@pytest.mark.usefixtures("impatient")
def test_a_write_that_others_keep_out_for_good_is_an_error_and_not_a_condition_lost(
    serve: Callable[[Handle], str],
) -> None:
    server = Conflicts(9)
    with pytest.raises(StoreError, match="again and again") as error:
        S3Store(BUCKET, "", client(serve(lambda request: server.answer(request)))).put(
            "k", b"x", "text/plain", if_absent=True
        )
    assert not isinstance(error.value, PreconditionFailedError)
    assert (server.asked, server.object) == (3, None)


def test_the_age_goes_by_the_clock_of_the_server(serve: Callable[[Handle], str]) -> None:
    written = "Wed, 01 Jan 2020 00:00:00 GMT"
    date = ["Wed, 01 Jan 2020 00:00:30 GMT"]

    def handle(request: BaseHTTPRequestHandler) -> None:
        request.send_response_only(200)
        headers = {"Last-Modified": written, "ETag": '"e"', "Content-Length": "1"} | ({"Date": date[0]} if date else {})
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(b"x")

    store = S3Store(BUCKET, "", client(serve(handle)))
    ages = []
    for stamp in (["Wed, 01 Jan 2020 00:00:30 GMT"], ["Tue, 31 Dec 2019 00:00:00 GMT"], []):
        date[:] = stamp
        found = store.get("k")
        assert found is not None
        ages.append(found.age)
    assert ages[:2] == [30, 0]
    assert ages[2] > 1e8


def test_many_keys_are_listed_page_by_page(rclone: tuple[str, Path]) -> None:
    keys = S3Store(BUCKET, "many", client(rclone[0])).keys("")
    assert next(keys).endswith(".png")
    assert len(set(keys)) == 1004


def test_folder_markers_are_no_keys(moto: str) -> None:
    store = S3Store(BUCKET, "marked", client(moto))
    client(moto).put_object(Bucket=BUCKET, Key="marked/", Body=b"")
    client(moto).put_object(Bucket=BUCKET, Key="marked/a/", Body=b"")
    store.put("a/k", b"x", "text/plain")
    assert list(store.keys("")) == ["a/k"]


def test_content_changed_behind_the_server_is_noticed(rclone: tuple[str, Path]) -> None:
    store = S3Store(BUCKET, "tampered", client(rclone[0]))
    store.put("k", b"abc", "text/plain")
    (rclone[1] / "tampered" / "k").write_bytes(b"abd")
    os.utime(rclone[1] / "tampered" / "k", (1e9, 1e9))
    assert not store.holds("k", b"abc")


def test_an_object_of_several_parts_is_known_by_its_size(moto: str) -> None:
    s3_api, where = client(moto), {"Bucket": BUCKET, "Key": "parts"}
    upload = s3_api.create_multipart_upload(**where)["UploadId"]
    part = s3_api.upload_part(**where, UploadId=upload, PartNumber=1, Body=b"abc")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    s3_api.complete_multipart_upload(**where, UploadId=upload, MultipartUpload=parts)
    store = S3Store(BUCKET, "", s3_api)
    assert store.holds("parts", b"abc")
    assert not store.holds("parts", b"abcd")


@pytest.mark.parametrize(("calculation", "sent"), [("when_supported", True), ("when_required", False)])
def test_a_put_sends_its_sha256_unless_the_aws_configuration_says_not_to(
    calculation: str, sent: bool, moto: str
) -> None:
    store = S3Store(BUCKET, "sums", client(moto, request_checksum_calculation=calculation))
    store.put(calculation, b"abc", "text/plain")
    head = client(moto).head_object(Bucket=BUCKET, Key=f"sums/{calculation}", ChecksumMode="ENABLED")
    assert ("ChecksumSHA256" in head) is sent
    assert store.holds(calculation, b"abc")


def test_a_damaged_object_is_not_handed_on(serve: Callable[[Handle], str]) -> None:
    def handle(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        headers = {"Last-Modified": "Wed, 01 Jan 2020 00:00:00 GMT", "ETag": '"e"', "Content-Length": "1"}
        headers["x-amz-checksum-sha256"] = "LXEWQrcmsEQBYnyp+6wy9chTD7GQPMTbAiWHF5IaSIE="
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(b"y")

    with pytest.raises(StoreError, match="damaged"):
        S3Store(BUCKET, "", client(serve(handle))).get("k")


def test_half_an_object_is_not_handed_on(serve: Callable[[Handle], str]) -> None:
    def handle(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        for name, value in {"Last-Modified": "Wed, 01 Jan 2020 00:00:00 GMT", "ETag": '"e"'}.items():
            request.send_header(name, value)
        request.send_header("Content-Length", "100")
        request.end_headers()
        request.wfile.write(b"half")
        request.close_connection = True

    with pytest.raises(StoreUnreachableError):
        S3Store(BUCKET, "", client(serve(handle))).get("k")


# Single objects and signed addresses


def test_a_source_is_read_up_to_a_limit(rclone: tuple[str, Path]) -> None:
    S3Store(BUCKET, "", client(rclone[0])).put("source.png", b"x" * 100, "image/png")
    assert read(f"s3://{BUCKET}/source.png", client(rclone[0]), 100) == b"x" * 100
    with pytest.raises(StoreError, match="100 bytes, more than the 99"):
        read(f"s3://{BUCKET}/source.png", client(rclone[0]), limit=99)
    with pytest.raises(StoreError, match=r"missing\.png does not exist"):
        read(f"s3://{BUCKET}/missing.png", client(rclone[0]), 99)
    with pytest.raises(BucketNotFoundError):
        read("s3://no-such-bucket/missing.png", client(rclone[0]), 99)
    with pytest.raises(ConfigurationError, match="not an object"):
        read(f"s3://{BUCKET}", client(rclone[0]), 99)


@pytest.mark.parametrize("server", ["rclone", "moto"])
def test_an_object_is_listed_copied_and_deleted_by_its_address(
    server: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    endpoint = request.getfixturevalue(server)
    to = client(endpoint if isinstance(endpoint, str) else endpoint[0])
    root = f"s3://{BUCKET}/{tmp_path.name}"
    S3Store(BUCKET, tmp_path.name, to).put("a/ä #1.png", b"x" * 100, "image/png")
    source, target = f"{root}/a/ä #1.png", f"{root}/b.png"
    (listed,) = s3.list_objects(f"{root}/a/", to)
    assert (listed.key, listed.size) == (f"{tmp_path.name}/a/ä #1.png", 100)
    assert abs(listed.now - listed.modified) < 60
    seen = s3.stat(source, to)
    assert seen is not None
    assert (seen.key, seen.size, seen.etag) == (listed.key, listed.size, listed.etag)
    assert s3.exists(source, to)
    s3.copy(source, target, to, etag=listed.etag)
    assert read(target, to) == b"x" * 100
    s3.delete(source, to, etag=listed.etag)
    assert s3.stat(source, to) is None
    assert not s3.exists(source, to)
    assert [each.key for each in s3.list_objects(f"{root}/", to)] == [f"{tmp_path.name}/b.png"]
    with pytest.raises(ConfigurationError, match="not an object"):
        s3.delete(f"s3://{BUCKET}", to, etag=listed.etag)


def test_an_object_that_has_changed_is_not_deleted(moto: str, tmp_path: Path) -> None:
    to, store = client(moto), S3Store(BUCKET, tmp_path.name, client(moto))
    old = store.put("a", b"old", "text/plain").strip('"')
    new = store.put("a", b"new", "text/plain").strip('"')
    with pytest.raises(PreconditionFailedError):
        s3.delete(store.uri("a"), to, etag=old)
    assert list(store.keys("")) == ["a"]
    s3.delete(store.uri("a"), to, etag=new)
    assert list(store.keys("")) == []


def test_a_signed_address_opens_one_object_for_a_time(rclone: tuple[str, Path]) -> None:
    store = S3Store(BUCKET, "signed", client(rclone[0]))
    for key in ("mine ü.png", "other.png"):
        store.put(key, key.encode(), "image/png")
    short, url = (presign_uri(store.uri("mine ü.png"), client(rclone[0]), seconds) for seconds in (1, 60))
    assert httpx.get(url).content == "mine ü.png".encode()
    assert httpx.get(presign_uri(store.uri("other.png"), client(rclone[0]), 60)).content == b"other.png"
    head, _, query = url.partition("?")
    for tampered in (f"{head.rpartition('/')[0]}/other.png?{query}", url.replace("Expires=60", "Expires=6000"), head):
        assert httpx.get(tampered).status_code in (400, 403)
    time.sleep(2.1)
    assert httpx.get(short).status_code in (400, 403)


def test_an_old_signature_is_never_handed_out() -> None:
    with pytest.raises(ConfigurationError, match="s3v4"):
        presign_uri("s3://b1/k", client("http://127.0.0.1:1", signature_version="s3"), 60)


def profile(tmp_path: Path, *lines: str) -> None:
    (tmp_path / "aws-config").write_text("\n".join(["[default]", "region = eu-central-1", *lines]))


def test_at_aws_the_signed_address_names_the_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    profile(tmp_path)
    url = presign_uri("s3://pictures/k", s3_client(), 60)
    assert url.startswith("https://pictures.s3.eu-central-1.amazonaws.com/k?X-Amz-Algorithm=AWS4-HMAC-SHA256")
    profile(tmp_path, "s3 =", "    addressing_style = path")
    assert presign_uri("s3://pictures/k", s3_client(), 60).startswith(
        "https://s3.eu-central-1.amazonaws.com/pictures/k?"
    )


def test_the_aws_configuration_is_followed(
    rclone: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile(tmp_path, f"endpoint_url = {rclone[0]}")
    (tmp_path / "aws-credentials").write_text(
        f"[default]\naws_access_key_id={KEY_ID}\naws_secret_access_key={SECRET}\n"
    )
    with ThreadPoolExecutor(8) as pool:
        clients = list(pool.map(lambda _: s3_client(), range(3)))
    for made in clients:
        assert S3Store(BUCKET, "", made).get("nothing") is None
        assert credentials_expire_in(made) is None
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "nonsense")
    with pytest.raises(ConfigurationError, match="nonsense"):
        s3_client()


def credential_process(tmp_path: Path, prints: str, exits: int = 0) -> None:
    script = tmp_path / "credentials.py"
    script.write_text(f"import sys\nprint({prints!r})\nsys.exit({exits} and 'broken SECRETKEY123')\n")
    profile(tmp_path, f'credential_process = "{sys.executable}" "{script}"')


def given(expires_in: float) -> str:
    expiry = (datetime.now(UTC) + timedelta(seconds=expires_in)).isoformat()
    return json.dumps({"Version": 1, "AccessKeyId": KEY_ID, "SecretAccessKey": SECRET, "Expiration": expiry})


def test_how_long_the_credentials_live_is_known(
    rclone: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", rclone[0])
    credential_process(tmp_path, given(3600))
    made = s3_client()
    left = credentials_expire_in(made)
    assert left is not None
    assert 3500 < left <= 3600
    credential_process(tmp_path, given(500))  # inside botocore's refresh window, so a new one asks again
    left = credentials_expire_in(s3_client())
    assert left is not None
    assert 400 < left <= 500
    assert S3Store(BUCKET, "", made).get("nothing") is None


def test_credentials_that_are_dead_when_fetched_are_told(tmp_path: Path, rclone: tuple[str, Path]) -> None:
    credential_process(tmp_path, given(-60))
    made = s3_client()
    for call in (
        lambda: credentials_expire_in(made),
        lambda: presign_uri("s3://b1/k", made, 60),
        lambda: S3Store(BUCKET, "", made).get("k"),
    ):
        with pytest.raises(StoreCredentialsError, match="no usable S3 credentials"):
            call()


@pytest.mark.parametrize("break_it", ["exits", "no json", "no program", "no profile", "half a pair"])
def test_credentials_that_cannot_be_had_are_told_without_a_secret(
    break_it: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if break_it == "exits":
        credential_process(tmp_path, "", 1)
    elif break_it == "no json":
        credential_process(tmp_path, SECRET)
    elif break_it == "no program":
        profile(tmp_path, "credential_process = /no/such/program")
    elif break_it == "no profile":
        monkeypatch.setenv("AWS_PROFILE", "nobody")
    else:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    with pytest.raises(StoreCredentialsError, match="AWS_PROFILE") as caught:
        s3_client()
    assert SECRET not in str(caught.value)


def test_no_credentials_at_all_are_told(rclone: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", rclone[0])
    made = s3_client()
    assert credentials_expire_in(made) is None
    with pytest.raises(StoreCredentialsError, match="NoCredentialsError"):
        S3Store(BUCKET, "", made).get("k")
    with pytest.raises(StoreCredentialsError, match="sign an address"):
        presign_uri("s3://b1/k", made, 60)


# S3-compatible servers, and buckets with a policy or a region of their own


@dataclass
class Picky:
    """A server in front of moto that refuses some requests; `seen` are the headers of all of them."""

    endpoint: str
    seen: list[tuple[str, dict[str, str]]]

    def writes(self) -> list[dict[str, str]]:
        return [headers for verb, headers in self.seen if verb == "PUT"]


Refuses = Callable[[BaseHTTPRequestHandler], Handle | None]


@pytest.fixture
def picky(moto: str, serve: Callable[[Handle], str]) -> Callable[[Refuses], Picky]:
    def start(refuses: Refuses) -> Picky:
        seen: list[tuple[str, dict[str, str]]] = []

        def handle(request: BaseHTTPRequestHandler) -> None:
            seen.append((request.command, {name.lower(): value for name, value in request.headers.items()}))
            if refusal := refuses(request):
                refusal(request)
                return
            behind = HTTPConnection(urlsplit(moto).netloc)
            body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
            kept = {name: value for name, value in request.headers.items() if name != "Expect"}
            behind.request(request.command, request.path, body, kept)
            answer = behind.getresponse()
            content = answer.read()
            behind.close()
            request.send_response_only(answer.status)
            for name, value in answer.getheaders():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(content)

        return Picky(serve(handle), seen)

    return start


def has_checksum(headers: Mapping[str, str]) -> bool:
    sent = {name.lower(): value for name, value in headers.items()}
    named = [name for name in sent if "checksum" in name or name == "x-amz-trailer"]
    return bool(named) or "aws-chunked" in sent.get("content-encoding", "")


def takes_no_checksums(status: int, code: str) -> Refuses:
    return lambda request: refusing(status, code) if has_checksum(dict(request.headers.items())) else None


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "InvalidArgument"),
        (400, "XAmzContentChecksumMismatch"),
        (400, "XAmzContentSHA256Mismatch"),
        (403, "SignatureDoesNotMatch"),
        (411, "MissingContentLength"),
        (501, "NotImplemented"),
    ],
)
def test_a_server_that_refuses_checksum_headers_gets_none_from_then_on_and_it_is_said_once(
    status: int,
    code: str,
    picky: Callable[[Refuses], Picky],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "prefect.segmind")
    server = picky(takes_no_checksums(status, code))
    made = client(server.endpoint)
    store = S3Store(BUCKET, tmp_path.name, made)
    assert store.checksums
    etag = store.put("k", b"1", "text/plain", if_absent=True)
    store.put("k", b"2", "text/plain", if_match=etag)
    assert store.holds("k", b"2")
    with pytest.raises(PreconditionFailedError):
        store.put("k", b"3", "text/plain", if_absent=True)
    S3Store(BUCKET, f"{tmp_path.name}-another", made).put("k", b"4", "text/plain")
    assert store.conditional
    assert not store.checksums
    assert len([headers for headers in server.writes() if has_checksum(headers)]) == 1
    assert not has_checksum(server.seen[-1][1])
    assert [each.getMessage() for each in caplog.records if each.name == "prefect.segmind"] == [
        f"{server.endpoint} refuses checksum headers: objects are written without"
    ]


def test_a_claim_that_somebody_else_has_is_lost_on_a_server_that_refuses_checksums(
    picky: Callable[[Refuses], Picky], moto: str, tmp_path: Path
) -> None:
    S3Store(BUCKET, tmp_path.name, client(moto)).put("k", b"theirs", "text/plain")
    server = picky(takes_no_checksums(400, "InvalidArgument"))
    store = S3Store(BUCKET, tmp_path.name, client(server.endpoint))
    store._conditions = Conditions(if_absent=True, if_match=True)
    with pytest.raises(PreconditionFailedError):
        store.put("k", b"mine", "text/plain", if_absent=True)
    assert not store.checksums


def test_a_server_that_refuses_something_else_keeps_getting_checksums(picky: Callable[[Refuses], Picky]) -> None:
    server = picky(lambda request: refusing(400, "EntityTooLarge") if request.command == "PUT" else None)
    store = S3Store(BUCKET, "", client(server.endpoint))
    with pytest.raises(StoreError, match="EntityTooLarge"):
        store.put("k", b"x", "text/plain")
    assert store.checksums


def test_without_checksums_nothing_is_sent_in_chunks_with_trailers_over_tls_either() -> None:
    made, sent = client("https://127.0.0.1:1"), []

    def answer(request: Any, **_: Any) -> AWSResponse:
        headers = {name.lower(): str(value) for name, value in request.headers.items()}
        sent.append(headers)
        refused = bool([name for name in headers if "checksum" in name or name == "x-amz-trailer"])
        body = BytesIO(b"<Error><Code>NotImplemented</Code></Error>" if refused else b"")
        body.stream = lambda **_: iter([body.getvalue()])  # type: ignore[attr-defined]
        return AWSResponse(request.url, 501 if refused else 200, {"ETag": '"e"'}, body)  # type: ignore[arg-type]

    made.meta.events.register("before-send.s3.PutObject", answer)
    assert S3Store(BUCKET, "", made).put("k", b"x", "text/plain") == '"e"'
    assert len(sent) == 2
    assert "aws-chunked" not in sent[1].get("content-encoding", "")


def test_check_says_that_a_server_gets_no_checksums(
    picky: Callable[[Refuses], Picky], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(monkeypatch, picky(takes_no_checksums(400, "InvalidArgument")).endpoint)
    place = f"s3://{BUCKET}/{tmp_path.name}"
    looks = dict(check.all_checks(None, f"{place}/archive", f"{place}/uploads"))
    for title in ("upload place", "archive"):
        assert "can be written (without checksum headers)" in looks[title]().text


def not_encrypted(request: BaseHTTPRequestHandler) -> Handle | None:
    """As a bucket's policy does that demands encryption by a key."""
    sent = request.headers.get("x-amz-server-side-encryption")
    return refusing(403, "AccessDenied", "with an explicit deny") if request.command == "PUT" and not sent else None


@pytest.mark.parametrize(
    ("setting", "sent", "key"),
    [
        ("AES256", "AES256", None),
        ("aws:kms", "aws:kms", None),
        ("aws:kms:alias/pictures", "aws:kms", "alias/pictures"),
        ("aws:kms:arn:aws:kms:eu-central-1:1:key/1-2", "aws:kms", "arn:aws:kms:eu-central-1:1:key/1-2"),
    ],
)
def test_every_write_asks_for_the_encryption_that_is_set(
    setting: str,
    sent: str,
    key: str | None,
    picky: Callable[[Refuses], Picky],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = picky(not_encrypted)
    environment(monkeypatch, server.endpoint)
    place = f"s3://{BUCKET}/{tmp_path.name}"
    with pytest.raises(StoreAccessError, match="set PREFECT_INTEGRATIONS_SEGMIND_S3_ENCRYPTION"):
        Services(archive=f"{place}/archive").archive.store.put("k", b"x", "image/png")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_S3_ENCRYPTION", setting)
    server.seen.clear()
    archive = Services(archive=f"{place}/archive").archive
    assert archive.store.conditional
    etag = archive.store.put("k", b"x", "image/png", if_absent=True)
    archive.store.put("k", b"y", "image/png", if_match=etag)
    publisher = Services(publish_to=f"{place}/live").publishing
    assert publisher
    publisher.store.put("k.png", b"x", "image/png", cache_control="no-cache")
    open_store(f"{place}/inbox", Services().s3).put("cup.png", b"x", "image/png")
    inbox = open_inbox(f"{place}/inbox", lambda: Services().s3)
    (file,) = inbox.look(0).settled
    assert inbox.move_done(file)
    assert len(server.writes()) >= 7
    for headers in server.writes():
        assert headers["x-amz-server-side-encryption"] == sent
        assert headers.get("x-amz-server-side-encryption-aws-kms-key-id") == key


@pytest.mark.parametrize("value", ["aes256", "AES", "kms", "aws:kms:", "aws:kms:a b", "AES256,aws:kms"])
def test_another_encryption_is_refused_by_the_name_of_its_setting(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_S3_ENCRYPTION", value)
    with pytest.raises(ConfigurationError, match=r"PREFECT_INTEGRATIONS_SEGMIND_S3_ENCRYPTION: .*allowed is AES256"):
        _ = Services().s3


@pytest.mark.parametrize(("status", "code"), [(400, "KMS.NotFoundException"), (501, "NotImplemented")])
def test_an_encryption_that_cannot_be_had_is_told_as_that(
    status: int, code: str, serve: Callable[[Handle], str]
) -> None:
    with pytest.raises(StoreError, match=f"{code}.*PREFECT_INTEGRATIONS_SEGMIND_S3_ENCRYPTION"):
        S3Store(BUCKET, "", client(serve(refusing(status, code)))).put("k", b"x", "text/plain")


def environment(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


def elsewhere(how: str) -> Refuses:
    """As S3 answers for a bucket in eu-central-1 what is signed for another region."""

    def refuses(request: BaseHTTPRequestHandler) -> Handle | None:
        signed = request.headers.get("Authorization") or request.path
        if "/eu-central-1/s3/" in signed or "%2Feu-central-1%2Fs3%2F" in signed:
            return None

        def refuse(request: BaseHTTPRequestHandler) -> None:
            request.rfile.read(int(request.headers.get("Content-Length", 0)))
            code = "PermanentRedirect" if how == "redirect" else "AuthorizationHeaderMalformed"
            region = "" if how == "redirect" else "<Region>eu-central-1</Region>"
            body = f"<Error><Code>{code}</Code>{region}</Error>".encode()
            request.send_response(301 if how == "redirect" else 400)
            if how == "redirect":
                request.send_header("x-amz-bucket-region", "eu-central-1")
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(body)

        return refuse

    return refuses


@pytest.mark.parametrize("how", ["redirect", "malformed"])
@pytest.mark.parametrize("first", ["put", "holds", "read", "keys"])
def test_an_address_is_signed_for_the_region_where_the_bucket_was_found(
    how: str, first: str, picky: Callable[[Refuses], Picky], moto: str
) -> None:
    S3Store(BUCKET, "x", client(moto)).put("k", b"x", "text/plain")
    made = client(picky(elsewhere(how)).endpoint)
    store = S3Store(BUCKET, "x", made)
    calls(store)[first]()
    answer = httpx.get(presign_uri(store.uri("k"), made, 60))
    assert (answer.status_code, answer.content) == (200, b"x")


def test_a_bucket_in_another_region_has_its_host_in_a_signed_address_and_others_keep_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    made = s3_client()

    def answer(request: Any, **_: Any) -> Any:
        body = BytesIO(b"")
        body.stream = lambda **_: iter([b""])  # type: ignore[attr-defined]
        right = b"/eu-central-1/" in request.headers["Authorization"]
        headers: Any = {"x-amz-bucket-region": "eu-central-1", "etag": "e"}
        return AWSResponse(request.url, 200 if right else 301, headers, body)

    made.meta.events.register("before-send.s3.PutObject", answer)
    S3Store(BUCKET, "", made).put("k", b"x", "text/plain")
    for bucket, region in {BUCKET: "eu-central-1", "another": "us-west-2"}.items():
        url = presign_uri(f"s3://{bucket}/k", made, 60)
        assert url.startswith(f"https://{bucket}.s3.{region}.amazonaws.com/k?")
        assert f"%2F{region}%2Fs3%2Faws4_request" in url


# Failures


def calls(store: S3Store) -> dict[str, Callable[[], Any]]:
    return {
        "get": lambda: store.get("k"),
        "put": lambda: store.put("k", b"x", "text/plain"),
        "holds": lambda: store.holds("k", b"x"),
        "stat": lambda: store.stat("k"),
        "keys": lambda: list(store.keys("")),
        "conditional": lambda: store.conditional,
        "read": lambda: read(store.uri("k"), store._client, 10),
    }


CALLS = ["get", "put", "holds", "stat", "keys", "conditional", "read"]


@pytest.mark.parametrize("call", CALLS)
def test_wrong_keys_are_told_and_not_shown(call: str, rclone: tuple[str, Path]) -> None:
    for pair in ({"key_id": "AKIAWRONGWRONGWRONG1"}, {"secret": "WRONGWRONG"}):
        with pytest.raises(StoreCredentialsError, match="AWS_PROFILE") as caught:
            calls(S3Store(BUCKET, "x", client(rclone[0], **pair)))[call]()
        assert rclone[0] in str(caught.value)
        assert "WRONGWRONG" not in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("server", ["rclone", "moto"])
def test_a_missing_bucket_is_told_and_never_an_empty_one(
    server: str, call: str, request: pytest.FixtureRequest
) -> None:
    endpoint = request.getfixturevalue(server)
    endpoint = endpoint if isinstance(endpoint, str) else endpoint[0]
    with pytest.raises(BucketNotFoundError, match=r"s3://no-such-bucket.* at http://127.*create it"):
        calls(S3Store("no-such-bucket", "x", client(endpoint)))[call]()


@pytest.mark.parametrize("call", CALLS)
def test_an_endpoint_that_is_down_is_told(call: str) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StoreUnreachableError, match=f"{endpoint}.*check the network"):
        calls(S3Store(BUCKET, "x", client(endpoint)))[call]()


def test_an_endpoint_that_never_answers_or_speaks_no_tls_is_told(rclone: tuple[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StoreUnreachableError, match="ReadTimeoutError"):
            S3Store(BUCKET, "", client(endpoint, read_timeout=0.2)).get("k")
    with pytest.raises(StoreUnreachableError, match="SSLError"):
        S3Store(BUCKET, "", client(rclone[0].replace("http:", "https:"))).get("k")


@pytest.mark.parametrize("call", CALLS)
def test_a_denied_request_is_told_and_never_an_absence(call: str, serve: Callable[[Handle], str]) -> None:
    with pytest.raises(StoreAccessError, match=f"s3://{BUCKET}.*s3:ListBucket") as caught:
        calls(S3Store(BUCKET, "x", client(serve(refusing(403, "AccessDenied", "not you")))))[call]()
    assert caught.value.status == 403


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (400, "ExpiredToken", StoreCredentialsError, "expired"),
        (400, "InvalidToken", StoreCredentialsError, "AWS_SESSION_TOKEN"),
        (403, "RequestTimeTooSkewed", StoreCredentialsError, "clock"),
        (301, "PermanentRedirect", BucketNotFoundError, "region"),
        (400, "AuthorizationHeaderMalformed", BucketNotFoundError, "AWS_DEFAULT_REGION"),
        (400, "IllegalLocationConstraintException", BucketNotFoundError, "region"),
        (412, "PreconditionFailed", PreconditionFailedError, "somebody else"),
        (404, "", StoreError, "404"),
        (503, "SlowDown", StoreError, "again later"),
        (418, "Teapot", StoreError, "Teapot"),
    ],
)
def test_every_answer_has_its_error_and_its_advice(
    status: int, code: str, kind: type[StoreError], words: str, serve: Callable[[Handle], str]
) -> None:
    def handle(request: BaseHTTPRequestHandler) -> None:  # botocore asks for the bucket's region by HEAD
        refuse = refusing(404, "") if request.command == "HEAD" else refusing(status, code, "AKIA0123456789ABCDEF?")
        refuse(request)

    with pytest.raises(StoreError, match=words) as caught:
        S3Store(BUCKET, "", client(serve(handle))).get("k")
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert "AKIA" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (aws.ClientError({"Error": {"Code": "AccessDenied"}}, "AssumeRole"), StoreCredentialsError, "AssumeRole"),
        (aws.NoRegionError(), ConfigurationError, "region"),
        (aws.MD5UnavailableError(), StoreError, "MD5UnavailableError"),
    ],
)
def test_failures_on_the_way_to_an_answer_have_theirs_too(
    error: Exception, kind: type[SegmindError], words: str
) -> None:
    def fail(**_: Any) -> None:
        raise error

    made = client("http://127.0.0.1:1")
    made.meta.events.register("before-send.s3.GetObject", fail)
    with pytest.raises(kind, match=words):
        S3Store(BUCKET, "", made).get("k")


def test_a_bucket_name_that_cannot_be_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigurationError, match="Invalid bucket name"):
        S3Store("Bad Bucket!", "", client("http://127.0.0.1:1")).get("k")


def test_a_checksum_of_parts_says_nothing_of_the_whole(moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = client(moto)
    store = S3Store(BUCKET, "kms", made)
    made.put_object(Bucket=BUCKET, Key="kms/k", Body=b"abc", ServerSideEncryption="aws:kms", ChecksumAlgorithm="SHA256")
    assert store.holds("k", b"abc")
    assert not store.holds("k", b"abd")
    assert store.stat("k") == Facts(3, SHA256_OF_ABC)
    assert s3._sha256(b"abc") == "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="


class TestAContentThatBreaksOff:
    """As where a server writes in place and the object is written meanwhile, or a connection breaks."""

    HEAD: ClassVar[dict[str, Any]] = {"ETag": '"1"', "Last_Modified": "Sat, 28 Nov 2026 00:00:00 GMT"}

    def store(self, server: Wire, monkeypatch: pytest.MonkeyPatch) -> S3Store:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setattr("prefect_segmind.storage.s3._CUT_WAITS", (0.0, 0.0))
        return S3Store("bucket", "", s3_client())

    def test_is_read_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with Wire(http(b"half", length=9, **self.HEAD), http(b"all of it", **self.HEAD)) as server:
            found = self.store(server, monkeypatch).get("key")
        assert found is not None
        assert (found.data, len(server.requests)) == (b"all of it", 2)

    def test_again_and_again_is_an_error_and_no_half_object(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with (
            Wire(http(b"half", length=9, **self.HEAD)) as server,
            pytest.raises(StoreUnreachableError, match="cannot read s3://bucket/key"),
        ):
            self.store(server, monkeypatch).get("key")
        assert len(server.requests) == 3
