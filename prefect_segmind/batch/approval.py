"""When a person is asked before a run pays, and what the answer allows."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal, NamedTuple

from prefect_segmind.errors import NotApprovedError

GO_ON: Literal["go on"] = "go on"
TRIM: Literal["trim"] = "trim"
STOP: Literal["stop"] = "stop"


class Answer(NamedTuple):
    """What a person says to a plan.

    Attributes:
        answer: `go on` as planned, `trim` to an amount, or `stop`.
        up_to_usd: With `trim`: what the run may spend. Left out, it is what needs no approval.
    """

    answer: Literal["go on", "trim", "stop"]
    up_to_usd: Decimal | None = None


class Approved(NamedTuple):
    """What a run may do after a person was asked, or needed not be.

    Attributes:
        budget_usd: What it may spend; None for no limit.
        trimmed: Whether a person has set that limit, so that reaching it is no failure.
    """

    budget_usd: Decimal | None
    trimmed: bool = False


def must_ask(planned_usd: Decimal, above_usd: Decimal | None, budget_usd: Decimal | None) -> bool:
    """Whether a plan may cost more than what needs no approval.

    Example:
        >>> must_ask(Decimal("12.50"), Decimal(5), None), must_ask(Decimal("12.50"), Decimal(5), Decimal(4))
        (True, False)
    """
    may_cost = planned_usd if budget_usd is None else min(planned_usd, budget_usd)
    return above_usd is not None and may_cost > above_usd


def apply_answer(
    answer: Answer,
    *,
    planned_usd: Decimal,
    above_usd: Decimal,
    budget_usd: Decimal | None,
    spent_usd: Decimal = Decimal(0),
) -> Approved:
    """What an answer allows.

    To go on allows the plan and, for each of its pictures, the one more request that may follow one of unknown outcome.

    Args:
        answer: The person's.
        planned_usd: What the plan costs.
        above_usd: What needs no approval.
        budget_usd: The run's own budget; an answer never raises it.
        spent_usd: What earlier tries of the run have spent, which counts.

    Raises:
        NotApprovedError: The answer is `stop`.
    """
    if answer.answer == STOP:
        raise NotApprovedError("it was not approved: the answer was to stop; nothing was paid")
    if answer.answer == GO_ON:
        planned = spent_usd + 2 * planned_usd
        return Approved(planned if budget_usd is None else min(planned, budget_usd))
    limit = above_usd if answer.up_to_usd is None else max(Decimal(0), answer.up_to_usd)
    if budget_usd is not None and budget_usd <= limit:
        return Approved(budget_usd)
    return Approved(limit, trimmed=True)


def parse_answer(text: str) -> Answer | None:
    """An answer as people type it: yes, no, or an amount in USD; None if it is none of these.

    Example:
        >>> parse_answer("y"), parse_answer("2.50").up_to_usd
        (Answer(answer='go on', up_to_usd=None), Decimal('2.50'))
    """
    word = text.strip().lower().removesuffix("usd").removeprefix("$").strip()
    if word in ("y", "yes", GO_ON):
        return Answer(GO_ON)
    if word in ("n", "no", STOP):
        return Answer(STOP)
    try:
        amount = Decimal(word)
    except ArithmeticError:
        return None
    return Answer(TRIM, amount) if amount.is_finite() and amount >= 0 else None
