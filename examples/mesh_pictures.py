"""Draws how the axes of a mesh cut tokens and weights: the pictures of docs/parallelism.md.

    python examples/mesh_pictures.py --out docs/plots/parallelism

Every box is read from the shardings that training uses, on eight virtual CPU devices; nothing is
computed. A second or two.
"""

import argparse
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import NamedSharding
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dsv3_jax.config import ExpertParallelConfig, ParallelConfig, ShardingConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.picture import ranges
from dsv3_jax.parallel.sharding import Layout, make_layout, zigzag

COLORS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]


def layout_of(**sizes: int) -> Layout:
    """The training layout of a mesh."""
    mesh = make_mesh(ParallelConfig(**sizes))
    return make_layout(mesh, ShardingConfig(), ExpertParallelConfig())


def panel(ax: Axes, title: str, sharding: NamedSharding, shape: tuple[int, int]) -> None:
    """One array of two dims: a box for each part, with the devices that hold it."""
    holders: dict[tuple[int, int, int, int], list[int]] = {}
    for device, (rows, columns) in sharding.devices_indices_map(shape).items():
        y, x = rows.start or 0, columns.start or 0
        bottom = shape[0] if rows.stop is None else rows.stop
        right = shape[1] if columns.stop is None else columns.stop
        holders.setdefault((y, x, bottom, right), []).append(device.id)
    for (y, x, bottom, right), devices in holders.items():
        color = COLORS[devices[0]] if len(holders) > 1 else "0.85"
        ax.add_patch(Rectangle((x, y), right - x, bottom - y, fc=color, ec="white", lw=2))
        ax.text((x + right) / 2, (y + bottom) / 2, ranges(devices), ha="center", va="center")
    ax.set(xlim=(0, shape[1]), ylim=(shape[0], 0), xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)


def draw_data(folder: Path) -> None:
    """data.png: the batch, and what ZeRO-1 leaves each device to hold."""
    layout = layout_of(data=2, node=2, local=2)
    figure, axes = plt.subplots(1, 5, figsize=(12, 2.8), layout="constrained")
    panel(axes[0], "a batch: rows down", layout.sharding("batch", None), (16, 32))
    for number, (name, dims) in enumerate({"q_a_proj": (), "experts": ("expert",)}.items()):
        used = layout.spec(*dims)
        held = layout.stored_spec(used, (16, 32))
        for offset, (when, spec) in enumerate({"used": used, "held": held}.items()):
            place = NamedSharding(layout.mesh, spec)
            panel(axes[1 + 2 * number + offset], f"{name}, {when}", place, (16, 32))
    figure.suptitle(
        "data 2 x node 2 x local 2: numbers are devices; a device holds what it applies"
    )
    save(figure, folder / "data.png")


def draw_tensor(folder: Path) -> None:
    """tensor.png: heads, feed-forward and vocabulary, and the tokens inside and between blocks."""
    layout = layout_of(data=2, tensor=4)
    figure, axes = plt.subplots(1, 6, figsize=(13, 2.8), layout="constrained")
    panel(
        axes[0], "tokens in a block\n(rows x positions)", layout.sharding("batch", "seq"), (16, 32)
    )
    place = layout.sharding("batch", "residual")
    panel(axes[1], "tokens between blocks", place, (16, 32))
    for ax, title, dims in (
        (axes[2], "q_b_proj\n(heads x latent)", ("heads", None)),
        (axes[3], "o_proj\n(model x heads)", (None, "heads")),
        (axes[4], "down_proj\n(model x hidden)", (None, "mlp")),
        (axes[5], "lm_head\n(vocabulary x model)", ("vocab", None)),
    ):
        panel(ax, title, layout.sharding(*dims), (16, 32))
    figure.suptitle("data 2 x tensor 4")
    save(figure, folder / "tensor.png")


def draw_context(folder: Path) -> None:
    """context.png: which device attends with which queries, in order and in zigzag."""
    length, devices = 32, 4
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.3), layout="constrained")
    orders = {"allgather: in order": np.arange(length), "ring: zigzag": zigzag(length, devices)}
    for ax, (name, order) in zip(axes, orders.items(), strict=True):
        owner = np.empty(length, int)
        owner[order] = np.repeat(np.arange(devices), length // devices)
        image = np.ones((length, length, 3))
        for query in range(length):
            image[query, : query + 1] = COLORS[owner[query]]
        ax.imshow(image)
        work = [int((np.flatnonzero(owner == d) + 1).sum()) for d in range(devices)]
        share = ", ".join(f"{100 * w / sum(work):.0f} %" for w in work)
        ax.set(title=f"{name}\nwork of devices 0-3: {share}", xlabel="key", ylabel="query")
    save(figure, folder / "context.png")


def save(figure: plt.Figure, path: Path) -> None:  # type: ignore[name-defined]
    """Writes a PNG and says where."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def main() -> None:
    """Writes data.png, tensor.png and context.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("."))
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    draw_data(folder)
    draw_tensor(folder)
    draw_context(folder)


if __name__ == "__main__":
    main()
