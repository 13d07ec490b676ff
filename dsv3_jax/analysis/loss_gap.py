"""How far one training recipe's loss lies from another's: smoothed curves, relative gaps, a plot.

The measure is the V3 report's (section 3.3, appendix B.1): losses smoothed by an exponential moving
average with coefficient 0.9, compared run by run on the same data. It found FP8 within 0.25 % of
BF16. In a notebook, `plot_loss_gap(read_losses(folder))` draws what examples/fp8_loss_gap.py made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.analysis.output import COLOURS, new_figure
from dsv3_jax.config import UserError

EMA = 0.9
PAPER_BOUND = 0.25  # percent
BASELINE = "bf16"

# Next-token losses (nats a token) by preset, then by seed.
Losses = Mapping[str, Mapping[int, Sequence[float]]]


def read_losses(folder: str | Path) -> dict[str, dict[int, list[float]]]:
    """What `PRESET-seedN.jsonl` files in a folder hold, of runs that are still going too.

    Raises UserError when there is none.
    """
    losses: dict[str, dict[int, list[float]]] = {}
    for path in sorted(Path(folder).glob("*-seed*.jsonl")):
        preset, _, seed = path.stem.rpartition("-seed")
        run = read_run(path)[1]
        if run:
            losses.setdefault(preset, {})[int(seed)] = run
    if not losses:
        raise UserError(f"{folder}: no PRESET-seedN.jsonl there")
    return losses


def read_run(path: Path) -> tuple[dict[str, Any], list[float]]:
    """A run's config and its losses so far: the first line, and the "ce" of the others.

    Both empty when the run has not written its first line.
    """
    header, *lines = map(json.loads, path.read_text().splitlines() or ['{"config": {}}'])
    return header["config"], [loss for line in lines for loss in line["ce"]]


def smooth(losses: Sequence[float], coefficient: float = EMA) -> np.ndarray:
    """The exponential moving average of the losses, starting at the first one."""
    smoothed = np.array(losses, np.float64)
    for i in range(1, len(smoothed)):
        smoothed[i] = coefficient * smoothed[i - 1] + (1 - coefficient) * smoothed[i]
    return smoothed


def relative_gap(losses: Sequence[float], baseline: Sequence[float]) -> np.ndarray:
    """100 (smoothed - smoothed baseline) / smoothed baseline, for the steps that both have."""
    steps = min(len(losses), len(baseline))
    return 100 * (smooth(losses[:steps]) / smooth(baseline[:steps]) - 1)


def last_quarter(gap: np.ndarray) -> float:
    """The mean over the last quarter of the steps, one at least."""
    return float(gap[-max(len(gap) // 4, 1) :].mean())


def gaps_of(losses: Losses, preset: str) -> dict[int, float]:
    """The last quarter's gap to the baseline in percent, per seed that both have run."""
    baseline = losses[BASELINE]
    return {
        seed: last_quarter(relative_gap(run, baseline[seed]))
        for seed, run in losses[preset].items()
        if seed in baseline
    }


def plot_loss_gap(losses: Losses) -> Any:
    """A figure: smoothed losses to the left, their gap to bf16 in percent to the right.

    A colour a preset, a line a seed, and their mean gap as a thick line. `save_figure` writes it;
    a notebook shows it. Raises UserError without matplotlib or without runs of bf16.
    """
    if BASELINE not in losses:
        raise UserError(f"no {BASELINE} among {sorted(losses)}: nothing to compare with")
    figure, (left, right) = new_figure(columns=2, width=10, height=3.8)
    right.axhspan(-PAPER_BOUND, PAPER_BOUND, color=COLOURS[6], alpha=0.15, label="0.25 %, V3's")
    right.axhline(0, color=COLOURS[6], linewidth=0.8)
    reach = 1.0
    for preset, colour in zip(losses, COLOURS):
        runs = losses[preset]
        for seed, run in runs.items():
            label = preset if seed == min(runs) else None
            left.plot(smooth(run), color=colour, linewidth=0.8, label=label)
        if preset == BASELINE:
            continue
        shared = [seed for seed in runs if seed in losses[BASELINE]]
        gaps = [relative_gap(runs[seed], losses[BASELINE][seed]) for seed in shared]
        if not gaps:
            continue
        for gap in gaps:
            right.plot(gap, color=colour, linewidth=0.7, alpha=0.5)
            reach = max(reach, 1.05 * float(np.abs(gap).max()))
        steps = min(map(len, gaps))
        mean = np.mean([gap[:steps] for gap in gaps], axis=0)
        seeds = f"mean of {len(gaps)} seeds" if len(gaps) > 1 else "one seed"
        right.plot(mean, color=colour, linewidth=1.8, label=f"{preset}, {seeds}")
    left.set(title="Loss, EMA 0.9", xlabel="step", ylabel="cross-entropy [nats/token]")
    right.set(title=f"Gap to {BASELINE}", xlabel="step", ylabel="percent", ylim=(-reach, reach))
    left.legend()
    right.legend()
    return figure
