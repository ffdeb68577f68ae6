"""What the sandbox was asked and what it billed: the truth against which a client's own accounts are checked."""

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
        time: When it was received, aware, UTC.
        request_id: The `x-request-id` of the answer.
        prompt: As sent; None where the body held none.
        image_sha256: Of the fetched source image, hexadecimal; None if it was not fetched.
        seed: As sent or drawn; None if the request was refused before.
        status: The HTTP status of the answer.
        billed: Whether it was paid for.
        cost: In USD; 0 if not billed.
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
    """All requests in the order of their answers. Safe to read from any thread while the server writes."""

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
        """Forgets all requests."""
        with self._lock:
            self._entries.clear()
            self._billed_usd = _NOTHING

    @property
    def requests(self) -> tuple[Entry, ...]:
        """Every request so far."""
        with self._lock:
            return tuple(self._entries)

    @property
    def billed(self) -> int:
        """How many requests were billed."""
        return sum(each.billed for each in self.requests)

    @property
    def billed_usd(self) -> Decimal:
        """What they cost together, in USD; kept as a sum, for every answer tells the balance."""
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
