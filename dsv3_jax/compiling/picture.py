"""The picture of a compiled program: memory against capacity, and bytes by mesh axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv3_jax.analysis.hardware import Accelerator
from dsv3_jax.analysis.output import COLOURS, new_figure, save_figure
from dsv3_jax.compiling.text import GB, GIB, by_axes


def draw(report: Any, device: Accelerator, path: str | Path) -> Path:
    """Writes the picture of a Report as PNG; UserError without matplotlib."""
    figure, (left, right) = new_figure(columns=2, width=11, height=4.0)
    held = {"arguments": report.arguments, "made by the program": report.peak - report.arguments}
    start = 0.0
    for colour, (name, size) in zip(COLOURS, held.items()):
        left.barh(0, size / GIB, left=start, color=colour, label=f"{name}, {size / GIB:.1f} GiB")
        start += size / GIB
    capacity = report.capacity / GIB
    left.axvline(capacity, color=COLOURS[6], linestyle="--", label=f"capacity, {capacity:.1f} GiB")
    largest = report.buffers[:6][::-1]
    left.barh(
        range(-len(largest), 0), [b.num_bytes / GIB for b in largest], color=COLOURS[5], height=0.6
    )
    left.set_yticks(
        range(-len(largest), 1),
        [*[_short(b.what) for b in largest], "peak"],
        fontsize=7,
    )
    left.grid(axis="y", visible=False)
    left.set(title=f"{report.topology}: memory of a device", xlabel="GiB")
    left.legend(fontsize=8, loc="lower right")

    groups = [] if report.program is None else list(by_axes(report.program.collectives).items())[:8]
    names, ops = [], sorted({op for (_, op), _ in groups})
    for y, ((axes, op), each) in enumerate(groups):
        beside = sum(c.total for c in each if c.covered) / GB
        total = sum(c.total for c in each) / GB
        colour = COLOURS[ops.index(op) % len(COLOURS)]
        right.barh(y, beside, color=colour)
        right.barh(y, total - beside, left=beside, color=colour, alpha=0.45)
        names.append(f"{' + '.join(axes)}\n{op}")
    right.set_yticks(range(len(groups)), names, fontsize=7)
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set(
        title="Sent by a device (full colour: beside products)",
        xlabel="GB in one run of the program",
    )
    return save_figure(figure, path)


def _short(text: str, width: int = 46) -> str:
    return text if len(text) <= width else text[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"
