"""The API as the provider documents it, on loopback: checks every field, bills, counts, and fails as scripted."""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Literal

from fastapi import FastAPI, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from prefect_segmind.api.client import on_loopback
from prefect_segmind.api.resolutions import DEFAULT_RESOLUTION, Resolution
from prefect_segmind.sandbox import answers
from prefect_segmind.sandbox.drawing.picture import make_picture, make_sketch
from prefect_segmind.sandbox.fetch import FetchError, fetch
from prefect_segmind.sandbox.ledger import Entry, Ledger
from prefect_segmind.sandbox.script import Answer, Script

PRICE = Decimal("0.05")
"""USD for a picture."""

MODEL = "ideogram-2a-img-2-img"

_KEPT_RESULTS = 256  # pictures kept behind links; the provider's links expire too


class RequestBody(BaseModel):
    """The body of a request for a picture, with the documented types and ranges; other fields are refused.

    Attributes:
        image_file: The address of the source image.
        prompt: The prompt.
        image_weight: How much of the source stays.
        magic_prompt_option: Whether the model may rewrite the prompt.
        negative_prompt: What the picture should not show.
        resolution: The size.
        seed: The seed; random unless given.
        style_type: The style.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    image_file: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    image_weight: int = Field(default=50, ge=1, le=100)
    magic_prompt_option: Literal["AUTO", "ON", "OFF"] = "AUTO"
    negative_prompt: str = ""
    resolution: Resolution = Resolution(DEFAULT_RESOLUTION)
    seed: int = Field(default_factory=lambda: random.randint(100, 999_999), ge=100, le=999_999)
    style_type: Literal["GENERAL", "REALISTIC", "DESIGN", "RENDER_3D", "ANIME"] = "GENERAL"


class ScriptOrder(BaseModel):
    """The body of `POST /sandbox/script`.

    Attributes:
        answers: The answers, in the order of the requests.
        prompt: If given, only requests whose prompt contains this text get them.
    """

    model_config = ConfigDict(extra="forbid")

    answers: list[Answer]
    prompt: str | None = None


class Refusal(Exception):
    """A request is answered with an error, and not billed.

    Attributes:
        response: The answer.
    """

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.response = answers.error(status, text, headers)


class SandboxApi:
    """The state behind the endpoints.

    Args:
        api_key: The only accepted key.
        latency: The least seconds for a picture.
        credits: The balance at the start and after a reset, in USD.
        requests_per_minute: Further requests in a window are answered with 429; None for no limit.
        rate_window: Seconds in that window, for tests that cannot wait a minute.
        sketch: Whether to sketch pictures, for load tests.

    Attributes:
        ledger: The requests and what they cost.
        script: The queue of scripted answers.
        app: The ASGI application.
    """

    def __init__(
        self,
        api_key: str,
        *,
        latency: float = 1.0,
        credits: Decimal | str = "10.00",
        requests_per_minute: int | None = None,
        rate_window: float = 60.0,
        sketch: bool = False,
    ) -> None:
        self.ledger = Ledger()
        self.script = Script()
        self._key = api_key
        self._latency = latency
        self._credits = Decimal(credits)
        self._per_window = requests_per_minute
        self._window = rate_window
        self._render = _sketch if sketch else _draw
        # Only the event loop uses these, so they need no lock.
        self._reserved = Decimal("0.00")
        self._accepted: deque[float] = deque()
        self._results: OrderedDict[str, bytes] = OrderedDict()
        self._workers = ThreadPoolExecutor(8, thread_name_prefix="sandbox-picture")
        self.app = create_app(self)

    @property
    def balance(self) -> Decimal:
        """The credits left, in USD."""
        return self._credits - self.ledger.billed_usd

    def close(self) -> None:
        """Cancels the pictures that are still to be drawn."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    async def reset(self) -> dict[str, str]:
        """Returns to the state after the start: no requests, no bills, no script."""
        self.ledger.clear()
        self.script.clear()
        self._accepted.clear()
        self._results.clear()
        return {"status": "reset"}

    async def generate(self, request: Request) -> Response:
        """Answers and records a request for a picture."""
        received, started = datetime.now(UTC), time.monotonic()
        request_id = secrets.token_hex(16)
        content = await request.body()
        prompt = _prompt_of(content)
        image_sha256: str | None = None
        seed: int | None = None
        answer = Answer()

        def record(status: int, billed: bool) -> None:
            cost = PRICE if billed else Decimal("0.00")
            entry = Entry(received, request_id, prompt, image_sha256, seed, status, billed, cost)
            self.ledger.record(entry)

        try:
            self._check_key(request)
            scripted = self.script.next_for(prompt or "")
            answer = scripted or answer
            if answer.without_picture:
                record(answer.status, answer.is_billed)
                await asyncio.sleep(answer.delay)
                return self._finish(answers.without_picture(answer), answer, request_id, started)
            if scripted is None:
                self._check_rate()
            body = _parsed(request, content)
            seed = body.seed
            self._reserve()
            try:
                made = asyncio.get_running_loop().run_in_executor(self._workers, _make, body, self._render)
                # The latency passes while the picture is drawn, so that drawing does not add to it.
                (image_sha256, picture), _ = await asyncio.gather(made, asyncio.sleep(self._latency))
                record(answer.status, answer.is_billed)
            finally:
                self._reserved -= PRICE
        except Refusal as refusal:
            record(refusal.response.status_code, False)
            return self._finish(refusal.response, answer, request_id, started)
        self._results[request_id] = picture
        while len(self._results) > _KEPT_RESULTS:
            self._results.popitem(last=False)
        await asyncio.sleep(answer.delay)
        response = answers.with_picture(answer, picture, f"{request.base_url}v1/results/{request_id}.jpg")
        response.headers["x-seed-value"] = str(seed)
        return self._finish(response, answer, request_id, started)

    async def user_credits(self, request: Request) -> Response:
        """Answers with the balance."""
        try:
            self._check_key(request)
        except Refusal as refusal:
            return refusal.response
        return JSONResponse({"credits": float(self.balance), "free-credits": 0.0})

    async def result(self, request: Request, request_id: str) -> Response:
        """Answers with the picture behind a link; a request with a key is refused, as it must not be sent there."""
        if "x-api-key" in request.headers:
            return answers.error(400, "an API key was sent to the host of a result link")
        picture = self._results.get(request_id)
        return Response(picture, media_type="image/jpeg") if picture else answers.error(404, "no such result")

    def _check_key(self, request: Request) -> None:
        if not secrets.compare_digest(request.headers.get("x-api-key", "").encode(), self._key.encode()):
            raise Refusal(401, "Missing or invalid API key: send it in the x-api-key header")

    def _check_rate(self) -> None:
        if self._per_window is None:
            return
        now = time.monotonic()
        while self._accepted and self._accepted[0] <= now - self._window:
            self._accepted.popleft()
        if len(self._accepted) >= self._per_window:
            free_again = datetime.now(UTC) + timedelta(seconds=self._accepted[0] + self._window - now)
            period = "a minute" if self._window == 60 else f"in {self._window:g} s"
            raise Refusal(429, f"Rate limit of {self._per_window} {period} exceeded", answers.reset_header(free_again))
        self._accepted.append(now)

    def _reserve(self) -> None:
        """Reserves the price of a picture while it is made, so that concurrent requests cannot overdraw the account."""
        free = self.balance - self._reserved
        if free < PRICE:
            raise Refusal(406, f"Insufficient credits: balance {free}, need {PRICE}")
        self._reserved += PRICE

    def _finish(self, response: Response, answer: Answer, request_id: str, started: float) -> Response:
        response.headers["x-request-id"] = request_id
        response.headers["x-remaining-credits"] = str(self.balance)
        if response.status_code == 200 and answer.is_billed:
            response.headers["x-cost"] = str(PRICE)
            response.headers["x-generation-time"] = f"{time.monotonic() - started:.3f}"
        response.headers.update(answer.headers)
        return response


class OnlyFromHere:
    """Refuses what a page in a browser has sent, be it by its own name for this machine or across origins.

    The control endpoints need no key. The S3 server has no such check and needs none: it takes signed requests only,
    and a signature covers the host.

    Args:
        app: The ASGI application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on if its `Host` and its `Origin`, if it has one, are loopback; else answers with 403."""
        headers = Headers(scope=scope)
        app = self._app
        if not on_loopback(f"http://{headers.get('host', '')}"):
            app = answers.error(403, "the sandbox answers requests to this machine only: 127.0.0.1, localhost")
        elif not on_loopback(headers.get("origin", "http://localhost")):
            app = answers.error(403, "the sandbox answers no page of another origin")
        await app(scope, receive, send)


def create_app(api: SandboxApi) -> FastAPI:
    """The ASGI application: the two endpoints of the API, result links, and the sandbox's controls.

    Args:
        api: The state behind it.
    """
    # No documentation pages: they load scripts from another host.
    app = FastAPI(openapi_url=None)
    app.add_middleware(OnlyFromHere)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:  # the provider's edge answers this one, in HTML
            return HTMLResponse(answers.HTML.format(title="405 Not Allowed"), 405)
        return answers.error(error.status_code, f"Model or endpoint not found: {request.url.path}")

    @app.post("/sandbox/script")
    async def script(order: ScriptOrder) -> dict[str, int]:
        api.script.play(*order.answers, prompt=order.prompt)
        return {"queued": len(order.answers)}

    app.post(f"/v1/{MODEL}")(api.generate)
    app.get("/v1/get-user-credits")(api.user_credits)
    app.get("/v1/results/{request_id}.jpg")(api.result)
    app.get("/sandbox/ledger")(api.ledger.as_dict)
    app.post("/sandbox/reset")(api.reset)
    return app


def _prompt_of(content: bytes) -> str | None:
    """The prompt of a body that may be invalid; None without one."""
    try:
        return _Prompt.model_validate_json(content).prompt
    except ValidationError:
        return None


class _Prompt(BaseModel):
    prompt: str


def _parsed(request: Request, content: bytes) -> RequestBody:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(406, f"Invalid Content-Type {media_type!r}: expected application/json")
    try:
        return RequestBody.model_validate_json(content)
    except ValidationError as error:
        flaws = [f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in error.errors()]
        raise Refusal(400, "; ".join(flaws)) from None


def _make(body: RequestBody, render: Callable[[RequestBody, bytes], bytes]) -> tuple[str, bytes]:
    """Fetches the source and renders the picture; runs in a worker thread."""
    try:
        source = fetch(body.image_file)
        picture = render(body, source)
    except FetchError as error:
        raise Refusal(400, f"image_file {error}") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # all of Pillow
        raise Refusal(400, f"image_file is not a readable image: {type(error).__name__}") from None
    return hashlib.sha256(source).hexdigest(), picture


def _draw(body: RequestBody, source: bytes) -> bytes:
    return make_picture(source, **body.model_dump(mode="json", exclude={"image_file"}))


def _sketch(body: RequestBody, source: bytes) -> bytes:
    request = body.model_dump_json(exclude={"image_file"})  # whose signature may differ for each request
    return make_sketch(source, request=request, resolution=body.resolution.value)
