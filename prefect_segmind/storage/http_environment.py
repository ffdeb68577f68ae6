"""What the environment says about certificates and proxies, as httpx reads it, with errors that name the variable.

httpx fails on a wrong one when a client is made, ours and Prefect's alike, and names neither the variable nor a remedy.
No message shows a proxy's address, which may hold a password.
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


def check_environment() -> None:
    """Check that httpx can make a client in this environment.

    Raises:
        ConfigurationError: The message names the variable.
    """
    ssl_context()
    _proxies()


def ssl_context(*, from_environment: bool = True) -> ssl.SSLContext:
    """The certificates that are trusted; made once for each environment, as it takes 20 ms of CPU.

    Args:
        from_environment: Whether those of `SSL_CERT_FILE` or `SSL_CERT_DIR` are, where one is set.

    Raises:
        ConfigurationError: The variable names no certificates.
    """
    if not from_environment:
        return _ssl_context(None, None)
    return _ssl_context(os.environ.get("SSL_CERT_FILE") or None, os.environ.get("SSL_CERT_DIR") or None)


def proxy_for(url: httpx.URL | str) -> httpx.Proxy | None:
    """The proxy that the environment names for a URL; None where it is reached directly.

    Raises:
        ConfigurationError: A proxy or an entry of NO_PROXY is malformed, whether it is for this URL or not.

    Example:
        >>> os.environ["NO_PROXY"] = "*"
        >>> proxy_for("https://api.segmind.com/v1") is None
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
            f"{name}: the certificates in {value} cannot be used ({error.strerror or error}); name a PEM file that can "
            "be read, or unset the variable"
        ) from None


def _proxies() -> tuple[dict[str, httpx.Proxy], list[str]]:
    """The proxies by the schemes of the URLs that they are for, and the entries of NO_PROXY."""
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
            f"{variable}: it is not a proxy's address; write http://host:port, a name and a password in it with their "
            "special characters percent-encoded, or unset the variable"
        ) from None
    if proxy.url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ConfigurationError(
            f'{variable}: it names a SOCKS proxy, for which a package is missing; pip install "httpx[socks]", or name '
            "an http:// proxy"
        )
    return proxy


def _variable(name: str) -> str:
    """The variable that is set, in small letters or in capitals; in small ones it wins."""
    return next((each for each in (name, name.upper()) if os.environ.get(each)), f"{name.upper()} of the system")


def _pattern(entry: str) -> str:
    """What httpx makes of an entry of NO_PROXY."""
    if "://" in entry:
        return entry
    try:
        IPv6Address(entry.partition("/")[0])
    except ValueError:
        return f"all://*{entry}"
    return f"all://[{entry}]"


def _covers(entry: str, url: httpx.URL) -> bool:
    """Whether an entry of NO_PROXY is for a URL: a name with all below it, those below it alone, or addresses."""
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
