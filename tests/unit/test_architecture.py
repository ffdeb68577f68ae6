"""ARCHITECTURE.md is a true map: its folders are those of the contract, and every file that it names exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The rows of the table below a heading of ARCHITECTURE.md, without its head."""
    below = ARCHITECTURE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in re.findall(r"^\|.*$", below, re.M)[2:]]


def test_the_table_of_folders_is_the_contract_between_them() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = [each["layers"] for each in contracts if each["type"] == "layers"]
    levels: dict[int, set[str]] = {}
    for level, folder, knows in rows("The folders"):
        assert knows
        levels.setdefault(int(level), set()).add(folder.strip("`"))
    assert list(levels) == sorted(levels, reverse=True)
    assert list(levels.values()) == [set(re.split(r" [|:] ", each)) for each in layers]


def test_every_file_that_the_map_names_is_there() -> None:
    named = set(re.findall(r"`([\w/.-]+\.(?:py|md|yaml|toml))`", ARCHITECTURE)) - {
        "failed.yaml"
    }  # which a batch writes
    assert len(named) > 40
    there = [each for each in named if (ROOT / each).is_file() or (ROOT / "prefect_segmind" / each).is_file()]
    assert sorted(named - set(there)) == []


def test_there_are_at_least_ten_typical_changes_each_with_its_file() -> None:
    changes = rows("Where to make a change")
    assert len(changes) >= 10
    for change, begin, _ in changes:
        assert begin.startswith("`") or change == "another message"
