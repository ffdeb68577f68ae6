"""The API as the provider documents it, on loopback: checks every field, bills, counts, and fails as scripted."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any, Literal

from fastapi import FastAPI, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from prefect_segmind.api.origin import on_loopback
from prefect_segmind.api.resolutions import DEFAULT_RESOLUTION, Resolution
from prefect_segmind.sandbox import answers
from prefect_segmind.sandbox.account import PRICE, Account
from prefect_segmind.sandbox.answers import Refusal
from prefect_segmind.sandbox.drawing.picture import make_picture, make_sketch
from prefect_segmind.sandbox.fetch import FetchError, fetch
from prefect_segmind.sandbox.generation import MODEL, Generation
from prefect_segmind.sandbox.history import PATH, History
from prefect_segmind.sandbox.ledger import Ledger
from prefect_segmind.sandbox.script import Answer, Script

_KEPT_RESULTS = 1000  # pictures kept behind links; the provider's links expire too


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


class HistoryOrder(BaseModel):
    """The body of `POST /sandbox/history`.

    Attributes:
        answers: The answers to the next requests of the request history.
        off: Whether the request history answers everything with 404, until the next reset or order.
    """

    model_config = ConfigDict(extra="forbid")

    answers: list[Answer] = Field(default_factory=list)
    off: bool = False


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
        history: The request history.
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
        self.history = History()
        self._account = Account(
            api_key,
            self.ledger,
            credits=credits,
            requests_per_minute=requests_per_minute,
            rate_window=rate_window,
        )
        self._latency = latency
        self._render = _sketch if sketch else _draw
        # Only the event loop uses these, so they need no lock.
        self._results: OrderedDict[str, bytes] = OrderedDict()
        self._running: set[asyncio.Task[bytes | None]] = set()
        self._workers = ThreadPoolExecutor(8, thread_name_prefix="sandbox-picture")
        self.app = create_app(self)

    def close(self) -> None:
        """Cancels the pictures that are still to be drawn."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    async def reset(self) -> dict[str, str]:
        """Returns to the state after the start: no requests, also none in flight, no bills, no scripts."""
        running = list(self._running)
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self.ledger.clear()
        self.script.clear()
        self.history.clear()
        self._account.reset()
        self._results.clear()
        return {"status": "reset"}

    async def generate(self, request: Request) -> Response:
        """Answers a v1 request: with the picture, once it is made."""
        return await self._asked(request, queued=False)

    async def submit(self, request: Request) -> Response:
        """Answers a v2 request: with the addresses to poll, at once."""
        return await self._asked(request, queued=True)

    async def status(self, request: Request, request_id: str) -> Response:
        """Answers with the status of a v2 request."""
        return self._polled(request, request_id, Generation.status_document)

    async def outcome(self, request: Request, request_id: str) -> Response:
        """Answers with the result of a v2 request, or with its status while there is no result."""

        def document(generation: Generation) -> dict[str, Any]:
            if generation.state == "COMPLETED":
                return generation.result_document(str(request.base_url), self._account.balance)
            return generation.status_document()

        return self._polled(request, request_id, document)

    async def requests(self, request: Request) -> Response:
        """Answers with a page of the request history."""
        return await self._looked_up(request, lambda: self.history.page(request.query_params, str(request.base_url)))

    async def one_request(self, request: Request, request_id: str) -> Response:
        """Answers with one row of the request history."""
        return await self._looked_up(request, lambda: self.history.row(request_id, str(request.base_url)))

    async def user_credits(self, request: Request) -> Response:
        """Answers with the balance."""
        try:
            self._account.check_key(_key_of(request))
        except Refusal as refusal:
            return refusal.response
        return JSONResponse({"credits": float(self._account.balance), "free-credits": 0.0})

    async def result(self, request: Request, request_id: str) -> Response:
        """Answers with the picture behind a link; a request with a key is refused, as it must not be sent there."""
        if "x-api-key" in request.headers:
            return answers.error(400, "an API key was sent to the host of a result link")
        picture = self._results.get(request_id)
        return Response(picture, media_type="image/jpeg") if picture else answers.error(404, "no such result")

    async def _asked(self, request: Request, *, queued: bool) -> Response:
        """Checks a request for a picture, has it carried out, and answers it as its script says."""
        content = await request.body()
        generation = Generation(_inputs_of(content), queued=queued, queue_seconds=self._latency / 4)
        try:
            self._account.check_key(_key_of(request))
            scripted = self.script.next_for(generation.prompt or "")
            generation.play(scripted or Answer())
            if not generation.is_accepted:
                return await self._not_accepted(generation)
            if scripted is None:
                self._account.check_rate()
            body = _parsed(request, content)
            self._account.reserve()
        except Refusal as refusal:
            self.ledger.record(generation.entry(refusal.status))
            return self._finish(refusal.response, generation)
        generation.seed = body.seed
        self.history.add(generation)
        # A task of its own, which goes on when the client is gone, as the provider's work does.
        made = asyncio.create_task(self._carry_out(generation, body))
        self._running.add(made)
        made.add_done_callback(self._running.discard)
        picture: bytes | None = None
        if not queued and generation.answer.kind != "lost":
            await asyncio.wait({made})
            if made.cancelled():
                return answers.error(503, "the sandbox was reset")
            picture = made.result()
        await asyncio.sleep(generation.answer.delay)
        return self._finish(_answer(request, generation, picture), generation)

    async def _not_accepted(self, generation: Generation) -> Response:
        """Answers as scripted, without a picture."""
        answer = generation.answer
        if answer.status >= 300:
            generation.fail(answer.status, answers.error_text(answer.status))
        else:
            generation.complete(_cost_of(answer), None)
        if answer.is_listed:
            self.history.add(generation)
        self.ledger.record(generation.entry(answer.status))
        await asyncio.sleep(answer.delay)
        return self._finish(answers.without_picture(answer), generation)

    async def _carry_out(self, generation: Generation, body: RequestBody) -> bytes | None:
        """Has a picture made, bills and records it.

        Returns:
            The picture; None if the request failed.
        """
        picture: bytes | None = None
        try:
            picture = await self._made(generation, body)
            generation.complete(_cost_of(generation.answer), self._keep(generation, picture))
        except Refusal as refusal:
            generation.fail(refusal.status, str(refusal))
        finally:
            self._account.release()
        self.ledger.record(generation.entry(generation.status))
        return picture

    async def _made(self, generation: Generation, body: RequestBody) -> bytes:
        answer = generation.answer
        least = self._latency + answer.processing
        if answer.fails:
            await asyncio.sleep(least)
            raise Refusal(422, answers.FAILED if answer.fails is True else answer.fails)
        drawn = asyncio.get_running_loop().run_in_executor(self._workers, _make, body, self._render)
        # The time passes while the picture is drawn, so that drawing does not add to it.
        (generation.image_sha256, picture), _ = await asyncio.gather(drawn, asyncio.sleep(least))
        return picture

    def _keep(self, generation: Generation, picture: bytes) -> int | None:
        """Puts a picture, or what is scripted in its place, behind its link, and returns its size."""
        kept = answers.behind_link(generation.answer, picture) if generation.queued else picture
        if kept is None:
            return None
        self._results[generation.request_id] = kept
        while len(self._results) > _KEPT_RESULTS:
            self._results.popitem(last=False)
        return len(kept)

    def _polled(self, request: Request, request_id: str, document: Callable[[Generation], dict[str, Any]]) -> Response:
        try:
            self._account.check_key(_key_of(request))
        except Refusal as refusal:
            return refusal.response
        generation = self.history.find(request_id)
        if generation is None or not generation.queued:
            return answers.error(404, "Request not found")
        status = generation.polls.popleft() if generation.polls else 200
        if status == 0:
            return answers.LostResponse()
        if status != 200:
            return answers.error(status, answers.error_text(status))
        if generation.is_forgotten:
            return answers.error(404, "Request not found")
        # The provider answers FAILED with 422, whichever of the two addresses is asked.
        return JSONResponse(document(generation), 422 if generation.error else 200)

    async def _looked_up(self, request: Request, look: Callable[[], dict[str, Any]]) -> Response:
        if self.history.off:
            return answers.error(404, f"Model or endpoint not found: {request.url.path}")
        try:
            self._account.check_key(_key_of(request))
            answer = self.history.script.next_for("") or Answer()
            await asyncio.sleep(answer.delay)
            if answer.kind == "lost":
                return answers.LostResponse()
            response = answers.without_picture(answer) if answer.without_picture else answers.with_json(answer, look())
        except Refusal as refusal:
            return refusal.response
        response.headers.update(answer.headers)
        return response

    def _finish(self, response: Response, generation: Generation) -> Response:
        response.headers["x-request-id"] = generation.request_id
        response.headers["x-remaining-credits"] = str(self._account.balance)
        if response.status_code == 200 and generation.cost and not generation.queued:
            response.headers["x-cost"] = str(generation.cost)
            response.headers["x-generation-time"] = f"{generation.seconds:.3f}"
        response.headers.update(generation.answer.headers)
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
    """The ASGI application: the API, v1 and v2, result links, the request history, and the sandbox's controls.

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

    @app.post("/sandbox/history")
    async def history(order: HistoryOrder) -> dict[str, int]:
        api.history.play(*order.answers)
        api.history.off = order.off
        return {"queued": len(order.answers)}

    app.post(f"/v1/{MODEL}")(api.generate)
    app.get("/v1/get-user-credits")(api.user_credits)
    app.get("/v1/results/{request_id}.jpg")(api.result)
    app.post(f"/v2/{MODEL}")(api.submit)
    app.get("/v2/requests/{request_id}/status")(api.status)
    app.get("/v2/requests/{request_id}")(api.outcome)
    app.get(PATH)(api.requests)
    app.get(f"{PATH}/{{request_id}}")(api.one_request)
    app.get("/sandbox/ledger")(api.ledger.as_dict)
    app.post("/sandbox/reset")(api.reset)
    return app


def _key_of(request: Request) -> str:
    return request.headers.get("x-api-key", "")


def _cost_of(answer: Answer) -> Decimal:
    return PRICE if answer.is_billed else Decimal("0.00")


def _inputs_of(content: bytes) -> dict[str, Any]:
    """The object in a body that may be invalid; empty without one."""
    try:
        inputs = from_json(content, allow_inf_nan=False)
    except ValueError:
        return {}
    return inputs if isinstance(inputs, dict) else {}


def _answer(request: Request, generation: Generation, picture: bytes | None) -> Response:
    """The answer to an accepted request; for v1 it has the picture."""
    answer, origin = generation.answer, str(request.base_url)
    if answer.kind == "lost":
        return answers.LostResponse()
    if generation.is_answered_without_picture:
        return answers.without_picture(answer)
    if generation.queued:
        return answers.with_json(answer, generation.addresses(origin))
    if picture is None:
        return answers.error(generation.status, generation.error)
    response = answers.with_picture(answer, picture, generation.link(origin) or "")
    response.headers["x-seed-value"] = str(generation.seed)
    return response


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
