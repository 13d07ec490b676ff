"""One pipeline's idle time and peaks: simulated, extrapolated when long, or by the formulas."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from dsv3_jax.analysis import latency
from dsv3_jax.parallel.schedules import make_schedule
from dsv3_jax.parallel.ticks import made_for_ticks, unit_ticks
from dsv3_jax.parallel.timeline import Durations, simulate


@dataclass(frozen=True)
class Pipeline:
    """What the rank that idles longest does: FB pairs, F, I and W on their own, and its bubble."""

    pairs: int
    alone: dict[str, int]
    bubble: float
    peak_activations: tuple[int, ...]


def seconds_in_ticks(
    schedule: str, ranks: int, count: int, durations: Durations, whole: bool = False
) -> float:
    """How long the micro-batches take where ranks meet after each F, I and W (parallel/ticks.py).

    A tick is as long as the slowest of its ranks, and a transfer follows it. whole: I and W of a
    schedule's B are one tick. ValueError for "dualpipe", which holds every stage on two ranks.
    """
    ticks = unit_ticks(made_for_ticks(make_schedule(schedule, ranks, count)), whole)
    longest = sum(max(durations.of(action.op) for action in row if action) for row in ticks)
    return longest + (len(ticks) - 1) * durations.transfer


def run(schedule: str, ranks: int, count: int, durations: Durations) -> Pipeline:
    """The simulation, of at most eight micro-batches a stage: what comes after repeats.

    With transfers the bubble grows with every micro-batch, at a rate that the second half of the
    simulated ones shows.
    """
    folded = schedule == "dualpipev"
    enough = 8 * ranks * (2 if folded else 1)
    if count <= enough:
        return run_whole(schedule, ranks, count, durations)
    half = run_whole(schedule, ranks, enough // 2, durations)
    whole = run_whole(schedule, ranks, enough, durations)
    rest = count - enough
    growth = (whole.bubble - half.bubble) / (enough - enough // 2)
    passes = rest * (2 if folded else 1)
    paired = schedule.startswith("dualpipe")
    return Pipeline(
        whole.pairs + (passes if paired else 0),
        {op: n + (0 if paired else passes) for op, n in whole.alone.items()},
        whole.bubble + growth * rest,
        whole.peak_activations,
    )


def run_whole(schedule: str, ranks: int, count: int, durations: Durations) -> Pipeline:
    """The simulation of every micro-batch, seen from the rank that idles longest."""
    made = make_schedule(schedule, ranks, count)
    timeline = simulate(made, durations)
    rank = int(np.argmax(timeline.bubbles))
    alone = Counter(part.op for a in made.actions[rank] if a.op != "FB" for part in a.parts)
    pairs = sum(a.op == "FB" for a in made.actions[rank])
    return Pipeline(pairs, dict(alone), timeline.bubbles[rank], timeline.peak_activations)


def from_formulas(schedule: str, ranks: int, count: int, durations: Durations) -> Pipeline:
    """The published bubbles and peaks; DualPipe leaves about `ranks` micro-batches unpaired.

    DualPipeV's and interleaved 1F1B's micro-batches pass each rank twice, so counts are doubled.
    """
    passes = count * (2 if schedule in ("dualpipev", "interleaved") else 1)
    stages = ranks * (2 if schedule == "dualpipev" else 1)
    pair = durations.of("FB")
    bubble = latency.bubble_seconds(
        schedule,
        stages,
        durations.forward,
        durations.backward,
        durations.weight_backward,
        pair,
    )
    bubble += 2 * (ranks - 1) * durations.transfer
    if schedule.startswith("dualpipe"):
        pairs, peaks = passes - stages, (stages + 1,) * ranks
    elif schedule == "1f1b":
        pairs, peaks = 0, tuple(min(ranks - r, count) for r in range(ranks))
    elif schedule == "eager_1f1b":
        pairs, peaks = 0, tuple(min(2 * (ranks - r) - 1, count) for r in range(ranks))
    elif schedule == "interleaved":
        pairs, peaks = 0, tuple(min(3 * ranks - 2 * r - 1, passes) for r in range(ranks))
    else:
        pairs, peaks = 0, (min(ranks, count),) * ranks
    return Pipeline(pairs, dict.fromkeys("FIW", passes - pairs), bubble, peaks)
