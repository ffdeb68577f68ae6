"""An interrupt at a chosen line of this package's own code, as Ctrl-C or a signal brings it there."""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import prefect_segmind

_OURS = str(Path(prefect_segmind.__file__).resolve().parent)
_TOP = str(Path(_OURS).parent)


class Point(NamedTuple):
    """A line that was about to run: file, number, and what was run."""

    file: str
    line: int
    function: str


def interrupted_at(number: int, interrupt: Callable[[], BaseException], work: Callable[[], object]) -> Point | None:
    """Runs something in this thread, and raises before the given line of the package, counted from 0 as they run.

    Python's signal handlers run between the calls of a thread, and so does this: before every line, inside the
    `__enter__` and `__exit__` of its context managers too, but not between a lock and the `with` that holds it.

    Args:
        number: Which line.
        interrupt: Makes what is raised there.
        work: What to run; an interrupt ends it, and no other exception may.

    Returns:
        Where it was raised; None if the work was over before.
    """
    left, found = number, None

    def line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left, found
        if event == "line" and not _leaves_with(frame.f_code, frame.f_lasti):
            if left == 0:
                found = Point(Path(frame.f_code.co_filename).name, frame.f_lineno, frame.f_code.co_qualname)
                raise interrupt()
            left -= 1
        return line

    def call(frame: FrameType, *_: Any) -> Any:
        return line if found is None and _is_ours(frame) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        work()
    except BaseException:
        if found is None:
            raise
    finally:
        sys.settrace(before)
    return found


def _is_ours(frame: FrameType) -> bool:
    file, caller = frame.f_code.co_filename, frame.f_back
    if file == contextlib.__file__:
        return caller is not None and _in_package(caller.f_code.co_filename)
    return _in_package(file)


@cache
def _in_package(file: str) -> bool:
    path = str(Path(file).resolve())
    return path.startswith((_OURS, f"{_TOP}/flows/", f"{_TOP}/tasks/")) and not path.startswith(f"{_OURS}/sandbox")


@cache
def _exits(code: CodeType) -> frozenset[int]:
    """Where the code of a `with` calls `__exit__`: Python looks for signals after that call, not before it."""
    steps = [each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "PRECALL")]
    found = set()
    for at, each in enumerate(steps):
        following = [(step.opname, step.argval) for step in steps[at : at + 4]]
        if following[0][0] == "SWAP":  # what is returned from inside the `with` waits below
            following.pop(0)
        if following[:3] == [("LOAD_CONST", None)] * 3:
            found.add(each.offset)
        if [name for name, _ in following[:2]] == ["PUSH_EXC_INFO", "WITH_EXCEPT_START"]:
            found.add(each.offset)
    return frozenset(found)


def _leaves_with(code: CodeType, at: int) -> bool:
    return at in _exits(code)
