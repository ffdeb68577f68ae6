"""What the containers of pictures tell without a decoder: where a file ends, what in it is metadata, which page counts.

Pure: bytes go in, and no bytes make it fail unless it says so. Pixels are `image`'s business.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice, zip_longest
from struct import Struct
from struct import error as StructError
from typing import Final, NamedTuple

PNG_END: Final = b"IEND\xaeB`\x82"
"""The last chunk of every PNG, without its length."""
METADATA_LIMIT: Final = 64_000_000
"""Bytes that a compressed profile or text of a PNG may unpack to; one that holds more is left out."""

_COMMON_LIMIT: Final = 1 << 20
_JPEG_END: Final = b"\xff\xd9"  # which is nowhere in compressed pixels
_TIFF: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PAGES: Final = 1_000  # of a TIFF that are looked at; their chain may lead in a circle
_TIFF_INTEGERS: Final = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}  # types of tags, as `struct` calls them
_TIFF_SEGMENTS: Final = ((273, 279), (324, 325))  # offsets and sizes of strips, and of tiles
_TIFF_TAGS: Final = (254, 255, 256, 257, 258, 273, 277, 279, 320, 324, 325, 339)  # what a page is, and its pixels need
_WEBP_PICTURE: Final = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ICCP", b"ANIM", b"ANMF")
_BOXES: Final = (b"ftyp", b"meta", b"mdat", b"moov", b"moof", b"free", b"skip", b"wide", b"uuid")


def is_cut(data: bytes) -> bool:
    r"""Whether a file provably lacks its end: it has less than it says, or no end mark where its format demands one.

    What proves nothing is not cut: it may be damaged, or of a kind that a decoder does not know.

    Example:
        >>> is_cut(b"RIFF\x20\0\0\0WEBPVP8 "), is_cut(b"whatever")
        (True, False)
    """
    kinds: tuple[tuple[bool, Callable[[bytes], bool]], ...] = (
        (data.startswith(b"\xff\xd8"), _jpeg_is_cut),
        # A wrong checksum of the last chunk, which is over nothing, does no harm.
        (data.startswith(b"\x89PNG"), lambda data: not 0 <= data.rfind(b"\0\0\0\0IEND") <= len(data) - 12),
        (data.startswith(b"RIFF"), lambda data: len(data) < 8 + int.from_bytes(data[4:8], "little")),
        (data.startswith((b"GIF87a", b"GIF89a")), _gif_is_cut),
        (data.startswith(_TIFF), _tiff_is_cut),
        (data.startswith(b"BM"), _bmp_is_cut),
        (data[4:8] == b"ftyp", _boxes_are_cut),
    )
    return next((cut(data) for found, cut in kinds if found), False)


class PngParts(NamedTuple):
    """A PNG taken apart.

    Attributes:
        pixels: The same picture with nothing but what its pixels need.
        info: Its colour profile, EXIF and XMP as far as they are intact, under the names that Pillow gives them.
        animated: Whether it holds more pictures than that one.
        odd: Whether something in it that the pixels do not need makes common readers refuse it.
    """

    pixels: bytes
    info: dict[str, bytes | str]
    animated: bool
    odd: bool = False


def split_png(data: bytes) -> PngParts:
    """Takes a PNG apart, so that nothing that is said about a picture keeps its pixels from being read.

    A chunk that the file ends in stays as it is, for a decoder to find.

    Raises:
        ValueError: A chunk that the pixels need is damaged.
    """
    needed, info, frames, colours = [data[:8]], dict[str, bytes | str](), 0, 0
    kinds: set[bytes] = set()
    odd = False
    in_animation = False  # whether the picture is also the first one of an animation
    at = 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : end - 4]
        if end > len(data) or not kind.isalpha():
            needed.append(data[at:])
            break
        intact = zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        odd |= not intact or _unpacks_to_much(kind, content)
        if kind == b"IEND":
            needed.append(b"\0\0\0\0" + PNG_END)
            break
        if kind[:1].isupper():
            if not intact:
                raise ValueError(f"wrong checksum in {kind.decode()}")
            needed.append(data[at:end])
            colours = len(content) // 3 if kind == b"PLTE" else colours
        elif kind == b"tRNS" and intact and _fits_png(content, data[25], colours):
            needed.append(data[at:end])
        elif kind == b"acTL" and intact:
            frames = int.from_bytes(content[:4])
        elif kind == b"fcTL":
            in_animation |= b"IDAT" not in kinds
        elif intact:
            info |= _png_info(kind, content)
        kinds.add(kind)
        at = end
    return PngParts(b"".join(needed), info, frames > in_animation, odd)


def _unpacks_to_much(kind: bytes, content: bytes) -> bool:
    """Whether a compressed profile or text holds more than Pillow and libpng take by themselves, about 1 MB."""
    rest = content.partition(b"\0")[2]
    if kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    elif kind in (b"iCCP", b"zTXt"):
        packed = rest[1:]
    else:
        return False
    unpacker = zlib.decompressobj()
    with suppress(zlib.error):
        unpacker.decompress(packed, _COMMON_LIMIT)
    return bool(unpacker.unconsumed_tail)


def _fits_png(transparency: bytes, colour_type: int, colours: int) -> bool:
    """Whether a transparency is one of greys, of RGB or of a palette of so many colours; libpng ignores others."""
    return len(transparency) <= colours if colour_type == 3 else len(transparency) >= {0: 2, 2: 6}.get(colour_type, 0)


def _png_info(kind: bytes, content: bytes) -> dict[str, bytes | str]:
    """What Pillow takes orientation and colours from, read here: its own limits make other text fail the picture."""
    if kind == b"eXIf":
        return {"exif": b"Exif\0\0" + content}
    key, _, rest = content.partition(b"\0")
    if kind == b"iCCP":
        profile = _inflated(rest[1:])
        return {"icc_profile": profile} if profile else {}
    if kind == b"iTXt" and key == b"XML:com.adobe.xmp":
        text = rest[2:].split(b"\0", 2)[-1]
        xmp = _inflated(text) if rest[:1] == b"\1" else text
        return {"xmp": xmp} if xmp else {}
    if kind in (b"tEXt", b"zTXt") and key == b"Raw profile type exif":
        text = rest if kind == b"tEXt" else _inflated(rest[1:]) or b""
        return {key.decode(): text.decode("latin-1")}
    return {}


def _inflated(packed: bytes) -> bytes | None:
    """What zlib has packed; None where that is broken or too much."""
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(packed, METADATA_LIMIT)
    except zlib.error:
        return None
    return unpacked if unpacker.eof else None


def without_odd_metadata(data: bytes) -> bytes:
    """A JPEG, WebP or AVIF without the metadata that a reader may fail over; all other data as it is.

    What the colours need stays, and so do EXIF and XMP of a JPEG, for a broken one does no harm there.
    """
    if data.startswith(b"\xff\xd8"):
        kept, at = [data[:2]], 2
        for marker, start, end in _jpeg_segments(data):
            length = end - start
            sane = {0xE0: length >= 18, 0xE1: True, 0xEE: length >= 16}.get(marker, False)
            if marker == 0xE2 and data[start + 4 : start + 16] == b"ICC_PROFILE\0":
                sane = length >= 18
            if sane or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
                kept.append(data[start:end])
            at = end
        return b"".join((*kept, data[at:]))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        chunks, at = [data[8:12]], 12
        while (kind := data[at : at + 4]) in _WEBP_PICTURE:
            end = at + 8 + (int.from_bytes(data[at + 4 : at + 8], "little") + 1) // 2 * 2
            chunk = bytearray(data[at:end])
            if kind == b"VP8X" and len(chunk) > 8:
                chunk[8] &= 0b1111_0011  # neither EXIF nor XMP
            chunks.append(bytes(chunk))
            at = end
        plain = b"".join(chunks)
        return b"RIFF" + len(plain).to_bytes(4, "little") + plain
    if data[4:8] == b"ftyp":  # an item of a type that nobody knows is passed over
        return re.sub(rb"(infe[\2\3].{7,9}?)Exif", rb"\1none", data, flags=re.DOTALL)
    return data


def full_pages(data: bytes) -> list[int]:
    """Which pages of a TIFF are pictures of their own, the first two at most: previews and masks are not.

    Example:
        >>> full_pages(b"no TIFF")
        []
    """
    full = (number for number, (is_full, is_cut) in enumerate(_tiff_pages(data)) if is_full and not is_cut)
    return list(islice(full, 2))


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment up to the first scan; the last one may reach beyond the end."""
    at = 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 1:
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # padding, or a marker that stands alone
            at += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9:
            return
        end = at + 2 + (int.from_bytes(data[at + 2 : at + 4]) if len(data) >= at + 4 else 2)
        yield marker, at, end
        if marker == 0xDA:
            return
        at = end


def _jpeg_is_cut(data: bytes) -> bool:
    """No end behind the first scan; a preview inside the metadata has an end of its own, which does not count."""
    start = max((end for _, _, end in _jpeg_segments(data)), default=2)
    return _JPEG_END not in data[start:]


def _gif_is_cut(data: bytes) -> bool:
    """Whether its blocks reach beyond the end, or no trailer follows them."""

    def palette(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    if len(data) < 13:
        return True
    at = 13 + palette(data[10])
    while at < len(data):
        if data[at] == 0x21:
            at += 2
        elif data[at] == 0x2C and at + 9 < len(data):
            at += 11 + palette(data[at + 9])
        else:
            return data[at] == 0x2C  # the trailer, or damage
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return True


def _bmp_is_cut(data: bytes) -> bool:
    """Whether it is shorter than its header says, or than its plain rows are."""
    if len(data) < 34:
        return True
    if len(data) < int.from_bytes(data[2:6], "little"):
        return True
    width, height = (abs(int.from_bytes(data[at : at + 4], "little", signed=True)) for at in (18, 22))
    bits, packed = int.from_bytes(data[28:30], "little"), int.from_bytes(data[30:34], "little")
    rows = height * ((width * bits + 31) // 32 * 4) if packed in (0, 3) and data[14] >= 40 else 0
    return len(data) < int.from_bytes(data[10:14], "little") + rows


def _boxes_are_cut(data: bytes) -> bool:
    """Whether the boxes of an AVIF or HEIF reach beyond the end, or what holds the pixels is missing."""
    at, kinds = 0, set[bytes]()
    while at + 8 <= len(data):
        size, kind, head = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        if kind not in _BOXES or size < head:  # or 0: it reaches to the end, wherever that is
            return False
        kinds.add(kind)
        at += size
    return at > len(data) or (b"mdat" not in kinds and b"idat" not in data)


def _tiff_pages(data: bytes) -> Iterator[tuple[bool, bool]]:
    """Whether each page is a picture of its own, and whether a part of it lies beyond the end."""
    if not data.startswith(_TIFF):
        return
    order, big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]
    count, entry, link = (Struct(order + each) for each in (("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")))
    start, seen = 8 if big else 4, set[int]()
    at = int.from_bytes(data[start : start + link.size], "little" if order == "<" else "big")
    while at and at not in seen and len(seen) < _PAGES:
        seen.add(at)
        tags: dict[int, tuple[int, ...]] = {}
        following, cut = 0, False
        try:
            first = at + count.size
            end = first + count.unpack_from(data, at)[0] * entry.size
            (following,) = link.unpack_from(data, end)
            for place in range(first, end, entry.size):
                tag, kind, length, inline = entry.unpack_from(data, place)
                if tag in _TIFF_TAGS and kind in _TIFF_INTEGERS:
                    values = Struct(f"{order}{length}{_TIFF_INTEGERS[kind]}")
                    source, offset = (inline, 0) if values.size <= link.size else (data, link.unpack(inline)[0])
                    tags[tag] = values.unpack_from(source, offset)
        except (StructError, OverflowError):
            cut = True
        for offsets, sizes in _TIFF_SEGMENTS:
            segments = zip_longest(tags.get(offsets, ()), tags.get(sizes, ()), fillvalue=0)
            cut |= any(offset + size > len(data) for offset, size in segments)
        kind, old_kind = (next(iter(tags.get(tag, ())), 0) for tag in (254, 255))
        yield not kind & 0b101 and old_kind != 2, cut
        at = following


def _tiff_is_cut(data: bytes) -> bool:
    """Whether the directory or the pixels of its picture lie beyond the end."""
    if full_pages(data):
        return False
    return any(cut for _, cut in _tiff_pages(data)) or len(data) < 8
