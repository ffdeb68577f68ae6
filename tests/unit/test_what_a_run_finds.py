"""The table of what a run finds, in docs/paying-once.md: each row is what happens, and what it costs."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from prefect_segmind.archive import leases
from prefect_segmind.archive.archive import record_key
from prefect_segmind.archive.record import Holder, Record
from prefect_segmind.errors import KeptElsewhereError, OutcomeUnknownError, SegmindError, StoreError, SubmittedError
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services
from tests.support.waiting import until
from tests.support.walk import generate, left, up_to_upload, walk

ENDED = 4_194_303
"""The number of a process that runs no more: the highest that Linux gives."""
PAGE = (Path(__file__).parents[2] / "docs" / "paying-once.md").read_text(encoding="utf-8")


class Found(NamedTuple):
    """What a run finds.

    Attributes:
        sandbox: The sandbox.
        photo: The source image of the job.
        monkeypatch: Changes the machine.
    """

    sandbox: Sandbox
    photo: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def fingerprint(self) -> str:
        return up_to_upload(self.photo)[0].fingerprint

    def lose(self, answer: Answer) -> None:
        """A run loses this answer while the provider's history is out of reach, and dies."""
        self.sandbox.history.off = True
        self.sandbox.play(answer)
        with pytest.raises(SegmindError):
            generate(*up_to_upload(self.photo), on_unknown="fail")
        self.sandbox.history.off = False
        leases._claims.clear()


Cause = Callable[[Found], None]


def nothing(_: Found) -> None:
    """There is no record."""


def done(found: Found) -> None:
    walk(found.photo)


def in_this_outbox(found: Found) -> None:
    left(found.photo)


def in_another_outbox(found: Found) -> None:
    left(found.photo)
    found.monkeypatch.setattr(socket, "gethostname", lambda: "another-machine")
    for each in Services().outbox.folder.iterdir():
        each.unlink()


def in_an_outbox_within_reach(found: Found) -> None:
    left(found.photo)
    found.monkeypatch.setenv("PREFECT_INTEGRATIONS_SEGMIND_OUTBOX", str(found.photo.parent / "another outbox"))


def an_unfinished_record(found: Found) -> None:
    archive, fingerprint = Services().archive, walk(found.photo).fingerprint
    held = archive.read(fingerprint)
    assert held is not None
    unfinished = {"state": "claimed", "picture": None, "image": None, "sidecar": None}
    attempts = (held.record.attempts[0].model_copy(update={"possibly_billed": None, "status": None}),)
    archive.write(held.record.model_copy(update={**unfinished, "attempts": attempts}), held.etag)


def an_unreadable_answer(found: Found) -> None:
    found.lose(Answer(kind="html"))


def a_live_claim(found: Found) -> None:
    found.sandbox.play(Answer(processing=1))
    thread = threading.Thread(target=walk, args=(found.photo,), daemon=True)
    thread.start()
    until(lambda: len(found.sandbox.history) == 1)


def dead_between_requests(found: Found) -> None:
    dead = Holder(run="dead", host=leases.host_id(), pid=ENDED, started="1", process="x")
    record = Record(fingerprint=found.fingerprint).claimed_by(dead, datetime.now(UTC))
    waits = record.with_outcome(status=429, reason="busy", wait_seconds=60.0, possibly_billed=False)
    Services().archive.write(waits, None)


def submitted(found: Found) -> None:
    found.monkeypatch.setenv("SEGMIND_BASE_URL", found.sandbox.base_url_v2)
    found.sandbox.play(Answer(processing=3))
    with found.monkeypatch.context() as impatient:
        impatient.setenv("PREFECT_INTEGRATIONS_SEGMIND_READ_TIMEOUT_SECONDS", "0.5")
        with pytest.raises(SubmittedError):
            generate(*up_to_upload(found.photo))


def made(found: Found) -> None:
    found.lose(Answer(kind="lost"))
    until(lambda: found.sandbox.ledger.billed == 1)


def under_way(found: Found) -> None:
    found.lose(Answer(kind="lost", processing=3))


def failed(found: Found) -> None:
    found.lose(Answer(kind="lost", fails=True))


def not_listed(found: Found) -> None:
    found.lose(Answer(kind="lost", listed=False))


def an_unreadable_record(found: Found) -> None:
    Services().archive.store.put(record_key(found.fingerprint), b"{", "application/json")


Outcome = str | type[SegmindError]
ROWS: dict[str, list[tuple[Cause, dict[str, Any], Outcome]]] = {
    "nothing": [(nothing, {}, "generated")],
    "the record is done": [(done, {}, "reused")],
    "the picture in this machine's outbox": [(in_this_outbox, {}, "recovered")],
    "the picture in another outbox, which the record names": [
        (in_an_outbox_within_reach, {}, "recovered"),
        (in_another_outbox, {}, KeptElsewhereError),
        (in_another_outbox, {"on_kept": "repay"}, "generated"),
    ],
    "the picture's sidecar in the archive, and an unfinished record": [(an_unfinished_record, {}, "reused")],
    "an answer in the outbox that could not be read as a picture": [
        (an_unreadable_answer, {}, "generated"),
        (an_unreadable_answer, {"on_unknown": "fail"}, OutcomeUnknownError),
    ],
    "a claim of a run that is alive": [(a_live_claim, {}, "reused")],
    "a claim of a run that died between its requests": [(dead_between_requests, {}, "generated")],
    "a request that the provider has accepted (v2)": [(submitted, {"on_unknown": "fail"}, "recovered")],
    "a request of unknown outcome that the provider has made a picture of": [
        (made, {"on_unknown": "fail"}, "recovered")
    ],
    "a request of unknown outcome that is still under way at the provider": [
        (under_way, {"on_unknown": "fail"}, "recovered")
    ],
    "a request of unknown outcome that failed at the provider": [(failed, {"on_unknown": "fail"}, "generated")],
    "a request of unknown outcome that the provider does not list, or where it cannot be asked": [
        (not_listed, {}, "generated"),
        (not_listed, {"on_unknown": "fail"}, OutcomeUnknownError),
    ],
    "a record that it cannot read": [(an_unreadable_record, {}, StoreError)],
}


def table() -> dict[str, tuple[str, str]]:
    """What a run does and pays, by what it finds, as the page has it."""
    below = PAGE.split("\n## Before a request is sent\n", 1)[1]
    rows = re.findall(r"^\| (.+?) \| (.+) \| (.+?) \|$", below.split("\n## ", 1)[0], re.M)[2:]
    return {found: (does, pays) for found, does, pays in rows}


def test_the_table_of_what_a_run_finds_has_a_row_for_each_case_and_no_other() -> None:
    assert list(table()) == list(ROWS)


@pytest.mark.parametrize(
    ("row", "cause", "policy", "outcome"),
    [(row, *case) for row, cases in ROWS.items() for case in cases],
    ids=lambda each: each.__name__ if callable(each) and not isinstance(each, type) else "",
)
def test_each_row_of_the_table_of_what_a_run_finds_is_what_happens(
    row: str,
    cause: Cause,
    policy: dict[str, Any],
    outcome: Outcome,
    with_history: Sandbox,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    does, pays = table()[row]
    cause(Found(with_history, photo, monkeypatch))
    before = len(with_history.history)
    if not isinstance(outcome, str):
        with pytest.raises(outcome):
            walk(photo, **policy)
        assert "stops" in does
        assert "nothing" in pays
        assert len(with_history.history) == before, "nothing was sent"
        return
    archived = walk(photo, **policy)
    assert archived.status == outcome
    assert archived.cost_usd == (Decimal("0.05") if outcome == "generated" else 0)
    assert ("0.05 USD" if archived.cost_usd else "nothing") in pays
    assert outcome == "generated" or outcome.removesuffix("d") in does
