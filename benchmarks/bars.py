"""The picture of a benchmark: for each row of its table, bars of TFLOP/s, ours and its peers'."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot(
    rows: Sequence[dict[str, Any]],
    labels: Sequence[str],
    peers: Mapping[str, str],
    path: Path,
    unit: str = "TFLOP/s",
) -> None:
    """Writes a PNG: each row's rate, and that of each peer where it was timed.

    A row has "us" and "tflops", and under the name that `peers` gives for a peer's label the
    microseconds of that peer, or None.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1))
    for offset, (name, key) in enumerate({"ours": "us", **peers}.items()):
        values = [row["tflops"] * row["us"] / row[key] if row[key] else 0 for row in rows]
        axes.barh([i + 0.27 * offset for i in range(len(rows))], values, 0.25, label=name)
    axes.set_yticks([i + 0.27 * len(peers) / 2 for i in range(len(rows))], labels)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    if peers:
        axes.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
