"""The result of each asset is on disk, and the first ones are in memory: a run may have any number of assets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefect_segmind.batch.results import NAMED, Failure, Results
from tests.unit.test_tally import archived


def test_every_result_is_a_line_of_json_in_the_order_in_which_the_assets_ended() -> None:
    with Results() as results:
        results.add(archived("0", "generated"))
        results.add(Failure(name="1", stage="upload", error="the bucket\ndoes not exist"))
        results.add(Failure(status="submitted", name="2", stage="generate", error="request 7 is not finished"))
        results.add(archived("3", "reused"))
        lines: list[dict[str, Any]] = [json.loads(line) for line in results.lines()]
        again = list(results)
    assert [(each["status"], each["name"]) for each in lines] == [
        *(("generated", "0"), ("failed", "1"), ("submitted", "2"), ("reused", "3")),
    ]
    assert lines[0] == archived("0", "generated").model_dump(mode="json")
    assert lines[1] == {"status": "failed", "name": "1", "stage": "upload", "error": "the bucket\ndoes not exist"}
    assert [each.name for each in again] == ["0", "1", "2", "3"]


def test_of_very_many_results_the_first_are_in_memory_and_all_on_disk() -> None:
    many = NAMED + 7
    with Results() as results:
        for number in range(many):
            results.add(archived(str(number), "generated"))
            results.add(Failure(name=f"lost/{number}", stage="validate", error="no such image"))
        assert [each.name for each in results.images] == [str(number) for number in range(NAMED)]
        assert [each.name for each in results.failures] == [f"lost/{number}" for number in range(NAMED)]
        assert sum(1 for _ in results.lines()) == 2 * many
        assert results.size == sum(map(len, results.lines())) + len("0 ") * 2 * many


def test_pictures_that_are_new_are_not_hidden_by_those_that_were_there() -> None:
    with Results() as results:
        for number in range(NAMED):
            results.add(archived(f"old/{number}", "reused"))
        for number in range(3):
            results.add(archived(f"new/{number}", "generated" if number else "recovered"))
        names = [each.name for each in results.images]
    assert len(names) == NAMED
    assert names[-3:] == ["new/0", "new/1", "new/2"]
    assert names[:2] == ["old/0", "old/1"]


def test_a_disk_that_takes_no_more_results_loses_no_count() -> None:
    results = Results()
    results.close()
    results.add(archived("0", "generated"))
    assert (results.missing, [each.name for each in results.images]) == (1, ["0"])
    assert results.why_missing


@pytest.mark.parametrize("count", [0, 1])
def test_without_results_there_is_nothing_to_keep(count: int) -> None:
    with Results() as results:
        for number in range(count):
            results.add(archived(str(number), "reused"))
        assert bool(results) == bool(count)
