"""A batch is counted asset by asset, whatever becomes of each; what it costs is in the ledger."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from prefect_segmind.batch.plan import Plan
from prefect_segmind.batch.results import Results
from prefect_segmind.batch.tally import Progress, Tally
from prefect_segmind.errors import NotStartedError, RunCancelledError, StoreError, SubmittedError
from prefect_segmind.jobs.job import Job
from prefect_segmind.limits.ledger import Ledger, RequestId, Totals
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.storage.spool import Spool

JOBS = [Job(name=str(n), image="a.jpg", prompt="x") for n in range(4)]


def plan(total: int) -> Plan:
    return Plan(total=total, generate=total, reuse=0, recover=0, wait=0, fail=0, price_usd=Decimal("0.05"))


def archived(name: str, status: str) -> ArchivedImage:
    return ArchivedImage(
        status=status,
        name=name,
        image=f"/srv/{name}/f.png",
        sidecar=f"/srv/{name}/f.json",
        fingerprint="f" * 64,
        sha256="0" * 64,
        width=8,
        height=8,
        seed=100,
        cost_usd=Decimal("0.05"),
        possibly_billed_usd=Decimal("0.00"),
        attempts=1,
    )


def test_each_asset_is_counted_once_and_what_was_not_begun_is_named() -> None:
    seen: list[Progress] = []
    with Spool(Job) as failed, Results() as results:
        tally = Tally(plan(4), failed, results, Ledger(), seen.append)
        for position, job in enumerate(JOBS[:3]):
            tally.start(position, job)
        tally.end(JOBS[0], archived("0", "generated"))
        tally.end(JOBS[0], archived("0", "generated"))
        tally.end(JOBS[1], archived("1", "reused"))
        tally.end(JOBS[2], StoreError("the archive is down", stage="archive"))
        result = tally.result(stopped=RunCancelledError("the run was cancelled"), entries=enumerate(JOBS))
        assert [each.name for each in failed] == ["2"]
    assert (result.generated, result.reused, result.failed, result.not_started) == (1, 1, 1, 1)
    assert result.not_started_names == ("3",)
    assert [(each.stage, each.error) for each in result.failures] == [("archive", "the archive is down")]
    assert result.sentence() == "4 assets: 1 generated, 1 reused, 1 failed, 1 not started; paid 0.00 USD"
    assert seen[-1].sentence().startswith("3 of 4 done, 1 reused, 1 failed, 0.00 USD, about ")


def test_what_the_provider_has_accepted_has_not_failed_and_is_counted_and_named_apart() -> None:
    seen: list[Progress] = []
    with Spool(Job) as failed, Results() as results:
        tally = Tally(plan(4), failed, results, Ledger(), seen.append)
        for position, job in enumerate(JOBS[:3]):
            tally.start(position, job)
        tally.end(JOBS[0], archived("0", "generated"))
        tally.end(JOBS[1], SubmittedError("request 1 is not finished", possibly_billed=True, request_id="1"))
        tally.end(JOBS[2], StoreError("the archive is down"))
        result = tally.result(entries=enumerate(JOBS))
        assert [each.name for each in failed] == ["2"]
    assert (result.generated, result.submitted, result.failed, result.not_started) == (1, 1, 1, 1)
    assert (result.submitted_names, result.not_started_names) == (("1",), ("3",))
    assert result.sentence() == "4 assets: 1 generated, 1 failed, 1 submitted, 1 not started; paid 0.00 USD"
    assert seen[-1].sentence().startswith("2 of 4 done, 0 reused, 1 failed, 1 submitted, 0.00 USD, about ")


def test_what_was_begun_and_sent_nothing_is_named_with_what_was_never_begun_in_the_order_of_the_jobs() -> None:
    with Spool(Job) as failed, Results() as results:
        tally = Tally(plan(4), failed, results, Ledger())
        for position, job in enumerate(JOBS[:3]):
            tally.start(position, job)
        tally.end(JOBS[2], archived("2", "generated"))
        tally.end(JOBS[1], NotStartedError("stopped"))
        tally.end(JOBS[0], archived("0", "generated"))
        result = tally.result(entries=enumerate(JOBS))
    assert (result.not_started, result.not_started_names) == (2, ("1", "3"))


def test_what_is_in_place_is_done_at_once_and_says_nothing_of_the_time_that_is_left() -> None:
    seen: list[Progress] = []
    with Spool(Job) as failed, Results() as results:
        tally = Tally(plan(4), failed, results, Ledger(), seen.append)
        tally.count(3, archived("3", "reused"))
        assert seen[-1].sentence() == "1 of 4 done, 1 reused, 0 failed, 0.00 USD"
        tally.start(0, JOBS[0])
        tally.end(JOBS[0], archived("0", "generated"))
        assert seen[-1].sentence().startswith("2 of 4 done, 1 reused, 0 failed, 0.00 USD, about ")
        assert [tally.has_ended(position) for position in range(4)] == [True, False, False, True]
        tally.close()
        tally.count(1, archived("1", "reused"))
        result = tally.result(entries=enumerate(JOBS))
    assert (result.reused, result.generated, result.not_started_names) == (1, 1, ("1", "2"))


def test_an_observer_that_fails_ends_no_run() -> None:
    def broken(_: Progress) -> None:
        raise RuntimeError("no terminal")

    with Spool(Job) as failed, Results() as results:
        tally = Tally(plan(1), failed, results, Ledger(), broken)
        tally.start(0, JOBS[0])
        tally.end(JOBS[0], archived("0", "recovered"))
        assert tally.result().recovered == 1


def test_a_failure_that_is_not_ours_is_named_by_its_kind_and_holds_no_secret() -> None:
    with Spool(Job) as failed, Results() as results:
        tally = Tally(plan(1), failed, results, Ledger())
        tally.start(0, JOBS[0])
        tally.end(JOBS[0], ValueError("at https://b.example/k?X-Amz-Signature=ab"))
        (failure,) = tally.result().failures
    assert failure.error == "ValueError: at https://b.example/k?…"


def test_an_asset_that_outlives_the_grace_is_told_as_possibly_billed(tmp_path: Path) -> None:
    planned = Plan(total=3, generate=3, reuse=0, recover=0, wait=0, fail=0, price_usd=Decimal("0.05"))
    jobs = [Job(name=str(n), image="a.jpg", prompt="x") for n in range(3)]
    with Spool(Job) as failed, Results() as results:
        ledger = Ledger()
        tally = Tally(planned, failed, results, ledger)
        for position, each in enumerate(jobs[:2]):
            tally.start(position, each)
        tally.end(jobs[0], NotStartedError("stopped"))
        assert not tally.wait(0.0)
        for price in (Decimal("0.05"), Decimal("0.04"), Decimal("0.03")):
            ledger.reserve(price)
        not_archived, between_two = Totals(1, cost_usd=Decimal("0.04")), Totals(1, possibly_billed_usd=Decimal("0.03"))
        ledger.send(Decimal("0.05"), "another picture", RequestId("a run", datetime.now(UTC)))
        for outcome in (not_archived, between_two):
            request = RequestId("a run", datetime.now(UTC))
            ledger.settle(outcome.cost_usd + outcome.possibly_billed_usd, "a picture", request, outcome)
        tally.close()
        tally.end(jobs[1], NotStartedError("too late to be counted"))
        result = tally.result()
        assert [each.name for each in failed] == ["1"]
    assert (result.failed, result.not_started) == (1, 2)
    assert (result.cost_usd, result.possibly_billed_usd) == (Decimal("0.04"), Decimal("0.08"))


def test_a_disk_that_takes_no_more_failed_jobs_ends_no_run() -> None:
    planned = Plan(total=1, generate=1, reuse=0, recover=0, wait=0, fail=0, price_usd=Decimal("0.05"))
    job = Job(name="a", image="a.jpg", prompt="x")
    failed = Spool(Job)
    failed.close()
    with Results() as results:
        tally = Tally(planned, failed, results, Ledger())
        tally.start(0, job)
        tally.end(job, StoreError("gone"))
        assert tally.wait(0.0)
        assert "missing from the manifest of failed jobs" in tally.result().failures[0].error
