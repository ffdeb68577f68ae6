"""The plan of a batch: what it finds in the archive, the outbox and the images, and what it asks for to find that."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from prefect_segmind.api.picture import PaidPicture
from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.leases import this_process
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.archive.record import Holder, OnKept, OnUnknown, Record, Run
from prefect_segmind.batch import plan as plan_module
from prefect_segmind.batch.plan import Plan, PlannedJob, make_plan
from prefect_segmind.batch.tally import planned
from prefect_segmind.jobs.job import Job
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.validate import ValidatedJob, validate
from prefect_segmind.storage.local import LocalStore
from prefect_segmind.storage.open_store import open_store
from prefect_segmind.storage.spool import Spool

NOW = datetime(2025, 3, 1, 12, 0, tzinfo=UTC)
PICTURE = PaidPicture.model_validate(
    {
        **{"sha256": "cd" * 32, "format": "JPEG", "content_type": "image/jpeg", "extension": "jpg", "width": 8},
        **{"height": 8, "size_bytes": 1, "seed": 100, "cost_usd": "0.05", "cost_source": "x-cost", "paid_at": NOW},
    }
)


@dataclass(frozen=True)
class CountingReader(SourceReader):
    """Reads as ever, and counts."""

    read_images: list[str] = field(default_factory=list)

    def read(self, image: str) -> bytes:
        self.read_images.append(image)
        return super().read(image)


class CountingStore(LocalStore):
    """A folder that counts what is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: Counter[str] = Counter()

    def get(self, key: str) -> Any:
        self.asked["get"] += 1
        return super().get(key)

    def keys(self, prefix: str) -> Iterator[str]:
        self.asked["list"] += 1
        return super().keys(prefix)


class House:
    """An archive, an outbox and a photo, and jobs of it by their seeds."""

    def __init__(self, folder: Path, photo: Path) -> None:
        self.store = CountingStore(folder / "archive")
        self.archive = Archive(self.store)
        self.outbox = Outbox(folder / "outbox")
        self.reader = CountingReader(s3=lambda: pytest.fail("nothing lies in S3"))
        self.photo = photo

    def job(self, seed: int, name: str = "") -> Job:
        return Job(name=name or f"mug/{seed}", image=str(self.photo), prompt="a red mug", seed=seed)

    def fingerprint(self, seed: int) -> str:
        return validate(self.job(seed), self.reader).fingerprint

    def done(self, seed: int) -> None:
        fingerprint = self.fingerprint(seed)
        key = f"mug/{seed}/{fingerprint[:16]}.jpg"
        self.archive.put_sidecar(key, {})
        record = Record(fingerprint=fingerprint).archived(PICTURE, key, key.replace(".jpg", ".json"))
        self.archive.write(record, None)

    def claimed(self, seed: int, holder: Holder) -> None:
        self.archive.write(Record(fingerprint=self.fingerprint(seed)).claimed_by(holder, NOW), None)

    def kept(self, seed: int, place: Path) -> None:
        claimed = Record(fingerprint=self.fingerprint(seed)).claimed_by(this_process(Run("dead")), NOW)
        self.archive.write(
            claimed.with_outcome(possibly_billed=False, kept=f"{place} on another-machine").given_up(), None
        )

    def lost(self, seed: int) -> None:
        """A request whose answer was lost, by a run that has ended."""
        claimed = Record(fingerprint=self.fingerprint(seed)).claimed_by(this_process(Run("a run")), datetime.now(UTC))
        self.archive.write(claimed.with_outcome(possibly_billed=True, reason="the answer was cut").given_up(), None)

    def plan(
        self, *jobs: Job, on_unknown: OnUnknown = "repay", on_kept: OnKept = "wait", in_place: bytearray | None = None
    ) -> tuple[Plan, list[Job | ValidatedJob]]:
        self.reader.read_images.clear()
        self.store.asked.clear()
        with Spool(Job) as asked, Spool[Job | ValidatedJob](Job, ValidatedJob) as entries:
            for each in jobs:
                asked.append(each)
            plan = make_plan(
                asked,
                entries,
                reader=self.reader,
                archive=self.archive,
                outbox=self.outbox,
                price_usd=Decimal("0.05"),
                on_unknown=on_unknown,
                on_kept=on_kept,
                in_place=in_place,
            )
            return plan, list(entries)


@pytest.fixture
def house(tmp_path: Path, photo: Path) -> House:
    return House(tmp_path, photo)


def counts(plan: Plan) -> dict[str, int]:
    found = plan.model_dump(include={"generate", "reuse", "recover", "wait", "kept", "fail"})
    return {what: count for what, count in found.items() if count}


def test_what_is_archived_is_reused_and_what_is_new_is_paid_by_one_listing_and_no_question(house: House) -> None:
    for seed in range(100, 110):
        house.done(seed)
    plan, entries = house.plan(*(house.job(seed) for seed in range(105, 125)))
    assert counts(plan) == {"reuse": 5, "generate": 15}
    assert plan.planned_usd == Decimal("0.75")
    assert house.store.asked == {"list": 1}
    assert all(isinstance(each, ValidatedJob) for each in entries)
    assert [each.name for each in entries] == [f"mug/{seed}" for seed in range(105, 125)]


def test_each_image_is_read_once_however_many_jobs_it_has(house: House, tmp_path: Path) -> None:
    other = tmp_path / "other.jpg"
    other.write_bytes(house.photo.read_bytes())
    jobs = [house.job(seed) for seed in range(100, 140)]
    house.plan(*jobs, *(each.model_copy(update={"image": str(other), "name": f"o/{each.name}"}) for each in jobs))
    assert sorted(house.reader.read_images) == sorted([str(house.photo), str(other)])


def test_one_picture_under_several_names_is_paid_for_once(house: House) -> None:
    plan, _ = house.plan(house.job(100), house.job(100, "a"), house.job(100, "b"), house.job(101))
    assert counts(plan) == {"generate": 2, "reuse": 2}


def test_a_picture_in_the_outbox_is_recovered(house: House) -> None:
    house.outbox.folder.mkdir()
    (house.outbox.folder / f"{house.fingerprint(100)}.jpg").write_bytes(b"a picture")
    (house.outbox.folder / f"{house.fingerprint(101)}.facts").write_bytes(b"{}")
    plan, _ = house.plan(house.job(100), house.job(101))
    assert counts(plan) == {"recover": 1, "generate": 1}


def test_a_kept_answer_is_recovered_where_it_can_be_read_now_and_planned_as_a_payment_where_it_cannot(
    house: House,
) -> None:
    house.outbox.folder.mkdir()
    data = house.photo.read_bytes()
    bodies = {
        100: data,
        101: json.dumps({"data": [{"b64_json": base64.b64encode(data).decode()}]}).encode(),
        102: b'{"image_url": "https://cdn.example/a.png?sig=secret"}',
        103: b"<html>",
        104: data,
    }
    for seed, body in bodies.items():
        (house.outbox.folder / f"{house.fingerprint(seed)}.{'ab' * 8}.1.answer").write_bytes(body)
    house.done(104)
    jobs = [house.job(seed) for seed in bodies]
    plan, _ = house.plan(*jobs)
    assert counts(plan) == {"recover": 2, "generate": 2, "reuse": 1}
    assert [count for warning, count in plan.warnings if "read again before anything is paid" in warning] == [2]
    assert counts(house.plan(*jobs, on_unknown="fail")[0]) == {"recover": 2, "fail": 2, "reuse": 1}


def test_a_picture_that_a_living_run_pays_for_is_waited_for_and_one_of_a_dead_run_is_paid(house: House) -> None:
    house.claimed(100, Holder(run="other", host="another", pid=1, started=""))
    house.claimed(101, this_process(Run("dead")).model_copy(update={"pid": 2**22 - 1}))
    jobs = house.job(100), house.job(101)
    assert counts(house.plan(*jobs)[0]) == {"wait": 1, "generate": 1}
    assert counts(house.plan(*jobs, on_unknown="fail")[0]) == {"wait": 1, "fail": 1}
    assert house.store.asked == {"list": 1, "get": 2}


def test_each_job_is_named_with_what_it_needs_and_what_this_run_would_pay_for_it(house: House, tmp_path: Path) -> None:
    house.done(100)
    house.claimed(101, Holder(run="other", host="another", pid=1, started=""))
    house.claimed(102, this_process(Run("dead")).model_copy(update={"pid": 2**22 - 1}))
    house.outbox.folder.mkdir()
    (house.outbox.folder / f"{house.fingerprint(103)}.jpg").write_bytes(b"a picture")
    lost = Job(name="lost", image=str(tmp_path / "lost.jpg"), prompt="x")
    jobs = [house.job(seed) for seed in (104, 100, 101)] + [lost, house.job(104, "again"), house.job(102)]
    plan, _ = house.plan(*jobs, house.job(103), house.job(102, "twice"), on_unknown="fail")
    found = [(each.name, each.needs, str(each.usd)) for each in plan.jobs]
    assert found == [
        ("mug/104", "generate", "0.05"),
        ("mug/100", "reuse", "0.00"),
        ("mug/101", "wait", "0.00"),
        ("lost", "fail", "0.00"),
        ("again", "reuse", "0.00"),
        ("mug/102", "fail", "0.00"),
        ("mug/103", "recover", "0.00"),
        ("twice", "fail", "0.00"),
    ]
    assert Counter(each.needs for each in plan.jobs) == counts(plan)
    problems = {each.name: each.problem for each in plan.jobs if each.problem}
    assert problems.keys() == {"lost", "mug/102", "twice"}
    assert "lost.jpg does not exist" in problems["lost"]
    assert "may have been billed" in problems["twice"]
    assert dict(plan.problems) == problems


@pytest.mark.parametrize("on_unknown", ["repay", "fail"])
def test_a_picture_in_the_outbox_of_another_machine_is_named_and_not_paid_for_again(
    house: House, tmp_path: Path, on_unknown: OnUnknown
) -> None:
    there, here = tmp_path / "out of reach", tmp_path / "within reach"
    here.mkdir()
    for seed, folder in ((100, there), (101, here)):
        house.kept(seed, folder / f"{house.fingerprint(seed)}.jpg")
    (here / f"{house.fingerprint(101)}.jpg").write_bytes(house.photo.read_bytes())
    jobs = house.job(100), house.job(101), house.job(100, "twice"), house.job(102)
    plan, _ = house.plan(*jobs, on_unknown=on_unknown)
    assert counts(plan) == {"kept": 2, "recover": 1, "generate": 1}
    assert plan.planned_usd == Decimal("0.05")
    found = {each.name: (each.needs, str(each.usd)) for each in plan.jobs}
    assert found["mug/100"] == found["twice"] == ("kept elsewhere", "0.00")
    for name, problem in plan.problems:
        assert problem.startswith(f"{name} was paid for, and its picture is in {there}")
        assert "on another-machine" in problem
    assert [name for name, _ in plan.problems] == ["mug/100", "twice"]
    assert "2, paid for and in the outbox of another machine" in plan.facts()["kept elsewhere"]
    assert (planned(plan).failed, {each.stage for each in planned(plan).failures}) == (2, {"generate"})
    assert counts(house.plan(*jobs, on_unknown=on_unknown, on_kept="repay")[0]) == {
        "recover": 1,
        "generate": 2,
        "reuse": 1,
    }


def test_a_plan_of_very_many_jobs_names_the_first_of_them_and_counts_all(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "LISTED", 3)
    lost = [Job(name=f"lost/{n}", image=str(tmp_path / "lost.jpg"), prompt="x") for n in range(5)]
    plan, _ = house.plan(lost[0], *(house.job(seed) for seed in range(100, 110)), *lost[1:])
    assert counts(plan) == {"generate": 10, "fail": 5}
    assert [each.name for each in plan.jobs] == ["lost/0", "mug/100", "mug/101"]
    assert [name for name, _ in plan.problems] == ["lost/0", "lost/1", "lost/2"]
    more = plan.with_failures([("bad", "no image")])
    assert (more.total, more.fail, more.jobs[0].name, len(more.jobs)) == (16, 6, "bad", 3)


def test_an_image_that_cannot_be_used_fails_its_own_job_and_no_other(house: House, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    broken = [
        Job(name="lost", image=str(tmp_path / "lost.jpg"), prompt="x"),
        Job(name="text", image=str(tmp_path / "notes.txt"), prompt="x"),
    ]
    plan, entries = house.plan(broken[0], house.job(100), broken[1])
    assert counts(plan) == {"fail": 2, "generate": 1}
    assert [name for name, _ in plan.problems] == ["lost", "text"]
    assert [type(each) for each in entries] == [Job, ValidatedJob, Job]


def test_a_name_that_the_archive_cannot_hold_fails_its_own_job_and_no_other(house: House, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "taken").write_bytes(b"somebody's own")
    plan, entries = house.plan(house.job(100, "taken/below"), house.job(101))
    assert counts(plan) == {"fail": 1, "generate": 1}
    assert plan.planned_usd == Decimal("0.05")
    assert "taken is no folder; choose another name" in dict(plan.problems)["taken/below"]
    assert [type(each) for each in entries] == [Job, ValidatedJob]


def test_names_that_differ_only_in_case_are_told_where_the_disk_takes_them_for_one(
    house: House, tmp_path: Path
) -> None:
    jobs = house.job(100, "hero/Summer"), house.job(101, "hero/summer"), house.job(102, "hero/winter")
    assert not any("upper and lower case" in warning for warning, _ in house.plan(*jobs)[0].warnings)
    (tmp_path / "archive").mkdir(exist_ok=True)
    (tmp_path / "ARCHIVE").symlink_to("archive")  # as such a disk shows it
    assert [count for warning, count in house.plan(*jobs)[0].warnings if "upper and lower case" in warning] == [1]


def test_a_drawn_seed_is_the_same_in_the_plan_and_in_the_run(house: House) -> None:
    job = house.job(100).model_copy(update={"seed": "random"})
    _, (first, second) = house.plan(job, job.model_copy(update={"name": "other"}))
    assert isinstance(first, ValidatedJob)
    assert isinstance(second, ValidatedJob)
    assert first.seed != second.seed
    assert first.parameters["seed"] == first.seed


@pytest.mark.parametrize(
    ("budget", "credits", "told"),
    [
        (None, None, []),
        ("0.20", "0.20", []),
        (None, "0.17", ["the account's credits of 0.17 USD pay for 3 of 4 pictures"]),
        ("0.10", "0.17", ["the budget of 0.10 USD pays for 2 of 4", "the account's credits of 0.17 USD pay for 3"]),
    ],
)
def test_a_plan_above_the_budget_or_the_credits_warns(budget: str | None, credits: str | None, told: list[str]) -> None:
    plan = Plan(
        **{"total": 4, "generate": 4, "reuse": 0, "recover": 0, "wait": 0, "fail": 0},
        price_usd=Decimal("0.05"),
        budget_usd=None if budget is None else Decimal(budget),
        credits_usd=None if credits is None else Decimal(credits),
    )
    warnings = plan.shortfalls()
    assert len(warnings) == len(told)
    assert all(text in warning for text, warning in zip(told, warnings, strict=True))


def test_what_a_plan_costs_is_the_most_where_the_provider_is_asked_first() -> None:
    plan = Plan(
        **{"total": 3, "generate": 1, "ask": 2, "reuse": 0, "recover": 0, "wait": 0, "fail": 0},
        price_usd=Decimal("0.05"),
        budget_usd=Decimal("0.05"),
    )
    assert plan.planned == "at most 0.15 USD"
    (warning,) = plan.shortfalls()
    assert warning == (
        "the plan costs at most 0.15 USD, the budget of 0.05 USD pays for 1 of 3 pictures: the run stops if that is "
        "spent"
    )
    assert PlannedJob(name="mug", needs="ask", usd=Decimal("0.05")).sentence() == "mug: ask, at most 0.05 USD"


def test_what_may_be_paid_for_a_second_time_is_told_where_the_provider_is_not_asked(house: House) -> None:
    house.lost(100)
    job = house.job(100)
    plan, _ = house.plan(job, house.job(101))
    assert plan.generate == 2
    assert plan.warnings[1:] == (
        ('an earlier request may have been billed, and another is paid for (on_unknown="repay")', 1),
    )


def test_warnings_are_told_once_with_their_number(house: House) -> None:
    plan, _ = house.plan(*(house.job(seed) for seed in range(100, 107)))
    ((warning, count),) = plan.warnings
    assert "crops 33%" in warning
    assert count == 7


def test_a_listing_of_the_archive_knows_its_own_files_only(house: House, tmp_path: Path) -> None:
    house.done(100)
    stray = tmp_path / "archive" / "notes" / f"{'ab' * 8}.json"
    stray.parent.mkdir()
    stray.write_text("{}")
    (tmp_path / "archive" / ".segmind" / "readme.json").write_text("{}")
    wanted = {house.fingerprint(100), house.fingerprint(101), "ab" * 32}
    recorded, archived, places = house.archive.survey(wanted)
    assert recorded == archived == {house.fingerprint(100)}
    assert f"notes/{'ab' * 8}" in places, "it is beside no record, so it counts for nothing"


def test_an_archive_that_does_not_exist_yet_is_an_empty_one(house: House, tmp_path: Path) -> None:
    empty = Archive(open_store(str(tmp_path / "nowhere")))
    assert empty.survey({"ab" * 32}) == (set(), set(), set())


def test_what_was_paid_for_under_another_spelling_is_reused(house: House) -> None:
    spaced = Job(name="mug", image=str(house.photo), prompt="a red mug ")
    (was,) = validate(spaced, house.reader).earlier
    key = f"mug/{was.fingerprint[:16]}.jpg"
    house.archive.put_sidecar(key, {})
    house.archive.write(Record(fingerprint=was.fingerprint).archived(PICTURE, key, key.replace(".jpg", ".json")), None)
    in_place = bytearray()
    plan, _ = house.plan(spaced, spaced.model_copy(update={"name": "cup"}), in_place=in_place)
    assert counts(plan) == {"reuse": 2}
    assert list(in_place) == [1, 0]
    assert house.store.asked == {"list": 1}
    plan, _ = house.plan(spaced, Job(name="cup", image=str(house.photo), prompt="a red mug"))
    assert plan.total == plan.generate + plan.reuse == 2
