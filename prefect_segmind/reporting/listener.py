"""What a command in a terminal hears of the run that it starts, and is asked by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from decimal import Decimal
from typing import NamedTuple

from prefect_segmind.batch.approval import Reply
from prefect_segmind.batch.plan import Plan
from prefect_segmind.batch.tally import BatchResult, Progress
from prefect_segmind.limits.ledger import Ledger
from prefect_segmind.pipeline.publish import split_publish_to


class Question(NamedTuple):
    """What a person is asked.

    Attributes:
        title: What the run is of: its manifest, its inbox.
        plan: What it is going to do and to cost.
        above_usd: What needs no approval.
        prompts: Name and prompt of the first assets.
        sources: The first source images, no one twice.
        publish_to: Where the pictures go live, if they do.
    """

    title: str
    plan: Plan
    above_usd: Decimal
    prompts: Sequence[tuple[str, str]]
    sources: Sequence[str]
    publish_to: str | None = None

    def goes_live(self) -> str:
        """The addresses at which pictures of the plan go live, the first of them one by one."""
        if self.publish_to is None:
            return "nothing, the pictures stay in the archive"
        place, pattern = split_publish_to(self.publish_to)
        addresses = [f"{place}/{pattern.replace('{name}', name)}" for name, _ in self.prompts]
        more = self.plan.total - len(addresses)
        return ", ".join(addresses) + (f" and {more} more at {place}" if more > 0 else "")


class Listener:
    """Hears nothing and answers nothing; a command overrides what it shows."""

    def began(self, flow_run_id: str) -> None:
        """A flow run has begun.

        Args:
            flow_run_id: Its id.
        """

    def progressed(self, progress: Progress) -> None:
        """An asset of a batch has begun or ended.

        Args:
            progress: How far the batch is.
        """

    def ask(self, question: Question) -> Reply | None:
        """A batch may cost more than what needs no approval.

        Args:
            question: What it is going to do.

        Returns:
            The answer; None to have it asked in Prefect.
        """
        return None

    def ended(self, ledger: Ledger, result: BatchResult | None = None) -> None:
        """A run has ended, whatever ended it.

        Args:
            ledger: What its requests came to.
            result: What came of its assets, if it is a batch.
        """


_listener: ContextVar[Listener | None] = ContextVar("segmind_listener", default=None)


def listener() -> Listener:
    """Who listens to the run; one that hears nothing if nobody does."""
    return _listener.get() or Listener()


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Has a listener hear of the runs that begin inside.

    Args:
        listener: It.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
