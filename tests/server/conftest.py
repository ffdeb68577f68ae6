"""What the tests of flows and commands need besides: a Prefect server, and a name of their own on it."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from prefect import tags
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from prefect_segmind import SegmindCredentials
from tests.support import prefect_server as shared_server


@pytest.fixture(scope="session")
def _prefect_server() -> None:
    shared_server.start()
    SegmindCredentials.register_type_and_schema()


@pytest.fixture
def prefect_server(_prefect_server: None) -> Iterator[None]:
    """The run's Prefect server, which knows the block; other workers use it at the same time."""
    # The thread that sends a flow's heartbeats has it wait up to a second at its end.
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@pytest.fixture
def own_tag(prefect_server: None) -> Iterator[str]:
    """A tag that all flow runs of this test have on the server, and no other."""
    with tags(tag := f"test-{uuid4()}"):
        yield tag
