"""A window of steps traced by JAX's profiler, for Perfetto or XProf."""

import logging
from pathlib import Path

import jax

log = logging.getLogger(__name__)

# Steps before the window: warm-up is not what one looks for.
SKIPPED_STEPS = 10


class ProfileWindow:
    """Traces `steps` of the steps `start` to `end` - 1 into `folder`; 0 traces none.

    The window begins with the tenth step, earlier where it would not fit, and never with the first,
    which warms up. What is traced, and what cannot be, is told on the log.
    """

    def __init__(self, folder: Path, start: int, end: int, steps: int):
        self._folder, self._tracing = folder, False
        self._first = start + min(SKIPPED_STEPS, max(end - start - steps, 1))
        self._last = min(self._first + steps, end)
        traced = self._last - self._first
        if steps and traced <= 0:
            log.warning("nothing is traced: the run has one step left, and that warms up")
        elif steps:
            log.info("steps %d to %d are traced into %s", self._first + 1, self._last, folder)
            if traced < steps:
                log.warning("%d steps were asked for: the run has no more left", steps)

    def before(self, step: int) -> None:
        """To be called before each step."""
        if not self._tracing and self._first <= step < self._last:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif self._tracing and step >= self._last:
            self.close()

    def close(self) -> None:
        """Ends a window that is still open; harmless when repeated."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
