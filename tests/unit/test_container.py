"""Promises of `container`: metadata keeps no picture from being read, and only what lacks its end is called cut."""

from __future__ import annotations

import random
import struct
import zlib
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from prefect_segmind.errors import SourceImageError
from prefect_segmind.images.container import PNG_END, full_pages, is_truncated, split_png, strip_metadata
from prefect_segmind.images.conversion import prepare, thumbnail
from prefect_segmind.images.inspection import BrokenPicture, inspect, picture_of
from tests.unit.test_inspection import FILES, chunk, exif, gradient, heif, opened, png, saved

PNG = FILES["png"]
BIG = b"text that says nothing. " * 100_000  # 2.4 MB: Pillow allows one
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def with_chunk(kind: bytes, content: bytes, *, wrong: bool = False, last: bool = False) -> bytes:
    """A PNG with one more chunk, right behind its header or right before its end."""
    added = bytearray(chunk(kind, content))
    if wrong:
        added[-1] ^= 1
    at = len(PNG) - 12 if last else 33
    return PNG[:at] + bytes(added) + PNG[at:]


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def tiff(*pages: dict[int, list[int]], order: str = "<") -> bytes:
    """A TIFF of pages of 10×10 in RGB, unless their tags say otherwise; the order of bytes as `struct` has it."""
    data = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
    link = 4
    for given_tags in pages:
        tags = {256: [10], 257: [10], 259: [1], 262: [2], 277: [3], 258: [8, 8, 8], 278: [10], **given_tags}
        size = tags[256][0] * tags[257][0] * sum(tags[258]) // 8
        tags |= {273: [len(data)], 279: [size]}
        data += bytes(size)
        entries = b""
        for tag, values in sorted(tags.items()):
            raw = b"".join(struct.pack(f"{order}I", value) for value in values)
            if len(raw) > 4:
                raw, place = struct.pack(f"{order}I", len(data)), raw
                data += place
            entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + raw
        struct.pack_into(f"{order}I", data, link, len(data))
        data += struct.pack(f"{order}H", len(tags)) + entries
        link = len(data)
        data += bytes(4)
    return bytes(data)


ODD_METADATA: dict[str, bytes] = {
    "zTXt that unpacks to more than a megabyte": with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(BIG)),
    "zTXt of that kind behind the pixels": with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(BIG), last=True),
    "iTXt that unpacks to more than a megabyte": with_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(BIG)),
    "XMP that unpacks to more than a megabyte": with_chunk(
        b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(BIG)
    ),
    "more text than Pillow has memory for": with_chunk(b"tEXt", b"Comment\0" + BIG * 28),
    "profile of more than a megabyte": with_chunk(b"iCCP", b"huge\0\0" + zlib.compress(PROFILE + bytes(2_000_000))),
    "profile that is not packed": with_chunk(b"iCCP", b"plain\0\0" + PROFILE),
    "profile packed in an unknown way": with_chunk(b"iCCP", b"odd\0\7" + zlib.compress(PROFILE)),
    "profile without anything": with_chunk(b"iCCP", b""),
    "EXIF that is none": with_chunk(b"eXIf", b"garbage"),
    "EXIF without anything": with_chunk(b"eXIf", b""),
    "text called transparency": with_chunk(b"tEXt", b"transparency\0of the heart"),
    "text called interlace": with_chunk(b"tEXt", b"interlace\0yes"),
    "text packed in an unknown way": with_chunk(b"zTXt", b"Comment\0\7abc"),
    **{
        f"{kind.decode()} with a wrong checksum": with_chunk(kind, b"Comment\0text", wrong=True)
        for kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tIME", b"pHYs", b"abCd")
    },
    **{
        f"{kind.decode()} that is too short": with_chunk(kind, b"\0")
        for kind in (b"gAMA", b"cHRM", b"pHYs", b"tRNS", b"acTL", b"fcTL", b"bKGD")
    },
    "frames out of order": with_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 7, 90, 60, 0, 0, 1, 1, 0, 0)),
    **{
        f"JPEG with {name}": FILES["jpeg"][:2] + added + FILES["jpeg"][2:]
        for name, added in {
            "half a profile": segment(0xE2, b"ICC_PROFILE\0\1"),
            "a profile of which most is missing": segment(0xE2, b"ICC_PROFILE\0\1\5abc"),
            "a short Adobe mark": segment(0xEE, b"Adobe"),
            "a short JFIF mark": segment(0xE0, b"JFIF\0"),
            "an index of pictures that are not there": segment(0xE2, b"MPF\0garbage"),
            "half a block of Photoshop's": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
            "broken EXIF": segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(50)),
            "broken XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff" * 60_000),
            "many comments": segment(0xFE, b"x" * 65_000) * 60,
        }.items()
    },
    **{
        f"WebP with {name}": riff((b"VP8X", bytes((flags, 0, 0, 0)) + b"\x59\0\0\x3b\0\0"), *chunks)
        for name, flags, chunks in (
            ("broken EXIF", 8, ((b"VP8 ", FILES["webp"][20:]), (b"EXIF", b"garbage"))),
            ("broken XMP", 4, ((b"VP8 ", FILES["webp"][20:]), (b"XMP ", b"\xff" * 99))),
            ("a broken profile", 32, ((b"ICCP", b"\xff" * 99), (b"VP8 ", FILES["webp"][20:]))),
            ("EXIF that is not there", 8, ((b"VP8 ", FILES["webp"][20:]),)),
            ("EXIF that is longer than the file", 8, ((b"VP8 ", FILES["webp"][20:]), (b"EXIF\xff\0\0\0shor", b""))),
        )
    },
    "TIFF with broken EXIF": saved(gradient(), "TIFF", tiffinfo={34665: 4_000_000_000}),
    "TIFF with broken XMP": saved(gradient(), "TIFF", tiffinfo={700: b"\xff" * 99}),
}
_sane = b"II*\0\x08\0\0\0\0\0AAAAAAAA"
for _name, _file in (
    ("AVIF", saved(gradient(), "AVIF", exif=b"Exif\0\0" + _sane)),
    ("HEIC", heif(gradient(), exif=b"Exif\0\0" + _sane, xmp=b"\xff" * 99)),
):
    assert _sane in _file
    ODD_METADATA[f"{_name} with broken EXIF"] = _file.replace(_sane, b"garbage, so it is."[: len(_sane)])


class TestMetadata:
    @pytest.mark.parametrize("what", ODD_METADATA)
    @pytest.mark.filterwarnings("ignore")
    def test_no_metadata_whatever_makes_a_picture_unreadable(self, what: str) -> None:
        data = ODD_METADATA[what]
        source, picture = inspect(data, "a", allow_extreme_ratio=True), picture_of(data)
        assert (source.width, source.height) == (picture.width, picture.height) == (90, 60)
        assert picture.size_bytes == len(data), "the facts are those of the file as it came"
        turned = source.model_copy(update={"changes": ("converted, for the test",)})
        assert opened(prepare(data, turned).data).size == (90, 60)

    def test_hosts_that_have_set_pillows_limits_keep_them(self) -> None:
        before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
        for data in ODD_METADATA.values():
            picture_of(data)
        assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)

    def test_the_pixels_are_the_same_without_it(self) -> None:
        for kind in ("png", "palette", "bilevel", "deep"):
            data = FILES[kind]
            assert opened(split_png(data).pixels).tobytes() == opened(data).tobytes()
        for kind in ("jpeg", "turned", "progressive", "cmyk", "webp", "lossless", "avif"):
            assert opened(strip_metadata(FILES[kind])).tobytes() == opened(FILES[kind]).tobytes()

    def test_a_large_profile_is_applied_all_the_same(self) -> None:
        swapped = bytearray(PROFILE)
        red, blue = swapped.index(b"rXYZ"), swapped.index(b"bXYZ")
        swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
        huge = bytes(swapped) + bytes(3_000_000)
        huge = struct.pack(">I", len(huge)) + huge[4:]
        plain = saved(Image.new("RGB", (30, 20), (255, 0, 0)), "PNG")
        data = plain[:33] + chunk(b"iCCP", b"huge\0\0" + zlib.compress(huge)) + plain[33:]
        source = inspect(data, "a").model_copy(update={"changes": ("converted, for the test",)})
        pixel = opened(prepare(data, source).data).getpixel((9, 9))
        assert isinstance(pixel, tuple)
        assert pixel[2] > 200 > 60 > pixel[0]

    @pytest.mark.parametrize("packed", [False, True])
    def test_the_rotation_is_found_wherever_it_is_told(self, packed: bool) -> None:
        tags = exif(6).tobytes()
        told = b"\nexif\n%8d\n" % len(tags) + tags.hex().encode() + b"\n"
        xmp = b'<x tiff:Orientation="6"/>' + (b" " * 2_000_000 if packed else b"")
        body = zlib.compress if packed else bytes
        chunks = {
            b"eXIf": tags.removeprefix(b"Exif\0\0"),
            b"iTXt": b"XML:com.adobe.xmp\0" + bytes((packed,)) + b"\0\0\0" + body(xmp),
            b"zTXt" if packed else b"tEXt": b"Raw profile type exif\0" + (b"\0" if packed else b"") + body(told),
        }
        for kind, content in chunks.items():
            source = inspect(with_chunk(kind, content), "a")
            assert (source.width, source.height) == (60, 90), kind

    @pytest.mark.parametrize("kind", [b"IHDR", b"IDAT"])
    def test_what_the_pixels_need_is_damage_where_its_checksum_is_wrong(self, kind: bytes) -> None:
        data = bytearray(PNG + b"trailer" + PNG_END)
        start = data.index(kind)
        length = int.from_bytes(data[start - 4 : start])
        data[start + 4 + length] ^= 1
        with pytest.raises(BrokenPicture, match=f"is damaged .wrong checksum in {kind.decode()}") as caught:
            picture_of(bytes(data))
        assert not caught.value.truncated

    def test_a_wrong_checksum_of_the_end_which_holds_nothing_does_no_harm(self) -> None:
        wrong = PNG[:-1] + bytes([PNG[-1] ^ 1])
        assert not is_truncated(wrong)
        assert picture_of(wrong).format == inspect(wrong, "a").format == "PNG"

    def test_what_common_readers_refuse_for_its_metadata_goes_up_without(self) -> None:
        changes = ("stripped of metadata that other readers refuse",)
        text = with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000)))
        jpeg = FILES["jpeg"][:2] + b"\xff\xee\0\x07Adobe" + FILES["jpeg"][2:]
        for data in (text, with_chunk(b"tEXt", b"a\0b", wrong=True), jpeg):
            with pytest.raises(Exception, match=r"."), Image.open(BytesIO(data)) as image:
                image.load()
            source = inspect(data, "a")
            assert source.changes == changes
            with Image.open(BytesIO(prepare(data, source).data)) as image:
                image.load()
        assert not inspect(with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(900_000))), "a").changes

    def test_a_transparency_of_more_colours_than_the_palette_has_is_passed_over(self) -> None:
        canvas = BytesIO()
        gradient().quantize(16).save(canvas, "PNG")
        at = canvas.getvalue().index(b"IDAT") - 4
        data = canvas.getvalue()[:at] + chunk(b"tRNS", bytes(300)) + canvas.getvalue()[at:]
        assert not inspect(data, "a").changes
        assert thumbnail(data).startswith(b"\xff\xd8")

    def test_an_animated_png_is_told_and_one_that_only_says_so_is_not(self) -> None:
        frames = [gradient(), gradient().rotate(90)]
        assert split_png(saved(frames[0], "PNG", save_all=True, append_images=frames[1:])).animated
        assert split_png(saved(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)).animated
        assert not split_png(PNG).animated
        one = PNG[:33] + chunk(b"acTL", struct.pack(">II", 1, 0)) + chunk(b"fcTL", bytes(26)) + PNG[33:]
        assert not split_png(one).animated
        assert picture_of(one).format == "PNG"


class TestEnds:
    @pytest.mark.parametrize("kind", FILES)
    def test_a_whole_file_is_not_cut_and_a_part_of_it_is(self, kind: str) -> None:
        data = FILES[kind]
        assert not is_truncated(data)
        assert not is_truncated(data + b"\0\0\n")
        tail = {"mpo": len(data) - 1100, "deflated": len(data) - 8}.get(kind, len(data) - 1)
        assert all(is_truncated(data[:length]) for length in range(16, tail))

    def test_a_whole_avif_that_does_not_decode_is_not_cut(self) -> None:
        data = FILES["avif"]
        start = data.index(b"mdat") + 4
        wrecked = data[:start] + random.Random(3).randbytes(len(data) - start)
        with pytest.raises(BrokenPicture) as caught:
            picture_of(wrecked)
        assert not caught.value.truncated
        with pytest.raises(SourceImageError, match="is damaged"):
            inspect(wrecked, "a.avif")

    @pytest.mark.parametrize("kind", ["png", "webp", "bmp", "avif", "heic"])
    def test_damage_in_a_whole_file_is_never_called_a_cut(self, kind: str) -> None:
        data, chance = FILES[kind], random.Random(5)
        middle = range(len(data) // 2, len(data) * 4 // 5)
        for _ in range(30):
            damaged = bytearray(data)
            for at in chance.sample(middle, len(middle) // 2):
                damaged[at] = chance.choice((0x11, 0x22, 0x77))
            assert not is_truncated(bytes(damaged))

    def test_a_preview_inside_a_jpeg_is_not_taken_for_its_end(self) -> None:
        data = FILES["jpeg"][:2] + segment(0xE1, b"Exif\0\0" + FILES["jpeg"]) + FILES["jpeg"][2:]
        assert not is_truncated(data)
        assert is_truncated(data[:-40])

    def test_what_somebody_appends_does_not_hide_that_a_file_is_whole(self) -> None:
        for kind in ("jpeg", "png", "webp", "gif", "tiff"):
            assert not is_truncated(FILES[kind] + b"appended by a phone")

    @given(st.sampled_from([b"", *(each[:20] for each in FILES.values())]), st.binary(max_size=300))
    def test_no_bytes_make_it_fail(self, start: bytes, rest: bytes) -> None:
        data = start + rest
        assert is_truncated(data) in (True, False)
        assert len(full_pages(data)) <= 2
        assert isinstance(strip_metadata(data), bytes)


@pytest.mark.parametrize("tag", [258, 259, 262, 277, 339])
def test_a_tiff_that_names_no_value_where_it_must_is_a_broken_picture_like_any_other(tag: int) -> None:
    data = tiff({256: [8], 257: [8], 258: [40606], 262: [1], 277: [1], 339: [1], tag: []})
    with pytest.raises(BrokenPicture):
        picture_of(data)


class TestTiffs:
    def test_a_page_that_is_marked_as_a_preview_is_no_page(self) -> None:
        small: dict[int, list[int]] = {256: [4], 257: [4], 254: [1]}
        pages: tuple[dict[int, list[int]], ...]
        for order in "<>":
            for pages in (({}, small), (small, {}), (small, {}, small), ({}, {254: [4]}), ({}, {255: [2]})):
                data = tiff(*pages, order=order)
                assert len(full_pages(data)) == 1
                source = inspect(data, "scan.tif")
                assert (source.width, source.height) == (10, 10)
                assert source.changes == ("converted from TIFF",)
                assert opened(prepare(data, source).data).size == (10, 10)

    def test_pages_that_count_are_several(self) -> None:
        with pytest.raises(SourceImageError, match=r"several pages \(TIFF\)"):
            inspect(tiff({}, {254: [2]}), "scan.tif")

    def test_a_chain_of_pages_that_leads_nowhere_or_in_a_circle_ends(self) -> None:
        for link in (8, 0xFFFF_FFF0):
            data = bytearray(tiff({}))
            first = int.from_bytes(data[4:8], "little")
            data[-4:] = struct.pack("<I", first if link == 8 else link)
            assert full_pages(bytes(data)) == [0]
            assert inspect(bytes(data), "scan.tif").width == 10

    @pytest.mark.parametrize(
        "tags",
        [
            {258: [8] * 5, 262: [5], 277: [5], 338: [2]},  # CMYK and alpha
            {258: [32] * 3, 339: [3] * 3},  # floats
            {258: [16], 262: [1], 277: [1], 339: [3]},
            {258: [64], 262: [1], 277: [1], 339: [3]},
            {258: [32] * 3, 339: [2] * 3},  # signed
            {258: [16], 262: [32803], 277: [1]},  # raw
            {259: [9999]},  # compression
        ],
    )
    def test_pixels_that_are_not_supported_are_refused_with_a_remedy_and_not_called_cut(
        self, tags: dict[int, list[int]]
    ) -> None:
        with pytest.raises(SourceImageError) as caught:
            inspect(tiff(tags), "scan.tif")
        assert str(caught.value).startswith("image: scan.tif has pixels in a form that is not supported (")
        assert str(caught.value).endswith("); save it as PNG or JPEG in RGB")
        with pytest.raises(SourceImageError, match="cut short"):
            inspect(tiff(tags)[:60], "scan.tif")

    def test_a_jpeg_of_twelve_bits_is_not_called_damaged(self) -> None:
        data = FILES["jpeg"]
        start = data.index(b"\xff\xc0") + 4
        deep: Any = bytearray(data)
        deep[start] = 12
        with pytest.raises(SourceImageError, match=r"not supported .cannot handle 12-bit layers"):
            inspect(bytes(deep), "scan.jpg")


def test_the_files_that_gave_rise_to_this_are_read(tmp_path: Any) -> None:
    """As other tools write them: chunks of the size and order of real exports."""
    notes = PngImagePlugin.PngInfo()
    for number in range(40):
        notes.add_text(f"Note {number}", "workflow " * 20_000, zip=True)
    file = BytesIO()
    gradient().save(file, "PNG", pnginfo=notes, icc_profile=PROFILE + bytes(1_500_000))
    assert picture_of(file.getvalue()).width == 90
    assert inspect(file.getvalue(), "export.png").changes == ("stripped of metadata that other readers refuse",)
    assert picture_of(png(2, 2, 8, 2, bytes(14))).width == 2
