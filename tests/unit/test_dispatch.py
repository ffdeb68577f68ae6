"""How a batch is dispatched, as far as that needs no Prefect server."""

from __future__ import annotations

import sys

import pytest

from prefect_segmind.flows.dispatch import SWITCH_SECONDS, _switching_often


def test_python_switches_often_between_the_threads_of_a_batch_and_as_before_when_it_has_ended() -> None:
    before = sys.getswitchinterval()
    assert before > SWITCH_SECONDS
    with _switching_often():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
        with _switching_often():  # another batch of the process, which ends first
            pass
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    assert sys.getswitchinterval() == pytest.approx(before)
