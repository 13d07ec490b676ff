"""Where a run's time went, phase by phase. Knows no JAX."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds spent in each phase of a run; `with clock("step"): ...`.

    A phase inside another is booked once, to the inner one. `seconds()` adds the rest of the time
    since the clock was made as "other".
    """

    PHASES = ("init", "compile", "data", "step", "eval", "checkpoint", "sample")

    def __init__(self) -> None:
        self._start = self._mark = time.perf_counter()
        self._spent: dict[str, float] = {phase: 0.0 for phase in self.PHASES}
        self._open: list[str] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Books the time inside the `with` block to `phase`; ValueError for an unknown one."""
        if phase not in self._spent:
            raise ValueError(f"{phase=} must be one of {', '.join(self.PHASES)}")
        self._book()
        self._open.append(phase)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    @property
    def phase(self) -> str:
        """The innermost phase now open, or "other"."""
        return self._open[-1] if self._open else "other"

    def seconds(self) -> dict[str, float]:
        """Seconds by phase up to now, and "other"; they add up to the time since the start."""
        self._book()
        total = self._mark - self._start
        return {**self._spent, "other": total - sum(self._spent.values())}

    def _book(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._spent[self._open[-1]] += now - self._mark
        self._mark = now
