"""Promises of `prefect_segmind.api.endpoint`: the key goes to one origin, every failure has a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prefect_segmind import errors
from prefect_segmind.api.endpoint import Endpoint, start_of
from tests.support.wire import Wire, http

KEY = "SG_0123456789abcdef"


def get(endpoint: Endpoint, path: str = "", *, billable: bool = False, **options: Any) -> bytes:
    with endpoint.translated(billable), endpoint.exchange("GET", path, **options) as answer:
        endpoint.raise_unless_ok(answer)
        return start_of(answer)


class TestTheAddress:
    @pytest.mark.parametrize(
        "url", ["", "api.segmind.com/v1", "ftp://127.0.0.1", "https://me:secret@127.0.0.1/v1", "https://127.0.0.1/?x=1"]
    )
    def test_one_that_is_unusable_is_refused_by_the_name_of_its_setting(self, url: str) -> None:
        with pytest.raises(errors.ConfigurationError, match=r"^MY_SETTING: ") as caught:
            Endpoint(KEY, url, setting="MY_SETTING")
        assert "secret" not in str(caught.value)

    def test_the_key_is_sent_in_the_clear_to_this_machine_only(self) -> None:
        with pytest.raises(errors.ConfigurationError, match="MY_SETTING: only https"):
            Endpoint(KEY, "http://api.example/history", setting="MY_SETTING")
        assert Endpoint(KEY, "http://127.0.0.1:9/history").on_loopback

    def test_paths_are_below_it_and_parameters_behind_them(self) -> None:
        with Wire(http(b"yes")) as server, Endpoint(KEY, f"{server.url}/a/b/") as endpoint:
            get(endpoint)
            get(endpoint, "c-1")
            get(endpoint, params={"page": 2, "model": "x&y=z"})
            get(endpoint, f"{server.url}/d?e=1", params={"f": 2})
        heads = [each.splitlines()[0].split()[1] for each in server.requests]
        assert heads == ["/a/b", "/a/b/c-1", "/a/b?page=2&model=x%26y%3Dz", "/d?e=1&f=2"]
        assert all(f"x-api-key: {KEY}\r\n" in each for each in server.requests)


OTHERS: dict[str, Callable[[int], str]] = {
    "another host": lambda port: f"http://localhost:{port}/v2",
    "another port": lambda port: f"http://127.0.0.1:{port - 1}/v2",
    "no port": lambda _: "http://127.0.0.1/v2",
    "another scheme": lambda port: f"https://127.0.0.1:{port}/v2",
    "a user": lambda port: f"http://me@127.0.0.1:{port}/v2",
    "a host as the user": lambda port: f"http://127.0.0.1:{port}@127.0.0.2/v2",
    "a backslash": lambda port: f"http://127.0.0.2\\@127.0.0.1:{port}/v2",
    "a longer host": lambda port: f"http://127.0.0.1.example:{port}/v2",
    "no address": lambda _: "http://",
    "a port beyond all": lambda _: "http://127.0.0.1:99999/v2",
    "a line break": lambda port: f"http://127.0.0.1:{port}\r\nHost: evil.example/v2",
}


class TestTheOrigin:
    @pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
    def test_no_other_gets_the_key_or_any_request(self, other: Callable[[int], str]) -> None:
        with Wire(http(b"yes")) as server, Endpoint(KEY, f"{server.url}/v2") as endpoint:
            url = other(server.port)
            assert not endpoint.owns(url)
            with pytest.raises(errors.ApiError, match="SEGMIND_BASE_URL: an address of another origin") as caught:
                get(endpoint, url)
        assert not server.requests
        assert not caught.value.possibly_billed

    def test_its_own_is_known_in_other_spellings(self) -> None:
        with Endpoint(KEY, "https://api.example/v2") as endpoint:
            assert endpoint.owns("HTTPS://API.example:443/other?x=1")
            assert not endpoint.owns("https://api.example.evil/v2")

    def test_a_redirect_is_not_followed(self) -> None:
        with (
            Wire(http(b"")) as other,
            Wire(http(b"", "307 X", Location=f"{other.url}/v2")) as server,
            Endpoint(KEY, server.url) as endpoint,
            pytest.raises(errors.UnexpectedStatusError),
        ):
            get(endpoint)
        assert not other.requests


class TestFailures:
    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (http(b"", "502 X"), errors.BadGatewayError),
            (http(b"half", length=99), errors.AnswerCutError),
            (b"", errors.AnswerCutError),
            (b"SSH-2.0\r\n\r\n", errors.AnswerCutError),
        ],
    )
    @pytest.mark.parametrize("billable", [True, False])
    def test_are_possibly_billed_only_where_that_can_be(
        self, billable: bool, answer: bytes, kind: type[errors.ApiError]
    ) -> None:
        with Wire(answer) as server, Endpoint(KEY, server.url) as endpoint, pytest.raises(kind) as caught:
            get(endpoint, billable=billable)
        assert caught.value.possibly_billed is billable

    def test_an_exchange_can_be_given_less_time(self) -> None:
        with (
            Wire(b"", silent=True) as server,
            Endpoint(KEY, server.url) as endpoint,
            pytest.raises(errors.AnswerCutError, match="took too long"),
        ):
            get(endpoint, seconds=0.2)

    def test_nobody_there_is_told_with_the_setting(self) -> None:
        with (
            Endpoint(KEY, "http://127.0.0.1:1", setting="MY_SETTING") as endpoint,
            pytest.raises(errors.ApiUnreachableError, match=r"127\.0\.0\.1 cannot be reached: .*check MY_SETTING"),
        ):
            get(endpoint)

    def test_a_peer_that_repeats_the_key_does_not_bring_it_into_a_message(self) -> None:
        key = "a-key-of-another-form-0123456789"
        for answer in (f"{key}\r\n\r\n".encode(), http(key.encode(), "500 X")):
            with (
                Wire(answer) as server,
                Endpoint(key, server.url) as endpoint,
                pytest.raises(errors.ApiError) as caught,
            ):
                get(endpoint)
            assert key[:10] not in str(caught.value)
