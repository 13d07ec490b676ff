"""An answer on its way to the client: as one object or as events, within its time, or an error."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Send

from dsv3_jax.inference.requests import Completion
from dsv3_jax.inference.streaming import TextStream
from dsv3_jax.serving.protocol import Asked, Served, logprobs_of, usage_of
from dsv3_jax.serving.worker import Broken, Piece, Worker

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
