"""Stopping on request: SIGTERM and SIGINT end the run at the next step, with the state saved.

Python runs a signal's handler in the main thread, between two bytecodes: during a compilation that
is minutes later. So a thread of our own is told of every signal by the interpreter's wake-up file,
and says at once that it was heard and what happens next.
"""

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

from dsv3_jax.parallel.hosts import LargestOfAll
from dsv3_jax.training.clock import Clock

log = logging.getLogger(__name__)

HEARD = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """Raised by a signal while there is nothing to save; `code` is the exit code."""


class StopRequest:
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once.

    Call `poll` once a step, and look at `requested` between steps and between validation batches.
    With several processes a signal to any of them stops all: they learn of it at the same `poll`,
    one or two steps later, so that none of them waits in a step for another that has stopped.
    Outside of `requests()`, before and after the loop, a signal raises Stopped instead. Use as a
    context manager: the old handlers come back at its end.
    """

    def __init__(self, clock: Clock) -> None:
        self.signal: int | None = None
        self._requests = False
        self._clock = clock
        self._received: int | None = None
        self._told = threading.Event()
        self._largest = LargestOfAll() if jax.process_count() > 1 else None
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(
            target=self._listen, args=(reader,), name="signals", daemon=True
        )
        self._thread.start()
        for number in HEARD:
            self._old[number] = signal.signal(number, self._handle)
        self._old_file = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old_file)
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self._writer)  # ends the thread, once it has read what was written
        self._thread.join()

    @property
    def requested(self) -> bool:
        """Whether the run should end."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: 143 for SIGTERM, 130 for SIGINT."""
        assert self.signal is not None
        return 128 + self.signal

    @contextmanager
    def requests(self) -> Iterator[None]:
        """Inside, a signal only requests: to end after a step, saved, or a compilation."""
        self._requests = True
        try:
            yield
        finally:
            self._requests = False

    def poll(self) -> None:
        """Tells the other processes of a signal, and learns of theirs."""
        if self._largest is not None and self.signal is None:
            self.signal = self._largest(self._received or 0) or None

    def _listen(self, reader: int) -> None:
        """In a thread: each signal's number is a byte of the wake-up file."""
        while numbers := os.read(reader, 1):
            if numbers[0] in HEARD:
                self._hear(numbers[0])
        os.close(reader)

    def _hear(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._received is not None:
            print(f"{name} again: ending at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self._received = number
        if self._largest is None:
            self.signal = number
        log.warning("%s heard: %s", name, self._what_next())
        self._told.set()

    def _what_next(self) -> str:
        if not self._requests:
            return "nothing is left to save, the run ends"
        what = "after this step the run saves its state and ends"
        if self._clock.phase == "compile":
            what = "a step is being compiled, which cannot be interrupted; after that the run ends"
        return f"{what}. A second signal ends it at once, without saving"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requests:
            return
        self._told.wait(20)  # on a machine short of memory 2 s were not enough
        if _would_not_arrive(frame):
            os._exit(128 + number)
        raise Stopped(128 + number)


def _would_not_arrive(frame: FrameType | None) -> bool:
    """Whether an exception raised here would not reach `main` as it is.

    Out of an event loop, as orbax' reading is one, it comes with pages of others; Python prints and
    forgets what a callback of the garbage collector, a finalizer or a weak reference raises.
    """
    of_collector = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        code = frame.f_code
        if "asyncio" in code.co_filename or code.co_filename.endswith("weakref.py"):
            return True
        if code.co_name == "__del__" or code in of_collector:
            return True
        frame = frame.f_back
    return False
