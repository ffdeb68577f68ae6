"""Promises of `prefect_segmind.lease` that need two threads to meet."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from prefect_segmind import configuration, lease
from prefect_segmind.s3 import S3Store
from prefect_segmind.sandbox import Sandbox
from tests.walk import archive_picture, generate, up_to_upload, walk


def test_a_renewal_under_way_never_overwrites_a_record_that_is_done(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = generate(*up_to_upload(photo))
    claim = lease.held_claim(configuration.open_archive(None), generated.job.fingerprint)
    assert claim is not None
    checked, go_on, put = threading.Event(), threading.Event(), S3Store._put

    def slow(self: S3Store, *what: Any, **more: Any) -> str:
        if threading.current_thread() is renewal:
            checked.set()  # a store that ignores conditions: they have been checked, and the write is still to come
            go_on.wait(10)
        return put(self, *what, **more)

    monkeypatch.setattr(S3Store, "_put", slow)
    renewal = threading.Thread(target=claim.renew)
    renewal.start()
    assert checked.wait(10)
    threading.Timer(0.5, go_on.set).start()
    archive_picture(generated)
    renewal.join()
    again = configuration.open_archive(None).read(generated.job.fingerprint)
    assert again is not None
    assert again.record.state == "done"
    assert walk(photo).status == "reused"
    assert sandbox.ledger.billed == 1


def test_a_claim_that_is_released_is_not_renewed(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = up_to_upload(photo)
    archive = configuration.open_archive(None)
    claim = lease.claim(archive, None, job.fingerprint, "a run")
    assert claim is not None
    claim.release()
    monkeypatch.setattr(archive, "write", lambda *_: pytest.fail("written"))
    claim.renew()
