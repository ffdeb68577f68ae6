"""Unpacking what a peer has compressed, in little memory whatever it unpacks to."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Final

_PIECE: Final = 1 << 16
_GZIP_OR_ZLIB: Final = 32 + zlib.MAX_WBITS


def is_packed(data: bytes) -> bool:
    r"""Whether data begins as gzip or zlib does; no picture in a supported format does, nor JSON.

    Args:
        data: The data, or its beginning.

    Example:
        >>> is_packed(zlib.compress(b"a picture")), is_packed(b"\x89PNG")
        (True, False)
    """
    return data[:2] == b"\x1f\x8b" or (len(data) > 1 and data[0] == 0x78 and int.from_bytes(data[:2]) % 31 == 0)


def unpacked(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Unpacks gzip or zlib data once, in pieces of 64 kB at most.

    Args:
        chunks: The data, in pieces; what follows its end is ignored.

    Raises:
        ValueError: It is damaged, ends early, or is neither.
    """
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        for chunk in chunks:
            piece = unpacker.decompress(chunk, _PIECE)
            while piece:
                yield piece
                piece = unpacker.decompress(unpacker.unconsumed_tail, _PIECE)
            if unpacker.eof:
                return
    except zlib.error as error:
        raise ValueError(str(error)) from None
    raise ValueError("it ends early")
