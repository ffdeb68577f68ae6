"""A paid picture is archived though nobody asks for its job again."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from prefect_segmind.archive import leases
from prefect_segmind.archive.outbox import ABANDONED_SECONDS
from prefect_segmind.archive.record import Run
from prefect_segmind.cli.commands import run as command
from prefect_segmind.cli.outbox import look
from prefect_segmind.errors import StoreError
from prefect_segmind.pipeline.archive import Archiving
from prefect_segmind.pipeline.left_over import LeftOver, archive_left_over
from prefect_segmind.pipeline.pay import GeneratedImage
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from prefect_segmind.storage.reserved_file import SPACE_SUFFIX
from tests.support.walk import archive_picture, generate, left, up_to_upload, walk


def archived(run: str = "another") -> LeftOver:
    services = Services()
    return archive_left_over(Archiving(services.archive, services.outbox), Run(run), "flow run")


def files() -> list[Path]:
    outbox = Path(os.environ["PREFECT_INTEGRATIONS_SEGMIND_OUTBOX"])
    return [each for each in outbox.rglob("*") if each.is_file()]


def test_a_picture_of_a_job_that_nobody_asks_for_again_is_archived_under_its_name(
    sandbox: Sandbox, photo: Path
) -> None:
    before = left(photo, name="hero/summer", seed="random", prompt="a red mug ")
    found = archived()
    assert (list(found.archived), found.stayed) == ([before.path], {})
    (image,) = found.archived.values()
    assert (image.name, image.status, image.sha256) == ("hero/summer", "recovered", before.picture.sha256)
    assert (image.cost_usd, image.attempts, image.possibly_billed_usd) == (0, 0, 0)
    assert image.image == Services().archive.store.uri(f"hero/summer/{before.job.fingerprint[:16]}.jpg")
    read = Services().archive.read(before.job.fingerprint)
    assert read is not None
    assert (read.record.state, read.record.attempts[0].cost_usd) == ("done", Decimal("0.05"))
    sidecar = json.loads(Services().archive.content(image.sidecar) or b"")
    assert (sidecar["request"]["image_file"], sidecar["cost_usd"]) == (before.source_uri, "0.05")
    assert sidecar["job"] == before.job.job.model_dump(mode="json")
    assert (files(), sandbox.ledger.billed) == ([], 1)
    assert archived() == LeftOver({}, {})


def test_what_a_killed_run_had_just_received_is_archived_though_nobody_asks_for_it_again(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    job, uploaded = up_to_upload(photo, name="hero/summer", seed="random")
    with monkeypatch.context() as now:
        now.setattr("prefect_segmind.api.client.read_picture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(job, uploaded)
    leases._claims.clear()
    found = archived()
    assert ([each.name for each in found.archived.values()], found.stayed) == (["hero/summer"], {})
    read = Services().archive.read(job.fingerprint)
    assert read is not None
    assert (read.record.state, files(), sandbox.ledger.billed) == ("done", [], 1)


def test_a_picture_that_a_live_run_is_about_to_archive_is_left_to_it(sandbox: Sandbox, photo: Path) -> None:
    mine = generate(*up_to_upload(photo))
    assert archived() == LeftOver({}, {})
    assert archive_picture(mine).status == "generated"


def test_what_a_run_could_not_remove_any_more_is_removed(sandbox: Sandbox, photo: Path) -> None:
    before = left(photo)
    assert before.path is not None
    data = before.path.read_bytes()
    archive_picture(before)
    before.path.write_bytes(data)
    assert archived() == LeftOver({}, {})
    assert files() == []


def test_the_command_does_not_list_what_the_archive_had_already(sandbox: Sandbox, photo: Path) -> None:
    before = left(photo)
    waiting = {each: each.read_bytes() for each in files()}
    archive_picture(before)
    for path, data in waiting.items():
        path.write_bytes(data)
    assert [each.path for each in look(archive=False)] == [str(before.path)]
    assert (look(archive=True), files()) == ([], [])


def test_what_the_archive_has_lost_stays_in_the_outbox_and_is_reported(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(tmp_path / "archive"))
    before = left(photo)
    assert before.path is not None
    data = before.path.read_bytes()
    image = Path(archive_picture(before).image)
    before.path.write_bytes(data)
    image.unlink()
    found = archived()
    assert (found.archived, files()) == ({}, [before.path])
    assert "is gone from the archive, though it was paid for" in found.stayed[before.path]
    image.write_bytes(data)
    assert (archived(), files()) == (LeftOver({}, {}), [])


def test_a_picture_is_for_the_same_archive_when_its_folder_has_become_a_link(
    sandbox: Sandbox, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "archive"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(folder))
    before = left(photo, seed="random")
    folder.rename(tmp_path / "moved")
    folder.symlink_to("moved")
    found = archived()
    assert (list(found.archived), found.stayed, files()) == ([before.path], {}, [])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
@pytest.mark.parametrize("after", [".part", ".facts"])
def test_a_picture_is_archived_wherever_the_process_that_kept_it_was_killed(
    sandbox: Sandbox, photo: Path, after: str
) -> None:
    job, uploaded = up_to_upload(photo, seed="random")
    process = os.fork()
    if process == 0:  # pragma: no cover
        real = Path.replace

        def killed(self: Path, target: Path) -> Path:
            renamed = real(self, target)
            if self.suffix == after:
                os._exit(9)
            return renamed

        Path.replace = killed  # type: ignore[method-assign, assignment]
        try:
            generate(job, uploaded)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    found = archived()
    assert ([each.fingerprint for each in found.archived.values()], found.stayed) == ([job.fingerprint], {})
    assert (files(), sandbox.ledger.billed) == ([], 1)


def test_the_space_that_a_killed_run_had_reserved_is_given_up_and_that_of_a_live_one_stays(
    sandbox: Sandbox,
) -> None:
    outbox = Services().outbox
    with outbox.receive("a" * 64, "killed") as killed, outbox.receive("b" * 64, "live"):
        before = set(files())
        (space,) = (each for each in before if each.name.endswith(SPACE_SUFFIX) and each.stem.startswith(killed.stem))
        a_day_ago = space.stat().st_mtime - ABANDONED_SECONDS - 1
        os.utime(space, (a_day_ago, a_day_ago))
        assert archived() == LeftOver({}, {})
        assert before - set(files()) == {space}


def test_another_picture_of_an_archived_job_stays_and_is_reported(sandbox: Sandbox, photo: Path) -> None:
    first = archive_picture(left(photo))
    outbox = Services().outbox
    outbox.check()
    other = outbox.folder / f"{first.fingerprint}.jpg"
    other.write_bytes(photo.read_bytes())
    found = archived()
    assert found.archived == {}
    assert f"the archive has another picture of the same job, {first.image}" in found.stayed[other]
    assert other.is_file()


def test_a_picture_whose_job_is_not_known_stays_and_is_reported(sandbox: Sandbox, photo: Path) -> None:
    before = left(photo)
    assert before.path is not None
    facts = before.path.with_suffix(".json")
    known = json.loads(facts.read_text())
    for broken in ({**known, "job": {"job": {"name": "x"}, "another": "version"}}, {**known, "job": None}, {}):
        facts.write_text(json.dumps(broken))
        found = archived()
        assert (found.archived, list(found.stayed)) == ({}, [before.path])
        assert "run the same job again" in found.stayed[before.path]
    assert walk(photo).status == "recovered"


def test_a_picture_for_another_archive_is_none_of_a_runs_business(
    sandbox: Sandbox, photo: Path, tmp_path: Path
) -> None:
    before = left(photo)
    assert before.path is not None
    facts = before.path.with_suffix(".json")
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "archive": str(tmp_path / "other")}))
    assert archived() == LeftOver({}, {})


def test_an_archive_out_of_reach_is_asked_once_and_no_failure_of_the_run(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [left(photo, seed=seed) for seed in (100, 200)]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    found = archived()
    assert (found.archived, list(found.stayed)) == ({}, [before[0].path])


def test_a_picture_that_cannot_be_archived_keeps_no_other_from_it(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (left(photo, seed=seed) for seed in (100, 200))
    real = Archiving._archive

    def failing(self: Archiving, generated: GeneratedImage, *more: Any) -> Any:
        if generated.job.seed == 100:
            raise StoreError("its name is taken")
        return real(self, generated, *more)

    monkeypatch.setattr(Archiving, "_archive", failing)
    found = archived()
    assert (list(found.archived), list(found.stayed)) == ([second.path], [first.path])


def listed(capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> list[dict[str, Any]]:
    assert command(["outbox", "--json", *options]) == code
    found = json.loads(capsys.readouterr().out)["files"]
    assert isinstance(found, list)
    return found


def test_the_command_lists_what_waits_in_all_outboxes_and_archives_it(
    sandbox: Sandbox,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = [left(photo, name="hero/summer")]
    with monkeypatch.context() as other:
        other.setenv("PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE", str(tmp_path / "other"))
        before.append(left(photo, name="hero/winter"))
    sandbox.play(Answer(kind="html"))
    with pytest.raises(Exception, match="without a picture"):
        left(photo, name="odd", seed=200)
    found = listed(capsys)
    assert [(each["name"], each["kind"], each["cost_usd"]) for each in found] == [
        ("hero/summer", "picture", "0.05"),
        ("hero/winter", "picture", "0.05"),
        ("odd", "answer", "0.05"),
    ]
    assert [each["path"] for each in found[:2]] == [str(each.path) for each in before]
    assert [each["archive"] for each in found[:2]] == [each.archive for each in before]
    assert all(each["size_bytes"] and not each["image"] and not each["problem"] for each in found)
    assert datetime.fromisoformat(found[0]["written"]) <= datetime.now(UTC)
    made = listed(capsys, "--archive")
    assert [bool(each["image"]) for each in made] == [True, True, False]
    assert made[1]["image"].startswith(str(tmp_path / "other"))
    assert [each["kind"] for each in listed(capsys)] == ["answer"], "only a person can judge it"
    assert sandbox.ledger.billed == 3


def test_the_command_tells_people_what_waits_and_what_stays(
    sandbox: Sandbox, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["outbox"]) == 0
    assert "nothing waits to be archived" in capsys.readouterr().out
    before = left(photo, name="hero/summer")
    assert before.path is not None
    assert command(["outbox"]) == 0
    said = capsys.readouterr().out
    assert f"hero/summer, picture, 0.05 USD, {before.picture.size_bytes / 1000:.1f} kB" in said
    assert f"for {before.archive}: {before.path}" in said
    before.path.with_suffix(".json").unlink()
    assert command(["outbox", "--archive"]) == 1
    assert "an unknown job, picture, unknown cost" in (said := capsys.readouterr().out)
    assert "run the same job again" in said


def test_the_command_names_the_archive_that_is_out_of_reach(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left(photo)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    (found,) = listed(capsys, "--archive", code=1)
    assert "no answer" in found["problem"]
    assert files() != []


def test_a_record_that_is_gone_is_written_again(sandbox: Sandbox, photo: Path) -> None:
    before = left(photo)
    archive = Services().archive
    bucket, _, prefix = archive.url.removeprefix("s3://").partition("/")
    Services().s3.delete_object(Bucket=bucket, Key=f"{prefix}/.segmind/{before.job.fingerprint}.json")
    assert list(archived().archived) == [before.path]
    again = archive.read(before.job.fingerprint)
    assert again is not None
    assert (again.record.state, len(again.record.attempts)) == ("done", 1)
