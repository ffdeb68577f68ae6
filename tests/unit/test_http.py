"""Promises of `prefect_segmind.storage.http`, kept over real HTTP on loopback."""

from __future__ import annotations

import datetime
import errno
import gzip
import io
import pickle
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_segmind.storage.http import Destination, DownloadError, download, download_bytes
from tests.support.wire import Wire

LOOPBACK = Destination(allow_loopback=True)
LIMIT = 1_000_000
PICTURE = b"\x89PNG" + bytes(range(256)) * 40


def answer(body: bytes = PICTURE, status: str = "200 OK", length: int | None = -1, **headers: str) -> bytes:
    """An HTTP answer as it goes over the wire; `length` can lie, and None leaves it out."""
    lines = [f"HTTP/1.1 {status}", "Connection: close", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length < 0 else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Server:
    """Answers each request with the next of its answers, the last one for ever, and keeps the requests."""

    def __init__(self, *answers: bytes, tls: ssl.SSLContext | None = None, hang: bool = False) -> None:
        self.answers, self.requests, self.tls = list(answers), list[str](), tls
        self.released = threading.Event()
        if not hang:
            self.released.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._serve)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            try:
                if self.tls:
                    connection = self.tls.wrap_socket(connection, server_side=True)
                request = b""
                while b"\r\n\r\n" not in request and (part := connection.recv(65_536)):
                    request += part
                self.requests.append(request.decode())
                connection.sendall(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])
                self.released.wait(10)
            except OSError:
                pass
            finally:
                connection.close()

    def __enter__(self) -> Server:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


Resolver = Callable[..., list[Any]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """Names and, for each time they are looked up, the addresses they have; the last answer stays."""
    known: dict[str, list[list[str]]] = {}
    real: Resolver = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **more: Any) -> list[Any]:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in known:
            ip_address(name)  # no test asks a real resolver
            return real(host, port, *rest, **more)
        turns = known[name]
        found = turns.pop(0) if len(turns) > 1 else turns[0]
        if found == ["no such name"]:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [each for address in found for each in real(address, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


def failure(url: str, destination: Destination = LOOPBACK, limit: int = LIMIT, timeout: float = 20.0) -> DownloadError:
    with pytest.raises(DownloadError) as caught:
        download_bytes(url, limit=limit, destination=destination, timeout=timeout)
    assert "secret" not in str(caught.value)
    return caught.value


class TestDownloading:
    def test_the_bytes_arrive(self, tmp_path: Path) -> None:
        with Server(answer(Content_Type="image/png")) as server, (tmp_path / "a").open("wb") as file:
            download(f"{server.url}/a.png?X-Amz-Signature=secret", file, limit=LIMIT, destination=LOOPBACK)
        assert (tmp_path / "a").read_bytes() == PICTURE

    def test_the_query_is_sent_and_the_fragment_is_not(self) -> None:
        with Server(answer()) as server:
            download_bytes(f"{server.url}/a%20b.png?x=1%2F2#part", limit=LIMIT, destination=LOOPBACK)
        assert server.requests[0].startswith("GET /a%20b.png?x=1%2F2 HTTP/1.1\r\n")

    def test_nothing_of_ours_goes_along(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login me password secret\n")
        monkeypatch.setenv("NETRC", str(netrc))
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
        with Server(answer(b"", "302 Found", Location="/b", Set_Cookie="a=b; Path=/"), answer()) as server:
            assert download_bytes(f"{server.url}/a", limit=LIMIT, destination=LOOPBACK) == PICTURE
        assert len(server.requests) == 2
        for request in server.requests:
            sent = {line.partition(":")[0].lower() for line in request.splitlines()[1:] if line}
            assert sent == {"host", "accept", "accept-encoding", "connection", "user-agent"}

    def test_a_body_of_unknown_length(self) -> None:
        with Server(answer(length=None)) as server:
            assert download_bytes(server.url, limit=LIMIT, destination=LOOPBACK) == PICTURE

    def test_a_body_that_was_compressed_all_the_same(self) -> None:
        with Server(answer(gzip.compress(PICTURE), Content_Encoding="gzip")) as server:
            assert download_bytes(server.url, limit=LIMIT, destination=LOOPBACK) == PICTURE

    @pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "\x80"])
    def test_a_coding_that_is_not_supported_is_refused(self, coding: str) -> None:
        with Server(answer(gzip.compress(gzip.compress(PICTURE)), Content_Encoding=coding)) as server:
            assert "Content-Encoding that is not supported" in str(failure(server.url))

    @pytest.mark.parametrize("length", ["9" * 5000, "-1", "+5", "5, 5", "5, 6", "0x5", "\x80", "", "1e3"])
    def test_an_odd_length_is_no_error_of_pythons(self, length: str) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode("latin-1")
        with Server(head + PICTURE) as server, suppress(DownloadError):
            download_bytes(server.url, limit=LIMIT, destination=LOOPBACK)

    def test_a_sink_that_fails_is_the_callers_os_error(self) -> None:
        class Full(io.BytesIO):
            def write(self, _: object, /) -> int:
                raise OSError(errno.ENOSPC, "no space left")

        with Server(answer()) as server, pytest.raises(OSError, match="no space"):
            download(server.url, Full(), limit=LIMIT, destination=LOOPBACK)


class TestFailing:
    @pytest.mark.parametrize(
        ("status", "retryable"),
        [("403 Forbidden", False), ("404 Not Found", False), ("429 Slow Down", True), ("503 Busy", True)],
    )
    def test_a_status(self, status: str, retryable: bool) -> None:
        with Server(answer(b"", status)) as server:
            error = failure(f"{server.url}/a.png?sig=secret")
        assert (error.status, error.refused, error.retryable) == (int(status[:3]), False, retryable)
        assert str(error) == f"{server.url}/a.png answered {status[:3]}"

    def test_a_status_that_is_no_error_but_no_file_either(self) -> None:
        with Server(answer(b"", "204 No Content", length=None)) as server:
            assert failure(server.url).status == 204

    def test_half_a_body_is_retryable(self) -> None:
        with Server(answer(length=len(PICTURE) * 2)) as server:
            error = failure(f"{server.url}/a?sig=secret")
        assert error.retryable
        assert "was cut" in str(error)

    def test_no_answer_at_all_is_retryable(self) -> None:
        with Server(b"") as server:
            assert failure(server.url).retryable

    def test_a_content_length_over_the_limit_ends_it_at_once(self) -> None:
        with Server(answer(length=LIMIT + 1)) as server:
            error = failure(server.url)
        assert "larger than 1 MB" in str(error)
        assert not error.retryable

    @pytest.mark.parametrize("chunked", [False, True])
    def test_more_than_the_limit_without_saying_so(self, chunked: bool, tmp_path: Path) -> None:
        body = bytes(200_000)
        if chunked:
            reply = answer(b"30d40\r\n" + body + b"\r\n0\r\n\r\n", length=None, Transfer_Encoding="chunked")
        else:
            reply = answer(body, length=None)
        with Server(reply) as server, (tmp_path / "a").open("wb") as file, pytest.raises(DownloadError, match="larger"):
            download(server.url, file, limit=100_000, destination=LOOPBACK)
        assert (tmp_path / "a").stat().st_size <= 100_000

    def test_a_content_length_that_says_less_gives_no_more(self) -> None:
        with Server(answer(length=10)) as server:
            assert download_bytes(server.url, limit=LIMIT, destination=LOOPBACK) == PICTURE[:10]

    def test_the_limit_itself_is_fine(self) -> None:
        with Server(answer()) as server:
            assert download_bytes(server.url, limit=len(PICTURE), destination=LOOPBACK) == PICTURE

    def test_a_decompression_bomb_counts_decompressed(self) -> None:
        with Server(answer(gzip.compress(bytes(10_000_000)), Content_Encoding="gzip")) as server:
            assert "larger" in str(failure(server.url))

    def test_a_body_that_does_not_decompress(self) -> None:
        with Server(answer(b"not gzip", Content_Encoding="gzip")) as server:
            error = failure(server.url)
        assert "decompressed" in str(error)
        assert not error.retryable

    def test_silence_ends(self) -> None:
        with Server(answer(length=len(PICTURE) * 2), hang=True) as server:
            error = failure(server.url, timeout=0.3)
        assert error.retryable
        assert "too long" in str(error)

    @pytest.mark.parametrize("begun", [b"HTTP/1.1 200 OK\r\nX: ", answer(b"", length=None), answer(b"", length=10**6)])
    def test_an_answer_that_drips_ends_too(self, begun: bytes) -> None:
        with Wire(begun, drip=b"a") as server:
            error = failure(server.url, timeout=0.5)
            assert server.gone.wait(10), "and the connection with it"
        assert error.retryable
        assert "too long" in str(error)

    def test_nobody_listening_is_retryable(self) -> None:
        with Server(answer()) as server:
            pass
        error = failure(f"{server.url}/a?sig=secret")
        assert error.retryable
        assert "cannot be reached" in str(error)

    def test_errors_travel_between_processes(self) -> None:
        copy = pickle.loads(pickle.dumps(DownloadError("x", status=404, refused=True, retryable=True)))
        assert (str(copy), copy.status, copy.refused, copy.retryable) == ("x", 404, True, True)


class TestRedirects:
    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_are_followed(self, status: int) -> None:
        with Server(answer(b"", f"{status} Over There", Location="b.png?y=2"), answer()) as server:
            assert download_bytes(f"{server.url}/x/a.png?y=1", limit=LIMIT, destination=LOOPBACK) == PICTURE
        assert server.requests[1].startswith("GET /x/b.png?y=2 ")

    def test_five_are_enough_and_six_too_many(self) -> None:
        turn = answer(b"", "302 Found", Location="/again")
        with Server(*[turn] * 5, answer()) as server:
            assert download_bytes(server.url, limit=LIMIT, destination=LOOPBACK) == PICTURE
        with Server(turn) as server:
            assert "more than 5 redirects" in str(failure(server.url))
            assert len(server.requests) == 6

    @pytest.mark.parametrize(
        "target",
        [
            "http://169.254.169.254/latest/meta-data/?x=secret",
            "http://10.0.0.8/",
            "http://[::ffff:192.168.0.1]/",
            "//172.16.0.1/a",
            "file:///etc/passwd",
            "http://me:secret@127.0.0.1/",
        ],
    )
    def test_to_where_nothing_may_go_are_refused(self, target: str) -> None:
        with Server(answer(b"", "302 Found", Location=target)) as server:
            assert failure(server.url).refused
            assert len(server.requests) == 1

    def test_from_the_same_origin_to_this_machine_are_refused(self) -> None:
        with Server(answer()) as other, Server(answer(b"", "302 Found", Location=other.url)) as server:
            assert failure(server.url, Destination(same_origin=f"{server.url}/v1")).refused
            assert not other.requests

    def test_to_no_url_are_an_error(self) -> None:
        with Server(answer(b"", "302 Found", Location="http://x:bad/?x=secret")) as server:
            assert failure(server.url).status is None

    @pytest.mark.parametrize(
        "target",
        [
            "mailto:somebody@example.com?secret",
            "data:image/png;base64,secret" + "A" * 5000,
            "javascript:secret",
            "https://xn--a/?secret",
            "https://xn--/",
            "http://127.0.0.1:99999/?secret",
            "http://127.0.0.1:-1/",
            "http://127.0.0.1:0/",
            "http://256.1.1.1/",
            "http://[::1",
            "http://\x80\xff/",
            "\x7f",
            "http://127.0.0.1" + "1" * 5000,
            f"https://{'a' * 70}.example/",
            "https://a..example/",
        ],
    )
    def test_to_what_cannot_be_requested_are_an_error(self, target: str) -> None:
        with Server(answer(b"", "302 Found", Location=target)) as server:
            error = failure(server.url)
            assert len(str(error)) < 300 or len(target) > 300, "nor is the address repeated"
            assert len(server.requests) == 1

    def test_without_a_location_are_an_error(self) -> None:
        with Server(answer(b"", "302 Found")) as server:
            assert failure(server.url).status == 302


class TestDestination:
    @pytest.mark.parametrize(
        "address",
        [
            "127.0.0.1", "127.9.9.9", "10.0.0.8", "172.31.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200",
            "0.0.0.0", "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255", "192.0.0.192", "198.18.0.1",
            "203.0.113.5", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1",
            "2001:db8::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::a9fe:a9fe",
            "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "64:ff9b:1::1", "100::1",
        ],
    )  # fmt: skip
    def test_what_is_not_public_is_refused(self, address: str) -> None:
        assert not Destination().permits("https://cdn.example/a", address)
        assert not Destination(same_origin="https://api.example/v1").permits("https://cdn.example/a", address)
        assert Destination(allow_private=True).permits("https://cdn.example/a", address)

    @pytest.mark.parametrize(
        "address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
    )
    def test_public_addresses_are_allowed(self, address: str) -> None:
        assert Destination().permits("http://cdn.example/a", address)
        assert Destination(same_origin="http://api.example").permits("https://cdn.example/a", address)

    @pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
    def test_loopback_can_be_allowed_and_nothing_else_with_it(self, address: str) -> None:
        assert LOOPBACK.permits("http://localhost/", address)
        assert not LOOPBACK.permits("http://localhost/", "10.0.0.8")
        assert not LOOPBACK.permits("http://localhost/", "0.0.0.0")

    def test_a_link_in_an_answer_may_use_http_at_the_same_origin_only(self) -> None:
        links = Destination(same_origin="http://api.example:80/v1")
        assert links.permits("http://API.example/out.png", "10.0.0.8")
        assert not links.permits("http://api.example:8080/out.png", "10.0.0.8")
        assert not links.permits("http://cdn.example/out.png", "8.8.8.8")
        assert links.permits("https://cdn.example/out.png", "8.8.8.8")
        assert not Destination(same_origin="https://api.example").permits("http://api.example/", "8.8.8.8")

    @given(st.ip_addresses())
    def test_no_address_is_allowed_that_python_calls_local(self, ip: IPv4Address | IPv6Address) -> None:
        if Destination().permits("http://x.example", str(ip)):
            assert not any((ip.is_loopback, ip.is_link_local, ip.is_multicast, ip.is_unspecified))

    @given(st.ip_addresses(v=4))
    def test_an_ipv4_address_is_judged_alike_in_every_wrapping(self, ip: IPv4Address) -> None:
        verdict = Destination().permits("http://x.example", str(ip))
        for wrapped in (IPv6Address((0xFFFF << 32) | int(ip)), IPv6Address((0x64FF9B << 96) | int(ip))):
            assert Destination().permits("http://x.example", str(wrapped)) is verdict

    @pytest.mark.parametrize(
        "url",
        [
            "http://127.0.0.1/a?sig=secret", "http://2130706433/", "http://0x7f.1/", "http://[::1]/", "http://0/",
            "ftp://127.0.0.1/a", "file:///etc/passwd", "http://", "no url", "http://x:bad/", "http://me:secret@8.8.8.8/",
            "https://xn--a/?secret", "mailto:secret", "data:secret", "http://127.0.0.1:99999/",
        ],
    )  # fmt: skip
    def test_addresses_are_refused_before_anything_is_sent(self, url: str) -> None:
        assert failure(url, Destination()).refused

    def test_an_address_with_a_zone_is_refused_and_no_error_of_httpxs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1%lo", 80, 0, 1))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert failure("http://printer.example/", Destination(allow_private=True), timeout=1)

    @settings(deadline=None)
    @given(
        st.text()
        | st.from_regex(r"(https?|data|mailto)://?[^/?#]{0,20}(:[^/]{0,6})?/.{0,20}", fullmatch=True)
        | st.from_regex(
            r"https?://(xn--[a-z0-9-]{0,8}\.?){1,3}/", fullmatch=True, alphabet=st.characters(codec="ascii")
        )
    )
    def test_no_address_is_more_than_refused(self, address: str) -> None:
        def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")

        with pytest.MonkeyPatch.context() as network:
            network.setattr(socket, "getaddrinfo", unknown)
            with pytest.raises(DownloadError):
                download_bytes(address, limit=LIMIT)

    def test_the_message_names_the_rule(self) -> None:
        assert "only public ones" in str(failure("http://10.0.0.8/a", Destination()))
        assert "only https and public" in str(failure("http://10.0.0.8/a", Destination(same_origin="https://a.b")))

    def test_control_characters_do_not_reach_the_message(self) -> None:
        assert "\n" not in str(failure("http://10.0.0.8/a%0Ab", Destination()))


class TestNames:
    def test_a_name_is_looked_up_once_and_the_checked_address_is_used(self, names: dict[str, list[list[str]]]) -> None:
        with Server(answer()) as server:
            names["rebind.example"] = [["127.0.0.1"], ["10.0.0.8"]]  # whoever asks twice lands elsewhere
            url = f"http://rebind.example:{server.port}/a"
            assert download_bytes(url, limit=LIMIT, destination=LOOPBACK) == PICTURE
            assert f"host: rebind.example:{server.port}\r\n" in server.requests[0].lower()
            assert failure(url, Destination(), timeout=2).refused

    def test_each_redirect_is_looked_up_and_checked_anew(self, names: dict[str, list[list[str]]]) -> None:
        with Server(answer(b"", "302 Found", Location="/b")) as server:
            names["rebind.example"] = [["127.0.0.1"], ["169.254.169.254"]]
            error = failure(f"http://rebind.example:{server.port}/a")
            assert error.refused
            assert "169.254.169.254" in str(error)
            assert len(server.requests) == 1

    def test_the_next_permitted_address_is_tried(self, names: dict[str, list[list[str]]]) -> None:
        with Server(answer()) as server:
            names["two.example"] = [["10.0.0.8", "127.0.0.2", "127.0.0.1"]]  # nobody listens at 127.0.0.2
            url = f"http://two.example:{server.port}/"
            assert download_bytes(url, limit=LIMIT, destination=LOOPBACK) == PICTURE

    @pytest.mark.parametrize(("code", "retryable"), [(socket.EAI_AGAIN, True), (socket.EAI_NONAME, False)])
    def test_a_name_without_an_address(self, code: int, retryable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        def resolve(*_: object, **__: object) -> None:
            raise socket.gaierror(code, "no such name")

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        error = failure("https://none.example/a?sig=secret")
        assert (error.retryable, error.refused) == (retryable, False)
        assert str(error).startswith("https://none.example/a: the host cannot be resolved")


@contextmanager
def authority(folder: Path, name: str) -> Iterator[ssl.SSLContext]:
    """A self-signed certificate for a name, as a server's context; `folder/ca.pem` is what trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")
    yield context


class TestTls:
    def test_the_certificate_is_checked_against_the_name(
        self, names: dict[str, list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names["pictures.example"] = names["others.example"] = [["127.0.0.1"]]
        with authority(tmp_path, "pictures.example") as context, Server(answer(), tls=context) as server:
            untrusted = failure(f"https://pictures.example:{server.port}/a")
            assert "CERTIFICATE_VERIFY_FAILED" in str(untrusted)
            assert not untrusted.retryable
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
            url = f"https://pictures.example:{server.port}/a"
            assert download_bytes(url, limit=LIMIT, destination=LOOPBACK) == PICTURE
            assert "match" in str(failure(f"https://others.example:{server.port}/a")).lower()
            assert len(server.requests) == 1


class Proxy:
    """A proxy that leads every name to one port of this machine; keeps what it was asked for."""

    def __init__(self, port: int, refuses: str = "") -> None:
        self.port, self.refuses, self.asked = port, refuses, list[str]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            request = b""
            while b"\r\n\r\n" not in request and (part := client.recv(65_536)):
                request += part
            self.asked.append(request.decode())
            if self.refuses:
                client.sendall(f"HTTP/1.1 {self.refuses}\r\nContent-Length: 0\r\n\r\n".encode())
                client.close()
                continue
            with socket.create_connection(("127.0.0.1", self.port)) as server, client:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=self._pipe, args=(server, client))
                back.start()
                self._pipe(client, server)
                back.join()

    @staticmethod
    def _pipe(source: socket.socket, target: socket.socket) -> None:
        try:
            while part := source.recv(65_536):
                target.sendall(part)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def __enter__(self) -> Proxy:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


LINKS = Destination(same_origin="https://api.example/v1")


class TestThroughAProxy:
    @pytest.fixture
    def server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
        with authority(tmp_path, "pictures.example.com") as context, Server(answer(), tls=context) as server:
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
            yield server

    @pytest.fixture
    def proxy(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
        with Proxy(server.port) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//me:password@"))
            monkeypatch.setenv("HTTP_PROXY", proxy.url)
            yield proxy

    @pytest.fixture
    def unknown(self, names: dict[str, list[list[str]]]) -> dict[str, list[list[str]]]:
        """As in a network where nobody but the proxy knows the names outside."""
        for name in ("pictures.example.com", "metadata.google.internal", "intranet"):
            names[name] = [["no such name"]]
        return names

    @pytest.mark.parametrize("addresses", [["8.8.8.8"], ["8.8.8.8", "2606:4700::1111"]])
    @pytest.mark.parametrize("destination", [LINKS, Destination()])
    def test_https_goes_there_by_its_name_and_takes_nothing_of_ours_along(
        self,
        addresses: list[str],
        destination: Destination,
        names: dict[str, list[list[str]]],
        server: Server,
        proxy: Proxy,
    ) -> None:
        names["pictures.example.com"] = [addresses]
        url = "https://pictures.example.com/a.png?sig=1#part"
        assert download_bytes(url, limit=LIMIT, destination=destination) == PICTURE
        assert [each.splitlines()[0] for each in proxy.asked] == ["CONNECT pictures.example.com:443 HTTP/1.1"]
        (request,) = server.requests
        assert request.startswith("GET /a.png?sig=1 HTTP/1.1")
        sent = {line.partition(":")[0].lower() for line in request.splitlines()[1:] if line}
        assert sent == {"host", "accept", "accept-encoding", "connection", "user-agent"}

    def test_a_name_that_only_the_proxy_knows_is_asked_of_it(
        self, unknown: dict[str, list[list[str]]], server: Server, proxy: Proxy
    ) -> None:
        assert download_bytes("https://pictures.example.com/a", limit=LIMIT, destination=LINKS) == PICTURE

    @pytest.mark.parametrize("host", ["metadata.google.internal", "intranet"])
    def test_a_name_from_inside_is_not(
        self, host: str, unknown: dict[str, list[list[str]]], server: Server, proxy: Proxy
    ) -> None:
        assert "cannot be resolved" in str(failure(f"https://{host}/a?secret", LINKS))
        assert not proxy.asked

    @pytest.mark.parametrize(
        "addresses", [["10.0.0.8"], ["8.8.8.8", "10.0.0.8"], ["169.254.169.254"], ["127.0.0.1"], ["::1", "8.8.8.8"]]
    )
    def test_a_name_that_leads_inside_is_refused_and_the_proxy_not_asked(
        self, addresses: list[str], names: dict[str, list[list[str]]], server: Server, proxy: Proxy
    ) -> None:
        names["pictures.example.com"] = [addresses]
        error = failure("https://pictures.example.com/a?secret", LINKS, timeout=1)
        assert error.refused or "8.8.8.8" in addresses
        assert not proxy.asked

    @pytest.mark.parametrize("url", ["http://8.8.8.8/a", "https://10.0.0.8/a", "https://[::1]/a"])
    def test_what_is_refused_is_refused_with_a_proxy_as_well(self, url: str, server: Server, proxy: Proxy) -> None:
        assert failure(url, LINKS).refused
        assert not proxy.asked

    def test_plain_http_never_goes_there(self, server: Server, proxy: Proxy) -> None:
        with Server(answer()) as plain:
            assert download_bytes(plain.url, limit=LIMIT, destination=LOOPBACK) == PICTURE
        assert not proxy.asked

    def test_each_redirect_is_checked(self, names: dict[str, list[list[str]]], server: Server, proxy: Proxy) -> None:
        names["pictures.example.com"] = [["8.8.8.8"]]
        server.answers[:] = [answer(b"", "302 Found", Location="https://169.254.169.254/")]
        assert failure("https://pictures.example.com/a", LINKS).refused
        assert len(proxy.asked) == 1

    def test_what_no_proxy_names_is_reached_directly(
        self, names: dict[str, list[list[str]]], server: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names["pictures.example.com"] = [["127.0.0.1"]]
        monkeypatch.setenv("NO_PROXY", ".example.com")
        url = f"https://pictures.example.com:{server.port}/a"
        assert download_bytes(url, limit=LIMIT, destination=LOOPBACK) == PICTURE
        assert not proxy.asked

    @pytest.mark.parametrize(
        ("refusal", "retryable"), [("407 Proxy Authentication Required", False), ("503 Busy", True)]
    )
    def test_a_proxy_that_refuses_is_told_without_its_password(
        self, refusal: str, retryable: bool, names: dict[str, list[list[str]]], server: Server, proxy: Proxy
    ) -> None:
        names["pictures.example.com"] = [["8.8.8.8"]]
        proxy.refuses = refusal
        error = failure("https://pictures.example.com/a?secret", LINKS)
        assert f"the proxy answers {refusal}" in str(error)
        assert error.retryable is retryable
        assert "password" not in str(error)

    @pytest.mark.parametrize(("name", "value"), [("HTTPS_PROXY", "socks4://x"), ("SSL_CERT_FILE", "/no/such/file")])
    def test_a_wrong_variable_is_an_error_of_the_download_that_names_it(
        self, name: str, value: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, value)
        assert f"{name}: " in str(failure("https://8.8.8.8/a?secret", LINKS))


def test_an_address_of_any_length_is_an_error_of_one_short_line() -> None:
    with pytest.raises(DownloadError, match=r"^http://127\.0\.0\.1:1/\[+… leads to") as caught:
        download_bytes("http://127.0.0.1:1/" + "[" * 5000, limit=10, destination=Destination())
    assert len(str(caught.value)) < 400
