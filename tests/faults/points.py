"""The points: every operation of each walk, with every kind of fault that it can have."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice, product
from random import Random
from typing import NamedTuple
from zlib import crc32

from prefect_segmind.archive.record import OnUnknown
from tests.faults.api import SCENARIOS, WITHOUT_HISTORY, Api
from tests.faults.promises import broken
from tests.faults.tap import GONE, KINDS, OUTAGES, OUTBOX, STORE, WIRE, Fault, Operation, can_fail
from tests.faults.world import THEN, Point, played

POLICIES: tuple[OnUnknown, ...] = ("repay", "fail")
WALKS: tuple[tuple[str, OnUnknown, tuple[str, ...]], ...] = (
    *((scenario, policy, (then,)) for scenario, policy, then in product(WITHOUT_HISTORY, POLICIES, THEN)),
    *(
        (scenario, policy, tuple(THEN))
        for scenario, policy in product(SCENARIOS, POLICIES)
        if scenario not in WITHOUT_HISTORY
    ),
)
"""Each scenario and policy, and the ways to run the job again that are tried together."""
PAIRS = {"plain": 60, "plain, history": 60, "lost, history": 60, "v2": 60}
"""Pairs of faults for each walk of these scenarios."""


class Share(NamedTuple):
    """How many faults are tried: one of so many.

    Attributes:
        of_everything: Where everything is tried.
        of_sample: In the sample.
    """

    of_everything: int
    of_sample: int


def share(scenario: str) -> Share:
    """The share of the faults that are tried in a scenario: most operations of the longer walks are those of others."""
    if scenario == "plain":
        return Share(3, 30)
    if scenario in WITHOUT_HISTORY:
        return Share(6, 90)
    return Share(8, 120) if scenario in PAIRS or scenario == "v2 submit lost" else Share(24, 300)


@cache
def operations(scenario: str, policy: OnUnknown, api: Api) -> list[Operation]:
    """The operations of the first run, where nothing fails."""
    with played(Point(scenario, policy, "new process"), api) as world:
        assert not list(broken(world))
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
    while True:
        one = draw.choice(faults)
        place = draw.choice((STORE, OUTBOX, WIRE))
        kind = draw.choice([each for each in KINDS[place] if each not in (GONE, "409", "412")])
        yield one, Fault(one.number + draw.randint(1, len(found)), kind, after=draw.random() < 0.5)


def points(scenario: str, policy: OnUnknown, ways: tuple[str, ...], api: Api, *, everything: bool) -> Iterator[Point]:
    """The points of one walk with some ways to run the job again: a fixed sample of them, or everything.

    Of everything, the plain walk with the policy `repay` has its faults with each way to run the job again; any other
    has each of its faults with one of them. What is left out is chosen by chance, but always the same.
    """
    found, all_of_them = operations(scenario, policy, api), list(THEN)
    one_of = share(scenario).of_everything if everything else share(scenario).of_sample
    for fault in single(found):
        draw = crc32(f"{scenario} {policy} {fault}".encode())
        if draw // 7 % one_of == 0:
            chosen = all_of_them[draw % len(all_of_them)]
            with_each = everything and scenario == "plain" and policy == "repay"
            yield from (Point(scenario, policy, each, (fault,)) for each in ways if with_each or each == chosen)
    if scenario in PAIRS:
        seed = f"{policy} {ways[0]}" if len(ways) == 1 else f"{scenario} {policy}"
        for both, then in zip(
            islice(pairs(found, seed), PAIRS[scenario] if everything else 2), cycle(ways), strict=False
        ):
            yield Point(scenario, policy, then, both)
