"""Which host an address leads to. Pure: no name is resolved."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit


def on_loopback(url: str) -> bool:
    """Whether a URL has a loopback address, or the name localhost.

    Args:
        url: The URL.

    Example:
        >>> on_loopback("http://127.0.0.1:8787/v1"), on_loopback("https://api.segmind.com/v1")
        (True, False)
    """
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def is_v2(base_url: str) -> bool:
    """Whether an API's address is that of v2, which accepts a request first and serves its result later.

    Args:
        base_url: The address.

    Example:
        >>> is_v2("https://api.segmind.com/v2/"), is_v2("https://api.segmind.com/v1")
        (True, False)
    """
    return base_url.strip().rstrip("/").endswith("/v2")
