"""Promises of `settings`, `credentials` and `configuration`: what is set is used, and what is missing is named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import boto3
import pytest
from prefect.blocks.core import Block
from prefect.settings import PREFECT_HOME
from pydantic import SecretStr, ValidationError

import prefect_segmind
from prefect_segmind import errors
from prefect_segmind.credentials import SegmindCredentials, load_base_url, load_credentials
from prefect_segmind.inbox.open_inbox import open_inbox
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services, outbox_folder
from prefect_segmind.settings import SegmindSettings, load_settings
from prefect_segmind.storage.s3 import S3Store

PREFIX = "PREFECT_INTEGRATIONS_SEGMIND_"
KEY = "a-key-of-any-form-0123456789"


class TestSettings:
    def test_every_one_is_read_from_its_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given = {
            "archive": "s3://b/archive", "upload_to": "s3://b/uploads", "public_base_url": "https://cdn.example",
            "presigned_seconds": 600, "outbox": Path("/srv/outbox"), "outbox_min_free_bytes": 5,
            "credentials_block": "marketing", "s3_block": "aws-credentials/prod", "connect_timeout_seconds": 1.5,
            "read_timeout_seconds": 20.0, "longest_wait_seconds": 0.0, "price_usd": Decimal("0.04"),
            "grace_seconds": 5.0, "allow_private_sources": True, "allow_unlisted_resolution": True,
            "approve_above_usd": Decimal("5.00"), "approval_timeout_seconds": 60,
            "publish_cache_control": "no-cache", "s3_encryption": "aws:kms:alias/pictures", "stop_after_unusable": 5,
            "event_sources": "any", "history_url": "https://history.example/mine",
            "daily_budget_usd": Decimal("5.00"), "monthly_budget_usd": Decimal("99.00"),
            "budget_timezone": "Europe/Berlin",
        }  # fmt: skip
        assert set(given) == set(SegmindSettings.model_fields), "each has its place in this test"
        for name, value in given.items():
            monkeypatch.setenv(PREFIX + name.upper(), str(value))
        assert load_settings().model_dump() == given

    def test_are_read_from_prefects_own_file_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "prefect.toml").write_text(
            '[integrations.segmind]\narchive = "s3://b/archive"\nprice_usd = "0.04"\n'
        )
        monkeypatch.chdir(tmp_path)
        assert (load_settings().archive, load_settings().price_usd) == ("s3://b/archive", Decimal("0.04"))

    def test_the_outbox_is_in_prefects_home_unless_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert load_settings().outbox_folder == Path(PREFECT_HOME.value()) / "segmind" / "outbox"
        monkeypatch.setenv("HOME", "/home/ann")
        monkeypatch.setenv("USERPROFILE", "/home/ann")
        monkeypatch.setenv(f"{PREFIX}OUTBOX", "~/outbox")
        assert outbox_folder(load_settings()) == Path("/home/ann/outbox")

    def test_an_empty_variable_is_as_good_as_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(f"{PREFIX}HISTORY_URL", raising=False)
        before = load_settings()
        for name in SegmindSettings.model_fields:
            monkeypatch.setenv(PREFIX + name.upper(), "")
        assert load_settings() == before

    def test_quotes_that_have_become_part_of_one_are_told_with_its_variable(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(f"{PREFIX}OUTBOX", '"/data/outbox"')
        with pytest.raises(errors.ConfigurationError, match=f"{PREFIX}OUTBOX: .*remove them"):
            load_settings()

    @pytest.mark.parametrize("blank", [" ", "\r", "\r\n", "\t", "\u00a0"])
    def test_blanks_around_one_do_not_count(self, blank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(f"{PREFIX}ARCHIVE", f"{blank}{tmp_path}/archive{blank}")
        monkeypatch.setenv(f"{PREFIX}OUTBOX", f"{tmp_path}/outbox{blank}")
        monkeypatch.setenv(f"{PREFIX}CREDENTIALS_BLOCK", blank)
        monkeypatch.setenv("SEGMIND_API_KEY", f"{KEY}{blank}")
        monkeypatch.setenv("SEGMIND_BASE_URL", f"https://api.example/v1{blank}")
        archive = Services().archive
        assert archive.url == Services(archive=f"{tmp_path}/archive{blank}").archive.url == f"{tmp_path}/archive"
        assert outbox_folder(load_settings()) == tmp_path / "outbox"
        assert Services(upload_to=f"s3://b/uploads{blank}").uploads.place == "s3://b/uploads"
        assert load_credentials(None).base_url == load_base_url() == "https://api.example/v1"
        assert load_credentials(None).api_key.get_secret_value() == KEY

    def test_a_control_character_in_one_is_refused_with_its_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(call: Callable[[], object]) -> str:
            with pytest.raises(errors.ConfigurationError) as caught:
                call()
            return str(caught.value)

        assert "archive: 's3://b/a\\x1bb' contains a control" in refused(
            lambda: Services(archive="s3://b/a\x1bb").archive
        )
        assert refused(lambda: Services(upload_to="s3://b/\n/a").uploads).startswith("upload_to: ")
        assert refused(lambda: Services(publish_to="/srv/\x00live").publishing).startswith("publish_to: ")
        assert refused(lambda: open_inbox("/srv/\rin", lambda: pytest.fail("S3"))).startswith("inbox: ")
        assert refused(lambda: load_credentials("a\nb")).startswith("credentials_block: ")
        with monkeypatch.context() as wrong:
            wrong.setenv("SEGMIND_BASE_URL", "https://api\x7f.example")
            assert refused(load_base_url).startswith("SEGMIND_BASE_URL: ")
            wrong.setenv("SEGMIND_API_KEY", f"{KEY}\x1b{KEY}")
            assert refused(lambda: load_credentials(None)).startswith("SEGMIND_API_KEY: it contains")
            assert KEY not in refused(lambda: load_credentials(None))
        monkeypatch.setenv(f"{PREFIX}ARCHIVE", "s3://b/a\x1bb")
        assert f"{PREFIX}ARCHIVE: 's3://b/a\\x1bb'" in refused(load_settings)

    def test_wrong_ones_are_all_named_with_their_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(f"{PREFIX}PRESIGNED_SECONDS", "59")
        monkeypatch.setenv(f"{PREFIX}PRICE_USD", "cheap")
        with pytest.raises(errors.ConfigurationError) as caught:
            load_settings()
        lines = str(caught.value).splitlines()
        assert lines[0] == "Some settings are invalid; nothing was uploaded or paid."
        assert lines[1].strip().startswith(f"{PREFIX}PRESIGNED_SECONDS: '59': Input should be greater than or equal")
        assert lines[2].strip().startswith(f"{PREFIX}PRICE_USD: 'cheap': Input should be a valid decimal")
        assert len(lines) == 3


class TestCredentials:
    def test_come_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SEGMIND_API_KEY", f" {KEY}\n")
        found = load_credentials()
        assert found.api_key.get_secret_value() == KEY
        assert found.base_url == load_base_url() == "https://api.segmind.com/v1"
        monkeypatch.setenv("SEGMIND_BASE_URL", " http://127.0.0.1:8787/v1 ")
        assert load_credentials().base_url == load_base_url() == "http://127.0.0.1:8787/v1"

    @pytest.mark.parametrize("key", [None, "", " "])
    def test_that_are_missing_name_the_variable_and_the_block(
        self, key: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if key is not None:
            monkeypatch.setenv("SEGMIND_API_KEY", key)
        with pytest.raises(errors.ConfigurationError) as caught:
            load_credentials()
        for name in ("SEGMIND_API_KEY", "SegmindCredentials", "--block", f"{PREFIX}CREDENTIALS_BLOCK"):
            assert name in str(caught.value)

    def test_the_address_of_the_api_is_known_without_a_key(self) -> None:
        assert load_base_url() == "https://api.segmind.com/v1"

    def test_never_show_the_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SEGMIND_API_KEY", KEY)
        found = load_credentials()
        shown = (repr(found), str(found), str(found.model_dump()), found.model_dump_json(), repr(found.get_client()))
        assert not [text for text in shown if KEY in text]

    def test_a_wrong_block_does_not_show_the_key_either(self) -> None:
        with pytest.raises(ValidationError) as caught:
            SegmindCredentials(api_key=SecretStr(KEY), base_url=7)
        assert KEY not in str(caught.value)

    def test_make_a_client_with_the_settings_time_outs_and_price(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(f"{PREFIX}CONNECT_TIMEOUT_SECONDS", "1.5")
        monkeypatch.setenv(f"{PREFIX}READ_TIMEOUT_SECONDS", "2.5")
        monkeypatch.setenv(f"{PREFIX}PRICE_USD", "0.04")
        with SegmindCredentials(api_key=SecretStr(KEY)).get_client() as client:
            assert (client._endpoint.times.connect, client._endpoint.times.read) == (1.5, 2.5)
            assert client._list_price == Decimal("0.04")

    def test_a_saved_block_is_loaded_by_name_and_used(
        self, sandbox: Sandbox, prefect_server: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        block = SegmindCredentials(api_key=SecretStr(sandbox.api_key), base_url=sandbox.base_url)
        block.save(name := f"marketing-{uuid4()}", _sync=True)  # type: ignore[call-arg]
        monkeypatch.delenv("SEGMIND_API_KEY")
        monkeypatch.delenv("SEGMIND_BASE_URL")
        assert load_base_url(name) == sandbox.base_url
        assert Services(credentials_block=name).reader.allow_loopback
        assert not Services().reader.allow_loopback
        with load_credentials(name).get_client() as client:
            assert client.credits() == Decimal(1000)
        monkeypatch.setenv(f"{PREFIX}CREDENTIALS_BLOCK", name)
        assert load_credentials().api_key.get_secret_value() == sandbox.api_key
        assert load_base_url() == sandbox.base_url

    def test_a_block_that_is_named_wins_over_the_environment(
        self, prefect_server: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        SegmindCredentials(api_key=SecretStr(KEY)).save(name := f"own-{uuid4()}", _sync=True)  # type: ignore[call-arg]
        monkeypatch.setenv("SEGMIND_API_KEY", "another")
        found = load_credentials(name)
        assert (found.api_key.get_secret_value(), found.base_url) == (KEY, "https://api.segmind.com/v1")

    def test_a_block_that_would_pay_elsewhere_than_the_environment_says_is_refused(
        self, prefect_server: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        SegmindCredentials(api_key=SecretStr(KEY)).save(name := f"real-{uuid4()}", _sync=True)  # type: ignore[call-arg]
        monkeypatch.setenv("SEGMIND_BASE_URL", "http://127.0.0.1:1/v1")
        with pytest.raises(errors.ConfigurationError, match="would pay there"):
            load_credentials(name)

    @pytest.mark.parametrize("name", ["nobody", "segmind-credentials/nobody", "no/such/block"])
    def test_a_block_that_is_missing_is_named_and_how_to_save_it_told(
        self, name: str, prefect_server: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SEGMIND_API_KEY", KEY)
        with pytest.raises(errors.ConfigurationError, match="credentials_block: no SegmindCredentials block") as caught:
            load_credentials(name)
        assert repr(name) in str(caught.value)
        assert "SegmindCredentials(api_key=…).save(" in str(caught.value)


class TestRegistration:
    def test_prefect_finds_the_collection_and_the_block_in_it(self) -> None:
        (found,) = entry_points(group="prefect.collections", name="prefect_segmind")
        assert found.load().SegmindCredentials is SegmindCredentials
        assert "SegmindCredentials" in dir(prefect_segmind)
        assert prefect_segmind.SegmindCredentials is SegmindCredentials
        assert SegmindCredentials.get_block_type_slug() == "segmind-credentials"

    def test_prefect_block_register_registers_it(self, prefect_server: None) -> None:
        from prefect.testing.cli import invoke_and_assert

        invoke_and_assert(
            ["block", "register", "-m", "prefect_segmind"],
            expected_code=0,
            expected_output_contains=["Successfully registered", "Segmind Credentials"],
        )

    def test_importing_the_package_loads_neither_prefect_nor_boto3(self) -> None:
        code = "import sys, prefect_segmind; print({'prefect', 'boto3', 'PIL', 'httpx'} & set(sys.modules))"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said.strip() == "set()"

    def test_every_public_name_is_there_and_no_other(self) -> None:
        for name in prefect_segmind.__all__:
            assert getattr(prefect_segmind, name) is not None
        with pytest.raises(AttributeError, match="has no attribute 'Segmint'"):
            prefect_segmind.Segmint  # noqa: B018


class OwnS3(Block):
    """A block with `get_s3_client()`, as prefect-aws has them."""

    _block_type_name: ClassVar[str | None] = "Own S3"
    _block_type_slug: ClassVar[str | None] = "own-s3"

    endpoint: str
    access_key: str
    secret_key: SecretStr

    def get_s3_client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key.get_secret_value(),
            region_name="us-east-1",
        )


class NoS3(Block):
    """A block of another kind."""

    _block_type_slug: ClassVar[str | None] = "no-s3"


class TestS3:
    def test_a_client_is_made_once_for_each_environment(
        self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = Services().s3
        assert Services().s3 is first
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        second = Services().s3
        assert second is not first
        assert second.meta.endpoint_url == "http://127.0.0.1:9"
        monkeypatch.setenv("UNRELATED", "1")
        assert Services().s3 is second

    @pytest.mark.parametrize("place", ["s3://segmind/a", "S3://segmind/a"])
    def test_whatever_opens_a_bucket_uses_that_client(self, place: str, sandbox: Sandbox) -> None:
        publisher = Services(publish_to=place).publishing
        assert publisher is not None
        for store in (Services(archive=place).archive.store, publisher.store):
            assert isinstance(store, S3Store)
            assert store._client is Services().s3

    def test_a_block_that_has_one_supplies_it_and_the_environment_does_not(
        self, sandbox: Sandbox, prefect_server: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert sandbox.s3
        block = OwnS3(
            endpoint=sandbox.s3.endpoint_url,
            access_key=sandbox.s3.access_key,
            secret_key=SecretStr(sandbox.s3.secret_key),
        )
        block.save(saved := f"prod-{uuid4()}", _sync=True)  # type: ignore[call-arg]
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name)
        monkeypatch.setenv(f"{PREFIX}S3_BLOCK", f"own-s3/{saved}")
        Services().archive.store.put("x.txt", b"by the block", "text/plain")
        found = Services().archive.store.get("x.txt")
        assert found is not None
        assert found.data == b"by the block"

    @pytest.mark.parametrize("name", ["own-s3/nobody", "no-such-type/prod", "prod", "no-s3/{saved}"])
    def test_a_wrong_block_is_named_with_its_setting(
        self, name: str, prefect_server: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        NoS3().save(saved := f"prod-{uuid4()}", _sync=True)  # type: ignore[call-arg]
        name = name.format(saved=saved)
        monkeypatch.setenv(f"{PREFIX}S3_BLOCK", name)
        with pytest.raises(
            errors.ConfigurationError, match=f"{PREFIX}S3_BLOCK: '{name}' cannot be loaded as a block with"
        ) as caught:
            _ = Services().s3
        assert "aws-credentials/prod" in str(caught.value)


class TestPlaces:
    def test_no_archive_is_an_error_that_names_the_option_and_the_variable(self) -> None:
        with pytest.raises(errors.ConfigurationError) as caught:
            _ = Services().archive
        for name in ("--archive", "the flow's archive", f"{PREFIX}ARCHIVE"):
            assert name in str(caught.value)

    def test_the_archive_that_is_named_wins_over_the_settings(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(f"{PREFIX}ARCHIVE", str(tmp_path / "set"))
        assert Services().archive.url == str(tmp_path / "set")
        assert Services(archive=str(tmp_path / "named")).archive.url == str(tmp_path / "named")

    def test_an_archive_in_a_folder_asks_for_no_s3(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", "none-of-that-name")
        archive = Services(archive=str(tmp_path)).archive
        assert archive.read("ab" * 32) is None
        with pytest.raises(errors.StoreCredentialsError, match="none-of-that-name"):
            _ = Services(archive="s3://bucket/prefix").archive

    def test_the_place_for_uploads_that_is_named_wins_over_the_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(f"{PREFIX}UPLOAD_TO", "s3://set/uploads")
        assert Services().uploads.place == "s3://set/uploads"
        assert Services(upload_to="s3://named/uploads").uploads.place == "s3://named/uploads"
