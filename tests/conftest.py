"""What all tests stand on: real servers on loopback, started here and stopped here."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from prefect_segmind.sandbox import Sandbox, sample_photo
from tests.support import prefect_server

HISTORY_SETTING = "PREFECT_INTEGRATIONS_SEGMIND_HISTORY_URL"
FOREIGN = ("AWS_", "SEGMIND_", "PREFECT_INTEGRATIONS_SEGMIND_")

# Before Prefect is imported: nothing of the tests reaches the home or the server of the person who runs them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    prefect_server.prepare()
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="home-", dir=prefect_server.homes())


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        prefect_server.stop()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slow tests begin first, on all workers alike, so that nobody waits for them alone at the end.

    Coverage is that of the unit tests alone: they reach what it asks for, and to trace the others costs minutes. Each
    worker of pytest-xdist begins with a part of the list of its own, one as long as the other.
    """
    for item in items:
        if any(item.path.is_relative_to(Path(__file__).parent / each) for each in ("faults", "server", "release")):
            item.add_marker(pytest.mark.no_cover)
    workers = int(getattr(config, "workerinput", {}).get("workercount", 1))
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = iter([item for item in items if not item.get_closest_marker("slow")])
    parts = [slow[number::workers] for number in range(workers)]
    left = len(items)
    for number, part in enumerate(parts):
        part += islice(quick, max(0, left // (workers - number) - len(part)))
        left -= len(part)
    items[:] = [item for part in parts for item in part]


@pytest.fixture(scope="session", autouse=True)
def _clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No key, profile or setting of the person who runs the tests reaches them."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(FOREIGN)}
    for name in kept:
        del os.environ[name]
    nothing = str(tmp_path_factory.mktemp("aws") / "none")
    os.environ.update(AWS_CONFIG_FILE=nothing, AWS_SHARED_CREDENTIALS_FILE=nothing, AWS_EC2_METADATA_DISABLED="true")
    yield
    os.environ.update(kept)


@pytest.fixture(scope="session")
def _sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("sandbox")
    with Sandbox(folder, latency=0.05, credits="1000.00", sketch=True) as sandbox:  # for what is drawn: test_sandbox
        yield sandbox


@pytest.fixture(scope="session")
def photo_bytes() -> bytes:
    return sample_photo((600, 400))


@pytest.fixture
def photo(tmp_path: Path, photo_bytes: bytes) -> Path:
    path = tmp_path / "mug.jpg"
    path.write_bytes(photo_bytes)
    return path


@pytest.fixture
def sandbox(_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """The API and an S3 server, with an archive, an outbox, a ledger, a history and a script of this test's own."""
    _sandbox.reset()
    for name, value in _sandbox.environment().items():
        monkeypatch.setenv(name, value)
    # What must hold without the provider's history is tested without it.
    monkeypatch.setenv(HISTORY_SETTING, "off")
    place = f"s3://segmind/{tmp_path.parent.name}-{tmp_path.name}"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", f"{place}/archive")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO", f"{place}/uploads")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX", str(tmp_path / "outbox"))
    yield _sandbox
    if services := sys.modules.get("prefect_segmind.services"):
        services._archive.cache_clear()


@pytest.fixture
def with_history(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The sandbox, whose request history is asked; rows that land late are waited for a tenth as long."""
    from prefect_segmind.api import listing
    from prefect_segmind.pipeline import reconcile

    monkeypatch.setenv(HISTORY_SETTING, "")
    monkeypatch.setattr(listing, "REUSED_SECONDS", 0.2)
    monkeypatch.setattr(listing, "FAILED_SECONDS", 0.2)
    monkeypatch.setattr(listing, "_FAILURE_WAITS", (0.1, 0.2))
    monkeypatch.setattr(reconcile, "LOOK_AGAIN_SECONDS", (0.5, 1.5))
    monkeypatch.setattr(reconcile, "PENDING_SECONDS", 0.2)
    return sandbox


@pytest.fixture
def with_v2(with_history: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The same by v2, whose results are polled for ten times as often."""
    from prefect_segmind.pipeline import poll

    monkeypatch.setenv("SEGMIND_BASE_URL", with_history.base_url_v2)
    monkeypatch.setattr(poll, "USUAL_SECONDS", 1.1)
    monkeypatch.setattr(poll, "POLL_SECONDS", (0.1, 0.2))
    return with_history


@pytest.fixture(autouse=True)
def _logs_reach_caplog() -> Iterator[None]:
    """Prefect's loggers do not propagate; here they do, so that tests can read them."""
    logger = logging.getLogger("prefect")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before
