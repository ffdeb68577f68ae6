"""Shards: each job is in one of them, and the run that has started them knows which is alive, which to run again."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from pathlib import Path
from uuid import uuid4

import pytest

from prefect_segmind.batch.results import Failure, Results
from prefect_segmind.batch.shards import (
    PENDING_SECONDS,
    SILENT_SECONDS,
    Fate,
    ShardFolder,
    ShardKey,
    ShardReport,
    fate,
    parse_result,
    shard_of,
    shares,
)
from prefect_segmind.batch.tally import Tally
from prefect_segmind.jobs.job import Job
from prefect_segmind.limits.ledger import Ledger, Totals
from prefect_segmind.manifest.loading import load_manifest
from prefect_segmind.storage.local import LocalStore
from prefect_segmind.storage.s3 import s3_client
from prefect_segmind.storage.spool import Spool
from tests.unit.test_tally import archived, plan

JOBS = [Job(name=f"mug/{n}", image="/srv/mug.jpg", prompt="a {{ red }} mug*", seed=100 + n) for n in range(200)]


@pytest.mark.parametrize("shards", [1, 2, 7, 64])
def test_each_job_is_in_one_shard_and_no_shard_is_left_out_of_many_jobs(shards: int) -> None:
    found = Counter(shard_of(job, shards) for job in JOBS)
    assert found.total() == 200
    assert set(found) <= set(range(1, shards + 1))
    assert len(found) > shards * 0.9
    assert [shard_of(job, shards) for job in JOBS] == [shard_of(job, shards) for job in JOBS]


@pytest.mark.parametrize(("total", "shards"), [(16, 4), (17, 4), (64, 64), (0, 3), (512, 7)])
def test_what_is_shared_out_is_neither_more_nor_less_than_there_is(total: int, shards: int) -> None:
    parts = shares(total, shards)
    assert (sum(parts), len(parts)) == (total, shards)
    assert max(parts) - min(parts) <= 1


def test_a_run_of_a_shard_is_known_by_its_key_alone() -> None:
    key = ShardKey(str(uuid4()), 3, 2)
    assert ShardKey.parse(str(key)) == key
    assert [ShardKey.parse(each) for each in (None, "", "nightly-2026-11-28", f"{uuid4()}:1", f"{key}:1")] == [None] * 5


@pytest.mark.parametrize(
    ("state", "silent", "has_ended", "expected"),
    [
        ("SCHEDULED", 1e6, False, Fate.WAITS),  # for as long as the pool has no place for it
        ("SCHEDULED", 1e6, True, Fate.WAITS),  # its pool has put it back, as when a node went
        ("PENDING", PENDING_SECONDS - 1, False, Fate.WORKS),
        ("PENDING", PENDING_SECONDS + 1, False, Fate.DIED),  # its worker was killed before it began
        ("RUNNING", SILENT_SECONDS - 1, False, Fate.WORKS),
        ("RUNNING", SILENT_SECONDS + 1, False, Fate.DIED),  # Prefect shows it as Running for ever
        ("CANCELLING", SILENT_SECONDS + 1, False, Fate.DIED),
        ("RUNNING", SILENT_SECONDS + 1, True, Fate.ENDED),  # it died after its last report
        ("RUNNING", 1, True, Fate.WORKS),
        ("CRASHED", 0, False, Fate.DIED),
        ("CRASHED", 0, True, Fate.ENDED),
        ("COMPLETED", 0, True, Fate.ENDED),
        ("FAILED", 0, True, Fate.ENDED),
        ("FAILED", 0, False, Fate.FAILED),  # as without a key on that machine: another try fails like it
        ("CANCELLED", 0, False, Fate.FAILED),
    ],
)
def test_what_has_become_of_a_run_of_a_shard(state: str, silent: float, has_ended: bool, expected: Fate) -> None:
    assert fate(state, silent, has_ended=has_ended) is expected


def test_the_manifest_of_a_shard_makes_exactly_its_jobs(tmp_path: Path) -> None:
    folder = ShardFolder(LocalStore(tmp_path), "20261128T004521Z-3fb66384")
    address = folder.write_manifest(2, 4, (each.model_dump_json().encode() + b"\n" for each in JOBS))
    with load_manifest(address, {"red": "blue"}, s3=s3_client) as loaded:
        assert list(loaded.jobs) == JOBS
    assert ShardFolder.of(LocalStore(tmp_path), address).run == folder.run


def test_a_report_is_read_as_it_was_written_and_half_of_one_is_none(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    folder, key = ShardFolder(store, "a-run"), ShardKey(str(uuid4()), 2, 1)
    assert folder.report(key) is None
    report = ShardReport(number=3, counts={"generated": 2}, requests_sent=3, cost_usd=Decimal("0.10"))
    folder.write_report(key, report)
    assert folder.report(key) == report
    assert folder.report(key._replace(attempt=2)) is None
    store.put(".segmind/runs/a-run/shards/2.1/report.json", b'{"number": 4, "cou', "application/json")
    assert folder.report(key) is None


def test_results_that_were_not_written_are_not_taken_for_none(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    folder, at = ShardFolder(store, "a-run"), ".segmind/runs/a-run/shards/1.1/results.jsonl"
    lines = [
        archived("mug/1", "generated").model_dump_json(),
        Failure(name="mug/2", stage="x", error="y").model_dump_json(),
    ]
    store.put(at, "\n".join(lines).encode(), "application/jsonl")
    found = folder.results(ShardReport(ended=True, results=at, counts={"generated": 1}))
    assert found is not None
    assert [parse_result(found[name]).status for name in ("mug/1", "mug/2")] == ["generated", "failed"]
    assert folder.results(ShardReport(ended=True, counts={"generated": 1})) is None
    assert folder.results(ShardReport(ended=True)) == {}


def test_a_tally_shows_what_shards_do_and_counts_their_results_once() -> None:
    ledger, planned = Ledger(), plan(4)
    with Spool(Job) as failed, Results() as results:
        tally = Tally(planned, failed, results, ledger)
        ledger.report_elsewhere(Totals(2, Decimal("0.10"), Decimal("0.05")))
        tally.report_elsewhere(Counter(generated=2))
        assert tally.progress.sentence().startswith("2 of 4 done, 0 reused, 0 failed, 0.10 USD")
        tally.report_elsewhere(Counter())
        tally.take_over(0, JOBS[0], archived("mug/0", "generated"))
        tally.take_over(1, JOBS[1], Failure(name="mug/1", stage="upload", error="the bucket does not exist"))
        tally.take_over(2, JOBS[2], Failure(status="submitted", name="mug/2", stage="generate", error="not finished"))
        result = tally.result(entries=enumerate(JOBS[:4]))
        assert [each.name for each in failed] == ["mug/1"]
    assert (result.generated, result.failed, result.submitted, result.not_started) == (1, 1, 1, 1)
    assert result.not_started_names == ("mug/3",)
    assert (result.cost_usd, result.possibly_billed_usd) == (Decimal("0.10"), Decimal("0.05"))


def test_what_shards_have_sent_is_told_by_the_records_in_the_next_try() -> None:
    ledger = Ledger()
    ledger.report_elsewhere(Totals(2, Decimal("0.10"), Decimal("0.05")))
    assert (ledger.spent_usd, ledger.unknown_usd) == (Decimal("0.10"), Decimal("0.05"))
    ledger.begin_try()
    assert ledger.totals == Totals()
