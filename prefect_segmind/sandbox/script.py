"""Scripted answers of the sandbox: failures, odd bodies and delays, one for each request."""

from __future__ import annotations

import threading
from typing import Annotated, Any, Literal

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
    "lost",
    "error",
]

WITHOUT_PICTURE: frozenset[Kind] = frozenset({"html", "empty", "not_an_image", "unsafe", "error"})
"""Kinds whose body is not made from a picture."""

OF_THE_RESULT: frozenset[Kind] = frozenset({"not_an_image", "unsafe"})
"""Kinds without a picture that for v2 describe the result; the submit is answered as usual."""

LISTED_ERRORS = frozenset({422, 500, 502, 504})
"""Errors of the model: the request history lists them as FAILED. Other errors are refusals, which it does not list."""

KEPT_SECONDS = 3600.0
"""How long status and result of a v2 request are kept after its submission."""


class Answer(BaseModel):
    """One scripted answer, and what becomes of its request.

    A request is accepted if its answer has a picture, is lost, or is said to be billed or to fail. It is then checked,
    its image fetched, the credits charged, and it goes on whether or not its client is still there. For any other
    answer nothing is checked, fetched or drawn, and only `delay` passes.

    For v2, this is the answer to the submit; `not_an_image`, `truncated_image` and `unsafe` describe what the result
    links to.

    Attributes:
        status: The HTTP status.
        kind: The kind of body; by default `image` for a 200 and `error` for any other status. `half_body` declares the
            whole length, sends half of it and closes the connection; `truncated_image` is a complete answer with the
            first half of a picture; `lost` closes the connection without an answer once the request is accepted.
        body: The text of a body without a picture, instead of the usual one.
        body_base64: The bytes of such a body, where it is not text.
        headers: Headers of the answer; they override the usual ones.
        reset_in: Adds `x-rate-limit-reset-at-utc`, this many seconds after the answer.
        retry_after: Adds `Retry-After` with this value: seconds or an HTTP date.
        delay: Seconds before the answer: for v1 between the bill and the answer, so that a client can lose an answer
            that it has paid for; for v2 and for `lost` after the request is accepted.
        billed: Whether the request is billed; by default only a 200 is. `True` for an answer without a picture has the
            picture made, billed and listed all the same: with v1 the answer comes when the picture is made, with v2
            when the request is accepted.
        content_type: Sent instead of the true one.
        listed: Whether the request history lists the request; by default it lists what was accepted, a 200, and the
            errors in `LISTED_ERRORS`.
        lands_after: Seconds from the request to its appearance in the request history.
        fails: The accepted request ends as FAILED and is not billed; a text is the reason. v1 then answers 422.
        processing: Further seconds until the picture is made.
        polls: v2 only: the statuses of the first answers to polls of the status or the result; 0 closes the connection
            without an answer, 200 is the usual answer.
        forgotten: v2 only: when status and result become 404: `True` for at once, or seconds after the submission;
            `KEPT_SECONDS` unless given.
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
    listed: bool | None = None
    lands_after: float = Field(default=0, ge=0)
    fails: bool | str = False
    processing: float = Field(default=0, ge=0)
    polls: tuple[Literal[0] | Annotated[int, Field(ge=200, le=599)], ...] = ()
    forgotten: bool | Annotated[float, Field(ge=0)] = False

    @model_validator(mode="before")
    @classmethod
    def _kind_follows_status(cls, values: Any) -> Any:
        if isinstance(values, dict) and "kind" not in values and values.get("status", 200) != 200:
            return {**values, "kind": "error"}
        return values

    @model_validator(mode="after")
    def _does_not_contradict_itself(self) -> Answer:
        if (self.body, self.body_base64) != (None, None) and not self.without_picture:
            raise ValueError(f"a body can be given for a kind without a picture only, not for {self.kind!r}")
        if self.billed and self.fails:
            raise ValueError("a request that fails is not billed: give billed or fails, not both")
        return self

    @property
    def without_picture(self) -> bool:
        """Whether the answer has no picture."""
        return self.kind in WITHOUT_PICTURE

    @property
    def is_accepted(self) -> bool:
        """Whether the request is checked and carried out."""
        return not self.without_picture or bool(self.billed) or bool(self.fails)

    @property
    def is_billed(self) -> bool:
        """Whether the request is billed."""
        return (self.status == 200 if self.billed is None else self.billed) and not self.fails

    @property
    def is_listed(self) -> bool:
        """Whether the request history lists the request."""
        if self.listed is not None:
            return self.listed
        return self.is_accepted or self.status < 300 or self.status in LISTED_ERRORS

    @property
    def kept_seconds(self) -> float:
        """How long status and result of a v2 request are kept after its submission."""
        if isinstance(self.forgotten, bool):
            return 0.0 if self.forgotten else KEPT_SECONDS
        return self.forgotten


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
