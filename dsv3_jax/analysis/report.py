"""Plots of a run from its metrics.jsonl: loss, learning rate, expert load, where the time went.

Reads files only, so it works on any machine and while the run goes on. Needs matplotlib (the
`plot` extra). Colours are Okabe and Ito's, and the heatmap's two sides are purple and orange: all
can be told apart with any colour vision.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import UserError
from dsv3_jax.config.files import read_config
from dsv3_jax.config.records import read_records

log = logging.getLogger(__name__)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
MAX_LAYERS = 64  # panels of the load heatmap; a deeper model shows this many, evenly chosen
MAX_COLUMNS = 300  # points in time of the load heatmap

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "legend.fontsize": 10,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}


def write_report(run_dir: str | Path) -> list[Path]:
    """The PNG files written to RUN/plots, from RUN/metrics.jsonl.

    loss.png always; learning_rate.png, expert_load.png and time.png when the metrics hold them.
    Raises UserError when there is no such run, nothing in it to plot, or no matplotlib.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'dsv3_jax[plot]'") from error
    name = run_dir.resolve().name
    plots = {
        "loss": _plot_loss,
        "learning_rate": _plot_learning_rate,
        "expert_load": _plot_expert_load,
        "time": _plot_time,
    }
    written = []
    for stem, plot in plots.items():
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(8, 4.5))
            if plot(figure, records, run_dir, name):
                path = run_dir / "plots" / f"{stem}.png"
                path.parent.mkdir(exist_ok=True)
                figure.savefig(path)
                written.append(path)
    if not written:
        raise UserError(f"{run_dir / 'metrics.jsonl'} holds no loss, so there is nothing to plot")
    return written


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl, in order; a line that a crash tore is left out.

    Raises UserError when the run or its metrics do not exist, or hold no line.
    """
    run_dir = Path(run_dir)
    path = run_dir / "metrics.jsonl"
    if not run_dir.is_dir():
        raise UserError(f"no such run: {run_dir}")
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run: it has no metrics.jsonl")
    records, torn = read_records(path)
    if torn:
        log.warning("%s: %d line(s) are not whole and are left out", path, torn)
    if not records:
        raise UserError(f"{path} holds no metrics yet")
    return records


def _series(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have the key; NaN where it is null."""
    having = [r for r in records if key in r]
    steps = np.array([r["step"] for r in having])
    return steps, np.array([math.nan if r[key] is None else r[key] for r in having], float)


def _plot_loss(figure: Any, records: list[dict[str, Any]], run_dir: Path, name: str) -> bool:
    steps, loss = _series(records, "loss")
    if not np.isfinite(loss).any():
        return False
    axes = figure.add_subplot()
    _line(axes, steps, loss, BLUE, "training loss (with MTP and balance terms)")
    ce_steps, ce = _series(records, "ce")
    if np.isfinite(ce).any():
        _line(axes, ce_steps, ce, GREEN, "training cross-entropy")
    val_steps, val = _series(records, "val_loss")
    if np.isfinite(val).any():
        last = _bits_per_byte_axis(axes, records)
        label = "validation cross-entropy" + (
            f" ({last:.3f} bits per byte at the end)" if last else ""
        )
        axes.plot(val_steps, val, "o-", color=ORANGE, markersize=4.5, label=label)
    skipped = steps[~np.isfinite(loss)]
    if skipped.size:
        for step in skipped:
            axes.axvline(step, color=GREY, linewidth=0.8, linestyle=":")
        axes.plot([], [], ":", color=GREY, label=f"not finite ({skipped.size})")
    axes.set(title=f"Loss: {name}", ylabel="nats per token")
    _step_axis(axes)
    _limit_spikes(axes, [loss, ce, val])
    axes.legend()
    return True


def _bits_per_byte_axis(axes: Any, records: list[dict[str, Any]]) -> float | None:
    """The last value, for which a right axis is drawn, lined up with the validation loss.

    Bits per byte are proportional to it as long as the validation data stay the same.
    """
    both = [r for r in records if r.get("val_loss") and r.get("val_bits_per_byte")]
    if not both:
        return None
    ratios = [r["val_bits_per_byte"] / r["val_loss"] for r in both]
    if max(ratios) > 1.01 * min(ratios):  # validation data changed: the two need their own scales
        right = axes.twinx()
        steps, bits = _series(both, "val_bits_per_byte")
        right.plot(steps, bits, "s--", color=GREY, markersize=4)
        right.grid(False)
    else:
        ratio = ratios[-1]
        right = axes.secondary_yaxis(
            "right", functions=(lambda nats: nats * ratio, lambda bits: bits / ratio)
        )
    right.spines["right"].set_visible(True)
    right.set_ylabel("validation bits per byte")
    return both[-1]["val_bits_per_byte"]


def _plot_learning_rate(
    figure: Any, records: list[dict[str, Any]], run_dir: Path, name: str
) -> bool:
    steps, rate = _series(records, "lr")
    if not np.isfinite(rate).any():
        return False
    axes = figure.add_subplot()
    _line(axes, steps, rate, BLUE, "learning rate", smooth=False)
    axes.set(title=f"Learning rate: {name}", ylabel="learning rate")
    _step_axis(axes)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    batch_steps, batch = _series(records, "batch_size")
    if batch.size and batch.min() != batch.max():
        axes.set_title(f"Learning rate and batch size: {name}")
        right = axes.twinx()
        right.step(batch_steps, batch, where="post", color=ORANGE, linestyle="--")
        right.set_ylim(bottom=0)
        right.grid(False)
        right.spines["right"].set_visible(True)
        right.set_ylabel("batch size (sequences a step)")
        axes.plot([], [], "--", color=ORANGE, label="batch size")
        axes.legend(loc="lower center")
    return True


def _plot_expert_load(figure: Any, records: list[dict[str, Any]], run_dir: Path, name: str) -> bool:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    having = [r for r in records if r.get("expert_load")]
    shape = np.shape(having[-1]["expert_load"]) if having else ()
    if len(shape) != 2:
        return False
    having = [r for r in having if np.shape(r["expert_load"]) == shape]
    num_layers, num_experts = shape
    # [time, layer, expert]; 1 where every expert of a layer gets the same number of tokens.
    load = np.array([r["expert_load"] for r in having], float) * num_experts
    max_vio = load[-1].max(axis=1) - 1
    steps, load = _thinned(np.array([r["step"] for r in having]), load)
    count = min(num_layers, MAX_LAYERS)
    layers = np.linspace(0, num_layers - 1, count).round().astype(int)

    rows, columns = _grid(count)
    width = 3.4 if columns <= 4 else 2.2
    figure.set_size_inches(max(7.0, width * columns + 1.2), max(3.6, 0.78 * width * rows + 1.2))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    labels, image = layer_names(run_dir, num_layers), None
    for axes, layer in zip(grid.flat, layers):
        heights = np.arange(num_experts + 1) - 0.5
        colours = {"cmap": "PuOr_r", "vmin": 0.0, "vmax": 2.0, "rasterized": True}
        image = axes.pcolormesh(_edges(steps), heights, load[:, layer].T, **colours)
        title = f"{labels[layer]}: MaxVio {max_vio[layer]:.2f}"
        axes.set_title(title, fontsize=10, fontweight="normal")
        axes.grid(False)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_locator(
            MaxNLocator(3, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
        )
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for column in grid.T:  # step numbers under the last panel, also above a gap in the last row
        [axes for axes in column if axes.get_visible()][-1].tick_params(labelbottom=True)

    some = f" ({count} of {num_layers} layers)" if count < num_layers else ""
    figure.suptitle(f"Expert load over time: {name}{some}", fontweight="bold", fontsize=13)
    figure.supxlabel("step (MaxVio: max / mean load - 1, at the last step)", fontsize=11)
    figure.supylabel("routed expert", fontsize=11)
    bar = figure.colorbar(image, ax=grid, extend="max", fraction=0.04, pad=0.02, aspect=30)
    bar.set_label("tokens, relative to a balanced load")
    bar.set_ticks([0, 0.5, 1, 1.5, 2], labels=["0 (dead)", "0.5", "1 (balanced)", "1.5", "2"])
    return True


def _plot_time(figure: Any, records: list[dict[str, Any]], run_dir: Path, name: str) -> bool:
    spent: dict[str, float] = {}
    for record in records:  # a run that was resumed has one such record for each time it ran
        for phase, seconds in (record.get("seconds") or {}).items():
            spent[phase] = spent.get(phase, 0.0) + (seconds or 0.0)
    total = sum(spent.values())
    if total <= 0:
        return False
    phases = sorted((p for p in spent if spent[p] >= 0.0005 * total), key=lambda p: spent[p])
    figure.set_size_inches(8, 1.6 + 0.42 * len(phases))
    axes = figure.add_subplot()
    colours = [BLUE if phase == "step" else "#9CC3DC" for phase in phases]
    bars = axes.barh(phases, [spent[p] for p in phases], color=colours, height=0.7)
    texts = [f"{_duration(spent[p])}  ({spent[p] / total:.1%})" for p in phases]
    axes.bar_label(bars, texts, padding=5, fontsize=10)
    axes.set_xlim(0, 1.28 * max(spent.values()))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set(title=f"Where the time went: {name}, {_duration(total)} in all", xlabel="seconds")
    return True


def _line(
    axes: Any, steps: np.ndarray, values: np.ndarray, colour: str, label: str, smooth: bool = True
) -> None:
    """A line; when there are many points, they are faint and their running mean is drawn."""
    window = len(values) // 50
    if window < 3 or not smooth:
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, color=colour, linewidth=1.6, label=label, marker=marker)
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    finite = np.isfinite(values)
    padded = np.pad(values[finite], (window // 2, window - 1 - window // 2), mode="edge")
    mean = np.convolve(padded, np.full(window, 1 / window), mode="valid")
    axes.plot(
        steps[finite], mean, color=colour, linewidth=1.8, label=f"{label}, mean of {window} points"
    )


def _step_axis(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(
        MaxNLocator(9, integer=True, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1)
    )


def _limit_spikes(axes: Any, curves: list[np.ndarray]) -> None:
    """Keeps a single spike from flattening the rest of the picture."""
    values = np.concatenate([c[np.isfinite(c)] for c in curves])
    usual = np.percentile(values, 99)
    top = max(usual, min(values.max(), usual + 0.5 * (usual - values.min())))
    margin = 0.05 * max(top - values.min(), 1e-3)
    axes.set_ylim(values.min() - 1.5 * margin, top + margin)


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns for that many panels: somewhat wide, with few empty places."""
    least, most = math.ceil(math.sqrt(count)), math.ceil(math.sqrt(2 * count))
    columns = min(range(least, most + 1), key=lambda c: (-count % c, c))
    return math.ceil(count / columns), columns


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_COLUMNS points in time: means of neighbours, since a picture has no more room."""
    if len(steps) <= MAX_COLUMNS:
        return steps, values
    size = -(-len(steps) // MAX_COLUMNS)  # one size for all: a mean of more looks calmer
    groups = [slice(start, start + size) for start in range(0, len(steps), size)]
    return (
        np.array([steps[g].mean() for g in groups]),
        np.array([values[g].mean(axis=0) for g in groups]),
    )


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders of heatmap cells: half-way between steps, and nothing before the start."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    first = max(2 * steps[0] - middle[0], 0)
    return np.concatenate([[first], middle, [2 * steps[-1] - middle[-1]]])


def layer_names(run_dir: Path, num_rows: int) -> list[str]:
    """ "layer 3", ..., "MTP 1": numbered as in the model where config.json tells the dense ones."""
    try:
        model = read_config(run_dir)["model"]
        first, last = int(model["first_k_dense_replace"]), int(model["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"MoE layer {row + 1}" for row in range(num_rows)]
    numbers = range(first, first + num_rows)
    return [f"layer {n}" if n < last else f"MTP {n - last + 1}" for n in numbers]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
