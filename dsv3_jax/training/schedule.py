"""The paper's schedules (V3 report, section 4.2): learning rate, batch size, gamma, lambda.

Everything is planned on the host before the first step, in NumPy f64; a step gets its numbers as
arguments, so that no schedule is compiled in and a resumed run sees the same ones. Phases are
fractions of the plan's tokens, 14.8T in the paper.

A plan begins somewhere: at step 0, or where a run was resumed with another length, batch or
sequence. From there on it is told in what was really read, so that no row is read twice and the
tokens never fall.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import Config, OptimizerConfig, ScheduleConfig


class StepSettings(NamedTuple):
    """The numbers that a step takes from the schedules, on the host or traced.

    Fields:
        learning_rate: f32 scalar; updates are multiplied by it.
        bias_update_speed: f32 scalar, gamma: what a router's bias moves by in a step.
        mtp_loss_weight: f32 scalar, lambda.
        num_micro_batches: int32 scalar: how many of the A micro-batches given the step reads.

    Source: V3 report, section 4.2.
    """

    learning_rate: Any
    bias_update_speed: Any
    mtp_loss_weight: Any
    num_micro_batches: Any


class Position(NamedTuple):
    """How far a run has come, before its step number `step` (from 0)."""

    step: int = 0
    row: int = 0  # the next one of the data's stream
    tokens: int = 0  # trained on


START = Position()


class Schedule:
    """The plan of a run from `begun` on; steps count from the run's own start.

    It is `schedule.steps` long, or `train.steps`; past its end the last phase goes on. Source: V3
    report, section 4.2.
    """

    def __init__(self, config: Config, begun: Position = START):
        train = config.train
        self._optimizer, self._schedule = config.optimizer, config.schedule
        self.begun, self.tokens_per_row = begun, train.seq_len
        self.micro_batch_size = config.micro_batch_size
        self.max_micro_batches = train.batch_size // self.micro_batch_size
        planned = max((config.schedule.steps or train.steps) - begun.step, 0)
        behind = begun.tokens / train.seq_len
        sizes = plan_batch_sizes(config.schedule, planned, train.batch_size, behind)
        past = max(train.steps - begun.step - planned, 0)
        sizes = np.concatenate([sizes, np.full(past, float(train.batch_size))])
        micro_batches = np.maximum(np.rint(sizes / self.micro_batch_size), 1)
        self.micro_batches = micro_batches.astype(np.int64)
        rows = self.micro_batches * self.micro_batch_size
        self._rows_before = np.concatenate([[0], np.cumsum(rows)])
        self._planned_tokens = self.tokens(begun.step + planned)

    def settings(self, step: int) -> StepSettings:
        """The settings of step number `step` (from 0)."""
        done = self.tokens(step) / max(self._planned_tokens, 1)
        plan = self._schedule
        late = done >= plan.mtp_switch
        return StepSettings(
            np.float32(learning_rate(self._optimizer, plan, step, done)),
            np.float32(plan.bias_update_speed if done < plan.bias_update_end else 0.0),
            np.float32(plan.mtp_loss_weight_final if late else plan.mtp_loss_weight),
            np.int32(self.rows(step) // self.micro_batch_size),
        )

    def first_row(self, step: int) -> int:
        """Where this step's rows begin in the data's stream: behind those of all earlier steps."""
        return self.begun.row + self._rows_since(step)

    def rows(self, step: int) -> int:
        """Sequences of this step: its batch size."""
        return self._rows_since(step + 1) - self._rows_since(step)

    def tokens(self, step: int) -> int:
        """Tokens that all earlier steps trained on."""
        return self.begun.tokens + self._rows_since(step) * self.tokens_per_row

    def position(self, step: int) -> Position:
        """Where the run is before this step."""
        return Position(step, self.first_row(step), self.tokens(step))

    def _rows_since(self, step: int) -> int:
        """Rows read since the plan began; beyond its last step, batches are full."""
        assert step >= self.begun.step, f"step {step} lies before the plan, {self.begun}"
        steps = step - self.begun.step
        beyond = max(steps - len(self.micro_batches), 0)
        full = self.max_micro_batches * self.micro_batch_size
        return int(self._rows_before[steps - beyond]) + beyond * full


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


def plan_batch_sizes(
    plan: ScheduleConfig, steps: int, batch_size: int, behind: float = 0.0
) -> np.ndarray:
    """Sequences of each step before rounding to micro-batches, f64 [steps].

    From batch_start_ratio of the full size, linear in the tokens seen until batch_ramp_end of the
    plan's tokens (the paper says "gradually"; the shape of the ramp is not published). `behind`
    sequences have been read before the first of these steps.
    """
    start = plan.batch_start_ratio * batch_size
    if start >= batch_size or plan.batch_ramp_end <= 0 or not steps:
        return np.full(steps, float(batch_size))
    total = behind + float(steps * batch_size)
    sizes = np.full(steps, float(batch_size))
    for _ in range(8):  # the ramp's end depends on the total, which depends on the ramp
        # Linear in tokens seen means exponential in steps: rows(s) = first * growth**s.
        ramp_rows = plan.batch_ramp_end * total
        growth = 1 + (batch_size - start) / ramp_rows
        first = start + (batch_size - start) * min(behind / ramp_rows, 1.0)
        exponent = np.minimum(np.arange(steps) * math.log(growth), math.log(batch_size / first))
        sizes = first * np.exp(exponent)
        if behind + sizes.sum() == total:
            break
        total = behind + float(sizes.sum())
    return sizes
