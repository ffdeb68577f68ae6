"""The outbox: nothing is paid for that could not be kept, and what is paid for is found."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.picture import Answered, PaidPicture
from prefect_segmind.archive.outbox import RESERVED_BYTES, Outbox, OutboxEntry
from prefect_segmind.archive.record import Asked, Attempt
from prefect_segmind.errors import AnswerCutError, OutboxError
from prefect_segmind.images.inspection import Picture, read_picture
from tests.support.wire import Wire, http

PRINT = "ab" * 32
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def drawn(format: str = "PNG", colour: str = "red") -> bytes:
    file = BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, format)
    return file.getvalue()


SHA256 = hashlib.sha256(drawn()).hexdigest()


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "deep" / "outbox", 0)


def entry(path: Path) -> OutboxEntry:
    facts = read_picture(path).model_dump()
    paid = PaidPicture(**facts, seed=4711, cost_usd=Decimal("0.04"), cost_source="x-cost", request_id="r", paid_at=NOW)
    return OutboxEntry(paid=paid, attempts=(Attempt(run="one", sent_at=NOW, status=200, possibly_billed=False),))


def received(outbox: Outbox, data: bytes = drawn()) -> tuple[Path, OutboxEntry]:
    """A picture that has arrived as `generation` lets it arrive."""
    with outbox.receive(PRINT, "one") as part:
        part.write_bytes(data)
        known = entry(part)
        return outbox.keep(PRINT, part, known), known


def failing(outbox: Outbox, data: bytes, error: BaseException) -> None:
    """An answer that comes to this."""
    with outbox.receive(PRINT, "one") as part:
        part.write_bytes(data)
        raise error


def found(outbox: Outbox, *, unfinished: bool = True) -> tuple[Path, OutboxEntry] | None:
    return outbox.find(PRINT, seed=100, list_price_usd=Decimal("0.05"), unfinished=unfinished)


def names(outbox: Outbox) -> set[str]:
    return {each.name for each in outbox.folder.iterdir()}


class TestReceiving:
    def test_space_for_a_picture_is_taken_before_it_is_asked_for(self, outbox: Outbox) -> None:
        with outbox.receive(PRINT, "one") as part:
            assert part.stat().st_size == 0, "the file itself is as long as what has come"
            if sys.platform == "linux":
                assert part.with_suffix(".space.part").stat().st_blocks * 512 >= RESERVED_BYTES, "and not only promised"
        assert names(outbox) == set()

    def test_a_request_that_brought_no_picture_leaves_nothing_behind(self, outbox: Outbox) -> None:
        with pytest.raises(AnswerCutError):
            failing(outbox, b"half", AnswerCutError("cut"))
        with pytest.raises(KeyboardInterrupt), outbox.receive(PRINT, "one"):
            raise KeyboardInterrupt
        assert names(outbox) == set()

    def test_what_had_arrived_when_a_run_was_interrupted_stays(self, outbox: Outbox) -> None:
        with pytest.raises(KeyboardInterrupt):
            failing(outbox, drawn(), KeyboardInterrupt())
        kept = found(outbox)
        assert kept is not None
        assert kept[0].read_bytes() == drawn()

    def test_what_a_failing_disk_holds_of_a_paid_picture_stays(self, outbox: Outbox) -> None:
        with pytest.raises(OutboxError, match="the disk failed"):
            failing(outbox, drawn(), OutboxError("the disk failed"))
        (part,) = outbox.folder.iterdir()
        assert part.read_bytes() == drawn()

    def test_two_runs_do_not_write_into_one_file(self, outbox: Outbox) -> None:
        with outbox.receive(PRINT, "one") as first, outbox.receive(PRINT, "../two") as second:
            assert first != second
            assert first.parent == second.parent == outbox.folder

    def test_a_kept_picture_lies_there_with_its_facts_and_nothing_else(self, outbox: Outbox) -> None:
        path, _ = received(outbox)
        assert path.read_bytes() == drawn()
        assert names(outbox) == {f"{PRINT}.{SHA256[:16]}.png", f"{PRINT}.{SHA256[:16]}.json"}

    def test_too_little_free_space_is_told_before_anything_is_paid(self, outbox: Outbox) -> None:
        small = Outbox(outbox.folder, 10**18)
        with pytest.raises(OutboxError, match="1000000000000 MB are needed; nothing was paid") as caught:
            received(small)
        assert not caught.value.possibly_billed
        assert "PREFECT_INTEGRATIONS_SEGMIND_OUTBOX" in str(caught.value)
        assert names(outbox) == set()

    @pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
    def test_a_disk_that_cannot_take_a_picture_costs_nothing_and_is_left_clean(self, outbox: Outbox) -> None:
        code = f"""
import resource, signal
from pathlib import Path
from prefect_segmind.errors import OutboxError
from prefect_segmind.archive.outbox import RESERVED_BYTES, Outbox
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (RESERVED_BYTES - 1, RESERVED_BYTES - 1))
try:
    with Outbox(Path({str(outbox.folder)!r}), 0).receive({PRINT!r}, "one"):
        print("paid")
except OutboxError as error:
    print(error.possibly_billed, error)
"""
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said.startswith("False outbox: ")
        assert "File too large; nothing was paid" in said
        assert names(outbox) == set()

    def test_a_place_that_is_no_folder_is_told_before_anything_is_paid(self, tmp_path: Path) -> None:
        file = tmp_path / "outbox"
        file.write_text("a file")
        for folder in (file, file / "below"):
            assert found(Outbox(folder)) is None
            with pytest.raises(OutboxError, match="nothing was paid"):
                received(Outbox(folder, 0))
        assert file.read_text() == "a file"

    def test_a_folder_that_may_not_be_read_is_not_taken_for_empty(
        self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        received(outbox)

        def refuse(_: Path) -> list[str]:  # as for anybody but root
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "listdir", refuse)
        with pytest.raises(OutboxError, match="it cannot be read: Permission denied; nothing was paid"):
            found(outbox)
        outbox.remove(PRINT, SHA256)

    def test_a_folder_that_may_not_be_written_is_told_before_anything_is_paid(
        self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("prefect_segmind.archive.outbox.os.access", lambda *_: False)  # as for anybody but root
        with pytest.raises(OutboxError, match="it cannot be written; nothing was paid"):
            outbox.check()

    def test_a_file_that_cannot_be_made_is_told_before_anything_is_paid(self, outbox: Outbox) -> None:
        with outbox.receive(PRINT, "one") as part:
            pass
        part.mkdir()
        with pytest.raises(OutboxError, match="Is a directory; nothing was paid"):
            received(outbox)


class TestKeeping:
    def test_a_picture_that_cannot_be_made_durable_is_possibly_billed_and_named(self, outbox: Outbox) -> None:
        outbox.check()
        (outbox.folder / f"{PRINT}.{SHA256[:16]}.png").mkdir()  # the name is taken, and by what cannot be replaced
        with pytest.raises(OutboxError, match="could not be made durable") as caught:
            received(outbox)
        (part,) = outbox.folder.glob("*.part")
        assert (caught.value.status, caught.value.possibly_billed) == (200, True)
        assert str(part) in str(caught.value)
        assert part.read_bytes() == drawn()

    @pytest.mark.parametrize("what", ["folder", "file"])
    def test_a_folder_need_not_be_synced_where_the_system_cannot_but_a_file_must(
        self, what: str, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.open

        def refuse(path: Path, flags: int, mode: int = 0o777) -> int:  # folders cannot be opened on Windows
            if Path(path).is_dir() is (what == "folder"):
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(path, flags, mode)

        outbox.check()
        monkeypatch.setattr("prefect_segmind.archive.outbox.os.open", refuse)
        if what == "folder":
            assert received(outbox)[0].read_bytes() == drawn()
        else:
            with pytest.raises(OutboxError, match="could not be made durable: Permission denied"):
                received(outbox)

    def test_a_picture_is_safe_though_its_facts_could_not_be_noted(self, outbox: Outbox) -> None:
        outbox.check()
        (outbox.folder / f"{PRINT}.{SHA256[:16]}.json").mkdir()
        path, _ = received(outbox)
        assert path.read_bytes() == drawn()
        kept = found(outbox)
        assert kept is not None
        assert kept[0] == path


class TestFinding:
    def test_nothing_is_found_where_nothing_is(self, outbox: Outbox) -> None:
        assert found(outbox) is None

    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
    def test_a_kept_picture_of_any_kind_is_found_with_its_facts(self, format: str, outbox: Outbox) -> None:
        path, known = received(outbox, drawn(format))
        assert found(outbox) == (path, known)

    def test_a_picture_without_its_facts_is_found_with_what_can_be_known(self, outbox: Outbox) -> None:
        path, _ = received(outbox)
        path.with_suffix(".json").unlink()
        kept = found(outbox)
        assert kept is not None
        assert kept[0] == path
        paid = kept[1].paid
        assert (paid.seed, paid.cost_usd, paid.cost_source, paid.request_id) == (
            100,
            Decimal("0.05"),
            "list price",
            None,
        )
        assert "recovered after a crash" in paid.notices[0]
        assert kept[1].attempts == ()

    @pytest.mark.parametrize("facts", ["", "{}", "null", "\ud800", "[" * 100_000, '{"paid":' * 100_000])
    def test_broken_facts_do_not_hide_a_picture(self, facts: str, outbox: Outbox) -> None:
        path, _ = received(outbox)
        path.with_suffix(".json").write_bytes(facts.encode("utf-8", "surrogatepass"))
        kept = found(outbox)
        assert kept is not None
        assert kept[1].paid.cost_source == "list price"

    @pytest.mark.parametrize(
        "facts",
        [
            {"cost_usd": "1e999999999"},
            {"cost_usd": "1e-999999"},
            {"cost_usd": "NaN"},
            {"paid_at": "2026-01-02T00:00:00"},
            {"paid_at": 10**300},
            {"seed": 1e300},
            {"sha256": ["x"]},
        ],
    )
    def test_facts_that_cannot_be_are_not_believed(self, facts: dict[str, object], outbox: Outbox) -> None:
        path, known = received(outbox)
        written = json.loads(known.model_dump_json())
        path.with_suffix(".json").write_text(json.dumps({**written, "paid": {**written["paid"], **facts}}))
        kept = found(outbox)
        assert kept is not None
        assert kept[1].paid.cost_source == "list price"

    def test_the_facts_of_another_picture_are_not_taken_for_this_ones(self, outbox: Outbox) -> None:
        path, _ = received(outbox)
        path.write_bytes(drawn(colour="blue"))
        kept = found(outbox)
        assert kept is not None
        assert kept[1].paid.sha256 == read_picture(path).sha256
        assert kept[1].paid.cost_source == "list price"

    def test_a_damaged_picture_is_told_and_not_paid_for_again_behind_your_back(self, outbox: Outbox) -> None:
        path, _ = received(outbox)
        path.write_bytes(drawn()[:40])
        with pytest.raises(OutboxError, match=r"was paid for and .*; restore it, or move it away and pay once more"):
            found(outbox)

    def test_an_outbox_that_cannot_be_read_is_never_taken_for_an_empty_one(
        self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        received(outbox)

        def refuse(path: Path) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr("prefect_segmind.archive.outbox.read_picture", refuse)
        with pytest.raises(OutboxError, match="cannot be read: Too many open files"):
            found(outbox)

    def test_an_answer_that_arrived_whole_is_found_unless_its_run_may_still_live(self, outbox: Outbox) -> None:
        outbox.check()
        part = outbox.folder / f"{PRINT}.0123456789abcdef.part"
        part.write_bytes(drawn())
        assert found(outbox, unfinished=False) is None
        kept = found(outbox)
        assert kept is not None
        assert kept[0] == outbox.folder / f"{PRINT}.{SHA256[:16]}.png"
        assert kept[0].read_bytes() == drawn()
        assert found(outbox, unfinished=False) == kept

    @pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
    @pytest.mark.parametrize("form", ["bytes", "base64", "link"])
    @pytest.mark.parametrize("length", [0, RESERVED_BYTES, RESERVED_BYTES + 1, 2 * RESERVED_BYTES])
    def test_an_answer_of_any_length_that_a_killed_run_had_received_is_found(
        self, form: str, length: int, outbox: Outbox, tmp_path: Path
    ) -> None:
        answer = tmp_path / "answer"
        with Wire(http(drawn())) as server:
            coded = {"image": base64.b64encode(drawn()).decode()}
            whole = {"bytes": drawn(), "base64": json.dumps(coded).encode()}.get(form)
            whole = whole or json.dumps({"output": f"{server.url}/a.png"}).encode()
            answer.write_bytes(whole.ljust(length, b"\n"))
            code = f"""
import os, signal
from pathlib import Path
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.storage.reserved_file import replacing
with Outbox(Path({str(outbox.folder)!r}), 0).receive({PRINT!r}, "one") as part, replacing(part) as write:
    write(Path({str(answer)!r}).read_bytes())
    os.kill(os.getpid(), signal.SIGKILL)
"""
            assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
            left = [each.stat().st_size for each in outbox.folder.glob("*.space.part")]
            # The version before ignores a `.part` of exactly this size.
            assert left == ([RESERVED_BYTES] if sys.platform == "linux" else [])
            with SegmindClient("SG_0123456789abcdef", f"{server.url}/v1") as client:
                kept = found(outbox) or outbox.read_again(
                    PRINT, "two", client.read, seed=100, list_price_usd=Decimal("0.05")
                )
        assert kept is not None
        assert read_picture(kept[0]).width == 40
        outbox.remove(PRINT, kept[1].paid.sha256)
        assert names(outbox) == set(), "nor does the reserved space stay"

    @pytest.mark.parametrize("data", [drawn()[:-20], b"<html>", b'{"url": "https://'], ids=["picture", "html", "json"])
    def test_a_plan_counts_on_no_answer_that_arrived_in_part(self, data: bytes, outbox: Outbox) -> None:
        with pytest.raises(KeyboardInterrupt):
            failing(outbox, data, KeyboardInterrupt())
        assert len(names(outbox)) == 1
        assert outbox.fingerprints() == set()
        (outbox.folder / f"{PRINT}.0123456789abcdef.part").write_bytes(drawn())
        assert outbox.fingerprints() == {PRINT}

    def test_a_file_that_only_holds_space_is_no_answer(self, outbox: Outbox) -> None:
        outbox.check()
        picture = drawn()
        for name, data in {"reserved": picture + bytes(RESERVED_BYTES - len(picture)), "empty": b""}.items():
            (outbox.folder / f"{PRINT}.{name}.part").write_bytes(data)
        assert found(outbox) is None

    def test_other_pictures_are_none_of_its_business(self, outbox: Outbox) -> None:
        path, _ = received(outbox)
        path.rename(path.with_name(f"{'cd' * 32}.png"))
        assert found(outbox) is None


def put(outbox: Outbox, name: str, data: bytes) -> Path:
    outbox.folder.mkdir(parents=True, exist_ok=True)
    path = outbox.folder / name
    path.write_bytes(data)
    return path


class TestWhatARequestIsFor:
    ASKED = Asked(job={"job": {"name": "hero"}}, archive="/srv/pictures", run="one", source_uri="s3://b/k")

    def received(self, outbox: Outbox, error: BaseException | None = None, data: bytes = drawn()) -> None:
        with outbox.receive(PRINT, "one", self.ASKED) as part:
            part.write_bytes(data)
            if error:
                raise error
            outbox.keep(PRINT, part, OutboxEntry(paid=entry(part).paid, **self.ASKED.model_dump()))

    def test_is_beside_a_picture_and_nowhere_else(self, outbox: Outbox) -> None:
        self.received(outbox)
        (waiting,) = outbox.waiting()
        assert (waiting.asked.name, waiting.asked.archive, waiting.cost_usd) == (
            "hero",
            "/srv/pictures",
            Decimal("0.04"),
        )
        assert len(names(outbox)) == 2

    def test_is_beside_what_an_interrupted_run_had_received_and_goes_with_it(self, outbox: Outbox) -> None:
        with pytest.raises(KeyboardInterrupt):
            self.received(outbox, KeyboardInterrupt())
        (waiting,) = outbox.waiting()
        assert (waiting.asked, waiting.cost_usd) == (self.ASKED, None)
        kept = found(outbox)
        assert kept is not None
        assert (kept[1].name, kept[1].archive, kept[1].run) == ("hero", "/srv/pictures", "one")
        assert len(names(outbox)) == 2
        outbox.remove(PRINT, SHA256)
        assert names(outbox) == set()

    def test_is_beside_an_answer_as_long_as_that_is_kept(self, outbox: Outbox) -> None:
        known = Answered(cost_usd=Decimal("0.04"), cost_source="x-cost", at=NOW)
        with outbox.receive(PRINT, "one", self.ASKED) as part:
            part.write_bytes(b"<html>")
            outbox.keep_answer(part, known)
        outbox.remove(PRINT, SHA256)
        (waiting,) = outbox.waiting()
        assert (waiting.asked, waiting.cost_usd, waiting.is_answer) == (self.ASKED, Decimal("0.04"), True)
        assert {stat.S_IMODE(each.stat().st_mode) for each in outbox.folder.iterdir()} == {0o600}

    def test_that_cannot_be_looked_at_hides_no_failure(self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: Path) -> bool:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "exists", refuse)
        with pytest.raises(AnswerCutError):
            self.received(outbox, AnswerCutError("cut"))

    def test_is_gone_where_nothing_was_paid(self, outbox: Outbox) -> None:
        with pytest.raises(AnswerCutError):
            self.received(outbox, AnswerCutError("cut"))
        with pytest.raises(KeyboardInterrupt):
            self.received(outbox, KeyboardInterrupt(), b"")
        assert names(outbox) == set()


class TestTwoPicturesOfOneJob:
    def test_both_are_kept_and_the_first_is_found(self, outbox: Outbox) -> None:
        first, known = received(outbox)
        os.utime(first, (1, 1))
        second, _ = received(outbox, drawn(colour="blue"))
        assert first != second
        assert (first.read_bytes(), second.read_bytes()) == (drawn(), drawn(colour="blue"))
        assert found(outbox) == (first, known)
        assert outbox.others(PRINT, known.paid.sha256) == [second]

    def test_what_is_removed_is_what_was_archived(self, outbox: Outbox) -> None:
        _, known = received(outbox)
        second, other = received(outbox, drawn(colour="blue"))
        outbox.remove(PRINT, known.paid.sha256)
        assert names(outbox) == {second.name, second.with_suffix(".json").name}
        assert found(outbox) == (second, other)
        outbox.remove(PRINT, other.paid.sha256)
        assert names(outbox) == set()

    def test_a_picture_under_the_name_of_an_earlier_version_is_found_and_never_overwritten(
        self, outbox: Outbox
    ) -> None:
        path, known = received(outbox)
        old = path.rename(outbox.folder / f"{PRINT}.png")
        path.with_suffix(".json").rename(old.with_suffix(".json"))
        os.utime(old, (1, 1))
        assert found(outbox) == (old, known)
        _, other = received(outbox, drawn(colour="blue"))
        assert found(outbox) == (old, known)
        outbox.remove(PRINT, other.paid.sha256)
        assert names(outbox) == {old.name, old.with_suffix(".json").name}
        outbox.remove(PRINT, known.paid.sha256)
        assert names(outbox) == set()

    @pytest.mark.parametrize("body", [drawn(colour="blue"), b'{"image_url": "https://cdn.example/a.png"}'])
    def test_a_whole_answer_of_an_interrupted_run_is_another_picture_too(self, body: bytes, outbox: Outbox) -> None:
        part = put(outbox, f"{PRINT}.0123456789abcdef.part", body)
        outbox.remove(PRINT, SHA256)
        assert part.read_bytes() == body
        assert outbox.others(PRINT, SHA256) == [part]

    def test_of_a_damaged_and_a_whole_picture_the_whole_one_is_found(self, outbox: Outbox) -> None:
        put(outbox, f"{PRINT}.png", drawn()[:40])
        path, known = received(outbox)
        assert found(outbox) == (path, known)


class TestMoreFolders:
    def test_a_picture_in_another_folder_is_found_there_and_removed_there(self, outbox: Outbox) -> None:
        path, known = received(outbox)
        other = Outbox(outbox.folder.with_name("other"), also=(outbox.folder,))
        assert found(other) == (path, known)
        assert other.fingerprints() == {PRINT}
        other.remove(PRINT, SHA256)
        assert names(outbox) == set()

    def test_a_folder_under_two_names_is_one(self, outbox: Outbox, tmp_path: Path) -> None:
        path, _ = received(outbox)
        link = tmp_path / "link"
        link.symlink_to(outbox.folder)
        twice = Outbox(outbox.folder, also=(link,))
        assert twice.others(PRINT, "another") == [path]

    def test_the_folders_that_a_record_names_are_taken_where_they_can_be_read(self, outbox: Outbox) -> None:
        path, known = received(outbox)
        there = Outbox(outbox.folder.with_name("other"))
        assert found(there.reaching(PRINT, [f"{path} on another-host"])) == (path, known)
        gone = f"{path.parent / 'gone' / PRINT}.gif on here"
        relative, odd = f"{path.name} on here", "\0 on here"
        assert there.reaching(PRINT, [gone, relative, odd, str(path)]) is there
        assert there.reaching("cd" * 32, [f"{path} on here"]) is there, "another picture's name"

    def test_what_a_record_names_is_found_under_the_name_that_an_interrupted_run_has_given_it(
        self, outbox: Outbox
    ) -> None:
        path, known = received(outbox)
        answer, there = path.with_suffix(".1.answer"), Outbox(outbox.folder.with_name("other"))
        assert found(there.reaching(PRINT, [f"{answer} on here"])) == (path, known)

    def test_a_link_to_the_folder_of_a_record_reaches_what_it_leads_to(self, outbox: Outbox, tmp_path: Path) -> None:
        path, known = received(outbox)
        (tmp_path / "mounted").symlink_to(outbox.folder)
        kept = f"{tmp_path / 'mounted' / path.name} on another-host"
        kept_here = found(Outbox(tmp_path / "mine").reaching(PRINT, [kept]))
        assert kept_here is not None
        assert (kept_here[0].name, kept_here[1]) == (path.name, known)


class TestOthersAtWork:
    def test_a_file_that_another_run_renames_between_the_listing_and_the_reading_is_found_under_its_new_name(
        self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        part = put(outbox, f"{PRINT}.0123456789abcdef.part", drawn())
        real, asked = read_picture, [1]

        def renamed_meanwhile(path: Path) -> Picture:
            if asked and asked.pop():
                outbox.keep(PRINT, part, entry(part))
            return real(path)

        monkeypatch.setattr("prefect_segmind.archive.outbox.read_picture", renamed_meanwhile)
        kept = found(outbox)
        assert kept is not None
        assert kept[0].name == f"{PRINT}.{SHA256[:16]}.png"

    def test_a_file_that_another_run_renames_between_the_reading_and_the_renaming_is_no_error(
        self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        part = put(outbox, f"{PRINT}.0123456789abcdef.part", drawn())
        known, asked = entry(part), [1]

        def renamed_meanwhile(path: Path) -> Picture:
            picture = read_picture(path)
            if asked and asked.pop():
                outbox.keep(PRINT, part, known)
            return picture

        monkeypatch.setattr("prefect_segmind.archive.outbox.read_picture", renamed_meanwhile)
        kept = found(outbox)
        assert kept is not None
        assert kept[0].name == f"{PRINT}.{SHA256[:16]}.png"

    def test_a_file_that_another_run_archives_meanwhile_is_not_there_and_no_error(
        self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        part = put(outbox, f"{PRINT}.0123456789abcdef.part", drawn())

        def archived_meanwhile(path: Path) -> Picture:
            picture = read_picture(path)
            part.unlink()
            return picture

        monkeypatch.setattr("prefect_segmind.archive.outbox.read_picture", archived_meanwhile)
        assert found(outbox) is None

    def test_a_listing_whose_files_vanish_is_a_listing_without_them(
        self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        received(outbox)
        gone = outbox.folder / f"{PRINT}.0123456789abcdef.part"
        listed = [
            *(each.name for each in outbox.folder.iterdir()),
            gone.name,
            f"{gone.stem}.1.answer",
            f"{'cd' * 32}.png",
        ]
        monkeypatch.setattr(os, "listdir", lambda _: listed)
        assert outbox.fingerprints() == {PRINT, "cd" * 32}
        assert outbox.unread() == {PRINT}
        assert not outbox.is_readable(PRINT)
        assert outbox.others(PRINT, SHA256) == []


def test_an_emptied_outbox_keeps_the_pictures_of_others(outbox: Outbox) -> None:
    path, _ = received(outbox)
    other = path.with_name(f"{'cd' * 32}.png")
    other.write_bytes(drawn())
    (outbox.folder / f"{PRINT}.0123456789abcdef.part").write_bytes(b"half")
    outbox.remove(PRINT, SHA256)
    assert names(outbox) == {other.name}


def test_what_cannot_be_removed_from_the_outbox_does_no_harm_to_a_picture_that_is_archived(outbox: Outbox) -> None:
    path, _ = received(outbox)
    (outbox.folder / f"{PRINT}.folder").mkdir()
    outbox.remove(PRINT, SHA256)
    assert not path.exists()
