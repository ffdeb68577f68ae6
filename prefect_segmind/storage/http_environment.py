"""Certificates and proxies of the environment, as httpx reads them, with errors that name the variable.

With a wrong value httpx fails when a client is created, ours or Prefect's, and names neither the variable nor a remedy.
No message contains a proxy's address, which may hold a password.
"""

from __future__ import annotations

import os
import ssl
from functools import lru_cache
from importlib.util import find_spec
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from urllib.request import getproxies

import httpx

from prefect_segmind.errors import ConfigurationError
from prefect_segmind.storage.disk_errors import reason


def check_environment() -> None:
    """Check that httpx can create a client in this environment.

    Raises:
        ConfigurationError: The message names the variable.
    """
    ssl_context()
    _proxies()


def ssl_context(*, from_environment: bool = True) -> ssl.SSLContext:
    """The trusted certificates; loaded once for each environment, since that takes 20 ms of CPU.

    Args:
        from_environment: Whether `SSL_CERT_FILE` and `SSL_CERT_DIR` count.

    Raises:
        ConfigurationError: The variable names no certificates.
    """
    environment = os.environ if from_environment else {}
    return _ssl_context(environment.get("SSL_CERT_FILE"), environment.get("SSL_CERT_DIR"))


def proxy_for(url: httpx.URL | str) -> httpx.Proxy | None:
    """The environment's proxy for a URL; None if the URL is reached directly.

    Args:
        url: The URL.

    Raises:
        ConfigurationError: A proxy or an entry of NO_PROXY is malformed, even if it is not for this URL.

    Example:
        >>> from unittest.mock import patch
        >>> with patch.dict(os.environ, NO_PROXY="*"):
        ...     proxy_for("https://api.segmind.com/v1") is None
        True
    """
    url, (proxies, direct) = httpx.URL(url), _proxies()
    if any(_covers(entry, url) for entry in direct):
        return None
    return proxies.get(url.scheme) or proxies.get("all")


@lru_cache(maxsize=4)
def _ssl_context(file: str | None, folder: str | None) -> ssl.SSLContext:
    if folder and not file and not Path(folder).is_dir():
        raise ConfigurationError(
            f"SSL_CERT_DIR: the folder {folder} does not exist; name one with certificates, or unset the variable"
        )
    try:
        return httpx.create_ssl_context(trust_env=bool(file or folder))
    except OSError as error:  # ssl.SSLError is one
        name, value = ("SSL_CERT_FILE", file) if file else ("SSL_CERT_DIR", folder)
        raise ConfigurationError(
            f"{name}: the certificates in {value} cannot be used ({reason(error)}); name a PEM file that can "
            "be read, or unset the variable"
        ) from None


def _proxies() -> tuple[dict[str, httpx.Proxy], list[str]]:
    """The proxies by scheme of the URL, and the entries of NO_PROXY."""
    found = getproxies()
    proxies = {
        scheme: _proxy(found[scheme], _variable(f"{scheme}_proxy"))
        for scheme in ("http", "https", "all")
        if found.get(scheme)
    }
    direct = [entry for each in found.get("no", "").split(",") if (entry := each.strip())]
    for entry in [] if "*" in direct else direct:
        try:
            httpx.URL(_pattern(entry))
        except httpx.InvalidURL:
            raise ConfigurationError(
                f"{_variable('no_proxy')}: {entry!r} cannot be read by httpx; write names such as .example.com "
                "and addresses such as 10.0.0.8 or ::1, without brackets, separated by commas"
            ) from None
    return proxies, direct


def _proxy(address: str, variable: str) -> httpx.Proxy:
    try:
        proxy = httpx.Proxy(address if "://" in address else f"http://{address}")
        if not proxy.url.host or (proxy.url.port or 0) > 65_535:
            raise ValueError("no host, or no port")
    except (httpx.InvalidURL, ValueError):
        raise ConfigurationError(
            f"{variable}: it is not a proxy's address; write http://host:port, with the special characters of a name "
            "and a password percent-encoded, or unset the variable"
        ) from None
    if proxy.url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ConfigurationError(
            f'{variable}: a SOCKS proxy needs a missing package; pip install "httpx[socks]", or name an http:// proxy'
        )
    return proxy


def _variable(name: str) -> str:
    """The name of the variable that is set; one in small letters wins."""
    return next((each for each in (name, name.upper()) if os.environ.get(each)), f"{name.upper()} of the system")


def _pattern(entry: str) -> str:
    """An entry of NO_PROXY as a URL pattern of httpx."""
    if "://" in entry:
        return entry
    try:
        IPv6Address(entry.partition("/")[0])
    except ValueError:
        return f"all://*{entry}"
    return f"all://[{entry}]"


def _covers(entry: str, url: httpx.URL) -> bool:
    """Whether an entry of NO_PROXY is for a URL: a name and its subdomains, its subdomains alone, or addresses."""
    if entry == "*":
        return True
    pattern = httpx.URL(_pattern(entry))
    if pattern.scheme not in ("all", url.scheme) or pattern.port not in (None, url.port):
        return False
    name = pattern.host.removeprefix("*").lower()
    try:
        return ip_address(url.host) in ip_network(entry if "/" in entry else name, strict=False)
    except ValueError:
        exact = url.host == name
    if not pattern.host.startswith("*"):
        return exact
    return url.host.endswith(name) if name.startswith(".") else exact or url.host.endswith(f".{name}")
