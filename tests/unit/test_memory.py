"""Decoded pictures of all threads fit into one budget, and every thread gets its turn."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prefect_segmind.images import contact_sheet, conversion, inspection
from prefect_segmind.images.memory import Budget, bytes_to_decode
from tests.support.stepping import interrupted_at
from tests.support.waiting import until


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=12))
def test_threads_together_never_take_more_than_there_is_and_all_get_their_turn(sizes: list[int]) -> None:
    budget, taken, most, lock = Budget(100), [0], [0], threading.Lock()

    def work(size: int) -> None:
        with budget.taken(size):
            with lock:
                taken[0] += min(size, 100)  # one that is larger goes alone
                most[0] = max(most[0], taken[0])
            with lock:
                taken[0] -= min(size, 100)

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert most[0] <= 100
    with budget.taken(100):  # all of it has been given back
        pass


def test_a_large_picture_is_not_overtaken_for_ever_by_small_ones() -> None:
    budget, order = Budget(100), list[str]()

    def work(name: str, size: int) -> None:
        with budget.taken(size):
            order.append(name)

    with budget.taken(60):
        threads = [threading.Thread(target=work, args=each) for each in (("large", 100), ("small", 10))]
        for waiting, thread in enumerate(threads, start=1):
            thread.start()
            until(lambda waiting=waiting: len(budget._shares) == 1 + waiting)  # type: ignore[misc]
    for thread in threads:
        thread.join(60)
    assert order == ["large", "small"]


def test_a_thread_that_waits_can_be_interrupted_and_leaves_the_others_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_: float) -> bool:
        raise KeyboardInterrupt

    budget = Budget(100)
    with budget.taken(1):
        with monkeypatch.context() as now:
            now.setattr(budget._changed, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt), budget.taken(100):
                pass
        with budget.taken(99):
            pass
    with budget.taken(100):
        pass


def test_an_interrupt_at_any_line_leaves_nothing_taken_and_nobody_waiting() -> None:
    for number in count():
        budget = Budget(100)

        def work(budget: Budget = budget) -> None:
            with budget.taken(100):
                pass

        at = interrupted_at(number, KeyboardInterrupt, work)
        assert not list(budget._shares), at
        with budget.taken(100):
            pass
        if at is None:
            break
    assert number > 10


class Interrupted:
    """A lock that an interrupt comes before."""

    def __enter__(self) -> None:
        raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        """It is never taken."""


def test_an_interrupt_that_somebody_keeps_takes_nothing_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(100)
    with monkeypatch.context() as now, pytest.raises(KeyboardInterrupt) as kept, budget.taken(100):
        now.setattr(budget, "_changed", Interrupted())
    with budget.taken(100):
        assert kept.traceback, "its frames hold the share of the interrupted one"


def test_an_error_gives_back_what_was_taken() -> None:
    budget = Budget(100)
    with pytest.raises(ZeroDivisionError), budget.taken(100):
        _ = 1 / 0
    with budget.taken(100):
        pass


def saved(format: str, mode: str = "RGB", **options: Any) -> bytes:
    file = BytesIO()
    Image.new(mode, (800, 600)).save(file, format, **options)
    return file.getvalue()


FILES = {
    "JPEG": saved("JPEG"),
    "progressive JPEG": saved("JPEG", progressive=True, subsampling=0),
    "PNG": saved("PNG"),
    "transparent PNG": saved("PNG", "RGBA"),
    "deep PNG": saved("PNG", "I;16"),
    "WebP": saved("WEBP"),
    "TIFF": saved("TIFF"),
    "GIF": saved("GIF", "P"),
}
LEAST = {"JPEG": 1 / 64 * 4, "progressive JPEG": 6, "WebP": 16, "GIF": 1, "deep PNG": 2}


def prepared(data: bytes) -> object:
    source = inspection.SourceImage(format="", width=1, height=1, size_bytes=1, sha256="", changes=("changed",))
    return conversion.prepare(data, source)


def sheet(data: bytes) -> object:
    return contact_sheet.contact_sheet(["row"], ["column"], lambda row, column: data, source=data)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "operation",
    [
        lambda data: inspection.inspect(data, "mug"),
        inspection.picture_of,
        prepared,
        conversion.thumbnail,
        lambda data: conversion.equal_thumbnails([data, data], 100),
        sheet,
    ],
    ids=["inspect", "picture", "prepare", "thumbnail", "thumbnails", "contact sheet"],
)
def test_every_operation_takes_enough_and_never_twice_at_once(
    operation: Callable[[bytes], object], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, held = list[int](), [0]

    class Recording(Budget):
        @contextmanager
        def taken(self, size: int) -> Iterator[None]:
            taken.append(size)
            held[0] += 1
            assert held[0] == 1
            yield
            held[0] -= 1

    budget, load = Recording(1), inspection.load_picture

    def loaded(*arguments: Any) -> Any:
        assert held[0] == 1
        return load(*arguments)

    for module in (inspection, conversion, contact_sheet):
        monkeypatch.setattr(module, "MEMORY", budget)
    monkeypatch.setattr(inspection, "load_picture", loaded)
    monkeypatch.setattr(conversion, "load_picture", loaded)
    operation(FILES[kind])
    assert max(taken) >= 800 * 600 * LEAST.get(kind, 4)


def test_the_memory_for_a_picture_follows_its_pixels_and_not_its_bytes() -> None:
    small, large = (BytesIO() for _ in range(2))
    Image.new("L", (100, 100)).save(small, "PNG", compress_level=0)
    Image.new("L", (9000, 9000)).save(large, "PNG", compress_level=9)
    needed = [
        bytes_to_decode(inspection.open_picture(file.getvalue()), side * side, file.getvalue())
        for file, side in ((small, 100), (large, 9000))
    ]
    assert needed[1] == needed[0] * 8100


IN_TURN = """
import re, threading
from io import BytesIO
from pathlib import Path
from PIL import Image
from prefect_segmind.images.inspection import picture_of

canvas, turn = BytesIO(), threading.Lock()
Image.new("RGB", (5000, 5000)).save(canvas, "PNG")
all_have_had_it = threading.Barrier(12, timeout=60)


def work():
    with turn:
        picture_of(canvas.getvalue())
    all_have_had_it.wait()


threads = [threading.Thread(target=work) for _ in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
# ru_maxrss would count what the process that began this one had.
print(int(re.search(r"VmHWM:\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1]) // 1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_a_thread_keeps_no_memory_of_a_picture_that_it_has_decoded() -> None:
    done = subprocess.run([sys.executable, "-c", IN_TURN], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 400  # one picture has 100 MB, and twelve have 1,200
