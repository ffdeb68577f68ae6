"""When a person has to approve the cost of a run, and what the reply allows."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal, NamedTuple

from prefect_segmind.errors import NotApprovedError

GO_ON: Literal["go on"] = "go on"
TRIM: Literal["trim"] = "trim"
STOP: Literal["stop"] = "stop"


class Reply(NamedTuple):
    """A person's reply to a plan.

    Attributes:
        answer: `go on` as planned, `trim` to an amount, or `stop`.
        up_to_usd: With `trim`, what the run may spend; if None, what needs no approval.
    """

    answer: Literal["go on", "trim", "stop"]
    up_to_usd: Decimal | None = None


class Approved(NamedTuple):
    """What a run may spend, with a person's approval or without the need for one.

    Attributes:
        budget_usd: The limit; None for no limit.
        trimmed: Whether a person has set it, so that reaching it is not a failure.
    """

    budget_usd: Decimal | None
    trimmed: bool = False


def must_ask(planned_usd: Decimal, above_usd: Decimal | None, budget_usd: Decimal | None) -> bool:
    """Whether a plan may cost more than what needs no approval.

    Args:
        planned_usd: The cost of the plan.
        above_usd: What needs no approval; None if nothing does.
        budget_usd: The run's own budget; None for no limit.

    Example:
        >>> must_ask(Decimal("12.50"), Decimal(5), None), must_ask(Decimal("12.50"), Decimal(5), Decimal(4))
        (True, False)
    """
    return above_usd is not None and within_budget(planned_usd, budget_usd) > above_usd


def within_budget(amount_usd: Decimal, budget_usd: Decimal | None) -> Decimal:
    """What of an amount a budget allows.

    Args:
        amount_usd: The amount.
        budget_usd: The budget; None for none.

    Example:
        >>> within_budget(Decimal("0.25"), Decimal("0.10")), within_budget(Decimal("0.25"), None)
        (Decimal('0.10'), Decimal('0.25'))
    """
    return amount_usd if budget_usd is None else min(amount_usd, budget_usd)


def apply_reply(
    reply: Reply,
    *,
    planned_usd: Decimal,
    above_usd: Decimal,
    budget_usd: Decimal | None,
    spent_usd: Decimal = Decimal(0),
) -> Approved:
    """What a reply allows the run to spend.

    To go on allows the plan and, for each of its pictures, one more request after one of unknown outcome.

    Args:
        reply: The reply.
        planned_usd: The cost of the plan.
        above_usd: What needs no approval.
        budget_usd: The run's own budget, which a reply never raises; None for no limit.
        spent_usd: What earlier tries of the run have spent, which counts.

    Raises:
        NotApprovedError: The reply is `stop`.
    """
    if reply.answer == STOP:
        raise NotApprovedError("it was not approved: the answer was to stop; nothing was paid")
    if reply.answer == GO_ON:
        planned = spent_usd + 2 * planned_usd
        return Approved(within_budget(planned, budget_usd))
    limit = above_usd if reply.up_to_usd is None else max(Decimal(0), reply.up_to_usd)
    if budget_usd is not None and budget_usd <= limit:
        return Approved(budget_usd)
    return Approved(limit, trimmed=True)


def parse_reply(text: str) -> Reply | None:
    """Parses a typed reply: yes, no, or an amount in USD.

    Args:
        text: The reply as typed.

    Returns:
        The reply; None if the text is none of these.

    Example:
        >>> parse_reply("y"), parse_reply("2.50").up_to_usd
        (Reply(answer='go on', up_to_usd=None), Decimal('2.50'))
    """
    word = text.strip().lower().removesuffix("usd").removeprefix("$").strip()
    if word in ("y", "yes", GO_ON):
        return Reply(GO_ON)
    if word in ("n", "no", STOP):
        return Reply(STOP)
    try:
        amount = Decimal(word)
    except ArithmeticError:
        return None
    return Reply(TRIM, amount) if amount.is_finite() and amount >= 0 else None
