"""FP8 scales that weights were published with, kept by a run that begins with them.

A run has f32 masters. Where training left a block of 128 x 128 as it was, the published scale turns
it into the published bytes again, while a scale made anew, from the block's largest number, may be
another one. A block that the published scale does not reproduce exactly gets a new one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from dsv3_jax.interop.checkpoint import FP8, Checkpoint
from dsv3_jax.interop.name_map import scale_name
from dsv3_jax.interop.safetensors import DTYPES, open_writer, read_header

SCALES_FILE = "published_scales.safetensors"


def save_published_scales(checkpoint: Checkpoint, path: Path) -> None:
    """Writes every FP8 scale of a checkpoint; no file where there is none."""
    names = [scale_name(n) for n in checkpoint.places if checkpoint.tensors[n].dtype == FP8]
    if not names:
        return
    specs = {n: (checkpoint.tensors[n].dtype, checkpoint.tensors[n].shape) for n in names}
    with open_writer(path, specs, {"scale_fmt": checkpoint.scale_fmt or ""}) as writer:
        for name in names:
            writer.write(name, checkpoint.tensors[name].read())


def with_published_scales(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """The checkpoint, to be exported with these scales where they reproduce its numbers."""
    scales, metadata = read_header(path)
    kept = {name: scales[name] for name in map(scale_name, checkpoint.places) if name in scales}
    return dataclasses.replace(
        checkpoint, published_scales=kept, scale_fmt=metadata.get("scale_fmt") or None
    )


def as_published(
    rows: np.ndarray, values: np.ndarray, scales: np.ndarray, published: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """FP8 values and scales of rows, with the published scale of every block that it reproduces.

    `rows` are what is stored, from a multiple of `block` on; `values` and `scales` what they become
    with new scales.
    """
    old = published.astype(np.float32)
    spread = np.repeat(np.repeat(old, block, 0)[: rows.shape[0]], block, 1)[:, : rows.shape[1]]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        tried = (rows / spread).astype(DTYPES[FP8])
        same = tried.astype(np.float32) * spread == rows
    fill = [(0, -size % block) for size in rows.shape]
    same = np.pad(same, fill, constant_values=True)
    blocks = same.reshape(same.shape[0] // block, block, -1, block).all(axis=(1, 3))
    everywhere = np.repeat(np.repeat(blocks, block, 0), block, 1)[: rows.shape[0], : rows.shape[1]]
    return np.where(everywhere, tried, values), np.where(blocks, old, scales)
