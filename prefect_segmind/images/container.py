"""The containers of pictures, read without a decoder: where a file ends, what is metadata, which page counts.

Every function takes any bytes without failing, except where it documents otherwise.
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
"""The most bytes that a compressed profile or text of a PNG may unpack to; a larger one is left out."""

_COMMON_LIMIT: Final = 1 << 20  # what Pillow and libpng accept by default
_JPEG_END: Final = b"\xff\xd9"  # which is nowhere in compressed pixels
_TIFF: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAX_PAGES: Final = 1_000  # of a TIFF that are read
_TIFF_INTEGERS: Final = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}  # types of tags, as `struct` calls them
_TIFF_SEGMENTS: Final = ((273, 279), (324, 325))  # offsets and sizes of strips, and of tiles
_TIFF_TAGS: Final = (254, 255, 256, 257, 258, 273, 277, 279, 320, 324, 325, 339)  # the kind of page, and its pixels
_WEBP_PIXELS: Final = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ICCP", b"ANIM", b"ANMF")
_BOXES: Final = (b"ftyp", b"meta", b"mdat", b"moov", b"moof", b"free", b"skip", b"wide", b"uuid")


def is_truncated(data: bytes) -> bool:
    r"""Whether a file provably lacks its end: it is shorter than it states, or without the end mark of its format.

    Without proof, a file counts as whole: it may be damaged, or in a form that a decoder does not support.

    Args:
        data: The file.

    Example:
        >>> is_truncated(b"RIFF\x20\0\0\0WEBPVP8 "), is_truncated(b"whatever")
        (True, False)
    """
    kinds: tuple[tuple[bool, Callable[[bytes], bool]], ...] = (
        (data.startswith(b"\xff\xd8"), _jpeg_is_truncated),
        # The checksum of the last chunk is not checked: the chunk is empty.
        (data.startswith(b"\x89PNG"), lambda data: not 0 <= data.rfind(b"\0\0\0\0IEND") <= len(data) - 12),
        (data.startswith(b"RIFF"), lambda data: len(data) < 8 + int.from_bytes(data[4:8], "little")),
        (data.startswith((b"GIF87a", b"GIF89a")), _gif_is_truncated),
        (data.startswith(_TIFF), _tiff_is_truncated),
        (data.startswith(b"BM"), _bmp_is_truncated),
        (data[4:8] == b"ftyp", _boxes_are_truncated),
    )
    return next((lacks_end(data) for matches, lacks_end in kinds if matches), False)


class PngParts(NamedTuple):
    """A PNG taken apart.

    Attributes:
        pixels: The same picture with only the chunks that its pixels need.
        info: Its colour profile, EXIF and XMP as far as they are intact, under Pillow's names for them.
        animated: Whether it contains more pictures than that one.
        malformed: Whether other chunks make common readers refuse it: one is damaged, or unpacks to too much.
    """

    pixels: bytes
    info: dict[str, bytes | str]
    animated: bool
    malformed: bool = False


def split_png(data: bytes) -> PngParts:
    """Takes a PNG apart, so that its pixels can be read even if its metadata is damaged.

    A chunk that is cut by the end of the file is kept, for the decoder to report.

    Args:
        data: The file, which begins as a PNG does.

    Returns:
        Its parts.

    Raises:
        ValueError: A chunk that the pixels need is damaged.
    """
    needed, info, frames, colours = [data[:8]], dict[str, bytes | str](), 0, 0
    kinds: set[bytes] = set()
    malformed = False
    in_animation = False  # whether the picture is also the first frame
    at = 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : end - 4]
        if end > len(data) or not kind.isalpha():
            needed.append(data[at:])
            break
        intact = zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        malformed |= not intact or _unpacks_to_much(kind, content)
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
    return PngParts(b"".join(needed), info, frames > in_animation, malformed)


def _payload(kind: bytes, content: bytes) -> tuple[bytes, bytes, bool]:
    """The keyword of a text or profile, what it contains, and whether that is compressed."""
    key, _, rest = content.partition(b"\0")
    if kind == b"iTXt":
        return key, rest[2:].split(b"\0", 2)[-1], rest[:1] == b"\1"
    packed = kind in (b"iCCP", b"zTXt")
    return key, rest[1:] if packed else rest, packed


def _unpacks_to_much(kind: bytes, content: bytes) -> bool:
    """Whether a compressed profile or text unpacks to more than common readers accept."""
    _, payload, packed = _payload(kind, content)
    unpacker = zlib.decompressobj()
    with suppress(zlib.error):
        unpacker.decompress(payload if packed else b"", _COMMON_LIMIT)
    return bool(unpacker.unconsumed_tail)


def _fits_png(transparency: bytes, colour_type: int, colours: int) -> bool:
    """Whether a transparency chunk fits the colour type and the number of colours in the palette."""
    return len(transparency) <= colours if colour_type == 3 else len(transparency) >= {0: 2, 2: 6}.get(colour_type, 0)


def _png_info(kind: bytes, content: bytes) -> dict[str, bytes | str]:
    """The metadata that Pillow takes orientation and colours from, read without Pillow's limits on all metadata."""
    if kind == b"eXIf":
        return {"exif": b"Exif\0\0" + content}
    key, payload, packed = _payload(kind, content)
    is_xmp = kind == b"iTXt" and key == b"XML:com.adobe.xmp"
    is_exif = kind in (b"tEXt", b"zTXt") and key == b"Raw profile type exif"
    if kind != b"iCCP" and not is_xmp and not is_exif:
        return {}
    value = _inflated(payload) if packed else payload
    if not value:
        return {}
    return {key.decode(): value.decode("latin-1")} if is_exif else {"xmp" if is_xmp else "icc_profile": value}


def _inflated(packed: bytes) -> bytes | None:
    """The unpacked data; None where it is damaged or too large."""
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(packed, METADATA_LIMIT)
    except zlib.error:
        return None
    return unpacked if unpacker.eof else None


def strip_metadata(data: bytes) -> bytes:
    """Removes the metadata that can make a reader fail from a JPEG, WebP, AVIF or HEIF.

    What the colours depend on stays, and so do EXIF and XMP of a JPEG, where damaged ones do no harm.

    Args:
        data: The file.

    Returns:
        The file without that metadata; a file of another format as it is.
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
        while (kind := data[at : at + 4]) in _WEBP_PIXELS:
            end = at + 8 + (int.from_bytes(data[at + 4 : at + 8], "little") + 1) // 2 * 2
            chunk = bytearray(data[at:end])
            if kind == b"VP8X" and len(chunk) > 8:
                chunk[8] &= 0b1111_0011  # neither EXIF nor XMP
            chunks.append(bytes(chunk))
            at = end
        plain = b"".join(chunks)
        return b"RIFF" + len(plain).to_bytes(4, "little") + plain
    if data[4:8] == b"ftyp":  # readers skip an item of an unknown type
        return re.sub(rb"(infe[\2\3].{7,9}?)Exif", rb"\1none", data, flags=re.DOTALL)
    return data


def full_pages(data: bytes) -> list[int]:
    """The pages of a TIFF that are pictures in their own right: previews, masks and incomplete pages are not.

    Args:
        data: The file.

    Returns:
        The numbers of the first two at most, counted from 0.

    Example:
        >>> full_pages(b"not a TIFF")
        []
    """
    full = (number for number, (own, truncated) in enumerate(_tiff_pages(data)) if own and not truncated)
    return list(islice(full, 2))


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment up to the first scan; the last one may reach beyond the end."""
    at = 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 1:
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # padding, or a marker without a segment
            at += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9:
            return
        end = at + 2 + (int.from_bytes(data[at + 2 : at + 4]) if len(data) >= at + 4 else 2)
        yield marker, at, end
        if marker == 0xDA:
            return
        at = end


def _jpeg_is_truncated(data: bytes) -> bool:
    """Whether no end mark follows the first scan; a preview within the metadata has an end mark of its own."""
    start = max((end for _, _, end in _jpeg_segments(data)), default=2)
    return _JPEG_END not in data[start:]


def _gif_is_truncated(data: bytes) -> bool:
    """Whether its blocks extend beyond the end, or no trailer follows them."""

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


def _bmp_is_truncated(data: bytes) -> bool:
    """Whether it is shorter than its header states, or than its uncompressed rows are."""
    if len(data) < max(34, int.from_bytes(data[2:6], "little")):
        return True
    width, height = (abs(int.from_bytes(data[at : at + 4], "little", signed=True)) for at in (18, 22))
    bits, packed = int.from_bytes(data[28:30], "little"), int.from_bytes(data[30:34], "little")
    rows = height * ((width * bits + 31) // 32 * 4) if packed in (0, 3) and data[14] >= 40 else 0
    return len(data) < int.from_bytes(data[10:14], "little") + rows


def _boxes_are_truncated(data: bytes) -> bool:
    """Whether the boxes of an AVIF or HEIF extend beyond the end, or the one with the pixels is missing."""
    at, kinds = 0, set[bytes]()
    while at + 8 <= len(data):
        size, kind, head = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        if kind not in _BOXES or size < head:  # or 0: it extends to the end, wherever that is
            return False
        kinds.add(kind)
        at += size
    return at > len(data) or (b"mdat" not in kinds and b"idat" not in data)


def _tiff_pages(data: bytes) -> Iterator[tuple[bool, bool]]:
    """For each page, whether it is a picture in its own right, and whether a part of it is beyond the end."""
    if not data.startswith(_TIFF):
        return
    order, big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]
    count, entry, link = (Struct(order + each) for each in (("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")))
    start, seen = 8 if big else 4, set[int]()
    at = int.from_bytes(data[start : start + link.size], "little" if order == "<" else "big")
    while at and at not in seen and len(seen) < _MAX_PAGES:
        seen.add(at)  # as the chain may lead in a circle
        tags: dict[int, tuple[int, ...]] = {}
        following, truncated = 0, False
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
            truncated = True
        for offsets, sizes in _TIFF_SEGMENTS:
            segments = zip_longest(tags.get(offsets, ()), tags.get(sizes, ()), fillvalue=0)
            truncated |= any(offset + size > len(data) for offset, size in segments)
        kind, old_kind = (next(iter(tags.get(tag, ())), 0) for tag in (254, 255))
        yield not kind & 0b101 and old_kind != 2, truncated
        at = following


def _tiff_is_truncated(data: bytes) -> bool:
    """Whether the directory or the pixels of its picture are beyond the end."""
    return len(data) < 8 or (not full_pages(data) and any(truncated for _, truncated in _tiff_pages(data)))
