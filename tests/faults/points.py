"""The points: every operation of each walk, with every kind of fault that it can have."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from random import Random
from zlib import crc32

from prefect_segmind.archive.record import OnUnknown
from tests.faults.api import SCENARIOS, Api
from tests.faults.tap import GONE, KINDS, OUTAGES, OUTBOX, STORE, WIRE, Fault, Operation, can_fail
from tests.faults.world import THEN, Point, played

POLICIES: tuple[OnUnknown, ...] = ("repay", "fail")
WALKS = tuple(product(SCENARIOS, POLICIES, THEN))
PAIRS = 60
"""Pairs of faults for each way to run the plain walk again."""


def operations(scenario: str, policy: OnUnknown, api: Api) -> list[Operation]:
    """The operations of the first run, where nothing fails."""
    with played(Point(scenario, policy, "new process"), api) as world:
        return world.tap.operations[: world.first_run]


def single(found: list[Operation]) -> Iterator[Fault]:
    """One fault at each operation, and outages from it on."""
    for number, operation in enumerate(found, 1):
        for kind in KINDS[operation.place]:
            faults = [Fault(number, kind)]
            if not operation.reads and kind != GONE:  # to be gone after one is to be gone before the next
                faults.append(Fault(number, kind, after=True))
            if kind in OUTAGES[operation.place] and (operation.place == STORE or not operation.reads):
                faults.append(Fault(number, kind, lasting=True))
            yield from (each for each in faults if can_fail(operation, each))


def pairs(found: list[Operation], seed: str) -> Iterator[tuple[Fault, Fault]]:
    """Two faults: the second one where the first has left the walk, in its first run or in the next."""
    draw = Random(seed)
    faults = [each for each in single(found) if not each.lasting]
    for _ in range(PAIRS):
        one = draw.choice(faults)
        place = draw.choice((STORE, OUTBOX, WIRE))
        kind = draw.choice([each for each in KINDS[place] if each not in (GONE, "409", "412")])
        yield one, Fault(one.number + draw.randint(1, len(found)), kind, after=draw.random() < 0.5)


def points(scenario: str, policy: OnUnknown, then: str, api: Api, *, everything: bool) -> Iterator[Point]:
    """The points of one walk with one way to run the job again: a fixed sample of them, or everything.

    Of everything, the plain walk with the policy `repay` has each fault with each way to run the job again, and with
    `fail` with one of them. The longer walks, most of whose operations are the plain one's, have a third of the faults.
    What is left out is chosen by chance, but always the same.
    """
    found, ways = operations(scenario, policy, api), list(THEN)
    plain = scenario == "plain"
    for fault in single(found):
        draw = crc32(f"{scenario} {policy} {fault}".encode())
        share = (1 if plain else 3) if everything else (30 if plain else 90)
        all_ways = everything and plain and policy == "repay"
        if draw // 7 % share == 0 and (all_ways or then == ways[draw % len(ways)]):
            yield Point(scenario, policy, then, (fault,))
    if plain:
        for both in islice(pairs(found, f"{policy} {then}"), PAIRS if everything else 2):
            yield Point(scenario, policy, then, both)
