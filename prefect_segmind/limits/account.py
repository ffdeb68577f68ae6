"""The account of a budget that several runs share: what is spent in all, and what each live run has drawn from it.

A run draws money before it needs it, renews its share while it lives, tells with that what it has spent, and gives the
rest back at its end. A share that is not renewed for `LEASE_SECONDS` is that of a dead run: whoever needs money settles
it by what the archive's records say was paid from it.

It is pure: each change makes a new account, and whoever keeps accounts writes it only over the one that it was made of.
A change names the whole share and never a difference, so that one whose answer was lost can be made again. All times
are seconds since 1970 by the clock of the store that keeps the account.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from decimal import Decimal
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from prefect_segmind.errors import ConfigurationError
from prefect_segmind.limits.ledger import NOTHING
from prefect_segmind.money import Usd, usd

LEASE_SECONDS = 60.0
"""How long a share is its run's after it was last renewed."""
BLOCK = 20
"""The pictures for which a run draws money beyond those that wait for it, at most."""
THRESHOLDS = (80, 100)
"""Percent of a budget whose use is announced. At 100 what is left pays for no further picture."""

OF_ONE_RUN = "run-"
"""The name begins so of a budget that a run shares with its own shards only."""

_PERIODS = {"daily": "%Y-%m-%d", "monthly": "%Y-%m"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Budget:
    """A limit that all runs share that name it.

    Attributes:
        kind: `daily` and `monthly` begin anew with each day or month; a `campaign` never does.
        limit_usd: What all runs together may spend, in USD.
        setting: The setting or parameter that names it, for messages.
        campaign: The name of a campaign's budget.
        zone: The time zone of days and months.

    Example:
        >>> from zoneinfo import ZoneInfo
        >>> budget = Budget("daily", Decimal(5), "DAILY_BUDGET_USD", zone=ZoneInfo("Europe/Berlin"))
        >>> budget.account(datetime.fromisoformat("2026-11-27T23:30:00+00:00"))
        'daily-2026-11-28'
    """

    kind: Literal["daily", "monthly", "campaign"]
    limit_usd: Decimal
    setting: str
    campaign: str = ""
    zone: tzinfo = UTC

    def account(self, now: datetime) -> str:
        """The name of its account.

        Args:
            now: The time, aware.
        """
        return self.campaign if self.kind == "campaign" else f"{self.kind}-{now.astimezone(self.zone):{self._format}}"

    @property
    def _format(self) -> str:
        return _PERIODS[self.kind]

    @property
    def is_of_one_run(self) -> bool:
        """Whether it is that of one run alone, which shares it with its shards."""
        return self.campaign.startswith(OF_ONE_RUN)

    @property
    def title(self) -> str:
        """What people call it: `daily budget`, `monthly budget`, `budget summer`."""
        return f"budget {self.campaign}" if self.kind == "campaign" else f"{self.kind} budget"


class BudgetLeft(BaseModel):
    """What a shared budget has left.

    Attributes:
        title: What people call it.
        limit_usd: The limit.
        left_usd: What may still be drawn.
        held_usd: What live runs have drawn and not spent: some of it may come back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    limit_usd: Decimal
    left_usd: Decimal
    held_usd: Decimal

    def sentence(self) -> str:
        """The same in words.

        Example:
            >>> amounts = {"limit_usd": Decimal(5), "left_usd": Decimal("1.2"), "held_usd": Decimal("0.5")}
            >>> BudgetLeft(title="daily budget", **amounts).sentence()
            '1.20 of 5.00 USD left, and 0.50 USD held by runs'
        """
        held = f", and {usd(self.held_usd)} USD held by runs" if self.held_usd else ""
        return f"{usd(self.left_usd)} of {usd(self.limit_usd)} USD left{held}"


def checked_name(name: str) -> str:
    """A campaign's name, if it can be that of an object in every archive and is no period's.

    Args:
        name: As given.

    Raises:
        ConfigurationError: It cannot.

    Example:
        >>> checked_name("summer-2027")
        'summer-2027'
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"budget_name: {name!r} is not allowed; allowed are up to 100 of the characters A-Z a-z 0-9 . _ - and the "
            "first is a letter or a digit"
        )
    if name.casefold().startswith(tuple(f"{period}-" for period in _PERIODS)):
        raise ConfigurationError(
            f"budget_name: {name!r} is not allowed, as the budgets of days and months begin with daily- and monthly-; "
            "choose another name"
        )
    return name


KEPT_MODEL = ConfigDict(frozen=True, extra="allow")
"""Fields that a newer version has added are kept when this one writes an account again."""


class Share(BaseModel):
    """What a live run has drawn from an account.

    Attributes:
        id: Drawn for the share; the records of the pictures that are paid from it name it.
        run: The flow run or the task run that has drawn it.
        drawn_usd: What the run may spend; what it has spent included.
        spent_usd: What it has spent, or may have been billed, when it last told.
        in_flight_usd: What was reserved then for requests without an outcome.
        price_usd: What a request of unknown outcome may have cost.
        since: When it was first drawn.
        renewed: When its run last wrote it.
    """

    model_config = KEPT_MODEL

    id: str
    run: str = ""
    drawn_usd: Usd
    spent_usd: Usd = NOTHING
    in_flight_usd: Usd = NOTHING
    price_usd: Usd
    since: float
    renewed: float

    @property
    def taken_usd(self) -> Decimal:
        """What nobody else may spend: what is drawn or, if answers were dearer than that, what is spent."""
        return max(self.drawn_usd, self.spent_usd + self.in_flight_usd)


class Standing(NamedTuple):
    """What a run knows of its own share, and what it would like to have.

    Attributes:
        id: The share's.
        run: The run's.
        drawn_usd: What it may spend as far as it knows, which it may be spending at this moment.
        spent_usd: What it has spent, or may have been billed.
        in_flight_usd: What is reserved for requests without an outcome.
        price_usd: What the next request may cost.
        dearest_usd: What the dearest answer has cost that it knows of; 0 if none has named a cost.
        wanted_usd: What it would like to have for more requests; 0 to draw nothing.
        is_patient: Whether it waits for another run's answer where none has named a cost yet.
    """

    id: str
    run: str
    drawn_usd: Decimal
    spent_usd: Decimal
    in_flight_usd: Decimal
    price_usd: Decimal
    dearest_usd: Decimal = NOTHING
    wanted_usd: Decimal = NOTHING
    is_patient: bool = True

    @property
    def taken_usd(self) -> Decimal:
        """As that of the share."""
        return max(self.drawn_usd, self.spent_usd + self.in_flight_usd)

    @property
    def free_usd(self) -> Decimal:
        """What it may spend on more requests."""
        return self.taken_usd - self.spent_usd - self.in_flight_usd


class Announcement(BaseModel):
    """A threshold that was crossed.

    Attributes:
        percent: Of the limit.
        limit_usd: The limit.
        by: The share whose write has crossed it, and whose run announces it.
    """

    model_config = KEPT_MODEL

    percent: int
    limit_usd: Usd
    by: str


class Account(BaseModel):
    """The account of a shared budget.

    Attributes:
        schema_version: The version of this format.
        name: The account's, `daily-2026-11-27` or a campaign's.
        limit_usd: The limit by which it was last changed; a run draws by its own.
        spent_usd: What the runs have spent that have ended.
        dearest_usd: What the dearest answer has cost; 0 until one has named a cost.
        shares: Those of the live runs, and of dead ones that nobody has settled.
        announced: The thresholds that were crossed, each once for a limit.

    Example:
        >>> account = Account(name="summer", limit_usd=Decimal("0.12"), dearest_usd=Decimal("0.05"))
        >>> wants = Standing("a", "a run", *map(Decimal, ("0", "0", "0", "0.05", "0.05", "1.00")))
        >>> drawn = account.visited(wants, Decimal("0.12"), now=0.0)
        >>> drawn.share("a").drawn_usd, drawn.left_usd(Decimal("0.12"))
        (Decimal('0.10'), Decimal('0.02'))
        >>> drawn.closed(wants._replace(spent_usd=Decimal("0.05")), Decimal("0.12")).spent_usd
        Decimal('0.05')
    """

    model_config = KEPT_MODEL

    schema_version: Literal[1] = 1
    name: str
    limit_usd: Usd = NOTHING
    spent_usd: Usd = NOTHING
    dearest_usd: Usd = NOTHING
    shares: tuple[Share, ...] = ()
    announced: tuple[Announcement, ...] = ()

    @property
    def used_usd(self) -> Decimal:
        """What is spent in all, or may have been billed, as far as live runs have told."""
        return self.spent_usd + sum((each.spent_usd for each in self.shares), NOTHING)

    @property
    def held_usd(self) -> Decimal:
        """What live runs hold beyond that: it is spent, or comes back."""
        return sum((each.taken_usd - each.spent_usd for each in self.shares), NOTHING)

    def left_usd(self, limit_usd: Decimal) -> Decimal:
        """What may still be drawn; negative where more was spent than the limit is now.

        Args:
            limit_usd: The limit.
        """
        return limit_usd - self.used_usd - self.held_usd

    def share(self, id: str) -> Share | None:
        """A share; None if there is none by this id.

        Args:
            id: The share's.
        """
        return next((each for each in self.shares if each.id == id), None)

    def others(self, id: str) -> tuple[Share, ...]:
        """All shares but one.

        Args:
            id: That of the one.
        """
        return tuple(each for each in self.shares if each.id != id)

    def may_come_back(self, id: str) -> Decimal:
        """What others hold and have not spent.

        Args:
            id: The share of the run that asks.
        """
        return sum((each.taken_usd - each.spent_usd for each in self.others(id)), NOTHING)

    def dead(self, id: str, now: float) -> tuple[Share, ...]:
        """The shares of others whose lease is over.

        Args:
            id: The share of the run that asks.
            now: The time.
        """
        return tuple(each for each in self.others(id) if now - each.renewed > LEASE_SECONDS)

    def visited(self, standing: Standing, limit_usd: Decimal, now: float) -> Account:
        """The account after its run has told what it has spent, renewed its share and drawn what it may.

        It draws no more than an equal part of what is left, and at least one picture's worth if that much is left.
        Until an answer to any run has named a cost, one picture's worth is drawn by one run at a time: a list price
        that is too low then costs the difference once. What an earlier write has drawn whose answer was lost, and what
        the run no longer wants, is given back.

        Args:
            standing: The run's own figures.
            limit_usd: The limit, by the run's settings or parameters.
            now: The time.
        """
        others, found = self.others(standing.id), self.share(standing.id)
        dearest = max(self.dearest_usd, standing.dearest_usd)
        left = limit_usd - self.spent_usd - sum((each.taken_usd for each in others), NOTHING) - standing.taken_usd
        more = min(standing.wanted_usd - standing.free_usd, left)
        price = standing.price_usd
        if more > 0 and price > 0:
            part = max(price, _whole(left / (len(others) + 1), price))
            if not dearest:
                others_first = standing.is_patient and self.may_come_back(standing.id) > 0
                waits = others_first or standing.in_flight_usd > 0 or standing.free_usd >= price
                part = NOTHING if waits else price
            more = _whole(min(_rounded_up(more, price), left, part), price)
        mine = Share(
            id=standing.id,
            run=standing.run,
            drawn_usd=standing.taken_usd + max(NOTHING, more),
            spent_usd=standing.spent_usd,
            in_flight_usd=standing.in_flight_usd,
            price_usd=max(price, dearest),
            since=found.since if found else now,
            renewed=now,
        )
        changed = self.model_copy(update={"shares": (*others, mine), "dearest_usd": dearest, "limit_usd": limit_usd})
        return changed._announcing(mine.id, limit_usd, mine.price_usd)

    def closed(self, standing: Standing, limit_usd: Decimal) -> Account:
        """The account without a share, whose rest is given back; unchanged if that is settled already.

        Args:
            standing: The run's own figures; what is in flight counts as spent.
            limit_usd: The limit.
        """
        if self.share(standing.id) is None:
            return self
        dearest = max(self.dearest_usd, standing.dearest_usd)
        spent = self.spent_usd + standing.spent_usd + standing.in_flight_usd
        changes = {"shares": self.others(standing.id), "spent_usd": spent, "dearest_usd": dearest}
        return self.model_copy(update=changes)._announcing(standing.id, limit_usd, max(standing.price_usd, dearest))

    def settled(self, dead: Share, spent_usd: Decimal, by: str, limit_usd: Decimal) -> Account:
        """The account without the share of a dead run; unchanged if that was renewed or settled meanwhile.

        Args:
            dead: The share as it was read.
            spent_usd: What was spent from it by the records, or may have been billed; what its run has told counts, if
                that is more.
            by: The share of the run that settles it.
            limit_usd: The limit.
        """
        if self.share(dead.id) != dead:
            return self
        spent = self.spent_usd + max(spent_usd, dead.spent_usd)
        changed = self.model_copy(update={"shares": self.others(dead.id), "spent_usd": spent})
        return changed._announcing(by, limit_usd, dead.price_usd)

    def _announcing(self, by: str, limit_usd: Decimal, price_usd: Decimal) -> Account:
        """The account with the thresholds that it has just crossed."""
        known = {(each.percent, each.limit_usd) for each in self.announced}
        new = tuple(
            Announcement(percent=percent, limit_usd=limit_usd, by=by)
            for percent in self._crossed(limit_usd, price_usd)
            if (percent, limit_usd) not in known
        )
        return self.model_copy(update={"announced": (*self.announced, *new)}) if new else self

    def _crossed(self, limit_usd: Decimal, price_usd: Decimal) -> Iterator[int]:
        for percent in THRESHOLDS:
            enough = limit_usd * percent / 100
            if self.used_usd >= enough or (percent == 100 and self.used_usd > limit_usd - price_usd):
                yield percent


def _whole(amount: Decimal, price: Decimal) -> Decimal:
    """The price of as many pictures as an amount pays for."""
    return amount // price * price


def _rounded_up(amount: Decimal, price: Decimal) -> Decimal:
    """The same, for all of the amount."""
    whole = _whole(amount, price)
    return whole if whole == amount else whole + price
