"""Polling: waits for the result of a request that the provider has accepted. It is free, and always safe to repeat."""

from __future__ import annotations

import logging
import random
import statistics
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from prefect_segmind.api.client import SegmindClient
from prefect_segmind.api.picture import PaidPicture
from prefect_segmind.api.submission import Status, Submitted
from prefect_segmind.errors import (
    AccountError,
    ApiError,
    ForgottenError,
    NotAnImageError,
    SubmittedError,
    UnprocessableError,
)
from prefect_segmind.limits.admission import Gate

USUAL_SECONDS = 8.0
"""How long a generation takes, until a run has seen some of its own."""
POLL_SECONDS = (1.0, 2.0)
"""The least and the most seconds between two polls; the provider's own SDK polls each second."""
LONG_SECONDS = 20.0
"""How much longer than usual a request takes before the log says so."""

_FINAL = (UnprocessableError, NotAnImageError)
"""What a poll may end with that another poll would end with too."""


class Durations:
    """How long the requests of a run have taken. Threads may share it.

    Example:
        >>> durations = Durations()
        >>> durations.usual
        8.0
        >>> durations.add(11.0)
        >>> durations.usual
        11.0
    """

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=100)
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Adds one.

        Args:
            seconds: From the submission to the result.
        """
        with self._lock:
            self._latest.append(seconds)

    @property
    def usual(self) -> float:
        """Their median, in seconds."""
        with self._lock:
            return statistics.median(self._latest) if self._latest else USUAL_SECONDS


@dataclass(frozen=True)
class Poller:
    """Waits for results. Threads may share it.

    Attributes:
        gate: Ends the waiting when the run is ended from outside.
        patience_seconds: How long to wait for one result.
        durations: How long the requests of the run have taken.
    """

    gate: Gate
    patience_seconds: float
    durations: Durations = field(default_factory=Durations)

    def result(
        self, client: SegmindClient, submitted: Submitted, seed: int, part: Path, log: logging.Logger, *, resumed: bool
    ) -> PaidPicture:
        """Waits for the result of a request, and downloads the picture.

        Args:
            client: The client.
            submitted: The request.
            seed: The seed that was asked for.
            part: The file to write; its content is replaced.
            log: Logs, once, that it takes longer than usual, and a poll that fails.
            resumed: Whether an earlier run has submitted it, so that it may be finished already.

        Returns:
            The picture's facts.

        Raises:
            ApiError: The request has failed, unbilled; or its picture cannot be had from here, and was paid for; or the
                provider has forgotten it or refuses the account, and it is `possibly_billed`.
            SubmittedError: It is not finished, and the run waits no longer.
        """
        began, told = monotonic(), False
        state: Status | None = None
        wait = 0.0 if resumed else max(0.0, self.durations.usual - 1)
        while True:
            elapsed = monotonic() - began
            if not self.gate.rest(min(wait, max(0.0, self.patience_seconds - elapsed))):
                raise self._unfinished(submitted, "the run was ended")
            elapsed, wait = monotonic() - began, random.uniform(*POLL_SECONDS)
            try:
                state = client.status(submitted)
                if state is Status.COMPLETED:
                    picture = client.fetch(submitted, seed, part)
                    if not resumed:
                        self.durations.add(elapsed)
                    return picture
            except (ForgottenError, AccountError) as error:
                raise error.with_facts(possibly_billed=True, request_id=submitted.request_id) from None
            except _FINAL:
                raise
            except ApiError as passing:
                wait = max(wait, passing.retry_after or 0.0)
                log.info("asked for request %s, without success: %s", submitted.request_id, passing)
            if elapsed >= self.patience_seconds:
                raise self._unfinished(
                    submitted, f"it is still {state} after {elapsed:.0f} s" if state else "no answer"
                )
            if not told and elapsed > self.durations.usual + LONG_SECONDS:
                log.info("request %s was submitted %.0f s ago, still %s", submitted.request_id, elapsed, state)
                told = True

    def _unfinished(self, submitted: Submitted, why: str) -> SubmittedError:
        return SubmittedError(
            f"request {submitted.request_id} is submitted and not finished: {why}; run the same job again, or "
            "prefect-segmind reconcile, to fetch its picture without another payment",
            possibly_billed=True,
            request_id=submitted.request_id,
        )
