"""Manifests and their images where they lie: on disk, in buckets, behind patterns; and the spool of the jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import boto3
import httpx
import pytest
from botocore.config import Config
from pydantic import BaseModel

from prefect_segmind.errors import (
    BucketNotFoundError,
    ConfigurationError,
    InvalidJobError,
    ManifestError,
    SourceImageError,
    StoreError,
    StoreUnreachableError,
)
from prefect_segmind.jobs.job import Job
from prefect_segmind.manifest.formats import write_manifest
from prefect_segmind.manifest.image_paths import Images
from prefect_segmind.manifest.loading import load_manifest
from prefect_segmind.manifest.model import FoundImage
from prefect_segmind.pipeline.source import SourceReader
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.storage.paths import found_path
from prefect_segmind.storage.spool import Spool
from tests.support.moto_server import moto_server

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")


def no_s3() -> NoReturn:
    raise AssertionError("no S3 client is needed")


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def load(place: str, s3: Any = no_s3, **variables: Any) -> list[Job]:
    with load_manifest(place, variables, s3=s3) as manifest:
        assert manifest.place == place
        return list(manifest.jobs)


def mistake(place: str, s3: Any = no_s3) -> str:
    with pytest.raises(ManifestError) as caught:
        load(place, s3)
    first, line = str(caught.value).split("\n  ")
    assert first == f"{place}: 1 mistake; nothing was uploaded or paid."
    assert caught.value.mistakes == (line,)  # type: ignore[attr-defined]
    return line


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    names = [
        "mug.jpg",
        "mug.png",
        "a/mug.jpg",
        "a/v1.2/cup.tar.jpg",
        "b/plain",
        "b/[x].jpg",
        ".hidden.jpg",
        ".h/mug.jpg",
    ]
    for name in names:
        write(tmp_path / "photos", name, b"x")
    (tmp_path / "photos" / "folder.jpg").mkdir()
    return tmp_path


def found(folder: Path, pattern: str) -> list[tuple[str, str]]:
    """Path below the folder and name of each match."""
    matches = Images(str(folder / "m.yaml"), no_s3).find(pattern, True)
    return [(Path(each.location).relative_to(folder).as_posix(), each.name) for each in matches]


# --- the manifest itself ----------------------------------------------------------------------------------------------

ASSET = '{"image": "mug.jpg", "prompt": "a red mug"}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.yaml", "assets:\n- image: mug.jpg\n  prompt: a red mug\n"),
        ("m.YML", "assets:\r\n- image: mug.jpg\r\n  prompt: a red mug\r\n"),
        ("m.json", f'{{"assets": [{ASSET}]}}'),
        ("m.jsonl", ASSET),
        ("m.ndjson", f"\n{ASSET}\n"),
        ("m.CSV", "image;prompt\r\nmug.jpg;a red mug\r\n"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_extension_says_how_a_manifest_is_written(tmp_path, name, text, mark):
    place = write(tmp_path, name, mark + text)
    assert load(place) == [Job(image=str(tmp_path / "mug.jpg"), prompt="a red mug")]


@pytest.mark.parametrize("place", ["m.txt", "m", "m.yaml.bak", "s3://bucket/m.toml"])
def test_another_extension_is_a_mistake_that_names_those_allowed(place):
    assert mistake(place) == "a manifest's name ends in one of .yaml, .yml, .json, .csv, .jsonl, .ndjson"


def test_other_places_and_missing_files_are_told(tmp_path):
    assert mistake("https://b.example/m.yaml") == "a manifest is a local path or s3://bucket/key"
    assert mistake(str(tmp_path / "m.yaml")) == f"it does not exist (looked in {tmp_path})"
    assert mistake(str(tmp_path / "no" / "m.yaml")) == f"it does not exist (looked in {tmp_path / 'no'})"
    write(tmp_path, "campaign.yaml", "assets: []")
    assert mistake(str(tmp_path / "campain.yaml")) == "it does not exist (did you mean campaign.yaml?)"
    (tmp_path / "folder.csv").mkdir()
    assert mistake(str(tmp_path / "folder.csv")) == "it is a folder; name one file in it"
    assert mistake("~nobody-here/m.yaml").startswith("it cannot be read: ")
    assert mistake(f"{'x' * 300}.yaml").startswith("it cannot be read: ")


def test_a_text_that_is_no_utf8_is_told_with_its_line(tmp_path):
    assert mistake(write(tmp_path, "m.csv", b"image,prompt\na,caf\xe9\n")) == (
        "line 2, byte 6: 0xe9 is not UTF-8; save the file as UTF-8"
    )
    assert mistake(write(tmp_path, "u.csv", "image,prompt\n".encode("utf-16"))).startswith("line 1, byte 1: 0xff is no")


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("prefect_segmind.manifest.loading.MAX_TEXT", 1_000_000)
    assert mistake(write(tmp_path, "m.jsonl", b"\n" + b" " * 1_000_001)) == "line 2 has more than 1 MB"


def test_a_prompt_of_a_megabyte_is_taken(tmp_path):
    prompt = "é" * 1_000_000
    assert load(write(tmp_path, "m.jsonl", json.dumps({"image": "m", "prompt": prompt})))[0].prompt == prompt
    assert load(write(tmp_path, "m.yaml", f"assets:\n- {{image: m, prompt: {prompt}}}"))[0].prompt == prompt


def test_warnings_come_with_the_jobs(tmp_path):
    place = write(tmp_path, "m.yaml", "assets:\n- {image: '*.jpg', prompt: a}\n- {image: b, prompt: '{{ season }}'}")
    with load_manifest(place, {"season": "summer", "seasn": 1}, s3=no_s3) as manifest:
        assert len(manifest.jobs) == 1
    assert manifest.warnings == (
        "line 2: nothing matches *.jpg; no job is made",
        "variable seasn: no template in the manifest uses it; did you mean season?",
    )
    with load_manifest(write(tmp_path, "e.csv", "image,prompt\n"), None, s3=no_s3) as manifest:
        assert manifest.warnings == ("the manifest has no assets",)


def test_no_jobs_come_of_a_manifest_with_a_mistake(tmp_path):
    for name in "ace":
        write(tmp_path, name, b"x")
    place = write(tmp_path, "m.csv", "image,prompt,seed\na,b,100\nc,d,1\ne,f,200\n")
    assert mistake(place).startswith("line 3: seed: '1' is not allowed")


def test_other_sizes_go_through_and_stay(tmp_path):
    write(tmp_path, "a", b"x")
    place = write(tmp_path, "m.csv", "image,prompt,resolution\na,b,RESOLUTION_2048_2048\n")
    with load_manifest(place, None, s3=no_s3, allow_unlisted_resolution=True) as manifest:
        assert [job.resolution for job in manifest.jobs] == ["RESOLUTION_2048_2048"]
    assert "RESOLUTION_2048_2048" in mistake(place)


def test_a_written_manifest_makes_the_same_jobs_wherever_it_lies(photos):
    place = write(photos, "m.yaml", "assets: [{image: 'photos/**/*.jpg', prompt: '{{ stem }}', seed: random}]")
    jobs = load(place)
    assert len(jobs) == 4
    literal = [*jobs, Job(name="{{ x }}", image="s3://bucket/what?*.jpg", prompt="{{ y")]
    text = "".join(write_manifest(job.model_dump(mode="json") for job in literal))
    assert load(write(photos, "failed/m.yaml", text)) == literal


# --- images on disk ---------------------------------------------------------------------------------------------------


def test_images_are_found_from_the_manifest_s_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    images = Images("campaign/m.yaml", no_s3)
    assert [images.find(image, True)[0].location for image in ("a/mug.jpg", "~/mug.jpg", str(tmp_path / "x.jpg"))] == [
        str(tmp_path / "campaign" / "a" / "mug.jpg"),
        str(tmp_path / "home" / "mug.jpg"),
        str(tmp_path / "x.jpg"),
    ]
    for image in ("https://b.example/a*.jpg?size=1", "http://b.example/a", "ftp://b.example/*", "a\0*"):
        assert images.find(image, True) == [FoundImage(image)]
    assert images.find("S3://Bucket/../a.jpg", False) == [FoundImage("s3://Bucket/../a.jpg")]
    with pytest.raises(InvalidJobError, match="'~nobody-here/a' is not a path"):
        images.find("~nobody-here/a", True)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("photos/*", [("photos/mug.jpg", "mug"), ("photos/mug.png", "mug")]),
        ("photos/*.jpg", [("photos/mug.jpg", "mug")]),
        ("photos/m?g.jpg", [("photos/mug.jpg", "mug")]),
        ("photos/*/*", [("photos/a/mug.jpg", "a/mug"), ("photos/b/[x].jpg", "b/[x]"), ("photos/b/plain", "b/plain")]),
        ("photos/b/[x]*", [("photos/b/[x].jpg", "[x]")]),
        ("photos/**/mug.jpg", [("photos/a/mug.jpg", "a/mug"), ("photos/mug.jpg", "mug")]),
        ("photos/a/**", [("photos/a/mug.jpg", "mug"), ("photos/a/v1.2/cup.tar.jpg", "v1.2/cup.tar")]),
        (
            "*/a/**/*.jpg",
            [("photos/a/mug.jpg", "photos/a/mug"), ("photos/a/v1.2/cup.tar.jpg", "photos/a/v1.2/cup.tar")],
        ),
        ("photos/.*", []),
        ("photos/*.gif", []),
        ("nowhere/*.jpg", []),
        ("photos/mug.jpg/*", []),
        ("x" * 300 + "*", []),
    ],
)
def test_a_pattern_finds_files_in_order_with_a_name_each(photos, pattern, matches):
    assert found(photos, pattern) == matches


@posix
def test_names_of_matches_are_safe(tmp_path):
    for name in ("what?.jpg", "a\\b.jpg", " .jpg", "v1.2.jpg", "v1.2"):
        write(tmp_path, f"in/{name}", b"")
    assert found(tmp_path, "in/*") == [
        ("in/ .jpg", "image"),
        ("in/a\\b.jpg", "a-b"),
        ("in/v1.2", "v1"),
        ("in/v1.2.jpg", "v1.2"),
        ("in/what?.jpg", "what"),
    ]


LONG = "a-cosy-mug-" * 12


@posix
@pytest.mark.parametrize(
    ("name", "neighbours"),
    [
        ("cup.jpg", ["cup.png", "cup.JPG", "cup", "cup-jpg.gif", "-cup.jpg", "sub/cup.jpg", "Cup.jpg"]),
        ("a:b.jpg", ["a?b.jpg", "a-b.jpg"]),
        (f"{LONG}1.jpg", [f"{LONG}2.jpg", f"{LONG}.jpg", f"{LONG[:119]}.jpg"]),
        (f"{LONG}/cup.jpg", [f"{LONG}2/cup.jpg", f"{LONG}/cup.png"]),
    ],
)
def test_the_name_of_a_match_does_not_depend_on_its_neighbours(tmp_path, name, neighbours):
    write(tmp_path, f"in/{name}", b"")
    ((_, alone),) = found(tmp_path, "in/**")
    for each in neighbours:
        write(tmp_path, f"in/{each}", b"")
    assert dict(found(tmp_path, "in/**"))[f"in/{name}"] == alone


@posix
def test_long_names_stay_apart(tmp_path):
    for name in (f"{LONG}1.jpg", f"{LONG}2.jpg", f"{LONG}1/cup.jpg", f"{LONG}2/cup.jpg"):
        write(tmp_path, f"in/{name}", b"")
    names = [name for _, name in found(tmp_path, "in/**")]
    assert len(set(names)) == 4
    assert all(len(name.encode()) < 200 and name.startswith(LONG[:120].rstrip("-")) for name in names)


@posix
def test_two_matches_of_one_name_are_a_mistake_that_names_both_and_the_way_out(tmp_path):
    for name in ("cup.jpg", "cup.png", "mug.jpg"):
        write(tmp_path, f"in/{name}", b"")
    place = write(tmp_path, "m.yaml", "assets:\n- {name: shop, image: in/*, prompt: a}")
    assert mistake(place) == (
        f"line 2 (shop): name: shop/cup would be both {tmp_path}/in/cup.jpg and {tmp_path}/in/cup.png; "
        "put {{ stem }}-{{ suffix }} into name, or {{ suffix }} for a folder each"
    )
    for name, made in {
        "shop/{{ stem }}-{{ suffix }}": ["shop/cup-jpg", "shop/cup-png", "shop/mug-jpg"],
        "shop/{{ suffix }}": ["shop/jpg/cup", "shop/png/cup", "shop/jpg/mug"],
    }.items():
        place = write(tmp_path, "m.yaml", f"assets:\n- {{name: '{name}', image: in/*, prompt: a}}")
        assert [job.name for job in load(place)] == made


@posix
def test_a_file_of_that_very_name_is_no_pattern(tmp_path):
    for name in ("what?.jpg", "whats.jpg"):
        write(tmp_path, name, b"")
    assert Images(str(tmp_path / "m.yaml"), no_s3).find("what?.jpg", True) == [FoundImage(str(tmp_path / "what?.jpg"))]


@posix
def test_a_wildcard_in_the_manifest_s_own_folder_is_none(tmp_path):
    write(tmp_path, "a*b/x.jpg", b"")
    write(tmp_path, "acb/x.jpg", b"")
    assert found(tmp_path / "a*b", "*.jpg") == [("x.jpg", "x")]


@posix
def test_links_to_folders_are_followed_only_as_deep_as_a_pattern_says(photos):
    (photos / "photos" / "b" / "up").symlink_to(photos / "photos")
    assert ("photos/b/up/mug.jpg", "b/up/mug") in found(photos, "photos/*/*/mug.jpg")
    assert found(photos, "photos/**/mug.jpg") == [("photos/a/mug.jpg", "a/mug"), ("photos/mug.jpg", "mug")]


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_no_empty_one(photos):
    (photos / "photos").chmod(0o300)
    with pytest.raises(StoreError, match=r"cannot list .*photos: Permission denied"):
        found(photos, "photos/*")


@posix
def test_a_folder_below_that_cannot_be_listed_is_a_warning_and_stands_in_no_others_way():
    with tempfile.TemporaryDirectory() as name:  # one that everybody may enter
        folder = Path(name)
        folder.chmod(0o755)
        for below in ("in/cup.jpg", "in/closed/mug.jpg", "in/open/bowl.jpg"):
            write(folder, below, b"x")
        (folder / "in" / "closed").chmod(0o000)
        assets = "".join(f"- {{name: {n}, image: 'in/**/*.jpg', prompt: x}}\n" for n in "ab")
        place = write(folder, "m.yaml", f"assets:\n{assets}")
        root = os.geteuid()
        if root == 0:
            os.seteuid(65534)
        try:
            with load_manifest(place, {}, s3=no_s3) as manifest:
                made = [job.name for job in manifest.jobs]
        finally:
            os.seteuid(root)
            (folder / "in" / "closed").chmod(0o755)
    assert made == ["a/cup", "a/open/bowl", "b/cup", "b/open/bowl"]
    assert manifest.warnings == (
        f"cannot list {folder}/in/closed: Permission denied; check its owner and mode; its contents are skipped",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_utf8_is_a_warning_and_stands_in_no_others_way(tmp_path):
    for below in (b"in/caf\xe9.jpg", b"in/caf\xe9/mug.jpg", b"in/caf\xe9.txt", b"in/cup.jpg"):
        write(tmp_path, os.fsdecode(below), b"x")
    place = write(tmp_path, "m.yaml", "assets:\n- {name: shop, image: 'in/**/*.jpg', prompt: x}")
    with load_manifest(place, {}, s3=no_s3) as manifest:
        assert [job.name for job in manifest.jobs] == ["shop/cup"]
    assert manifest.warnings == tuple(
        f"{tmp_path}/in/caf\\udce9{each}.jpg is skipped: its name is not UTF-8; rename it" for each in ("", "/mug")
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_neighbour_whose_name_is_no_utf8_can_be_told(tmp_path):
    write(tmp_path, os.fsdecode(b"caf\xe9s.yaml"), "assets: []")
    assert mistake(str(tmp_path / "cafes.yaml")) == "it does not exist (did you mean caf\\udce9s.yaml?)"


@posix
def test_a_folder_with_an_impossible_name_is_told(tmp_path):
    with pytest.raises(StoreError, match=r"cannot list .*: File name too long"):
        found(tmp_path, "x" * 300 + "/*")


def test_what_is_not_there_is_told_with_the_other_mistakes(photos):
    text = """assets:
- {image: photos/mgu.jpg, prompt: a}
- {image: photos/mug.jpg, prompt: b, seed: 1}
- {image: "photos/*.gif", prompt: c}
- {image: "photos/{{ nothing }}.jpg", prompt: d}
- {image: photos/cup.jpg, prompt: e, variants: {seed: [100, 200]}}
"""
    place = write(photos, "m.yaml", text)
    with pytest.raises(ManifestError) as caught:
        load(place)
    lines = caught.value.mistakes  # type: ignore[attr-defined]
    assert [line.partition(": ")[0] for line in lines] == ["line 3", "line 5", "line 2", "line 6", "line 4"]
    assert lines[2] == f"line 2: image: {photos}/photos/mgu.jpg does not exist (did you mean mug.jpg?)"
    assert lines[4] == "line 4: nothing matches photos/*.gif"


def test_what_is_not_there_is_no_mistake_by_itself(photos):
    place = write(photos, "m.csv", "image,prompt\nphotos/mgu.jpg,a\nphotos/*.gif,b\n")
    with load_manifest(place, None, s3=no_s3) as manifest:
        assert [job.image for job in manifest.jobs] == [f"{photos}/photos/mgu.jpg"]
        assert manifest.warnings == ("line 3: nothing matches photos/*.gif; no job is made",)


def test_a_manifest_without_any_match_is_a_mistake(photos):
    assert mistake(write(photos, "m.csv", "image,prompt\nfotos/*.jpg,a\n")) == "line 2: nothing matches fotos/*.jpg"
    with load_manifest(write(photos, "m.yaml", "assets: []"), None, s3=no_s3) as manifest:
        assert manifest.warnings == ("the manifest has no assets",)


@posix
def test_a_manifest_without_any_match_tells_what_was_skipped(tmp_path):
    (tmp_path / os.fsdecode(b"m\xffg.jpg")).write_bytes(b"x")
    with pytest.raises(
        ManifestError, match=r"(?s)2 mistakes.*nothing matches \*\.jpg.*its name is not UTF-8; rename it"
    ):
        load(write(tmp_path, "m.csv", "image,prompt\n*.jpg,a\n"))


@posix
def test_a_path_of_windows_finds_the_file(photos):
    def read(image: str) -> list[bytes]:
        images = Images(str(photos / "m.yaml"), no_s3).find(image, True)
        return [found_path(each.location).read_bytes() for each in images]

    write(photos, "photos/caf\u00e9/mug.jpg", b"coffee")
    assert read("photos\\a\\mug.jpg") == [b"x"]
    assert read(".\\photos\\a\\mug.jpg") == [b"x"]
    assert read("photos\\cafe\u0301\\mug.jpg") == [b"coffee"]
    assert found(photos, "photos\\*.jpg") == [("photos/mug.jpg", "mug")]
    assert found(photos, "photos\\**\\cup*.jpg") == [("photos/a/v1.2/cup.tar.jpg", "a/v1.2/cup.tar")]
    write(photos, "photos\\a\\mug.jpg", b"of that very name")
    assert read("photos\\a\\mug.jpg") == [b"of that very name"]
    for image in ("C:\\photos\\mug.jpg", "d:/photos/*.jpg", "\\\\server\\photos\\mug.jpg"):
        (each,) = Images(str(photos / "m.yaml"), no_s3).find(image, True)
        with pytest.raises(SourceImageError, match=r"does not exist \(a path on a Windows disk, .* relative"):
            SourceReader(s3=no_s3).read(each.location)


@posix
def test_a_file_is_found_under_either_form(tmp_path):
    write(tmp_path, "caf\u00e9/mu\u0308g.jpg", b"x")
    composed, decomposed = "caf\u00e9/m\u00fcg", "cafe\u0301/mu\u0308g"
    for folder in (composed, decomposed):
        for pattern in ("*.jpg", "m*.jpg", "m\u00fc*", "mu\u0308*"):
            image = f"{folder.partition('/')[0]}/{pattern}"
            assert found(tmp_path, image) == [("caf\u00e9/mu\u0308g.jpg", "m\u00fcg")]
    place = write(tmp_path / "caf\u00e9", "ma\u0308nifest.csv", "image,prompt\nm\u00fcg.jpg,a mug\n")
    (job,) = load(place.replace("caf\u00e9", "cafe\u0301").replace("a\u0308", "\u00e4"))
    assert Path(found_path(job.image)).read_bytes() == b"x"


# --- in buckets -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moto() -> Iterator[Any]:
    with moto_server() as endpoint:
        pair: Any = {"aws_access_key_id": "A", "aws_secret_access_key": "B", "region_name": "us-east-1"}
        signed = Config(signature_version="s3v4")
        client = boto3.session.Session().client("s3", endpoint_url=endpoint, config=signed, **pair)
        client.create_bucket(Bucket="pictures")
        for key in (
            "a/in/mug.jpg",
            "a/in/x/mug.jpg",
            "a/in/.h/mug.jpg",
            "a/in/.mug.jpg",
            "a/in/x/",
            "a/cup.png",
            "mug?.jpg",
        ):
            client.put_object(Bucket="pictures", Key=key, Body=b"x")
        yield client


def test_images_are_found_from_the_manifest_s_place_in_its_bucket(moto):
    images = Images("s3://pictures/a/b/m.yaml", lambda: moto)

    def locations(image: str) -> list[tuple[str, str]]:
        return [(each.location, each.name) for each in images.find(image, True)]

    assert locations("in/mug.jpg") == [("s3://pictures/a/b/in/mug.jpg", "")]
    assert locations("../mug.jpg") == [("s3://pictures/a/mug.jpg", "")]
    absolute = str(Path("/photos/mug.jpg").absolute())
    assert locations(absolute) == [(absolute, "")]
    inside = [("s3://pictures/a/in/mug.jpg", "mug"), ("s3://pictures/a/in/x/mug.jpg", "x/mug")]
    assert locations("../in/**/*.jpg") == inside
    assert locations("s3://pictures/a/in/*.jpg") == inside[:1]
    assert locations("S3://pictures/a/in/*/m*") == [("s3://pictures/a/in/x/mug.jpg", "x/mug")]
    assert locations("s3://pictures/m*") == [("s3://pictures/mug?.jpg", "mug")]
    assert locations("../../*.gif") == []
    with pytest.raises(InvalidJobError, match=r"'\.\./\.\./\.\./x' points outside the bucket pictures"):
        images.find("../../../x", True)
    with pytest.raises(InvalidJobError, match="is not an S3 address"):
        images.find("s3://pic*/x", True)
    with pytest.raises(BucketNotFoundError):
        images.find("s3://nowhere/*.jpg", True)
    top = Images("s3://pictures/m.yaml", lambda: moto)
    assert [each.location for each in top.find("*/*.png", True)] == ["s3://pictures/a/cup.png"]


KEYS = [
    "mug #1.jpg",
    "mug #2.jpg",
    "50%25 off?.jpg",
    "a b+c;d=e&f.jpg",
    "x?token=1.jpg",
    "deep//é.jpg",
    "back\\slash.jpg",
]


@pytest.mark.parametrize("prefix", ["", "q?#/", "/a//b/"])
def test_a_key_is_a_key_wherever_it_is_named(moto, prefix):
    from prefect_segmind.storage.s3 import presign_uri, read

    bucket = f"keys-{len(prefix)}"
    moto.create_bucket(Bucket=bucket)
    for key in KEYS:
        moto.put_object(Bucket=bucket, Key=prefix + key, Body=key.encode())
    moto.put_object(Bucket=bucket, Key=prefix + "50%25 off!.jpg", Body=b"not asked for")
    absolute = [f"s3://{bucket}/{prefix}{key}" for key in KEYS]
    assets = [{"name": str(n), "image": image, "prompt": "{{ stem }}"} for n, image in enumerate((*KEYS, *absolute))]
    place = f"s3://{bucket}/{prefix}m #?%25.json"
    moto.put_object(Bucket=bucket, Key=place.removeprefix(f"s3://{bucket}/"), Body=json.dumps({"assets": assets}))
    jobs = load(place, lambda: moto)
    assert [job.image for job in jobs] == [*absolute, *absolute]
    assert [job.name for job in jobs] == [str(n) for n in range(len(assets))]
    stems = ["mug #1", "mug #2", "50%25 off", "a b+c;d=e&f", "x-token=1", "é", "back-slash"]
    assert [job.prompt for job in jobs] == [*stems, *stems]
    for key, uri in zip(KEYS, absolute, strict=True):
        assert read(uri, moto, 100) == key.encode()
        assert httpx.get(presign_uri(uri, moto, 60), trust_env=False).content == key.encode()


def test_a_key_is_found_under_either_form_and_first_as_it_is_given(moto):
    moto.create_bucket(Bucket="forms")
    composed, decomposed = "caf\u00e9/m\u00fcg.jpg", "cafe\u0301/mu\u0308g.jpg"
    moto.put_object(Bucket="forms", Key=decomposed, Body=b"decomposed")
    images, reader = Images("s3://forms/m.yaml", lambda: moto), SourceReader(s3=lambda: moto)

    def locations(image: str) -> list[str]:
        return [each.location for each in images.find(image, True)]

    for pattern in ("caf\u00e9/m\u00fc*", "cafe\u0301/*.jpg", "**/m\u00fcg.jpg"):
        assert locations(pattern) == [f"s3://forms/{decomposed}"]
    for key in (composed, decomposed):
        assert reader.locate(f"s3://forms/{key}") == f"s3://forms/{decomposed}"
    moto.put_object(Bucket="forms", Key=composed, Body=b"composed")
    for key in (composed, decomposed):
        assert reader.locate(f"s3://forms/{key}") == f"s3://forms/{key}"
    assert reader.locate("s3://forms/n\u00f6.jpg") == "s3://forms/n\u00f6.jpg"
    assert locations("caf\u00e9/*") == [f"s3://forms/{composed}"]


def test_a_path_of_windows_finds_the_key_unless_it_is_one(moto):
    moto.create_bucket(Bucket="windows")
    images = Images("s3://windows/m.yaml", lambda: moto)
    moto.put_object(Bucket="windows", Key="in/mug.jpg", Body=b"x")
    for image in ("in\\mug.jpg", "in\\*.jpg"):
        assert [each.location for each in images.find(image, True)] == ["s3://windows/in/mug.jpg"]
    moto.put_object(Bucket="windows", Key="in\\mug.jpg", Body=b"x")
    for image in ("in\\mug.jpg", "in\\*.jpg"):
        assert [each.location for each in images.find(image, True)] == [
            "s3://windows/in\\mug.jpg" if image == "in\\mug.jpg" else "s3://windows/in/mug.jpg"
        ]


def test_keys_that_are_not_there_are_told_with_the_other_mistakes(moto, tmp_path):
    moto.create_bucket(Bucket="told")
    moto.put_object(Bucket="told", Key="mug.jpg", Body=b"x")
    text = "image,prompt,seed\ns3://told/mug.jpg,a,\ns3://told/mgu.jpg,b,\ns3://told/mug.jpg,c,1\n"
    place = write(tmp_path, "m.csv", text)
    with pytest.raises(ManifestError) as caught:
        load(place, lambda: moto)
    lines = [line for line in caught.value.mistakes if "name" not in line]  # type: ignore[attr-defined]
    assert [line.partition(": ")[0] for line in lines] == ["line 4", "line 3"]
    assert lines[1] == "line 3: image: s3://told/mgu.jpg does not exist: check the key"


def test_two_keys_that_differ_behind_a_hash_are_two_jobs(moto, tmp_path):
    place = write(tmp_path, "m.csv", "image,prompt\ns3://bucket/mug #1.jpg,a mug\ns3://bucket/mug #2.jpg,a mug\n")
    assert [(job.name, job.image) for job in load(place)] == [
        (f"mug #{n}", f"s3://bucket/mug #{n}.jpg") for n in (1, 2)
    ]


def test_a_manifest_in_a_bucket(moto):
    moto.put_object(Bucket="pictures", Key="a/m.yaml", Body=b"assets: [{image: 'in/*', prompt: '{{ stem }}'}]")
    assert load("s3://pictures/a/m.yaml", lambda: moto) == [
        Job(name="mug", image="s3://pictures/a/in/mug.jpg", prompt="mug")
    ]
    assert mistake("s3://pictures/a/no.yaml", lambda: moto) == "it does not exist; check the key"
    with pytest.raises(BucketNotFoundError):
        load("s3://nowhere/m.yaml", lambda: moto)
    with pytest.raises(ConfigurationError):
        load("s3:///m.yaml", lambda: moto)


def test_a_bucket_that_does_not_answer_is_no_mistake_of_the_manifest():
    pair: Any = {"aws_access_key_id": "A", "aws_secret_access_key": "B", "region_name": "us-east-1"}
    client = boto3.session.Session().client("s3", endpoint_url="http://127.0.0.1:1", **pair)
    with pytest.raises(StoreUnreachableError):
        load("s3://pictures/m.yaml", lambda: client)


def test_a_manifest_and_its_patterns_on_the_sandbox_s_s3(sandbox: Sandbox, tmp_path: Path):
    from prefect_segmind.storage.s3 import s3_client

    client = s3_client()
    text = b"image,prompt\nin/*.jpg,{{ stem }}\n"
    for key, body in (("batch/m.csv", text), ("batch/in/mug.jpg", b"x"), ("batch/in/cup.jpg", b"x")):
        client.put_object(Bucket="segmind", Key=f"{tmp_path.name}/{key}", Body=body)
    jobs = load(f"s3://segmind/{tmp_path.name}/batch/m.csv", lambda: client)
    assert [(job.name, job.image) for job in jobs] == [
        (name, f"s3://segmind/{tmp_path.name}/batch/in/{name}.jpg") for name in ("cup", "mug")
    ]


# --- the spool --------------------------------------------------------------------------------------------------------


class Done(BaseModel):
    name: str


class Failed(BaseModel):
    name: str
    why: str = "\n\u2028é"


def test_a_spool_gives_back_every_record_in_order_and_as_what_it_was():
    records: list[Done | Failed] = [
        Done(name="a\nb"),
        Failed(name="c"),
        Done(name=""),
        *(Failed(name=str(n)) for n in range(5_000)),
    ]
    with Spool[Done | Failed](Done, Failed) as spool:
        assert len(spool) == 0
        assert list(spool) == []
        for record in records:
            spool.append(record)
        assert len(spool) == len(records)
        assert list(spool) == list(spool) == records


def test_a_spool_may_grow_and_be_iterated_several_times_at_once():
    with Spool(Done) as spool:
        for number in range(3_000):
            spool.append(Done(name=str(number)))
        first, second = iter(spool), iter(spool)
        assert [next(first).name, next(first).name, next(second).name] == ["0", "1", "0"]
        spool.append(Done(name="new"))
        assert [each.name for each in first][-1] == "new"
        assert len(list(second)) == 3_000


def test_threads_may_share_a_spool():
    with Spool(Done) as spool:

        def work(name: str) -> None:
            for _ in range(300):
                spool.append(Done(name=name))
                next(iter(spool))

        threads = [threading.Thread(target=work, args=(str(n),)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(each.name for each in spool) == sorted("0123" * 300)


def test_a_closed_spool_has_no_file_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = Spool(Done)
    spool.append(Done(name="a"))
    spool.close()
    spool.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        list(spool)


def test_a_spool_without_a_place_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StoreError, match=r"cannot use a temporary file: No such file or directory;.* or set TMPDIR"):
        Spool(Done)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: Path("/dev/full").open("wb", buffering=0))  # noqa: SIM115
    with Spool(Done) as spool, pytest.raises(StoreError, match="No space left on device"):
        spool.append(Done(name="a"))


# --- many rows --------------------------------------------------------------------------------------------------------

ROWS = 20_000
"""A fifth of what the documentation calls no burden, in a fifth of the memory."""
MEASURE = """
import resource, sys
from prefect_segmind.manifest.loading import load_manifest
unit = 1 if sys.platform == "darwin" else 1024
load_manifest(sys.argv[1], None, s3=None).jobs.close()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
with load_manifest(sys.argv[2], None, s3=None) as manifest:
    count = sum(1 for _ in manifest.jobs)
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""


@posix
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_many_rows_need_little_memory(tmp_path, kind):
    """Measured in a process of its own: to trace each allocation would take a minute."""

    def rows(many: int) -> str:
        if kind == "csv":
            lines = (f"n/{n},photos/{n}.jpg,a red mug {n},{100 + n}\n" for n in range(many))
            return "name,image,prompt,seed\n" + "".join(lines)
        asset = {"image": "photos/mug.jpg", "prompt": "{{ product }} in late summer light"}
        return "".join(
            json.dumps({"name": f"n/{n}", **asset, "vars": {"product": f"mug {n}"}}) + "\n" for n in range(many)
        )

    places = [write(tmp_path, f"few.{kind}", rows(10)), write(tmp_path, f"many.{kind}", rows(ROWS))]
    done = subprocess.run([sys.executable, "-c", MEASURE, *places], capture_output=True, text=True, check=True)
    count, memory = map(int, done.stdout.split())
    assert count == ROWS
    assert memory < 12_000_000
