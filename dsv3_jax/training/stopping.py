"""Stopping on request: SIGTERM and SIGINT end the run at the next step, with the state saved."""

import os
import signal
from types import FrameType

import jax

from dsv3_jax.parallel.hosts import LargestOfAll


class StopRequest:
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once.

    Call `poll` once a step, and look at `requested` between steps and between validation batches.
    With several processes a signal to any of them stops all: they learn of it at the same `poll`,
    one or two steps later, so that none of them waits in a step for another that has stopped. Use
    as a context manager: the old handlers come back at its end.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._received: int | None = None
        self._largest = LargestOfAll() if jax.process_count() > 1 else None
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def requested(self) -> bool:
        """Whether the run should end."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: 143 for SIGTERM, 130 for SIGINT."""
        assert self.signal is not None
        return 128 + self.signal

    def poll(self) -> None:
        """Tells the other processes of a signal, and learns of theirs."""
        if self._largest is not None and self.signal is None:
            self.signal = self._largest(self._received or 0) or None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._received is not None:
            os._exit(128 + number)
        self._received = number
        if self._largest is None:
            self.signal = number
