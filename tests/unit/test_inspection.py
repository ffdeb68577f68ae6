"""Promises of `inspection` and `conversion`: a source is either refused with a named error or made fit for the API."""

from __future__ import annotations

import pickle
import random
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, ImageOps, TiffImagePlugin

from prefect_segmind.errors import SourceImageError
from prefect_segmind.images import conversion, inspection
from prefect_segmind.images.conversion import prepare, thumbnail
from prefect_segmind.images.inspection import (
    MAX_BYTES,
    MAX_PIXELS,
    BrokenPicture,
    fitted_size,
    inspect,
    picture_of,
    read_picture,
)


def saved(picture: Image.Image, format: str, **options: Any) -> bytes:
    file = BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    return Image.frombytes(mode, size, random.Random(7).randbytes(size[0] * size[1] * len(mode)))


def gradient(size: tuple[int, int] = (90, 60), mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert(mode)


def exif(orientation: int, *, gps: bool = False) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    if gps:
        tags[0x010E] = "GPSMARKER"
        tags.get_ifd(0x8825)[1] = "N"
    return tags


def opened(data: bytes) -> Image.Image:
    picture = Image.open(BytesIO(data))
    picture.load()
    return picture


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body + chunk(b"IEND", b"")


def heif(*pictures: Image.Image, **options: Any) -> bytes:
    """A HEIC file of pictures, of which the first is the primary one."""
    container = pillow_heif.from_pillow(pictures[0])
    for other in pictures[1:]:
        container.add_from_pillow(other)
    file = BytesIO()
    container.save(file, **{"quality": 90, **options})
    return file.getvalue()


def files() -> dict[str, bytes]:
    """One small file of each kind that is read."""
    return {
        "jpeg": saved(gradient(), "JPEG"),
        "turned": saved(gradient(), "JPEG", exif=exif(6)),
        "progressive": saved(gradient(), "JPEG", progressive=True),
        "cmyk": saved(gradient(mode="CMYK"), "JPEG"),
        "mpo": saved(gradient(), "MPO", save_all=True, append_images=[gradient()]),
        "png": saved(gradient(mode="RGBA"), "PNG"),
        "palette": saved(gradient().quantize(9), "PNG"),
        "bilevel": saved(gradient(mode="1"), "PNG"),
        "deep": png(2, 2, 16, 2, b"\0" + bytes(range(12)) + b"\0" + bytes(range(12))),
        "webp": saved(gradient(), "WEBP"),
        "lossless": saved(gradient(mode="RGBA"), "WEBP", lossless=True),
        "gif": saved(gradient().quantize(9), "GIF"),
        "tiff": saved(gradient(), "TIFF"),
        "deflated": saved(gradient(mode="RGBA"), "TIFF", compression="tiff_deflate"),
        "bmp": saved(gradient(), "BMP"),
        "avif": saved(gradient(), "AVIF"),
        "heic": heif(noise((90, 60))),
        "burst": heif(gradient(), gradient().rotate(180)),
    }


FILES = files()


def refusal(data: bytes, **options: bool) -> str:
    with pytest.raises(SourceImageError) as caught:
        inspect(data, "ad.jpg", **options)
    text = str(caught.value)
    assert text.startswith("image: ad.jpg ")
    return text


class TestInspect:
    @pytest.mark.parametrize("kind", ["jpeg", "progressive", "png", "palette", "bilevel", "webp", "lossless"])
    def test_what_the_api_takes_goes_up_untouched(self, kind: str) -> None:
        source = inspect(FILES[kind], kind)
        assert (source.width, source.height, source.changes) == (90, 60, ())
        assert source.size_bytes == len(FILES[kind])
        prepared = prepare(FILES[kind], source)
        assert prepared.data is FILES[kind]
        assert prepared.sha256 == source.sha256
        assert {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[source.format] == prepared.extension
        assert prepared.content_type == f"image/{source.format.lower()}"

    @pytest.mark.parametrize(
        ("kind", "change"),
        [
            ("turned", "rotated by its EXIF orientation"),
            ("cmyk", "converted from CMYK to RGB"),
            ("mpo", "reduced to the first of its pictures (MPO)"),
            ("deep", "reduced to 8 bits a channel"),
            ("gif", "converted from GIF"),
            ("tiff", "converted from TIFF"),
            ("bmp", "converted from BMP"),
            ("avif", "converted from AVIF"),
            ("heic", "converted from HEIF"),
        ],
    )
    def test_what_must_change_is_told(self, kind: str, change: str) -> None:
        assert inspect(FILES[kind], kind).changes == (change,)

    def test_a_phones_mpo_is_not_animated(self) -> None:
        assert inspect(FILES["mpo"], "phone.jpg").format == "MPO"

    def test_sides_are_measured_after_the_rotation(self) -> None:
        source = inspect(FILES["turned"], "a")
        assert (source.width, source.height) == (60, 90)

    def test_the_scaled_size_is_told(self) -> None:
        wide = png(8000, 6000, 1, 0, (b"\0" + bytes(1000)) * 6000)
        assert inspect(wide, "a").changes == ("scaled from 8000×6000 to 5773×4330 pixels",)

    def test_more_than_ten_megabytes_is_told(self) -> None:
        assert inspect(FILES["jpeg"] + bytes(MAX_BYTES), "a").changes == ("made smaller than 10 MB (it has 10.0)",)

    def test_empty(self) -> None:
        assert "is empty" in refusal(b"")

    def test_no_image(self) -> None:
        assert "is not an image" in refusal(b"<html>no</html>")

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (saved(gradient(), "JPEG2000"), "JPEG 2000"),
            (saved(gradient(), "JPEG2000", no_jp2=True), "JPEG 2000"),
            (saved(Image.new("LAB", (30, 30)), "TIFF"), "in the LAB colour space"),
            (saved(gradient(mode="F"), "TIFF"), "in greys of 32 bits"),
            (saved(gradient(mode="I"), "TIFF"), "in greys of 32 bits"),
        ],
    )
    def test_what_is_not_supported_is_refused_with_a_remedy(self, data: bytes, reason: str) -> None:
        assert refusal(data) == f"image: ad.jpg is {reason}, which is not supported; save it as PNG or JPEG"
        with pytest.raises(BrokenPicture, match=reason):
            thumbnail(data)

    @pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "tiff", "avif", "heic"])
    def test_truncated(self, kind: str) -> None:
        text = refusal(FILES[kind][:-40])
        assert "is cut short (truncated" in text
        assert text.endswith("; copy or export it again")

    @pytest.mark.parametrize("kind", sorted(FILES))
    def test_what_is_cut_anywhere_is_told_so_where_it_cannot_be_read(self, kind: str) -> None:
        data = FILES[kind]
        for length in {*range(16, len(data), max(1, len(data) // 40)), len(data) - 1}:
            with suppress(SourceImageError):
                inspect(data[:length], "ad.jpg", allow_extreme_ratio=True)
                continue  # what is missing is no part of the picture
            assert "is cut short (truncated" in refusal(data[:length], allow_extreme_ratio=True)

    def test_a_png_without_its_end_is_truncated(self) -> None:
        assert "truncated" in refusal(FILES["png"][:-12])

    def test_damaged_is_not_called_truncated(self) -> None:
        damaged = saved(noise((40, 40)), "PNG").replace(b"IDAT", b"IDAX")
        assert "is damaged" in refusal(damaged)

    @pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_animated_or_several_pages(self, format: str) -> None:
        frames = [gradient(), gradient().rotate(90), noise((90, 60))]
        data = saved(frames[0], format, save_all=True, append_images=frames[1:])
        assert f"animated or has several pages ({format})" in refusal(data)

    def test_a_bomb_is_refused_before_it_is_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
        assert "has more than 178,956,970 pixels (20000×20000); scale it" in refusal(png(20000, 20000, 8, 2, b""))

    def test_a_webp_bomb_is_refused(self) -> None:
        canvas = struct.pack("<I", 15999)[:3] * 2
        chunks = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas + FILES["webp"][12:]
        assert refusal(b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks)

    def test_no_pixels(self) -> None:
        assert refusal(png(0, 5, 8, 2, b""))

    @pytest.mark.filterwarnings("error")
    def test_no_warning_between_pillows_two_limits(self) -> None:
        side = 9_500  # 90 megapixels: Pillow warns above 89
        data = png(side, side, 1, 0, (b"\0" + bytes(-(-side // 8))) * side)
        source = inspect(data, "a")
        assert "scaled from 9500×9500 to 5000×5000 pixels" in source.changes
        assert opened(prepare(data, source).data).size == (5000, 5000)

    @pytest.mark.filterwarnings("error")
    def test_a_tiff_that_pillow_would_warn_of_is_refused_with_a_remedy(self) -> None:
        data = saved(Image.new("1", (9_500, 9_500)), "TIFF", compression="group4")
        assert refusal(data).endswith(
            "has more than 89,478,485 pixels (9500×9500); scale it down, or save it as PNG or JPEG"
        )

    @pytest.mark.parametrize("size", [(300, 100), (100, 300)])
    def test_exactly_three_to_one_is_fine(self, size: tuple[int, int]) -> None:
        assert inspect(saved(Image.new("L", size), "PNG"), "a").changes == ()

    @pytest.mark.parametrize("size", [(301, 100), (100, 301)])
    def test_beyond_three_to_one_is_refused_unless_allowed(self, size: tuple[int, int]) -> None:
        data = saved(Image.new("L", size), "PNG")
        assert "allow_extreme_ratio" in refusal(data)
        assert inspect(data, "a", allow_extreme_ratio=True).width == size[0]

    @pytest.mark.parametrize("found", [0, 9, 77])
    def test_an_orientation_that_does_not_exist_is_none(self, found: int) -> None:
        assert inspect(saved(gradient(), "JPEG", exif=exif(found)), "a").changes == ()

    def test_broken_exif_does_not_break_the_picture(self) -> None:
        data = saved(gradient(), "JPEG", exif=b"Exif\0\0garbage instead of tags")
        assert inspect(data, "a").changes == ()

    def test_the_label_is_redacted(self) -> None:
        with pytest.raises(SourceImageError) as caught:
            inspect(b"", "https://b.example/a.jpg?X-Amz-Signature=secret")
        assert "secret" not in str(caught.value)

    def test_records_survive_a_round_trip_and_are_frozen(self) -> None:
        source = inspect(FILES["turned"], "a")
        assert type(source).model_validate_json(source.model_dump_json()) == source
        with pytest.raises(ValueError, match="frozen"):
            source.width = 1  # type: ignore[misc]

    @pytest.mark.filterwarnings("error")
    def test_sixty_four_threads_and_no_global_state(self) -> None:
        before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, list(warnings.filters))

        def one(kind: str) -> bytes:
            return prepare(FILES[kind], inspect(FILES[kind], kind)).data

        kinds = sorted(FILES) * 12
        with ThreadPoolExecutor(64) as pool:
            results = list(pool.map(one, kinds))
        assert {(kind, data) for kind, data in zip(kinds, results, strict=True)} == {
            (kind, one(kind)) for kind in FILES
        }
        assert before == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, list(warnings.filters))


def display_p3() -> bytes:
    """The profile of phones: that of sRGB with wider red, green and blue (the standard's, adapted to D50)."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag, colour in (
        (b"rXYZ", (0.51512, 0.24120, -0.00105)),
        (b"gXYZ", (0.29198, 0.69225, 0.04189)),
        (b"bXYZ", (0.15710, 0.06657, 0.78407)),
    ):
        entry = profile.index(tag)
        at = int.from_bytes(profile[entry + 4 : entry + 8]) + 8
        profile[at : at + 12] = struct.pack(">iii", *(round(value * 65_536) for value in colour))
    return bytes(profile)


def pixel(image: Image.Image, at: tuple[int, int]) -> tuple[int, ...]:
    found = image.getpixel(at)
    assert isinstance(found, tuple)
    return found


class TestHeif:
    def test_a_phones_photo_comes_out_upright_in_srgb_and_without_metadata(self) -> None:
        stored = Image.new("RGB", (4032, 3024), (117, 251, 76))  # sRGB's green, in Display P3
        stored.paste((255, 255, 255), (0, 0, 1000, 1000))
        tags = exif(6, gps=True)  # to be turned clockwise: what is stored at the top left belongs to the top right
        data = heif(stored, exif=tags.tobytes(), icc_profile=display_p3(), tile_size=512, thumbnails=[512])
        assert b"GPSMARKER" in data
        source = inspect(data, "IMG_0001.HEIC")
        assert (source.format, source.width, source.height) == ("HEIF", 3024, 4032)
        assert source.changes == ("converted from HEIF",)
        prepared = prepare(data, source)
        copy = opened(prepared.data)
        assert (prepared.content_type, prepared.extension, copy.size) == ("image/jpeg", "jpg", (3024, 4032))
        assert min(pixel(copy, (2900, 100))) > 250
        assert pixel(copy, (100, 4000)) == pytest.approx((0, 255, 0), abs=6)
        assert not copy.getexif()
        assert b"MARKER" not in prepared.data
        small = opened(thumbnail(data, 300))
        assert small.size == (300, 400)
        assert pixel(small, (20, 380)) == pytest.approx((0, 255, 0), abs=12)
        assert min(pixel(small, (290, 10))) > 240

    @pytest.mark.parametrize("orientation", range(2, 9))
    def test_it_is_turned_once_and_not_by_its_exif_again(self, orientation: int) -> None:
        corner = Image.new("RGB", (128, 64), "white")
        corner.paste("red", (0, 0, 32, 16))
        data = heif(corner, exif=exif(orientation).tobytes())
        viewed = Image.open(BytesIO(saved(corner, "PNG", exif=exif(orientation))))
        upright = opened(prepare(data, inspect(data, "a")).data)
        wanted = ImageOps.exif_transpose(viewed)
        assert wanted is not None
        assert upright.size == wanted.size
        for at in ((8, 8), (8, upright.height - 8), (upright.width - 8, 8), (upright.width - 8, upright.height - 8)):
            assert pixel(upright, at) == pytest.approx(pixel(wanted, at), abs=12)

    @pytest.mark.parametrize(("mode", "channels"), [("RGB;16", 3), ("RGBA;16", 4), ("I;16", 1)])
    def test_ten_bits_are_reduced_to_eight(self, mode: str, channels: int) -> None:
        file = BytesIO()
        half = struct.pack("<H", 0x8000) * channels * 64 * 64
        pillow_heif.encode(mode, (64, 64), half, file, quality=-1)
        data = file.getvalue()
        source = inspect(data, "a.heic")
        assert source.changes == ("converted from HEIF", "reduced to 8 bits a channel")
        copy = opened(prepare(data, source).data)
        assert copy.mode == ("RGBA" if channels == 4 else "RGB")
        assert pixel(copy, (32, 32)) == pytest.approx((128,) * len(copy.mode), abs=2)

    def test_transparency_is_kept(self) -> None:
        holed = gradient(mode="RGBA")
        holed.paste((0, 0, 0, 0), (0, 0, 40, 60))
        data = heif(holed)
        prepared = prepare(data, inspect(data, "a.heic"))
        assert prepared.extension == "png"
        assert opened(prepared.data).getchannel("A").getextrema() == (0, 255)

    def test_of_several_pictures_the_primary_one_counts(self) -> None:
        red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (90, 60), "blue")
        for primary, size in ((0, (64, 64)), (1, (90, 60))):
            data = heif(red, blue, primary_index=primary)
            source = inspect(data, "burst.heic")
            assert source.changes == ("converted from HEIF", "reduced to its primary picture (HEIF)")
            assert (source.width, source.height) == size
            colour = pixel(opened(prepare(data, source).data), (9, 9))
            assert colour == pytest.approx((0, 0, 255) if primary else (255, 0, 0), abs=9)

    @pytest.mark.parametrize("brand", [b"hevc", b"msf1"])
    def test_a_sequence_is_animated(self, brand: bytes) -> None:
        text = refusal(FILES["heic"].replace(b"ftypheic", b"ftyp" + brand))
        assert "animated or has several pages (HEIF)" in text

    def test_a_photo_that_lacks_its_end_is_cut_though_its_decoder_forgives_that(self) -> None:
        tiles = heif(gradient((512, 512)), tile_size=128)
        assert pillow_heif.open_heif(tiles[:-1]).data
        for data in (tiles, FILES["heic"]):
            with pytest.raises(BrokenPicture) as caught:
                picture_of(data[:-1])
            assert caught.value.truncated

    def test_damage_shows_though_its_thumbnail_is_whole(self) -> None:
        data = heif(gradient((512, 384)), thumbnails=[64])
        assert picture_of(data).width == 512
        start = data.index(b"mdat") + 4
        with pytest.raises(BrokenPicture):
            picture_of(data[:start] + bytes(len(data) // 8) + data[start + len(data) // 8 :])

    def test_a_bomb_is_refused_before_it_is_decoded_even_where_it_is_cropped(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = FILES["heic"]
        at = data.index(b"ispe") + 8
        bomb = data[:at] + struct.pack(">II", 20_000, 20_000) + data[at + 8 :]
        assert pillow_heif.HeifImageFile(BytesIO(bomb)).size == (90, 60), "cropped to that"
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
        assert refusal(bomb).endswith("has more than 178,956,970 pixels (20000×20000); scale it down")

    def test_a_size_that_is_not_that_of_its_pixels_is_damage(self) -> None:
        data = FILES["heic"]
        at = data.index(b"ispe") + 8
        assert "is damaged" in refusal(data[:at] + struct.pack(">II", 192, 128) + data[at + 8 :])

    def test_pillows_list_of_formats_stays_as_it_was(self) -> None:
        inspect(FILES["heic"], "a.heic")
        assert "HEIF" not in Image.OPEN
        assert "image/heif" not in Image.MIME.values()

    def test_without_pillow_heif_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        assert refusal(FILES["heic"]) == (
            "image: ad.jpg is HEIC or HEIF, which needs the extra heif; "
            "run pip install 'prefect-segmind[heif]', or save it as JPEG"
        )
        assert inspect(FILES["avif"], "a.avif").format == "AVIF"


class TestPrepare:
    @pytest.mark.parametrize("kind", sorted(FILES))
    def test_the_result_needs_no_more_changes_and_is_the_same_each_time(self, kind: str) -> None:
        source = inspect(FILES[kind], kind)
        prepared = prepare(FILES[kind], source)
        again = inspect(prepared.data, kind)
        assert again.changes == ()
        assert (again.width, again.height, again.sha256) == (source.width, source.height, prepared.sha256)
        assert prepared == prepare(FILES[kind], source)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_orientation_becomes_upright(self, orientation: int) -> None:
        corner = Image.new("RGB", (64, 32), "white")
        corner.paste("red", (0, 0, 16, 8))
        turns: dict[int, Callable[[Image.Image], Image.Image]] = {
            1: lambda each: each,
            2: lambda each: each.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            3: lambda each: each.transpose(Image.Transpose.ROTATE_180),
            4: lambda each: each.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
            5: lambda each: each.transpose(Image.Transpose.TRANSPOSE),
            6: lambda each: each.transpose(Image.Transpose.ROTATE_90),
            7: lambda each: each.transpose(Image.Transpose.TRANSVERSE),
            8: lambda each: each.transpose(Image.Transpose.ROTATE_270),
        }
        data = saved(turns[orientation](corner), "PNG", exif=exif(orientation))
        upright = opened(prepare(data, inspect(data, "a")).data).convert("RGB")
        assert upright.size == (64, 32)
        red = upright.getpixel((4, 3))
        assert isinstance(red, tuple)
        assert red[0] > 200
        assert red[1] < 60

    def test_no_metadata_goes_along(self) -> None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for mode, format in [("RGB", "JPEG"), ("RGBA", "PNG"), ("RGBA", "WEBP")]:
            options = {"comment": b"COMMENTMARKER"} if format == "JPEG" else {}
            picture = gradient(mode=mode)
            if mode == "RGBA":
                picture.putalpha(100)
            data = saved(picture, format, exif=exif(6, gps=True), icc_profile=profile, **options)
            copy = opened(prepare(data, inspect(data, "a")).data)
            assert not copy.getexif()
            assert set(copy.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
            assert b"MARKER" in data
            assert b"MARKER" not in prepare(data, inspect(data, "a")).data

    def test_opaque_becomes_jpeg_and_transparent_png(self) -> None:
        opaque = saved(gradient(mode="RGBA"), "TIFF")
        assert prepare(opaque, inspect(opaque, "a")).extension == "jpg"
        holed = gradient(mode="RGBA")
        holed.putpixel((0, 0), (1, 2, 3, 0))
        data = saved(holed, "TIFF")
        prepared = prepare(data, inspect(data, "a"))
        assert prepared.extension == "png"
        assert opened(prepared.data).getpixel((0, 0)) == (1, 2, 3, 0)

    def test_a_transparent_gif_keeps_its_transparency(self) -> None:
        palette = gradient().quantize(9)
        data = saved(palette, "GIF", transparency=palette.getpixel((0, 0)))
        copy = opened(prepare(data, inspect(data, "a")).data)
        assert copy.mode == "RGBA"
        assert copy.getchannel("A").getextrema() == (0, 255)

    def test_the_jpeg_is_not_subsampled(self) -> None:
        copy = Image.open(BytesIO(prepare(FILES["bmp"], inspect(FILES["bmp"], "a")).data))
        assert [each[1:3] for each in copy.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]

    def test_sixteen_bit_greys_are_scaled_and_not_clipped(self) -> None:
        rows = b"".join(b"\0" + b"".join(struct.pack(">H", x * 257) for x in range(256)) for _ in range(128))
        data = png(256, 128, 16, 0, rows)
        copy = opened(prepare(data, inspect(data, "a")).data).convert("L")
        row = [copy.getpixel((x, 64)) for x in range(256)]
        assert all(isinstance(value, int) and abs(value - x) <= 2 for x, value in enumerate(row))

    def test_a_sixteen_bit_key_colour_does_not_make_other_pixels_transparent(self) -> None:
        key = chunk(b"tRNS", struct.pack(">HHH", 0x1234, 0x1234, 0x1234))
        data = png(2, 2, 16, 2, (b"\0" + b"\x34\x00" * 6) * 2, key)
        assert opened(prepare(data, inspect(data, "a")).data).mode == "RGB"

    def test_an_embedded_profile_is_applied(self) -> None:
        swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        red, blue = swapped.index(b"rXYZ"), swapped.index(b"bXYZ")
        swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
        data = saved(Image.new("RGB", (30, 20), (255, 0, 0)), "TIFF", icc_profile=bytes(swapped))
        pixel = opened(prepare(data, inspect(data, "a")).data).getpixel((9, 9))
        assert isinstance(pixel, tuple)
        assert pixel[2] > 200
        assert pixel[0] < 60

    @pytest.mark.parametrize("profile", [b"junk", b"x" * 16 + b"RGB " + b"x" * 99, b"x" * 16 + b"CMYK" + b"x" * 99])
    def test_a_broken_or_foreign_profile_is_ignored(self, profile: bytes) -> None:
        data = saved(Image.new("RGB", (30, 20), (255, 0, 0)), "TIFF", icc_profile=profile)
        pixel = opened(prepare(data, inspect(data, "a")).data).getpixel((9, 9))
        assert isinstance(pixel, tuple)
        assert pixel[0] > 250

    def test_a_profile_of_rgb_serves_a_grey_picture(self) -> None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        data = saved(Image.new("L", (30, 20), 90), "TIFF", icc_profile=profile)
        pixel = opened(prepare(data, inspect(data, "a")).data).getpixel((9, 9))
        assert isinstance(pixel, tuple)
        assert all(abs(each - 90) <= 2 for each in pixel)

    def test_a_file_of_more_than_ten_megabytes_is_made_to_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for room in (inspection, conversion):
            monkeypatch.setattr(room, "MAX_BYTES", 40_000)  # the same code at a hundredth of the time
        for mode, extension in [("RGB", "jpg"), ("RGBA", "webp")]:
            data = saved(noise((300, 150), mode), "PNG")
            source = inspect(data, "a")
            prepared = prepare(data, source)
            assert len(prepared.data) <= 40_000
            assert prepared.extension == extension
            assert inspect(prepared.data, "a").changes == ()

    def test_ten_megabytes_for_real(self) -> None:
        data = saved(noise((2600, 1700)), "PNG", compress_level=0)
        prepared = prepare(data, inspect(data, "a"))
        assert len(prepared.data) <= MAX_BYTES
        assert inspect(prepared.data, "a").changes == ()

    @pytest.mark.parametrize("opaque", [True, False])
    def test_sides_that_jpeg_and_webp_cannot_hold_become_png(
        self, opaque: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for room in (inspection, conversion):
            monkeypatch.setattr(room, "MAX_BYTES", 60_000)
        mode = "RGB" if opaque else "RGBA"
        data = saved(noise((70_000, 1), mode), "TIFF")
        prepared = prepare(data, inspect(data, "a", allow_extreme_ratio=True))
        assert len(prepared.data) <= 60_000
        assert inspect(prepared.data, "a", allow_extreme_ratio=True).changes == ()

    def test_other_bytes_than_those_inspected_are_a_named_error(self) -> None:
        with pytest.raises(BrokenPicture):
            prepare(b"other", inspect(FILES["bmp"], "a"))

    @settings(max_examples=40, deadline=None)
    @given(
        width=st.integers(1, 60),
        height=st.integers(1, 60),
        mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr"]),
        format=st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"]),
        orientation=st.integers(0, 9),
    )
    def test_every_picture_that_can_be_saved_comes_out_clean(
        self, width: int, height: int, mode: str, format: str, orientation: int
    ) -> None:
        try:
            tags = {} if format in ("BMP", "GIF") else {"exif": exif(orientation)}
            data = saved(Image.new(mode, (width, height)), format, **tags)
            opened(data)
        except (OSError, ValueError, KeyError):
            return  # Pillow does not write this mode in this format, or does not read what it wrote (BMP, 11.0)
        source = inspect(data, "a", allow_extreme_ratio=True)
        again = inspect(prepare(data, source).data, "a", allow_extreme_ratio=True)
        assert again.changes == ()
        assert (again.width, again.height) == (source.width, source.height)

    @given(st.integers(1, 400_000), st.integers(1, 400_000))
    def test_a_fitted_size_fits_and_keeps_within_the_ratios(self, width: int, height: int) -> None:
        fitted = fitted_size((width, height), MAX_PIXELS)
        assert 0 < fitted[0] * fitted[1] <= MAX_PIXELS
        assert (fitted == (width, height)) == (width * height <= MAX_PIXELS)
        if max(width, height) <= 3 * min(width, height):
            assert max(fitted) <= 3 * min(fitted)
        assert (fitted[0] >= fitted[1]) == (width >= height) or fitted[0] == fitted[1]


class TestReadPicture:
    @pytest.mark.parametrize(
        ("kind", "content_type", "extension"),
        [
            ("jpeg", "image/jpeg", "jpg"),
            ("png", "image/png", "png"),
            ("webp", "image/webp", "webp"),
            ("gif", "image/gif", "gif"),
            ("tiff", "image/tiff", "tiff"),
            ("mpo", "image/jpeg", "jpg"),
            ("bmp", "image/bmp", "bmp"),
            ("avif", "image/avif", "avif"),
            ("heic", "image/heif", "heif"),
        ],
    )
    def test_the_type_comes_from_the_bytes(self, kind: str, content_type: str, extension: str, tmp_path: Path) -> None:
        path = tmp_path / "answer.part"
        path.write_bytes(FILES[kind])
        picture = read_picture(path)
        assert (picture.content_type, picture.extension) == (content_type, extension)
        assert (picture.width, picture.height, picture.size_bytes) == (90, 60, len(FILES[kind]))
        assert len(picture.sha256) == 64

    @pytest.mark.parametrize(
        ("data", "truncated"),
        [
            (FILES["jpeg"][: len(FILES["jpeg"]) // 2], True),
            (FILES["png"][:40], True),
            (FILES["png"][:-4], True),
            (FILES["webp"][:60], True),
            (FILES["png"].replace(b"IDAT", b"IDAX"), False),
            (b"", False),
            (b"<html>", False),
            (b'{"error": "no"}', False),
            (png(20000, 20000, 8, 2, b""), False),
        ],
    )
    def test_cut_short_and_no_picture_are_told_apart(self, data: bytes, truncated: bool, tmp_path: Path) -> None:
        path = tmp_path / "answer.part"
        path.write_bytes(data)
        with pytest.raises(BrokenPicture) as caught:
            read_picture(path)
        assert caught.value.truncated is truncated

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
    def test_damage_shows_as_if_all_pixels_were_worked_out(self, options: dict[str, Any], tmp_path: Path) -> None:
        whole = saved(noise((160, 120)).resize((320, 240)), "JPEG", **options)
        path, chance, seen = tmp_path / "answer.part", random.Random(1), set()
        for _ in range(200):
            start, end = sorted(chance.choices(range(2, len(whole)), k=2))
            end = min(end, start + chance.choice((1, 2, 400)))
            data = chance.choice((whole[:start], whole[:start] + whole[end:], whole[:start] + bytes(8) + whole[end:]))
            path.write_bytes(data)
            verdicts: list[bool | None] = [None, None]
            try:
                read_picture(path)
            except BrokenPicture as broken:
                verdicts[0] = broken.truncated
            try:
                inspection.load_picture(inspection.open_picture(data), data)
            except BrokenPicture as broken:
                verdicts[1] = broken.truncated
            assert verdicts[0] == verdicts[1]
            seen.add(verdicts[0])
        assert seen == {None, False, True}

    def test_a_missing_file_is_an_os_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_picture(tmp_path / "none")

    def test_the_error_travels_between_processes(self) -> None:
        copy = pickle.loads(pickle.dumps(BrokenPicture("is cut", "again", truncated=True)))
        assert (str(copy), copy.remedy, copy.truncated) == ("is cut", "again", True)


class TestForeignBytes:
    """No bytes whatever make anything but the named errors."""

    @staticmethod
    def survive(data: bytes, path: Path) -> None:
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(SourceImageError):
                prepare(data, inspect(data, "a", allow_extreme_ratio=True))
            with suppress(BrokenPicture):
                read_picture(path)
            with suppress(BrokenPicture):
                thumbnail(data)

    @settings(max_examples=150, deadline=None)
    @given(kind=st.sampled_from(sorted(FILES)), share=st.floats(0, 1))
    def test_cut_anywhere(self, kind: str, share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
        data = FILES[kind]
        self.survive(data[: int(len(data) * share)], tmp_path_factory.getbasetemp() / "cut")

    @settings(max_examples=150, deadline=None)
    @given(kind=st.sampled_from(sorted(FILES)), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255))))
    def test_damaged_anywhere(
        self, kind: str, flips: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        data = bytearray(FILES[kind])
        for share, value in flips:
            data[int(share * (len(data) - 1))] = value
        self.survive(bytes(data), tmp_path_factory.getbasetemp() / "damaged")

    @settings(max_examples=100, deadline=None)
    @given(start=st.sampled_from([b"", *(each[:16] for each in FILES.values())]), rest=st.binary(max_size=200))
    def test_anything(self, start: bytes, rest: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.survive(start + rest, tmp_path_factory.getbasetemp() / "any")


class TestThumbnail:
    def test_small_jpeg_at_most_so_wide(self) -> None:
        small = opened(thumbnail(saved(noise((1600, 800)), "JPEG"), 380))
        assert (small.format, small.size) == ("JPEG", (380, 190))

    def test_upright_and_measured_so(self) -> None:
        assert opened(thumbnail(saved(noise((1600, 800)), "JPEG", exif=exif(6)), 200)).size == (200, 400)

    def test_a_tower_stays_small_too(self) -> None:
        assert opened(thumbnail(saved(Image.new("L", (2, 70_000)), "PNG"), 100)).size == (1, 300)

    def test_never_larger_than_the_picture(self) -> None:
        assert opened(thumbnail(FILES["png"])).size == (90, 60)

    def test_transparency_on_white(self) -> None:
        small = opened(thumbnail(saved(Image.new("RGBA", (30, 30), (0, 0, 0, 0)), "PNG")))
        assert small.getpixel((9, 9)) == (255, 255, 255)

    def test_broken(self) -> None:
        with pytest.raises(BrokenPicture):
            thumbnail(b"nothing")


def test_tiff_pages_of_one_are_read_with_their_orientation() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274] = 6
    data = saved(gradient(), "TIFF", tiffinfo=tags)
    source = inspect(data, "scan.tif")
    assert (source.width, source.height) == (60, 90)
    assert opened(prepare(data, source).data).size == (60, 90)
