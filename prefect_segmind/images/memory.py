"""The memory of decoded pictures: one budget for the whole process, as a small file may hold a huge picture."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from weakref import WeakKeyDictionary

from PIL import Image, _imaging

_PER_PIXEL: Final = {"WEBP": 16, "AVIF": 12, "HEIF": 12}  # bytes, measured: their decoders keep copies
_PILLOWS: Final = 4  # of every other format, and of everything that Pillow makes of a picture
# One block for a picture: glibc gives those of more than 32 MB back to the system when they are freed. Pillow's
# usual ones, of 16 MB, may stay with the thread that had them, so that a dozen threads keep a dozen pictures
# (`Image.core` of https://pillow.readthedocs.io/en/stable/reference/block_allocator.html, by its typed name).
_imaging.set_block_size(1 << 30)
_LOOK_SECONDS: Final = 0.5  # so that a thread that waits can be interrupted


class _Share:
    """What one block waits for, and then holds, in bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = False


class Budget:
    """A number of bytes that threads share. Whoever waits longest is next, so a large picture waits for a few others.

    A thread that has taken some must not take more before it gives them back: it could wait for itself.

    Args:
        size: In bytes.

    Example:
        >>> with Budget(1_000).taken(5_000):  # more than there is: alone
        ...     pass
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._changed = threading.Condition()
        # In the order they came. Weakly, as an interrupt may come anywhere: whoever is gone neither waits nor holds.
        self._shares = WeakKeyDictionary[_Share, None]()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Waits until there is room, and takes it until the end of the block.

        Args:
            size: In bytes; the whole budget if it is more.
        """
        share = _Share(min(size, self._size))
        try:
            with self._changed:
                self._shares[share] = None
                while not self._is_next(share):
                    self._changed.wait(_LOOK_SECONDS)
                share.held = True
                self._changed.notify_all()
            yield
        finally:
            share.size, share.held = 0, True  # at once: what keeps the interrupt keeps the share too
            with self._changed:
                self._shares.pop(share, None)
                self._changed.notify_all()

    def _is_next(self, share: _Share) -> bool:
        shares = list(self._shares)
        free = self._size - sum(each.size for each in shares if each.held)
        return next(each for each in shares if not each.held) is share and share.size <= free


MEMORY: Final = Budget(1_000_000_000)
"""The budget of the process. Inspecting, decoding, converting and reducing a picture take from it, each once."""


def bytes_to_decode(image: Image.Image, pixels: int, data: bytes) -> int:
    """About how much memory it takes to decode an opened picture.

    Args:
        image: The picture, as `draft` has set it.
        pixels: The number of its pixels in the file, which `draft` reduces.
        data: The file.
    """
    if image.format not in ("JPEG", "MPO"):
        return pixels * _PER_PIXEL.get(image.format or "", _PILLOWS)
    # The coefficients of a JPEG of several scans, as every progressive one, are kept as a whole. In data of pixels the
    # mark of a scan does not occur.
    several = "progressive" in image.info or data.count(b"\xff\xda") > 1
    return image.width * image.height * _PILLOWS + several * pixels * 2 * len(image.getbands())


def bytes_to_convert(image: Image.Image) -> int:
    """About how much memory it takes to convert a decoded picture to plain channels of 8 bits, before it is reduced.

    Args:
        image: The picture, decoded or opened.
    """
    plain = image.mode in ("L", "RGB", "CMYK") and not image.has_transparency_data
    return 0 if plain else image.width * image.height * 2 * _PILLOWS


def bytes_to_make(pixels: int) -> int:
    """About how much memory it takes to make a picture, convert its colours, turn and encode it.

    Args:
        pixels: The number of its pixels.
    """
    return pixels * 3 * _PILLOWS
