"""The body of a request: names, types, ranges and defaults are the provider's, from its page for Ideogram 2a."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from prefect_segmind.api.resolutions import DEFAULT_RESOLUTION, Resolution, resolution_size

ENDPOINT = "ideogram-2a-img-2-img"
"""The model's name at the provider; also the last part of its address."""


class MagicPromptOption(StrEnum):
    """Whether the model may rewrite the prompt. A rewritten prompt is not returned; `OFF` is reproducible."""

    AUTO = "AUTO"
    ON = "ON"
    OFF = "OFF"


class StyleType(StrEnum):
    """The style of the picture."""

    GENERAL = "GENERAL"
    REALISTIC = "REALISTIC"
    DESIGN = "DESIGN"
    RENDER_3D = "RENDER_3D"
    ANIME = "ANIME"


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


def _encodable(text: str) -> str:
    text.encode()  # half of a surrogate pair cannot be sent; what this raises is a ValueError
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("blank")
    return _encodable(text)


def _blank_is_none(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def listed_resolution(value: str, info: ValidationInfo) -> str:
    """Validates a resolution for pydantic.

    Args:
        value: The resolution.
        info: Its context may set `allow_unlisted_resolution`, which lets any size through.

    Returns:
        The same text.

    Raises:
        ValueError: It is not one of the 78, or not of their form.
    """
    unlisted = bool(info.context and info.context.get("allow_unlisted_resolution"))
    if value in Resolution.__members__ or (unlisted and resolution_size(value)):
        return value
    raise ValueError("not listed")


Prompt = Annotated[str, AfterValidator(_not_blank)]
ImageWeight = Annotated[int, Field(ge=1, le=100), BeforeValidator(_not_bool)]
NegativePrompt = Annotated[Annotated[str, AfterValidator(_encodable)] | None, BeforeValidator(_blank_is_none)]
Seed = Annotated[int, Field(ge=100, le=999_999), BeforeValidator(_not_bool)]


class ImageToImageRequest(BaseModel):
    """The body of one call, field for field as the provider documents it.

    Attributes:
        image_file: A URI that the provider can GET.
        prompt: What the picture is to show.
        image_weight: 1 to 100; higher keeps more of the source image.
        magic_prompt_option: Whether the model may rewrite the prompt.
        negative_prompt: What the picture is not to show.
        resolution: One of the 78 listed sizes.
        seed: 100 to 999999.
        style_type: The style.

    Example:
        >>> ImageToImageRequest(image_file="https://example.com/mug.jpg", prompt="a red mug").body()["image_weight"]
        50
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    image_file: Prompt
    prompt: Prompt
    image_weight: ImageWeight = 50
    magic_prompt_option: MagicPromptOption = MagicPromptOption.AUTO
    negative_prompt: NegativePrompt = None
    resolution: Annotated[str, AfterValidator(listed_resolution)] = DEFAULT_RESOLUTION
    seed: Seed | None = None
    style_type: StyleType = StyleType.GENERAL

    def body(self) -> dict[str, Any]:
        """The JSON object to send, without the fields that are None."""
        return self.model_dump(mode="json", exclude_none=True)
