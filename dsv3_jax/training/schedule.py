"""The paper's schedules (V3 report, section 4.2): learning rate, batch size, gamma, lambda.

Everything is planned on the host before the first step, in NumPy f64; a step gets its numbers as
arguments, so that no schedule is compiled in and a resumed run sees the same ones. Phases are
fractions of the run's tokens, 14.8T in the paper.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import Config, OptimizerConfig, ScheduleConfig


class StepSettings(NamedTuple):
    """What one step is told."""

    learning_rate: Any  # f32 scalars, on the host or traced
    bias_update_speed: Any  # gamma
    mtp_loss_weight: Any  # lambda
    num_micro_batches: Any  # int32


class Schedule:
    """The plan of a whole run."""

    def __init__(self, config: Config):
        train = config.train
        self._optimizer, self._schedule = config.optimizer, config.schedule
        self.micro_batch_size = train.micro_batch_size or train.batch_size
        self.max_micro_batches = train.batch_size // self.micro_batch_size
        batch_sizes = plan_batch_sizes(config.schedule, train.steps, train.batch_size)
        micro_batches = np.maximum(np.rint(batch_sizes / self.micro_batch_size), 1)
        self.micro_batches = micro_batches.astype(np.int64)
        rows = self.micro_batches * self.micro_batch_size
        self._rows_before = np.concatenate([[0], np.cumsum(rows)])
        self.tokens_per_row = train.seq_len

    def settings(self, step: int) -> StepSettings:
        """What step number `step` (from 0) is told."""
        done = self._rows_before[step] / self._rows_before[-1]
        plan = self._schedule
        late = done >= plan.mtp_switch
        return StepSettings(
            np.float32(learning_rate(self._optimizer, plan, step, done)),
            np.float32(plan.bias_update_speed if done < plan.bias_update_end else 0.0),
            np.float32(plan.mtp_loss_weight_final if late else plan.mtp_loss_weight),
            np.int32(self.micro_batches[step]),
        )

    def first_row(self, step: int) -> int:
        """How many rows all earlier steps read: where this step's begin."""
        return int(self._rows_before[step])

    def rows(self, step: int) -> int:
        """Sequences of this step: its batch size."""
        return int(self._rows_before[step + 1] - self._rows_before[step])

    def tokens(self, step: int) -> int:
        """Tokens that all earlier steps trained on."""
        return self.first_row(step) * self.tokens_per_row


def learning_rate(
    optimizer: OptimizerConfig, plan: ScheduleConfig, step: int, done: float
) -> float:
    """The rate of step number `step` (from 0), when a fraction `done` of the tokens lies behind it.

    Linear warm-up over warmup_steps (the first step already moves), the peak, a cosine to
    decay_ratio of it, that plateau, and final_ratio for the last tokens.
    """
    if done >= plan.final_start:
        ratio = plan.final_ratio
    elif done >= plan.decay_end:
        ratio = plan.decay_ratio
    elif done > plan.decay_start:
        phase = (done - plan.decay_start) / (plan.decay_end - plan.decay_start)
        ratio = plan.decay_ratio + (1 - plan.decay_ratio) * 0.5 * (1 + math.cos(math.pi * phase))
    else:
        ratio = 1.0
    warmup = min(1.0, (step + 1) / plan.warmup_steps) if plan.warmup_steps else 1.0
    return optimizer.learning_rate * ratio * warmup


def plan_batch_sizes(plan: ScheduleConfig, steps: int, batch_size: int) -> np.ndarray:
    """Sequences of each step before rounding to micro-batches, f64 [steps].

    From batch_start_ratio of the full size, linear in the tokens seen until batch_ramp_end of the
    run's tokens (the paper says "gradually"; the shape of the ramp is not published).
    """
    start = plan.batch_start_ratio * batch_size
    if start >= batch_size or plan.batch_ramp_end <= 0:
        return np.full(steps, float(batch_size))
    total = float(steps * batch_size)
    sizes = np.full(steps, float(batch_size))
    for _ in range(8):  # the ramp's end depends on the total, which depends on the ramp
        # Linear in tokens seen means exponential in steps: rows(s) = start * growth**s.
        ramp_rows = plan.batch_ramp_end * total
        growth = 1 + (batch_size - start) / ramp_rows
        exponent = np.minimum(np.arange(steps) * math.log(growth), math.log(batch_size / start))
        sizes = start * np.exp(exponent)
        if sizes.sum() == total:
            break
        total = float(sizes.sum())
    return sizes
