"""A picture at an address that stays: its bytes and headers there, and never an older refresh over a newer one.

The protocol is proven twice: by stepping through every interleaving of two and three runs over a store in memory, and
by newer runs that cut in between any two calls of an older one on a real disk, on rclone's S3 server and on moto's.
"""

import hashlib
import itertools
import json
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import quote

import pytest
from PIL import Image

from prefect_segmind.errors import ConfigurationError, PreconditionFailedError, StoreError
from prefect_segmind.pipeline.publish import DEFAULT_CACHE_CONTROL, Note, Published, Publishing, split_publish_to
from prefect_segmind.storage.local import LocalStore
from prefect_segmind.storage.open_store import open_store
from prefect_segmind.storage.s3 import S3Store
from prefect_segmind.storage.store import Facts, Store, StoredObject
from tests.unit.test_store import BUCKET, client, moto  # noqa: F401

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decoded(data: bytes | None) -> Image.Image:
    assert data is not None
    image: Image.Image = Image.open(BytesIO(data))
    image.load()
    return image


def png(colour: str) -> bytes:
    return encoded(Image.new("RGB", (2, 2), colour), "PNG")


RED, GREEN, BLUE = png("red"), png("lime"), png("blue")


@pytest.fixture(params=["disk", "rclone", "moto"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return LocalStore(tmp_path / "live")
    if request.param == "rclone":
        request.getfixturevalue("sandbox")
        return open_store(f"s3://segmind/live-{tmp_path.parent.name}-{tmp_path.name}")
    return S3Store(BUCKET, f"live/{tmp_path.name}", client(request.getfixturevalue("moto")))


def publish(
    where: Any, picture: bytes = RED, hour: float = 0, *, run: str = "", name: str = "hero/summer"
) -> Published:
    """As the run of that hour does."""
    to = where if isinstance(where, Publishing) else Publishing(where, "{name}.png")
    run, due = run or f"run-{hour}", NOON + timedelta(hours=hour)
    return to.publish(name, picture, fingerprint="f" * 64, refreshed_at=due, run=run)


def publish_archived(
    where: Any,
    picture: bytes = RED,
    hour: float = 0,
    *,
    run: str = "",
    name: str = "hero/summer",
    archived: str = ".png",
) -> Published:
    """As the run of that hour does with a picture that the archive has."""
    to = where if isinstance(where, Publishing) else Publishing(where, "{name}.png")
    run, due = run or f"run-{hour}", NOON + timedelta(hours=hour)
    about: dict[str, Any] = {"fingerprint": "f" * 64, "refreshed_at": due, "run": run}
    return to.publish_archived(name, lambda: picture, hashlib.sha256(picture).hexdigest(), archived, **about)


def content(store: Store, key: str = "hero/summer.png") -> bytes | None:
    found = store.get(key)
    return found.data if found else None


def note(store: Store, key: str = "hero/summer.png") -> Note:
    found = content(store, f".segmind/live/{key}.json")
    assert found is not None
    return Note.model_validate_json(found)


def head(store: Store, key: str = "hero/summer.png") -> dict[str, Any]:
    assert isinstance(store, S3Store)
    found: dict[str, Any] = dict(store._client.head_object(Bucket=store._bucket, Key=store._root + key))
    return found


# Bytes and headers


def test_a_picture_of_the_format_is_copied_as_it_is(store: Store) -> None:
    said = publish(store, RED)
    assert said == Published(uri=store.uri("hero/summer.png"), published=True, changed=True)
    assert content(store) == RED
    assert sorted(store.keys("")) == sorted(
        [
            ".segmind/live/hero/summer.png.json",
            "hero/summer.png",
            *([".segmind/conditional-writes"] if isinstance(store, S3Store) else []),
        ]
    )


def test_the_note_says_which_refresh_is_published(store: Store) -> None:
    publish(store, RED, 3)
    found = json.loads(content(store, ".segmind/live/hero/summer.png.json") or b"")
    assert found == {
        "schema_version": 1,
        "refreshed_at": "2026-07-01T15:00:00Z",
        "run": "run-3",
        "fingerprint": "f" * 64,
        "sha256": hashlib.sha256(RED).hexdigest(),
        "cache_control": "public, max-age=300",
        "archived_sha256": hashlib.sha256(RED).hexdigest(),
    }


def test_servers_and_caches_are_told_what_it_is(store: Store) -> None:
    formats = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "WebP": "image/webp"}
    for extension, content_type in formats.items():
        publish(Publishing(store, f"{{name}}.{extension}", "no-cache"), name="ä #1")
        assert content(store, f"ä #1.{extension}")
        if isinstance(store, S3Store):
            said = head(store, f"ä #1.{extension}")
            assert (said["ContentType"], said["CacheControl"]) == (content_type, "no-cache")
    publish(store)
    publish(Publishing(store, "{name}.webp", ""))
    if isinstance(store, S3Store):
        assert head(store)["CacheControl"] == DEFAULT_CACHE_CONTROL == "public, max-age=300"
        assert "CacheControl" not in head(store, "hero/summer.webp")


def test_another_cache_control_reaches_pictures_that_stay_the_same(store: Store) -> None:
    publish(store, RED, 1)
    assert publish(Publishing(store, "{name}.png", "max-age=60"), RED, 2).changed
    if isinstance(store, S3Store):
        assert head(store)["CacheControl"] == "max-age=60"


def test_a_picture_that_lay_there_before_is_taken_over(store: Store) -> None:
    store.put("hero/summer.png", RED, "text/plain")
    assert publish(store, RED).changed
    if isinstance(store, S3Store):
        assert head(store)["ContentType"] == "image/png"


def gradient(mode: str = "RGB") -> Image.Image:
    image = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn) for turn in (0, 90, 180)])
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L"))
    return image


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG", "TIFF"])
def test_png_is_lossless_from_any_format(format: str, tmp_path: Path) -> None:
    store, given = LocalStore(tmp_path), encoded(gradient(), format)
    publish(store, given)
    found = decoded(content(store))
    assert found.format == "PNG"
    assert found.tobytes() == decoded(given).convert("RGB").tobytes()


@pytest.mark.parametrize(("extension", "format"), [("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_conversions_look_the_same(extension: str, format: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for given in (encoded(gradient(), "PNG"), encoded(gradient(), "WEBP" if format == "JPEG" else "JPEG")):
        publish(Publishing(store, f"{{name}}.{extension}"), given)
        data = content(store, f"hero/summer.{extension}")
        found = decoded(data)
        assert (found.format, found.mode, found.size) == (format, "RGB", (256, 256))
        differences = zip(found.tobytes(), decoded(given).convert("RGB").tobytes(), strict=True)
        assert sum(abs(one - other) for one, other in differences) / (256 * 256 * 3) < 2
        assert data
        assert len(data) < len(encoded(gradient(), "BMP")) / 4


def test_transparency_stays_in_webp_and_is_white_in_jpeg(tmp_path: Path) -> None:
    store, given = LocalStore(tmp_path), encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG")
    for extension in ("webp", "jpg"):
        publish(Publishing(store, "{name}." + extension), given)
    assert decoded(content(store, "hero/summer.webp")).getpixel((4, 4))[3] == 0  # type: ignore[index]
    found = decoded(content(store, "hero/summer.jpg")).getpixel((4, 4))
    assert isinstance(found, tuple)
    assert min(found) >= 250


def test_a_phone_s_jpeg_is_a_jpeg(tmp_path: Path) -> None:
    given = encoded(gradient(), "MPO", save_all=True, append_images=[gradient()])
    assert publish(Publishing(LocalStore(tmp_path), "{name}.jpg"), given).changed
    assert content(LocalStore(tmp_path), "hero/summer.jpg") == given


def test_the_address_stays_when_the_answers_change_their_format(store: Store) -> None:
    to = Publishing(store, "{name}/large.jpg")
    uris = {publish(to, encoded(gradient(), format), hour).uri for hour, format in enumerate(["PNG", "JPEG", "WEBP"])}
    assert uris == {store.uri("hero/summer/large.jpg")}
    assert [key for key in store.keys("") if not key.startswith(".segmind/")] == ["hero/summer/large.jpg"]
    assert decoded(content(store, "hero/summer/large.jpg")).format == "JPEG"


@pytest.mark.parametrize("given", [b"", b"<html>", encoded(gradient(), "JPEG")[:3000], RED[:20]])
def test_bytes_that_do_not_decode_are_not_published(given: bytes, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    publish(Publishing(store, "{name}.webp"), GREEN)
    before = content(store, "hero/summer.webp")
    with pytest.raises(StoreError, match=r"summer\.webp is not published: the picture is .*archive"):
        publish(Publishing(store, "{name}.webp"), given, 1)
    assert content(store, "hero/summer.webp") == before
    assert note(store, "hero/summer.webp").run == "run-0"


def test_what_a_format_cannot_hold_says_so(tmp_path: Path) -> None:
    wide = encoded(Image.new("RGB", (16_384, 1)), "PNG")
    with pytest.raises(StoreError, match=r"16384×1 pixels cannot be written as WEBP .*another extension in publish_to"):
        publish(Publishing(LocalStore(tmp_path), "{name}.webp"), wide)


# Addresses


@pytest.mark.parametrize(
    ("publish_to", "place", "pattern"),
    [
        ("s3://bucket/live", "s3://bucket/live", "{name}.png"),
        (" s3://bucket/live/ ", "s3://bucket/live", "{name}.png"),
        ("s3://bucket", "s3://bucket", "{name}.png"),
        ("S3://bucket/{name}.jpg", "S3://bucket", "{name}.jpg"),
        ("s3://bucket/live/{name}.jpeg", "s3://bucket/live", "{name}.jpeg"),
        ("s3://bucket/a/b/mug-{name}-v1.2.webp", "s3://bucket/a/b", "mug-{name}-v1.2.webp"),
        ("s3://bucket/live/{name}/large.WEBP", "s3://bucket/live", "{name}/large.WEBP"),
        ("/srv/live", "/srv/live", "{name}.png"),
        ("/srv/live/{name}.webp", "/srv/live", "{name}.webp"),
        ("/{name}.png", "/", "{name}.png"),
        ("/", "/", "{name}.png"),
        ("{name}.png", ".", "{name}.png"),
        ("live", "live", "{name}.png"),
        ("~/live v1.2/{name}.png", "~/live v1.2", "{name}.png"),
        ("file:///srv/live", "/srv/live", "{name}.png"),
        ("file:///srv/live #1?", "/srv/live #1?", "{name}.png"),
        ("file:///srv/a%20b/" + quote("{name}.jpg"), "/srv/a b", "{name}.jpg"),
    ],
)
def test_a_place_or_a_pattern_is_taken_apart(publish_to: str, place: str, pattern: str) -> None:
    assert split_publish_to(publish_to) == (place, pattern)


@pytest.mark.parametrize(
    ("publish_to", "words"),
    [
        ("", "it is empty"),
        ("  ", "it is empty"),
        ("s3://bucket/{fingerprint}.png", "a placeholder other than"),
        ("s3://bucket/{name}/{name}.png", "a placeholder other than"),
        ("s3://bucket/{name}-{}.png", "a placeholder other than"),
        ("s3://bucket/{name.png", "a placeholder other than"),
        ("s3://bucket/live/{name}", "extension"),
        ("s3://bucket/live/{name}.gif", "extension"),
        ("s3://bucket/live/{name}.png/", "a part that is empty"),
        ("s3://bucket/live/{name}.png?versionId=1", "extension"),
        ("/srv/{name}/.png", "extension"),
        ("/srv/live.{name}", "extension"),
        ("s3://bucket/live/hero.png", "all pictures"),
        ("https://bucket.s3.amazonaws.com/{name}.png", "neither in S3 nor a folder"),
        ("http://cdn/live", "neither in S3 nor a folder"),
        ("ftp://host/live", "neither in S3 nor a folder"),
        ("file://host/live", "neither in S3 nor a folder"),
        ("s3://{name}.png", "bucket"),
        ("s3://", "bucket"),
        ("s3:live/{name}.png", "bucket"),
        ("s3:///live/{name}.png", "bucket"),
        ("s3://bucket/.segmind/{name}.png", "a part that is"),
        ("/srv/.segmind", "a part that is"),
        ("s3://bucket/{name}/../x.png", "a part that is empty"),
        ("s3://bucket/{name}//x.png", "a part that is empty"),
        ("s3://bucket/{name}/./x.png", "a part that is empty"),
    ],
)
def test_any_other_is_refused_with_what_is_allowed(publish_to: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"publish_to: .*{words}.*s3://bucket/live/{{name}}\.jpg"):
        split_publish_to(publish_to)


def test_no_secret_of_an_address_is_shown() -> None:
    with pytest.raises(ConfigurationError) as caught:
        split_publish_to("https://user:hush@host/{name}.png?X-Amz-Signature=hush")
    assert "hush" not in str(caught.value)


def test_what_is_taken_apart_can_be_opened_and_published_to(tmp_path: Path) -> None:
    place, pattern = split_publish_to(f"{tmp_path.as_uri()}/live/{{name}}.webp")
    said = publish(Publishing(open_store(place), pattern))
    assert said.uri == str(tmp_path / "live" / "hero" / "summer.webp")
    assert decoded(Path(said.uri).read_bytes()).format == "WEBP"


def test_braces_in_a_name_are_no_placeholder(tmp_path: Path) -> None:
    assert publish(LocalStore(tmp_path), name="a{0}{name}").uri == str(tmp_path / "a{0}{name}.png")


def test_the_records_are_never_published_over(tmp_path: Path) -> None:
    for pattern, name in (("{name}.png", ".segmind/x"), (".Segmind/{name}.png", "x")):
        with pytest.raises(ConfigurationError, match=r"publish_to.*\.segmind"):
            publish(Publishing(LocalStore(tmp_path), pattern), name=name)
    assert not list(tmp_path.iterdir())


def test_a_time_without_a_zone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="timezone"):
        Publishing(LocalStore(tmp_path), "{name}.png").publish(
            "x", RED, fingerprint="f", refreshed_at=NOON.replace(tzinfo=None), run="r"
        )


# Never an older refresh over a newer one


@dataclass
class Watched:
    """A store that notes each call, and does something before the one of that number."""

    store: Store
    at: int = -1
    do: Callable[[], Any] = lambda: None

    def __post_init__(self) -> None:
        self.calls: list[str] = []

    def _called(self, verb: str, key: str) -> None:
        self.calls.append(f"{verb} {'note' if key.startswith('.segmind') else 'picture'}")
        if len(self.calls) - 1 == self.at:
            self.do()

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def conditional(self) -> bool:
        return self.store.conditional

    def uri(self, key: str) -> str:
        return self.store.uri(key)

    def get(self, key: str) -> StoredObject | None:
        self._called("get", key)
        return self.store.get(key)

    def put(self, key: str, data: bytes, content_type: str, **options: Any) -> str:
        self._called("put", key)
        return self.store.put(key, data, content_type, **options)

    def holds(self, key: str, data: bytes) -> bool:
        self._called("holds", key)
        return self.store.holds(key, data)

    def stat(self, key: str) -> Facts | None:
        self._called("stat", key)
        return self.store.stat(key)

    def keys(self, prefix: str) -> Iterator[str]:
        return self.store.keys(prefix)


WRITING = ["get picture", "get note", "put note", "put picture", "get note"]


def test_a_newer_refresh_replaces_an_older_one(store: Store) -> None:
    watched = Watched(store)
    publish(watched, RED, 1)
    assert watched.calls == WRITING
    assert publish(watched, GREEN, 2).published
    assert watched.calls == WRITING * 2
    assert content(store) == GREEN
    assert note(store).run == "run-2"


def test_an_older_refresh_writes_nothing_and_says_why(store: Store) -> None:
    publish(store, RED, 2)
    before, watched = note(store), Watched(store)
    said = publish(watched, GREEN, 1)
    assert (said.published, said.changed, said.uri) == (False, False, store.uri("hero/summer.png"))
    assert said.why == "a refresh that is not older has this address: that of 2026-07-01 14:00:00+00:00, by run run-2"
    assert watched.calls == ["get picture", "get note"]
    assert (content(store), note(store)) == (RED, before)


def test_an_unchanged_picture_is_not_written_but_its_note_is(store: Store) -> None:
    publish(store, RED, 1)
    watched = Watched(store)
    assert publish(watched, RED, 2) == Published(uri=store.uri("hero/summer.png"), published=True, changed=False)
    assert watched.calls == ["get picture", "get note", "put note", "holds picture"]
    assert note(store).run == "run-2"
    assert not publish(store, GREEN, 1.5).published


def test_a_picture_of_the_archive_that_is_at_its_address_is_not_read_but_its_note_is_written(store: Store) -> None:
    publish_archived(store, RED, 1)
    watched = Watched(store)
    assert publish_archived(watched, RED, 2) == Published(
        uri=store.uri("hero/summer.png"), published=True, changed=False
    )
    keeps_sha256 = store.stat("hero/summer.png") == Facts(len(RED), hashlib.sha256(RED).hexdigest())
    asked = ["get note", "put note", "stat picture"]
    assert watched.calls == (asked if keeps_sha256 else [*asked, "get picture", "get note", "holds picture"])
    assert note(store).run == "run-2"
    assert not publish_archived(store, GREEN, 1.5).published


def test_a_picture_of_the_archive_that_is_converted_is_not_converted_again(tmp_path: Path) -> None:
    place, given = Publishing(LocalStore(tmp_path), "{name}.jpg"), encoded(gradient(), "PNG")
    assert publish_archived(place, given, 1).changed

    def unread() -> bytes:
        raise AssertionError("it is at its address already")

    about: dict[str, Any] = {"fingerprint": "f" * 64, "refreshed_at": NOON + timedelta(hours=2), "run": "run-2"}
    said = place.publish_archived("hero/summer", unread, hashlib.sha256(given).hexdigest(), ".png", **about)
    assert (said.published, said.changed) == (True, False)
    assert note(place.store, "hero/summer.jpg").run == "run-2"


def test_a_picture_that_is_converted_to_other_bytes_than_before_is_published_where_it_is_not_there(
    tmp_path: Path,
) -> None:
    place, given = Publishing(LocalStore(tmp_path), "{name}.jpg"), encoded(gradient(), "PNG")
    publish_archived(place, given, 1)
    as_before = note(place.store, "hero/summer.jpg").model_copy(update={"sha256": "0" * 64})
    place.store.put(".segmind/live/hero/summer.jpg.json", as_before.model_dump_json().encode(), "application/json")
    Path(place.store.uri("hero/summer.jpg")).write_bytes(b"cut")
    assert publish_archived(place, given, 2) == Published(
        uri=place.store.uri("hero/summer.jpg"), published=True, changed=True
    )
    assert (
        note(place.store, "hero/summer.jpg").sha256
        == hashlib.sha256(content(place.store, "hero/summer.jpg") or b"").hexdigest()
    )


@pytest.mark.parametrize("there", [GREEN, None])
def test_a_picture_of_the_archive_is_read_and_written_where_its_address_has_another_or_none(
    there: bytes | None, store: Store
) -> None:
    publish(store, RED, 1)
    if there:
        store.put("hero/summer.png", there, "image/png")
    elif isinstance(store, LocalStore):
        Path(store.uri("hero/summer.png")).unlink()
    else:
        assert isinstance(store, S3Store)
        store._client.delete_object(Bucket=store._bucket, Key=f"{store._root}hero/summer.png")
    assert publish_archived(store, RED, 2) == Published(uri=store.uri("hero/summer.png"), published=True, changed=True)
    assert states(store) == (RED, "run-2")
    assert publish_archived(store, BLUE, 3).changed
    assert states(store) == (BLUE, "run-3")


def test_a_note_of_an_earlier_version_serves_where_the_picture_is_copied_as_it_is(store: Store) -> None:
    publish(store, RED, 1)
    old = note(store).model_copy(update={"archived_sha256": None}).model_dump_json(exclude_none=True)
    store.put(".segmind/live/hero/summer.png.json", old.encode(), "application/json")
    assert publish_archived(store, RED, 2) == Published(uri=store.uri("hero/summer.png"), published=True, changed=False)
    assert note(store).archived_sha256 == hashlib.sha256(RED).hexdigest()


def test_another_cache_control_reaches_pictures_of_the_archive_that_stay_the_same(store: Store) -> None:
    publish(store, RED, 1)
    assert publish_archived(Publishing(store, "{name}.png", "max-age=60"), RED, 2).changed
    assert note(store).cache_control == "max-age=60"


def test_the_same_run_again_writes_nothing(store: Store) -> None:
    publish(store, RED, 1)
    watched = Watched(store)
    said = publish(watched, RED, 1)
    assert (said.published, said.changed) == (True, False)
    assert watched.calls == ["get picture", "get note", "holds picture"]


def test_of_two_refreshes_of_the_same_time_the_later_one_wins(store: Store) -> None:
    publish(store, RED, 1, run="a")
    assert publish(store, GREEN, 1, run="b").published
    assert (content(store), note(store).run) == (GREEN, "b")


def test_names_do_not_stand_in_each_other_s_way(store: Store) -> None:
    publish(store, RED, 2, name="a")
    assert publish(store, GREEN, 1, name="b").published


def states(store: Store) -> tuple[bytes | None, str]:
    return content(store), note(store).run


@pytest.mark.slow
@pytest.mark.parametrize("pictures", [(RED, GREEN, BLUE), (RED, GREEN, RED), (RED, RED, GREEN), (RED, GREEN, GREEN)])
@pytest.mark.parametrize("at", range(5))
def test_a_slow_older_run_that_is_overtaken_anywhere_does_not_win(
    at: int, pictures: tuple[bytes, bytes, bytes], store: Store
) -> None:
    first, older, newer = pictures
    publish(store, first, 0)
    watched = Watched(store, at, lambda: publish(store, newer, 2))
    said = publish(watched, older, 1)
    assert len(watched.calls) > at or older == first
    if len(watched.calls) <= at:
        publish(store, newer, 2)
    assert states(store) == (newer, "run-2")
    # As it looked to the older run at its last look.
    assert said.published == (at == 4 and older == first)


@pytest.mark.slow
@pytest.mark.parametrize("at", range(5))
def test_a_newer_run_that_an_older_one_cuts_into_anywhere_wins(at: int, store: Store) -> None:
    for number, pictures in enumerate([(RED, GREEN, BLUE), (RED, GREEN, RED), (RED, RED, GREEN)]):
        first, older, newer = pictures
        where = Watched(store, at, partial(publish, store, older, 1, name=str(number)))
        publish(store, first, 0, name=str(number))
        assert publish(where, newer, 2, name=str(number)).published
        assert content(store, f"{number}.png") == newer
        assert note(store, f"{number}.png").run == "run-2"


class Crash(BaseException):
    pass


def crash() -> None:
    raise Crash


@pytest.mark.slow
@pytest.mark.parametrize("at", range(5))
def test_a_crash_anywhere_is_finished_by_the_same_run_or_a_newer_one_and_by_no_older(at: int, store: Store) -> None:
    for name, hour, picture in (("same", 2, GREEN), ("newer", 3, BLUE)):
        publish(store, RED, 0, name=name)
        with pytest.raises(Crash):
            publish(Watched(store, at, crash), GREEN, 2, name=name)
        older = publish(store, BLUE, 1, name=name)
        assert older.published == (at <= 2)  # it came before the note was written, so it was the newest
        assert publish(store, picture, hour, name=name).published
        assert content(store, f"{name}.png") == picture
        assert note(store, f"{name}.png").run == f"run-{hour}"


def test_a_note_that_is_half_written_is_waited_for(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    publish(store, RED, 1)
    path = tmp_path / ".segmind" / "live" / "hero" / "summer.png.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    watched = Watched(store, 3, lambda: path.write_bytes(whole))
    assert not publish(watched, GREEN, 0).published
    assert watched.calls == ["get picture", "get note", "get note", "get note"]


@pytest.mark.parametrize("text", ["", "{", "null", '{"schema_version": 2}'])
def test_a_note_that_cannot_be_read_is_an_error_and_never_an_absence(
    text: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_segmind.storage.store._WAITS_FOR_A_WRITER", (0.0,))
    publish(store, RED, 1)
    store.put(".segmind/live/hero/summer.png.json", text.encode(), "application/json")
    with pytest.raises(StoreError, match=r"summer\.png\.json cannot be read by this version; .* restored \(or removed"):
        publish(store, GREEN, 2)
    assert content(store) == RED


def test_a_note_that_is_removed_lets_any_refresh_publish(store: Store) -> None:
    place = Publishing(store, "{name}.png")
    publish(place, RED, 2)
    if isinstance(store, LocalStore):
        Path(store.uri(".segmind/live/hero/summer.png.json")).unlink()
    else:
        assert isinstance(store, S3Store)
        key = f"{store._root}.segmind/live/hero/summer.png.json"
        store._client.delete_object(Bucket=store._bucket, Key=key)
    assert publish(place, GREEN, 1).published
    assert content(store) == GREEN


def test_a_store_that_fails_says_so(tmp_path: Path) -> None:
    (tmp_path / "hero").write_bytes(b"no folder")
    with pytest.raises(StoreError, match="hero"):
        publish(LocalStore(tmp_path))


def test_who_never_wins_gives_up_and_says_what_to_do(tmp_path: Path) -> None:
    class Losing(Watched):
        def put(self, key: str, data: bytes, content_type: str, **options: Any) -> str:
            raise PreconditionFailedError("somebody else was faster")

    with pytest.raises(StoreError, match=r"summer\.png is being written by other runs; run again"):
        publish(Losing(LocalStore(tmp_path)))


@pytest.mark.parametrize("place", ["disk", "moto"])
def test_of_many_runs_at_once_the_newest_wins(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    runs = 6
    store: Store = LocalStore(tmp_path)
    if place == "moto":
        # As any client does, it asks again after a 500: moto answers one where it reads what is just being replaced.
        again: Any = {"max_pool_connections": runs, "retries": {"total_max_attempts": 5}}
        store = S3Store(BUCKET, tmp_path.name, client(request.getfixturevalue("moto"), **again))
    chance, start = random.Random(0), threading.Barrier(runs)
    laps = [[chance.choice([RED, GREEN, BLUE]) for _ in range(runs)] for _ in range(6)]

    def run(number: int) -> None:
        try:
            for lap, pictures in enumerate(laps):
                start.wait()
                publish(store, pictures[number], number, name=f"lap-{lap}")
        except Exception:
            start.abort()  # the others would wait for it
            raise

    with ThreadPoolExecutor(runs) as pool:
        ends = [pool.submit(run, number) for number in range(runs)]
    errors = [error for each in ends if (error := each.exception())]
    assert [error for error in errors if not isinstance(error, threading.BrokenBarrierError)] == []
    for lap, pictures in enumerate(laps):
        assert content(store, f"lap-{lap}.png") == pictures[-1]
        assert note(store, f"lap-{lap}.png").run == f"run-{runs - 1}"


# Every interleaving of several runs, over a store in memory. A run is a function of the answers that it has got, so a
# state of the world is the objects and each run's answers, and a run is taken one call further from it by giving it its
# answers again. States that several orders lead to are visited once.

Objects = tuple[tuple[str, bytes], ...]
Answers = tuple[Any, ...]
Fates = tuple[tuple[Answers, Published | Literal["dead"] | None], ...]  # None while it goes on
World = tuple[Objects, Fates]

PICTURE, NOTE = "n.png", ".segmind/live/n.png.json"
PICTURES = {"X": png("white"), "A": RED, "B": GREEN, "C": BLUE}


class Paused(BaseException):
    pass


class OneCall:
    """Answers as it did before, then takes one call more."""

    url, conditional = "memory", True

    def __init__(self, objects: Mapping[str, bytes], answers: Answers) -> None:
        self.objects, self.answers, self._told, self._most = dict(objects), answers, 0, len(answers) + 1

    def uri(self, key: str) -> str:
        return key

    def keys(self, prefix: str) -> Iterator[str]:
        raise NotImplementedError

    def get(self, key: str) -> StoredObject | None:
        found = self._answer(lambda: self.objects.get(key))
        return None if found is None else StoredObject(found, etag(found), 0.0)

    def stat(self, key: str) -> Facts | None:
        found = self._answer(lambda: self.objects.get(key))
        return None if found is None else Facts(len(found), hashlib.sha256(found).hexdigest())

    def holds(self, key: str, data: bytes) -> bool:
        return bool(self._answer(lambda: self.objects.get(key) == data))

    def put(self, key: str, data: bytes, content_type: str, **options: Any) -> str:
        def write() -> bool:
            found = self.objects.get(key)
            asked = options["if_match"]
            if (options["if_absent"] and found is not None) or (asked and (found is None or etag(found) != asked)):
                return False
            self.objects[key] = data
            return True

        if not self._answer(write):
            raise PreconditionFailedError(key)
        return etag(data)

    def _answer(self, call: Callable[[], Any]) -> Any:
        if self._told == len(self.answers):
            if self._told == self._most:
                raise Paused
            self.answers = (*self.answers, call())
        self._told += 1
        return self.answers[self._told - 1]


@cache
def etag(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Run:
    picture: str
    hour: int
    name: str
    is_archived: bool = False

    @property
    def data(self) -> bytes:
        return PICTURES[self.picture]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    further.cache_clear()


@cache
def further(objects: Objects, answers: Answers, run: Run) -> tuple[Objects, Answers, Published | None]:
    """The world after one more call of a run, and what became of the run if it has ended."""
    store, said = OneCall(dict(objects), answers), None
    with suppress(Paused):
        to = Publishing(cast(Store, store), "{name}.png")
        said = (publish_archived if run.is_archived else publish)(to, run.data, run.hour, run=run.name, name="n")
    return tuple(sorted(store.objects.items())), store.answers, said


def alone(objects: Objects, run: Run) -> tuple[Objects, Published]:
    answers: Answers = ()
    while True:
        objects, answers, said = further(objects, answers, run)
        if said is not None:
            return objects, said


def worlds(
    first: str, runs: Sequence[Run], mortal: bool = False, *, is_noted: bool = False
) -> Iterator[tuple[dict[str, bytes], Fates]]:
    """Every state that the runs can lead to; if they are mortal, each may also end between any two calls.

    The first picture may be one that `BEFORE` has published.
    """
    objects: Objects = ((PICTURE, PICTURES[first]),) if first else ()
    if is_noted:
        objects, _ = alone(objects, replace(BEFORE, picture=first))
    start: World = (objects, tuple(((), None) for _ in runs))
    seen: set[World] = {start}
    next_ones = [start]
    while next_ones:
        objects, fates = next_ones.pop()
        yield dict(objects), fates
        for number, (answers, fate) in enumerate(fates):
            if fate is None:
                later, more, said = further(objects, answers, runs[number])
                followers: list[World] = [(later, (*fates[:number], (more, said), *fates[number + 1 :]))]
                if mortal:
                    followers.append((objects, (*fates[:number], (answers, "dead"), *fates[number + 1 :])))
                next_ones += (fresh := [each for each in followers if each not in seen])
                seen.update(fresh)


def named(first: str, pictures: str, hours: Sequence[int]) -> tuple[str, list[Run]]:
    return first, [
        Run(picture, hour, f"r{number}") for number, (picture, hour) in enumerate(zip(pictures, hours, strict=True))
    ]


def winner(objects: Mapping[str, bytes], runs: Sequence[Run]) -> Run:
    """The run of the note."""
    return next(run for run in (*runs, BEFORE) if run.name == Note.model_validate_json(objects[NOTE]).run)


BEFORE = Run("X", 0, "before")


TWO = [
    (first, one + other, hours)
    for first, one, other in itertools.product(["", "X"], "XA", "XAB")
    for hours in ([1, 2], [2, 1], [1, 1])
]
THREE = [
    ("X", "AXB", [1, 2, 3]),
    ("X", "ABX", [1, 2, 3]),  # the newest refresh brings back what an old one has read
    ("X", "AXX", [1, 2, 3]),
    ("", "ABA", [1, 2, 3]),
    ("X", "AXA", [1, 2, 2]),  # two of the same time, and one that puts back what it has overwritten
    ("X", "ABA", [1, 1, 1]),
]
PAIRS = [(pictures, hours) for first, pictures, hours in TWO if first == "X"]
# Every order of the calls takes twice as long where each line is traced.
UNTRACED = pytest.mark.no_cover


ARCHIVED = [
    *((pictures, hours, which) for pictures, hours in PAIRS for which in ([0], [1], [0, 1])),
    *((pictures, [1, 2, 3], [0, 1, 2]) for pictures in ("AXB", "ABX", "AXX")),
    ("AXA", [1, 2, 2], [1]),
]
"""Pictures, hours, and which of the runs have a picture that the archive has, and do not read it if it is there."""


@UNTRACED
@pytest.mark.slow
@pytest.mark.parametrize(("first", "pictures", "hours"), [*TWO, *THREE])
def test_in_every_order_of_the_calls_the_newest_refresh_is_there_at_the_end(
    first: str, pictures: str, hours: list[int]
) -> None:
    first, runs = named(first, pictures, hours)
    newest_is_there(runs, worlds(first, runs))


@UNTRACED
@pytest.mark.slow
@pytest.mark.parametrize(("pictures", "hours", "which"), ARCHIVED)
def test_in_every_order_of_the_calls_a_picture_that_is_not_read_again_keeps_older_ones_out_too(
    pictures: str, hours: list[int], which: list[int]
) -> None:
    first, runs = named("X", pictures, hours)
    runs = [replace(run, is_archived=number in which) for number, run in enumerate(runs)]
    newest_is_there(runs, worlds(first, runs, is_noted=True))


def newest_is_there(runs: Sequence[Run], every_world: Iterator[tuple[dict[str, bytes], Fates]]) -> None:
    """In every world the note is never older than what was said to be published, and in the end the newest is there."""
    ends = 0
    for objects, fates in every_world:
        if NOTE in objects:
            published = [
                run.hour
                for run, (_, fate) in zip(runs, fates, strict=True)
                if isinstance(fate, Published) and fate.published
            ]
            assert winner(objects, runs).hour >= max(published, default=0)
        if all(fates_of_all := [fate for _, fate in fates]):
            ends += 1
            last = winner(objects, runs)
            assert last.hour == max(run.hour for run in runs)
            assert objects[PICTURE] == last.data
            said = fates_of_all[list(runs).index(last)]
            assert isinstance(said, Published)
            assert said.published
    assert ends


@UNTRACED
@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "pictures", "hours"), [("", "AB", [1, 2]), ("X", "AB", [1, 2]), ("X", "ABC", [1, 2, 3])]
)
def test_where_all_pictures_differ_an_older_one_is_never_seen_again_even_if_runs_die(
    first: str, pictures: str, hours: list[int]
) -> None:
    first, runs = named(first, pictures, hours)
    for objects, fates in worlds(first, runs, mortal=True):
        done = [
            run for run, (_, fate) in zip(runs, fates, strict=True) if isinstance(fate, Published) and fate.published
        ]
        if done:
            newest = max(done, key=lambda run: run.hour)
            not_older = {run.data for run in runs if run.hour >= newest.hour}
            assert objects[PICTURE] in not_older


@UNTRACED
@pytest.mark.parametrize(("pictures", "hours", "which"), ARCHIVED[: 3 * len(PAIRS)])
def test_however_runs_die_that_read_no_picture_again_the_newest_one_run_again_is_there_and_older_ones_stay_out(
    pictures: str, hours: list[int], which: list[int]
) -> None:
    first, runs = named("X", pictures, hours)
    runs = [replace(run, is_archived=number in which) for number, run in enumerate(runs)]
    run_again_is_there(runs, worlds(first, runs, mortal=True, is_noted=True))


@UNTRACED
@pytest.mark.parametrize(("first", "pictures", "hours"), [*TWO, ("X", "AX", [1, 2])])
def test_however_runs_die_the_newest_one_run_again_is_there_and_older_ones_stay_out(
    first: str, pictures: str, hours: list[int]
) -> None:
    first, runs = named(first, pictures, hours)
    run_again_is_there(runs, worlds(first, runs, mortal=True))


def run_again_is_there(runs: Sequence[Run], every_world: Iterator[tuple[dict[str, bytes], Fates]]) -> None:
    newest, older = max(runs, key=lambda run: run.hour), min(runs, key=lambda run: run.hour)
    for objects, fates in every_world:
        if all(fate for _, fate in fates):
            after, said = alone(tuple(sorted(objects.items())), newest)
            assert said.published
            assert dict(after)[PICTURE] == newest.data
            if older.hour < newest.hour:
                assert alone(after, older)[0] == after
