"""What is known of a picture that was paid for."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from prefect_segmind.images.inspection import Picture


KEPT_MODEL = ConfigDict(frozen=True, extra="allow")
"""What a newer version has noted is kept when this one writes a record again."""


class PaidPicture(BaseModel):
    """The facts of a picture that was paid for.

    Attributes:
        cost_source: `x-cost` where the answer named its cost, `list price` where it did not.
        seed: The seed it was made with.
        paid_at: When its answer had been read, UTC.
    """

    model_config = KEPT_MODEL

    sha256: str
    format: str
    content_type: str
    extension: str
    width: int
    height: int
    size_bytes: int
    seed: int
    cost_usd: Decimal
    cost_source: Literal["x-cost", "list price"]
    request_id: str | None = None
    paid_at: datetime
    notices: tuple[str, ...] = ()


class Answered(BaseModel):
    """What the headers of a 200 tell, and when it had been read to its end.

    Attributes:
        cost_usd: By `x-cost`, or the list price.
        cost_source: Which of them.
        seed: By `x-seed-value`, where the answer names one.
        content_type: As the answer claims, without parameters.
        request_id: The provider's.
        at: When it had been read, UTC.
    """

    model_config = KEPT_MODEL

    cost_usd: Decimal
    cost_source: Literal["x-cost", "list price"]
    seed: int | None = None
    content_type: str = ""
    request_id: str | None = None
    at: datetime

    def brought(self, picture: Picture, seed: int | None) -> PaidPicture:
        """The facts of the picture that the answer has turned out to hold.

        Args:
            picture: It.
            seed: The one that was asked for.
        """
        notices = []
        if None not in (self.seed, seed) and self.seed != seed:
            notices.append(f"the provider reports seed {self.seed} where {seed} was asked for")
        if self.content_type.startswith("image/") and self.content_type != picture.content_type:
            notices.append(f"the provider called the picture {self.content_type}; it is {picture.content_type}")
        return PaidPicture(
            **picture.model_dump(),
            seed=seed or 0 if self.seed is None else self.seed,
            cost_usd=self.cost_usd,
            cost_source=self.cost_source,
            request_id=self.request_id,
            paid_at=self.at,
            notices=tuple(notices),
        )
