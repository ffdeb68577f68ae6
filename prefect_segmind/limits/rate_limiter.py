"""When the next request may be sent: a known limit is kept, an unknown one is learned from the 429s.

It is pure: all times are seconds of a monotonic clock that the caller reads; `admission` does the waiting.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Reversible
from itertools import islice

WINDOW_SECONDS = 60.0
"""The provider's limits are per minute."""
SLACK_SECONDS = 2.0
"""How far the server's minute may be from ours: it counts a request on arrival, and gives times in whole seconds."""
PROBE_SECONDS = 2.0
"""A 429 comes at once, a picture takes longer: a probe that is not refused for this long is not waited for."""
FIRST_HOLD_SECONDS = 1.0
LONGEST_HOLD_SECONDS = 60.0


class Pace:
    """Decides when the next request of a run may be sent.

    A configured limit holds for every 60 s, refused requests included. After a 429 all wait until the reset that the
    server names, else for a time that doubles. Then one request goes ahead as a probe. When it is not refused, the
    others follow at the rate that the server was seen to allow, and that rate grows slowly until the next 429. An
    overloaded provider that names a time is waited for likewise, but no rate is learned from it.

    Args:
        requests_per_minute: The limit of the account's plan; None if it is not known.

    Example:
        >>> pace = Pace(requests_per_minute=1)
        >>> ticket = pace.reserve(now=100.0)
        >>> pace.sent(ticket, now=100.5)
        >>> pace.delay(now=110.0)
        50.5
        >>> pace.limited(ticket, now=111.0, retry_after=70.0)
        70.0
    """

    def __init__(self, requests_per_minute: int | None = None) -> None:
        self._limit = requests_per_minute
        self._next = 0  # the next ticket
        self._unsent: set[int] = set()
        self._recent: deque[float] = deque(maxlen=requests_per_minute)  # when they were sent; for the configured limit
        self._accepted: OrderedDict[int, float] = OrderedDict()  # the same without the refused; for the learned one
        # The hold after a 429, and the probe after the hold.
        self._held_until = -math.inf
        self._burst = 0  # tickets below it were out when the hold began: their answers do not end it
        self._refused = 0  # tickets below it were out when a limit was met: their 429s say nothing new
        self._streak = 0  # holds since a request was last accepted
        self._probing = False
        self._probe: int | None = None
        self._probe_sent = math.inf
        # What was learned: `_count` requests in `_period` seconds.
        self._since = -math.inf  # when the first of them was sent
        self._count: int | None = None
        self._period = WINDOW_SECONDS
        self._grows_at = math.inf

    def delay(self, now: float) -> float:
        """Seconds until the next request may be sent; 0.0 if it may be sent now.

        Ask again when they are over, and whenever a request was sent, answered or released.

        Args:
            now: The time.
        """
        if now < self._held_until:
            return self._held_until - now
        wait = 0.0
        if self._limit is not None:
            wait = self._until_room(self._recent, self._limit, WINDOW_SECONDS, now)
        if self._probing:
            if self._probe is None:
                return wait
            wait = max(wait, min(self._probe_sent, now) + PROBE_SECONDS - now)
        if self._count is not None:
            wait = max(wait, self._until_room(self._accepted.values(), self._count, self._period, now))
        return wait

    def reserve(self, now: float) -> int:
        """Issues the ticket for a request that is to be sent soon; call it when `delay` is 0.0.

        Args:
            now: The time.

        Returns:
            The request's ticket.
        """
        ticket = self._next
        self._next += 1
        self._unsent.add(ticket)
        if self._probing and self._probe is None:
            self._probe, self._probe_sent = ticket, math.inf
        if self._count is not None and now >= self._grows_at:
            self._count += max(1, self._count // 10)
            self._grows_at = now + self._period
        return ticket

    def sent(self, ticket: int, now: float) -> None:
        """Records that a request is being sent.

        Args:
            ticket: The request's ticket.
            now: The time.
        """
        self._unsent.discard(ticket)
        if self._limit is not None:
            self._recent.append(now)
        self._accepted[ticket] = now
        while next(iter(self._accepted.values())) < now - WINDOW_SECONDS - SLACK_SECONDS:
            self._accepted.popitem(last=False)
        if ticket == self._probe:
            self._probe_sent = now

    def release(self, ticket: int) -> None:
        """Takes back a ticket whose request was not sent.

        Args:
            ticket: The request's ticket.
        """
        self._unsent.discard(ticket)
        if ticket == self._probe:
            self._probe = None

    def answered(self, ticket: int) -> None:
        """Records that a request ended in any way but a 429.

        Args:
            ticket: The request's ticket.
        """
        if ticket < self._burst:
            return
        self._probing, self._probe = False, None
        self._streak = 0

    def limited(self, ticket: int, now: float, retry_after: float | None) -> float:
        """Records that a request was answered 429.

        Args:
            ticket: The request's ticket.
            now: When the answer came.
            retry_after: Seconds until the server's limit resets; None or 0.0 if the answer does not name them.

        Returns:
            The seconds for which all requests are held back now.
        """
        self._accepted.pop(ticket, None)
        fresh = ticket >= self._refused
        if fresh:
            self._streak += 1
            self._refused = self._next
        wait = retry_after or 0.0
        if fresh and not retry_after:
            wait = min(FIRST_HOLD_SECONDS * 2 ** min(self._streak - 1, 10), LONGEST_HOLD_SECONDS)
        held = self.hold(now, wait)
        if self._streak:
            self._learn()
        return held

    def hold(self, now: float, wait: float) -> float:
        """Holds all requests back; called directly where the provider is overloaded, from which no rate is learned.

        Args:
            now: When the answer came.
            wait: Seconds that the provider asks to wait.

        Returns:
            The seconds for which all are held back now: more than asked for if they were held for longer already.
        """
        until = max(self._held_until, now + wait) if wait else self._held_until
        if until > now >= self._held_until:
            self._burst = self._next
            self._probing, self._probe = True, None
        self._held_until = until
        return max(0.0, until - now)

    def _learn(self) -> None:
        """Learns the rate: what was accepted, in the time from the first of it to the reset.

        If a probe is refused, only the hold was too short: the number accepted stays, the time grows.
        """
        if self._streak == 1:
            oldest = self._held_until - WINDOW_SECONDS - SLACK_SECONDS
            times = [sent for sent in self._accepted.values() if sent >= oldest]
            # Where nothing was accepted others have used the limit up, and its rate is not known.
            self._count = sum(sent < times[0] + WINDOW_SECONDS for sent in times) or None
            self._since = times[0] if times else self._held_until
        self._period = min(max(self._held_until - self._since, 1.0), WINDOW_SECONDS)
        self._grows_at = self._held_until + self._period

    def _until_room(self, times: Reversible[float], limit: int, period: float, now: float) -> float:
        """Seconds until a window has room for one more request; those not sent yet count as sent now."""
        room = limit - len(self._unsent)
        if room <= 0:
            return period
        oldest = next(islice(reversed(times), room - 1, None), -math.inf)
        return max(0.0, oldest + period - now)
