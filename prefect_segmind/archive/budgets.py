"""The accounts of shared budgets in an archive, and the permits for requests: JSON objects, changed by conditions.

{archive}/.segmind/budgets/{name}.json            the account of a budget
{archive}/.segmind/requests-per-minute.json       the permits of all runs that share the rate
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from decimal import Decimal
from typing import TypeVar

from pydantic import BaseModel

from prefect_segmind.archive.archive import Archive
from prefect_segmind.archive.record import Record
from prefect_segmind.errors import PreconditionFailedError, StoreError
from prefect_segmind.limits.account import Account, Share
from prefect_segmind.limits.ledger import NOTHING
from prefect_segmind.limits.permits import Permits
from prefect_segmind.storage.store import read_model

PERMITS_KEY = ".segmind/requests-per-minute.json"
LONGEST_CHANGE_SECONDS = 30.0
"""How long a change is tried while other runs are faster each time."""
LONGEST_PAUSE_SECONDS = 0.5
"""The most seconds between two of these tries."""
DATED_SECONDS = 300.0
"""How much earlier than its share a record may be dated that was written after it: stores count whole seconds."""

M = TypeVar("M", bound=BaseModel)


class Budgets:
    """Reads and changes accounts and permits in an archive; a `Book` of `limits.purse`.

    Each change names the share or the draw that it is for, so that no two runs write the same bytes, unless they settle
    the same dead run in the same way.

    Args:
        archive: The archive; its store honours conditional writes.
    """

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def read(self, name: str) -> Account:
        """An account; an empty one where nothing was drawn from it yet.

        Args:
            name: The account's.

        Raises:
            StoreError: It cannot be read.
        """
        key = account_key(name)
        found = read_model(self._archive.store, key, Account, _remedy("what a budget has left"))
        return found[0] if found else Account(name=name)

    def change(self, name: str, change: Callable[[Account, float], Account]) -> Account:
        """Changes an account; see `Book.change`.

        Raises:
            StoreError: It cannot be read or written; whether it was written is not known then.
        """

        def of_this_name(account: Account, now: float) -> Account:
            if account.name != name:  # on a disk that takes upper and lower case for one
                raise StoreError(
                    f"{self._archive.store.uri(account_key(name))} is the account of the budget {account.name}: "
                    "choose another budget_name"
                )
            return change(account, now)

        return self._change(account_key(name), Account(name=name), of_this_name, "what a budget has left")

    def change_permits(self, change: Callable[[Permits, float], Permits]) -> None:
        """Changes the permits; see `Book.change_permits`.

        Raises:
            StoreError: They cannot be read or written; whether they were written is not known then.
        """
        self._change(PERMITS_KEY, Permits(), change, "when all runs have sent requests")

    def paid_from(self, share: Share) -> Decimal:
        """What was spent from a share, by the records that were written since it was drawn; see `Book.paid_from`.

        Raises:
            StoreError: The archive cannot be listed, or a record cannot be read.
        """
        spent = NOTHING
        for _, found in self._archive.records(since=share.since - DATED_SECONDS):
            if isinstance(found, StoreError):
                raise found
            spent += spent_from(share, found.record)
        return spent

    def _change(self, key: str, empty: M, change: Callable[[M, float], M], what: str) -> M:
        store, pause, end = self._archive.store, 0.02, time.monotonic() + LONGEST_CHANGE_SECONDS
        while True:
            found = read_model(store, key, type(empty), _remedy(what))
            try:
                if found is None:  # only an object that is there tells the store's time
                    store.put(key, _json(empty), "application/json", if_absent=True)
                    continue
                known, stored = found
                changed = change(known, stored.clock())
                if changed != known:
                    store.put(key, _json(changed), "application/json", if_match=stored.etag)
                return changed
            except PreconditionFailedError as error:
                if time.monotonic() > end:
                    raise StoreError(
                        f"{store.uri(key)} could not be changed for {LONGEST_CHANGE_SECONDS:.0f} s, as other runs were "
                        "faster each time: run again later, or fewer at once",
                        status=error.status,
                    ) from error
                time.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def spent_from(share: Share, record: Record) -> Decimal:
    """What was spent from a share by the record of a picture.

    A request without an outcome, or of unknown outcome, counts as billed.

    Args:
        share: The share.
        record: The record.
    """
    spent = NOTHING
    for each in record.attempts:
        if share.id in each.shares:
            known = each.cost_usd or NOTHING
            spent += known if each.possibly_billed is False else max(known, share.price_usd)
    return spent


def account_key(name: str) -> str:
    """The key of an account.

    Args:
        name: The account's.

    Example:
        >>> account_key("daily-2026-11-27")
        '.segmind/budgets/daily-2026-11-27.json'
    """
    return f".segmind/budgets/{name}.json"


def _remedy(what: str) -> str:
    return f"it records {what}, so nothing is paid until it is restored (or removed, to begin anew)"


def _json(model: BaseModel) -> bytes:
    return model.model_dump_json(indent=2).encode()
