"""The plots of `estimate`, `plan`, `simulate` and `reproduce`, each one PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.analysis.memory import Memory
from dsv3_jax.analysis.network import Outcome
from dsv3_jax.analysis.output import COLOURS, new_figure, save_figure
from dsv3_jax.analysis.planner import Plan, Search
from dsv3_jax.analysis.reproduce import Row
from dsv3_jax.analysis.serving import DecodeEstimate


def plot_estimate(
    parts: dict[str, dict[str, float]], memory: dict[str, Memory], capacity: float, path: str | Path
) -> Path:
    """Where the time and the memory go: a stacked bar each for training and decoding."""
    figure, (left, right) = new_figure(columns=2, width=10, height=4.2)
    for ax, bars in ((left, parts), (right, {k: vars(m) for k, m in memory.items()})):
        scale = 1e9 if ax is right else 1.0
        for y, (name, values) in enumerate(bars.items()):
            total = sum(values.values())
            start = 0.0
            for i, (part, value) in enumerate(values.items()):
                if value <= 0:
                    continue
                # Time as a share of its own total: a step lasts seconds, a token milliseconds.
                width = value / (total if ax is left else scale)
                label = f"{name}: {part}" if value > 0.01 * total else None
                colour = COLOURS[i % len(COLOURS)]
                ax.barh(
                    y,
                    width,
                    left=start,
                    color=colour,
                    alpha=1 - 0.4 * (i >= len(COLOURS)),
                    edgecolor="white",
                    label=label,
                )
                start += width
        ax.set_yticks(range(len(bars)), list(bars))
        ax.grid(axis="y", visible=False)
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(
            handles,
            labels,
            fontsize=7,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
            ncol=2,
            frameon=False,
        )
    left.set(title="Time", xlabel="share of the step or token")
    right.axvline(capacity / 1e9, color=COLOURS[6], linestyle="--")
    right.set(title="Memory of the busiest device", xlabel="GB (dashed: what it has)")
    return save_figure(figure, path)


def plot_plans(search: Search, path: str | Path) -> Path:
    """The best plans' time, part by part."""
    figure, ax = new_figure(width=9, height=1.6 + 0.7 * len(search.plans))
    start = np.zeros(len(search.plans))
    for i, name in enumerate(search.plans[0].estimate.parts):
        values = np.array([plan.estimate.parts.get(name, 0.0) for plan in search.plans])
        colour, pale = COLOURS[i % len(COLOURS)], 0.5 if i >= len(COLOURS) else 1.0
        ax.barh(np.arange(len(values)), values, left=start, color=colour, alpha=pale, label=name)
        start += values
    names = [
        textwrap.fill(describe_plan(plan), 30, break_on_hyphens=False) for plan in search.plans
    ]
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(title="Best plans", xlabel="seconds a step, or a token when decoding")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return save_figure(figure, path)


def describe_mesh(mesh: Any, schedule: str = "") -> str:
    """The axes that are larger than one, as in "pipe 16, data 2"."""
    axes = [f"{axis} {size}" for axis, size in vars(mesh).items() if size > 1]
    return ", ".join(axes + ([schedule] if schedule else [])) or "one device"


def describe_plan(plan: Plan) -> str:
    """Its mesh, and what tells it from other plans of that mesh."""
    mesh = describe_mesh(plan.mesh, plan.schedule if plan.mesh.pipe > 1 else "")
    if isinstance(plan.estimate, DecodeEstimate):
        return f"{mesh}, batch {plan.batch}"
    return f"{mesh}, {plan.state}, micro-batch {plan.micro_batch_size}, remat {plan.remat}"


def plot_outcome(outcome: Outcome, title: str, path: str | Path) -> Path:
    """When flows end, and how busy the links that carry anything are."""
    figure, (left, right) = new_figure(columns=2, width=9, height=3.4)
    ends = np.sort(outcome.finish) * 1e3
    left.step(
        np.append(ends, ends[-1:]), np.linspace(0, 1, ends.size + 1), where="post", color=COLOURS[0]
    )
    left.set(title=title, xlabel="ms", ylabel="flows that have ended", ylim=(0, 1.02))
    left.set_xlim(left=0)
    used = outcome.utilisation[outcome.utilisation > 0]
    right.hist(100 * used, bins=np.linspace(0, 100, 26), color=COLOURS[1])
    right.set(title="Links", xlabel="% of capacity used until the end", ylabel="links")
    return save_figure(figure, path)


def plot_rows(rows: Sequence[Row], path: str | Path) -> Path:
    """Ours over the paper's for every compared value, table by table."""
    figure, ax = new_figure(width=9, height=4.2)
    tables = list(dict.fromkeys(row.table for row in rows))
    for i, row in enumerate(rows):
        colour = COLOURS[tables.index(row.table) % 2]
        ax.plot(i, 100 * (row.ratio - 1), "o" if row.ok else "X", color=colour, markersize=4)
        ax.vlines(i, -100 * row.tolerance, 100 * row.tolerance, color=colour, alpha=0.25, lw=3)
    middles = [np.mean([i for i, r in enumerate(rows) if r.table == table]) for table in tables]
    ax.set_xticks(middles, tables, rotation=40, ha="right", fontsize=8)
    ax.grid(axis="x", visible=False)
    ax.set(title="Ours over the paper's (bars: tolerance)", ylabel="% off", ylim=(-6, 6))
    return save_figure(figure, path)
