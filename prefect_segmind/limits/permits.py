"""The rate of requests that several runs share: permits for a few seconds, drawn from one object in the archive.

It is pure, as `account` is. A permit allows one request until its validity ends. However the runs use their permits, no
60 s have more requests than the limit: each draw counts until 60 s after the last moment in which one of its permits
may have been used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from pydantic import BaseModel

from prefect_segmind.limits.account import KEPT_MODEL
from prefect_segmind.limits.rate_limiter import SLACK_SECONDS, WINDOW_SECONDS

VALID_SECONDS = 10.0
"""How long a permit is valid by the store's clock: enough to write the claim and to connect."""
DRAWN_SECONDS = 3.0
"""For how many seconds' worth of the limit permits are drawn at once, at most."""


class Draw(BaseModel):
    """Permits that were drawn together.

    Attributes:
        id: Drawn for them.
        count: How many there are, or were used where that is known.
        until: When the last one is used at the latest, or was, in seconds since 1970 by the store's clock.
    """

    model_config = KEPT_MODEL

    id: str
    count: int
    until: float


class Granted(NamedTuple):
    """The reply to a wish for permits.

    Attributes:
        permits: The permits of all runs after it.
        number: How many are granted.
        wait_seconds: When to ask again if none are.
    """

    permits: Permits
    number: int
    wait_seconds: float = 0.0


class Permits(BaseModel):
    """The permits of all runs.

    Attributes:
        schema_version: The version of this format.
        draws: Those that still count, the earliest first.

    Example:
        >>> first = Permits().drawn("a", wanted=5, requests_per_minute=120, now=0.0)
        >>> first.number, first.permits.drawn("b", wanted=500, requests_per_minute=120, now=0.0).number
        (5, 6)
    """

    model_config = KEPT_MODEL

    schema_version: Literal[1] = 1
    draws: tuple[Draw, ...] = ()

    def drawn(
        self, id: str, *, wanted: int, requests_per_minute: int, now: float, known: Iterable[Draw] = ()
    ) -> Granted:
        """The permits after one more draw.

        Args:
            id: An id for the draw.
            wanted: How many are wanted.
            requests_per_minute: The limit for all runs, as the run that asks knows it.
            now: The time by the store's clock.
            known: Earlier draws of this run whose permits are all used or given back: when the last one was used, and
                how many were.
        """
        told = {each.id: each for each in known}
        window = WINDOW_SECONDS + SLACK_SECONDS  # the server's minute may be off by so much
        draws = tuple(told.get(each.id, each) for each in self.draws)
        draws = tuple(each for each in draws if each.count and each.until > now - window)
        room = requests_per_minute - sum(each.count for each in draws)
        count = min(wanted, room, max(1, int(requests_per_minute * DRAWN_SECONDS / WINDOW_SECONDS)))
        if count <= 0:
            ends = min((each.until for each in draws), default=now)
            kept = self.model_copy(update={"draws": draws}) if told else self
            return Granted(kept, 0, max(0.0, ends + window - now))
        new = Draw(id=id, count=count, until=now + VALID_SECONDS)
        return Granted(self.model_copy(update={"draws": (*draws, new)}), count)
