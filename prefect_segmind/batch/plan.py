"""The plan of a batch: what each of its jobs needs and what that will cost, before anything is paid."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal
from functools import lru_cache
from itertools import islice
from typing import Literal

from pydantic import BaseModel, ConfigDict

from prefect_segmind.archive.archive import READERS, Archive, Survey
from prefect_segmind.archive.leases import held_elsewhere, held_on_this_host
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.archive.record import Attempt, FlowRuns, OnKept, OnUnknown, Record, Run, Verdict, verdict
from prefect_segmind.errors import SegmindError, SourceImageError
from prefect_segmind.jobs.job import Job
from prefect_segmind.limits.account import BudgetLeft
from prefect_segmind.money import usd
from prefect_segmind.pipeline.look_up import KEPT_REMEDY, kept_elsewhere
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.validate import InspectedSource, ValidatedJob, inspect_source, resolve, with_drawn_seed
from prefect_segmind.storage.spool import Spool

INSPECTORS = 8
"""Threads that read and decode source images; they mostly wait for S3 and the disk."""
LOOK_AHEAD = 64
"""Jobs whose images are read ahead while the plan waits for the first of them."""
KEPT = 10_000
"""Images whose facts are remembered; jobs with the same image mostly follow each other."""
LISTED = 1_000
"""The most jobs, and problems, that a plan names; the others it only counts, as Prefect stores the plan."""
REFUSED = (
    "an earlier request may have been billed without bringing a picture, and another is not allowed: by "
    'on_unknown="fail" (on_unknown="repay" pays once more), or in this flow run (a new one pays once more)'
)
"""The problem of a job that may not be paid for again."""

Need = Literal["generate", "ask", "reuse", "recover", "wait", "kept elsewhere", "fail"]
_NEEDS: dict[Verdict, Need] = {
    Verdict.PAY: "generate",
    Verdict.ASK: "ask",
    Verdict.REUSE: "reuse",
    Verdict.RECOVER: "recover",
    Verdict.WAIT: "wait",
    Verdict.KEPT: "kept elsewhere",
    Verdict.REFUSE: "fail",
}


_FAILING = (Verdict.REFUSE, Verdict.KEPT)


def is_about_payment(problem: str) -> bool:
    """Whether a problem is that a picture is or may be paid for already, and not that its job cannot be used.

    Args:
        problem: The problem of a planned job.
    """
    return problem == REFUSED or problem.endswith(KEPT_REMEDY)


class PlannedJob(BaseModel):
    """What one job of a plan needs.

    Attributes:
        name: The name of the job.
        needs: `generate`: its picture is to be paid for. `ask`: the provider is asked what became of an earlier
            request, and another is paid for only if that brings no picture. `reuse`: it is in the archive, or another
            job of this run makes it. `recover`: it is in the outbox, paid for. `wait`: another run is paying for it.
            `kept elsewhere`: it is paid for and lies in the outbox of another machine; the job will fail, unpaid.
            `fail`: the job will fail, unpaid.
        usd: What this run would pay for it, at most.
        problem: Why it will fail; None if it will not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    needs: Need
    usd: Decimal = Decimal("0.00")
    problem: str | None = None

    def sentence(self) -> str:
        """The job in one line.

        Example:
            >>> PlannedJob(name="mug", needs="generate", usd=Decimal("0.05")).sentence()
            'mug: generate, 0.05 USD'
        """
        most = "at most " if self.needs == "ask" else ""
        details = f", {most}{usd(self.usd)} USD" if self.usd else f", {self.problem}" if self.problem else ""
        return f"{self.name}: {self.needs}{details}"


_KEPT_ANSWER = "was paid for before; its answer is kept in the outbox and read again before anything is paid"

_MAY_BE_PAID_TWICE = 'an earlier request may have been billed, and another is paid for (on_unknown="repay")'

_SAME_BUT_FOR_CASE = (
    "the name is that of another asset but for upper and lower case, which the disk takes for one: both go into one "
    "folder of the archive, and the address of the one published last is that of both"
)


class Plan(BaseModel):
    """What a run of a batch will do and cost.

    Attributes:
        total: Jobs of the manifest.
        generate: Pictures to pay for.
        reuse: Jobs whose picture is in the archive, or is made by another job of this run.
        recover: Pictures that are in the outbox, paid for.
        wait: Pictures that another run is paying for at this moment.
        kept: Jobs that will fail, unpaid, because their picture is paid for and lies in the outbox of another machine.
        ask: Jobs for which the provider is asked what became of an earlier request, before another one is paid for.
        fail: Other jobs that will fail, unpaid: their image cannot be used, or `on_unknown` forbids another payment.
        price_usd: The price of one picture.
        budget_usd: What the run may spend; None for no limit.
        credits_usd: The account's credits; None if they are not known.
        shared: What each budget has left that the run shares with others.
        warnings: The warnings about jobs, each with the number of jobs that it concerns.
        problems: Names and reasons of the first `LISTED` jobs that will fail.
        jobs: What each of the first `LISTED` jobs needs, in their order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    total: int
    generate: int
    reuse: int
    recover: int
    wait: int
    kept: int = 0
    ask: int = 0
    fail: int
    price_usd: Decimal
    budget_usd: Decimal | None = None
    credits_usd: Decimal | None = None
    shared: tuple[BudgetLeft, ...] = ()
    warnings: tuple[tuple[str, int], ...] = ()
    problems: tuple[tuple[str, str], ...] = ()
    jobs: tuple[PlannedJob, ...] = ()

    @property
    def planned_usd(self) -> Decimal:
        """The cost of the pictures to pay for, if the provider has made none of those that it is asked about."""
        return self.price_usd * (self.generate + self.ask)

    @property
    def most_usd(self) -> Decimal | None:
        """What the run may spend at most: its budget or, if less, that of the budgets it shares; None for no limit."""
        limits = [each.limit_usd for each in self.shared]
        return min([*limits, *([] if self.budget_usd is None else [self.budget_usd])], default=None)

    @property
    def planned(self) -> str:
        """The same in words: at most so much, where the provider is asked about earlier requests first."""
        return f"{'at most ' if self.ask else ''}{usd(self.planned_usd)} USD"

    def with_failures(self, problems: Iterable[tuple[str, str]]) -> Plan:
        """The plan with jobs that had failed before it was made; they come first.

        Args:
            problems: Their names and reasons.
        """
        more = tuple(problems)
        failing = (PlannedJob(name=name, needs="fail", problem=problem) for name, problem in more)
        changes = {
            "total": self.total + len(more),
            "fail": self.fail + len(more),
            "problems": (*more, *self.problems)[:LISTED],
            "jobs": (*failing, *self.jobs)[:LISTED],
        }
        return self.model_copy(update=changes)

    def without(self, in_place: int, skipped: Collection[str]) -> Plan:
        """The plan without jobs that are left out.

        Args:
            in_place: The number of those whose picture is in the archive.
            skipped: The names of those that are known to fail.
        """
        changes = {
            "total": self.total - in_place - len(skipped),
            "reuse": self.reuse - in_place,
            "fail": self.fail - len(skipped),
            "problems": tuple(each for each in self.problems if each[0] not in skipped),
            "jobs": tuple(each for each in self.jobs if each.name not in skipped),
        }
        return self.model_copy(update=changes)

    def facts(self) -> dict[str, str]:
        """The plan for people: a title and a text for each line."""
        facts = {
            "plan": f"{self.total} asset{'s' * (self.total != 1)}",
            "generate": f"{self.generate}, {usd(self.price_usd * self.generate)} USD at {usd(self.price_usd)} USD each",
        }
        asking = "the provider is asked first what became of earlier requests"
        details = (
            ("ask about", self.ask, f"at most {usd(self.price_usd * self.ask)} USD: {asking}"),
            ("reuse", self.reuse, "in the archive or made by another asset of this run"),
            ("recover", self.recover, "paid for and waiting in the outbox"),
            ("wait", self.wait, "another run is paying for them"),
            ("kept elsewhere", self.kept, "paid for and in the outbox of another machine, nothing is paid for them"),
            ("fail", self.fail, "nothing is paid for them"),
        )
        facts |= {title: f"{count}, {text}" for title, count, text in details if count}
        amounts = {"budget": self.budget_usd, "credits": self.credits_usd}
        facts |= {each.title: each.sentence() for each in self.shared}
        return facts | {title: f"{usd(amount)} USD" for title, amount in amounts.items() if amount is not None}

    def shortfalls(self) -> list[str]:
        """A warning for each budget and one for the credits, if the plan costs more."""
        limits = (
            ("the budget of {} USD pays", self.budget_usd),
            *((f"the {each.title} has {{}} USD left, which pays", each.left_usd) for each in self.shared),
            ("the account's credits of {} USD pay", self.credits_usd),
        )
        return [
            f"the plan costs {self.planned}, {what.format(usd(limit))} for {int(limit / self.price_usd)} of "
            f"{self.generate + self.ask} pictures: the run stops {'if that is spent' if self.ask else 'there'}"
            for what, limit in limits
            if limit is not None and self.planned_usd > limit
        ]


def make_plan(
    jobs: Spool[Job],
    entries: Spool[Job | ValidatedJob],
    *,
    reader: SourceReader,
    archive: Archive,
    outbox: Outbox,
    price_usd: Decimal,
    on_unknown: OnUnknown = "repay",
    on_kept: OnKept = "wait",
    can_ask: Callable[[Attempt, Run], bool] = lambda *_: False,
    in_place: bytearray | None = None,
    leave_out: bool = False,
    flow_runs: FlowRuns = (),
    call: str = "",
    unusable: dict[str, str] | None = None,
    folds_case: bool = False,
    unseen: set[str] | None = None,
) -> Plan:
    """Inspects the images of all jobs, each image once, and looks up what is paid for by listing the archive.

    Args:
        jobs: The jobs.
        entries: Receives the jobs in their order, validated; one that will fail is added as it is, a random seed drawn.
        reader: Reads the source images.
        archive: The archive, with the records.
        outbox: The outbox, with pictures that are not archived yet.
        price_usd: The price of a picture.
        on_unknown: Whether a picture is paid for again where an earlier request may have been billed.
        on_kept: Whether a picture is paid for again that is paid for and lies in an outbox out of reach.
        can_ask: Whether the provider can be asked what became of a request.
        in_place: Receives for each job, in their order, 1 if its picture is archived under the very name that is asked
            for and nothing of it is in the outbox, else 0: nothing is left to pay or to archive for it.
        leave_out: Whether the plan does not list those jobs.
        flow_runs: The flow run that is planned for, which may have sent requests before.
        call: Its name in all its tries, and in those of the flow runs around it, by which its seeds are drawn.
        unusable: Receives name and reason of each job whose image cannot be used as it is, but not of those whose image
            cannot be read at this moment.
        folds_case: Whether the pictures are published where names that differ only in case are one.
        unseen: Receives the fingerprints of the pictures to pay for of which neither archive nor outbox has anything.

    Returns:
        The plan.

    Raises:
        StoreError: The archive cannot be listed or read.
    """
    wanted: Counter[str] = Counter()
    earlier: dict[str, str] = {}
    warnings: Counter[str] = Counter()
    problems: list[tuple[str, str]] = []
    draw_by = f"{call} " if call else None
    one_case, folded_names = folds_case or archive.store.folds_case, set[str]()
    for job, found in _inspected(jobs, reader):
        drawn = with_drawn_seed(job, draw_by and draw_by + job.name)
        try:
            if isinstance(found, SegmindError):
                raise type(found)(str(found))
            entry = resolve(drawn, found, price_usd=price_usd)
            archive.check_name(entry.name, entry.fingerprint)
        except SegmindError as error:
            if unusable is not None and isinstance(error, SourceImageError):
                unusable[job.name] = str(error)
            if len(problems) < LISTED:
                problems.append((job.name, str(error)))
            entries.append(drawn)
        else:
            wanted[entry.fingerprint] += 1
            earlier |= {was.fingerprint: entry.fingerprint for was in entry.earlier}
            if len(warnings) < 1000:
                warnings.update(entry.warnings)
            if one_case:
                folded = entry.name.casefold()
                warnings[_SAME_BUT_FOR_CASE] += folded in folded_names
                folded_names.add(folded)
            entries.append(entry)
    needs = Counter({Verdict.REFUSE: len(jobs) - wanted.total()})  # those that cannot be validated
    survey = archive.survey(wanted.keys() | earlier.keys())
    kept = outbox.fingerprints()
    unread = outbox.unread()
    is_in_place = bytes(_in_place(entries, survey, kept | unread)) if in_place is not None or leave_out else b""
    if in_place is not None:
        in_place += is_in_place
    known_as: dict[str, str] = {}  # what earlier versions have paid for under another fingerprint
    for before, now in earlier.items():
        if now in wanted and now not in survey.recorded | kept and before in survey.recorded | kept:
            wanted[before] += wanted.pop(now)
            known_as[now] = before
    survey = survey._replace(recorded=survey.recorded & wanted.keys(), archived=survey.archived & wanted.keys())
    unread = unread & wanted.keys() - survey.archived - kept
    kept |= {each for each in unread if outbox.is_readable(each)}
    if unread := unread - kept:  # no link is followed here: what it would cost to pay again is in the plan
        warnings[_KEPT_ANSWER] += sum(wanted[each] for each in unread)
    out_of_reach: dict[str, str] = {}
    doubted = set[str]()

    def look(fingerprint: str) -> tuple[str, Verdict]:
        found = archive.read(fingerprint)
        record = found.record if found else None
        need = verdict(
            record,
            run=Run("", flow_runs),
            in_outbox=(fingerprint in kept or _within_reach(outbox, record))
            and not held_on_this_host(archive, found, ""),
            held_elsewhere=held_elsewhere(archive, found, ""),
            on_unknown=on_unknown,
            on_kept=on_kept,
            unreadable=fingerprint in unread,
            can_ask=lambda attempt: can_ask(attempt, Run("")),
        )
        if need is Verdict.KEPT and record and record.kept_picture:
            out_of_reach[fingerprint] = record.kept_picture
        if (
            need is Verdict.PAY
            and record
            and fingerprint not in unread
            and any(each.in_doubt for each in record.attempts)
        ):
            doubted.add(fingerprint)
        return fingerprint, need

    verdicts = dict.fromkeys(survey.archived, Verdict.REUSE)
    for new in wanted.keys() - survey.recorded:
        refused = new in unread and on_unknown == "fail"
        verdicts[new] = Verdict.RECOVER if new in kept else Verdict.REFUSE if refused else Verdict.PAY
    if unseen is not None:
        beside = {place[-16:] for place in survey.places}  # a sidecar whose record somebody has removed
        to_pay = (each for each, need in verdicts.items() if need is Verdict.PAY and each not in unread)
        unseen |= {each for each in to_pay if each[:16] not in beside}
    with ThreadPoolExecutor(READERS, thread_name_prefix="segmind-plan") as pool:
        verdicts |= pool.map(look, survey.recorded - survey.archived)
    if doubted:
        warnings[_MAY_BE_PAID_TWICE] += sum(wanted[each] for each in doubted)
    for fingerprint, need in verdicts.items():
        needs[need] += 1
        # The other jobs for the same picture find it archived.
        needs[need if need in _FAILING else Verdict.REUSE] += wanted[fingerprint] - 1
    verdicts |= {now: verdicts[before] for now, before in known_as.items()}
    out_of_reach |= {now: out_of_reach[before] for now, before in known_as.items() if before in out_of_reach}
    left = (each for position, each in enumerate(entries) if not (leave_out and is_in_place[position]))
    unusable_jobs = [*problems]
    listed = tuple(_listed(islice(left, LISTED), verdicts, unusable_jobs, out_of_reach, price_usd))
    problems += [(each.name, each.problem) for each in listed if each.problem and is_about_payment(each.problem)]
    return Plan(
        total=len(jobs),
        generate=needs[Verdict.PAY],
        reuse=needs[Verdict.REUSE],
        recover=needs[Verdict.RECOVER],
        wait=needs[Verdict.WAIT],
        kept=needs[Verdict.KEPT],
        ask=needs[Verdict.ASK],
        fail=needs[Verdict.REFUSE],
        price_usd=price_usd,
        warnings=tuple((+warnings).most_common(10)),
        problems=tuple(problems[:LISTED]),
        jobs=listed,
    )


def _in_place(entries: Iterable[Job | ValidatedJob], survey: Survey, in_outbox: Collection[str]) -> Iterator[bool]:
    """For each job, whether its picture is archived under the very name, and nothing of it is in the outbox."""
    for each in entries:
        yield isinstance(each, ValidatedJob) and any(
            known.fingerprint in survey.archived and known.fingerprint not in in_outbox and known.place in survey.places
            for known in each.known_as
        )


def _within_reach(outbox: Outbox, record: Record | None) -> bool:
    """Whether the picture lies in another outbox that its record names and this machine can read."""
    if record is None or not record.kept_picture:
        return False
    places = (each.kept_picture for each in record.attempts if each.kept_picture)
    return outbox.reaching(record.fingerprint, places) != outbox


def earlier_tries(archive: Archive, fingerprints: Iterable[str], flow_runs: FlowRuns) -> dict[str, Record]:
    """The records of pictures for which earlier tries of a flow run have sent requests; none is read in the first try.

    Args:
        archive: The archive, with the records.
        fingerprints: The fingerprints of the pictures; not looked through in the first try.
        flow_runs: The flow run.

    Returns:
        The records by fingerprint.

    Raises:
        StoreError: A record cannot be read.
    """
    if all(number == 1 for _, number in flow_runs):
        return {}
    run = Run("", flow_runs)
    with ThreadPoolExecutor(READERS, thread_name_prefix="segmind-plan") as pool:
        records = [found.record for found in pool.map(archive.read, set(fingerprints)) if found]
    return {
        record.fingerprint: record for record in records if any(run.follows(each.flow_runs) for each in record.attempts)
    }


def _listed(
    entries: Iterable[Job | ValidatedJob],
    verdicts: Mapping[str, Verdict],
    problems: Iterable[tuple[str, str]],
    out_of_reach: Mapping[str, str],
    price_usd: Decimal,
) -> Iterator[PlannedJob]:
    """What each of the first jobs needs; of several for the same picture, the first one pays for it.

    Args:
        entries: The jobs; each one that is not validated has the next of the problems.
        verdicts: What is to be done for each picture.
        problems: Names and reasons of the jobs that cannot be validated, in their order.
        out_of_reach: Where each picture is kept that is kept elsewhere.
        price_usd: The price of one picture.
    """
    why, taken = iter(problems), set[str]()
    for each in entries:
        if isinstance(each, Job):
            yield PlannedJob(name=each.name, needs="fail", problem=next(why)[1])
            continue
        need, problem = _NEEDS[verdicts[each.fingerprint]], None
        if need == "fail":
            problem = REFUSED
        elif need == "kept elsewhere":
            problem = f"{kept_elsewhere(each.name, out_of_reach[each.fingerprint])}; {KEPT_REMEDY}"
        elif each.fingerprint in taken:
            need = "reuse"
        usd_now = price_usd if need in ("generate", "ask") else Decimal("0.00")
        yield PlannedJob(name=each.name, needs=need, usd=usd_now, problem=problem)
        taken.add(each.fingerprint)


def _inspected(jobs: Spool[Job], reader: SourceReader) -> Iterator[tuple[Job, InspectedSource | SegmindError]]:
    """Each job with what its image is, or why it cannot be used, in their order; the images are read in parallel."""
    waiting: deque[tuple[Job, Future[InspectedSource | SegmindError]]] = deque()

    def look(image: str, allow_extreme_ratio: bool) -> InspectedSource | SegmindError:
        try:
            return inspect_source(image, reader, allow_extreme_ratio=allow_extreme_ratio)
        except SegmindError as error:  # a copy, as its traceback would keep the image's bytes alive
            return (SourceImageError if isinstance(error, SourceImageError) else SegmindError)(str(error))

    with ThreadPoolExecutor(INSPECTORS, thread_name_prefix="segmind-plan") as pool:

        @lru_cache(maxsize=KEPT)
        def submit(image: str, allow_extreme_ratio: bool) -> Future[InspectedSource | SegmindError]:
            return pool.submit(look, image, allow_extreme_ratio)

        for job in jobs:
            waiting.append((job, submit(job.image, job.allow_extreme_ratio)))
            if len(waiting) > LOOK_AHEAD:
                first, source = waiting.popleft()
                yield first, source.result()
        for job, source in waiting:
            yield job, source.result()
