"""Asks a sandbox for pictures as a client of the API does, and serves the image that it fetches."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from prefect_segmind.sandbox import Sandbox, sample_photo
from tests.support.waiting import until

MODEL = "ideogram-2a-img-2-img"
SMALL = "RESOLUTION_640_1024"

# Each request has a connection of its own: one that was idle may just be closed by the server.
HTTP = httpx.Client(timeout=20, limits=httpx.Limits(max_keepalive_connections=0))


class ImageSource:
    """An HTTP server with one image; a request for it waits while the image is held back."""

    def __init__(self) -> None:
        content, self.released = sample_photo((384, 256)), threading.Event()
        self.released.set()
        released = self.released

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                released.wait(60)
                self.send_response(200 if self.path.startswith("/mug.jpg") else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ImageSource:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


def inputs(source: str, **fields: Any) -> dict[str, Any]:
    """The body of a request; a field of `...` is left out."""
    body = {"image_file": f"{source}/mug.jpg", "prompt": "a mug at sunset", "seed": 4711, "resolution": SMALL, **fields}
    return {name: value for name, value in body.items() if value is not ...}


def ask(sandbox: Sandbox, source: str, key: str | None = None, **fields: Any) -> httpx.Response:
    """The answer to a v1 request."""
    return _post(sandbox, sandbox.base_url, source, key, fields)


def submit(sandbox: Sandbox, source: str, key: str | None = None, **fields: Any) -> httpx.Response:
    """The answer to a v2 request."""
    return _post(sandbox, sandbox.base_url_v2, source, key, fields)


def get(sandbox: Sandbox, url: str, key: str | None = None, **parameters: Any) -> httpx.Response:
    """The answer to a poll or of the request history."""
    headers = {b"x-api-key": (sandbox.api_key if key is None else key).encode()}
    return HTTP.get(url, headers=headers, params=parameters or None)


def rows(sandbox: Sandbox, **parameters: Any) -> list[dict[str, Any]]:
    """The rows of a page of the request history."""
    answer = get(sandbox, sandbox.history_url, **parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def settled(sandbox: Sandbox) -> dict[str, Any]:
    """The only row of the request history, once it is no longer pending."""
    (row,) = until(lambda: [each for each in rows(sandbox) if each["model_status"] != "PENDING"], 20)
    return row


def _post(sandbox: Sandbox, base_url: str, source: str, key: str | None, fields: dict[str, Any]) -> httpx.Response:
    headers = {b"x-api-key": (sandbox.api_key if key is None else key).encode()}
    return HTTP.post(f"{base_url}/{MODEL}", json=inputs(source, **fields), headers=headers)
