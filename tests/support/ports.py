"""Ports for servers that cannot choose one themselves."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port on loopback that nobody listens on, outside the range that outgoing connections are given theirs from."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def listens(port: int) -> bool:
    """Whether somebody listens on a port on loopback."""
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0
