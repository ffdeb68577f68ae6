"""The facts of a paid picture, and of the answer that it came in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict

from prefect_segmind.money import Usd

if TYPE_CHECKING:
    from prefect_segmind.images.inspection import Picture

CostSource = Literal["x-cost", "metrics", "history", "list price"]
"""Where the cost of a picture is from."""
KEPT_MODEL = ConfigDict(frozen=True, extra="allow")
"""Fields that a newer version has added are kept when this one writes a record again."""


class PaidPicture(BaseModel):
    """The facts of a paid picture: the fields of `Picture`, and those of the answer.

    Attributes:
        sha256: The SHA-256 of the file, in hexadecimal.
        format: Pillow's name of its format, such as JPEG.
        content_type: Such as image/jpeg.
        extension: Of a file of this format, such as jpg.
        width: In pixels, as stored.
        height: In pixels, as stored.
        size_bytes: The size of the file.
        seed: The seed it was made with.
        cost_usd: Its cost.
        cost_source: Where the cost is from: the answer's `x-cost`, the `metrics` of a submitted request, the provider's
            request `history`, or, where none names it, the `list price`.
        request_id: The provider's id of the request; None if the answer has none.
        paid_at: When its answer had been read, UTC.
        notices: Where the answer is not as requested, in words for the log.
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
    cost_usd: Usd
    cost_source: CostSource
    request_id: str | None = None
    paid_at: AwareDatetime
    notices: tuple[str, ...] = ()


class Answered(BaseModel):
    """What is known of a paid request beside its picture.

    Attributes:
        cost_usd: The cost according to the provider, else the list price.
        cost_source: Where it is from, as in `PaidPicture`.
        seed: The seed according to the provider; None if it names none.
        content_type: The content type that the answer claims, without parameters.
        request_id: The provider's id of the request; None if the answer has none.
        at: When the answer had been read to its end, UTC.
    """

    model_config = KEPT_MODEL

    cost_usd: Usd
    cost_source: CostSource
    seed: int | None = None
    content_type: str = ""
    request_id: str | None = None
    at: AwareDatetime

    def brought(self, picture: Picture, seed: int | None) -> PaidPicture:
        """The facts of the paid picture in the answer.

        Args:
            picture: The facts in its bytes.
            seed: The seed that was asked for.
        """
        notices = []
        if None not in (self.seed, seed) and self.seed != seed:
            notices.append(f"the provider reports seed {self.seed} where {seed} was asked for")
        if self.content_type.startswith("image/") and self.content_type != picture.content_type:
            notices.append(f"the answer claims {self.content_type}; the picture is {picture.content_type}")
        return PaidPicture(
            **picture.model_dump(),
            seed=seed or 0 if self.seed is None else self.seed,
            cost_usd=self.cost_usd,
            cost_source=self.cost_source,
            request_id=self.request_id,
            paid_at=self.at,
            notices=tuple(notices),
        )
