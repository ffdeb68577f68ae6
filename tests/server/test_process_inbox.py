"""The inbox on a real Prefect server: what people put there becomes pictures, once, and nothing of it is lost."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.exceptions import ParameterTypeError

from prefect_segmind import BatchError, process_inbox
from prefect_segmind.batch import results
from prefect_segmind.errors import ConfigurationError, InvalidJobError, StoreError
from prefect_segmind.flows.process_inbox import InboxResult
from prefect_segmind.inbox.inbox import Inbox, Memory
from prefect_segmind.sandbox import Answer, Sandbox, sample_photo
from prefect_segmind.services import Services
from prefect_segmind.storage.open_store import open_store
from tests.support.server_events import all_events

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.many]
PROMPT = "{{ (stem) }} on a picnic blanket"


@pytest.fixture
def inbox(photo: Path) -> Path:
    """Two images, of which one lies deeper, a picture that is none, and a note."""
    folder = photo.parent / "inbox"
    (folder / "summer").mkdir(parents=True)
    shutil.copy(photo, folder / "cup.jpg")
    shutil.copy(photo, folder / "summer" / "pot.jpg")
    (folder / "broken.jpg").write_bytes(photo.read_bytes()[:3000])
    (folder / "notes.txt").write_text("for Tuesday")
    return folder


Events = Callable[[int], list[dict[str, Any]]]


@pytest.fixture
def failures(own_tag: str) -> Events:
    """The events of failed assets of this test's runs: so many, and no more behind them."""

    def told(many: int) -> list[dict[str, Any]]:
        events = all_events(own_tag, "prefect-segmind.asset.failed")
        assert len(events) == many, [each["payload"] for each in events]
        return events

    return told


def visit(inbox: Path | str, prompt: str = PROMPT, **parameters: Any) -> InboxResult:
    return process_inbox(str(inbox), prompt, **{"settle_seconds": 0.05, **parameters})


def test_each_new_image_becomes_a_picture_by_the_template(sandbox: Sandbox, inbox: Path) -> None:
    result = visit(inbox, style_type="ANIME", name="shop")
    assert {each.name for each in result.images} == {"shop/cup", "shop/summer/pot"}
    sent = [json.loads(Services().archive.content(each.sidecar) or b"")["request"] for each in result.images]
    assert {(each["prompt"], each["style_type"]) for each in sent} == {
        ("cup on a picnic blanket", "ANIME"),
        ("pot on a picnic blanket", "ANIME"),
    }
    assert (result.generated, result.cost_usd, result.ignored) == (2, Decimal("0.10"), ("notes.txt",))


def test_a_bad_file_stays_and_is_told_and_stops_no_other(sandbox: Sandbox, inbox: Path) -> None:
    result = visit(inbox, move_done=True)
    (failure,) = result.failures
    assert (failure.name, failure.stage) == ("inbox/broken", "validate")
    assert "cut short" in failure.error
    assert (inbox / "broken.jpg").exists()
    assert result.generated == 2
    with pytest.raises(BatchError):
        visit(inbox, fail_run_on_failures=True)


def test_each_version_of_a_bad_file_is_one_event_however_often_it_is_visited(
    sandbox: Sandbox, inbox: Path, failures: Events
) -> None:
    (inbox / "empty.jpg").touch()
    os.utime(inbox / "empty.jpg", (then := time.time() - 3600, then))
    shutil.copy(inbox / "cup.jpg", inbox / "cup.png")
    for _ in range(3):
        result = visit(inbox)
        assert {each.name for each in result.failures} == {"inbox/broken", "inbox/cup", "inbox/empty"}
        assert (result.failed, result.still_written) == (3, ())
    told = failures(3)
    assert {(each["payload"]["name"], each["payload"]["stage"]) for each in told} == {
        (name, "validate") for name in ("inbox/broken", "inbox/cup", "inbox/empty")
    }
    assert all(each["resource"]["prefect-segmind.stage"] == "validate" for each in told)
    errors = {each["payload"]["name"]: each["payload"]["error"] for each in told}
    assert f"{inbox}/empty.jpg: it has been empty for an hour" in errors["inbox/empty"]
    assert f"{inbox}/cup.png: name: inbox/cup is the name of cup.jpg" in errors["inbox/cup"]
    assert f"{inbox}/broken.jpg" in errors["inbox/broken"]
    (inbox / "broken.jpg").write_bytes((inbox / "cup.jpg").read_bytes()[:2000])
    visit(inbox)
    visit(inbox)
    assert [each["payload"]["name"] for each in failures(4)].count("inbox/broken") == 2


def test_a_file_that_was_bad_for_its_template_is_told_again_when_it_is_again(
    sandbox: Sandbox, inbox: Path, failures: Events
) -> None:
    (inbox / "broken.jpg").unlink()
    shutil.rmtree(inbox / "summer")
    for prompt in ("{{ season }}", "{{ season }}", "a cup", "{{ season }}"):
        visit(inbox, prompt)
    assert {each["payload"]["name"] for each in failures(2)} == {"inbox/cup"}


def test_a_dry_run_tells_nobody_and_remembers_nothing(sandbox: Sandbox, inbox: Path, failures: Events) -> None:
    (inbox / "cup.png").write_bytes(sample_photo((600, 402)))
    for _ in range(2):
        assert visit(inbox, dry_run=True).failed == 2
    assert not list(Services().archive.store.keys(".segmind/inbox/"))
    visit(inbox)
    assert visit(inbox, dry_run=True).failed == 2
    assert {each["payload"]["name"] for each in failures(2)} == {"inbox/broken", "inbox/cup"}


def test_a_bad_file_that_is_used_after_all_is_made(sandbox: Sandbox, inbox: Path) -> None:
    (inbox / "broken.jpg").unlink()
    (inbox / "wide.jpg").write_bytes(sample_photo((1600, 400)))
    assert [visit(inbox).failed for _ in range(2)] == [1, 1]
    assert visit(inbox, allow_extreme_ratio=True).generated == 1


def test_bad_files_are_moved_where_that_is_asked_for(sandbox: Sandbox, inbox: Path, tmp_path: Path) -> None:
    visit(inbox)
    (inbox / "summer" / "empty.jpg").touch()
    os.utime(inbox / "summer" / "empty.jpg", (then := time.time() - 3600, then))
    result = visit(inbox, move_failed=True)
    assert {Path(each).relative_to(inbox).as_posix() for each in result.moved_failed} == {
        "failed/broken.jpg",
        "failed/summer/empty.jpg",
    }
    assert (result.moved, result.failed, (inbox / "cup.jpg").exists()) == ((), 2, True)
    again = visit(inbox, move_failed=True)
    assert (again.failed, again.moved_failed, again.archived_before) == (0, (), 2)


def test_a_bad_file_is_moved_in_the_visit_that_finds_it(sandbox: Sandbox, inbox: Path) -> None:
    result = visit(inbox, move_failed=True, move_done=True)
    assert [Path(each).name for each in result.moved_failed] == ["broken.jpg"]
    assert sorted(path.relative_to(inbox).as_posix() for path in inbox.rglob("*.jpg")) == [
        "done/cup.jpg",
        "done/summer/pot.jpg",
        "failed/broken.jpg",
    ]
    assert visit(inbox).total == 0


def test_a_phones_photo_is_made_and_a_format_that_is_not_supported_fails_with_the_remedy(
    sandbox: Sandbox, inbox: Path
) -> None:
    for name in ("cup.jpg", "broken.jpg", "summer/pot.jpg"):
        (inbox / name).unlink()
    with Image.open(BytesIO(sample_photo((600, 402)))) as photo:
        pillow_heif.from_pillow(photo).save(inbox / "IMG_1.HEIC")
        photo.save(inbox / "scan.jp2")
    result = visit(inbox)
    assert (result.generated, result.ignored) == (1, ("notes.txt",))
    (failure,) = result.failures
    assert (failure.name, failure.stage) == ("inbox/scan", "validate")
    assert failure.error.endswith("is JPEG 2000, which is not supported; save it as PNG or JPEG")


def test_what_is_no_fault_of_a_file_moves_no_file(sandbox: Sandbox, inbox: Path) -> None:
    (inbox / "broken.jpg").unlink()
    assert visit(inbox, "{{ season }}", move_failed=True).moved_failed == ()
    sandbox.play(Answer(status=422, body='{"error": "unsafe"}'))
    assert visit(inbox, move_failed=True, max_concurrency=1).moved_failed == ()
    assert visit(inbox, dry_run=True, move_failed=True).moved_failed == ()
    assert (inbox / "cup.jpg").exists()


def test_nobody_waits_where_nothing_is_new(sandbox: Sandbox, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (inbox / "empty.jpg").touch()
    visit(inbox)
    waited: list[float] = []
    look = Inbox.look
    monkeypatch.setattr(Inbox, "look", lambda self, seconds, **more: look(self, seconds, waited.append, **more))
    result = visit(inbox, settle_seconds=3600)
    assert (waited, result.archived_before, result.failed, result.still_written) == ([], 2, 1, ("empty.jpg",))
    (inbox / "new.jpg").write_bytes(sample_photo((600, 402)))
    result = visit(inbox, settle_seconds=3600)
    assert (waited, result.generated, result.still_written) == ([3600], 0, ("empty.jpg", "new.jpg"))


def test_a_memory_that_cannot_be_kept_is_a_warning(
    sandbox: Sandbox, inbox: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("no room")

    monkeypatch.setattr(Memory, "keep", refuse)
    assert visit(inbox).generated == 2
    assert "cannot keep what this visit has seen for the next one: no room" in caplog.text


def test_the_page_of_a_visit_tells_why_a_file_stays_and_its_name_the_season(sandbox: Sandbox, inbox: Path) -> None:
    shutil.copy(inbox / "cup.jpg", inbox / "shop_vase.jpg")
    state: Any = visit(inbox, "{{ stem.split('_')[1] }} on a table", variables={"season": "autumn"}, return_state=True)
    flow_run_id = state.state_details.flow_run_id
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        found = {
            str(each.key).partition("-")[0]: str(each.data) for each in client.read_artifacts(artifact_filter=wanted)
        }
        assert client.read_flow_run(flow_run_id).name == f"process-inbox {inbox} season=autumn"
    for page in (found["plan"], found["batch"]):
        assert "inbox/cup" in page
        assert "inbox/summer/pot" in page
    assert "4 assets: 1 generated, 3 failed" in found["batch"]


def test_what_the_archive_has_is_skipped_and_costs_nothing(sandbox: Sandbox, inbox: Path) -> None:
    (inbox / "broken.jpg").unlink()
    visit(inbox)
    shutil.copy(inbox / "cup.jpg", inbox / "bowl.jpg")
    result = visit(inbox)
    assert (result.total, result.generated, result.archived_before) == (1, 1, 2)
    assert sandbox.ledger.requests[-1].prompt == "bowl on a picnic blanket"
    again = visit(inbox)
    assert (again.total, again.archived_before, again.cost_usd) == (0, 3, Decimal(0))
    assert sandbox.ledger.billed == 3


def test_the_same_picture_under_another_name_is_copied_and_not_paid_again(sandbox: Sandbox, inbox: Path) -> None:
    (inbox / "broken.jpg").unlink()
    result = visit(inbox, "a red mug on a table")
    assert {(each.name, each.status) for each in result.images} >= {("inbox/cup", "generated")} or result.reused == 1
    assert (result.generated, result.reused, sandbox.ledger.billed) == (1, 1, 1)


def test_a_file_that_changes_under_its_name_is_new(sandbox: Sandbox, inbox: Path, photo: Path) -> None:
    visit(inbox)
    (inbox / "cup.jpg").write_bytes(sample_photo((640, 480)))
    assert visit(inbox).generated == 1
    assert sandbox.ledger.billed == 3


def test_done_files_move_and_those_of_an_earlier_visit_too(sandbox: Sandbox, inbox: Path) -> None:
    visit(inbox)
    result = visit(inbox, move_done=True)
    assert {Path(each).relative_to(inbox).as_posix() for each in result.moved} == {
        "done/cup.jpg",
        "done/summer/pot.jpg",
    }
    assert not (inbox / "cup.jpg").exists()
    assert (inbox / "done" / "summer" / "pot.jpg").exists()
    assert visit(inbox).total == 1, "only the broken one is left"
    assert sandbox.ledger.billed == 2


def test_every_done_file_moves_however_few_pictures_a_result_names(
    sandbox: Sandbox, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "NAMED", 1)
    result = visit(inbox, move_done=True, move_failed=True)
    assert (result.generated, len(result.images), len(result.failures)) == (2, 1, 1)
    assert (len(result.moved), len(result.moved_failed)) == (2, 1)


def test_what_failed_is_not_moved_and_the_next_visit_makes_it(sandbox: Sandbox, inbox: Path) -> None:
    (inbox / "broken.jpg").unlink()
    (inbox / "summer" / "pot.jpg").unlink()
    sandbox.play(Answer(status=422, body='{"error": "unsafe"}'))
    first = visit(inbox, move_done=True)
    assert (first.failed, first.moved, (inbox / "cup.jpg").exists()) == (1, (), True)
    second = visit(inbox, move_done=True)
    assert (second.generated, len(second.moved), sandbox.ledger.billed) == (1, 1, 1)


def test_an_inbox_in_s3_works_alike(sandbox: Sandbox, inbox: Path, tmp_path: Path) -> None:
    place = f"s3://segmind/{tmp_path.name}/inbox"
    store = open_store(place, Services().s3)
    for path in inbox.rglob("*.jpg"):
        store.put(path.relative_to(inbox).as_posix(), path.read_bytes(), "image/jpeg")
    result = visit(place, move_done=True)
    assert (result.generated, result.failed) == (2, 1)
    assert set(store.keys("")) == {"broken.jpg", "done/cup.jpg", "done/summer/pot.jpg"}
    assert sandbox.ledger.billed == 2


def test_an_empty_inbox_is_no_failure(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "inbox").mkdir()
    result = visit(tmp_path / "inbox")
    assert (result.total, result.cost_usd, result.dry_run) == (0, Decimal(0), False)


def test_a_dry_run_tells_and_moves_nothing(sandbox: Sandbox, inbox: Path) -> None:
    result = visit(inbox, dry_run=True, move_done=True, fail_run_on_failures=True)
    assert {(each.name, each.needs) for each in result.jobs} == {
        *(("inbox/cup", "generate"), ("inbox/summer/pot", "generate"), ("inbox/broken", "fail"))
    }
    assert result.sentence() == "3 assets: would generate 2; 1 would fail; would cost 0.10 USD"
    assert (result.generated, result.failed, result.planned_usd, result.dry_run) == (2, 1, Decimal("0.10"), True)
    assert sandbox.ledger.requests == ()
    assert not (inbox / "done").exists()


@pytest.mark.parametrize("files", [True, False])
def test_a_mistake_in_the_template_is_told_at_once_even_if_the_inbox_is_empty(
    sandbox: Sandbox, inbox: Path, files: bool
) -> None:
    if not files:
        shutil.rmtree(inbox)
        inbox.mkdir()
    with pytest.raises(InvalidJobError, match="Did you mean REALISTIC"):
        visit(inbox, style_type="realistic")
    assert sandbox.ledger.requests == ()


def test_a_template_that_names_what_is_not_there_is_told_for_each_file(sandbox: Sandbox, inbox: Path) -> None:
    result = visit(inbox, "{{ season }} light")
    assert result.failed == len(result.failures) == result.total == 3
    assert "season" in result.failures[0].error
    assert sandbox.ledger.requests == ()


def test_a_file_to_which_the_template_does_not_fit_stands_in_no_others_way(sandbox: Sandbox, inbox: Path) -> None:
    shutil.copy(inbox / "cup.jpg", inbox / "shop_vase.jpg")
    result = visit(inbox, "{{ stem.split('_')[1] }} on a table", move_done=True)
    assert [each.name for each in result.images] == ["inbox/shop_vase"]
    assert {each.name for each in result.failures} == {"inbox/broken", "inbox/cup", "inbox/summer/pot"}
    assert (inbox / "cup.jpg").exists()


def test_long_names_that_differ_at_their_end_are_all_made(sandbox: Sandbox, inbox: Path) -> None:
    (inbox / "broken.jpg").unlink()
    long = "a-cosy-mug-" * 12
    for n, name in enumerate((f"{long}1.jpg", f"{long}2.jpg")):
        (inbox / name).write_bytes(sample_photo((600, 400 + n)))
    result = visit(inbox)
    assert (result.generated + result.reused, result.failed) == (4, 0)
    assert len({each.image for each in result.images}) == 4


@pytest.mark.parametrize("first", ["cup.jpg", "cup.png"])
def test_of_two_files_of_one_name_the_later_is_told_and_skipped_and_the_address_stays(
    sandbox: Sandbox, inbox: Path, tmp_path: Path, first: str
) -> None:
    shutil.rmtree(inbox)
    inbox.mkdir()
    later = {"cup.jpg": "cup.png", "cup.png": "cup.jpg"}[first]
    (inbox / first).write_bytes(sample_photo((600, 400)))
    live = str(tmp_path / "live")
    alone = visit(inbox, publish_to=live).images[0]
    time.sleep(0.02)  # the clock of the file system is that coarse
    (inbox / later).write_bytes(sample_photo((600, 402)))
    os.utime(inbox / later, (1.7e9, 1.7e9))  # copied with its date: it has come later all the same
    result = visit(inbox, publish_to=live)
    assert [(each.name, each.published) for each in result.images] == [("inbox/cup", alone.published)]
    (failure,) = result.failures
    assert (failure.name, failure.stage, result.failed) == ("inbox/cup", "validate", 1)
    assert failure.error == (
        f"name: inbox/cup is the name of {first}, which came first; rename {later}, or put "
        "{{ (stem) }}-{{ (suffix) }} into the flow's name"
    )
    assert sandbox.ledger.billed == 1
    both = visit(inbox, name="inbox/{{ (stem) }}-{{ (suffix) }}")
    assert {each.name for each in both.images} == {"inbox/cup-jpg", "inbox/cup-png"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_what_cannot_be_read_is_told_by_name_and_stands_in_no_others_way(
    sandbox: Sandbox, inbox: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(inbox / "cup.jpg", inbox / os.fsdecode(b"caf\xe9.jpg"))
    (inbox / "closed").mkdir()
    real = os.scandir

    def scandir(path: object) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scandir)
    result = visit(inbox)
    assert (result.generated, result.failed) == (2, 1)
    assert result.ignored == ("caf\\udce9.jpg", "closed", "notes.txt")
    assert [line.partition(": ")[0] for line in result.unreadable] == ["caf\\udce9.jpg", "closed"]
    for line in result.unreadable:
        assert f"skipped: {line}" in caplog.text
    assert json.loads(result.model_dump_json())["ignored"] == list(result.ignored)


def test_a_done_and_moved_file_stands_in_no_other_one_s_way(sandbox: Sandbox, inbox: Path) -> None:
    visit(inbox, move_done=True)
    (inbox / "cup.png").write_bytes(sample_photo((600, 402)))
    result = visit(inbox)
    assert {each.name for each in result.images} == {"inbox/cup"}
    assert sandbox.ledger.billed == 3


def test_the_folder_of_the_archive_may_be_a_template_too(sandbox: Sandbox, inbox: Path) -> None:
    (inbox / "broken.jpg").unlink()
    result = visit(inbox, name="{{ season | lower }}", variables={"season": "AUTUMN"}, move_done=True)
    assert {each.name for each in result.images} == {"autumn/cup", "autumn/summer/pot"}
    assert len(result.moved) == 2


@pytest.mark.parametrize("wrong", ["shop/", "/shop", "..", ".hidden"])
def test_a_folder_that_cannot_be_is_told_at_once(sandbox: Sandbox, inbox: Path, wrong: str) -> None:
    with pytest.raises(InvalidJobError, match="name"):
        visit(inbox, name=wrong)


def test_unlisted_resolutions_are_let_through_where_the_setting_does(
    sandbox: Sandbox, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_ALLOW_UNLISTED_RESOLUTION", "true")
    assert visit(inbox, resolution="RESOLUTION_800_800", dry_run=True).generated == 2


def test_a_random_seed_is_refused_for_every_visit_would_pay_again(sandbox: Sandbox, inbox: Path) -> None:
    with pytest.raises(ParameterTypeError, match="seed"):
        visit(inbox, seed="random")


def test_a_wait_that_cannot_be_is_refused(sandbox: Sandbox, inbox: Path) -> None:
    with pytest.raises(ConfigurationError, match="settle_seconds"):
        visit(inbox, settle_seconds=-1)


def test_a_variable_that_no_template_names_is_told(
    sandbox: Sandbox, inbox: Path, caplog: pytest.LogCaptureFixture
) -> None:
    visit(inbox, variables={"seson": "autumn"}, dry_run=True)
    assert caplog.text.count("variable seson") == 1


def test_a_bad_file_leaves_no_manifest_behind_at_each_visit(sandbox: Sandbox, inbox: Path) -> None:
    assert visit(inbox).failed_manifest is None
    assert not [key for key in Services().archive.store.keys(".segmind/runs/") if "failed" in key]


def test_there_must_be_an_inbox(sandbox: Sandbox, inbox: Path) -> None:
    with pytest.raises(ConfigurationError, match="did you mean inbox"):
        visit(inbox.parent / "inbx")


def test_a_budget_ends_the_visit_and_the_next_goes_on(sandbox: Sandbox, inbox: Path) -> None:
    (inbox / "broken.jpg").unlink()
    first = visit(inbox, budget_usd=Decimal("0.05"), max_concurrency=1)
    assert (first.generated, first.not_started) == (1, 1)
    assert visit(inbox, budget_usd=Decimal("0.05")).generated == 1


def test_published_pictures_are_published_again_and_not_paid_again(
    sandbox: Sandbox, inbox: Path, tmp_path: Path
) -> None:
    live = tmp_path / "live"
    first = visit(inbox, publish_to=str(live))
    assert {each.published for each in first.images} == {
        str(live / "inbox" / "cup.png"),
        str(live / "inbox" / "summer" / "pot.png"),
    }
    (live / "inbox" / "cup.png").unlink()
    again = visit(inbox, publish_to=str(live))
    assert (again.reused, (live / "inbox" / "cup.png").exists()) == (2, True)
    assert sandbox.ledger.billed == 2
