"""Whatever fails, and wherever: a picture is paid for once, is archived, and all books agree.

A fixed sample runs with all tests; every point with `make test-faults`. A point that breaks a promise is named by the
failure, and is tried alone with `FAULT="plain | repay | again | 403 after 14"` in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from prefect_segmind.archive.record import OnUnknown
from tests.faults.api import Api
from tests.faults.points import WALKS, points
from tests.faults.promises import broken
from tests.faults.world import Point, played

EVERYTHING = os.environ.get("FAULTS") == "all"
ONLY = os.environ.get("FAULT")


@pytest.fixture(scope="module")
def api() -> Api:
    return Api()


@pytest.mark.parametrize(
    ("scenario", "policy", "ways"), WALKS, ids=lambda each: each if isinstance(each, str) else each[0]
)
def test_whatever_fails_a_picture_is_paid_for_once_and_archived(
    scenario: str, policy: OnUnknown, ways: tuple[str, ...], api: Api, record_property: Callable[[str, object], None]
) -> None:
    tried, runs, failures = 0, 0, []
    for point in points(scenario, policy, ways, api, everything=EVERYTHING):
        with played(point, api) as world:
            failures += [f"{point} ({world.where}): {each}" for each in broken(world)]
        tried, runs = tried + 1, runs + len(world.told)
    record_property("points", tried)
    record_property("runs", runs)
    assert not failures, "\n".join([f"{tried} points, {runs} runs, {len(failures)} broken promises:", *failures])


@pytest.mark.skipif(not ONLY, reason="names no point in FAULT")
def test_the_point_that_is_named(api: Api) -> None:
    with played(Point.named(ONLY or ""), api) as world:
        story = [f"{each.run}: {each.ledger and each.ledger.totals} {each.ended!r}" for each in world.told]
        assert not list(broken(world)), "\n".join(story)
