"""A window of steps traced by JAX's profiler, for Perfetto or XProf."""

from pathlib import Path

import jax

# Steps before the window: compilation and warm-up are not what one looks for.
SKIPPED_STEPS = 10


class ProfileWindow:
    """Traces `steps` steps into `folder`, from the tenth after the start on; 0 traces none."""

    def __init__(self, folder: Path, start: int, steps: int):
        self._folder, self._first = folder, start + SKIPPED_STEPS
        self._last = self._first + steps
        self._tracing = False

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
