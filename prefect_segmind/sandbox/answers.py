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

HTML = "<!DOCTYPE html>\n<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>\n"


class CutResponse(Response):
    """Declares its whole length, sends half of the body, and has the server close the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Returns before the response is complete; uvicorn then closes the connection."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body[: len(self.body) // 2], "more_body": True})


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


def without_picture(answer: Answer) -> Response:
    """The response for a scripted answer without a picture.

    Args:
        answer: An answer of a kind in `WITHOUT_PICTURE`.
    """
    known = {each.value: each.phrase for each in HTTPStatus}
    phrase = known.get(answer.status, "Unknown status")
    usual, content_type = {
        "error": (json.dumps({"error": ERROR_TEXTS.get(answer.status, phrase)}), "application/json"),
        "html": (HTML.format(title=phrase), "text/html; charset=utf-8"),
        "empty": ("", "image/jpeg"),
        "not_an_image": ("These bytes are not an image.", "image/jpeg"),
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


def _dressed(answer: Answer, response: type[Response], body: bytes | str, content_type: str) -> Response:
    made = response(body, answer.status, {"content-type": answer.content_type or content_type})
    if answer.reset_in is not None:
        made.headers.update(reset_header(datetime.now(UTC) + timedelta(seconds=answer.reset_in)))
    if answer.retry_after is not None:
        made.headers["retry-after"] = answer.retry_after
    return made
