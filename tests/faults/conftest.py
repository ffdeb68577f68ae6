"""The count of what was tried, at the end of a run."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.getreports(kind)]
    counts = {name: sum(dict(each.user_properties).get(name, 0) for each in reports) for name in ("points", "runs")}
    if counts["points"]:
        terminalreporter.write_line("every point of failure: {points:,} points, {runs:,} runs".format(**counts))
