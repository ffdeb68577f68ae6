"""Downloads from public addresses: http(s) source images, and links to pictures in an answer of the API.

The only module that requests addresses chosen by others. Permission depends on the resolved IP address, and the
connection goes to exactly that address, so a name cannot be resolved differently a moment later; every redirect is
checked again. No API key, cookies or credentials are sent.

If the environment names a proxy, https goes through it, as the API's requests do. The proxy resolves the name again, so
the guarantee is weaker: the name must resolve to permitted addresses only, and the certificate must be valid for the
name, which that of an internal host is not. Plain http has no such check and never goes through a proxy.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, InitVar, dataclass
from io import BytesIO
from typing import IO, Final

import httpx

from prefect_segmind.errors import ConfigurationError
from prefect_segmind.storage.compression import unpacked
from prefect_segmind.storage.http_environment import proxy_for, ssl_context
from prefect_segmind.storage.http_exchange import Times, exchange, parsed_url, transport

MAX_REDIRECTS: Final = 5
_SHOWN_LENGTH: Final = 300  # characters of an address in a message
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address in its last 32 bits
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")  # all that IANA has allocated
_PROTOCOL_ASSIGNMENTS: Final = ipaddress.IPv4Network("192.0.0.0/24")  # older Pythons know only the first eight

_INSIDE: Final = re.compile(r"(?i)[^.]+\.?|.*\.(internal|intranet|lan|local|localhost|home\.arpa|corp|home)\.?")
"""Names that no public host has: if they do not resolve here, a proxy is not asked for them."""


@dataclass(eq=False, repr=False)
class DownloadError(Exception):
    """A download failed. The message never contains the address's query, which may be a signature.

    Args:
        message: What went wrong.

    Attributes:
        status: The HTTP status, if that was the reason.
        refused: Whether the address is one that must not be reached.
        too_large: Whether it has more bytes than the limit.
        retryable: Whether the same download may work a moment later.
    """

    message: InitVar[str]
    _: KW_ONLY
    status: int | None = None
    refused: bool = False
    too_large: bool = False
    retryable: bool = False

    def __post_init__(self, message: str) -> None:
        """Make the exception of the message."""
        super().__init__(message)


@dataclass(frozen=True)
class Destination:
    """Which addresses may be reached: public ones, and more by these fields.

    Attributes:
        allow_private: Every address, such as 10.0.0.8 or a cloud's metadata service at 169.254.169.254.
        allow_loopback: This machine too, as for the sandbox.
        same_origin: For links in an answer, the API's base URL: its scheme, host and port at any address, and other
            hosts by https only.

    Example:
        >>> Destination().permits("https://cdn.example/a.png", "169.254.169.254")
        False
    """

    allow_private: bool = False
    allow_loopback: bool = False
    same_origin: str | None = None

    def permits(self, url: httpx.URL | str, address: str) -> bool:
        """Whether a URL may be fetched from an IP address of its host.

        Args:
            url: The URL.
            address: The IP address that its host has resolved to.
        """
        url, ip = httpx.URL(url), _unwrapped(address)
        if self.allow_private or (self.same_origin and _origin(url) == _origin(httpx.URL(self.same_origin))):
            return True
        if ip.is_loopback:
            return self.allow_loopback
        return _is_public(ip) and (self.same_origin is None or url.scheme == "https")


PUBLIC: Final = Destination()
"""Public addresses only."""


def download(
    url: str, sink: IO[bytes], *, limit: int, destination: Destination = PUBLIC, timeout: float = 120.0
) -> None:
    """Download from an address, and through its redirects, into a file.

    After an error the sink may hold a part of it.

    Args:
        url: http or https.
        sink: An open file for the bytes.
        limit: The most bytes to take, whatever Content-Length claims.
        destination: Which addresses may be reached, redirects included.
        timeout: Seconds for the whole download; a silence of 30 s ends it sooner.

    Raises:
        DownloadError: Refused, failed or too large.
        OSError: The sink cannot be written.

    Example:
        >>> download("http://169.254.169.254/", BytesIO(), limit=50_000_000)
        Traceback (most recent call last):
        prefect_segmind.storage.http.DownloadError: http://169.254.169.254/ leads to 169.254.169.254; only public ...
    """
    deadline = time.monotonic() + timeout
    here = _parsed(url)
    for _ in range(MAX_REDIRECTS + 1):
        redirect = _fetch(here, sink, limit, destination, deadline)
        if redirect is None:
            return
        here = redirect
    raise DownloadError(f"{_name(here)}: more than {MAX_REDIRECTS} redirects")


def download_bytes(url: str, *, limit: int, destination: Destination = PUBLIC, timeout: float = 120.0) -> bytes:
    """Download from an address into memory; arguments and errors as for `download`."""
    sink = BytesIO()
    download(url, sink, limit=limit, destination=destination, timeout=timeout)
    return sink.getvalue()


def _fetch(url: httpx.URL, sink: IO[bytes], limit: int, destination: Destination, deadline: float) -> httpx.URL | None:
    """One hop: where it redirects to, or None once it is written. Tries the permitted addresses of the host in turn."""
    # The certificates follow the environment (SSL_CERT_FILE).
    name, failure, retryable = _name(url), "", True
    try:
        certificates, routes = ssl_context(), _routes(url, destination)
    except ConfigurationError as error:
        raise DownloadError(f"{name}: {error}") from None
    for address, proxy in routes:
        with transport(certificates, proxy) as through:
            try:
                return _get(through, url, address, sink, limit, deadline)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = str(error)  # and on to the next address
                retryable = "CERTIFICATE_VERIFY_FAILED" not in failure
            except httpx.ProxyError as error:
                failure = f"the proxy answers {error}"
                retryable = str(error).startswith("5")
            except httpx.TimeoutException:
                raise DownloadError(f"{name} took too long", retryable=True) from None
            except httpx.TransportError as error:
                why = str(error)[:200]
                raise DownloadError(f"{name}: the answer was cut or is not HTTP: {why}", retryable=True) from None
    raise DownloadError(f"{name} cannot be reached: {failure}", retryable=retryable)


def _get(
    through: httpx.HTTPTransport, url: httpx.URL, address: str | None, sink: IO[bytes], limit: int, deadline: float
) -> httpx.URL | None:
    remaining = max(0.001, deadline - time.monotonic())
    with exchange(
        through,
        "GET",
        _at(url, address),
        Times(connect=min(10.0, remaining), read=min(30.0, remaining), total=remaining),
        headers={"Host": url.netloc.decode("ascii")},
        # TLS asks for, and checks the certificate against, the name and not the address.
        sni=url.raw_host.decode("ascii"),
    ) as answer:
        if answer.has_redirect_location:
            return _parsed(answer.headers["Location"], url)
        status, size = answer.status_code, 0
        if status != 200:
            retryable = status in (408, 425, 429) or status >= 500
            raise DownloadError(f"{_name(url)} answered {status}", status=status, retryable=retryable)
        too_large = DownloadError(f"{_name(url)} is larger than {limit / 1_000_000:g} MB", too_large=True)
        length = answer.headers.get("Content-Length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            raise too_large
        try:
            for chunk in _content(answer, url):
                size += len(chunk)
                if size > limit:
                    raise too_large
                sink.write(chunk)
        except ValueError as error:
            raise DownloadError(f"{_name(url)} cannot be decompressed: {error}") from None
    return None


def _content(answer: httpx.Response, url: httpx.URL) -> Iterator[bytes]:
    """The body in small pieces, whatever it unpacks to: some servers compress though we ask them not to."""
    coding = answer.headers.get("Content-Encoding", "").strip().lower() or "identity"
    if coding == "identity":
        return answer.iter_raw()
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise DownloadError(f"{_name(url)} is sent with a Content-Encoding that is not supported; serve it without one")
    return unpacked(answer.iter_raw())


def _at(url: httpx.URL, address: str | None) -> httpx.URL:
    """The URL to request from an IP address of its host."""
    try:
        return url.copy_with(host=address or url.host, fragment=None)
    except (httpx.InvalidURL, ValueError):  # an IPv6 address with a zone
        raise DownloadError(f"{_name(url)} leads to {address}, which cannot be requested", refused=True) from None


def _routes(url: httpx.URL, destination: Destination) -> list[tuple[str | None, httpx.Proxy | None]]:
    """The permitted routes to a URL's host, at least one: its IP addresses, or a proxy that resolves the name."""
    proxy = proxy_for(url) if url.scheme == "https" else None
    try:
        addresses = _resolved(url)
    except DownloadError:
        if proxy is None or _INSIDE.fullmatch(url.host):
            raise
        return [(None, proxy)]  # in a closed network only the proxy can resolve public names
    if any(_unwrapped(each).is_loopback for each in addresses):
        proxy = None  # its loopback is not that of this machine
    permitted = [each for each in addresses if destination.permits(url, each)]
    if not permitted or (proxy and permitted != addresses):
        rule = "https and public addresses" if destination.same_origin else "public ones"
        raise DownloadError(f"{_name(url)} leads to {', '.join(addresses)}; only {rule} are allowed", refused=True)
    return [(None, proxy)] if proxy else [(each, None) for each in permitted]


def _resolved(url: httpx.URL) -> list[str]:
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(url.raw_host.decode("ascii"), port, type=socket.SOCK_STREAM)
    except (OSError, ValueError, OverflowError) as error:  # of idna too
        passing = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        raise DownloadError(f"{_name(url)}: the host cannot be resolved: {error}", retryable=passing) from None
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def _parsed(location: str, base: httpx.URL | None = None) -> httpx.URL:
    """The URL of an address, or of a redirect from `base`; one of another kind is refused."""
    try:
        url = parsed_url(location, base)
    except ValueError as error:
        where = f"{_name(base)} redirects to an address that is refused" if base else "the address is refused"
        raise DownloadError(f"{where}: {error}", refused=True) from None
    if url.userinfo:
        raise DownloadError(f"{_name(url)}: credentials in an address are not sent", refused=True)
    return url


def _name(url: httpx.URL) -> str:
    """A URL for a message: without its query, which may be a signature, without credentials, and not too long."""
    name = f"{url.scheme}://{(url.netloc + url.raw_path.partition(b'?')[0]).decode('ascii')}"
    return name if len(name) <= _SHOWN_LENGTH else f"{name[: _SHOWN_LENGTH - 1]}…"


def _origin(url: httpx.URL) -> tuple[str, bytes, int | None]:
    return url.scheme, url.raw_host, url.port


def _unwrapped(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IP address; the embedded IPv4 address of a mapped or translated one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return ip.ipv4_mapped
        if ip in _NAT64:
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an unwrapped address is one of the public Internet."""
    if isinstance(ip, ipaddress.IPv6Address):
        # 6to4 embeds any IPv4 address, and leads to it through a relay.
        return ip in _GLOBAL_UNICAST and ip.is_global and ip.sixtofour is None
    return ip.is_global and not ip.is_multicast and ip not in _PROTOCOL_ASSIGNMENTS
