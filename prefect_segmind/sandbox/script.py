"""Scripted answers of the sandbox: failures, odd bodies and delays, one for each request."""

from __future__ import annotations

import threading
from typing import Any, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, model_validator

Kind = Literal[
    "image",
    "html",
    "empty",
    "half_body",
    "not_an_image",
    "truncated_image",
    "json_base64",
    "json_data_uri",
    "json_url",
    "json_images_url",
    "json_data_url",
    "json_b64_json",
    "unsafe",
    "error",
]

WITHOUT_PICTURE: frozenset[Kind] = frozenset({"html", "empty", "not_an_image", "unsafe", "error"})
"""Kinds for which nothing is checked, fetched or drawn."""


class Answer(BaseModel):
    """One scripted answer.

    For a kind with a picture the request is checked, its image fetched, and the credits charged; for the others only
    `delay` passes.

    Attributes:
        status: The HTTP status.
        kind: The kind of body; by default `image` for a 200 and `error` for any other status. `half_body` declares the
            whole length, sends half of it and closes the connection; `truncated_image` is a complete answer with the
            first half of a picture.
        body: The text of a body without a picture, instead of the usual one.
        body_base64: The bytes of such a body, where it is not text.
        headers: Headers of the answer; they override the usual ones.
        reset_in: Adds `x-rate-limit-reset-at-utc`, this many seconds after the answer.
        retry_after: Adds `Retry-After` with this value: seconds or an HTTP date.
        delay: Seconds between the bill and the answer, so that a client can lose an answer that it has paid for.
        billed: Whether the request is billed; by default only a 200 is.
        content_type: Sent instead of the true one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: int = Field(default=200, ge=200, le=599)
    kind: Kind = "image"
    body: str | None = None
    body_base64: Base64Bytes | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    reset_in: float | None = None
    retry_after: str | None = None
    delay: float = Field(default=0, ge=0)
    billed: bool | None = None
    content_type: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _kind_follows_status(cls, values: Any) -> Any:
        if isinstance(values, dict) and "kind" not in values and values.get("status", 200) != 200:
            return {**values, "kind": "error"}
        return values

    @model_validator(mode="after")
    def _body_has_no_rival(self) -> Answer:
        if (self.body, self.body_base64) != (None, None) and not self.without_picture:
            raise ValueError(f"a body cannot be given for kind {self.kind!r}, whose body is made from a picture")
        return self

    @property
    def without_picture(self) -> bool:
        """Whether the answer has no picture."""
        return self.kind in WITHOUT_PICTURE

    @property
    def is_billed(self) -> bool:
        """Whether the request is billed."""
        return self.status == 200 if self.billed is None else self.billed


class Script:
    """The queue of scripted answers. Thread-safe."""

    def __init__(self) -> None:
        self._queue: list[tuple[str | None, Answer]] = []
        self._lock = threading.Lock()

    def play(self, *answers: Answer, prompt: str | None = None) -> None:
        """Queues answers, one for each of the next requests.

        Args:
            answers: The answers, in the order of the requests.
            prompt: If given, only requests whose prompt contains this text get them.
        """
        with self._lock:
            self._queue.extend((prompt, each) for each in answers)

    def next_for(self, prompt: str) -> Answer | None:
        """Removes and returns the first answer in the queue for a prompt.

        Args:
            prompt: The prompt of the request.

        Returns:
            The answer; None if there is none for it.
        """
        with self._lock:
            for index, (text, answer) in enumerate(self._queue):
                if text is None or text in prompt:
                    del self._queue[index]
                    return answer
        return None

    def clear(self) -> None:
        """Removes all answers from the queue."""
        with self._lock:
            self._queue.clear()
