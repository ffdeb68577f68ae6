"""The parameters of flows that are a choice: drop-downs in Prefect's form.

They are texts with a list of values, so that a value that is nearly right still reaches the job's own check, which
names the nearest right one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prefect_segmind.api.request import MagicPromptOption, StyleType
from prefect_segmind.api.resolutions import AUTO, Resolution

ResolutionChoice = Annotated[str, Field(json_schema_extra={"enum": [AUTO, *(each.value for each in Resolution)]})]
StyleChoice = Annotated[str, Field(json_schema_extra={"enum": [each.value for each in StyleType]})]
MagicPromptChoice = Annotated[str, Field(json_schema_extra={"enum": [each.value for each in MagicPromptOption]})]
Seed = int | Literal["random"] | None
