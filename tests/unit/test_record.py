"""The record alone answers "is this picture paid for?", and it forgets no request."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import reduce
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prefect_segmind.api.picture import PaidPicture
from prefect_segmind.archive.record import (
    Attempt,
    Holder,
    Record,
    Run,
    Verdict,
    answers_of_earlier_tries,
    past_requests,
    verdict,
)
from prefect_segmind.limits.ledger import Totals

NOW = datetime(2025, 3, 1, 12, 0, tzinfo=UTC)
PRICE = Decimal("0.05")
ME = Holder(run="me", host="here", pid=1, started="now")
PICTURE = PaidPicture(
    sha256="cd" * 32,
    format="PNG",
    content_type="image/png",
    extension="png",
    width=1024,
    height=1024,
    size_bytes=1_234_567,
    seed=4242,
    cost_usd=Decimal("0.0500"),
    cost_source="x-cost",
    request_id="req-1",
    paid_at=NOW,
    notices=("the provider reports seed 7 where 4242 was asked for",),
)


def sent(run: str = "me", possibly_billed: bool | None = None, **facts: object) -> Attempt:
    return Attempt.model_validate({"run": run, "sent_at": NOW, "possibly_billed": possibly_billed, **facts})


def claimed(*attempts: Attempt, holder: Holder | None = None) -> Record:
    return Record(fingerprint="ab" * 32, holder=holder, attempts=attempts)


DONE = claimed(sent()).archived(PICTURE, "hero/x.png", "hero/x.json")


# --- the verdict ------------------------------------------------------------------------------------------------------

RECORDS = {
    "none": None,
    "clean": claimed(),
    "mine open": claimed(sent("me"), holder=ME),
    "mine billed": claimed(sent("me", True), holder=ME),
    "other refused": claimed(sent("other", False)),
    "other open": claimed(sent("other")),
    "other billed": claimed(sent("other", True)),
    "both": claimed(sent("other", True), sent("me", False)),
    "done": DONE,
}
UNKNOWN = {"other open", "other billed", "both"}


def expected(record: str, in_outbox: bool, held_elsewhere: bool, on_unknown: str) -> str:
    """The table of the design, written once more as rules, the first that holds decides."""
    rules = [
        (record == "done", "reuse"),
        (in_outbox, "recover"),
        (record == "none", "pay"),
        (held_elsewhere, "wait"),
        (record in UNKNOWN and on_unknown == "fail", "refuse"),
    ]
    return next((what for holds, what in rules if holds), "pay")


@pytest.mark.parametrize(
    ("record", "in_outbox", "held_elsewhere", "on_unknown"),
    list(itertools.product(RECORDS, [False, True], [False, True], ["repay", "fail"])),
)
def test_the_verdict_in_every_situation(record, in_outbox, held_elsewhere, on_unknown):
    found = verdict(
        RECORDS[record], run=Run("me"), in_outbox=in_outbox, held_elsewhere=held_elsewhere, on_unknown=on_unknown
    )
    assert found.value == expected(record, in_outbox, held_elsewhere, on_unknown)


@pytest.mark.parametrize(
    ("record", "in_outbox", "held_elsewhere", "on_unknown", "what"),
    [
        # record, picture in the outbox, held by a run that lives, policy
        ("none", False, False, "repay", Verdict.PAY),
        ("none", True, False, "repay", Verdict.RECOVER),
        ("clean", False, False, "fail", Verdict.PAY),
        ("other open", False, True, "fail", Verdict.WAIT),
        ("other open", False, False, "repay", Verdict.PAY),
        ("other open", False, False, "fail", Verdict.REFUSE),
        ("other billed", False, False, "fail", Verdict.REFUSE),
        ("other open", True, True, "fail", Verdict.RECOVER),
        ("other refused", False, False, "fail", Verdict.PAY),
        ("mine billed", False, False, "fail", Verdict.PAY),
        ("done", True, True, "fail", Verdict.REUSE),
    ],
)
def test_the_situations_that_people_ask_about(record, in_outbox, held_elsewhere, on_unknown, what):
    found = verdict(
        RECORDS[record], run=Run("me"), in_outbox=in_outbox, held_elsewhere=held_elsewhere, on_unknown=on_unknown
    )
    assert found is what


@pytest.mark.parametrize("record", [name for name in RECORDS if name != "none"])
def test_an_unknown_outcome_is_one_of_another_run(record):
    found = RECORDS[record]
    assert found is not None
    assert found.outcome_unknown(Run("me")) is (record in UNKNOWN)


@pytest.mark.parametrize(
    ("attempts", "may_be"),
    [
        ([], False),
        ([sent("other")], True),
        ([sent("other", False, kept="there")], True),
        ([sent("other", False, kept="there", reason="no picture")], False),
        ([sent("other", True, reason="the run ended before it had the answer")], True),
        ([sent("other", True, reason="AnswerCutError: cut")], False),
        ([sent("other", False, status=429)], False),
        ([sent("other"), sent("me", True)], False),
        ([sent("me")], False),
    ],
)
def test_the_archive_is_searched_only_where_another_run_may_have_died_when_it_had_archived(attempts, may_be):
    assert claimed(*attempts).may_be_archived_by_another(Run("me")) is may_be
    assert not DONE.may_be_archived_by_another(Run("another"))


def test_a_request_whose_picture_is_archived_is_in_doubt_no_more():
    doubted = claimed(
        sent("other", True, reason="cut"), sent("me", True, reason="ended", reported_by="me", kept="there")
    )
    first, second = doubted.archived(PICTURE, "hero/x.png", "hero/x.json", paid_by="me").attempts
    assert (first.possibly_billed, first.reason, first.cost_usd) == (True, "cut", None)
    assert (second.possibly_billed, second.reason, second.status, second.cost_usd) == (
        False,
        None,
        200,
        PICTURE.cost_usd,
    )
    assert (second.reported_by, second.kept) == (None, None)
    for paid_by in (None, "another"):
        assert doubted.archived(PICTURE, "x.png", "x.json", paid_by=paid_by).attempts == doubted.attempts
    known = claimed(sent("me", True, reason="cut"), sent("me", False, status=200, cost_usd=PRICE))
    assert known.archived(PICTURE, "x.png", "x.json", paid_by="me").attempts == known.attempts


def test_a_request_that_may_still_be_answered_has_not_brought_the_picture_that_another_one_has():
    returned = sent("me", False, status=200, cost_usd=PRICE, kept="/srv/outbox/x.png on worker-1")
    record = claimed(returned, sent("another"))
    assert record.archived(PICTURE, "x.png", "x.json", paid_by="me").attempts == record.attempts
    first, second = claimed(sent("me"), sent("another")).archived(PICTURE, "x.png", "x.json", paid_by="me").attempts
    assert (first.cost_usd, first.possibly_billed, second.cost_usd, second.possibly_billed) == (
        PICTURE.cost_usd,
        False,
        None,
        None,
    )


def test_what_a_run_knows_of_its_request_is_told_to_a_record_that_does_not():
    known = sent("me", False, status=200, cost_usd=PRICE)
    record = claimed(sent("me"), sent("another"))
    assert record.with_known_outcomes((known,)).attempts == (known, sent("another"))
    settled = claimed(sent("me", True, reason="cut"))
    assert settled.with_known_outcomes((known,)) == settled


def test_every_run_but_the_own_is_another_run():
    record = claimed(sent("me", True))
    assert not record.outcome_unknown(Run("me"))
    assert record.outcome_unknown(Run("somebody else"))


# --- its life ---------------------------------------------------------------------------------------------------------


def test_a_claim_notes_the_request_before_it_is_sent():
    record = claimed().claimed_by(ME, NOW)
    assert record.holder == ME
    assert record.attempts == (sent("me"),)
    assert (record.state, record.fingerprint) == ("claimed", "ab" * 32)


def test_a_request_that_a_dead_run_left_open_may_be_billed_and_the_finder_reports_it():
    before = claimed(
        sent("old", False, status=429), sent("dead"), holder=Holder(run="dead", host="x", pid=9, started="")
    )
    later = NOW + timedelta(hours=1)
    record = before.claimed_by(ME, later)
    refused, closed, mine = record.attempts
    assert refused == before.attempts[0]
    assert (closed.run, closed.possibly_billed, closed.reported_by) == ("dead", True, "me")
    assert closed.reason == "the run ended before it had the answer"
    assert (mine.run, mine.sent_at, mine.possibly_billed, mine.reported_by) == ("me", later, None, None)
    assert before.attempts[1].possibly_billed is None  # records are values: the old one stays as it was


def test_what_a_dead_run_would_have_reported_at_its_end_is_reported_by_the_one_that_takes_over():
    dead = Holder(run="dead", host="x", pid=9, started="")
    before = claimed(
        sent("ended", True, reported_by="ended"), sent("older", True, reported_by="dead"), sent("dead"), holder=dead
    )
    attempts = before.claimed_by(ME, NOW).attempts
    assert [each.reported_by for each in attempts] == ["ended", "me", "me", None]
    assert possibly_billed_count("me", attempts) == 2


def test_what_another_run_has_reported_is_not_reported_again():
    record = claimed(sent("other", True, reported_by="other")).claimed_by(ME, NOW)
    assert record.attempts[0].reported_by == "other"
    assert possibly_billed_count("me", record.attempts) == 0


@pytest.mark.parametrize(
    ("reason", "wait_seconds", "keeps_the_claim"),
    [
        ("RateLimitError: 429", 3.0, True),
        ("RateLimitError: 429", 0.0, True),
        ("InternalServerError: 500", None, False),
        (None, None, True),  # it brought the picture: the claim holds until that is archived
    ],
)
def test_a_run_that_gives_up_lets_go_of_its_claim(reason, wait_seconds, keeps_the_claim):
    record = claimed().claimed_by(ME, NOW)
    answered = record.with_outcome(status=429, reason=reason, wait_seconds=wait_seconds, possibly_billed=False)
    assert (answered.holder == ME) is keeps_the_claim
    assert (answered.holder is None) is not keeps_the_claim


@pytest.mark.parametrize("possibly_billed", [False, True])
def test_an_answer_is_noted_on_the_last_request_only(possibly_billed):
    before = claimed(sent("other", True, reported_by="other")).claimed_by(ME, NOW)
    record = before.with_outcome(status=502, reason="bad", wait_seconds=1.5, possibly_billed=possibly_billed)
    assert record.attempts[0] == before.attempts[0]
    assert record.attempts[1] == sent(
        "me",
        possibly_billed,
        status=502,
        reason="bad",
        wait_seconds=1.5,
        reported_by="me" if possibly_billed else None,
    )
    assert len(record.attempts) == 2


def test_the_picture_and_both_its_keys_stand_in_a_record_that_is_done():
    before = claimed(sent("other", True, status=504, reported_by="other"), holder=ME).claimed_by(ME, NOW)
    record = before.archived(PICTURE, "hero/x.png", "hero/x.json")
    assert (record.state, record.holder) == ("done", None)
    assert (record.picture, record.image, record.sidecar) == (PICTURE, "hero/x.png", "hero/x.json")
    assert record.attempts[0] == before.attempts[0]
    assert (record.attempts[1].status, record.attempts[1].possibly_billed) == (200, False)


def test_a_picture_from_the_outbox_of_a_run_that_died_closes_the_request_that_brought_it():
    record = claimed(sent("dead")).archived(PICTURE, "x.png", "x.json")
    assert (record.attempts[0].status, record.attempts[0].possibly_billed) == (200, False)
    assert not record.outcome_unknown(Run("me"))


def test_a_kept_picture_is_where_the_record_says_until_it_is_archived():
    record = claimed(sent("one", False, cost_usd=PRICE, kept="here"), sent("two", False, cost_usd=PRICE, kept="there"))
    assert record.kept_picture == "there"
    assert record.archived(PICTURE, "x.png", "x.json").kept_picture is None


# --- counts -----------------------------------------------------------------------------------------------------------


def test_the_counts_of_a_run():
    attempts = (
        sent("dead", True, reported_by="me"),
        sent("other", True, reported_by="other"),
        sent("me", True, reported_by="me"),
        sent("me", False),
        sent("me"),
    )
    assert reported(Run("me"), attempts).requests_sent == 3
    assert possibly_billed_count("me", attempts) == 2
    assert possibly_billed_count("other", attempts) == 1
    assert possibly_billed_count("dead", attempts) == 0
    assert reported(Run("nobody"), attempts) == Totals()


def reported(run, attempts, *, charged_only=False):
    past = past_requests(run, attempts, PRICE)
    return reduce(Totals.plus, (each.charged if charged_only else each.totals for each in past), Totals())


def possibly_billed_count(run, attempts):
    return reported(Run(run), attempts).possibly_billed_usd / PRICE


ENDINGS = st.sampled_from(["refused", "waits", "billed", "dies", "stopped"])


def test_what_a_stopped_run_has_reported_is_not_taken_over_by_the_next():
    waits = claimed().claimed_by(ME, NOW).with_outcome(status=502, reason="bad", wait_seconds=1.0, possibly_billed=True)
    other = Holder(run="other", host="h", pid=1, started="")
    assert possibly_billed_count("me", waits.given_up().claimed_by(other, NOW).attempts) == 1
    assert possibly_billed_count("other", waits.given_up().claimed_by(other, NOW).attempts) == 0
    assert possibly_billed_count("other", waits.claimed_by(other, NOW).attempts) == 1, "that of a dead one is"


@given(st.lists(st.tuples(st.sampled_from("abc"), ENDINGS), max_size=12))
def test_every_possibly_billed_request_is_reported_by_exactly_one_run(story):
    """Runs come and go and some of them die while they wait; then a last one gets the picture."""
    record = claimed()
    for run, ending in story:
        record = record.claimed_by(Holder(run=run, host="h", pid=1, started=""), NOW)
        if ending != "dies":
            record = record.with_outcome(
                status=502,
                reason=ending,
                wait_seconds=1.0 if ending in ("waits", "stopped") else None,
                possibly_billed=ending in ("billed", "stopped"),
            )
        if ending == "stopped":  # while it waited for its next request
            record = record.given_up()
    record = record.claimed_by(ME, NOW).archived(PICTURE, "x.png", "x.json")
    lost = sum(ending in ("billed", "dies", "stopped") for _, ending in story)
    assert sum(possibly_billed_count(run, record.attempts) for run in ("a", "b", "c", "me")) == lost
    assert [each.run for each in record.attempts] == [*(run for run, _ in story), "me"]
    assert all(each.possibly_billed is not None for each in record.attempts)


# --- flow runs that are run again -----------------------------------------------------------------------------------

FIRST, SECOND = (("flow", 1),), (("flow", 2),)
AGAIN = Run("me", SECOND)


@pytest.mark.parametrize(
    ("theirs", "owned", "earlier"),
    [
        ((), False, False),  # no flow run is known: another run
        ((("another", 1),), False, False),
        (FIRST, True, True),
        (SECOND, True, False),  # another task of the same try
        ((("around", 1), ("flow", 2)), True, False),
    ],
)
def test_the_requests_of_all_tries_of_a_flow_run_are_its_own(theirs, owned, earlier):
    assert AGAIN.owns(sent("other", flow_runs=theirs)) is owned
    assert AGAIN.follows(theirs) is earlier


def test_the_requests_of_a_flow_run_in_an_earlier_try_of_the_one_around_it_are_its_own():
    inner = Run("me", (("around", 2), ("inner 2", 1)))
    assert inner.owns(sent("other", flow_runs=(("around", 1), ("inner 1", 3))))
    assert not inner.owns(sent("other", flow_runs=(("around", 2), ("inner 1", 1)))), "that is no retry, but two calls"


@pytest.mark.parametrize(
    ("billed", "on_unknown", "what"),
    [
        ([True], "repay", Verdict.PAY),
        ([None], "repay", Verdict.PAY),
        ([True, True], "repay", Verdict.REFUSE),
        ([True, None], "repay", Verdict.REFUSE),
        ([False] * 9, "repay", Verdict.PAY),
        ([True], "fail", Verdict.REFUSE),
        ([False] * 9, "fail", Verdict.PAY),
    ],
)
def test_a_flow_run_sends_one_more_after_one_that_may_be_billed_whatever_has_it_run_again(billed, on_unknown, what):
    record = claimed(*(sent(f"task {n}", each, flow_runs=FIRST) for n, each in enumerate(billed)))
    known = {"in_outbox": False, "held_elsewhere": False, "on_unknown": on_unknown}
    assert verdict(record, run=AGAIN, **known) is what
    if on_unknown == "repay":
        assert verdict(record, run=Run("me", (("a new run", 1),)), **known) is Verdict.PAY


@pytest.mark.parametrize("on_unknown", ["fail", "repay"])
@pytest.mark.parametrize("flow_runs", [(), (("flow", 1),), (("another", 1),)])
def test_what_is_known_to_be_paid_is_not_paid_again_by_the_policy_for_what_is_unknown(on_unknown, flow_runs):
    record = claimed(sent("one", False, flow_runs=flow_runs, cost_usd=PRICE, kept="there"))
    known: dict[str, Any] = {"run": AGAIN, "in_outbox": False, "held_elsewhere": False, "on_unknown": on_unknown}
    assert verdict(record, **known) is Verdict.KEPT
    assert verdict(record, **{**known, "held_elsewhere": True}) is Verdict.WAIT
    assert verdict(record, **known, on_kept="repay") is Verdict.PAY
    lost = record.model_copy(update={"attempts": (*record.attempts, sent("two", True))})
    assert verdict(lost, **known) is Verdict.KEPT


def test_an_answer_that_nobody_could_read_and_another_machine_keeps_is_left_to_the_policy():
    record = claimed(sent("one", False, cost_usd=PRICE, kept="there", reason="no picture"))
    known: dict[str, Any] = {"run": AGAIN, "in_outbox": False, "held_elsewhere": False}
    assert verdict(record, **known, on_unknown="repay") is Verdict.PAY
    assert verdict(record, **known, on_unknown="fail") is Verdict.REFUSE


@pytest.mark.parametrize(
    ("pictures", "lost", "on_unknown", "what"),
    [
        (1, 0, "fail", Verdict.PAY),
        (1, 0, "repay", Verdict.PAY),
        (2, 0, "repay", Verdict.REFUSE),
        (2, 0, "fail", Verdict.REFUSE),
        (1, 1, "repay", Verdict.REFUSE),
        (1, 1, "fail", Verdict.REFUSE),
    ],
)
def test_a_flow_run_pays_again_once_for_a_picture_out_of_reach_even_where_it_may(pictures, lost, on_unknown, what):
    kept = [sent(f"task {n}", False, flow_runs=FIRST, cost_usd=PRICE, kept="there") for n in range(pictures)]
    kept += [sent("task", True, flow_runs=FIRST)] * lost
    known = {"in_outbox": False, "held_elsewhere": False, "on_unknown": on_unknown, "on_kept": "repay"}
    assert verdict(claimed(*kept), run=AGAIN, **known) is what
    assert verdict(claimed(*kept), run=AGAIN, **{**known, "in_outbox": True}) is Verdict.RECOVER


def test_earlier_tries_are_reported_by_the_next_one_and_what_they_had_taken_over_is_not_charged():
    attempts = (
        sent("one", True, flow_runs=FIRST, reported_by="one"),
        sent("one", False, flow_runs=FIRST, cost_usd=PRICE),
        sent("dead", True, reported_by="one"),  # of somebody else, which the first try had taken over
        sent("sibling", True, flow_runs=SECOND, reported_by="sibling"),
        sent("other", True, reported_by="other"),
        sent("me", True, flow_runs=SECOND, reported_by="me"),
    )
    assert reported(AGAIN, attempts) == Totals(3, PRICE, 3 * PRICE)
    assert reported(AGAIN, attempts, charged_only=True) == Totals(3, PRICE, 2 * PRICE)


def test_the_paid_answers_of_earlier_tries_are_known_with_whether_they_held_a_picture():
    paid = {"flow_runs": FIRST, "cost_usd": PRICE}
    attempts = (
        sent("picture", False, **paid),
        sent("html", False, reason="no picture", **paid),
        sent("read later", False, reason="no picture", kept="there", **paid),
        sent("rejected", False, flow_runs=FIRST),
        sent("sibling", False, flow_runs=SECOND, cost_usd=PRICE),
    )
    held = [is_picture for _, is_picture in answers_of_earlier_tries(AGAIN, claimed(*attempts))]
    assert held == [True, False, False]
    done = claimed(*attempts).archived(PICTURE, "x.png", "x.json")
    assert [is_picture for _, is_picture in answers_of_earlier_tries(AGAIN, done)] == [True, False, True]


def test_a_request_of_an_earlier_try_without_an_outcome_is_charged_as_one_that_may_be_billed():
    assert reported(AGAIN, (sent("one", flow_runs=FIRST),), charged_only=True) == Totals(1, Decimal("0.00"), PRICE)


def test_a_request_of_an_earlier_try_is_charged_though_another_run_reports_that_it_may_be_billed():
    attempts = (sent("one", True, flow_runs=FIRST, reported_by="other"),)
    assert reported(AGAIN, attempts) == Totals(1)
    assert reported(AGAIN, attempts, charged_only=True) == Totals(1, possibly_billed_usd=PRICE)


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from([True, False, None]), st.sampled_from(["0.05", None])), max_size=9
    )
)
def test_over_all_its_tries_a_flow_run_reports_each_request_once(story):
    """The last try inherits; what it and its siblings report is what was sent."""
    last = max([number for number, *_ in story], default=1)
    attempts = tuple(
        sent(f"task {number}", billed, flow_runs=(("flow", number),), cost_usd=cost, reported_by=f"task {number}")
        for number, billed, cost in sorted(story, key=lambda each: each[0])
    )
    told = reported(Run(f"task {last}", (("flow", last),)), attempts)
    assert told.requests_sent == len(story)
    assert told.cost_usd == sum(Decimal(cost) for *_, cost in story if cost)
    assert told.possibly_billed_usd == PRICE * sum(
        1 for number, billed, _ in story if billed or (billed is None and number < last)
    )


# --- as JSON in the archive -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record", [each for each in RECORDS.values() if each], ids=[name for name in RECORDS if name != "none"]
)
def test_a_record_is_read_as_it_was_written(record):
    assert Record.model_validate_json(record.model_dump_json()) == record


def test_a_cost_keeps_its_digits():
    assert '"cost_usd":"0.0500"' in DONE.model_dump_json()


@pytest.mark.parametrize("missing", ["picture", "image", "sidecar"])
@pytest.mark.parametrize("empty", [None, "left out"])
def test_a_record_that_is_done_without_its_picture_is_refused(missing, empty):
    fields = DONE.model_dump(mode="json")
    if empty is None:
        fields[missing] = None
    else:
        del fields[missing]
    with pytest.raises(ValidationError, match="a record that is done names its picture"):
        Record.model_validate(fields)


def test_a_field_of_a_newer_version_is_kept_when_this_one_writes_the_record_again():
    fields = DONE.claimed_by(ME, NOW).model_dump(mode="json")
    newer = {
        **fields,
        "tags": ["new"],
        "holder": {**fields["holder"], "region": "new"},
        "attempts": [{**each, "cost": 1} for each in fields["attempts"]],
        "picture": {**fields["picture"], "colours": 256},
    }
    again = Record.model_validate(newer).model_copy(update={"state": "done"}).model_dump(mode="json")
    assert again == {**newer, "state": "done"}


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"state": "paid"},
        {"fingerprint": None},
        {"attempts": [{"run": "me"}]},
        {"holder": {"run": "me"}},
    ],
)
def test_a_record_that_is_not_understood_is_an_error_and_never_an_empty_one(change):
    with pytest.raises(ValidationError):
        Record.model_validate({**claimed().model_dump(mode="json"), **change})


@pytest.mark.parametrize("value", [DONE, PICTURE, ME, sent()])
def test_what_is_remembered_cannot_be_changed_by_accident(value):
    name = next(iter(type(value).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(value, name, "other")
