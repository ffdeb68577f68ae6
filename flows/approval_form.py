"""Asking a person before a run pays: the run waits, and shows its plan in the form with which it is resumed.

A run of a deployment is suspended: its process ends, and after the answer another one plans anew. It keeps no place of
its worker and none of its deployment's concurrency limit, which Prefect takes from a paused run (and then ends it, four
minutes later). A run without a deployment pauses where it is. A command asks in its terminal: see `Listener.ask`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import islice
from typing import Literal
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput, read_flow_run_input
from prefect.input.run_input import keyset_from_paused_state
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Paused, Running, Suspended
from pydantic import Field

from prefect_segmind.batch.approval import Approved, Reply, apply_reply, must_ask
from prefect_segmind.batch.plan import Plan
from prefect_segmind.errors import ApprovalTimeoutError, ConfigurationError, RunCancelledError, SegmindError
from prefect_segmind.jobs.job import Job
from prefect_segmind.money import usd
from prefect_segmind.pipeline.source import SourceReader, UnreadableSource
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.reporting.listener import Question, listener
from prefect_segmind.reporting.markdown import cell, picture, table
from prefect_segmind.services import Services

SHOWN_PROMPTS = 5
SHOWN_SOURCES = 6
LOOKED_THROUGH = 200
"""Assets of the plan that are looked through for different source images."""
THUMBNAIL_WIDTH = 150
"""Pixels; two fit beside each other in the form."""
POLL_SECONDS = 5
"""Seconds between looks whether somebody has answered."""


class Approval(RunInput):
    """The form in which a person answers."""

    answer: Literal["go on", "trim", "stop"] = Field(
        description="go on: pay for the plan. trim: spend no more than the amount below. stop: pay nothing."
    )
    up_to_usd: float = Field(
        default=0, ge=0, description="With trim: what the run may spend, in USD. 0 for what needs no approval."
    )


def approve(
    plan: Plan,
    entries: Iterable[Job | ValidatedJob],
    title: str,
    above_usd: Decimal | None,
    services: Services,
    spent_usd: Decimal = Decimal(0),
) -> Approved:
    """Asks a person if a plan may cost more than what needs no approval, and waits for the answer.

    What nobody has approved is not paid, even if the world has changed since the plan: the limit is the run's budget.

    Args:
        plan: What the run is going to do.
        entries: Its assets.
        title: What the run is of.
        above_usd: What needs no approval; the setting if None, and if that is None nobody is asked.
        services: The run's.
        spent_usd: What earlier tries of the run have spent or may have, which counts.

    Raises:
        NotApprovedError: The answer is to stop, or nobody answers in time. Nothing was paid.
        RunCancelledError: The run was cancelled while it waited. Nothing was paid.
        ConfigurationError: Nobody could answer, for there is no Prefect server.
    """
    limit = above_usd if above_usd is not None else services.settings.approve_above_usd
    if limit is None:
        return Approved(plan.budget_usd)
    if not must_ask(spent_usd + plan.planned_usd, limit, plan.budget_usd):
        return Approved(limit if plan.budget_usd is None else min(limit, plan.budget_usd))
    first = list(islice(entries, LOOKED_THROUGH))
    jobs = [each if isinstance(each, Job) else each.job for each in first]
    sources = list(dict.fromkeys(job.image for job in jobs))[:SHOWN_SOURCES]
    prompts = [(job.name, job.prompt) for job in jobs[:SHOWN_PROMPTS]]
    question = Question(title, plan, limit, prompts, sources, services.publish_to)
    approved = apply_reply(
        listener().ask(question) or _ask_in_prefect(question, services),
        planned_usd=plan.planned_usd,
        above_usd=limit,
        budget_usd=plan.budget_usd,
        spent_usd=spent_usd,
    )
    get_run_logger().info("approved: up to %s USD", usd(approved.budget_usd or Decimal(0)))
    return approved


def _ask_in_prefect(question: Question, services: Services) -> Reply:
    """Has the flow run wait until somebody answers in Prefect."""
    if not PREFECT_API_URL.value():
        raise ConfigurationError(
            "approve_above_usd: nobody can approve this run, for it has no Prefect server; set PREFECT_API_URL, or "
            "give a higher approve_above_usd"
        )
    seconds, plan, context = services.settings.approval_timeout_seconds, question.plan, FlowRunContext.get()
    run = context.flow_run if context else None
    # An answer is to this plan: with another number of pictures the key is another one, and it is asked again.
    key = f"approve-{plan.generate}"
    deployed = run is not None and run.deployment_id is not None
    given = _answered(Suspended(pause_key=key) if deployed else Paused(pause_key=key))
    if given is None:
        get_run_logger().warning(
            "the run may cost %s USD, more than the %s USD that need no approval: it waits until somebody answers "
            "(Resume in the UI), %s at most",
            usd(plan.planned_usd if plan.budget_usd is None else min(plan.planned_usd, plan.budget_usd)),
            usd(question.above_usd),
            in_words(seconds),
        )
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        waits = {"answer by": f"{until:%Y-%m-%d %H:%M} UTC, in {in_words(seconds)}; then the run fails, unpaid"}
        if run is not None and run.deployment_id is not None:
            waits["deployment"] = f"{flow_run.flow_name}/{_deployment_name(run.deployment_id)}"
        form = Approval.with_initial_data(description=description(question, services.reader, waits))
        given = (
            suspend_flow_run(wait_for_input=form, timeout=seconds, key=key) if deployed else _pause(form, seconds, key)
        )
    return Reply(given.answer, Decimal(str(given.up_to_usd)) or None)


def _answered(state: State[Approval]) -> Approval | None:
    """What was answered before this process began: a run that was suspended begins anew, and one that is retried."""
    answer = read_flow_run_input(keyset_from_paused_state(state)["response"])
    return Approval.model_validate(answer) if answer else None


def _deployment_name(deployment: UUID) -> str:
    with get_client(sync_client=True) as client:
        return client.read_deployment(deployment).name


def in_words(seconds: int) -> str:
    """A time as people say it.

    Example:
        >>> in_words(43200), in_words(90), in_words(90061)
        ('12 hours', '1 minute 30 seconds', '1 day 1 hour 1 minute 1 second')
    """
    parts: list[str] = []
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count} {unit}{'s' * (count != 1)}")
    return " ".join(parts) or "0 seconds"


def _pause(form: type[Approval], seconds: int, key: str) -> Approval:
    poll = min(POLL_SECONDS, seconds)
    try:
        return pause_flow_run(wait_for_input=form, timeout=seconds, poll_interval=poll, key=key)
    except FlowPauseTimeout:
        _leave_pause()
        raise ApprovalTimeoutError(
            f"it was not approved: nobody answered within {in_words(seconds)}; nothing was paid"
        ) from None


def _leave_pause() -> None:
    """Has a run whose pause has timed out run again, for from there the server lets it end in its words only.

    Raises:
        RunCancelledError: Somebody has cancelled it meanwhile, which a paused run does not notice.
    """
    with get_client(sync_client=True) as client:
        run = UUID(str(flow_run.id))
        state = client.read_flow_run(run).state
        if state is not None and (state.is_cancelling() or state.is_cancelled()):
            raise RunCancelledError("the run was cancelled in Prefect; nothing was paid")
        client.set_flow_run_state(run, Running(), force=True)


def description(question: Question, reader: SourceReader, waits: Mapping[str, str] | None = None) -> str:
    """The plan as the form shows it, in markdown: the amounts, the first prompts, pictures of the sources.

    Args:
        question: What is asked.
        reader: Reads the source images.
        waits: How the run waits, a title and a text for each line.
    """
    plan = question.plan
    pictures = []
    for source in question.sources:
        try:
            pictures.append(picture(cell(source), reader.read(source), THUMBNAIL_WIDTH))
        except (SegmindError, UnreadableSource, ValueError):
            pictures.append(f"{cell(source)}: cannot be read")
    lines = [
        f"### {cell(question.title)}: {plan.generate} picture{'s' * (plan.generate != 1)}, {usd(plan.planned_usd)} USD",
        "",
        f"More than {usd(question.above_usd)} USD need somebody's approval. Nothing is paid yet.",
        "",
        *table(plan.facts()),
        "",
        # Not in the table, whose long lines Prefect's form cuts off.
        *(f"- {title}: {cell(text)}" for title, text in {"goes live": question.goes_live(), **(waits or {})}.items()),
        *(f"\n- {cell(each)}" for each in plan.shortfalls()),
        "",
        *(f"- **{cell(name)}**: {cell(prompt[:300])}" for name, prompt in question.prompts),
        *([f"- and {plan.total - len(question.prompts)} more"] if plan.total > len(question.prompts) else ()),
        "",
        "| sources | |",
        "| --- | --- |",
        *(f"| {' | '.join(pictures[at : at + 2])} |" for at in range(0, len(pictures), 2)),
    ]
    return "\n".join(lines)
