"""The house and the package: arrows point down, and the wheel holds everything and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL
from pydantic import SecretStr

import prefect_segmind

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "prefect_segmind"


def test_importing_the_package_is_quick_and_loads_names_when_they_are_used() -> None:
    code = "import sys, prefect_segmind as p; print('prefect' in sys.modules, p.Job.__name__, 'boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Job", "False"]


def fresh(*command: str) -> str:
    """What a new process prints that speaks to the server of this session."""
    api = {"PREFECT_API_URL": str(PREFECT_API_URL.value()), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **api}, capture_output=True, text=True, timeout=200
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
    prefect_segmind.SegmindCredentials(api_key=SecretStr("SG_0123456789abcdef")).save("fresh", overwrite=True)
    code = """
from prefect.blocks.core import Block
print(Block.load("segmind-credentials/fresh").api_key.get_secret_value())
"""
    assert fresh("-c", code).split() == ["SG_0123456789abcdef"]


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


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel and an sdist, the wheel made from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_wheel_and_sdist_hold_everything_and_nothing_else(built: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.timeout(840)
def test_the_wheel_works_with_the_newest_of_everything_that_it_needs(built: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    binaries = home / ("Scripts" if os.name == "nt" else "bin")
    wheel = next(built.glob("*.whl"))
    pip = [str(binaries / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"{wheel}[sandbox]"], check=True, cwd=tmp_path)
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
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    done = subprocess.run(
        [str(binaries / "python"), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [prefect_segmind.__version__, "image-to-image"], done.stderr
    demo = subprocess.run(
        [str(binaries / "prefect-segmind"), "demo"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "the sandbox billed 1 picture, 0.05 USD" in demo.stdout, demo.stderr
    # The tests of the command line once more, far from the checkout, so that it is the wheel that they import.
    subprocess.run([*pip, "pytest", "pytest-timeout"], check=True, cwd=tmp_path)
    copies = tmp_path / "copies" / "tests"
    copies.mkdir(parents=True)
    for name in ("__init__", "conftest", "test_cli", "test_cli_refresh"):
        shutil.copy(ROOT / "tests" / f"{name}.py", copies)
    (copies.parent / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    outer = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    tests = subprocess.run(
        [str(binaries / "python"), "-m", "pytest", "-q", "tests"],
        cwd=copies.parent,
        env=outer,
        capture_output=True,
        text=True,
    )
    assert tests.returncode == 0, tests.stdout[-8000:]
