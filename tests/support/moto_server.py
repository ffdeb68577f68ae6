"""Moto's S3 server, which honours conditional writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer


@contextmanager
def moto_server() -> Iterator[str]:
    """Runs one on loopback; its address. What is in its buckets, all servers of a process share: name yours so."""
    one_at_a_time, put_object = threading.Lock(), S3Response.put_object

    def atomic(self: S3Response) -> Any:  # S3 looks and writes in one step, moto in two
        with one_at_a_time:
            return put_object(self)

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", atomic)
        server.start()
        try:
            yield "http://{}:{}".format(*server.get_host_and_port())
        finally:
            server.stop()
