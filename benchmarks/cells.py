"""What is measured: batches of so many pictures, so many at once, from an API and into an archive of a given speed."""

from __future__ import annotations

from typing import Literal, NamedTuple

S3_LATENCY = 0.03
"""Seconds that the S3 stub takes for a request."""


class Cell(NamedTuple):
    """A batch.

    Attributes:
        assets: The number of pictures.
        at_once: Requests to the API at once, at most.
        latency: Seconds that the API takes for a picture.
        archive: Where the pictures go.
    """

    assets: int
    at_once: int
    latency: float
    archive: Literal["folder", "s3"]

    @property
    def ideal(self) -> float:
        """Seconds from the first request to the last answer, if nothing but the API took time."""
        return self.assets * self.latency / self.at_once

    @classmethod
    def parse(cls, text: str) -> Cell:
        """A cell from the command line.

        Args:
            text: Such as `640,64,2,folder`.

        Raises:
            ValueError: It is not of that form.

        Example:
            >>> Cell.parse("640,64,2,s3").ideal
            20.0
        """
        assets, at_once, latency, archive = text.split(",")
        if archive not in ("folder", "s3"):
            raise ValueError(f"{archive!r} is neither folder nor s3")
        return cls(int(assets), int(at_once), float(latency), "folder" if archive == "folder" else "s3")


FULL = (
    Cell(112, 16, 10, "folder"),
    Cell(160, 16, 2, "s3"),
    Cell(320, 16, 0.2, "folder"),
    Cell(640, 64, 10, "folder"),
    Cell(640, 64, 2, "folder"),
    Cell(640, 64, 2, "s3"),
    Cell(4000, 64, 0.2, "folder"),
    Cell(4000, 64, 0.2, "s3"),
    Cell(1020, 170, 10, "folder"),
    Cell(1020, 170, 10, "s3"),
    Cell(5000, 170, 2, "folder"),
    Cell(5000, 170, 2, "s3"),
)
"""The provider's highest plan is 170 at once; as many batches are far below it as are near it."""
QUICK = (Cell(64, 16, 1, "folder"), Cell(256, 64, 1, "s3"))
"""Enough to see that everything runs, and what a change has done roughly: in short batches the start counts most."""
QUICK_NAIVE = 64
"""The most assets with which the naive way is tried in a quick run: it would take most of the time."""
