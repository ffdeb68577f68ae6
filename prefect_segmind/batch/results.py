"""The result of each asset of a run: all of them on disk, a line of JSON each, and the first ones in memory."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from prefect_segmind.errors import SegmindError
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.storage.spool import Spool

NAMED = 1_000
"""The most pictures, failures, jobs not started and jobs submitted that a result names; it counts them all."""


class Failure(BaseModel):
    """An asset that failed.

    Attributes:
        status: `failed`; in the file of all results also `submitted`, for one whose request the provider has accepted
            and not finished.
        name: The name of its job.
        stage: `validate`, `upload`, `generate`, `archive` or `publish`.
        error: What was wrong and what to do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Literal["failed", "submitted"] = "failed"
    name: str
    stage: str
    error: str


class Results(Spool[ArchivedImage | Failure]):
    r"""The results of a run in a temporary file, in the order in which the assets ended. Threads may share it.

    Iterating gives all of them, and `lines` their JSON.

    Attributes:
        failures: The first `NAMED` assets that failed.
        missing: The number of results that could not be written to the file.
        why_missing: Why; empty if none is missing.

    Example:
        >>> with Results() as results:
        ...     results.add(Failure(name="mug", stage="upload", error="the bucket does not exist"))
        ...     b"".join(results.lines())
        b'{"status":"failed","name":"mug","stage":"upload","error":"the bucket does not exist"}\n'
    """

    def __init__(self) -> None:
        super().__init__(ArchivedImage, Failure)
        self.failures: list[Failure] = []
        self.missing = 0
        self.why_missing = ""
        self._new: list[tuple[int, ArchivedImage]] = []
        self._reused: list[tuple[int, ArchivedImage]] = []
        self._number = 0

    @property
    def images(self) -> tuple[ArchivedImage, ...]:
        """Up to `NAMED` pictures in their order. Those that are new in the archive come before reused ones."""
        room = NAMED - len(self._new)
        return tuple(image for _, image in sorted([*self._new, *self._reused[:room]], key=lambda each: each[0]))

    def add(self, result: ArchivedImage | Failure) -> None:
        """Adds the result of an asset; where the disk does not take it, it is counted as missing.

        Args:
            result: A picture, or why there is none.
        """
        self._number += 1
        try:
            self.append(result)
        except (SegmindError, ValueError) as error:
            self.missing, self.why_missing = self.missing + 1, str(error)
        if isinstance(result, ArchivedImage):
            first = self._reused if result.status == "reused" else self._new
            if len(first) < NAMED:
                first.append((self._number, result))
        elif result.status == "failed" and len(self.failures) < NAMED:
            self.failures.append(result)
