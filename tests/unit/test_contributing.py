"""The hooks and forms for contributors work: tools exist, nothing is downloaded, GitHub has what it asks for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def hooks() -> list[dict[str, Any]]:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in repos] == ["local"], "nothing is downloaded"
    return [hook for repo in repos for hook in repo["hooks"]]


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook["id"])
def test_each_hook_runs_a_tool_of_the_environment_that_make_check_runs(hook: dict[str, Any]) -> None:
    assert hook["language"] == "system"
    tool, *arguments = hook["entry"].split()
    assert tool.startswith(".venv/bin/")
    name = tool.removeprefix(".venv/bin/")
    assert shutil.which(name, path=str(Path(sys.executable).parent))
    command = " ".join([name, *(each for each in arguments if each != "--force-exclude")])
    assert f"$(BIN)/{command}" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name
)
def test_an_issue_form_has_what_github_asks_for(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    kinds = {"markdown": "value", "textarea": "label", "input": "label"}
    ids = [each["id"] for each in form["body"] if each["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    for each in form["body"]:
        assert each["attributes"][kinds[each["type"]]]
