"""Which states of a run can be trusted, and what becomes of its checkpoints when it diverges.

The metrics of a step speak of the state before it. A step that is applied, with a loss as the run
usually has, shows that the state it began with was good; one that is skipped, its loss or gradient
not finite, may mean that the update before it was ruinous. So nothing is saved, and no older
checkpoint removed, while steps are skipped; the newest checkpoint that such an ordinary step has
followed always stays; and those after it are set aside when the run ends by too many skipped steps.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable

from dsv3_jax.config import RunError
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.step import StepMetrics

log = logging.getLogger(__name__)

REMEMBERED = 100  # ordinary losses that the next one is compared with


class NonFiniteLoss(RunError):
    """Too many steps in a row had a loss or gradient that was not finite."""


def is_ordinary(loss: float, recent: Iterable[float]) -> bool:
    """Whether a loss is finite and at most twice the median of the recent ones, plus 1 nat.

    A ruinous update shows as inf, or as tens or thousands of nats; single hard batches do not.
    Without recent losses any finite one will do.
    """
    recent = list(recent)
    return math.isfinite(loss) and (not recent or loss <= 2 * statistics.median(recent) + 1)


class LossGuard:
    """Call `see` once a step, in order, and ask `may_save` before each save.

    `recent`: the ordinary losses before this process began, newest last, as a checkpoint keeps
    them. Raises NonFiniteLoss after `limit` skipped steps in a row, from `see` and `may_save`; its
    message names a checkpoint that was verified and lies before the damage.
    """

    def __init__(self, checkpoints: Checkpoints, limit: int, recent: Iterable[float] = ()):
        self.recent: deque[float] = deque(recent, maxlen=REMEMBERED)
        self._checkpoints, self._limit = checkpoints, limit
        self._waiting: tuple[int, StepMetrics] | None = None
        self._skipped, self._ordinary = 0, True
        self._owed = False  # a save that had to wait

    def see(self, step: int, metrics: StepMetrics, *, ready: bool) -> None:
        """Takes the metrics of step number `step` (from 0).

        They are read now if `ready`, and with the next step's otherwise: no device has to wait.
        """
        self._read()
        self._waiting = step, metrics
        if ready:
            self._read()

    def may_save(self, done: int, *, due: bool, last: bool) -> bool:
        """Whether to save the state after `done` steps: if it is due, or was while it could not be.

        Raises NonFiniteLoss when the `last` step of the run was skipped.
        """
        self._owed = self._owed or due
        if not self._owed:
            return False
        self._read()
        if self._skipped and last:
            raise self._diverged()
        if self._skipped:
            if due:
                log.warning("step %d was skipped: its state is not saved", done)
            return False
        if not self._ordinary:
            log.warning(
                "the loss of step %d is far above the usual one of %.4g: its checkpoint is saved, "
                "and the newest one before the rise is kept",
                *(done, statistics.median(self.recent)),
            )
        self._owed = False
        return True

    def _read(self) -> None:
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        # int() first: a comparison of arrays would wait in the device's queue behind the next step.
        self._skipped, loss = int(metrics.skipped_in_row), float(metrics.loss)
        self._ordinary = not self._skipped and is_ordinary(loss, self.recent)
        if self._ordinary:
            self.recent.append(loss)
            self._checkpoints.trust(step)
        if self._skipped >= self._limit:
            raise self._diverged()

    def _diverged(self) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"loss or gradient was not finite in {self._skipped} steps in a row; none of them was "
            f"applied, and none saved. {self._checkpoints.leave_damage_behind()}"
        )
