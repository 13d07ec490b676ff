"""A run as one self-contained HTML page: curves, the load of every expert by step, its texts.

Everything is in the file: numbers as JSON, drawn by the script beside them (report.html). Nothing
is loaded from elsewhere, so that it can be mailed and kept. Reads files only, also while the run
goes on.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.analysis.report import layer_names, read_metrics
from dsv3_jax.config.records import read_records

TEMPLATE = Path(__file__).with_name("report.html")
POINTS = 1500  # of a curve; of more, every so-manieth
TIMES = 120  # steps of the load heatmap
# (title, unit, whether the axis begins at 0), then (key, name, colour) of each line.
CHARTS: tuple[Any, ...] = (
    (
        ("Loss", "nats a token", False),
        ("loss", "training, all terms", "blue"),
        ("ce", "training cross-entropy", "green"),
        ("val_loss", "validation", "orange"),
    ),
    (("Validation", "bits per byte", False), ("val_bits_per_byte", "", "orange")),
    (("MTP loss", "nats a token", False), ("mtp", "", "purple")),
    (("Learning rate", "", True), ("lr", "", "blue")),
    (("Gradient norm", "before clipping", True), ("grad_norm", "", "green")),
    (("Throughput", "tokens a second", True), ("tokens_per_s", "", "blue")),
    (("Model FLOPs utilisation", "", True), ("mfu", "", "blue")),
    (
        ("Memory", "GiB at the peak", True),
        ("peak_memory_gib", "a device", "purple"),
        ("host_memory_gib", "this process", "orange"),
    ),
    (
        ("Router", "busiest expert over the mean, less 1", True),
        ("max_vio", "worst layer", "orange"),
    ),
)


def write_page(run_dir: str | Path) -> Path:
    """RUN/report.html, written from metrics.jsonl, config.json and samples.jsonl.

    Raises UserError when there is no such run or it has no metrics yet.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    page = {
        "title": f"{run_dir.resolve().name}: {_newest(records, 'loss')}",
        "facts": _facts(run_dir, records),
        "charts": [chart for spec in CHARTS if (chart := _chart(records, *spec))],
        "load": _load(records, run_dir),
        "samples": _samples(run_dir),
    }
    # "</script>" in a text would end the script that holds it.
    data = json.dumps(page, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(run_dir.resolve().name)
    text = TEMPLATE.read_text().replace("__TITLE__", title).replace("__DATA__", data)
    path = run_dir / "report.html"
    path.write_text(text)
    return path


def _newest(records: Sequence[dict[str, Any]], key: str) -> str:
    having = [record for record in records if record.get(key) is not None]
    return (
        f"{key} {having[-1][key]:.4g} at step {having[-1]['step']}" if having else f"no {key} yet"
    )


def _facts(run_dir: Path, records: Sequence[dict[str, Any]]) -> str:
    """A line of what was trained, as far as config.json says."""
    found = [f"{records[-1]['step']:,} steps"]
    tokens = [record["tokens"] for record in records if record.get("tokens")]
    if tokens:
        found.append(f"{tokens[-1]:,} tokens")
    try:
        config = json.loads((run_dir / "config.json").read_text())
        model, mesh = config["model"], config["mesh"]
        found.append(f"{model['num_hidden_layers']} layers of width {model['hidden_size']}")
        found.append(f"{model['n_routed_experts']} experts, {model['num_experts_per_tok']} a token")
        axes = [f"{axis} {size}" for axis, size in mesh.items() if size > 1]
        found += [f"seed {config['seed']}", config["quant"]["preset"], *axes]
    except (OSError, ValueError, KeyError, TypeError):
        found.append("no config.json that can be read")
    return " · ".join(found)


def _chart(records: Sequence[dict[str, Any]], head: tuple[str, str, bool], *lines: Any) -> Any:
    """A chart for the page, or None where no record has any of its numbers."""
    title, unit, zero = head
    drawn = []
    for key, name, color in lines:
        points = [[r["step"], _number(r[key])] for r in records if key in r]
        points = points[:: -(-len(points) // POINTS) or 1]
        if any(value is not None for _, value in points):
            drawn.append({"name": name, "color": color, "points": points})
    return {"title": title, "unit": unit, "zero": zero, "lines": drawn} if drawn else None


def _number(value: Any) -> float | None:
    """The number, the largest of a list of them (layers), or None for what is not finite."""
    if isinstance(value, list):
        finite = [v for v in value if isinstance(v, int | float)]
        return max(finite) if finite else None
    return value if isinstance(value, int | float) else None


def _load(records: Sequence[dict[str, Any]], run_dir: Path) -> dict[str, Any]:
    """The share of its layer's tokens that every expert got, at up to TIMES steps."""
    having = [r for r in records if r.get("expert_load")]
    shape = np.shape(having[-1]["expert_load"]) if having else ()
    if len(shape) != 2:
        return {"layers": [], "times": []}
    having = [r for r in having if np.shape(r["expert_load"]) == shape]
    chosen = np.unique(np.linspace(0, len(having) - 1, min(len(having), TIMES)).round().astype(int))
    times = [{"step": having[i]["step"], "load": having[i]["expert_load"]} for i in chosen]
    return {"layers": layer_names(run_dir, shape[0]), "times": times}


def _samples(run_dir: Path) -> list[dict[str, Any]]:
    """The texts of samples.jsonl, the newest of each step; torn lines are left out."""
    path = run_dir / "samples.jsonl"
    found = {}
    for record in read_records(path)[0] if path.is_file() else []:
        texts = {key: record.get(key) for key in ("prompt", "text")}
        if all(isinstance(text, str) for text in texts.values()):
            found[record["step"]] = {"step": record["step"], **texts}
    return [found[step] for step in sorted(found)]
