"""Fetches `image_file` for the sandbox: one HTTP GET, as the provider's, and from this machine only."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

from prefect_segmind.api.origin import on_loopback

LARGEST = 10_000_000
"""Bytes: the provider takes images of up to 10 MB."""

TIMEOUT = 10.0
"""Seconds for connecting and for each read."""


class FetchError(Exception):
    """The image could not be fetched; the message leaves out the address's query, which may be a signature."""


def fetch(url: str) -> bytes:
    """Fetches a URL of this machine, without following redirects, so that no request leaves it.

    Args:
        url: An `http` URL with a loopback host.

    Returns:
        The content.

    Raises:
        FetchError: Another scheme or host, no answer, any status but 200, an empty body or more than `LARGEST` bytes.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
    except ValueError as error:
        raise FetchError(f"is not a valid URL: {error}") from None
    if parts.scheme != "http" or not on_loopback(url):
        raise FetchError(
            "is refused: the sandbox fetches http:// addresses of this machine only (127.0.0.1, localhost)"
        )
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        # Not a HEAD first: a URL that is presigned for GET refuses HEAD.
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
