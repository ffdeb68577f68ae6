"""The house and the package: arrows point down, and the wheel holds everything and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr

import prefect_segmind
from prefect_segmind.cli import output
from prefect_segmind.sandbox import Sandbox
from tests.support import environment

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "prefect_segmind"


def test_importing_the_package_is_quick_and_loads_names_when_they_are_used() -> None:
    code = "import sys, prefect_segmind as p; print('prefect' in sys.modules, p.Job.__name__, 'boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Job", "False"]


def fresh(*command: str) -> str:
    """What a new process prints that speaks to the server of this session."""
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prefect_finds_the_block_by_the_entry_point_before_anything_of_the_package_is_used() -> None:
    code = """
import sys
from prefect.blocks.core import Block
from prefect.plugins import load_prefect_collections
assert "prefect_segmind" not in sys.modules
print(load_prefect_collections()["prefect_segmind"])
print(Block.get_block_class_from_key("segmind-credentials").__name__, "boto3" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Warning" not in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["SegmindCredentials", "False"]


@pytest.mark.usefixtures("prefect_server")
def test_a_saved_block_is_loaded_in_a_process_that_has_not_used_the_package() -> None:
    prefect_segmind.SegmindCredentials(api_key=SecretStr("SG_0123456789abcdef")).save(name := f"fresh-{uuid4()}")
    code = """
import sys
from prefect.blocks.core import Block
print(Block.load(f"segmind-credentials/{sys.argv[1]}").api_key.get_secret_value())
"""
    assert fresh("-c", code, name).split() == ["SG_0123456789abcdef"]


@pytest.mark.usefixtures("prefect_server")
def test_the_command_of_the_docs_puts_the_block_into_the_catalogue() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^prefect (block register .+)$", page, re.M)
    assert "Segmind Credentials" in fresh("-m", "prefect", *command.split())
    assert "segmind-credentials" in fresh("-m", "prefect", "block", "type", "ls")


def test_every_public_name_is_there() -> None:
    for name in prefect_segmind.__all__:
        assert getattr(prefect_segmind, name)
    assert set(prefect_segmind.__all__) == set(dir(prefect_segmind))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = prefect_segmind.no_such_name


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(line.startswith("#") or line.count("==") == 1 for line in lines)
    assert not any("://" in line or "@" in line for line in lines)


@pytest.mark.slow
def test_wheel_and_sdist_hold_everything_and_nothing_else() -> None:
    built = environment.built()
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.glob("**/*.py")} | {"prefect_segmind/py.typed"}
    modules |= {
        f"prefect_segmind/{each}/{path.name}" for each in ("flows", "tasks") for path in (ROOT / each).glob("*.py")
    }
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == modules
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    for name in (
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        ".pre-commit-config.yaml",
        "docs/paying-once.md",
        "flows/image_to_image.py",
        "tasks/retry_delays.py",
        "tests/conftest.py",
    ):
        assert name in held
    assert "deployments/prefect.yaml" in held


def of_the_wheel(command: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the wheel's environment, far from the checkout, so that it is the wheel that it imports."""
    return subprocess.run(
        [str(environment.installed() / "bin" / command), *arguments],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))} | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
@pytest.mark.timeout(840)
def test_the_wheel_works_with_the_newest_of_everything_that_it_needs(tmp_path: Path) -> None:
    code = """
import importlib.util
from prefect.blocks.core import Block
from prefect.plugins import load_prefect_collections
assert Block.get_block_class_from_key("segmind-credentials")
import prefect_segmind, prefect_segmind.flows, prefect_segmind.tasks
assert importlib.util.find_spec("flows") is None and importlib.util.find_spec("tasks") is None
assert "prefect_segmind" in load_prefect_collections()
print(prefect_segmind.__version__, prefect_segmind.image_to_image.name)
"""
    done = of_the_wheel("python", "-c", code, cwd=tmp_path)
    assert done.stdout.split() == [prefect_segmind.__version__, "image-to-image"], done.stderr


@pytest.mark.slow
@pytest.mark.timeout(840)
def test_the_demo_of_the_wheel_shows_a_refusal_a_lost_answer_and_that_its_picture_is_paid_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL")  # Prefect starts a temporary server
    done = of_the_wheel("prefect-segmind", "demo", cwd=tmp_path, PREFECT_HOME=str(tmp_path / "prefect"))
    assert done.returncode == 0, done.stderr
    assert "the API answered 429" in done.stderr
    assert "the API answered 502" in done.stderr
    facts = dict(
        re.findall(r"^ *(before|after|sidecar|first run|second run|ledger|in the UI)  (.*)$", done.stdout, re.M)
    )
    assert Path(facts["before"]).is_file()
    assert Path(facts["after"]).is_file()
    assert json.loads(Path(facts["sidecar"]).read_text())["cost_usd"] == "0.05"
    assert facts["first run"].startswith("generated after 2 requests, paid 0.05 USD")
    assert facts["second run"] == "reused, paid 0.00 USD"
    assert facts["ledger"] == "the sandbox billed 1 picture, 0.05 USD"
    assert re.search(r"http://127.0.0.1:4200/runs/flow-run/[0-9a-f-]{36}", facts["in the UI"])


@pytest.mark.slow
@pytest.mark.timeout(840)
@pytest.mark.usefixtures("prefect_server")
def test_the_commands_of_the_wheel_work(sandbox: Sandbox, photo: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> tuple[int, dict[str, Any]]:
        done = of_the_wheel("prefect-segmind", *arguments, "--json", cwd=tmp_path)
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout)

    code, found = command("generate", str(photo), "a red mug", "--style-type", "DESIGN", "--seed", "4711")
    assert (code, found["status"], found["seed"], found["cost_usd"]) == (0, "generated", 4711, "0.05")
    code, found = command("generate", str(photo), "a red mug", "--style-type", "realistic")
    assert (code, found["status"]) == (output.BAD_INPUT, "failed")
    assert "Did you mean REALISTIC?" in found["error"]
    rows = "".join(f"mug/{n},{photo.name},{{{{ colour }}}} mug {n}\n" for n in range(2))
    (tmp_path / "campaign.csv").write_text("name,image,prompt\n" + rows)
    code, found = command("refresh", "campaign.csv", "--set", "colour=blue", "--publish-to", str(tmp_path / "live"))
    assert (code, found["generated"], found["failures"], found["cost_usd"]) == (0, 2, [], "0.10")
    assert (tmp_path / "live" / "mug" / "1.png").is_file()
    checked = of_the_wheel("prefect-segmind", "check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    assert sandbox.ledger.billed == 3
