"""The key to the API: a Prefect block, or environment variables."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import ClassVar, cast

from prefect.blocks.abstract import CredentialsBlock
from pydantic import Field, HttpUrl, SecretStr

from prefect_segmind.api.client import DEFAULT_BASE_URL, SegmindClient
from prefect_segmind.api.endpoint import Endpoint
from prefect_segmind.api.history import HISTORY_SETTING, history_url
from prefect_segmind.api.listing import READ_SECONDS, TOTAL_SECONDS, RequestHistory
from prefect_segmind.errors import ConfigurationError
from prefect_segmind.settings import SegmindSettings, load_settings
from prefect_segmind.storage.http_environment import check_environment
from prefect_segmind.text import CONTROL, given_text, stripped


class SegmindCredentials(CredentialsBlock):
    """The key to Segmind's API.

    Attributes:
        api_key: The key; Prefect stores it encrypted and never shows it.
        base_url: The address of the API.

    Example:
        Load a saved block, and ask for the account's credits:
        ```python
        from prefect_segmind import SegmindCredentials

        credentials = SegmindCredentials.load("BLOCK_NAME")
        with credentials.get_client() as client:
            print(client.credits())
        ```
    """

    _block_type_name: ClassVar[str | None] = "Segmind Credentials"
    _block_type_slug: ClassVar[str | None] = "segmind-credentials"
    _description: ClassVar[str | None] = "The key to Segmind's image-to-image API."
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl("https://www.segmind.com/models/ideogram-2a-img-2-img/api")

    api_key: SecretStr = Field(description="The key to Segmind's API.")
    base_url: str = Field(default=DEFAULT_BASE_URL, description="The address of the API.")

    def get_client(self, settings: SegmindSettings | None = None) -> SegmindClient:
        """A client with this key and the time-outs of the settings; close it after use.

        Args:
            settings: The present ones by default; loading them takes longer than creating a client.

        Raises:
            ConfigurationError: The key or the address is invalid.
        """
        settings = settings or load_settings()
        return SegmindClient(
            self.api_key.get_secret_value(),
            self.base_url,
            connect_timeout=settings.connect_timeout_seconds,
            read_timeout=settings.read_timeout_seconds,
            list_price_usd=settings.price_usd,
        )

    def get_history(
        self, settings: SegmindSettings, log: logging.Logger, sleep: Callable[[float], None] = time.sleep
    ) -> RequestHistory | None:
        """The provider's request history with this key; None if there is none for the API, or it is switched off.

        Args:
            settings: The settings.
            log: Logs that the history asks to wait.
            sleep: Waits so many seconds, when it does.

        Raises:
            ConfigurationError: The key or the address is invalid.
        """
        address = history_url(self.base_url, settings.history_url)
        if address is None:
            return None

        def open_endpoint() -> Endpoint:
            return Endpoint(
                self.api_key.get_secret_value(),
                address,
                setting=HISTORY_SETTING,
                connect_timeout=settings.connect_timeout_seconds,
                read_timeout=min(READ_SECONDS, settings.read_timeout_seconds),
                total_timeout=TOTAL_SECONDS,
            )

        open_endpoint().close()  # a wrong address is told now, and not when a request is lost
        return RequestHistory(open_endpoint, log=log, sleep=sleep)


def load_credentials(block: str | None = None) -> SegmindCredentials:
    """The credentials to use: the given block, that of the settings, or the environment.

    Args:
        block: Name of a saved `SegmindCredentials` block.

    Raises:
        ConfigurationError: There are none, or they contradict SEGMIND_BASE_URL; the message says what to set.
    """
    name = given_text("credentials_block", block) or load_settings().credentials_block
    if name:
        check_environment()  # Prefect's client reads it too, but its errors do not name the variable
        try:
            loaded = cast(SegmindCredentials, SegmindCredentials.load(name, _sync=True))  # type: ignore[call-arg]
        except ValueError as error:
            raise ConfigurationError(
                f"credentials_block: no SegmindCredentials block named {name!r} can be loaded ({error}); save one with "
                f'SegmindCredentials(api_key=…).save("{name}")'
            ) from None
        address = (_base_url() or loaded.base_url).rstrip("/")
        if address != loaded.base_url.rstrip("/"):
            raise ConfigurationError(
                f"SEGMIND_BASE_URL is {address}, but the block {name!r} names {loaded.base_url} and would pay there; "
                "unset the variable, or name no block"
            )
        return loaded
    key = stripped(os.environ.get("SEGMIND_API_KEY", ""))
    if not key:
        raise ConfigurationError(
            "api_key: missing; set SEGMIND_API_KEY, or name a SegmindCredentials block (--block, the flow's "
            "credentials_block, or PREFECT_INTEGRATIONS_SEGMIND_CREDENTIALS_BLOCK)"
        )
    if CONTROL.search(key):
        raise ConfigurationError("SEGMIND_API_KEY: it contains a control character; copy it again")
    return SegmindCredentials(api_key=SecretStr(key), base_url=_base_url() or DEFAULT_BASE_URL)


def load_base_url(block: str | None = None) -> str:
    """The address of the API, for which no key is needed.

    Args:
        block: Name of a saved `SegmindCredentials` block.

    Raises:
        ConfigurationError: The block cannot be loaded, or contradicts SEGMIND_BASE_URL.
    """
    if given_text("credentials_block", block) or load_settings().credentials_block:
        return load_credentials(block).base_url
    return _base_url() or DEFAULT_BASE_URL


def _base_url() -> str | None:
    return given_text("SEGMIND_BASE_URL", os.environ.get("SEGMIND_BASE_URL"))
