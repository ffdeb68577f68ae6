"""Signals that end a run in order: what is in flight is archived, and the totals are reported.

A terminal that goes away, with a dropped ssh for example, sends SIGHUP. It ends a run as SIGTERM does, unless it is
ignored, as under `nohup`, or has another handler. A worker that is killed sends nothing: its runs go on without it.
"""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from functools import partial
from types import FrameType

from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from rich.console import Console

_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none

_terminals: set[int] = set()
"""Which of the three standard streams were terminals when the run began."""


def end_command_on_signals() -> None:
    """Lets SIGTERM and SIGHUP end a command as Ctrl-C does. Does nothing outside of the main thread."""
    with suppress(ValueError):
        signal.signal(signal.SIGTERM, _interrupt)
        _on_hangup(_interrupt)


def end_run_on_hangup() -> None:
    """Lets SIGHUP end the flow run of this process as SIGTERM does, which Prefect handles itself.

    The handler stays when the run is over; outside of a run SIGHUP then has its default effect. Does nothing outside
    of the main thread.
    """
    with suppress(ValueError):
        _on_hangup(_terminate)


def outlive_the_reader_of_the_log() -> None:
    """Lets the flow run of this process go on where nobody reads its log any more, as after its worker was killed.

    By default rich, with which Prefect writes the log, ends whichever thread finds that out, by `SystemExit`: an asset
    that was archived would count as failed, or the whole run would crash.
    """
    handlers = [each for name in ("", "prefect", "prefect.flow_runs", "prefect.task_runs") for each in _handlers(name)]
    for handler in handlers:
        console = getattr(handler, "console", None)
        if isinstance(console, Console):
            vars(console)["on_broken_pipe"] = partial(setattr, console, "quiet", True)


def _handlers(logger: str) -> list[logging.Handler]:
    return logging.getLogger(logger).handlers


def ended_by(error: BaseException) -> str | None:
    """What has interrupted a run: Ctrl-C or the name of a signal; None if the error is not an interrupt.

    Args:
        error: The exception that ended the run.

    Example:
        >>> ended_by(KeyboardInterrupt()), ended_by(KeyboardInterrupt("SIGHUP")), ended_by(ValueError())
        ('Ctrl-C', 'SIGHUP', None)
    """
    if isinstance(error, TerminationSignal):
        return signal.Signals(error.signal).name
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "Ctrl-C"
    return None


def _on_hangup(handler: signal._HANDLER) -> None:
    if _HANGUP is not None and signal.getsignal(_HANGUP) is signal.SIG_DFL:
        _terminals.update(each for each in (0, 1, 2) if os.isatty(each))
        signal.signal(_HANGUP, handler)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    if number == _HANGUP:
        _hung_up()
    raise KeyboardInterrupt(signal.Signals(number).name)


def _terminate(number: int, _frame: FrameType | None) -> None:
    if FlowRunContext.get() is None:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        return
    _hung_up()
    raise TerminationSignal(signal=number)


def _hung_up() -> None:
    """Ignores what follows a hang-up: the same signal again, and errors of a terminal that is gone."""
    assert _HANGUP is not None
    signal.signal(_HANGUP, signal.SIG_IGN)  # the shell and the system each send it
    dead = {each for each in _terminals if not os.isatty(each)}
    if dead:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for each in dead:
            os.dup2(nowhere, each)
        os.close(nowhere)
