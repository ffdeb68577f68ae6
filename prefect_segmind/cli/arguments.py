"""What the command line takes as text and means as something else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import Any

from prefect_segmind.errors import ConfigurationError
from prefect_segmind.text import spelled


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """What an option such as `--set name=value` has set."""
    wrong = [each for each in given if not re.fullmatch(r"[A-Za-z_]\w*=.*", each, re.S)]
    if wrong:
        raise ConfigurationError(f"{option}: {wrong[0]!r} is not allowed; allowed is name=value")
    return {name: spelled(text) for name, text in (each.split("=", 1) for each in given)}


def typed(given: dict[str, str]) -> dict[str, Any]:
    """Fields of a job that were given as text."""
    return {field: number(text) if field in ("seed", "image_weight") else text for field, text in given.items()}


def number(text: str) -> int | str:
    """A whole number; a text that is none, for the check of the job to refuse."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else text


def money(field: str, given: str | None) -> Decimal | None:
    """An amount in USD that was given as text."""
    if given is None:
        return None
    with suppress(InvalidOperation):
        amount = Decimal(given)
        if amount.is_finite() and amount >= 0:
            return amount
    raise ConfigurationError(f"{field}: {given!r} is not allowed; allowed is an amount such as 5.00")
