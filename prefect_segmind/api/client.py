"""The HTTP client of the image-to-image API. It sends one request at a time and knows nothing of retries."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Final

import httpx
from pydantic import BaseModel, Field, ValidationError

from prefect_segmind.api.endpoint import EXCHANGE_SECONDS, Endpoint, document, start_of
from prefect_segmind.api.origin import is_v2
from prefect_segmind.api.picture import Answered, PaidPicture
from prefect_segmind.api.request import ENDPOINT, ImageToImageRequest
from prefect_segmind.api.response import (
    Link,
    content_type,
    error_text,
    header,
    is_whole_json,
    picture_or_link,
    read_cost,
    request_id,
    unpacked_start,
)
from prefect_segmind.api.submission import (
    SUCCESS,
    Status,
    Submitted,
    accepted,
    is_request_id,
    is_result,
    judged,
    named_request,
    read_result,
    without_status,
)
from prefect_segmind.errors import (
    AnswerCutError,
    ApiError,
    ApiUnreachableError,
    NotAnImageError,
    OutboxError,
    ResultLinkError,
    SegmindError,
)
from prefect_segmind.images.container import is_truncated
from prefect_segmind.images.inspection import BrokenPicture, Picture, picture_of, read_picture
from prefect_segmind.money import LIST_PRICE_USD, Usd
from prefect_segmind.storage.disk_errors import reason
from prefect_segmind.storage.http import Destination, DownloadError, download
from prefect_segmind.storage.reserved_file import replacing

DEFAULT_BASE_URL = "https://api.segmind.com/v1"
ANSWER_LIMIT = 50_000_000
"""The most bytes of a picture; a JSON answer may be a third longer for its base64."""
_LINK_WAITS = (0.5, 2.0, 5.0, 10.0, 20.0, 30.0)
"""Seconds between the attempts to download a linked picture, which is paid for and nowhere else."""
_STATUS_SECONDS: Final = 30.0
"""The most seconds of a look at a submitted request, which can be repeated at once."""


class _Balance(BaseModel):
    credits: Usd
    free: Usd | None = Field(None, alias="free-credits")


class SegmindClient:
    """An HTTP client of the API. Use one per thread, and close it or use it as a context manager.

    Args:
        api_key: The key; it is sent to the API's own address only, and no message contains it.
        base_url: The address of the API, https unless it is on loopback.
        connect_timeout: Seconds to connect.
        read_timeout: Seconds to wait for the next bytes of an answer; a generation takes about 10 s.
        total_timeout: Seconds for one exchange, so that an answer that drips ends too.
        list_price_usd: The cost of a picture if the answer names none.

    Attributes:
        base_url: As above, without a slash at the end.
        on_loopback: Whether the API is on this machine.

    Raises:
        ConfigurationError: The key, the address, or a proxy or certificate named in the environment is unusable.

    Example:
        >>> SegmindClient("SG_0123456789abcdef", "http://127.0.0.1:8787/v1").on_loopback
        True
    """

    def __init__(
        self,
        api_key: str,
        base_url: str = DEFAULT_BASE_URL,
        *,
        connect_timeout: float = 10.0,
        read_timeout: float = 180.0,
        total_timeout: float = EXCHANGE_SECONDS,
        list_price_usd: Decimal = LIST_PRICE_USD,
    ) -> None:
        self._endpoint = Endpoint(
            api_key,
            base_url,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            total_timeout=total_timeout,
        )
        self.base_url = self._endpoint.url
        self.on_loopback = self._endpoint.on_loopback
        self._key = self._endpoint.secret
        self._list_price = list_price_usd

    def __enter__(self) -> SegmindClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._endpoint.close()

    @property
    def submits(self) -> bool:
        """Whether a request is submitted and polled for (v2), instead of answered with its picture (v1)."""
        return is_v2(self.base_url)

    def generate(
        self, request: ImageToImageRequest, part: Path, before_sending: Callable[[], None] = lambda: None
    ) -> PaidPicture:
        """Sends one request, which may be billed, and streams the picture to a file.

        Args:
            request: The request; its `image_file` must be an address that the provider can GET.
            part: The file to write; its content is replaced. After an error with `answered` it holds the body of the
                answer as received, and beside it a file with the suffix `.found` may hold what a link in it led to.
            before_sending: Called when the connection stands, just before the request is sent. What it raises is raised
                as it is, and nothing is sent.

        Returns:
            The picture's facts, from its bytes and the answer's headers.

        Raises:
            ApiError: The request failed; `possibly_billed` is True if it may have been billed, and if a 200 was read to
                its end, `answered` has its cost.
            OutboxError: The file cannot be written.
        """
        with self._endpoint.translated():
            sent = self._endpoint.exchange("POST", ENDPOINT, request.body(), before_sending=before_sending)
            answer, notices = self._receive(sent, part, self._endpoint.raise_unless_ok, billable=True)
        picture = self._picture(self._answered(answer), request.seed, part)
        return picture.model_copy(update={"notices": (*picture.notices, *notices)})

    def submit(self, request: ImageToImageRequest, before_sending: Callable[[], None] = lambda: None) -> Submitted:
        """Submits one request (v2), which may be billed.

        Args:
            request: The request; its `image_file` must be an address that the provider can GET.
            before_sending: As for `generate`.

        Returns:
            The request as the provider has accepted it: to be noted before anything else is done.

        Raises:
            SubmissionUnknownError: It was accepted, but the answer does not say where to ask for the picture.
            ApiError: The request failed; `possibly_billed` is True if it may have been accepted.
        """
        with self._endpoint.translated():
            sent = self._endpoint.exchange("POST", ENDPOINT, request.body(), before_sending=before_sending)
            answer, body, broken = document(sent)
        status, headers = answer.status_code, answer.headers
        if status not in SUCCESS:
            raise self._endpoint.error_of(answer, body)
        if broken is not None and not is_whole_json(body):
            named = named_request(headers, body, self._key)
            raise self._endpoint.cut(broken).with_facts(status=status, request_id=named)
        return accepted(status, headers, body, owns=self._endpoint.owns, secret=self._key)

    def submitted(self, request_id: str) -> Submitted:
        """A request that was submitted earlier, by its id.

        Args:
            request_id: The provider's id.

        Raises:
            ValueError: It is not of the form of an id, and is never made part of an address.
        """
        if not is_request_id(request_id):
            raise ValueError("not the id of a request")
        here = f"{self.base_url}/requests/{request_id}"
        return Submitted(request_id, f"{here}/status", here)

    def status(self, submitted: Submitted) -> Status:
        """How far a submitted request is. Asking is free, and can be repeated whatever it ends with.

        Args:
            submitted: The request.

        Raises:
            UnprocessableError: It has failed, and is not billed.
            ForgottenError: The provider no longer has it.
            ApiError: It could not be asked; nothing is known of the request, and nothing billed by asking.
        """
        with self._about(submitted):
            asked = self._endpoint.exchange("GET", submitted.status_url, seconds=_STATUS_SECONDS)
            answer, body, broken = document(asked)
            status = self._judged(answer, body, submitted)
            if status is None:
                raise broken or without_status(answer.status_code, body, submitted, self._key)
        return status

    def fetch(self, submitted: Submitted, seed: int | None, part: Path) -> PaidPicture:
        """Fetches the picture of a submitted request that is completed, to a file. It may be repeated.

        Args:
            submitted: The request.
            seed: The seed that was asked for.
            part: The file to write, as for `generate`.

        Returns:
            The picture's facts; its cost is that of the result's `metrics`.

        Raises:
            UnprocessableError: The request has failed, and is not billed.
            ForgottenError: The provider no longer has it.
            ResultLinkError: The link in the result could not be followed; `answered` has the cost, as for every result
                that was read to its end and holds no picture.
            ApiError: The result could not be read; what was billed is the submitted request, and nothing is by this.
            OutboxError: The file cannot be written.
        """
        with self._about(submitted):
            asked = self._endpoint.exchange("GET", submitted.response_url)
            answer, notices = self._receive(asked, part, partial(self._raise_unless_result, submitted), billable=False)
            answered = self._answered_by_result(answer, part, submitted)
            picture = self._picture(answered, seed, part)
        return picture.model_copy(update={"notices": (*picture.notices, *notices)})

    def download(self, url: str, part: Path, answered: Answered, seed: int | None) -> PaidPicture:
        """Downloads a picture that is known to be paid from its link, without the key.

        Args:
            url: The link.
            part: The file to write, as for `generate`; after an error it holds the link, as an answer would.
            answered: What is known of the request.
            seed: The seed that was asked for.

        Raises:
            ResultLinkError: It could not be downloaded, or is not a picture; `gone` if it never will be.
            OutboxError: The file cannot be written.
        """
        if not re.match(r"(?i)https?://", url):
            raise _link_error("could not be followed: it is not an http(s) address", gone=True).with_facts(
                answered=answered, request_id=answered.request_id
            )
        try:
            with replacing(part) as write:
                write(json.dumps({"url": url}).encode())
        except OSError as error:
            raise _unusable(part, error).with_facts(answered=answered, possibly_billed=False) from error
        with self._endpoint.translated(billable=False):
            return self._picture(answered, seed, part)

    def read(self, body: Path, found: Path) -> Picture:
        """Finds the picture in the body of a 200, or downloads it from the link there.

        Args:
            body: The file with the body; it is not changed.
            found: The file to write if the body is not the picture itself.

        Returns:
            The facts of the picture.

        Raises:
            NotAnImageError: There is no picture. If a link led to something else, `found` has that.
            AnswerCutError: The picture provably lacks its end.
            OSError: A file cannot be read or written.
        """
        data = body.read_bytes()
        held = picture_or_link(data, self._key)
        if isinstance(held, Link):
            return self._follow(held, found)
        if held is not None:
            found.write_bytes(held)
        try:
            return read_picture(body if held is None else found)
        except BrokenPicture as broken:
            if held is not None:
                found.unlink()  # the body has it too
            raise _no_picture(broken, data if held is None else held, self._key) from None

    def credits(self) -> Decimal:
        """The account's credits in USD, free ones included. The call is free, so it also serves to check a key.

        Raises:
            ApiError: The request failed; it is never billed.
        """
        address = re.sub(r"/v2\Z", "/v1", self.base_url) + "/get-user-credits"  # v2 has none
        with self._endpoint.translated(billable=False), self._endpoint.exchange("GET", address) as answer:
            self._endpoint.raise_unless_ok(answer)
            body = start_of(answer)
        try:
            balance = _Balance.model_validate_json(unpacked_start(body))
        except ValidationError:
            text = error_text(body, self._key)
            raise ApiUnreachableError(f"the API answered without a credit balance: {text}", status=200) from None
        return balance.credits + (balance.free or 0)

    @contextmanager
    def _about(self, submitted: Submitted) -> Iterator[None]:
        """Asks about a submitted request: that is never billed, and each error names the request, not the asking."""
        try:
            with self._endpoint.translated(billable=False):
                yield
        except SegmindError as error:
            error.request_id = submitted.request_id
            raise

    def _judged(self, answer: httpx.Response, body: bytes, submitted: Submitted) -> Status | None:
        status, headers = answer.status_code, answer.headers
        return judged(status, headers, body, submitted, now=datetime.now(UTC), secret=self._key)

    def _raise_unless_result(self, submitted: Submitted, answer: httpx.Response) -> None:
        """Raises the error for an answer that is no result by its status."""
        if answer.status_code in SUCCESS:
            return
        body = b""
        with suppress(httpx.TransportError):  # the status says enough
            body = start_of(answer)
        self._judged(answer, body, submitted)
        raise without_status(answer.status_code, body, submitted, self._key)

    def _answered_by_result(self, answer: httpx.Response, part: Path, submitted: Submitted) -> Answered:
        """The facts in a result.

        Raises:
            ApiError: It is that of a request that has failed, or is not completed yet.
            OutboxError: The file cannot be read.
        """
        try:
            body = part.read_bytes()
        except OSError as error:
            raise _unusable(part, error, "read from") from error
        status = self._judged(answer, body, submitted)
        if status is not Status.COMPLETED and (status or not (is_result(body) or _is_whole_picture(body))):
            raise without_status(answer.status_code, body, submitted, self._key)
        result, facts = read_result(body), dict[str, object](request_id=submitted.request_id)
        if result.cost_usd is not None:
            facts |= {"cost_usd": result.cost_usd, "cost_source": "metrics"}
        if result.seed is not None:
            facts["seed"] = result.seed
        return self._answered(answer).model_copy(update=facts)

    def _receive(
        self,
        exchange: AbstractContextManager[httpx.Response],
        part: Path,
        refuse: Callable[[httpx.Response], None],
        *,
        billable: bool,
    ) -> tuple[httpx.Response, tuple[str, ...]]:
        """Writes the body of an answer to a file.

        Args:
            exchange: The exchange that brings it.
            part: The file.
            refuse: Raises the error of an answer without such a body.
            billable: Whether the request may be billed.

        Returns:
            The answer; and a notice, if its connection broke when the body had arrived whole.

        Raises:
            AnswerCutError: The connection broke before that.
            NotAnImageError: It is too large, and was not read to its end. If it was not for the request to be billed,
                the request is finished, and `answered` has its cost.
            OutboxError: The file cannot be written or read.
        """
        answer: httpx.Response | None = None
        try:
            with exchange as answer:
                refuse(answer)
                try:
                    self._write(answer, part)
                except NotAnImageError as too_large:
                    raise too_large if billable else too_large.with_facts(answered=self._answered(answer)) from None
        except httpx.TransportError as error:
            if answer is None:
                raise
            try:
                whole = _is_whole(part.read_bytes())
            except OSError as unreadable:  # it may be whole, and stays
                raise _unusable(part, unreadable, "read from") from unreadable
            if not whole:
                cut = self._endpoint.cut(error, billable)
                raise cut.with_facts(status=answer.status_code, request_id=self._request_id(answer)) from None
            notice = f"the connection broke when the answer had arrived whole ({self._endpoint.shown(error)})"
            return answer, (notice,)
        return answer, ()

    def _write(self, answer: httpx.Response, part: Path) -> None:
        """Writes the body of a 200 to a file, as received: one that is paid for and cannot be read is kept like that.

        Each piece is with the system as soon as it has come, so that the end of the process takes no more than what is
        still on the way, and the piece in hand: at most 64 kB, for about 30 µs. Between the head of the answer and its
        first bytes in the file about 0.2 ms pass (measured on loopback with two cores).

        Raises:
            NotAnImageError: It is too large, and was not read to its end.
            OutboxError: The file cannot be written.
        """
        size = 0
        try:
            with replacing(part) as write:
                for chunk in answer.iter_raw():
                    size += len(chunk)
                    if size > ANSWER_LIMIT * 4 // 3 + 10_000:
                        raise NotAnImageError(
                            f"the API answered 200 with more than {ANSWER_LIMIT:,} bytes (check the provider's usage "
                            "page before running again)",
                            status=200,
                            possibly_billed=True,
                            request_id=self._request_id(answer),
                        )
                    write(chunk)
        except OSError as error:
            raise _unusable(part, error) from error

    def _request_id(self, answer: httpx.Response) -> str | None:
        return request_id(answer.headers, self._key)

    def _answered(self, answer: httpx.Response) -> Answered:
        cost, seed = read_cost(header(answer.headers, "x-cost")), header(answer.headers, "x-seed-value") or ""
        return Answered(
            cost_usd=self._list_price if cost is None else cost,
            cost_source="list price" if cost is None else "x-cost",
            seed=int(seed) if re.fullmatch(r"[0-9]{1,18}", seed) else None,
            content_type=content_type(answer.headers, self._key),
            request_id=self._request_id(answer),
            at=datetime.now(UTC),
        )

    def _picture(self, answered: Answered, seed: int | None, part: Path) -> PaidPicture:
        """The picture of an answer that was read to its end; once it is whole, it replaces the body."""
        found = part.with_suffix(".found")
        try:
            found.unlink(missing_ok=True)
            picture = self.read(part, found)
            if found.exists():
                found.replace(part)
        except OSError as error:
            with suppress(OSError):
                found.unlink(missing_ok=True)
            raise _unusable(part, error).with_facts(answered=answered, possibly_billed=False) from error
        except ApiError as error:
            raise error.with_facts(answered=answered, request_id=answered.request_id) from None
        return answered.brought(picture, seed)

    def _follow(self, link: Link, found: Path) -> Picture:
        """Downloads a linked picture without the key; it is paid for, so a download that failed or was cut is repeated.

        Raises:
            ResultLinkError: It could not be downloaded, or is not a picture.
            OSError: The file cannot be written.
        """
        for wait in (*_LINK_WAITS, None):
            try:
                with found.open("wb") as file:
                    download(link.url, file, limit=ANSWER_LIMIT, destination=Destination(same_origin=self.base_url))
                return read_picture(found)
            except DownloadError as error:
                if error.retryable and _is_whole_picture(found.read_bytes()):
                    return read_picture(found)
                found.unlink()  # a part of the picture
                why, again, gone = f"could not be followed: {error}", error.retryable, _is_gone(error)
            except BrokenPicture as broken:
                text = _shown(broken, found.read_bytes(), self._key)
                why, again, gone = f"does not lead to a picture: {text}", broken.truncated, not broken.truncated
            if wait is None or not again:
                raise _link_error(why, gone)
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


def _link_error(why: str, gone: bool) -> ResultLinkError:
    return ResultLinkError(f"the API answered 200 with a link to the picture that {why}", status=200, gone=gone)


def _is_gone(error: DownloadError) -> bool:
    """Whether a download that failed would fail again at any time: the link has expired, or is refused here."""
    asked_wrongly = error.status is not None and 400 <= error.status < 500
    return not error.retryable and (error.refused or error.too_large or asked_wrongly)


def _is_whole(body: bytes) -> bool:
    """Whether the body of a 200 is whole by its content: JSON to its end, or a picture with its end that decodes.

    Without that proof a body whose connection broke counts as cut.
    """
    if is_whole_json(body):
        return True
    try:
        held = picture_or_link(body)
    except ApiError:
        return False
    if isinstance(held, Link):
        return False  # a text without an end mark: half of an address is an address
    return _is_whole_picture(body if held is None else held)


def _is_whole_picture(data: bytes) -> bool:
    try:
        picture_of(data)
    except BrokenPicture:
        return False
    return not is_truncated(data)


def _no_picture(broken: BrokenPicture, data: bytes, key: str) -> ApiError:
    """The error for the body of a 200 that was read to its end and does not decode to a picture."""
    if broken.truncated:
        return AnswerCutError(
            "the API answered 200 with a picture that ends early (the provider's usage page shows whether it was "
            "billed)",
            status=200,
            possibly_billed=True,
        )
    return NotAnImageError(
        f"the API answered 200 without a picture: {_shown(broken, data, key)} (check the provider's usage page "
        "before running again)",
        status=200,
    )


def _shown(broken: BrokenPicture, data: bytes, key: str) -> str:
    """Bytes that are not a picture, as a message shows them: their text, or what is wrong with them."""
    start = data[:2000]
    text = "".join(start.decode("utf-8", "replace").split())
    if not data:
        return "the body is empty"
    if text.isprintable() and "\ufffd" not in text:
        return repr(error_text(start, key))
    return f"the file {broken}"


def _unusable(part: Path, error: OSError, what: str = "written to") -> OutboxError:
    return OutboxError(
        f"outbox: the answered picture could not be {what} {part.parent}: {reason(error)} (free space there)",
        status=200,
        possibly_billed=True,
    )
