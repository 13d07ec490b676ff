"""The routes: OpenAI's completions, chat completions and models, health, and Prometheus metrics."""

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from dsv3_jax.config import UserError
from dsv3_jax.inference.requests import Completion
from dsv3_jax.inference.streaming import TextStream
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.protocol import Asked, BadRequest, Served, logprobs_of, parse, usage_of
from dsv3_jax.serving.worker import Broken, Busy, Piece, Worker

SECONDS_FOR_A_BODY = 30.0
SECONDS_TO_SAY_SO = 1.0  # that an answer was late
PREFIXES = {"completion": "cmpl-", "chat": "chatcmpl-"}


@dataclass(frozen=True)
class Limits:
    """What a client may take up."""

    body_bytes: int
    request_seconds: float
    api_key: str | None = None


class Refused(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, parameter: str | None = None, code: Any = None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": parameter, "code": code}
        headers = {"Retry-After": "1"} if status in (429, 503) else None
        if status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        self.response = JSONResponse({"error": error}, status, headers=headers)


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


class Answer:
    """The choices of one request on their way to the client."""

    def __init__(self, asked: Asked, served: Served, worker: Worker, limits: Limits):
        self._asked, self._served, self._worker, self._limits = asked, served, worker, limits
        self._chat = asked.kind == "chat"
        self._head = {
            "id": PREFIXES[asked.kind] + secrets.token_hex(12),
            "created": int(time.time()),
            "model": served.model,
        }
        self._completions: dict[int, Completion] = {}
        self.deadline = asyncio.get_running_loop().time() + limits.request_seconds

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        """The pieces of all choices as they come; what is left is cancelled on the way out."""
        merged: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue(maxsize=1)

        async def forward(number: int, pieces: AsyncIterator[Piece]) -> None:
            try:
                async for piece in pieces:
                    await merged.put((number, piece))
            except Broken as error:
                await merged.put((number, error))

        async with AsyncExitStack() as stack:
            tasks = []
            for number, request in enumerate(self._asked.requests):
                ends = request.ends(self._worker.engine.config)
                stream = TextStream(self._served.tokenizer, ends, self._asked.stops)
                pieces = await stack.enter_async_context(self._worker.written(request, stream))
                tasks.append(asyncio.create_task(forward(number, pieces)))
            try:
                while len(self._completions) < len(tasks):
                    async with asyncio.timeout_at(self.deadline):
                        number, piece = await merged.get()
                    if isinstance(piece, BaseException):
                        raise piece
                    if piece.completion is not None:
                        self._completions[number] = piece.completion
                    yield number, piece
            finally:
                for task in tasks:
                    task.cancel()

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        texts = [""] * len(self._asked.requests)
        try:
            async with aclosing(self._pieces()) as pieces:
                async for number, piece in pieces:
                    texts[number] += piece.text
        except TimeoutError as error:
            seconds = self._limits.request_seconds
            raise Refused(504, f"the answer took longer than {seconds:g} s") from error
        except Broken as error:
            raise Refused(503, str(error)) from error
        choices = []
        for number, text in enumerate(texts):
            completion = self._completions[number]
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choice = {
                "index": number,
                **(said if self._chat else {"text": text}),
                "logprobs": self._logprobs(completion.tokens, 0),
                "finish_reason": completion.finish_reason,
            }
            choices.append(choice)
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events."""
        shown = [0] * len(self._asked.requests)
        if self._chat:
            for number in range(len(shown)):
                yield self._event(number, {"role": "assistant", "content": ""}, None, None)
        try:
            async with aclosing(self._pieces()) as pieces:
                async for number, piece in pieces:
                    done = piece.completion
                    if piece.text or (piece.tokens and self._asked.logprobs):
                        logprobs = self._logprobs(piece.tokens, shown[number])
                        yield self._event(number, {"content": piece.text}, logprobs, None)
                        shown[number] += len(piece.text)
                    if done is not None:
                        yield self._event(number, {}, None, done.finish_reason)
        except (TimeoutError, Broken) as error:
            seconds = self._limits.request_seconds
            late = isinstance(error, TimeoutError)
            message = f"the answer took longer than {seconds:g} s" if late else str(error)
            yield _sse({"error": {"message": message, "type": "server_error", "code": None}})
            return
        if self._asked.usage:
            yield _sse({**self._stream_head(), "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _event(self, number: int, delta: dict[str, str], logprobs: Any, reason: Any) -> bytes:
        said = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": number, **said, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._asked.usage else {}
        return _sse({**self._stream_head(), "choices": [choice], **usage})

    def _stream_head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind}

    def _logprobs(self, tokens, offset: int):
        if not self._asked.logprobs:
            return None
        asked = self._asked
        return logprobs_of(asked.kind, tokens, self._served.tokenizer, asked.top, offset)

    def _usage(self) -> dict[str, Any]:
        completions = [self._completions[number] for number in sorted(self._completions)]
        return usage_of(completions, self._asked.choices)


class Events(StreamingResponse):
    """An answer as server-sent events; a client that has not read it by its deadline is left.

    Until then its tokens wait for it, and the engine for nobody.
    """

    def __init__(self, answer: Answer):
        self._events, self._deadline = answer.events(), answer.deadline
        super().__init__(self._events, media_type="text/event-stream")

    async def stream_response(self, send: Send) -> None:
        """As StreamingResponse's."""
        async with aclosing(self._events):
            with suppress(TimeoutError):  # the server closes what is incomplete
                async with asyncio.timeout_at(self._deadline + SECONDS_TO_SAY_SO):
                    await super().stream_response(send)


def _sse(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()
