"""The benchmark runs the command, on a Prefect server of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark reads /proc")
def test_the_smallest_batch_is_measured_with_its_requests_its_memory_and_the_servers_cpu(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    command = [sys.executable, "-m", "benchmarks.bench", "--cell", "6,3,0.1,s3", "--by", "ours", "--output", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = re.findall(r"^\| 6 \| 3 \| 0.1 s \| s3 \| prefect-segmind refresh \|(.*) \|$", table.read_text(), re.M)
    cells = [each.strip() for each in row.split("|")]
    _, _, first_post, whole, cpu, without_start, server_cpu, s3_requests, memory = cells
    assert 0 < number(first_post) < number(whole)
    assert 0 < number(without_start) < number(cpu)
    assert number(server_cpu) > 0
    assert "PUT" in s3_requests
    assert number(memory) > 50


def number(cell: str) -> float:
    """The number in a cell of the table, whatever its unit."""
    return float(cell.split()[0])
