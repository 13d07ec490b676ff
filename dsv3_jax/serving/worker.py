"""The thread that steps an engine, and the door to it from an event loop.

Requests are submitted and cancelled from the loop's thread; tokens come back to it through a queue
for each request, which holds no more than the tokens that the request may have.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Completion, Request, Token
from dsv3_jax.inference.streaming import TextStream

log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """The queue is full."""


class Broken(RuntimeError):
    """Nothing is served any more: the engine has failed, or the server is shutting down."""


class Piece:
    """Some new tokens and the text that is certain with them; the last one has the completion."""

    def __init__(self, tokens: list[Token], text: str, completion: Completion | None = None):
        self.tokens, self.text, self.completion = tokens, text, completion


class Worker:
    """An engine in a thread of its own, until `stop`."""

    def __init__(self, engine: Engine, max_waiting: int):
        self.engine, self.max_waiting = engine, max_waiting
        self.failed: BaseException | None = None
        self.draining = False  # nothing new is taken on
        self._wake, self._stopping = threading.Event(), False
        self._open: set[asyncio.Queue[Piece | None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """To be called in the event loop that will submit requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its step; what is unfinished stays so."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def check_room(self, requests: int) -> None:
        """Raises Busy when so many more would be too many, and Broken when none is taken on."""
        if self.failed is not None:
            raise Broken("the engine has failed") from self.failed
        if self.draining:
            raise Broken("the server is shutting down")
        if self.engine.waiting + requests > self.max_waiting:
            raise Busy(f"{self.engine.waiting} requests are waiting, of {self.max_waiting} at most")

    @asynccontextmanager
    async def written(
        self, request: Request, stream: TextStream
    ) -> AsyncIterator[AsyncIterator[Piece]]:
        """The pieces of a request's text as they come; leaving the block cancels what is left.

        UserError as `Engine.submit`.
        """
        assert self._loop is not None
        loop, pieces = self._loop, asyncio.Queue()

        def put(piece: Piece | None) -> None:
            if not loop.is_closed():  # else the server has ended, and nobody waits
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def listen(tokens: list[Token]) -> bool:
            text = "".join(stream.push(token.id) for token in tokens)
            put(Piece(tokens, text))
            return stream.stopped

        def done(completion: Completion) -> None:
            put(Piece([], stream.flush(), completion))

        completion = self.engine.submit(replace(request, listener=listen, on_done=done))
        self._open.add(pieces)
        self._wake.set()
        try:
            yield _until_done(pieces)
        finally:
            self._open.discard(pieces)
            if not completion.done:
                self.engine.cancel(completion)
                self._wake.set()

    def _run(self) -> None:
        try:
            while not self._stopping:
                if self.engine.busy:
                    self.engine.step()
                else:
                    self._wake.wait()
                    self._wake.clear()
        except BaseException as error:  # everybody who waits is told
            log.exception("the engine has failed")
            self.failed = error
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        for pieces in self._open:
            pieces.put_nowait(None)


async def _until_done(pieces: "asyncio.Queue[Piece | None]") -> AsyncIterator[Piece]:
    while True:
        piece = await pieces.get()
        if piece is None:
            raise Broken("the engine has failed")
        yield piece
        if piece.completion is not None:
            return
