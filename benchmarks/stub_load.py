"""What one process of each stub can do: requests as fast as they are answered, and the CPU of each.

.venv/bin/python -m benchmarks.stub_load
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable

from benchmarks.stub_api import picture
from benchmarks.stubs import Stub

SECONDS = 3.0
AT_ONCE = 64


def main() -> None:
    """Measures each kind of request that a batch sends, and prints a line for each."""
    made = picture(1024, 1024, "jpeg")
    record = json.dumps({"record": "x" * 1500}).encode()
    numbers = itertools.count()
    body = json.dumps({"image_file": "http://127.0.0.1/photo.jpg", "prompt": "a red mug", "seed": 100}).encode()
    with Stub("api") as api, Stub("s3") as s3:
        post = http("POST", "/v1/ideogram-2a-img-2-img", body, "x-api-key: SG_0123456789abcdef", "Connection: close")
        show("API: POST, a connection each", api, lambda: post, keeps=False)
        show("S3: PUT of a picture", s3, lambda: put(f"/bench/{next(numbers)}.jpg", made), keeps=True)
        show("S3: PUT of a record", s3, lambda: put(f"/bench/{next(numbers)}.json", record), keeps=True)
        last = next(numbers) - 1
        show("S3: GET of a record", s3, lambda: http("GET", f"/bench/{last}.json"), keeps=True)


def show(what: str, stub: Stub, request: Callable[[], bytes], *, keeps: bool) -> None:
    """Sends requests for some seconds, and prints how many were answered and the stub's CPU for each."""
    before = stub.stats()["cpu_seconds"]
    sent = asyncio.run(load(stub.port, request, keeps=keeps))
    spent = stub.stats()["cpu_seconds"] - before
    print(f"{what:30} {sent / SECONDS:6,.0f} a second, {1e6 * spent / sent:5.0f} µs of CPU each", flush=True)


async def load(port: int, request: Callable[[], bytes], *, keeps: bool) -> int:
    """Sends requests over some connections at once, and returns how many were answered."""
    end = time.monotonic() + SECONDS

    async def one_after_the_other() -> int:
        sent, streams = 0, None
        while time.monotonic() < end:
            reader, writer = streams or await asyncio.open_connection("127.0.0.1", port)
            writer.write(request())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            found = re.search(rb"Content-Length: (\d+)", head)
            await reader.readexactly(int(found[1]) if found else 0)
            sent += 1
            if keeps:
                streams = reader, writer
            else:
                writer.close()
        return sent

    return sum(await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE))))


def put(path: str, data: bytes) -> bytes:
    """A write as boto3 sends it: with its SHA-256, and only if the object is not there."""
    checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
    return http("PUT", path, data, f"x-amz-checksum-sha256: {checksum}", "If-None-Match: *")


def http(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """A request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


if __name__ == "__main__":
    main()
