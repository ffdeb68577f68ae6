"""Promises of `prefect_segmind.api.listing`, over real HTTP: one listing for all threads."""

from __future__ import annotations

import json
import logging
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import SecretStr

from prefect_segmind import errors
from prefect_segmind.api import listing as room
from prefect_segmind.api.endpoint import Endpoint
from prefect_segmind.api.history import HISTORY_SETTING, Sought
from prefect_segmind.api.listing import RequestHistory
from prefect_segmind.api.request import ImageToImageRequest
from prefect_segmind.credentials import SegmindCredentials
from prefect_segmind.settings import SegmindSettings
from tests.support.wire import Wire, http, http_json

KEY = "SG_0123456789abcdef"
ODD_KEY = "a-key-of-another-form-0123456789"
PATH = "/inference-request/request-history"
NOW = datetime(2026, 11, 23, 10, tzinfo=UTC)
LOG = logging.getLogger("tests")


def ours(seed: int = 4711) -> dict[str, Any]:
    return ImageToImageRequest(image_file="https://b.example/mug.jpg?sig=1", prompt="a mug", seed=seed).body()


def entry(request_id: str = "r-1", at: datetime | None = NOW, seed: int = 4711) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "model_status": "COMPLETED",
        "model_created": at and at.isoformat(),
        "credits_deduction": 0.05,
        "request_body": ours(seed),
        "generation_url": "https://images.example/a.png",
    }


def full(newest: datetime, step: timedelta = timedelta(seconds=10), prefix: str = "other") -> dict[str, Any]:
    """A page with as many rows as fit on it, newest first, none of them ours."""
    return {"data": [entry(f"{prefix}-{n}", newest - n * step, seed=n + 100_000) for n in range(100)]}


class Clock:
    """Time passes only where somebody sleeps, or where a test lets it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server() -> Iterator[Wire]:
    with Wire(http_json({"data": []})) as server:
        yield server


@pytest.fixture
def history(server: Wire, clock: Clock) -> RequestHistory:
    return opened(server, clock)


def opened(server: Wire, clock: Clock, key: str = KEY, **options: Any) -> RequestHistory:
    def open_endpoint() -> Endpoint:
        return Endpoint(key, f"{server.url}{PATH}", setting=HISTORY_SETTING, **options)

    return RequestHistory(open_endpoint, log=LOG, clock=clock, sleep=clock.sleep)


def asked(server: Wire) -> list[tuple[str, dict[str, str]]]:
    """The paths below the history's address that were asked for, and their parameters."""
    targets = [urlsplit(each.split(" ")[1]) for each in server.requests]
    return [
        (each.path.removeprefix(PATH), {name: value for name, (value,) in parse_qs(each.query).items()})
        for each in targets
    ]


def pages(server: Wire) -> list[str]:
    return [parameters["page"] for _, parameters in asked(server)]


class TestTheListing:
    def test_is_of_the_model_and_the_day_newest_first_with_the_key(self, server: Wire, history: RequestHistory) -> None:
        server.answers = [http_json({"data": [entry()]})]
        found = history.find([Sought(ours(), NOW)])
        assert (found[0].request_id, found[0].url) == ("r-1", "https://images.example/a.png")
        assert asked(server) == [
            (
                "",
                {
                    "page": "1",
                    "per_page": "100",
                    "from_date": "2026-11-23",
                    "to_date": "2026-11-24",
                    "model_name": "ideogram-2a-img-2-img",
                    "sort_by": "model_created",
                    "sort_order": "desc",
                },
            )
        ]
        assert f"x-api-key: {KEY}" in server.requests[0]

    @pytest.mark.parametrize(
        ("sent_at", "first", "last"),
        [
            (datetime(2026, 11, 23, 0, 0, 59, tzinfo=UTC), date(2026, 11, 22), date(2026, 11, 24)),
            (datetime(2026, 11, 23, 0, 1, tzinfo=UTC), date(2026, 11, 23), date(2026, 11, 24)),
            (datetime(2026, 12, 31, 23, 59, tzinfo=UTC), date(2026, 12, 31), date(2027, 1, 1)),
            (datetime.fromisoformat("2026-11-24T01:00:00+05:00"), date(2026, 11, 23), date(2026, 11, 24)),
        ],
    )
    def test_the_days_are_those_of_utc_and_allow_for_the_clocks(
        self, sent_at: datetime, first: date, last: date, server: Wire, history: RequestHistory
    ) -> None:
        assert history.find([Sought(ours(), sent_at)]) == {}
        (_, parameters), *more = asked(server)
        assert (parameters["from_date"], parameters["to_date"]) == (str(first), str(last))
        assert not more

    def test_nothing_is_asked_where_nothing_is_sought(self, server: Wire, history: RequestHistory) -> None:
        assert history.find([]) == {}
        assert not server.requests

    def test_pages_are_read_until_one_passes_the_time_of_sending(self, server: Wire, history: RequestHistory) -> None:
        newest = NOW + timedelta(minutes=30)
        second = full(newest - timedelta(seconds=1000), prefix="second")
        second["data"][80] = entry("mine", NOW)
        server.answers = [http_json(full(newest)), http_json(second), http_json(full(NOW, prefix="third"))]
        found = history.find([Sought(ours(), NOW)])
        assert found[0].request_id == "mine"
        assert pages(server) == ["1", "2"]

    def test_a_short_page_is_the_last(self, server: Wire, history: RequestHistory) -> None:
        server.answers = [http_json(full(NOW + timedelta(hours=9))), http_json({"data": [entry(at=NOW)]})]
        assert history.find([Sought(ours(), NOW)])[0].request_id == "r-1"
        assert pages(server) == ["1", "2"]

    def test_rows_that_cannot_be_read_do_not_make_a_page_short(self, server: Wire, history: RequestHistory) -> None:
        odd = full(NOW + timedelta(hours=9))
        odd["data"][7] = None
        odd["data"][9] = odd["data"][8]
        server.answers = [http_json(odd), http_json({"data": [entry()]})]
        assert 0 in history.find([Sought(ours(), NOW)])

    def test_rows_in_another_order_are_read_to_the_end(self, server: Wire, history: RequestHistory) -> None:
        oldest_first = {"data": full(NOW)["data"][::-1]}
        oldest_first["data"][-1] = entry("older", NOW - timedelta(days=1), seed=99_999)
        server.answers = [http_json(oldest_first), http_json({"data": [entry()]})]
        assert 0 in history.find([Sought(ours(), NOW)])

    def test_a_provider_that_sends_the_same_page_for_ever_is_asked_twice(
        self, server: Wire, history: RequestHistory
    ) -> None:
        server.answers = [http_json(full(NOW + timedelta(hours=9)))]
        assert history.find([Sought(ours(), NOW)]) == {}
        assert pages(server) == ["1", "2"]

    def test_there_is_an_end_to_pages_and_what_is_behind_it_proves_nothing(
        self, server: Wire, history: RequestHistory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(room, "MOST_PAGES", 3)
        server.answers = [http_json(full(NOW + timedelta(hours=9), prefix=f"page-{n}")) for n in range(5)]
        with pytest.raises(errors.HistoryError, match="more than 3 pages"):
            history.find([Sought(ours(), NOW)])
        assert pages(server) == ["1", "2", "3"]

    def test_each_day_has_its_own(self, server: Wire, history: RequestHistory) -> None:
        before = NOW - timedelta(days=40)
        server.answers = [http_json({"data": [entry()]}), http_json({"data": [entry("old", before, seed=5000)]})]
        found = history.find([Sought(ours(), NOW), Sought(ours(5000), before)])
        assert [found[0].request_id, found[1].request_id] == ["r-1", "old"]
        days = [(parameters["from_date"], parameters["to_date"]) for _, parameters in asked(server)]
        assert days == [("2026-11-23", "2026-11-24"), ("2026-10-14", "2026-10-15")]

    def test_rows_that_have_settled_others_are_left_out(self, server: Wire, history: RequestHistory) -> None:
        server.answers = [http_json({"data": [entry()]})]
        assert history.find([Sought(ours(), NOW)], {"r-1"}) == {}

    def test_a_check_reads_the_newest_rows(self, server: Wire, history: RequestHistory) -> None:
        server.answers = [http_json({"data": [entry()]}), http_json([])]
        assert (history.check(), history.check()) == (1, 0)
        assert asked(server)[0] == ("", {"page": "1", "per_page": "10", "model_name": "ideogram-2a-img-2-img"})


class TestManyThreads:
    def test_share_one_listing(self, server: Wire, history: RequestHistory) -> None:
        server.answers = [http_json({"data": [entry(f"r-{n}", NOW, 1000 + n) for n in range(32)]})]
        barrier = threading.Barrier(32, timeout=30)

        def find(n: int) -> str:
            barrier.wait()
            return history.find([Sought(ours(1000 + n), NOW)])[0].request_id

        with ThreadPoolExecutor(32) as threads:
            assert list(threads.map(find, range(32))) == [f"r-{n}" for n in range(32)]
        assert len(server.requests) == 1

    def test_one_that_needs_more_of_it_reads_on(self, server: Wire, history: RequestHistory) -> None:
        late = NOW + timedelta(minutes=20)
        server.answers = [http_json(full(late)), http_json({"data": [entry()]})]
        assert history.find([Sought(ours(5000), late)]) == {}
        assert history.find([Sought(ours(), NOW)])[0].request_id == "r-1"
        assert history.find([Sought(ours(5000), late)]) == {}
        assert pages(server) == ["1", "2"]

    def test_it_is_asked_anew_after_two_seconds(self, server: Wire, history: RequestHistory, clock: Clock) -> None:
        server.answers = [http_json({"data": []}), http_json({"data": [entry()]})]
        assert history.find([Sought(ours(), NOW)]) == {}
        clock.now += 1.9
        assert history.find([Sought(ours(), NOW)]) == {}
        clock.now += 0.2
        assert 0 in history.find([Sought(ours(), NOW)])
        assert pages(server) == ["1", "1"]

    def test_wait_for_a_history_that_is_silent_only_once(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(room, "_AT_ONCE", -1.0)  # the clock stands still, as if the time-out took no time
        with Wire(b"", silent=True) as server:
            history = opened(server, clock, read_timeout=0.3)

            def find(_: int) -> str:
                with pytest.raises(errors.HistoryError) as caught:
                    history.find([Sought(ours(), NOW)])
                return str(caught.value)

            with ThreadPoolExecutor(16) as threads:
                (words,) = set(threads.map(find, range(16)))
            server.hang_up()
        assert "took too long" in words
        assert len(server.requests) == 1


class TestOneRequest:
    def test_is_asked_for_by_its_id_and_has_no_listing(self, server: Wire, history: RequestHistory) -> None:
        server.answers = [http_json({"data": entry("r-7", NOW - timedelta(days=90))})]
        assert history.find([Sought({}, NOW, "r-7")])[0].request_id == "r-7"
        assert asked(server) == [("/r-7", {})]

    def test_is_sought_in_the_listing_where_its_id_is_not_known(self, server: Wire, history: RequestHistory) -> None:
        server.answers = [http_json({"error": "not found"}, "404 X"), http_json({"data": [entry()]})]
        assert history.find([Sought(ours(), NOW, "of-the-edge")])[0].request_id == "r-1"
        assert [path for path, _ in asked(server)] == ["/of-the-edge", ""]

    @pytest.mark.parametrize("answer", ["400 X", "422 X"])
    def test_is_sought_in_the_listing_where_its_id_is_refused_as_none_of_the_providers(
        self, answer: str, server: Wire, history: RequestHistory
    ) -> None:
        server.answers = [http_json({"error": "invalid input syntax for type uuid"}, answer), http_json([entry()])]
        assert history.find([Sought(ours(), NOW, "8f1c-edge")])[0].request_id == "r-1"

    @pytest.mark.parametrize("id", ["../credits", "..", "r 1", "a?b", "r/1", ""])
    def test_no_id_becomes_another_address(self, id: str, server: Wire, history: RequestHistory) -> None:
        server.answers = [http_json({"data": [entry(id), entry("r-9")]})]
        assert (0 in history.find([Sought({}, NOW, id)])) is bool(id), "it is known in the listing all the same"
        assert [path for path, _ in asked(server)] == [""]

    def test_the_row_of_another_is_none(self, server: Wire, history: RequestHistory) -> None:
        server.answers = [http_json(entry("r-8")), http_json([])]
        assert history.find([Sought(ours(), NOW, "r-7")]) == {}

    def test_is_sought_in_the_listing_where_the_answer_about_it_has_another_form(
        self, server: Wire, history: RequestHistory, clock: Clock
    ) -> None:
        server.answers = [http_json({"data": []}), http_json({"data": [entry("r-7")]})]
        assert history.find([Sought(ours(), NOW, "r-7")])[0].request_id == "r-7"
        clock.now += 3
        server.answers = [http_json({"ok": True}), http_json({"ok": True})]
        with pytest.raises(errors.HistoryError, match="another form"):
            history.find([Sought(ours(), NOW, "r-8")])


UNTOLD = {
    "no id": ([{"id": 5}, None, 7, {"model_status": [1]}], "none of its 4 rows names its request"),
    "no body": (
        [{**entry("r-7", seed=500), "request_body": None, "input": ours()}],
        "none of its 1 rows has the request_body",
    ),
}


class TestRowsByWhichNoRequestIsKnown:
    @pytest.mark.parametrize(("rows", "words"), UNTOLD.values(), ids=UNTOLD)
    def test_are_a_history_that_cannot_be_read_and_prove_nothing(
        self, rows: list[Any], words: str, server: Wire, history: RequestHistory
    ) -> None:
        server.answers = [http_json({"data": rows})]
        with pytest.raises(errors.HistoryError, match=words):
            history.find([Sought(ours(), NOW)])
        with pytest.raises(errors.HistoryError, match=words):
            history.check()

    def test_are_none_beside_others(self, server: Wire, history: RequestHistory) -> None:
        server.answers = [http_json({"data": [None, {**entry("r-8"), "request_body": None}, entry("r-7", seed=500)]})]
        assert history.find([Sought(ours(), NOW)]) == {}

    def test_do_not_matter_where_the_id_is_known(self, server: Wire, history: RequestHistory) -> None:
        server.answers = [http_json({}, "404 X"), http_json([{**entry("r-7"), "request_body": None}])]
        assert history.find([Sought(ours(), NOW, "r-7")])[0].request_id == "r-7"


class TestPoliteness:
    @pytest.mark.parametrize("status", ["429 X", "503 X", "529 X"])
    def test_a_busy_history_is_given_the_time_it_asks_for(
        self, status: str, server: Wire, history: RequestHistory, clock: Clock
    ) -> None:
        server.answers = [
            http(b"", status, Retry_After="7"),
            http(b"", status, Retry_After="900"),
            http(b"", status),
            http_json({"data": [entry()]}),
        ]
        assert 0 in history.find([Sought(ours(), NOW)])
        assert clock.slept == [7.0, 30.0, 1.0]

    def test_three_waits_are_enough(self, server: Wire, history: RequestHistory, clock: Clock) -> None:
        server.answers = [http(b"", "429 X", Retry_After="5")]
        with pytest.raises(errors.HistoryError, match="answered 429") as caught:
            history.find([Sought(ours(), NOW)])
        assert (len(server.requests), clock.slept) == (4, [5.0, 5.0, 5.0])
        assert (caught.value.status, caught.value.retry_after) == (429, 5.0)

    @pytest.mark.parametrize("answer", [b"", http(b"", "502 X"), http(b"", "504 X"), http(b'{"data": [', length=999)])
    def test_what_fails_for_a_moment_is_asked_again(
        self, answer: bytes, server: Wire, history: RequestHistory, clock: Clock
    ) -> None:
        server.answers = [answer, answer, http_json({"data": [entry()]})]
        assert 0 in history.find([Sought(ours(), NOW)])
        assert clock.slept == [1.0, 3.0]


class TestFailures:
    @pytest.mark.parametrize(
        ("answer", "words", "cause"),
        [
            (http_json({"error": "bad key"}, "401 X"), "401: bad key", errors.InvalidKeyError),
            (http_json({"error": "no"}, "403 X"), "403: no", errors.PermissionDeniedError),
            (http_json({"error": "no"}, "404 X"), "404: no", errors.EndpointNotFoundError),
            (http(b"<html>no</html>", "500 X"), "500: no", errors.InternalServerError),
            (http(b"", "502 X"), "502", errors.BadGatewayError),
            (http(b"", "302 X", Location="https://evil.example/"), "302", errors.UnexpectedStatusError),
            (b"", "was cut", errors.AnswerCutError),
            (http(b"<html>hello</html>"), "another form", None),
            (http(b""), "another form", None),
            (http_json({"rows": []}), "another form", None),
            (http(b'{"data": ["' + b"x" * 31_000_000 + b'"]}'), "more than 30,000,000 bytes", None),
        ],
    )
    def test_say_what_to_do_and_are_never_billed(
        self,
        answer: bytes,
        words: str,
        cause: type[errors.ApiError] | None,
        server: Wire,
        history: RequestHistory,
    ) -> None:
        server.answers = [answer]
        with pytest.raises(errors.HistoryError) as caught:
            history.find([Sought(ours(), NOW)])
        error = caught.value
        assert words in str(error)
        # Of a refused key that of the history is not to be switched off: it is refused everywhere.
        assert ("SEGMIND_API_KEY" if cause is errors.InvalidKeyError else HISTORY_SETTING) in str(error)
        assert (HISTORY_SETTING in str(error)) is (cause is not errors.InvalidKeyError)
        assert "SEGMIND_BASE_URL" not in str(error)
        assert error.possibly_billed is False
        if cause is None:
            assert error.__cause__ is None
        else:
            assert isinstance(error.__cause__, cause)
            assert error.status == error.__cause__.status
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        with pytest.raises(errors.HistoryError, match=r"cannot be read"):
            history.check()

    def test_are_raised_again_at_once_for_three_seconds(
        self, server: Wire, history: RequestHistory, clock: Clock
    ) -> None:
        server.answers = [http_json({"error": "no"}, "401 X"), http_json({"data": [entry()]})]
        for seconds in (0.0, 1.0, 1.9):
            clock.now += seconds
            with pytest.raises(errors.HistoryError) as caught:
                history.find([Sought(ours(), NOW)])
            assert (caught.value.status, type(caught.value.__cause__)) == (401, errors.InvalidKeyError)
        assert len(server.requests) == 1
        clock.now += 0.2
        assert 0 in history.find([Sought(ours(), NOW)])
        assert 0 in history.find([Sought(ours(), NOW)])

    def test_a_check_asks_whatever_has_failed_before(self, server: Wire, history: RequestHistory) -> None:
        server.answers = [http(b"", "401 X"), http_json({"data": [entry()]})]
        with pytest.raises(errors.HistoryError):
            history.find([Sought(ours(), NOW)])
        assert history.check() == 1

    def test_nobody_there_is_told(self, clock: Clock) -> None:
        def open_endpoint() -> Endpoint:
            return Endpoint(KEY, f"http://127.0.0.1:1{PATH}", setting=HISTORY_SETTING)

        history = RequestHistory(open_endpoint, log=LOG, clock=clock, sleep=clock.sleep)
        with pytest.raises(errors.HistoryError, match=r"127\.0\.0\.1 cannot be reached") as caught:
            history.find([Sought(ours(), NOW)])
        assert isinstance(caught.value.__cause__, errors.ApiUnreachableError)
        assert str(caught.value).count(HISTORY_SETTING) == 1

    def test_the_key_is_in_none_of_them(self, clock: Clock) -> None:
        for answer in (http_json({"error": ODD_KEY}, "500 X"), http(ODD_KEY.encode()), f"{ODD_KEY}\r\n\r\n".encode()):
            with Wire(answer) as server, pytest.raises(errors.HistoryError) as caught:
                opened(server, clock, ODD_KEY).find([Sought(ours(), NOW)])
            assert ODD_KEY[:10] not in str(caught.value)

    def test_a_redirect_takes_the_key_nowhere(self, server: Wire, history: RequestHistory) -> None:
        with Wire(http_json({"data": [entry()]})) as other:
            server.answers = [http(b"", "307 X", Location=f"{other.url}{PATH}")]
            with pytest.raises(errors.HistoryError):
                history.find([Sought(ours(), NOW)])
        assert not other.requests

    def test_an_interrupt_leaves_the_history_usable(self, server: Wire, clock: Clock) -> None:
        def interrupted() -> Endpoint:
            raise KeyboardInterrupt

        history = opened(server, clock)
        opens, history._open_endpoint = history._open_endpoint, interrupted
        with pytest.raises(KeyboardInterrupt):
            history.find([Sought(ours(), NOW)])
        history._open_endpoint = opens
        assert history.find([Sought(ours(), NOW)]) == {}


class TestOfTheCredentials:
    @pytest.fixture(autouse=True)
    def unset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(HISTORY_SETTING, raising=False)

    def test_is_that_of_the_base_url_with_its_key(self, server: Wire) -> None:
        server.answers = [http_json({"data": [entry()]})]
        credentials = SegmindCredentials(api_key=SecretStr(KEY), base_url=f"{server.url}/v2")
        history = credentials.get_history(SegmindSettings(), LOG)
        assert history is not None
        assert 0 in history.find([Sought(ours(), NOW)])
        assert server.requests[0].startswith(f"GET {PATH}?")
        assert f"x-api-key: {KEY}" in server.requests[0]

    def test_the_setting_names_another_or_switches_it_off(self, server: Wire) -> None:
        server.answers = [http_json([])]
        credentials = SegmindCredentials(api_key=SecretStr(KEY), base_url="https://gateway.example/v1")
        assert credentials.get_history(SegmindSettings(), LOG) is None
        assert credentials.get_history(SegmindSettings(history_url="off"), LOG) is None
        history = credentials.get_history(SegmindSettings(history_url=f"{server.url}/mine"), LOG)
        assert history is not None
        assert history.check() == 0
        assert server.requests[0].startswith("GET /mine?")

    @pytest.mark.parametrize(
        "url", ["nonsense", "ftp://b.example", "http://b.example/h", "https://me:secret@b.example/h"]
    )
    def test_a_wrong_one_is_told_before_anything_is_lost(self, url: str) -> None:
        credentials = SegmindCredentials(api_key=SecretStr(KEY))
        with pytest.raises(errors.ConfigurationError, match=rf"^{HISTORY_SETTING}: ") as caught:
            credentials.get_history(SegmindSettings(history_url=url), LOG)
        assert "secret" not in str(caught.value)

    def test_no_text_of_it_shows_the_key(self) -> None:
        history = SegmindCredentials(api_key=SecretStr(KEY)).get_history(SegmindSettings(), LOG)
        assert KEY not in json.dumps({"repr": repr(history), "parts": repr(vars(history))})
