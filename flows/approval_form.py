"""Asking a person before a run pays: the run waits, and shows its plan in the form with which it is resumed.

A run of a deployment is suspended: its process ends, and after the answer another one plans anew. Meanwhile it takes up
neither its worker nor its deployment's concurrency limit. (A paused run loses its slot of that limit, and Prefect ends
it four minutes later.) A run without a deployment pauses in its process. A command asks in its terminal: see
`Listener.ask`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import islice
from typing import Literal
from uuid import UUID

import humanize
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput, read_flow_run_input
from prefect.input.run_input import keyset_from_paused_state
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Paused, Running, Suspended
from pydantic import Field

from prefect_segmind.batch.approval import Approved, Reply, apply_reply, must_ask, within_budget
from prefect_segmind.batch.plan import Plan
from prefect_segmind.errors import ApprovalTimeoutError, ConfigurationError, RunCancelledError, SegmindError
from prefect_segmind.jobs.job import Job
from prefect_segmind.money import usd
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.validate import ValidatedJob
from prefect_segmind.reporting.listener import Question, listener
from prefect_segmind.reporting.markdown import cell, picture, table
from prefect_segmind.services import Services
from prefect_segmind.tasks.run_context import current_flow_run

SHOWN_PROMPTS = 5
SHOWN_SOURCES = 6
LOOKED_THROUGH = 200
"""The first assets of the plan, among which different source images are looked for."""
THUMBNAIL_WIDTH = 150
"""Pixels; two fit beside each other in the form."""
POLL_SECONDS = 5
"""Seconds between two checks for an answer."""


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

    The answer becomes the run's budget, so that it holds even if the archive has changed since the plan.

    Args:
        plan: What the run is going to do.
        entries: The assets of the plan.
        title: The name of the batch for people.
        above_usd: What needs no approval; the setting if None, and if that is None nobody is asked.
        services: The services of the run.
        spent_usd: What earlier tries of the run have spent, or may have: it counts too.

    Returns:
        What the run may spend.

    Raises:
        NotApprovedError: The answer is to stop, or nobody answers in time. Nothing was paid.
        RunCancelledError: The run was cancelled while it waited. Nothing was paid.
        ConfigurationError: Nobody could answer, because there is no Prefect server.
    """
    limit = above_usd if above_usd is not None else services.settings.approve_above_usd
    if limit is None:
        return Approved(plan.budget_usd)
    if not must_ask(spent_usd + plan.planned_usd, limit, plan.most_usd):
        return Approved(within_budget(limit, plan.budget_usd))
    first = list(islice(entries, LOOKED_THROUGH))
    jobs = [each if isinstance(each, Job) else each.job for each in first]
    sources = list(dict.fromkeys(job.image for job in jobs))[:SHOWN_SOURCES]
    prompts = [(job.name, job.prompt) for job in jobs[:SHOWN_PROMPTS]]
    question = Question(title, plan, limit, prompts, sources, services.publish_to)
    reply = listener().ask(question) or _ask_in_prefect(question, services)
    approved = apply_reply(
        reply, planned_usd=plan.planned_usd, above_usd=limit, budget_usd=plan.budget_usd, spent_usd=spent_usd
    )
    get_run_logger().info("approved: up to %s USD", usd(approved.budget_usd or Decimal(0)))
    return approved


def _ask_in_prefect(question: Question, services: Services) -> Reply:
    """Has the flow run wait until somebody answers in Prefect."""
    if not PREFECT_API_URL.value():
        raise ConfigurationError(
            "approve_above_usd: nobody can approve this run without a Prefect server; set PREFECT_API_URL, or give a "
            "higher approve_above_usd"
        )
    seconds, plan, run = services.settings.approval_timeout_seconds, question.plan, current_flow_run()
    deployment = run.deployment_id if run else None
    # An answer is to this plan: one with another number of pictures has another key, and is asked about again.
    key = f"approve-{plan.generate + plan.ask}"
    given = _answered(Suspended(pause_key=key) if deployment else Paused(pause_key=key))
    if given is None:
        get_run_logger().warning(
            "the run may cost %s USD, more than the %s USD that need no approval: it waits until somebody answers "
            "(Resume in the UI), %s at most",
            usd(within_budget(plan.planned_usd, plan.budget_usd)),
            usd(question.above_usd),
            _duration(seconds),
        )
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        waits = {"answer by": f"{until:%Y-%m-%d %H:%M} UTC, in {_duration(seconds)}; then the run fails, unpaid"}
        if deployment:
            with get_client(sync_client=True) as client:
                waits["deployment"] = f"{flow_run.flow_name}/{client.read_deployment(deployment).name}"
        form = Approval.with_initial_data(description=description(question, services.reader, waits))
        if deployment:
            given = suspend_flow_run(wait_for_input=form, timeout=seconds, key=key)
        else:
            given = _pause(form, seconds, key)
    return Reply(given.answer, Decimal(str(given.up_to_usd)) or None)


def _answered(state: State[Approval]) -> Approval | None:
    """The answer that was given before this process began, to a run that was suspended or is retried."""
    answer = read_flow_run_input(keyset_from_paused_state(state)["response"])
    return Approval.model_validate(answer) if answer else None


def _duration(seconds: int) -> str:
    return humanize.precisedelta(seconds, format="%0.0f")


def _pause(form: type[Approval], seconds: int, key: str) -> Approval:
    poll = min(POLL_SECONDS, seconds)
    try:
        return pause_flow_run(wait_for_input=form, timeout=seconds, poll_interval=poll, key=key)
    except FlowPauseTimeout:
        _leave_pause()
        raise ApprovalTimeoutError(
            f"it was not approved: nobody answered within {_duration(seconds)}; nothing was paid"
        ) from None


def _leave_pause() -> None:
    """Sets a run whose pause has timed out to Running, so that it can end with its own message, not the server's.

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
    """The plan in Markdown as the form shows it: the amounts, the first prompts, pictures of the sources.

    Args:
        question: The question, with the plan.
        reader: Reads the source images.
        waits: Until when the run waits and for which deployment, a title and a text for each line.
    """
    plan = question.plan
    pictures = []
    for source in question.sources:
        try:
            pictures.append(picture(cell(source), reader.read(source), THUMBNAIL_WIDTH))
        except (SegmindError, ValueError):
            pictures.append(f"{cell(source)}: cannot be read")
    lines = [
        f"### {cell(question.title)}: {plan.generate} picture{'s' * (plan.generate != 1)}, {usd(plan.planned_usd)} USD",
        "",
        f"More than {usd(question.above_usd)} USD need somebody's approval. Nothing is paid yet.",
        "",
        *table(plan.facts()),
        "",
        # Not in the table, because Prefect's form cuts its long lines off.
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
