"""One request for a picture, what becomes of it, and how v2 and the request history show it."""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal

from prefect_segmind.sandbox.ledger import Entry
from prefect_segmind.sandbox.script import OF_THE_RESULT, Answer

MODEL = "ideogram-2a-img-2-img"

State = Literal["QUEUED", "PROCESSING", "COMPLETED", "FAILED"]


class Generation:
    """One request for a picture. Only the event loop uses it, so it needs no lock.

    Args:
        inputs: The JSON object that was sent; empty if none was.
        queued: Whether it came by v2.
        queue_seconds: How long it is QUEUED before it is PROCESSING.

    Attributes:
        request_id: Its id in answers, in the ledger and in the request history.
        created: When it was received, in UTC.
        inputs: As given.
        queued: As given.
        answer: The scripted answer, or the usual one.
        image_sha256: The SHA-256 of the fetched source image, in hexadecimal; None if it was not fetched.
        seed: The seed, sent or drawn; None if the request was refused before.
        size: The bytes of the picture; None without one.
        cost: What it was billed, in USD.
        error: Why it failed; empty if it did not.
        polls: The statuses of the next answers to polls.
        lands_at: When the request history shows it, by `time.monotonic`; infinite if it never does.
    """

    def __init__(self, inputs: dict[str, Any], *, queued: bool, queue_seconds: float) -> None:
        self.request_id = secrets.token_hex(16)
        self.created = datetime.now(UTC)
        self.inputs = inputs
        self.queued = queued
        self.answer = Answer()
        self.image_sha256: str | None = None
        self.seed: int | None = None
        self.size: int | None = None
        self.cost = Decimal("0.00")
        self.error = ""
        self._error_status = 0
        self.polls: deque[int] = deque()
        self._queue_seconds = queue_seconds
        self._started = time.monotonic()
        self.lands_at = self._started
        self._updated = self.created
        self._took: float | None = None

    @property
    def prompt(self) -> str | None:
        """The prompt; None if the inputs have none."""
        prompt = self.inputs.get("prompt")
        return prompt if isinstance(prompt, str) else None

    @property
    def is_accepted(self) -> bool:
        """Whether it is checked and carried out."""
        return self.answer.is_accepted or self._is_of_the_result

    @property
    def is_answered_without_picture(self) -> bool:
        """Whether the answer to it is scripted, with neither a picture nor, for v2, the addresses to poll."""
        return self.answer.without_picture and not self._is_of_the_result

    @property
    def status(self) -> int:
        """The HTTP status of the answer to it, if it was accepted; 0 if the connection is closed without one."""
        if self.answer.kind == "lost":
            return 0
        as_scripted = self.queued or self.answer.without_picture or not self.error
        return self.answer.status if as_scripted else self._error_status

    @property
    def seconds(self) -> float:
        """How long it took, or has taken so far."""
        return self._age if self._took is None else self._took

    @property
    def state(self) -> State:
        """Where it is in the life of a v2 request; a v1 request has the same life."""
        if self._took is None:
            return "QUEUED" if self._age < self._queue_seconds else "PROCESSING"
        return "FAILED" if self.error else "COMPLETED"

    @property
    def model_status(self) -> str:
        """Its state in the request history."""
        return "PENDING" if self._took is None else self.state

    @property
    def is_forgotten(self) -> bool:
        """Whether its status and its result are no longer kept."""
        return self._age >= self.answer.kept_seconds

    def play(self, answer: Answer) -> None:
        """Takes its answer from the script.

        Args:
            answer: The scripted answer.
        """
        self.answer = answer
        self.polls.extend(answer.polls)
        self.lands_at = self._started + answer.lands_after if answer.is_listed else math.inf

    def complete(self, cost: Decimal, size: int | None) -> None:
        """Ends it as COMPLETED.

        Args:
            cost: What it is billed, in USD.
            size: The bytes of the picture; None without one.
        """
        self.cost, self.size = cost, size
        self._end()

    def fail(self, status: int, error: str) -> None:
        """Ends it as FAILED, which is never billed.

        Args:
            status: The HTTP status of v1 for the error.
            error: Why it failed.
        """
        self._error_status, self.error = status, error
        self._end()

    def entry(self, status: int) -> Entry:
        """Its entry in the ledger.

        Args:
            status: The HTTP status of the answer; 0 for none.
        """
        return Entry(
            time=self.created,
            request_id=self.request_id,
            prompt=self.prompt,
            image_sha256=self.image_sha256,
            seed=self.seed,
            status=status,
            billed=self.cost > 0,
            cost=self.cost,
        )

    def link(self, origin: str) -> str | None:
        """The public address of the picture; None without one.

        Args:
            origin: The sandbox's address with a slash at the end.
        """
        return None if self.size is None else f"{origin}v1/results/{self.request_id}.jpg"

    def row(self, origin: str) -> dict[str, Any]:
        """Its row in the request history, for JSON.

        Args:
            origin: As for `link`.
        """
        return {
            "request_id": self.request_id,
            "model_name": MODEL,
            "model_status": self.model_status,
            "credits_deduction": float(self.cost),
            "request_body": self.inputs,
            "generation_url": self.link(origin),
            "latency_ms": None if self._took is None else round(self._took * 1000),
            "model_created": self.created.isoformat(),
            "model_updated": self._updated.isoformat(),
            "error": self.error or None,
        }

    def addresses(self, origin: str) -> dict[str, str]:
        """What a submit answers, for JSON.

        Args:
            origin: As for `link`.
        """
        address = f"{origin}v2/requests/{self.request_id}"
        return {
            "request_id": self.request_id,
            "status": "QUEUED",
            "status_url": f"{address}/status",
            "response_url": address,
            "poll_url": f"{address}/status",
        }

    def status_document(self) -> dict[str, Any]:
        """What v2 answers for its status, and for its result before there is one, for JSON."""
        failed = {"error": self.error} if self.error else {}
        return {"request_id": self.request_id, "status": self.state, **failed, "metrics": dict(self._metrics())}

    def result_document(self, origin: str, balance: Decimal) -> dict[str, Any]:
        """What v2 answers for its result, once it is COMPLETED, for JSON.

        Args:
            origin: As for `link`.
            balance: The credits left, in USD.
        """
        link = self.link(origin)
        image = {
            "url": link,
            "content_type": "image/jpeg",
            "file_name": f"{self.request_id}.jpg",
            "file_size": self.size,
        }
        return {
            "request_id": self.request_id,
            "status": self.state,
            "output": link,
            "images": [image] if link else [],
            "seed": self.seed,
            "prompt": self.prompt,
            "metrics": {"cost": float(self.cost), "remaining_credits": float(balance), **dict(self._metrics())},
        }

    @property
    def _is_of_the_result(self) -> bool:
        return self.queued and self.answer.kind in OF_THE_RESULT

    @property
    def _age(self) -> float:
        return time.monotonic() - self._started

    def _end(self) -> None:
        self._updated = datetime.now(UTC)
        self._took = self._age

    def _metrics(self) -> Iterator[tuple[str, float]]:
        queued = min(self.seconds, self._queue_seconds)
        yield "queue_time", round(queued, 3)
        yield "inference_time", round(self.seconds - queued, 3)
        yield "total_time", round(self.seconds, 3)
        yield "retry_count", 0
