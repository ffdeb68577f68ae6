"""The sandbox's requests and bills, to check a client's own accounts against."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

_NOTHING = Decimal("0.00")


@dataclass(frozen=True)
class Entry:
    """One request for a picture.

    Attributes:
        time: When it was received, in UTC.
        request_id: The `x-request-id` of the answer, and its id for v2 and in the request history.
        prompt: The prompt; None if the body had none.
        image_sha256: The SHA-256 of the fetched source image, in hexadecimal; None if it was not fetched.
        seed: The seed, sent or drawn; None if the request was refused before.
        status: The HTTP status of the answer, for v2 of the answer to the submit; 0 if the connection was closed
            without one.
        billed: Whether it was billed.
        cost: Its cost in USD; 0 if not billed.
    """

    time: datetime
    request_id: str
    prompt: str | None
    image_sha256: str | None
    seed: int | None
    status: int
    billed: bool
    cost: Decimal


class Ledger:
    """All requests, each from the moment that it is refused, billed or has failed. Thread-safe."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._billed_usd = _NOTHING
        self._lock = threading.Lock()

    def record(self, entry: Entry) -> None:
        """Adds a request."""
        with self._lock:
            self._entries.append(entry)
            self._billed_usd += entry.cost

    def clear(self) -> None:
        """Removes all requests."""
        with self._lock:
            self._entries.clear()
            self._billed_usd = _NOTHING

    @property
    def requests(self) -> tuple[Entry, ...]:
        """All requests so far."""
        with self._lock:
            return tuple(self._entries)

    @property
    def billed(self) -> int:
        """The number of billed requests."""
        return sum(each.billed for each in self.requests)

    @property
    def billed_usd(self) -> Decimal:
        """Their cost in USD; kept as a sum, as every answer has the balance."""
        with self._lock:
            return self._billed_usd

    def as_dict(self) -> dict[str, Any]:
        """The ledger for JSON: times in ISO 8601, money as decimal text."""
        requests = self.requests
        return {
            "billed": sum(each.billed for each in requests),
            "billed_usd": str(sum((each.cost for each in requests), _NOTHING)),
            "requests": [{**asdict(each), "time": each.time.isoformat(), "cost": str(each.cost)} for each in requests],
        }
