"""Parameters of flows that are a choice: drop-downs in Prefect's form.

They are strings with a list of values rather than enums, so that a value that is nearly right reaches the job's own
check, which suggests the nearest right one.
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
