"""How a command in a terminal follows the run that it starts, and answers its question."""

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
    """The question whether a batch may run.

    Attributes:
        title: The manifest or inbox.
        plan: The plan of the batch.
        above_usd: The cost above which approval is needed.
        prompts: Name and prompt of the first assets.
        sources: The first source images, without duplicates.
        publish_to: Where the pictures are published, if they are.
    """

    title: str
    plan: Plan
    above_usd: Decimal
    prompts: Sequence[tuple[str, str]]
    sources: Sequence[str]
    publish_to: str | None = None

    def goes_live(self) -> str:
        """The addresses at which pictures go live, the first ones in full."""
        if self.publish_to is None:
            return "nothing, the pictures stay in the archive"
        place, pattern = split_publish_to(self.publish_to)
        addresses = [f"{place}/{pattern.replace('{name}', name)}" for name, _ in self.prompts]
        more = self.plan.total - len(addresses)
        return ", ".join(addresses) + (f" and {more} more at {place}" if more > 0 else "")


class Listener:
    """Ignores everything; a command overrides what it needs."""

    def began(self, flow_run_id: str) -> None:
        """A flow run has begun.

        Args:
            flow_run_id: The id of the flow run.
        """

    def progressed(self, progress: Progress) -> None:
        """An asset of a batch has begun or ended.

        Args:
            progress: The progress of the batch.
        """

    def ask(self, question: Question) -> Reply | None:
        """A batch needs approval.

        Args:
            question: The question.

        Returns:
            The answer; None to ask in Prefect's UI instead.
        """
        return None

    def ended(self, ledger: Ledger, result: BatchResult | None = None) -> None:
        """A run has ended, well or not.

        Args:
            ledger: The ledger of the run.
            result: The result of a batch, if it is one.
        """


_listener: ContextVar[Listener | None] = ContextVar("segmind_listener", default=None)


def listener() -> Listener:
    """The current listener; one that ignores everything where none is set."""
    return _listener.get() or Listener()


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Sets the listener for runs that begin inside the `with`.

    Args:
        listener: The listener.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
