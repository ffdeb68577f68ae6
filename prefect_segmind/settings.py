"""The plugin's settings, read as Prefect reads its own: environment, `.env`, `prefect.toml`, `pyproject.toml`.

The variable of a setting is `PREFECT_INTEGRATIONS_SEGMIND_` and its name in capitals; an empty one counts as unset.
A relative folder in one of the files starts at the folder of the file.
The S3 connection has no settings here: boto3 reads its own (`AWS_PROFILE`, `AWS_ENDPOINT_URL_S3`, …).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from prefect.settings import PREFECT_HOME
from prefect.settings.base import PrefectBaseSettings, build_settings_config
from prefect.settings.sources import TomlConfigSettingsSourceBase
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from prefect_segmind.errors import ConfigurationError
from prefect_segmind.money import LIST_PRICE_USD
from prefect_segmind.storage.open_store import is_relative
from prefect_segmind.text import CONTROL, QUOTED, stripped

PREFIX: Final = "PREFECT_INTEGRATIONS_SEGMIND_"
"""The prefix of the variables."""
_FOLDERS: Final = ("archive", "outbox")
"""The settings that may name a folder."""


class SegmindSettings(PrefectBaseSettings):
    """The defaults of the flows' parameters, and settings that are the same for all runs.

    Attributes:
        archive: `s3://bucket/prefix` or a folder for the pictures.
        upload_to: `s3://bucket/prefix` for source images.
        public_base_url: Address under which `upload_to` can be read without a signature.
        presigned_seconds: How long a signed address of a source image is valid.
        outbox: Folder for paid pictures until they are archived; by default `{PREFECT_HOME}/segmind/outbox`.
        outbox_min_free_bytes: The free space in the outbox without which nothing is paid for.
        credentials_block: Name of the default `SegmindCredentials` block.
        s3_block: `block-type/name` of a block with `get_s3_client()` to use instead of boto3's own chain.
        s3_encryption: `AES256`, `aws:kms` or `aws:kms:KEY-ID`, the server-side encryption to ask for with each write.
        history_url: The address of the provider's request history, or `off`; by default the API's own.
        connect_timeout_seconds: The time-out for connecting to the API.
        read_timeout_seconds: The time-out for the next bytes of an answer.
        longest_wait_seconds: The longest wait for a rate limit; a longer one fails the job.
        stop_after_unusable: The number of consecutive paid answers without a picture that stops a batch; 0 for never.
        grace_seconds: How long requests in flight may take to end when a batch is interrupted; a worker kills after 30.
        approve_above_usd: A batch that may cost more asks a person before it pays; by default nobody is asked.
        approval_timeout_seconds: How long a run waits for the approval.
        publish_cache_control: The `Cache-Control` header of published pictures, whose content changes.
        daily_budget_usd: What all runs that share an archive may spend in a day; by default there is no limit.
        monthly_budget_usd: What they may spend in a month.
        budget_timezone: The time zone of these days and months, by its IANA name, such as Europe/Berlin.
        price_usd: The expected cost of a picture.
        allow_private_sources: Whether images at private and link-local addresses are read.
        allow_unlisted_resolution: Whether resolutions beyond the 78 are sent.
        event_sources: How the image of a run that an event began must begin, separated by commas, or `any`.
    """

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "segmind"))

    archive: str | None = None
    upload_to: str | None = None
    public_base_url: str | None = None
    presigned_seconds: int = Field(default=3600, ge=60, le=604_800)
    outbox: Path | None = None
    outbox_min_free_bytes: int = Field(default=100_000_000, ge=0)
    credentials_block: str | None = None
    s3_block: str | None = None
    s3_encryption: str | None = None
    history_url: str | None = None
    connect_timeout_seconds: float = Field(default=10.0, gt=0)
    read_timeout_seconds: float = Field(default=180.0, gt=0)
    longest_wait_seconds: float = Field(default=120.0, ge=0)
    stop_after_unusable: int = Field(default=3, ge=0)
    grace_seconds: float = Field(default=25.0, ge=0)
    approve_above_usd: Decimal | None = Field(default=None, ge=0)
    approval_timeout_seconds: int = Field(default=43_200, ge=1)
    publish_cache_control: str = "public, max-age=300"
    daily_budget_usd: Decimal | None = Field(default=None, ge=0)
    monthly_budget_usd: Decimal | None = Field(default=None, ge=0)
    budget_timezone: str = "UTC"
    price_usd: Decimal = Field(default=LIST_PRICE_USD, ge=0)
    allow_private_sources: bool = False
    allow_unlisted_resolution: bool = False
    event_sources: str = "s3://, https://"

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *given: PydanticBaseSettingsSource, **named: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Prefect's sources and, before its files, their relative folders as absolute ones."""
        sources = super().settings_customise_sources(settings_cls, *given, **named)
        files = [each for each in sources if isinstance(each, (DotEnvSettingsSource, TomlConfigSettingsSourceBase))]
        at = sources.index(files[0])
        return (*sources[:at], _FoldersOfFiles(settings_cls, files), *sources[at:])

    @model_validator(mode="before")
    @classmethod
    def _empty_is_not_set(cls, values: dict[str, Any]) -> dict[str, Any]:
        clean = {name: stripped(value) if isinstance(value, str) else value for name, value in values.items()}
        return {name: value for name, value in clean.items() if value != ""}

    @field_validator("*", mode="before")
    @classmethod
    def _no_control_characters_and_no_quotes(cls, value: Any) -> Any:
        if isinstance(value, str) and CONTROL.search(value):
            raise ValueError("it contains a control character; write it again")
        if isinstance(value, str) and QUOTED.fullmatch(value):
            raise ValueError("the quotes are part of the value; remove them")
        return value

    @field_validator("s3_encryption")
    @classmethod
    def _known_encryption(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(r"AES256|aws:kms(:[\w:/-]+)?", value, re.ASCII):
            raise ValueError("allowed is AES256, aws:kms or aws:kms:KEY-ID")
        return value

    @field_validator("event_sources")
    @classmethod
    def _known_sources(cls, value: str) -> str:
        if value != "any" and not re.fullmatch(r"(s3|https?)://(\s*,\s*(s3|https?)://)*", value):
            raise ValueError("allowed is any, or s3://, https:// and http://, separated by commas")
        return value

    @field_validator("budget_timezone")
    @classmethod
    def _known_timezone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(
                "no such time zone; give its IANA name, such as Europe/Berlin (pip install tzdata where the system "
                "has none)"
            ) from None
        return value

    @property
    def outbox_folder(self) -> Path:
        """The outbox's folder, set or by default."""
        return (self.outbox or Path(PREFECT_HOME.value()) / "segmind" / "outbox").expanduser()


class _FoldersOfFiles(PydanticBaseSettingsSource):
    """The relative folders in `.env`, `prefect.toml` and `pyproject.toml`, as absolute ones.

    Args:
        settings_cls: The settings.
        files: The sources of the files, the first one wins. Prefect reads all of them in the working directory.
    """

    def __init__(self, settings_cls: type[BaseSettings], files: Sequence[PydanticBaseSettingsSource]) -> None:
        super().__init__(settings_cls)
        self._files = files

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The field's value in the first file that has it, unchanged."""
        values = (each.get_field_value(field, field_name) for each in self._files)
        return next((value for value in values if value[0] is not None), (None, field_name, False))

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(self.settings_cls.model_fields[name], name)[0] for name in _FOLDERS}
        return {
            name: str(Path.cwd() / value.strip())
            for name, value in found.items()
            if isinstance(value, str) and is_relative(value)
        }


def load_settings() -> SegmindSettings:
    """The present settings.

    Raises:
        ConfigurationError: Some are invalid; the message names each with its variable.
    """
    try:
        return SegmindSettings()
    except ValidationError as error:
        lines = [f"{PREFIX}{str(each['loc'][0]).upper()}: {each['input']!r}: {each['msg']}" for each in error.errors()]
        raise ConfigurationError(
            "\n  ".join(["Some settings are invalid; nothing was uploaded or paid.", *lines])
        ) from None
