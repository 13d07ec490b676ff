"""Turns what a step returned into one line of metrics.jsonl."""

import resource
import sys
from typing import Any

import jax
import numpy as np

from dsv3_jax.analysis.hardware import peak_bf16_flops
from dsv3_jax.analysis.latency import mfu
from dsv3_jax.training.clock import Clock
from dsv3_jax.training.metrics import expert_stats
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import StepMetrics, router_bias


def step_values(
    state: TrainState, metrics: StepMetrics, schedule: Schedule, step: int
) -> dict[str, Any]:
    """The keys that every line has, of step number `step` (from 0), and those of each MoE layer."""
    told = schedule.settings(step)
    values = {
        "loss": metrics.loss,
        "ce": metrics.terms.ce,
        "mtp": metrics.terms.mtp,
        "balance": metrics.terms.balance,
        "lr": told.learning_rate,
        "grad_norm": metrics.grad_norm,
        "skipped": metrics.skipped,
        "batch_size": schedule.rows(step),
        "tokens": schedule.tokens(step + 1),
        "bias_update_speed": told.bias_update_speed,
        "mtp_loss_weight": told.mtp_loss_weight,
    }
    names = list(metrics.terms.load)
    if names:
        values["expert_rounds"] = metrics.terms.rounds
        loads = [np.atleast_2d(metrics.terms.load[name]) for name in names]
        biases = [np.atleast_2d(router_bias(state.router, n)) for n in names if state.router]
        values |= expert_stats(np.concatenate(loads), np.concatenate(biases) if biases else None)
    return values


class Throughput:
    """Tokens per second between two log steps, without the time of other phases."""

    def __init__(self, clock: Clock, flops_per_token: float, devices: list[jax.Device]):
        self._clock, self._flops_per_token = clock, flops_per_token
        # Of another process' device nothing is known here.
        self._device = next(d for d in devices if d.process_index == jax.process_index())
        self._num_devices, self._peak = len(devices), peak_bf16_flops(devices[0].device_kind)
        self._tokens, self._start = 0, self._seconds()

    def add(self, tokens: int) -> None:
        """Counts the tokens of one step."""
        self._tokens += tokens

    def read(self) -> dict[str, float | None]:
        """tokens_per_s since the last reading, mfu and peak_memory_gib of a device here, and
        host_memory_gib, the most that this process has held.

        mfu and peak_memory_gib are None on a CPU. To be called between steps.
        """
        now = self._seconds()
        seconds, self._start = now - self._start, now
        tokens, self._tokens = self._tokens, 0
        memory = {
            "peak_memory_gib": self._peak_memory_gib(),
            "host_memory_gib": _peak_of_process_gib(),
        }
        if not tokens or seconds <= 0:
            return {"tokens_per_s": None, "mfu": None} | memory
        rate = tokens / seconds
        used = (
            mfu(rate, self._flops_per_token, self._num_devices, self._peak) if self._peak else None
        )
        return {"tokens_per_s": rate, "mfu": used} | memory

    def _peak_memory_gib(self) -> float | None:
        stats = self._device.memory_stats()  # None on a CPU
        return stats["peak_bytes_in_use"] / 2**30 if stats else None

    def _seconds(self) -> float:
        spent = self._clock.seconds()
        return spent["step"] + spent["data"]


def _peak_of_process_gib() -> float:
    """Of resident memory; macOS counts it in bytes, others in KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
