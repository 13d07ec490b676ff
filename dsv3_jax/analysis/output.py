"""Tables for the terminal, JSON and PNG files: how every answer of this room is shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import UserError

# Okabe and Ito's colours, which all colour vision tells apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6E6E6E")

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 110,
}


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as aligned text; numbers to the right, four significant digits, thousands marked."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[c], int | float) for row in rows)
        for c in range(len(headers))
    ]
    widths = [max(len(line[c]) for line in [list(headers), *cells]) for c in range(len(headers))]

    def line(values: Sequence[str]) -> str:
        padded = [
            v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, numeric)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *map(line, cells)])


def _cell(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1e7:
            digits = max(0, 3 - int(np.floor(np.log10(abs(value))))) if value else 0
            return f"{value:,.{digits}f}"
        return f"{value:.3e}"
    return str(value)


def write_json(path: str | Path, value: Any) -> Path:
    """The path, once `value` (dataclasses and arrays welcome) is in it as JSON."""

    def plain(thing: Any) -> Any:
        if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
            return dataclasses.asdict(thing)
        if isinstance(thing, np.ndarray):
            return thing.tolist()
        if isinstance(thing, np.generic):
            return thing.item()
        raise TypeError(f"{type(thing).__name__} is no JSON value")

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2, default=plain) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return path


def new_figure(columns: int = 1, width: float = 6.4, height: float = 3.6) -> tuple[Any, Any]:
    """A matplotlib Figure in the house style, and its axes (one, or an array of `columns`).

    UserError without matplotlib, which only plots need.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'dsv3_jax[plot]'") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns)
    return figure, axes


def save_figure(figure: Any, path: str | Path) -> Path:
    """The path, once the figure is in it as PNG."""
    import matplotlib

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(_STYLE):
            figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return path
