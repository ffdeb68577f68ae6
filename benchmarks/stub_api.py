"""The provider's endpoint as a stub: the same picture for every request, after a given time.

    .venv/bin/python -m benchmarks.stub_api --latency 10

It answers `POST /v1/ideogram-2a-img-2-img` without a look at the image's address, the balance, and a request history
that is empty. `GET /stats` has its figures; the first request is a line of output.

One process answers about 3,400 requests a second, each on a connection of its own, with 0.2 ms of CPU (a core of two of
an AMD EPYC with other work on them; `python -m benchmarks.stub_load` measures it). The provider's highest plan is 17 a
second. `mean_late_seconds` of the figures tells how much later than due its answers were in a run.
"""

from __future__ import annotations

import io
import itertools
import json
import random

from PIL import Image, ImageFilter

from benchmarks.stub_http import Answer, Request, Traffic, options, serve

PRICE = "0.05"
"""USD for a picture."""
FIRST = "first request"
"""The line that is printed when the first request for a picture has been read."""


def picture(width: int, height: int, kind: str) -> bytes:
    """A picture with the detail of a photo: soft noise.

    Args:
        width: Its width in pixels.
        height: Its height in pixels.
        kind: `jpeg` or `png`.

    Returns:
        The file: of 1024 x 1024 pixels about 0.2 MB as a JPEG and 1.3 MB as a PNG.
    """
    noise = Image.frombytes("RGB", (width, height), random.Random(2).randbytes(width * height * 3))
    file = io.BytesIO()
    noise.filter(ImageFilter.GaussianBlur(2)).save(file, kind, quality=90)
    return file.getvalue()


class StubApi:
    """The endpoints of the API.

    Args:
        made: The picture that every request gets.
        kind: Its kind, `jpeg` or `png`.
        latency: Seconds that a picture takes.

    Attributes:
        traffic: What has been asked for: requests for a picture alone.
    """

    def __init__(self, made: bytes, kind: str, latency: float) -> None:
        self.traffic = Traffic()
        self._made = made
        self._kind = kind
        self._latency = latency
        self._numbers = itertools.count(1)

    def answer(self, request: Request) -> Answer:
        """Answers a request.

        Args:
            request: The request.
        """
        match request.method, request.path:
            case "POST", "/v1/ideogram-2a-img-2-img":
                return self._picture(request)
            case "GET", "/v1/get-user-credits":
                return _json({"credits": 100_000.0, "free-credits": 0.0})
            case "GET", "/inference-request/request-history":
                return _json({"data": [], "page": 1, "per_page": 100, "total": 0, "total_pages": 0})
            case "GET", "/stats":
                return self.traffic.as_json()
        return _json({"error": f"Model or endpoint not found: {request.path}"}, 404)

    def _picture(self, request: Request) -> Answer:
        if not request.headers.get("x-api-key"):
            return _json({"error": "Missing API key"}, 401)
        try:
            asked = json.loads(request.body)
            seed = asked.get("seed", 100) if asked["image_file"] and asked["prompt"] else None
        except (ValueError, KeyError, TypeError, AttributeError):
            seed = None
        if seed is None:
            return _json({"error": "image_file and prompt are required"}, 400)
        if self.traffic.first is None:
            print(FIRST, flush=True)
        headers = (
            ("Content-Type", f"image/{self._kind}"),
            ("x-cost", PRICE),
            ("x-request-id", f"stub-{next(self._numbers):06}"),
            ("x-seed-value", str(seed)),
            ("x-generation-time", str(self._latency)),
        )
        return Answer(200, self._made, headers, self._latency, "POST")


def _json(value: object, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), (("Content-Type", "application/json"),))


def main() -> None:
    """Serves until SIGTERM."""
    parser = options(__doc__)
    parser.add_argument("--size", default="1024x1024", help="width and height of the picture in pixels")
    parser.add_argument("--kind", default="jpeg", choices=["jpeg", "png"])
    given = parser.parse_args()
    width, height = map(int, given.size.split("x"))
    stub = StubApi(picture(width, height, given.kind), given.kind, given.latency)
    serve(stub.answer, stub.traffic, given.port)


if __name__ == "__main__":
    main()
