"""Notices a run that hangs: a thread that writes every stack to a file when no step comes."""

import faulthandler
import logging
import os
import statistics
import threading
import time
from collections import deque
from pathlib import Path

from dsv3_jax.config import WatchdogConfig
from dsv3_jax.parallel.hosts import file_name

log = logging.getLogger(__name__)

EXIT_STUCK = 124  # that of timeout(1)


class Watchdog:
    """Use as a context manager, and call `beat` once a step.

    The run counts as stuck when no beat has come for both limits of its config. Then all threads'
    stacks go to RUN/stacks.txt (stacks.N.txt of process N), once until the next beat, and with
    `exit` the process ends with code 124: a hung collective cannot be interrupted. The first limit
    counts from the start; around a compilation, which has no beats, it must be longer than that.
    """

    def __init__(self, config: WatchdogConfig, run_dir: str | Path):
        self._config, self._file = config, Path(run_dir) / file_name("stacks.txt")
        self._intervals: deque[float] = deque(maxlen=101)
        self._last, self._told, self._beats = time.monotonic(), False, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        if self._config.min_seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self) -> None:
        """A step has been made."""
        now = time.monotonic()
        if self._beats:  # what comes before the first one is no step
            self._intervals.append(now - self._last)
        self._last, self._told, self._beats = now, False, self._beats + 1

    def limit(self) -> float:
        """Seconds without a beat after which the run counts as stuck."""
        median = statistics.median(self._intervals) if self._intervals else 0.0
        return max(self._config.min_seconds, self._config.median_steps * median)

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self._config.min_seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self.limit() and not self._told:
                self._told = True
                self._dump(silent)

    def _dump(self, silent: float) -> None:
        with self._file.open("a") as file:
            file.write(f"--- {time.strftime('%F %T')}: no step for {silent:.0f} s\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        log.error("no step for %.0f s: the stacks are in %s", silent, self._file)
        if self._config.exit:
            logging.shutdown()
            os._exit(EXIT_STUCK)
