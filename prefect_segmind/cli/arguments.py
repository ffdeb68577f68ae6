"""Options of the command line that are converted from text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import Any

from prefect_segmind.errors import ConfigurationError
from prefect_segmind.text import spelled


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """The values of an option such as `--set name=value`, by name.

    Args:
        option: The name of the option, for the message.
        given: Its values as typed.

    Raises:
        ConfigurationError: A value has another form.
    """
    wrong = [each for each in given if not re.fullmatch(r"[A-Za-z_]\w*=.*", each, re.S)]
    if wrong:
        raise ConfigurationError(f"{option}: {wrong[0]!r} is not allowed; allowed is name=value")
    return {name: spelled(text) for name, text in (each.split("=", 1) for each in given)}


def typed(given: dict[str, str]) -> dict[str, Any]:
    """Fields of a job, the numbers among them converted from text.

    Args:
        given: The fields as text.
    """
    return {field: number(text) if field in ("seed", "image_weight") else text for field, text in given.items()}


def number(text: str) -> int | str:
    """An integer from its text; any other text unchanged, so that the job's validation refuses it."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else text


def money(field: str, given: str | None) -> Decimal | None:
    """An amount in USD from its text.

    Args:
        field: The name of the field, for the message.
        given: The text; None if the option is left out.

    Raises:
        ConfigurationError: It is not an amount, or is negative.
    """
    if given is None:
        return None
    with suppress(InvalidOperation):
        amount = Decimal(given)
        if amount.is_finite() and amount >= 0:
            return amount
    raise ConfigurationError(f"{field}: {given!r} is not allowed; allowed is an amount such as 5.00")
