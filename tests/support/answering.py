"""A person who answers the question of a batch, as at a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect_segmind.batch.approval import Reply
from prefect_segmind.reporting.listener import Listener, Question, heard_by


@contextmanager
def answering(answer: Reply) -> Iterator[None]:
    """Gives this answer to whatever runs inside asks."""

    class Person(Listener):
        def ask(self, question: Question) -> Reply:
            return answer

    with heard_by(Person()):
        yield
