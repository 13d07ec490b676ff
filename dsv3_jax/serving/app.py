"""The routes: OpenAI's completions, chat completions and models, health, and Prometheus metrics."""

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dsv3_jax.config import UserError
from dsv3_jax.serving.answer import Answer, Events, Limits, Refused
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.protocol import BadRequest, Served, parse
from dsv3_jax.serving.worker import Broken, Busy, Worker

SECONDS_FOR_A_BODY = 30.0


def make_app(worker: Worker, served: Served, limits: Limits) -> Starlette:
    """The application; its worker runs while it does."""
    metrics, started = Metrics(worker), int(time.time())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    def guarded(handle: Callable[[Request], Awaitable[Response]]):
        async def handler(request: Request) -> Response:
            try:
                _check_key(request, limits.api_key)
                return await handle(request)
            except Refused as refused:
                metrics.refused(refused.response.status_code)
                return refused.response

        return handler

    async def complete(request: Request, kind: str) -> Response:
        body = await _body(request, limits.body_bytes)
        try:
            asked = parse(kind, body, served, secrets.randbits(31))
            for each in asked.requests:
                worker.engine.check(each)
            worker.check_room(len(asked.requests))
        except BadRequest as error:
            raise Refused(400, str(error), error.parameter, error.code) from error
        except UserError as error:
            code = "context_length_exceeded" if "room for" in str(error) else None
            raise Refused(400, str(error), None, code) from error
        except Busy as error:
            raise Refused(429, str(error), code="queue_full") from error
        except Broken as error:
            raise Refused(503, str(error)) from error
        answer = Answer(asked, served, worker, limits)
        if asked.stream:
            return Events(answer)
        return await _unless_client_leaves(request, answer.whole())

    def model() -> dict[str, Any]:
        return {
            "id": served.model,
            "object": "model",
            "created": started,
            "owned_by": "dsv3_jax",
            "max_model_len": served.max_length,
        }

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model()]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != served.model:
            name = request.path_params["name"]
            raise Refused(404, f"the model {name!r} does not exist", "model", "model_not_found")
        return JSONResponse(model())

    async def health(_: Request) -> Response:
        if worker.failed is not None or worker.draining:
            return JSONResponse({"status": "failed" if worker.failed else "draining"}, 503)
        return JSONResponse({"status": "ok", "model": served.model})

    async def show_metrics(_: Request) -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    def post(path: str, kind: str) -> Route:
        async def handle(request: Request) -> Response:
            return await complete(request, kind)

        return Route(path, guarded(handle), methods=["POST"])

    return Starlette(
        routes=[
            post("/v1/completions", "completion"),
            post("/v1/chat/completions", "chat"),
            Route("/v1/models", guarded(models)),
            Route("/v1/models/{name:path}", guarded(one_model)),
            Route("/health", health),
            Route("/metrics", show_metrics),
        ],
        lifespan=lifespan,
    )


def _check_key(request: Request, api_key: str | None) -> None:
    if api_key is None:
        return
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
        raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")


async def _body(request: Request, most: int) -> Any:
    """The JSON in a body of so many bytes at most."""
    raw = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            raw.extend(chunk)
            if len(raw) > most:
                raise Refused(413, f"the body is larger than {most:,} bytes")

    try:
        await asyncio.wait_for(read(), SECONDS_FOR_A_BODY)
    except TimeoutError as error:
        raise Refused(408, f"the body did not come in {SECONDS_FOR_A_BODY:g} s") from error
    except ClientDisconnect as error:
        raise Refused(400, "the client left") from error
    try:
        return json.loads(bytes(raw))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}") from error


async def _unless_client_leaves(request: Request, answer: Any) -> Response:
    """The answer; when the client leaves before it is there, its requests are cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refused(499, "the client left")
        return JSONResponse(work.result())
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)
