"""The checks of `prefect-segmind check`: everything that a run needs is tried, at no cost."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from importlib.metadata import requires, version
from pathlib import Path
from typing import Literal, NamedTuple

import httpx
from packaging.requirements import Requirement
from prefect import __version__ as prefect_version
from prefect.client.orchestration import get_client
from prefect.logging import get_logger
from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_URL

from prefect_segmind.api.history import HISTORY_SETTING, history_url
from prefect_segmind.api.origin import is_v2, on_loopback
from prefect_segmind.archive.outbox import Outbox
from prefect_segmind.credentials import load_base_url, load_credentials
from prefect_segmind.errors import ConfigurationError, StoreError, StoreUnreachableError
from prefect_segmind.money import usd
from prefect_segmind.services import Services, outbox_folder
from prefect_segmind.settings import PREFIX, load_settings
from prefect_segmind.storage.disk_errors import reason
from prefect_segmind.storage.http_environment import check_environment, proxy_for, ssl_context
from prefect_segmind.storage.http_exchange import Times, exchange, parsed_url, transport
from prefect_segmind.storage.open_store import is_relative, open_store
from prefect_segmind.storage.store import Store


class CheckResult(NamedTuple):
    """The result of a check.

    Attributes:
        text: The finding, or the remedy.
        mark: `ok`, `mind` for what works with a caveat, or `bad` for what does not work.
    """

    text: str
    mark: Literal["ok", "mind", "bad"] = "ok"


_WITHOUT_HISTORY = "what became of a request whose answer is lost stays unknown, and may be paid for again"

Check = tuple[str, Callable[[], CheckResult]]
"""The title of a check, and the function that runs it."""


def all_checks(block: str | None, archive: str | None, upload_to: str | None) -> Iterator[Check]:
    """Yields titles and checks; a check returns a result, or raises an error whose message has the remedy.

    Args:
        block: Name of a `SegmindCredentials` block; that of the settings if None.
        archive: `s3://bucket/prefix` or a folder; that of the settings if None.
        upload_to: `s3://bucket/prefix`; that of the settings if None.
    """
    yield "proxy and certificates", lambda: _http(block)
    yield "key and credits", lambda: _credits(block)
    yield "API version", lambda: _api_version(block)
    yield "request history", lambda: _history(block)
    yield "upload place", lambda: _upload_place(upload_to)
    yield "archive", lambda: _archive(archive)
    yield "shared budgets", lambda: _budgets(archive)
    yield "outbox", _outbox
    yield "versions", _versions
    yield "Prefect server", _server


def _http(block: str | None) -> CheckResult:
    check_environment()
    url = load_base_url(block)
    way = "directly" if on_loopback(url) or proxy_for(url) is None else "through the proxy of the environment"
    own = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)
    return CheckResult(f"the API is reached {way}, " + (f"with the certificates of {own}" if own else "with certifi's"))


def _credits(block: str | None) -> CheckResult:
    price = load_settings().price_usd
    with load_credentials(block).get_client() as client:
        left = client.credits()
    pictures = f"about {int(left / price)} pictures" if price else "pictures cost nothing"
    return CheckResult(f"the key is good; {usd(left)} USD of credits, {pictures}")


def _api_version(block: str | None) -> CheckResult:
    url = load_base_url(block)
    if is_v2(url):
        return CheckResult(f"v2 ({url}): the next run fetches what a run that has died had requested")
    if not url.strip().rstrip("/").endswith("/v1"):
        return CheckResult(f"{url} names none: end SEGMIND_BASE_URL in /v1 or in /v2, if it is the provider's", "mind")
    return CheckResult(
        f"v1 ({url}), as the provider documents this model; where pictures take longer than about 10 s, or runs may be "
        "killed, v2 is the better choice, as the next run fetches what was requested: end SEGMIND_BASE_URL in /v2"
    )


def _history(block: str | None) -> CheckResult:
    url, setting = load_base_url(block), load_settings().history_url
    address = history_url(url, setting)
    if address is None and setting:
        return CheckResult(f"switched off by {HISTORY_SETTING}: {_WITHOUT_HISTORY}", "mind")
    if address is None:
        return CheckResult(f"none is known for {url}: {_WITHOUT_HISTORY}; set {HISTORY_SETTING}", "mind")
    history = load_credentials(block).get_history(load_settings(), get_logger("segmind"))
    assert history is not None
    history.check()
    return CheckResult(f"can be read ({address})")


def _upload_place(place: str | None) -> CheckResult:
    services = Services(upload_to=place)
    uploads = services.uploads
    if uploads.place is None:
        raise ConfigurationError("none is set; local images need one: set PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO")
    store = open_store(uploads.checked_place(), services.s3)
    content = secrets.token_bytes(16)
    store.put(".segmind-check", content, "application/octet-stream")
    status, found = _get_signed(uploads.address(store.uri(".segmind-check")), len(content))
    if found != content:
        raise StoreError(
            f"{uploads.place} can be written, but a signed address answers {status}: check the region, the "
            "endpoint and the bucket's policy for GET"
        )
    return CheckResult(f"{uploads.place} can be written{_checked(store)}, and a signed address can be read")


def _archive(place: str | None) -> CheckResult:
    store = Services(archive=place).archive.store
    store.put(".segmind/check", secrets.token_bytes(16), "application/octet-stream")
    folder = place or load_settings().archive or ""
    if is_relative(folder):
        return _relative(f"{store.url} can be written", "--archive" if place else f"{PREFIX}ARCHIVE", folder)
    caution, works = store.conditions.caution, f"{store.url} can be written{_checked(store)}"
    if caution is None:
        return CheckResult(f"{works}, and honours conditional writes")
    return CheckResult(f"{works}, but {caution}", "mind")


def _budgets(place: str | None) -> CheckResult:
    services = Services(archive=place)
    if not services.budgets:
        return CheckResult(f"none: {PREFIX}DAILY_BUDGET_USD or {PREFIX}MONTHLY_BUDGET_USD would be one for all runs")
    services.check()
    left = services.budgets_left()
    text = "; ".join(f"{each.title}: {each.sentence()}" for each in left)
    return CheckResult(text, "ok" if all(each.left_usd >= services.settings.price_usd for each in left) else "mind")


def _get_signed(url: str, size: int) -> tuple[int, bytes]:
    """The status and the first bytes that a signed address answers, which no message may show."""
    proxy = None if on_loopback(url) else proxy_for(url)
    try:
        with (
            transport(ssl_context(), proxy) as through,
            exchange(through, "GET", parsed_url(url), Times(connect=10, read=10, total=30), headers={}) as answer,
        ):
            return answer.status_code, next(answer.iter_raw(size), b"")
    except httpx.TransportError as error:
        raise StoreUnreachableError(
            f"a signed address cannot be read ({type(error).__name__}: {error}); check the network and any proxy"
        ) from None


def _checked(store: Store) -> str:
    return "" if store.checksums else " (without checksum headers)"


def _outbox() -> CheckResult:
    settings = load_settings()
    outbox = Outbox(outbox_folder(settings), settings.outbox_min_free_bytes)
    outbox.check()
    works = f"{outbox.folder} can take pictures"
    if is_relative(str(settings.outbox_folder)):
        variable = f"{PREFIX}OUTBOX" if settings.outbox else "PREFECT_HOME"
        return _relative(works, variable, str(settings.outbox_folder))
    if _in_container() and not _on_volume(outbox.folder):
        lost = "is in this container and is lost with it: mount a volume there, so that a paid picture survives"
        return CheckResult(f"{works}, but {lost}", "mind")
    return CheckResult(works)


def _relative(works: str, variable: str, folder: str) -> CheckResult:
    return CheckResult(
        f"{works}, but {folder!r} is relative to the working directory, and runs of deployments refuse it: set "
        f"{variable} to an absolute folder, or set it in prefect.toml, where it is relative to that file's folder",
        "mind",
    )


def _in_container() -> bool:
    return (
        Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or "KUBERNETES_SERVICE_HOST" in os.environ
    )


def _on_volume(folder: Path) -> bool:
    """Whether a folder, or one above it, is mounted from outside the container."""
    return any(os.path.ismount(each) for each in (folder, *folder.parents) if each != each.parent)


def _versions() -> CheckResult:
    versions = []
    for text in requires("prefect-segmind") or []:
        need = Requirement(text)
        if need.name not in ("prefect", "fastapi", "sqlalchemy") or need.marker is not None:
            continue
        have = version(need.name)
        if have not in need.specifier:
            raise ConfigurationError(
                f"{need.name} {have} is installed, and Prefect's server does not work with it: "
                f'pip install "{need.name}{need.specifier}"'
            )
        versions.append(f"{need.name} {have}")
    return CheckResult(", ".join(versions))


def _server() -> CheckResult:
    check_environment()  # Prefect's client reads the environment too
    url = PREFECT_API_URL.value()
    try:
        prefect = get_client(sync_client=True)
    except OSError as error:
        raise ConfigurationError(
            f"PREFECT_API_SSL_CERT_FILE: {PREFECT_API_SSL_CERT_FILE.value()} cannot be used ({reason(error)})"
        ) from None
    with prefect as client:
        if failed := client.api_healthcheck():
            raise ConfigurationError(f"{url} does not answer ({failed}); start it, or check PREFECT_API_URL")
        server = str(client.api_version())
    if server.split(".")[:2] != prefect_version.split(".")[:2]:
        raise ConfigurationError(
            f"the server is Prefect {server}, this is {prefect_version}; use the same minor version"
        )
    if url is None:
        return CheckResult(
            f"a temporary one, Prefect {server}, is started for each command, which takes seconds and shows nothing "
            "live: run `prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`, then `prefect server start` in "
            "another terminal",
            "mind",
        )
    return CheckResult(f"{url} answers, Prefect {server}")
