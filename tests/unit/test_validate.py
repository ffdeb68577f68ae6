"""Validation: what is open in a job is settled or refused before anything is paid."""

from __future__ import annotations

import hashlib
import shutil
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from prefect_segmind.api.request import ImageToImageRequest
from prefect_segmind.errors import SegmindError, SourceImageError
from prefect_segmind.jobs.fingerprint import derived_seed, fingerprint
from prefect_segmind.jobs.job import parse_job
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.pipeline.validate import ValidatedJob, validate
from tests.support.wire import Wire, http

READER = SourceReader(s3=lambda: pytest.fail("S3 was asked"), allow_loopback=True)


def validated(image: str | Path, **fields: Any) -> ValidatedJob:
    return validate(parse_job({"image": str(image), "prompt": "a red mug", **fields}), READER)


def picture(folder: Path, size: tuple[int, int], *, orientation: int = 1, format: str = "JPEG") -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder / f"{size[0]}x{size[1]}.{format.lower()}"
    Image.linear_gradient("L").resize(size).convert("RGB").save(path, format, exif=exif)
    return path


class TestResolution:
    @pytest.mark.parametrize(
        ("size", "nearest"),
        [
            ((400, 400), "RESOLUTION_1024_1024"),
            ((400, 300), "RESOLUTION_1152_864"),
            ((640, 400), "RESOLUTION_1280_800"),
            ((300, 900), "RESOLUTION_512_1536"),
        ],
    )
    def test_auto_is_the_nearest_ratio(self, size: tuple[int, int], nearest: str, tmp_path: Path) -> None:
        job = validated(picture(tmp_path, size), resolution="AUTO")
        assert job.parameters["resolution"] == nearest
        assert job.request("https://example.com/a.jpg").resolution == nearest
        assert job.warnings == ()

    def test_auto_and_its_outcome_by_name_are_the_same_picture(self, photo: Path) -> None:
        auto = validated(photo, resolution="AUTO")
        assert auto.fingerprint == validated(photo, resolution=auto.parameters["resolution"]).fingerprint

    def test_a_crop_of_more_than_a_tenth_names_the_better_value(self, tmp_path: Path) -> None:
        job = validated(picture(tmp_path, (640, 360)))
        assert job.parameters["resolution"] == "RESOLUTION_1024_1024", "the API's own default, warned about and kept"
        assert job.warnings == (
            "RESOLUTION_1024_1024 crops 44% of the 640×360 image away; RESOLUTION_1280_720 would crop 0% "
            "(resolution: AUTO chooses it)",
        )

    @pytest.mark.parametrize(("width", "warned"), [(445, True), (444, False), (400, False)])
    def test_a_crop_of_a_tenth_or_less_is_no_matter(self, width: int, warned: bool, tmp_path: Path) -> None:
        assert bool(validated(picture(tmp_path, (width, 400))).warnings) is warned

    def test_a_crop_that_nothing_avoids_is_warned_about_too(self, tmp_path: Path) -> None:
        job = validated(picture(tmp_path, (1200, 120)), resolution="AUTO", allow_extreme_ratio=True)
        assert job.warnings == ("RESOLUTION_1536_512 crops 70% of the 1200×120 image away; no resolution crops less",)

    def test_sides_are_measured_after_the_exif_rotation(self, tmp_path: Path) -> None:
        job = validated(picture(tmp_path, (640, 360), orientation=6), resolution="AUTO")
        assert job.parameters["resolution"] == "RESOLUTION_720_1280"
        assert job.source
        assert (job.source.width, job.source.height) == (360, 640)

    def test_an_unlisted_one_is_sent_where_it_is_allowed(self, photo: Path) -> None:
        job = validate(
            parse_job(
                {"image": str(photo), "prompt": "x", "resolution": "RESOLUTION_1500_1000"},
                allow_unlisted_resolution=True,
            ),
            READER,
        )
        assert job.request("https://example.com/a.jpg").body()["resolution"] == "RESOLUTION_1500_1000"
        with pytest.raises(ValidationError):
            ImageToImageRequest(image_file="https://example.com/a.jpg", **job.parameters)


class TestSeeds:
    def test_one_is_always_sent_and_the_same_job_has_the_same(self, photo: Path) -> None:
        seeds = {validated(photo).seed, validated(photo, name="another/name").seed}
        assert len(seeds) == 1
        assert 100 <= seeds.pop() <= 999_999

    def test_another_prompt_or_weight_has_another(self, photo: Path) -> None:
        jobs = [validated(photo), validated(photo, prompt="a hat"), validated(photo, image_weight=51)]
        assert len({job.seed for job in jobs}) == 3

    def test_one_that_is_given_is_taken(self, photo: Path) -> None:
        job = validated(photo, seed=4711)
        assert job.seed == job.request("https://example.com/a.jpg").seed == 4711

    def test_random_draws_a_fresh_one_within_the_range(self, photo: Path) -> None:
        seeds = {validated(photo, seed="random").seed for _ in range(4)}
        assert len(seeds) > 1
        assert all(100 <= seed <= 999_999 for seed in seeds)


class TestFingerprint:
    def test_the_same_picture_at_another_path_is_the_same(self, photo: Path, tmp_path: Path) -> None:
        copy = shutil.copy(photo, tmp_path / "copy.jpeg")
        assert validated(photo).fingerprint == validated(copy).fingerprint

    def test_the_same_picture_at_an_address_is_the_same(self, photo: Path) -> None:
        with Wire(http(photo.read_bytes())) as server:
            assert validated(f"{server.url}/mug.jpg").fingerprint == validated(photo).fingerprint

    def test_everything_that_changes_the_picture_changes_it(self, photo: Path, tmp_path: Path) -> None:
        others: list[dict[str, Any]] = [
            {}, {"prompt": "a hat"}, {"image_weight": 51}, {"seed": 100}, {"style_type": "ANIME"},
            {"negative_prompt": "text"}, {"magic_prompt_option": "OFF"}, {"resolution": "RESOLUTION_512_1536"},
        ]  # fmt: skip
        prints = [validated(photo, **each).fingerprint for each in others]
        prints.append(validated(picture(tmp_path, (600, 400))).fingerprint)
        assert len(set(prints)) == len(prints)


class TestSourcesThatCannotBeRead:
    @pytest.mark.parametrize("status", ["403 Forbidden", "503 Service Unavailable"])
    def test_are_an_error_and_never_told_apart_by_their_address(
        self, status: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("prefect_segmind.pipeline.source._WAITS", ())
        with Wire(http(b"", status)) as server, pytest.raises(SegmindError, match=f"answered {status[:3]}"):
            validated(f"{server.url}/1.jpg")

    def test_one_that_fails_once_is_the_same_picture(self, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("prefect_segmind.pipeline.source._WAITS", (0.0,))
        with Wire(http(b"", "503 Service Unavailable"), http(photo.read_bytes())) as server:
            assert validated(f"{server.url}/1.jpg").fingerprint == validated(photo).fingerprint

    @pytest.mark.parametrize("fields", [{}, {"seed": 4711}])
    def test_are_known_by_the_address_under_which_an_earlier_version_may_have_paid_for_them(
        self, photo: Path, fields: dict[str, Any]
    ) -> None:
        with Wire(http(photo.read_bytes())) as server:
            url = f"{server.url}/1.jpg"
            job = validated(url, **fields)
            spaced = validated(url, prompt="a red mug ", **fields)
            auto = validated(url, resolution="AUTO", **fields)
        address = hashlib.sha256(url.encode()).hexdigest()
        parameters = {name: value for name, value in job.parameters.items() if name != "seed"}
        seed = fields.get("seed") or derived_seed(address, parameters)
        (was,) = job.earlier
        assert was.fingerprint == fingerprint(address, {**parameters, "seed": seed})
        assert (was.seed, was.source, was.source_sha256) == (seed, job.source, address)
        assert [each.parameters["prompt"] for each in spaced.earlier] == ["a red mug ", "a red mug", "a red mug "]
        assert len({each.fingerprint for each in spaced.known_as}) == 4
        assert auto.earlier == validated(photo, **fields).earlier == (), "which could not be without reading it"

    def test_one_that_holds_no_picture_is_refused(self) -> None:
        with Wire(http(b"<html>")) as server, pytest.raises(SourceImageError, match="is not an image"):
            validated(f"{server.url}/1.jpg")


class TestWarnings:
    def test_what_will_be_changed_in_the_image_is_told(self, tmp_path: Path) -> None:
        file = BytesIO()
        Image.new("CMYK", (60, 60)).save(file, "TIFF")
        (tmp_path / "ad.tiff").write_bytes(file.getvalue())
        assert validated(tmp_path / "ad.tiff").warnings == (
            "the image is converted from TIFF",
            "the image is converted from CMYK to RGB",
        )

    def test_a_negative_prompt_may_be_ignored(self, photo: Path) -> None:
        with_it, without = validated(photo, negative_prompt="text"), validated(photo, negative_prompt=" ")
        assert set(with_it.warnings) - set(without.warnings) == {
            "negative_prompt may be ignored: Ideogram documents it for other versions than 2a"
        }


def test_an_image_too_long_for_the_model_is_let_through_where_it_is_meant(tmp_path: Path) -> None:
    long = picture(tmp_path, (700, 200))
    with pytest.raises(SourceImageError, match="allow_extreme_ratio"):
        validated(long)
    assert validated(long, allow_extreme_ratio=True).source


def test_the_price_is_the_one_that_is_given(photo: Path) -> None:
    job = parse_job({"image": str(photo), "prompt": "x"})
    assert validate(job, READER).price_usd == Decimal("0.05")
    assert validate(job, READER, price_usd=Decimal("0.02")).price_usd == Decimal("0.02")
