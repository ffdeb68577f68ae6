"""Whatever bytes come in a picture's place: it is read, or refused in the words of this package, and never a crash.

The bytes are those of whole pictures in each format that is read, with bits flipped, pieces cut out, doubled or moved,
numbers in their headers that lie, and junk behind their end. What is cut never passes for whole.
"""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from prefect_segmind.api.client import SegmindClient
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.errors import SourceImageError
from prefect_segmind.images.inspection import BOMB_PIXELS, BrokenPicture, inspect, picture_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

EVERYTHING = os.environ.get("FAULTS") == "all"
MUTATIONS = 4_000 if EVERYTHING else 150
READ_AGAIN = 500 if EVERYTHING else 10

SEEDS: dict[str, tuple[str, str, dict[str, object]]] = {
    "PNG": ("PNG", "RGB", {}),
    "PNG with a palette": ("PNG", "P", {}),
    "JPEG": ("JPEG", "RGB", {"quality": 85}),
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True}),
    "JPEG in CMYK": ("JPEG", "CMYK", {}),
    "WebP": ("WEBP", "RGB", {}),
    "lossless WebP": ("WEBP", "RGBA", {"lossless": True}),
    "AVIF": ("AVIF", "RGB", {}),
    "GIF": ("GIF", "P", {}),
    "TIFF": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "BMP": ("BMP", "RGB", {}),
}


def whole(name: str) -> bytes:
    kind, mode, options = SEEDS[name]
    file = BytesIO()
    Image.frombytes("RGB", (24, 16), Random(0).randbytes(24 * 16 * 3)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def flipped(data: bytearray, draw: Random) -> None:
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def cut_out(data: bytearray, draw: Random) -> None:
    start = draw.randrange(len(data))
    del data[start : start + draw.randint(1, 40)]


def cut_off(data: bytearray, draw: Random) -> None:
    del data[draw.randrange(1, len(data)) :]


def doubled(data: bytearray, draw: Random) -> None:
    start = draw.randrange(len(data))
    data[start:start] = data[start : start + draw.randint(1, 60)]


def moved(data: bytearray, draw: Random) -> None:
    start, size = draw.randrange(len(data)), draw.randint(1, 40)
    piece = data[start : start + size]
    del data[start : start + size]
    target = draw.randrange(len(data) + 1)
    data[target:target] = piece


def lying(data: bytearray, draw: Random) -> None:
    """A size or an offset near the beginning is another one, huge as often as not."""
    at = draw.randrange(min(len(data) - 3, 80))
    number = draw.choice([0, 1, 0x7FFF, 0xFFFF, 13_000, 0x7FFFFFFF, 0xFFFFFFFF, draw.getrandbits(32)])
    code = draw.choice([">I", "<I", ">H", "<H"])
    data[at : at + struct.calcsize(code)] = struct.pack(code, number & (0xFFFF if code[1] == "H" else 0xFFFFFFFF))


def with_junk(data: bytearray, draw: Random) -> None:
    data += draw.randbytes(draw.randint(1, 100))


WAYS: tuple[Callable[[bytearray, Random], None], ...] = (flipped, cut_out, cut_off, doubled, moved, lying, with_junk)


def mutated(name: str, number: int) -> bytes:
    draw, data = Random(f"{name} {number}"), bytearray(whole(name))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        data += b"\0" * (8 - len(data))
        draw.choice(WAYS)(data, draw)
    return bytes(data)


@pytest.mark.parametrize("name", SEEDS)
def test_whatever_the_bytes_they_are_a_picture_or_refused_by_name_in_bounded_memory(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(MUTATIONS):
        data = mutated(name, number)
        with suppress(BrokenPicture):
            picture_of(data)
        with suppress(SourceImageError):
            inspect(data, "mug", allow_extreme_ratio=True)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 4 * BOMB_PIXELS, f"{grown / 1e6:.0f} MB more for pictures of a few pixels"


@pytest.mark.parametrize("name", SEEDS)
def test_a_kept_answer_of_any_bytes_is_recovered_or_stays(name: str, tmp_path: Path) -> None:
    with SegmindClient("SG_0123456789abcdef", "http://127.0.0.1:9/v1") as client:
        for number in range(READ_AGAIN):
            outbox, fingerprint = Outbox(tmp_path / f"{number}", min_free_bytes=1), "0" * 64
            outbox.check()
            answer = outbox.folder / f"{fingerprint}.0123456789abcdef.1.answer"
            data = mutated(name, number)
            answer.write_bytes(data)
            found = outbox.read_again(fingerprint, "a run", client.read, seed=100, list_price_usd=Decimal("0.05"))
            assert (found[0] if found else answer).read_bytes() == data


@pytest.mark.parametrize("name", SEEDS)
def test_a_picture_with_junk_behind_it_is_whole(name: str) -> None:
    data = whole(name)
    for junk in (b"\0", b"\n", b"\0" * 4096, b"<html>", data, data[:40]):
        assert picture_of(data + junk).width == 24


@pytest.mark.parametrize("name", SEEDS)
def test_a_picture_that_lacks_its_end_never_passes_for_whole(name: str) -> None:
    data = whole(name)
    pixels = Image.open(BytesIO(data)).convert("RGB").tobytes()
    for size in range(len(data)):
        try:
            picture_of(data[:size])
        except BrokenPicture:
            continue
        same = Image.open(BytesIO(data[:size])).convert("RGB").tobytes() == pixels
        assert same, f"the first {size} of {len(data)} bytes pass for the whole picture"
