"""Promises of `prefect_segmind.api.history`: rows are read in every usual form, and a row settles the right request."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_segmind.api.history import (
    SKEW,
    Outcome,
    Row,
    Sought,
    address,
    history_url,
    matched,
    parse_page,
    parse_row,
    read_page,
    same_request,
)
from prefect_segmind.api.request import ImageToImageRequest

NOW = datetime(2026, 11, 23, 10, tzinfo=UTC)
OURS = ImageToImageRequest(image_file="https://b.example/mug.jpg?sig=1", prompt="a red mug", seed=4711).body()


def entry(**other: Any) -> dict[str, Any]:
    """A row as the provider documents it."""
    return {
        "request_id": "r-1",
        "model_name": "ideogram-2a-img-2-img",
        "model_status": "COMPLETED",
        "model_created": "2026-11-23T10:00:00Z",
        "credits_deduction": 0.05,
        "request_body": OURS,
        "generation_url": "https://images.example/a.png",
        "latency_ms": 9000,
        "error": None,
        **other,
    }


def read(**other: Any) -> Row:
    (row,) = parse_page(json.dumps([entry(**other)]).encode())
    return row


def row(request_id: str = "r-1", at: datetime | None = NOW, **other: Any) -> Row:
    facts: dict[str, Any] = {"outcome": Outcome.COMPLETED, "body": OURS, "url": "https://images.example/a.png", **other}
    return Row(request_id=request_id, created_at=at, **facts)


class TestPages:
    @pytest.mark.parametrize("name", ["data", "results", "requests", "history", "items"])
    @pytest.mark.parametrize("around", [None, "data", "results", "requests", "history", "items"])
    def test_the_list_is_found_under_every_usual_name(self, name: str, around: str | None) -> None:
        page: object = {"page": 1, name: [entry()], "total": 1}
        page = page if around is None else {"success": True, around: page}
        assert [each.request_id for each in parse_page(json.dumps(page).encode())] == ["r-1"]
        assert parse_page(json.dumps({name: []}).encode()) == ()

    def test_a_bare_list_is_a_page_too(self) -> None:
        body = json.dumps([entry(), entry(request_id="r-2")]).encode()
        assert [each.request_id for each in parse_page(body)] == ["r-1", "r-2"]
        assert parse_page(gzip.compress(body)) == parse_page(body)
        assert parse_page(b"\xef\xbb\xbf" + body) == parse_page(body)
        assert parse_page(b"[]") == ()

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"<html>",
            b"{}",
            b"null",
            b'"data"',
            b'{"error": "no"}',
            b'{"data": {}}',
            b'{"data": {"data": {"data": []}}}',
            b'{"data": [',
            b"\xff",
            b"[" * 100_000,
            b"[" + b"1," * 200_000 + b"1]",
        ],
    )
    def test_another_form_is_told(self, body: bytes) -> None:
        with pytest.raises(ValueError, match=r"."):
            parse_page(body)

    @pytest.mark.parametrize(
        "bad",
        [None, 7, "r-9", [], {}, {"request_id": None}, {"request_id": " "}, {"request_id": True}, {"request_id": [1]}],
    )
    def test_rows_that_cannot_be_read_are_left_out_and_counted(self, bad: object) -> None:
        page = read_page(json.dumps([bad, entry(), bad]).encode())
        assert ([each.request_id for each in page.rows], page.listed) == (["r-1"], 3)

    def test_a_text_that_cannot_be_stored_does_not_spoil_the_page(self) -> None:
        half = "\ud800"  # of a pair of surrogates
        odd = entry(request_id=f"r-1{half}", generation_url=f"https://b.example/{half}", error=half)
        one, other = parse_page(json.dumps([odd, entry(request_id="r-2"), entry(request_id="r" * 201)]).encode())
        assert (one.request_id, one.url, one.error, other.request_id) == ("r-1", None, None, "r-2")

    def test_a_request_with_several_outputs_counts_once_with_its_link(self) -> None:
        rows = [
            entry(generation_url=None),
            entry(generation_url="https://b.example/1"),
            entry(generation_url="https://b.example/2"),
        ]
        (only,) = parse_page(json.dumps(rows).encode())
        assert only.url == "https://b.example/1"
        assert read_page(json.dumps(rows).encode()).listed == 3


class TestRows:
    def test_the_documented_fields_are_read(self) -> None:
        assert read() == Row(
            request_id="r-1",
            outcome=Outcome.COMPLETED,
            created_at=NOW,
            cost_usd=Decimal("0.05"),
            body=OURS,
            url="https://images.example/a.png",
            error=None,
        )

    @pytest.mark.parametrize("around", [None, "data", "results", "requests", "history", "items"])
    def test_one_alone_is_read_bare_or_under_a_usual_name(self, around: str | None) -> None:
        for each in (entry(), [entry()]):
            assert parse_row(json.dumps(each if around is None else {around: each}).encode()) == read()

    @pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b"[]", b"7", b'{"data": 7}', b'{"error": "no"}'])
    def test_no_row_is_told(self, body: bytes) -> None:
        with pytest.raises(ValueError, match=r"."):
            parse_row(body)

    @pytest.mark.parametrize(
        ("status", "outcome"),
        [
            *((each, Outcome.COMPLETED) for each in ("COMPLETED", "completed", "SUCCESS", "SUCCEEDED")),
            *((each, Outcome.FAILED) for each in ("FAILED", "failed", "ERROR", "CANCELLED")),
            *((each, Outcome.PENDING) for each in ("PENDING", "QUEUED", "PROCESSING", "RUNNING", "odd", "", None, 7)),
        ],
    )
    def test_what_is_not_known_to_be_over_is_pending(self, status: object, outcome: Outcome) -> None:
        assert read(model_status=status).outcome is outcome
        without = {key: value for key, value in entry(status=status).items() if key != "model_status"}
        assert parse_row(json.dumps(without).encode()).outcome is outcome

    @pytest.mark.parametrize(
        "time",
        [
            "2026-11-23T10:00:00Z",
            "2026-11-23T10:00:00.000000",
            "2026-11-23 10:00:00",
            "2026-11-23 12:00:00+02:00",
            "2026-11-23 10:00:00.000+00",
            "2026-11-23 10:00:00 +0000",
            "2026-11-23 10:00:00 UTC",
            "Mon, 23 Nov 2026 10:00:00 GMT",
            1795428000,
            1795428000.0,
            1795428000000,
            "1795428000",
        ],
    )
    @pytest.mark.parametrize("name", ["model_created", "created_at", "created"])
    def test_times_are_read_in_every_usual_form_and_are_utc(self, name: str, time: object) -> None:
        fields = {"model_created": None, name: time}
        found = read(**fields).created_at
        assert found == NOW
        assert found.tzinfo is UTC

    @pytest.mark.parametrize(
        "time", [None, "", "yesterday", "2026", True, [], {}, -1, "9999-12-31T23:59:59-23:59", 10**30, "0000-00-00"]
    )
    def test_what_is_no_time_is_none(self, time: object) -> None:
        assert read(model_created=time).created_at is None

    @pytest.mark.parametrize(
        ("given", "cost"),
        [
            (0.05, "0.05"),
            ("0.0625", "0.0625"),
            (0, "0"),
            (-1, None),
            ("free", None),
            (None, None),
            ([1], None),
            (1e30, None),
        ],
    )
    def test_only_a_sensible_cost_is_one(self, given: object, cost: str | None) -> None:
        assert read(credits_deduction=given).cost_usd == (None if cost is None else Decimal(cost))

    def test_a_body_may_be_the_text_of_an_object(self) -> None:
        assert read(request_body=json.dumps(OURS)).body == OURS

    @pytest.mark.parametrize("body", [None, "", "no JSON", "[1]", 7, [OURS], "[" * 50_000])
    def test_a_body_of_another_form_is_nobodys(self, body: object) -> None:
        assert read(request_body=body).body == {}
        assert not same_request({}, OURS)

    @pytest.mark.parametrize(
        ("given", "url"),
        [
            (" https://b.example/a.png ", "https://b.example/a.png"),
            (["https://b.example/a.png", "https://b.example/b.png"], "https://b.example/a.png"),
            ("s3://bucket/a.png", None),
            ("https://b.example/a b", None),
            ("javascript:alert(1)", None),
            (None, None),
            ("", None),
            ([], None),
            ({}, None),
        ],
    )
    def test_only_a_web_address_is_a_link(self, given: object, url: str | None) -> None:
        assert read(generation_url=given).url == url

    @pytest.mark.parametrize(
        ("given", "error"),
        [
            ("not  safe\n", "not safe"),
            ({"code": 7, "detail": "not safe"}, "not safe"),
            ({"code": 7}, None),
            ({"error": {"error": "deep"}}, None),
            (["not safe"], None),
            ("\x1b[31mred", "[31mred"),
            ("the key SG_0123456789abcdef", "the key SG_…"),
            (None, None),
            ("", None),
        ],
    )
    def test_the_error_can_be_shown(self, given: object, error: str | None) -> None:
        assert read(error=given).error == error
        assert len(read(error="x" * 100_000).error or "") == 300

    @pytest.mark.parametrize("name", [*entry(), "seed"])
    def test_no_depth_of_a_field_ends_it(self, name: str) -> None:
        body = json.dumps([entry()])
        for depth in (10, 200, *range(850, 1000, 10), 5000):
            deep = body.replace(f'"{name}": ', f'"{name}": {"[" * depth}{"]" * depth}, "other": ', 1)
            with suppress(ValueError):
                matched([Sought(OURS, NOW)], parse_page(deep.encode()))

    @given(
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(),
            lambda each: st.lists(each) | st.dictionaries(st.sampled_from([*entry(), "data", "items"]), each),
            max_leaves=8,
        )
    )
    def test_no_json_ends_it(self, parsed: object) -> None:
        body = json.dumps(parsed).encode()
        for parse in (parse_page, parse_row):
            with suppress(ValueError):
                parse(body)


class TestSameRequest:
    def test_the_query_of_the_image_does_not_count(self) -> None:
        for image in (
            "https://b.example/mug.jpg",
            "https://b.example/mug.jpg?sig=2&x=1",
            "https://b.example/mug.jpg#top",
        ):
            assert address(image) == "https://b.example/mug.jpg"
            assert same_request(OURS | {"image_file": image}, OURS)
        for other in ("https://b.example/hat.jpg?sig=1", "https://c.example/mug.jpg", "", None, 7):
            assert not same_request(OURS | {"image_file": other}, OURS)

    @pytest.mark.parametrize("name", OURS)
    def test_every_other_field_counts(self, name: str) -> None:
        assert not same_request(OURS | {name: "another"}, OURS)
        assert not same_request({key: value for key, value in OURS.items() if key != name}, OURS)

    def test_numbers_may_be_texts_and_nothing_else(self) -> None:
        assert same_request(OURS | {"seed": "4711", "image_weight": "50"}, OURS)
        assert same_request(OURS | {"seed": 4711.0}, OURS)
        for seed in ("4712", "04711", 4712, True, None, [4711]):
            assert not same_request(OURS | {"seed": seed}, OURS)
        assert not same_request({"seed": True}, {"seed": 1})
        assert not same_request({"prompt": 123}, {"prompt": "123"})

    def test_what_we_left_out_may_be_named_empty(self) -> None:
        empties: tuple[object, ...] = (None, "", [], {})
        for empty in empties:
            assert same_request(OURS | {"negative_prompt": empty, "new": empty}, OURS)
        for value in ("blurry", 0, False, " "):
            assert not same_request(OURS | {"negative_prompt": value}, OURS)
        ours = OURS | {"negative_prompt": "blurry"}
        assert same_request(ours, ours)
        assert not same_request(OURS, ours)


class TestMatching:
    def test_the_id_wins_over_body_and_time(self) -> None:
        mine = row("mine", NOW - timedelta(days=9), body={})
        found = matched([Sought(OURS, NOW, "mine")], [row("other"), mine])
        assert found == {0: mine}

    def test_without_a_row_of_its_id_the_body_counts(self) -> None:
        assert matched([Sought(OURS, NOW, "an-edge's")], [row("r-1")]) == {0: row("r-1")}

    def test_a_row_of_another_request_is_not_ours(self) -> None:
        assert matched([Sought(OURS, NOW)], [row(body=OURS | {"seed": 4712})]) == {}

    @pytest.mark.parametrize(("seconds", "ours"), [(-61, False), (-60, True), (0, True), (86_400, True)])
    def test_it_is_not_older_than_the_request_but_for_the_clocks(self, seconds: int, ours: bool) -> None:
        assert bool(matched([Sought(OURS, NOW)], [row(at=NOW + timedelta(seconds=seconds))])) is ours

    def test_a_row_without_a_time_counts_after_all_others(self) -> None:
        assert matched([Sought(OURS, NOW)], [row("a", None)]) == {0: row("a", None)}
        late = row("b", NOW + timedelta(days=300))
        assert matched([Sought(OURS, NOW)], [row("a", None), late]) == {0: late}

    def test_the_nearest_in_time_first(self) -> None:
        two = [Sought(OURS, NOW), Sought(OURS, NOW + timedelta(seconds=40))]
        near, far = row("near", NOW + timedelta(seconds=2)), row("far", NOW + timedelta(seconds=43))
        assert matched(two, [far, near]) == {0: near, 1: far}
        assert matched(two, [near]) == {0: near}

    def test_at_equal_distance_a_completed_one_first(self) -> None:
        rows = [row(each.lower(), outcome=each) for each in (Outcome.FAILED, Outcome.PENDING, Outcome.COMPLETED)]
        three = [Sought(OURS, NOW)] * 3
        assert [each.outcome for _, each in sorted(matched(three, rows).items())] == [
            Outcome.COMPLETED,
            Outcome.PENDING,
            Outcome.FAILED,
        ]

    def test_what_is_used_up_settles_nothing(self) -> None:
        assert matched([Sought(OURS, NOW)], [row("r-1")], {"r-1"}) == {}
        assert matched([Sought(OURS, NOW, "r-1")], [row("r-1")], ["r-1"]) == {}

    def test_a_request_that_is_known_by_its_id_alone_has_no_row_of_which_the_body_is_not_known(self) -> None:
        assert matched([Sought({}, NOW, "ours")], [row("another", body={})]) == {}
        assert matched([Sought({}, NOW, "ours")], [row("ours", body={})]) == {0: row("ours", body={})}


UNSEEDED = {name: value for name, value in OURS.items() if name != "seed"}
BODIES = [OURS, OURS | {"seed": 4712}, UNSEEDED]
THEIR_BODIES = [
    *BODIES,
    *(OURS | {"seed": "4711"}, OURS | {"seed": 4711.0, "image_file": "https://b.example/mug.jpg"}),
    *(OURS | {"seed": None}, OURS | {"seed": "", "image_file": "https://b.example/mug.jpg?sig=2"}),
    {},
]
TIMES = st.integers(-200, 200).map(lambda seconds: NOW + timedelta(seconds=seconds))
IDS = st.sampled_from(["a", "b", "c", "d", "e"])
SOUGHT = st.builds(Sought, st.sampled_from(BODIES), TIMES, st.none() | IDS)
ROWS = st.builds(row, IDS, st.none() | TIMES, body=st.sampled_from(THEIR_BODIES), outcome=st.sampled_from(Outcome))


@given(
    st.lists(SOUGHT, max_size=6),
    st.lists(ROWS, max_size=8, unique_by=lambda row: row.request_id),
    st.sets(IDS, max_size=2),
    st.randoms(),
)
def test_whatever_is_sought_each_row_settles_one_request_that_it_may_be_of(
    sought: list[Sought], rows: list[Row], taken: set[str], order: Any
) -> None:
    found = matched(sought, rows, taken)
    used = [each.request_id for each in found.values()]
    assert len(used) == len(set(used))
    assert not taken & set(used)
    for index, each in found.items():
        ours = sought[index]
        if each.request_id != ours.request_id:
            assert same_request(each.body, ours.body)
            assert each.created_at is None or each.created_at >= ours.sent_at - SKEW
    by_id = {each.request_id: each for each in rows if each.request_id not in taken}
    for id in {each.request_id for each in sought if each.request_id} & by_id.keys():
        first = next(index for index, each in enumerate(sought) if each.request_id == id)
        assert found[first] == by_id[id], "the id wins"
    left = [each for each in by_id.values() if each.request_id not in used]
    for index, ours in enumerate(sought):
        if index not in found:
            assert not any(
                same_request(each.body, ours.body)
                and (each.created_at is None or each.created_at >= ours.sent_at - SKEW)
                for each in left
            ), "none goes without that could have one"
    shuffled = list(rows)
    order.shuffle(shuffled)
    assert matched(sought, shuffled, taken) == found


class TestTheAddress:
    @pytest.mark.parametrize(
        ("base", "setting", "url"),
        [
            ("https://api.segmind.com/v1", None, "https://api.spotprod.segmind.com/inference-request/request-history"),
            ("https://API.segmind.com/v2/", "", "https://api.spotprod.segmind.com/inference-request/request-history"),
            ("http://127.0.0.1:8787/v1", None, "http://127.0.0.1:8787/inference-request/request-history"),
            ("http://localhost:8787/a/v2", " ", "http://localhost:8787/inference-request/request-history"),
            ("https://[::1]:8787/v2", None, "https://[::1]:8787/inference-request/request-history"),
            ("https://gateway.example/v1", None, None),
            ("https://api.segmind.com.evil.example/v1", None, None),
            ("https://gateway.example/v1", "https://h.example/x", "https://h.example/x"),
            ("https://api.segmind.com/v1", "off", None),
            ("https://api.segmind.com/v1", " OFF ", None),
            ("https://api.segmind.com/v1", "nonsense", "nonsense"),
        ],
    )
    def test_belongs_to_the_api_unless_it_is_set(self, base: str, setting: str | None, url: str | None) -> None:
        assert history_url(base, setting) == url
