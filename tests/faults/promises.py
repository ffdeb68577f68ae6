"""What is promised, whatever fails: each promise once, checked against the books of the API and of the tap.

The words are these. A request is *unknowable* if it was billed and nobody can know it: its answer does not say (a 502),
or had not arrived whole: in a process that lived on, or on the disk where that failed or the process was gone. It is
*unusable* if its whole answer brings no picture. It is *hidden* if it lies on another disk only, and its run ended, or
that disk failed, before the record could say so. Then:

    billed - unknowable - unusable - hidden <= 1

A request is *listed* if the provider's history may be asked, answers, and tells in the end what became of it. It is
none of these three then, whatever has failed here, as its picture can be had there. So where every request that was
billed is listed, or was accepted under an id that is in the record, a picture is billed exactly once:

    billed == 1

A request *may have been billed* in the eyes of the code if it was begun to be sent and no whole answer says otherwise;
and, for those who come after a process that ended or could not reach the archive, if its claim was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from decimal import Decimal
from io import BytesIO

from PIL import Image
from prefect.exceptions import TerminationSignal

from prefect_segmind.archive.record import LEASE_SECONDS
from prefect_segmind.errors import OutcomeUnknownError, SegmindError
from prefect_segmind.limits.ledger import Ledger, Totals
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.pipeline.pipeline import LONGEST_WAIT_SECONDS
from tests.faults.api import PRICE, Seen
from tests.faults.tap import CTRL_C, ENDS, MISTAKE, OUTBOX, SIGTERM, STORE, WIRE, Mistake
from tests.faults.world import FIRST, THEN, World

INJECTED = {MISTAKE: Mistake, CTRL_C: KeyboardInterrupt, SIGTERM: TerminationSignal}


class Books:
    """What the API and the tap know of a walk, without asking the code.

    Attributes:
        billed: The requests that the API has billed.
        unknowable: Those of them of which nobody can know.
        unusable: Those of them whose whole answer brings no picture.
        doubtful: Requests, billed or not, whose outcome the code cannot know.
        unsure: How many claims may stand in the record whose request was never sent, and nobody can know: the process
            was over, a mistake came up on the way to the wire, or the archive was out of reach.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.billed = world.api.billed
        self.unknowable = [each for each in self.billed if not self.is_known(each)]
        self.unusable = [each for each in self.billed if self.is_known(each) and not self._brings_picture(each)]
        known = {each.port for each in world.api.seen if self.is_known(each)}
        self.doubtful = sum(each.sent and not each.asks and each.port not in known for each in world.tap.exchanges)
        self.unsure = sum(
            fault.kind in ENDS
            or (fault.kind == MISTAKE and operation.place == WIRE)
            or (operation.place == STORE and (fault.lasting or len(world.point.faults) > 1))
            for fault, operation in dict(world.tap.struck).items()
        )

    def is_known(self, request: Seen) -> bool:
        """Whether the outcome of a request can be known: it is listed, or its answer says it and has arrived whole."""
        if self._world.api.tells(request) is not None:
            return True
        if not request.answer.is_settled:
            return False
        mine = next(each for each in self._world.tap.exchanges if each.port == request.port)
        if mine.is_damaged or (request.answer.picture is None and mine.is_disturbed):
            return False
        body = request.answer.wire.partition(b"\r\n\r\n")[2]
        at_rest = self._world.at_rest
        moments = [*self._world.tap.looks, at_rest.contents if at_rest else [], self._world.contents()]
        if body and any(each.startswith(body) for contents in moments for each in contents):
            return True
        if (name := request.answer.request_id) and any(
            _has_id(each, name) for contents in moments for each in contents
        ):
            return True
        return mine.received == request.answer.wire and not mine.is_disturbed

    def _brings_picture(self, request: Seen) -> bool:
        """Whether its answer or the history brings its picture."""
        return request.answer.picture is not None or self._world.api.tells(request) == "COMPLETED"

    @property
    def all_listed(self) -> bool:
        """Whether each request that was billed is listed."""
        return all(self._world.api.tells(each) is not None for each in self.billed)

    @property
    def disturbed(self) -> bool:
        """Whether a fault on a machine came between an answer and those who would have read it, or noted it."""
        struck = self._world.tap.struck
        by_mistake = any(fault.kind == MISTAKE for fault, _ in struck)
        # A run that could not ask for what it has submitted, or lost, leaves it to the next one.
        by_outage = any(fault.lasting and operation.place == WIRE for fault, operation in struck)
        if by_outage and (self._world.api.scenario.history == "answers" or self._world.api.is_v2):
            return True
        return by_mistake or any(each.is_disturbed for each in self._world.tap.exchanges)

    @property
    def broken_off(self) -> int:
        """Downloads that the disk or the network has broken off for good, after which the provider was asked again.

        What had come until then, a link or the answer before it, is kept like an answer that cannot be read: only a
        person can judge those.
        """
        struck = self._world.tap.struck
        for_good = any(place.place == OUTBOX or (place.place == WIRE and fault.lasting) for fault, place in struck)
        return int(for_good and (self._world.api.scenario.history == "answers" or self._world.api.is_v2))

    @property
    def hidden(self) -> int:
        """Answers on another disk of which neither the record nor the provider could tell."""
        return 0 if self.all_listed and self._world.api.scenario.history == "answers" else self.untold

    @property
    def untold(self) -> int:
        """Answers that are on another disk only, and of which the record could not be told enough.

        Another machine is to know that they are pictures; one that can read that disk only where they are. One without
        a picture stays there, though that has come from the provider since: nobody who could remove it knows of it.
        """
        then, at_rest = THEN[self._world.point.then], self._world.at_rest
        attempts = at_rest.record.attempts if at_rest and at_rest.record else ()
        told = any(each.kept_picture if then.host != FIRST.host else each.kept for each in attempts)
        return int(then.outbox != FIRST.outbox and bool(self.disturbed or self.unsure) and not told)


def broken(world: World) -> Iterator[str]:
    """The promises that were broken in a world; nothing if all is well."""
    books = Books(world)
    yield from _money(world, books)
    yield from _questions(world, books)
    yield from _endings(world, books)
    yield from _accounts(world, books)
    if (last := world.told[-1].ended) and isinstance(last, ArchivedImage):
        yield from _picture(world, last)
        yield from _record(world, books)
        yield from _outbox(world, books)


def _money(world: World, books: Books) -> Iterator[str]:
    """A picture is paid for once, and once more at most for what nobody can know."""
    allowed = 1 + (len(books.unknowable) + len(books.unusable) + books.hidden) * (world.point.policy == "repay")
    if len(books.billed) > allowed:
        yield f"billed {len(books.billed)} times where {allowed} is the most"
    elif allowed == 1 and len(books.billed) != 1 and isinstance(world.told[-1].ended, ArchivedImage):
        yield f"billed {len(books.billed)} times, and the picture is there"


def _questions(world: World, books: Books) -> Iterator[str]:
    """The history is asked where something is unknown, and only there."""
    answers = [each.answer for each in world.api.seen]
    told = [each.is_settled and "404" not in each.polls and (each.picture or not each.billed) for each in answers]
    if world.api.looks and not world.tap.struck and all(told):
        yield f"the history was asked {world.api.looks} times, and every answer has said it all"


def _endings(world: World, books: Books) -> Iterator[str]:
    """It comes to an end: with the picture, or refused by the policy for a reason; nobody waits longer than a lease."""
    last = world.told[-1].ended
    if isinstance(last, OutcomeUnknownError):
        if world.point.policy == "repay":
            yield f"a new run is refused though it may pay again: {last}"
        elif not (books.doubtful or books.unusable or books.unsure):
            yield f"refused for good though nothing was sent of which the outcome is unknown: {last}"
    elif not isinstance(last, ArchivedImage):
        yield f"no picture in the end: {last!r}"
    for each in world.told:
        if each.waited > LEASE_SECONDS + 2 * LONGEST_WAIT_SECONDS:
            yield f"{each.run} waited {each.waited:.0f} s"
        injected = tuple(INJECTED[kind] for kind in world.point.kinds & set(INJECTED))
        if each.ended is not None and not isinstance(each.ended, (ArchivedImage, SegmindError, *injected)):
            yield f"{each.run} ended with {each.ended!r}"


def _accounts(world: World, books: Books) -> Iterator[str]:
    """Every run tells what it has spent, however it ends; all of them together what the API has billed."""
    ledgers: dict[str, Ledger | None] = {each.flow: each.ledger for each in world.told}
    for each in world.told:
        if each.ledger is None:
            continue
        if each.ledger.in_flight_usd:
            yield f"{each.run}: {each.ledger.in_flight_usd} USD are still reserved"
        if isinstance(each.ended, (SegmindError, ArchivedImage)) and each.accounted is not None:
            sent = each.ended.attempts if isinstance(each.ended, ArchivedImage) else each.ended.requests_sent
            said = Totals(sent, each.ended.cost_usd, each.ended.possibly_billed_usd)
            if said != each.accounted:
                yield f"{each.run} says {said}, its ledger {each.accounted}"
    if None in ledgers.values():
        return  # what a process knew that is gone is told by nobody; the record has it
    totals = Totals()
    for ledger in ledgers.values():
        totals = totals.plus(ledger.totals if ledger else Totals())
    yield from _compared("all runs together tell", totals.cost_usd, totals.possibly_billed_usd, books, books.disturbed)


def _compared(who: str, cost: Decimal, possibly: Decimal, books: Books, disturbed: bool = False) -> Iterator[str]:
    """The amounts are those of the API, to the cent where all is known, and never less than billed.

    A run that something has disturbed on its way from the answer to the outbox tells what it may have cost; the record
    is settled by whoever finds the picture.
    """
    billed = PRICE * len(books.billed)
    known = PRICE * (len(books.billed) - len(books.unknowable))
    if cost + possibly < billed or cost > billed:
        yield f"{who} {cost} + {possibly} USD, the API has billed {billed}"
    elif not (books.doubtful or books.unsure or books.hidden or disturbed) and (cost != known or possibly):
        yield f"{who} {cost} + {possibly} USD, and it is known that {known} were billed"


def _picture(world: World, result: ArchivedImage) -> Iterator[str]:
    """What is archived is a picture that the API has sent, byte for byte, with its sidecar."""
    root = f"{world.store.folder}/"
    found = world.store.get(result.image.removeprefix(root))
    if found is None:
        yield f"{result.image} is not there"
        return
    if found.data not in world.api.pictures:
        yield f"{result.image} is not what the API has sent"
    Image.open(BytesIO(found.data)).load()
    if sha256(found.data) != result.sha256:
        yield "the result names another picture"
    beside = world.store.get(result.sidecar.removeprefix(root))
    if beside is None:
        yield f"{result.sidecar} is not there"
    elif json.loads(beside.data)["output"]["sha256"] != result.sha256:
        yield "the sidecar describes another picture"


def _record(world: World, books: Books) -> Iterator[str]:
    """The record names what is there, has every request that the API has seen, and counts none that was never sent."""
    record = world.record
    if record is None or record.state != "done" or record.holder or record.picture is None:
        yield f"the record is not done: {record}"
        return
    for key in (record.image, record.sidecar):
        if not key or world.store.get(key) is None:
            yield f"the record names {key}, which is not there"
    if len(record.attempts) < len(world.api.seen):
        yield f"the record has {len(record.attempts)} requests, the API has seen {len(world.api.seen)}"
    if any(each.possibly_billed is None for each in record.attempts):
        yield "the record has a request without an outcome"
    possibly = sum(each.possibly_billed is True for each in record.attempts)
    if possibly > books.doubtful + books.unsure + books.hidden:
        yield f"the record counts {possibly} requests as possibly billed, {books.doubtful} of them were sent"
    cost = sum((each.cost_usd or Decimal(0) for each in record.attempts), Decimal(0))
    yield from _compared("the record tells", cost, PRICE * possibly, books)


def _outbox(world: World, books: Books) -> Iterator[str]:
    """Nothing is left in the outboxes but what was paid for and is not the one picture in the archive."""
    record = world.record
    archived = record.picture.sha256 if record and record.picture else ""
    for name in {FIRST.outbox, THEN[world.point.then].outbox}:
        files = world.outbox(name)
        paid = [*world.api.pictures, *(each.answer.wire.partition(b"\r\n\r\n")[2] for each in books.billed)]
        links = [f'"{world.api.link(each)}"'.encode() for each in books.billed]
        others = {
            stem(name)
            for name, data in files.items()
            if sha256(data) != archived and (data in paid or any(each in data for each in links))
        }
        answers = {stem(each) for each in files if each.endswith(".answer")}
        if len(others - answers) > len(books.billed) - 1:
            yield f"{name} still has {len(others)} other pictures"
        if len(answers) > len(books.unusable) + books.doubtful + books.untold + books.broken_off:
            yield f"{name} keeps {len(answers)} answers of {len(books.unusable)} that were unusable"
        left = [each for each in files if stem(each) not in others | answers]
        if world.point.kinds & {*ENDS, MISTAKE}:  # between the removal of a file and that of what describes it
            left = [each for each in left if not each.endswith(".json")]
        if left:
            yield f"{name} still has {left}"


def _has_id(data: bytes, request_id: str) -> bool:
    """Whether a file is a record that has the id of a submitted request."""
    return b'"request_id":"' + request_id.encode() + b'"' in data.replace(b'": "', b'":"')


def stem(name: str) -> str:
    """What the names of a picture or an answer and of all that is kept beside it have in common."""
    return ".".join(name.split(".")[:2])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
