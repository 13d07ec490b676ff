"""A uvicorn server that goes on answering while it drains: what it has begun is written, what is
new is answered with 503, and the process ends with exit code 0.

uvicorn by itself closes its sockets at the signal, so that whoever asks then finds nobody, and ends
the process by the signal.
"""

import time
from types import FrameType

import uvicorn

from dsv3_jax.serving.worker import Worker


class DrainingServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, and then for `seconds` at most; a second signal ends that."""

    def __init__(self, config: uvicorn.Config, worker: Worker, seconds: float):
        super().__init__(config)
        self._worker, self._seconds = worker, seconds
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        if self._until is None:
            self._until = time.monotonic() + self._seconds
            self._worker.draining = True
        else:
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: True when it is time to close."""
        if self._until is not None:
            late = time.monotonic() >= self._until
            self.should_exit |= late or not self.server_state.tasks
        return await super().on_tick(counter)
