"""The account behind the sandbox's key: its credits and its rate limit."""

from __future__ import annotations

import secrets
import time
from collections import deque
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from prefect_segmind.sandbox.answers import Refusal, reset_header
from prefect_segmind.sandbox.ledger import Ledger

PRICE = Decimal("0.05")
"""USD for a picture."""


class Account:
    """What a request for a picture must pass. Only the event loop uses it, so it needs no lock.

    Args:
        api_key: The only accepted key.
        ledger: The requests and what they cost.
        credits: The balance at the start and after a reset, in USD.
        requests_per_minute: Further requests in a window are refused; None for no limit.
        rate_window: Seconds in that window.
    """

    def __init__(
        self,
        api_key: str,
        ledger: Ledger,
        *,
        credits: Decimal | str,
        requests_per_minute: int | None,
        rate_window: float,
    ) -> None:
        self._key = api_key
        self._ledger = ledger
        self._credits = Decimal(credits)
        self._per_window = requests_per_minute
        self._window = rate_window
        self._reserved = Decimal("0.00")
        self._accepted: deque[float] = deque()

    @property
    def balance(self) -> Decimal:
        """The credits left, in USD."""
        return self._credits - self._ledger.billed_usd

    def check_key(self, key: str) -> None:
        """Checks the key of any request.

        Raises:
            Refusal: It is another key, with 401.
        """
        if not secrets.compare_digest(key.encode(), self._key.encode()):
            raise Refusal(401, "Missing or invalid API key: send it in the x-api-key header")

    def check_rate(self) -> None:
        """Counts a request for a picture.

        Raises:
            Refusal: It is one too many in the window, with 429.
        """
        if self._per_window is None:
            return
        now = time.monotonic()
        while self._accepted and self._accepted[0] <= now - self._window:
            self._accepted.popleft()
        if len(self._accepted) >= self._per_window:
            free_again = datetime.now(UTC) + timedelta(seconds=self._accepted[0] + self._window - now)
            period = "a minute" if self._window == 60 else f"in {self._window:g} s"
            raise Refusal(429, f"Rate limit of {self._per_window} {period} exceeded", reset_header(free_again))
        self._accepted.append(now)

    def reserve(self) -> None:
        """Reserves the price of a picture while it is made, so that concurrent requests cannot overdraw the account.

        Raises:
            Refusal: The credits do not suffice, with 406.
        """
        free = self.balance - self._reserved
        if free < PRICE:
            raise Refusal(406, f"Insufficient credits: balance {free}, need {PRICE}")
        self._reserved += PRICE

    def release(self) -> None:
        """Ends one reservation."""
        self._reserved -= PRICE

    def reset(self) -> None:
        """Ends the window of the rate limit."""
        self._accepted.clear()
