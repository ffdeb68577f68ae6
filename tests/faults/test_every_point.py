"""Whatever fails, and wherever: a picture is paid for once, is archived, and all books agree.

A fixed sample runs with all tests; every point with `make test-faults`. A point that breaks a promise is named by the
failure, and is tried alone by `FAULT="<its name>" .venv/bin/python -m pytest tests/faults`.
"""

from __future__ import annotations

import os

import pytest

from tests.faults.api import Api
from tests.faults.points import WALKS, points
from tests.faults.promises import broken
from tests.faults.world import played

EVERYTHING = os.environ.get("FAULTS") == "all"
ONLY = os.environ.get("FAULT")


@pytest.fixture(scope="module")
def api() -> Api:
    return Api()


@pytest.mark.parametrize(("scenario", "policy"), WALKS)
def test_whatever_fails_a_picture_is_paid_for_once_and_archived(scenario, policy, api, record_property) -> None:
    found, failures, runs = 0, [], 0
    for point in points(scenario, policy, api, everything=EVERYTHING or bool(ONLY)):
        if ONLY and str(point) != ONLY:
            continue
        with played(point, api) as world:
            failures += [f"{point} ({world.where}): {each}" for each in broken(world)]
            runs += len(world.told)
        found += 1
    record_property("points", found)
    record_property("runs", runs)
    print(f"{found} points, {runs} runs")
    assert not failures, "\n".join([f"{len(failures)} broken promises:", *failures])
