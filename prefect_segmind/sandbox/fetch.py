"""How the sandbox gets `image_file`: by one HTTP GET, as the provider would, and from this machine only."""

from __future__ import annotations

import http.client
import ipaddress
from urllib.parse import urlsplit

LARGEST = 10_000_000
"""Bytes: the provider takes images of up to 10 MB."""

TIMEOUT = 10.0
"""Seconds for connecting and for each read."""


class FetchError(Exception):
    """The image could not be had; the message says why, without the address's query, which may be a signature."""


def is_loopback(host: str | None) -> bool:
    """Whether a host, as it stands in a URL, is this machine without asking any name server.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("localhost.example")
        (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def fetch(url: str) -> bytes:
    """The bytes behind a URL on this machine. Redirects are not followed, so that nothing leaves it.

    Args:
        url: An `http` URL with a loopback host.

    Raises:
        FetchError: Another scheme or host, no answer, any status but 200, an empty body or more than `LARGEST` bytes.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise FetchError(f"is no valid URL: {error}") from None
    if parts.scheme != "http" or not is_loopback(host):
        raise FetchError(
            "is refused: the sandbox fetches http:// addresses of this machine only (127.0.0.1, localhost)"
        )
    connection = http.client.HTTPConnection(host or "", port or 80, timeout=TIMEOUT)
    try:
        # A GET and no HEAD: a URL that is presigned for GET refuses HEAD.
        connection.request("GET", f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}")
        answer = connection.getresponse()
        content = answer.read(LARGEST + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError(f"could not be fetched: {type(error).__name__}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise FetchError(f"could not be fetched: HTTP {answer.status}")
    if not content or len(content) > LARGEST:
        raise FetchError("is empty" if not content else f"is larger than {LARGEST // 1_000_000} MB")
    return content
