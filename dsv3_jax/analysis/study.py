"""A study: rows of numbers to print and panels to draw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.analysis.output import COLOURS, new_figure, save_figure


@dataclass(frozen=True)
class Panel:
    """One set of axes: a line or a group of bars for each entry of `series`."""

    title: str
    x_label: str
    y_label: str
    x: tuple[Any, ...]
    series: dict[str, list[float]]
    bars: bool = False
    log: bool = False


@dataclass(frozen=True)
class Study:
    """The answer to one question, as rows of numbers and as panels."""

    name: str
    recommendations: tuple[int, ...]
    headers: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    panels: tuple[Panel, ...]


def plot_study(study: Study, path: str | Path) -> Path:
    """The path of a PNG of the study's panels, side by side."""
    count = len(study.panels)
    figure, axes = new_figure(columns=count, width=3.8 * count + 1.6, height=3.4)
    for panel, ax in zip(study.panels, np.atleast_1d(axes)):
        positions = np.arange(len(panel.x))
        for i, (name, values) in enumerate(panel.series.items()):
            colour = COLOURS[i % len(COLOURS)]
            if panel.bars:
                width = 0.8 / len(panel.series)
                shift = (i - (len(panel.series) - 1) / 2) * width
                ax.bar(positions + shift, values, width * 0.92, color=colour, label=name)
            else:
                ax.plot(positions, values, "o-", color=colour, label=name)
        ax.set_xticks(positions, [str(v) for v in panel.x])
        ax.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        ax.grid(axis="x", visible=False)
        if panel.log:
            ax.set_yscale("log")
        else:
            room = 1.35 if panel.bars and len(panel.series) > 1 else 1.08  # for the legend
            ax.set_ylim(0, room * max(max(values) for values in panel.series.values()))
        if len(panel.series) > 1 and panel.bars:
            ax.legend()
        elif len(panel.series) > 1:  # below: lines may go anywhere inside
            below = {"bbox_to_anchor": (0.5, -0.2), "ncol": len(panel.series), "fontsize": 8}
            ax.legend(loc="upper center", columnspacing=1, handlelength=1.2, **below)
    return save_figure(figure, path)
