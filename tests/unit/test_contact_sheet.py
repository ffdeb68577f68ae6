"""Promises of `contact_sheet`: whatever the pictures and labels are, one tidy picture with each in its place."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from io import BytesIO
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from prefect_segmind.images.contact_sheet import MAX_LABELS, MAX_SIDE, contact_sheet
from tests.unit.test_inspection import heif

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 170, 0)
# Far apart from each other and from the greys of the sheet, so that each shows where its picture is.
STEPS = (0, 85, 170, 255)
COLOURS: list[Colour] = [each for each in product(STEPS, STEPS, STEPS) if max(each) - min(each) > 100]
WEIGHTS = ["weight 10", "weight 30", "weight 50"]


def saved(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def plain(colour: Colour, size: tuple[int, int] = (60, 60)) -> bytes:
    return saved(Image.new("RGB", size, colour))


def sheet_of(
    pictures: Sequence[Sequence[bytes | None]],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    **options: Any,
) -> Image.Image:
    rows = rows or [f"ANIME, seed {n}" for n in range(len(pictures))]
    columns = columns or [f"weight {n}" for n in range(len(pictures[0]))]
    return opened(contact_sheet(rows, columns, lambda row, column: pictures[row][column], **options))


def opened(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    assert image.format == "JPEG"
    return image.convert("RGB")


def similar(sheet: Image.Image, colour: Colour, tolerance: int = 24) -> Image.Image:
    """White where the sheet has the colour."""
    channels = ImageChops.difference(sheet, Image.new("RGB", sheet.size, colour)).split()
    furthest = ImageChops.lighter(ImageChops.lighter(channels[0], channels[1]), channels[2])
    return furthest.point([255 if value <= tolerance else 0 for value in range(256)])


def where(sheet: Image.Image, colour: Colour) -> Box:
    box = similar(sheet, colour).getbbox()
    assert box is not None, f"{colour} is nowhere"
    return box


def centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def size(box: Box) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def pixel(sheet: Image.Image, at: tuple[float, float]) -> Colour:
    found = sheet.getpixel((int(at[0]), int(at[1])))
    assert isinstance(found, tuple)
    return found[0], found[1], found[2]


def near(found: Colour, wanted: Colour, tolerance: int = 6) -> bool:
    return all(abs(one - other) <= tolerance for one, other in zip(found, wanted, strict=True))


def darkest(sheet: Image.Image, box: Box) -> int:
    return min(sheet.crop(box).convert("L").tobytes())


def assert_margins_are_clear(sheet: Image.Image) -> None:
    width, height = sheet.size
    paper, edge = pixel(sheet, (0, 0)), 10
    strips = [
        (0, 0, width, edge),
        (0, height - edge, width, height),
        (0, 0, edge, height),
        (width - edge, 0, width, height),
    ]
    for strip in strips:
        assert similar(sheet.crop(strip), paper, 12).getextrema() == (255, 255)


class TestPictures:
    def test_each_is_in_the_cell_of_its_row_and_column(self) -> None:
        sheet = sheet_of([[plain(RED), plain(BLUE)], [plain(GREEN), plain(RED, (61, 60))]])
        blue, green = where(sheet, BLUE), where(sheet, GREEN)
        middles = {RED: (centre(green)[0], centre(blue)[1]), BLUE: centre(blue), GREEN: centre(green)}
        assert all(near(pixel(sheet, at), colour) for colour, at in middles.items())
        assert near(pixel(sheet, (centre(blue)[0], centre(green)[1])), RED)
        assert blue[0] > green[2]
        assert blue[3] < green[1]

    def test_each_is_asked_for_once_row_by_row(self) -> None:
        asked: list[tuple[int, int]] = []

        def picture(row: int, column: int) -> bytes | None:
            asked.append((row, column))
            return plain(RED)

        contact_sheet(["ANIME", "DESIGN"], WEIGHTS, picture)
        assert asked == list(product(range(2), range(3)))

    def test_many_large_ones_take_little_memory(self) -> None:
        large = Image.new("RGB", (1500, 1000), RED)
        tracemalloc.start()
        try:
            contact_sheet(["a"] * 6, ["b"] * 5, lambda row, column: saved(large, "BMP"))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 4 * len(saved(large, "BMP"))  # of 30

    @pytest.mark.parametrize("picture_size", [(90, 60), (60, 90), (50, 50), (1536, 1024), (300, 100), (7, 9)])
    def test_pictures_of_one_shape_fill_their_cells(self, picture_size: tuple[int, int]) -> None:
        sheet = sheet_of([[plain(RED, picture_size), plain(BLUE, picture_size)], [plain(GREEN, picture_size), None]])
        red, blue, green = (where(sheet, each) for each in (RED, BLUE, GREEN))
        assert size(red) == size(blue) == size(green)
        assert size(red)[0] / size(red)[1] == pytest.approx(picture_size[0] / picture_size[1], rel=0.02)
        assert 0 < blue[0] - red[2] == green[1] - red[3] < 30  # nothing but the gap between them

    def test_the_ratio_is_kept_on_a_neutral_mount(self) -> None:
        wide, tall = (400, 100), (100, 400)
        sheet = sheet_of([[plain(RED), plain(BLUE, wide), plain(GREEN, tall)], [plain(RED), None, plain(RED)]])
        blue, green = where(sheet, BLUE), where(sheet, GREEN)
        assert size(blue)[0] == pytest.approx(4 * size(blue)[1], abs=3)
        assert size(green)[1] == pytest.approx(4 * size(green)[0], abs=3)
        beside = pixel(sheet, (green[0] - 20, centre(green)[1]))
        assert max(beside) - min(beside) <= 10
        assert min(beside) > 200

    def test_exif_orientation_is_honoured(self) -> None:
        stored = Image.new("RGB", (90, 60), BLUE)
        stored.paste(RED, (0, 0, 45, 60))
        tags = Image.Exif()
        tags[0x0112] = 6  # to be turned clockwise: what is stored at the left belongs to the top
        sheet = sheet_of([[saved(stored, "JPEG", exif=tags, subsampling=0, quality=95)]])
        red, blue = where(sheet, RED), where(sheet, BLUE)
        assert red[3] <= blue[1] + 4
        assert size(red)[0] == pytest.approx(size(blue)[0], abs=3)
        assert size(red)[0] == pytest.approx(4 / 3 * size(red)[1], rel=0.05)

    @pytest.mark.parametrize(
        ("data", "wanted"),
        [
            (saved(Image.new("CMYK", (60, 60), (0, 255, 255, 0)), "JPEG"), RED),
            (saved(Image.new("CMYK", (60, 60), (0, 255, 255, 0)), "TIFF"), RED),
            (saved(Image.new("RGBA", (60, 60), (0, 0, 255, 255))), BLUE),
            (saved(Image.new("RGBA", (60, 60), (0, 0, 0, 0))), (255, 255, 255)),
            (saved(Image.new("RGBA", (60, 60), (255, 0, 0, 128)), "WEBP", lossless=True), (255, 127, 127)),
            (saved(Image.new("I;16", (60, 60), 128 * 257)), (128, 128, 128)),
            (heif(Image.new("RGB", (64, 64), RED)), RED),
            (saved(Image.new("1", (60, 60), 0)), (0, 0, 0)),
            (saved(Image.new("RGB", (60, 60), BLUE).quantize(4), "GIF"), BLUE),
            (saved(Image.new("RGB", (60, 60), RED), save_all=True, append_images=[Image.new("RGB", (60, 60))]), RED),
        ],
    )
    def test_every_kind_of_picture_shows_its_colour(self, data: bytes, wanted: Colour) -> None:
        sheet = sheet_of([[plain(GREEN), data]])
        green = where(sheet, GREEN)
        assert near(pixel(sheet, (centre(green)[0] + size(green)[0] + 20, centre(green)[1])), wanted)

    def test_what_asking_raises_goes_through(self) -> None:
        def picture(row: int, column: int) -> bytes | None:
            raise ConnectionError("the store is away")

        with pytest.raises(ConnectionError, match="the store is away"):
            contact_sheet(["ANIME"], WEIGHTS, picture)


class TestCellsWithoutAPicture:
    def test_a_missing_one_is_a_grey_cell_with_a_word(self) -> None:
        sheet = sheet_of([[plain(RED), None]])
        red = where(sheet, RED)
        left = red[2] + 16
        cell = sheet.crop((left + 4, red[1] + 4, left + size(red)[0] - 4, red[3] - 4)).convert("L")
        greys = sorted(cell.tobytes())
        median = greys[len(greys) // 2]
        assert 180 < median < 240
        assert greys[0] < 150  # the letters
        word = cell.point([255 if value < 180 else 0 for value in range(256)]).getbbox()
        assert word is not None
        assert centre(word) == pytest.approx((cell.width / 2, cell.height / 2), abs=5)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"<html>no</html>",
            saved(Image.effect_noise((60, 60), 90), "JPEG")[:-900],
            plain(RED)[:-12],
            plain(RED).replace(b"IDAT", b"IDAX"),
            b"\0\0\0\x18ftypheic" + bytes(90),
            saved(Image.new("F", (60, 60), 0.5), "TIFF"),
        ],
    )
    def test_one_that_does_not_decode_says_so_and_harms_no_other(self, data: bytes) -> None:
        def with_second(second: bytes | None) -> Image.Image:
            return sheet_of([[plain(RED), second, plain(BLUE)]])

        sheet = with_second(data)
        assert sheet.tobytes() == with_second(b"no picture either").tobytes()
        assert sheet.tobytes() != with_second(None).tobytes()
        assert near(pixel(sheet, centre(where(sheet, RED))), RED)
        assert near(pixel(sheet, centre(where(sheet, BLUE))), BLUE)

    def test_a_sheet_without_any_picture_is_still_a_sheet(self) -> None:
        sheet = sheet_of([[None, b"x"], [b"", None]], source=b"broken", title="nothing came")
        assert min(sheet.size) > 600
        assert_margins_are_clear(sheet)


class TestSource:
    @pytest.mark.parametrize("source_size", [(90, 60), (60, 90), (60, 60)])
    def test_it_is_in_the_top_left_corner_in_its_own_ratio(self, source_size: tuple[int, int]) -> None:
        sheet = sheet_of([[plain(RED), plain(BLUE)]], source=plain(GREEN, source_size))
        red, green = where(sheet, RED), where(sheet, GREEN)
        assert green[2] < red[0]
        assert green[3] < red[1]
        assert max(green[:2]) < 60
        assert size(green)[0] / size(green)[1] == pytest.approx(source_size[0] / source_size[1], rel=0.02)
        assert near(pixel(sheet, centre(green)), GREEN)

    def test_it_has_a_label(self) -> None:
        sheet = sheet_of([[plain(RED)]], rows=[" "], source=plain(GREEN))
        green = where(sheet, GREEN)
        assert darkest(sheet, (green[0], green[3] + 4, green[2], green[3] + 50)) < 160

    def test_one_that_does_not_decode_is_a_cell_that_says_so(self) -> None:
        broken = sheet_of([[plain(RED)]], source=b"x")
        assert broken.size == sheet_of([[plain(RED)]], source=plain(GREEN)).size
        assert pixel(broken, (50, 50)) != pixel(broken, (0, 0))


class TestLabels:
    def test_a_rows_is_beside_it_and_a_columns_above_it(self) -> None:
        sheet = sheet_of([[plain(RED)]], rows=["ANIME"], columns=["weight 30"])
        red = where(sheet, RED)
        grey = sheet.convert("L").point([255 if value < 100 else 0 for value in range(256)])
        beside, above = grey.crop((0, red[1], red[0] - 4, red[3])), grey.crop((red[0], 0, red[2], red[1] - 4))
        left, top = beside.getbbox(), above.getbbox()
        assert left is not None
        assert top is not None
        assert centre(left)[1] == pytest.approx(size(red)[1] / 2, abs=8)
        assert min(size(left)[1], size(top)[1]) >= 12  # legible

    @pytest.mark.parametrize("axis", ["rows", "columns"])
    def test_long_ones_that_differ_at_the_end_still_look_different(self, axis: str) -> None:
        same = "A style with a name that does not fit, however it is wrapped, " * 20
        one, other = ([f"{same} seed {number}"] for number in (1, 2))
        assert sheet_of([[None]], **{axis: one}).tobytes() != sheet_of([[None]], **{axis: other}).tobytes()

    def test_letters_that_the_font_lacks_become_plain_ones(self) -> None:
        accented = sheet_of([[None]], rows=["Größe — 2×3"], columns=["Æsthetic café"])
        assert accented.tobytes() == sheet_of([[None]], rows=["Grosse - 2x3"], columns=["AEsthetic cafe"]).tobytes()

    def test_controls_and_line_breaks_leave_nothing_behind(self) -> None:
        odd = sheet_of([[None]], rows=["AN\0IME\ud800\u202e"], columns=["weight\r\n\t30"])
        assert odd.tobytes() == sheet_of([[None]], rows=["ANIME"], columns=["weight 30"]).tobytes()

    def test_empty_ones_take_no_room(self) -> None:
        assert sheet_of([[None]], rows=[" "], columns=[" "]).size[0] < sheet_of([[None]]).size[0]

    def test_a_title_is_above_the_grid(self) -> None:
        pictures = [[plain(RED), plain(BLUE)]]
        without, titled = sheet_of(pictures), sheet_of(pictures, title="mug.jpg")
        assert titled.width == without.width
        assert titled.height > without.height
        assert darkest(titled, (0, 30, 200, 90)) < 90


class TestSize:
    def test_a_sheet_of_a_few_cells_shows_them_at_about_320_pixels(self) -> None:
        sheet = sheet_of([[plain(RED), plain(BLUE)]])
        assert size(where(sheet, RED)) == (320, 320)

    @pytest.mark.parametrize(("rows", "columns"), [(10, 10), (25, 4), (3, 25), (1, 40), (40, 1)])
    def test_a_larger_one_is_scaled_to_the_limit(self, rows: int, columns: int) -> None:
        tiny = plain(RED)
        sheet = sheet_of([[tiny] * columns] * rows, source=tiny, title="many")
        assert MAX_SIDE * 0.93 < max(sheet.size) <= MAX_SIDE

    @pytest.mark.parametrize("wide", [True, False])
    def test_the_largest_one_is_a_jpeg_that_opens(self, wide: bool) -> None:
        tiny = plain(RED, (30, 10) if wide else (10, 30))
        labels, one = [f"seed {n}" for n in range(MAX_LABELS)], ["weight 30"]
        sheet = opened(contact_sheet(one if wide else labels, labels if wide else one, lambda row, column: tiny))
        last = sheet.crop((sheet.width - 60, sheet.height - 40, sheet.width, sheet.height))
        assert similar(last, RED).getbbox() is not None

    @pytest.mark.parametrize(
        ("rows", "columns"),
        [([], ["a"]), (["a"], []), ([], []), (["a"] * (MAX_LABELS + 1), ["a"]), (["a"], ["a"] * (MAX_LABELS + 1))],
    )
    def test_an_empty_and_a_boundless_grid_are_refused_before_a_picture_is_asked_for(
        self, rows: list[str], columns: list[str]
    ) -> None:
        with pytest.raises(ValueError, match=f"at least one row|at most {MAX_LABELS} rows"):
            contact_sheet(rows, columns, lambda row, column: pytest.fail("asked"))


def test_the_same_input_makes_the_same_file_without_metadata() -> None:
    def one() -> bytes:
        return contact_sheet(["ANIME"], WEIGHTS, lambda row, column: plain(RED), source=plain(BLUE), title="mug")

    assert one() == one()
    image = Image.open(BytesIO(one()))
    assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


SIZES = st.tuples(st.integers(1, 500), st.integers(1, 500)).filter(lambda each: max(each) <= 5 * min(each))


@st.composite
def grids(draw: st.DrawFn) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    labels = st.lists(st.text(max_size=60), min_size=1, max_size=4)
    rows, columns = draw(labels), draw(labels)
    count = len(rows) * len(columns)
    return rows, columns, draw(st.lists(SIZES, min_size=count, max_size=count))


@settings(max_examples=30, deadline=None)
@given(grid=grids(), source=st.none() | SIZES, title=st.text(max_size=300))
def test_whatever_the_labels_and_sizes_every_picture_is_whole_and_in_line(
    grid: tuple[list[str], list[str], list[tuple[int, int]]], source: tuple[int, int] | None, title: str
) -> None:
    rows, columns, sizes = grid
    wide = len(columns)

    def picture(row: int, column: int) -> bytes:
        return plain(COLOURS[row * wide + column], sizes[row * wide + column])

    own = plain(COLOURS[-1], source) if source else None
    sheet = opened(contact_sheet(rows, columns, picture, source=own, title=title))
    assert max(sheet.size) <= MAX_SIDE
    assert_margins_are_clear(sheet)
    boxes = [where(sheet, colour) for colour in COLOURS[: len(sizes)]]
    for number, (box, (width, height)) in enumerate(zip(boxes, sizes, strict=True)):
        # Nothing is drawn over it, its ratio is its own, and it is in the middle of its row and of its column.
        assert similar(sheet.crop(box), COLOURS[number], 60).getextrema() == (255, 255)
        scale = max(size(box)) / max(width, height)
        assert size(box) == pytest.approx((width * scale, height * scale), abs=2)
        row, column = divmod(number, wide)
        assert centre(box)[1] == pytest.approx(centre(boxes[row * wide])[1], abs=1.5)
        assert centre(box)[0] == pytest.approx(centre(boxes[column])[0], abs=1.5)
        assert row == 0 or box[1] > boxes[number - wide][3]
        assert column == 0 or box[0] > boxes[number - 1][2]
    if source:
        corner = where(sheet, COLOURS[-1])
        assert all(corner[2] < box[0] and corner[3] < box[1] for box in boxes)
