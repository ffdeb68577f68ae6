"""The benchmark measures what it says it does: its stubs answer as the real ones, in time, and count what they got."""

from __future__ import annotations

import base64
import doctest
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import boto3
import httpx
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from benchmarks import cells, stub_http
from benchmarks.bench import batches, tried
from benchmarks.cells import FULL, Cell
from benchmarks.measuring import Result
from benchmarks.processes import Measured, cpu_seconds
from benchmarks.strategies import ALL, OURS, SAMPLE
from benchmarks.stub_s3 import StubS3
from benchmarks.stubs import Stub
from benchmarks.table import HEADS, page, write
from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.request import ImageToImageRequest
from prefect_segmind.errors import PreconditionFailedError
from prefect_segmind.storage import s3
from prefect_segmind.storage.s3 import S3Store

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark reads /proc")
posix = pytest.mark.skipif(sys.platform == "win32", reason="an event loop of Windows handles no signals")


def s3_client(stub: Stub) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=stub.url,
        region_name="us-east-1",
        aws_access_key_id="stub",
        aws_secret_access_key="stub",
        config=Config(signature_version="s3v4", retries={"total_max_attempts": 1}, max_pool_connections=32),
    )


@pytest.fixture(scope="module")
def s3_stub() -> Iterator[Stub]:
    with Stub("s3", "--bucket", "bench") as stub:
        yield stub


@pytest.fixture(scope="module")
def client(s3_stub: Stub) -> Any:
    return s3_client(s3_stub)


@pytest.fixture
def store(client: Any, tmp_path: Path) -> S3Store:
    return S3Store("bench", tmp_path.name, client)


pytestmark = posix


# S3


def test_of_many_writers_of_one_key_exactly_one_wins(store: S3Store) -> None:
    assert store.conditional

    def write(number: int) -> bool:
        try:
            store.put("claim", b"%d" % number, "text/plain", if_absent=True)
        except PreconditionFailedError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(write, range(64))) == 1


def test_only_what_was_read_is_replaced(store: S3Store) -> None:
    old = store.put("k", b"old", "text/plain", if_absent=True)
    new = store.put("k", b"new", "text/plain", if_match=old)
    for key, etag in (("k", old), ("gone", new)):
        with pytest.raises(PreconditionFailedError, match="somebody else"):
            store.put(key, b"mine", "text/plain", if_match=etag)
    assert store.get("gone") is None
    assert store.holds("k", b"new")
    assert not store.holds("k", b"neu")


def test_conditions_are_ignored_on_request() -> None:
    with Stub("s3", "--ignore-conditions") as stub:
        assert not any(S3Store("bench", "a", s3_client(stub)).conditions)


def test_an_object_has_its_md5_its_sha256_its_type_and_its_times(client: Any) -> None:
    sha256 = base64.b64encode(hashlib.sha256(b"picture").digest()).decode()
    where = {"Bucket": "bench", "Key": "summer/hät 1+2.png"}
    put = client.put_object(
        **where, Body=b"picture", ChecksumSHA256=sha256, ContentType="image/png", Metadata={"seed": "7"}
    )
    head = client.head_object(**where, ChecksumMode="ENABLED")
    assert put["ETag"] == head["ETag"] == f'"{hashlib.md5(b"picture").hexdigest()}"'
    assert (head["ChecksumSHA256"], head["ContentLength"], head["ContentType"]) == (sha256, 7, "image/png")
    assert head["Metadata"] == {"seed": "7"}
    assert 0 <= time.time() - head["LastModified"].timestamp() < 30
    assert "ChecksumSHA256" not in client.head_object(**where)
    assert client.get_object(**where)["Body"].read() == b"picture"
    assert httpx.get(client.generate_presigned_url("get_object", Params=where)).content == b"picture"


@pytest.mark.parametrize(
    ("call", "more", "code"),
    [
        ("get_object", {"Key": "nothing"}, "NoSuchKey"),
        ("get_object", {"Bucket": "other", "Key": "nothing"}, "NoSuchBucket"),
        ("list_objects_v2", {"Bucket": "other"}, "NoSuchBucket"),
        ("put_object", {"Key": "k", "Body": b"x", "ChecksumSHA256": "A" * 43 + "="}, "BadDigest"),
        ("copy_object", {"Key": "k", "CopySource": "bench/nothing"}, "NoSuchKey"),
        ("create_multipart_upload", {"Key": "k"}, "MethodNotAllowed"),
    ],
)
def test_what_is_refused_has_the_code_of_s3(client: Any, call: str, more: dict[str, Any], code: str) -> None:
    with pytest.raises(ClientError) as refused:
        getattr(client, call)(**{"Bucket": "bench"} | more)
    assert refused.value.response["Error"]["Code"] == code


def test_an_object_is_copied_and_deleted_only_if_it_is_the_one_that_was_meant(client: Any, s3_stub: Stub) -> None:
    etag = client.put_object(Bucket="bench", Key="from", Body=b"x")["ETag"].strip('"')
    s3.copy("s3://bench/from", "s3://bench/to", client, etag=etag)
    for another in ("0" * 32, etag):  # the source is another, the target is there
        with pytest.raises(PreconditionFailedError):
            s3.copy("s3://bench/from", "s3://bench/to", client, etag=another)
    with pytest.raises(PreconditionFailedError):
        s3.delete("s3://bench/from", client, etag="0" * 32)
    s3.delete("s3://bench/from", client, etag=etag)
    assert not s3.exists("s3://bench/from", client)
    assert s3.exists("s3://bench/to", client)


def test_a_listing_has_every_key_once_in_order_and_in_pages_of_a_thousand(store: S3Store, client: Any) -> None:
    names = [f"many/{number:04} ü&.json" for number in range(2005)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put(name, b"{}", "application/json"), reversed(names)))
    store.put("manx", b"x", "text/plain")
    assert list(store.keys("many/")) == names
    prefix = store.url.removeprefix("s3://bench/")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="bench", Prefix=f"{prefix}/many/")
    assert [page["KeyCount"] for page in pages] == [1000, 1000, 5]


def test_each_request_is_counted_by_its_method_and_answered_when_it_is_due() -> None:
    with Stub("s3", "--latency", "0.05") as stub:
        client = s3_client(stub)
        began = time.monotonic()
        client.put_object(Bucket="bench", Key="a", Body=b"x" * 2_000_000)  # so large that boto3 asks before it sends
        client.copy_object(Bucket="bench", Key="b", CopySource="bench/a")
        client.head_object(Bucket="bench", Key="b")
        client.get_object(Bucket="bench", Key="b")["Body"].read()
        client.list_objects_v2(Bucket="bench")
        client.delete_object(Bucket="bench", Key="b")
        assert time.monotonic() - began >= 6 * 0.05
        stats = stub.stats()
    assert stats["requests"] == {"PUT": 1, "COPY": 1, "HEAD": 1, "GET": 1, "LIST": 1, "DELETE": 1}
    assert stats["peak_in_flight"] == 1
    assert stats["answered"] == 6


@pytest.mark.parametrize("framing", ["chunked", "aws-chunked"])
def test_a_body_in_chunks_is_put_together(framing: str, s3_stub: Stub, client: Any) -> None:
    url, pieces = f"{s3_stub.url}/bench/{framing}", [b"one ", b"two ", b"three"]
    if framing == "chunked":
        httpx.put(url, content=iter(pieces))
    else:
        signed = b"".join(b"%x;chunk-signature=00\r\n%b\r\n" % (len(each), each) for each in pieces)
        signed += b"0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
        httpx.put(url, content=signed, headers={"Content-Encoding": framing})
    assert client.get_object(Bucket="bench", Key=framing)["Body"].read() == b"one two three"


def test_the_same_picture_is_in_memory_once() -> None:
    stub, made = StubS3(buckets=("bench",)), b"x" * 100_000
    for number in range(3):
        stub.answer(stub_http.Request("PUT", f"/bench/{number}", {}, {}, bytes(bytearray(made))))
    kept = {id(each.data) for each in stub._buckets["bench"].objects.values()}
    assert len(kept) == 1


# The API


def test_a_request_gets_a_picture_whose_cost_seed_and_id_are_read(tmp_path: Path) -> None:
    asked = Event()
    with Stub("api", "--size", "64x48", on_first=asked.set) as stub:
        request = ImageToImageRequest(image_file="http://127.0.0.1:9/nobody.jpg", prompt="a red mug", seed=123)
        with SegmindClient("SG_0123456789abcdef", f"{stub.url}/v1") as client:
            assert client.credits() > 0
            assert not asked.is_set()
            paid = client.generate(request, tmp_path / "part")
        assert asked.wait(10)
        history = httpx.get(f"{stub.url}/inference-request/request-history", params={"page": 1}).json()
        stats = stub.stats()
    assert (paid.width, paid.height, paid.seed) == (64, 48, 123)
    assert (str(paid.cost_usd), paid.request_id) == ("0.05", "stub-000001")
    assert history["data"] == []
    assert stats["requests"] == {"POST": 1}, "what is free is not counted"


def test_requests_at_once_are_counted_and_each_waits_for_its_time() -> None:
    body = {"image_file": "http://127.0.0.1:9/nobody.jpg", "prompt": "a red mug"}
    with Stub("api", "--latency", "0.5", "--size", "64x48") as stub:

        def post(_: int) -> int:
            answer = httpx.post(f"{stub.url}/v1/ideogram-2a-img-2-img", json=body, headers={"x-api-key": "SG_stub"})
            return answer.status_code

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(post, range(16))) == {200}
        stats = stub.stats()
    assert stats["requests"] == {"POST": 16}
    assert 1 < stats["peak_in_flight"] <= 8
    assert stats["last_answer"] - stats["first_request"] >= 2 * 0.5
    assert 0 <= stats["mean_late_seconds"] <= stats["most_late_seconds"]


@pytest.mark.parametrize(
    ("key", "body", "status"), [("", {}, 401), ("SG_stub", {"prompt": "a mug"}, 400), ("SG_stub", [], 400)]
)
def test_what_no_picture_can_be_made_of_is_refused_and_not_counted(key: str, body: Any, status: int) -> None:
    with Stub("api", "--size", "64x48") as stub:
        answer = httpx.post(f"{stub.url}/v1/ideogram-2a-img-2-img", json=body, headers={"x-api-key": key})
        assert answer.status_code == status
        assert stub.stats()["requests"] == {}


# The benchmark


def result(cell: Cell, strategy: str = "ours", **more: Any) -> Result:
    """A batch that took as long as it would ideally, 10 s of CPU of which 3 s were the start."""
    usual: dict[str, Any] = {
        "paid": cell.assets,
        "window": cell.ideal,
        "wall": cell.ideal + 5,
        "to_first_post": 4.0,
        "cpu": 10.0,
        "cpu_before": 3.0,
        "server_cpu": 20.0,
        "s3": {"PUT": 5 * cell.assets, "GET": cell.assets, "LIST": 1},
        "peak_mb": 200.0,
        "late": 0.0,
        "stub_busy": 0.02,
        "foreign": 0.0,
    }
    return Result(cell, ALL[strategy], **usual | more)


def cells_of(table: str, row: int) -> dict[str, str]:
    """The cells of a row of the table, by their heads."""
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return dict(zip(HEADS, [each.strip() for each in rows[2 + row].split("|")[1:-1]], strict=True))


@linux
def test_the_table_says_what_was_measured() -> None:
    cell = Cell(1000, 50, 2, "s3")
    table = page([result(cell, window=50.0), result(cell, "floor", server_cpu=None)], ["naive: it failed"], 0.5)
    ours, floor = cells_of(table, 0), cells_of(table, 1)
    assert ours["wall ÷ ideal"] == "1.250"
    assert ours["assets a second"] == "20.0"
    assert (ours["CPU an asset"], ours["without the start"]) == ("10.0 ms", "7.0 ms")
    assert (ours["server's CPU an asset"], floor["server's CPU an asset"]) == ("20.0 ms", "–")
    assert ours["S3 requests an asset"] == "6.00 (1.00 GET, 5.00 PUT)", "what a run asks once is in the sum"
    assert (ours["assets"], floor["assets"]) == ("1,000", "")
    assert "- naive: it failed" in table
    assert re.match(r"\d{4}-\d\d-\d\d .* cores, \d+ GB, .*Python 3.*, prefect 3.*, boto3 1", table)


@linux
def test_what_was_extrapolated_or_disturbed_is_marked() -> None:
    few, cell = Cell(5, 1, 2, "folder"), Cell(640, 64, 2, "folder")
    sample = result(few, "sample", window=11.0, wall=11.5, cpu=0.6, cpu_before=0.1, server_cpu=None, s3={})
    table = page([result(cell, late=0.2), result(cell, foreign=0.3), sample.extrapolated(cell)], [], 0.5)
    assert [cells_of(table, row)["wall ÷ ideal"] for row in range(3)] == ["1.000†", "1.000‡", "≈ 70.400"]
    assert cells_of(table, 2)["made by"] == f"{SAMPLE.name}, from 5"
    assert cells_of(table, 2)["CPU an asset"] == "100.2 ms", "it starts once"
    assert table.count("\n- ") == 4


@linux
def test_what_was_paid_for_twice_is_told() -> None:
    table = page([result(Cell(640, 64, 2, "folder"), "naive", paid=643, stub_busy=0.25)], [], 0.5)
    assert "- naive Prefect has paid 643 times for 640 pictures." in table
    assert "- The busier stub used at most 25% of a core." in table


def test_a_table_is_written_into_its_place_in_a_page_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    for table in ("first\n", "second\n"):
        write(path, table)
    text = path.read_text(encoding="utf-8")
    assert "\n\nsecond\n\n" in text
    assert "first\n" not in text
    assert text.startswith("# Benchmarks\n")
    assert "## Where the CPU of an asset goes" in text
    write(path.with_name("bench.md"), "table\n")
    assert path.with_name("bench.md").read_text(encoding="utf-8") == "table\n"


@linux
def test_the_growth_of_memory_is_told_where_two_sizes_were_measured() -> None:
    few, many = Cell(640, 64, 2, "folder"), Cell(4000, 64, 0.2, "folder")
    table = page([result(few), result(many, peak_mb=216.8)], [], 0.5)
    assert f"Peak memory of {OURS.name}, 64 at once, folder: 5.0 kB more for each asset from 640 to 4,000." in table
    assert "Peak memory" not in page([result(few), result(few)], [], 0.5)


def test_the_dozen_batches_have_the_sizes_that_are_promised() -> None:
    assert len(FULL) == 12
    assert {each.at_once for each in FULL} == {16, 64, 170}
    assert {each.latency for each in FULL} == {10, 2, 0.2}
    assert {each.archive for each in FULL} == {"folder", "s3"}
    assert (min(each.assets for each in FULL), max(each.assets for each in FULL)) == (112, 5000)
    wanted = {(640, 64, 10, "folder"), (640, 64, 2, "folder"), (1020, 170, 10, "s3"), (640, 64, 2, "s3")}
    assert wanted | {(4000, 64, 0.2, "folder"), (4000, 64, 0.2, "s3")} <= set(FULL)
    assert sum(way.seconds(cell) for cell, way in batches(FULL, [*ALL.values()])) < 60 * 60


@linux
def test_a_batch_without_prefect_is_measured_from_its_first_request_to_its_end(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    command = [sys.executable, "-m", "benchmarks.bench", "--cell", "8,4,0.1,s3", "--by", "floor", "--by", "sample"]
    done = subprocess.run([*command, "--output", str(table)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert table.read_text() in done.stdout
    floor, sample = cells_of(done.stdout, 0), cells_of(done.stdout, 1)
    assert floor["S3 requests an asset"] == "1.12 (1.12 PUT)", "a picture each, and the image once"
    assert float(floor["wall ÷ ideal"].rstrip("†‡")) >= 1
    assert float(sample["wall ÷ ideal"].strip("≈ †‡")) >= 4, "one after the other, where four could be made at once"


@linux
def test_a_process_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (tmp_path / "output").open("w") as output, Measured(command, {}, tmp_path, output, 0.5) as process:
        used = process.wait()
    assert used.code < 0
    assert 0.5 <= used.wall < 50


@linux
def test_what_a_process_has_started_counts_as_its_own(tmp_path: Path) -> None:
    burn = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"]
    before = cpu_seconds(os.getpid())
    with (tmp_path / "output").open("w") as output, Measured(command, {}, tmp_path, output, 60) as process:
        used = process.wait()
    assert used.code == 0
    assert used.cpu >= 0.3
    assert cpu_seconds(os.getpid()) - before >= 0.3
    assert used.peak_mb > 1


@linux
def test_a_batch_that_fails_is_named_and_no_row() -> None:
    nobody = replace(ALL["floor"], module="benchmarks.contenders.nobody")
    found = tried(Cell(2, 1, 0.05, "folder"), nobody, 0.0)
    assert isinstance(found, str)
    assert found.startswith("thread pool, 2 assets, 1 at once, 0.05 s, folder: exit code 1, 0 requests for 2 pictures")


@pytest.mark.parametrize("module", [cells, stub_http], ids=lambda module: module.__name__)
def test_the_examples_are_right(module: Any) -> None:
    assert doctest.testmod(module).failed == 0
