"""The sandbox's responses, also the broken ones."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from http import HTTPStatus

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefect_segmind.sandbox.script import Answer

ERROR_TEXTS = {
    400: "Bad request",
    401: "Invalid API key",
    403: "Insufficient permissions",
    404: "Model not found",
    406: "Insufficient credits: balance 0.00, need 0.05",
    410: "This model has been retired",
    422: "The safety check refused the request",
    429: "Rate limit exceeded",
    500: "Internal server error",
    502: "Bad gateway: the model is temporarily unavailable",
    503: "The service is overloaded",
    504: "Gateway timeout: the model did not answer in time",
    529: "The service is overloaded",
}

FAILED = "Inference failed: the safety check refused the request"

NOT_AN_IMAGE = "These bytes are not an image."

HANG_UP = "hang_up"
"""The name in a request's state of the function that closes its connection."""

HTML = "<!DOCTYPE html>\n<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>\n"


class CutResponse(Response):
    """Declares its whole length, sends half of the body, and has the server close the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Returns before the response is complete; uvicorn then closes the connection."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body[: len(self.body) // 2], "more_body": True})


class LostResponse(Response):
    """Closes the connection without an answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Returns once the connection is closed: the server would answer a call that returns before with a 500."""
        scope["state"][HANG_UP]()
        while (await receive())["type"] != "http.disconnect":
            pass


class Refusal(Exception):
    """A request is answered with an error, and not billed.

    Attributes:
        status: The HTTP status.
        response: The answer.
    """

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.response = error(status, text, headers)


def error(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    """An error in the API's form, `{"error": text}`.

    Args:
        status: The HTTP status.
        text: The message.
        headers: Further headers.
    """
    return Response(json.dumps({"error": text}), status, headers, "application/json")


def reset_header(moment: datetime) -> dict[str, str]:
    """The header with the end of a rate limit.

    Args:
        moment: The end, with a time zone.
    """
    return {"x-rate-limit-reset-at-utc": moment.astimezone(UTC).isoformat(timespec="microseconds")}


def error_text(status: int) -> str:
    """The usual message of an error.

    Args:
        status: The HTTP status.
    """
    return ERROR_TEXTS.get(status, _phrase(status))


def without_picture(answer: Answer) -> Response:
    """The response for a scripted answer without a picture.

    Args:
        answer: An answer of a kind in `WITHOUT_PICTURE`.
    """
    phrase = _phrase(answer.status)
    usual, content_type = {
        "error": (json.dumps({"error": error_text(answer.status)}), "application/json"),
        "html": (HTML.format(title=phrase), "text/html; charset=utf-8"),
        "empty": ("", "image/jpeg"),
        "not_an_image": (NOT_AN_IMAGE, "image/jpeg"),
        "unsafe": (json.dumps({"data": [{"url": None, "is_image_safe": False}]}), "application/json"),
    }[answer.kind]
    body = usual if answer.body is None else answer.body
    return _dressed(answer, Response, body if answer.body_base64 is None else answer.body_base64, content_type)


def with_picture(answer: Answer, picture: bytes, link: str) -> Response:
    """The response for an answer with a picture.

    Args:
        answer: The answer, whose kind is the form of the picture.
        picture: The picture, a JPEG.
        link: The address of the same picture, for the kinds that answer with a link.
    """
    text = base64.b64encode(picture).decode()
    documents: dict[str, object] = {
        "json_base64": {"image": text},
        "json_data_uri": {"image": f"data:image/jpeg;base64,{text}"},
        "json_url": {"image_url": link},
        "json_images_url": {"images": [{"url": link}]},
        "json_data_url": {"data": [{"url": link, "is_image_safe": True}]},
        "json_b64_json": {"data": [{"b64_json": text}]},
    }
    if answer.kind in documents:
        return _dressed(answer, Response, json.dumps(documents[answer.kind]), "application/json")
    body = picture[: len(picture) // 2] if answer.kind == "truncated_image" else picture
    return _dressed(answer, CutResponse if answer.kind == "half_body" else Response, body, "image/jpeg")


def behind_link(answer: Answer, picture: bytes) -> bytes | None:
    """What the result of a v2 request links to.

    Args:
        answer: The answer to its submit.
        picture: The picture, a JPEG.

    Returns:
        The picture, or what is scripted in its place; None for a result without a picture.
    """
    if answer.kind == "unsafe":
        return None
    if answer.kind == "not_an_image":
        return NOT_AN_IMAGE.encode()
    return picture[: len(picture) // 2] if answer.kind == "truncated_image" else picture


def with_json(answer: Answer, document: object) -> Response:
    """The response for an answer with a JSON document: to a submit, or of the request history.

    Args:
        answer: The answer; `half_body` sends half of the document.
        document: What is sent as JSON.
    """
    response = CutResponse if answer.kind == "half_body" else Response
    return _dressed(answer, response, json.dumps(document), "application/json")


def _phrase(status: int) -> str:
    known = {each.value: each.phrase for each in HTTPStatus}
    return known.get(status, "Unknown status")


def _dressed(answer: Answer, response: type[Response], body: bytes | str, content_type: str) -> Response:
    made = response(body, answer.status, {"content-type": answer.content_type or content_type})
    if answer.reset_in is not None:
        made.headers.update(reset_header(datetime.now(UTC) + timedelta(seconds=answer.reset_in)))
    if answer.retry_after is not None:
        made.headers["retry-after"] = answer.retry_after
    return made
