"""The question of a batch, its progress and its facts in a terminal: any name and any text is shown as it is."""

from __future__ import annotations

import io
import sys
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from prefect_segmind.batch.plan import Plan
from prefect_segmind.batch.tally import Progress
from prefect_segmind.cli.listeners import BatchRun, live
from prefect_segmind.cli.terminal import print_facts
from prefect_segmind.reporting.listener import Question
from prefect_segmind.text import visible

NASTY = (
    "a[/]",
    "[red]",
    "[bold",
    "[/red]",
    ":warning:",
    "`x`",
    "<script>",
    "{name}",
    "%s",
    "x" * 300,
    "mug\u202egpj",
    "\x1b[2J",
)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1) | st.sampled_from(NASTY)
PLAN = Plan(total=2, generate=2, reuse=0, recover=0, wait=0, fail=0, price_usd=Decimal("0.05"))


def screen() -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=True, width=100, color_system=None), written


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=TEXTS, prompt=TEXTS)
def test_the_question_shows_any_name_and_prompt_literally(
    name: str, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, written = screen()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(console, "input", lambda line: written.write(line) and "yes")
    question = Question(name, PLAN, Decimal("0.01"), [(name, prompt)], [name], "/live")
    run = BatchRun(console, yes=False)
    with run.bar:
        assert run.ask(question).answer == "go on"
    assert f"asset {visible(name)}  {visible(prompt)}\n" in written.getvalue()
    assert "Continue? \\[yes/no/limit in USD]" in written.getvalue()


@settings(deadline=None)
@given(TEXTS)
def test_the_live_line_and_the_facts_show_any_text_literally(text: str) -> None:
    console, written = screen()
    with live(console, text):
        pass
    print_facts(console, {text: text})
    assert f"{visible(text)}  {visible(text)}\n" in written.getvalue()


def test_the_progress_shows_its_numbers() -> None:
    console, written = screen()
    run = BatchRun(console, yes=False)
    with run.bar:
        run.progressed(Progress(3, Counter(generated=1, failed=1), Decimal("0.05"), 1.0))
    assert "2/3: 0 reused, 1 failed, 0.05 USD" in written.getvalue()
    console, written = screen()
    run = BatchRun(console, yes=False)
    with run.bar:
        run.progressed(Progress(3, Counter(generated=1, failed=1, submitted=1), Decimal("0.05"), 1.0))
    assert "2/3: 0 reused, 1 failed, 1 submitted" in written.getvalue()
