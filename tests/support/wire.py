"""An HTTP server that says exactly what a test tells it to, byte for byte, and cuts where it is told to."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading


def http(body: bytes = b"", status: str = "200 OK", *, length: int | None = None, **headers: str) -> bytes:
    """An answer as it goes over the wire; `length` can lie."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status}", "Connection: close", *(f"{name}: {value}" for name, value in names.items())]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def http_json(value: object, status: str = "200 OK", **headers: str) -> bytes:
    return http(json.dumps(value).encode(), status, length=None, Content_Type="application/json", **headers)


class Wire:
    """Answers each request with the next of its answers, the last one for ever, and keeps the requests.

    `silent` keeps the connection open after each answer, until the end of the test; `drip` is sent behind it again and
    again, until the client has gone; `reset` breaks the connection off instead of closing it, once its bytes are read.
    """

    def __init__(self, *answers: bytes, silent: bool = False, drip: bytes = b"", reset: bool = False) -> None:
        self.answers = list(answers)
        self.requests: list[str] = []
        self._over = threading.Event()
        self._silent, self._drip, self._reset = silent, drip, reset
        self.gone = threading.Event()  # a client has hung up while it was dripped at
        self.read = threading.Event()  # to be set when a client has read what is to come before the reset
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self.requests.append(read_request(connection))
                    connection.sendall(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])
                except OSError:
                    continue  # the client has gone
                if self._silent:
                    self._over.wait(10)
                try:
                    while self._drip and not self._over.wait(0.005):
                        connection.sendall(self._drip)
                except OSError:
                    self.gone.set()
                if self._reset:
                    self.read.wait(10)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def hang_up(self) -> None:
        """Closes what it has kept open or dripped at."""
        self._over.set()

    def __enter__(self) -> Wire:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def read_request(connection: socket.socket) -> str:
    """All of a request: closing a connection with unread bytes in it would cut the answer too."""
    data = b""
    while b"\r\n\r\n" not in data and (more := connection.recv(65_536)):
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    found = re.search(rb"(?i)content-length: *(\d+)", head)
    while len(body) < (int(found[1]) if found else 0) and (more := connection.recv(65_536)):
        body += more
    return (head + b"\r\n\r\n" + body).decode()
