"""Checkpoints straight into variables: a matrix is read once and put on all devices that need it.

Large arrays are not assembled on the host: they start as zeros on their devices and matrices are
written into them in place, so that the host holds one published matrix of them at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.interop.checkpoint import FP8, Checkpoint, copies_differ, open_checkpoint
from dsv3_jax.interop.name_map import Leaf, Place, leaves, scale_name, scale_shape
from dsv3_jax.interop.safetensors import DTYPES, num_bytes
from dsv3_jax.interop.stream import BLOCK, dequantize_rows, in_file_order, specs_of
from dsv3_jax.quantization.block_scaled import PER_BLOCK, BlockScaled

# A device's part of an array is put together on the host up to this size: a transfer and a compiled
# update for every norm would take longer than the rest of a small model's load.
HOST_BYTES = 16 << 20

LoadDType = Literal["stored", "bf16", "f32"]


def load_hf(
    folder: str | Path, *, dtype: LoadDType = "stored", shardings: Any = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, variables) of a Hugging Face folder or of an import.

    With "stored", FP8 weights are BlockScaled with tile (128, 128) and the published matrices'
    shapes (tiles cross heads, so heads are not apart: [L, N*(H+R), Q] rather than [L, N, H+R, Q]);
    with "bf16" or "f32" everything but the router biases (f32) has that dtype and the shapes of
    `init_variables`. The config's eos_token_id is what generation is to stop at. Raises UserError
    as `open_checkpoint` does.
    """
    checkpoint = open_checkpoint(folder)
    return checkpoint.config_to_generate, load(checkpoint, dtype=dtype, shardings=shardings)


def stores_fp8(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds FP8 weights."""
    return any(tensor.dtype == FP8 for tensor in checkpoint.tensors.values())


def abstract_leaves(checkpoint: Checkpoint, dtype: LoadDType = "stored") -> dict[str, Any]:
    """What `load` returns, as shapes and dtypes: what its `shardings` are made for.

    Raises UserError as `load` does, but for copies that differ.
    """
    targets = _targets(checkpoint, dtype)

    def abstract(leaf: Leaf, target: str) -> Any:
        if target != FP8:
            return jax.ShapeDtypeStruct(leaf.lead + leaf.dims, DTYPES[target])
        values = jax.ShapeDtypeStruct(leaf.lead + leaf.shape, DTYPES[FP8])
        scales = jax.ShapeDtypeStruct(leaf.lead + scale_shape(leaf.shape), np.float32)
        return BlockScaled(values, scales, PER_BLOCK)

    found = leaves(checkpoint.config).items()
    return _tree({path: abstract(leaf, targets[path]) for path, leaf in found})


def load(
    checkpoint: Checkpoint, *, dtype: LoadDType = "stored", shardings: Any = None
) -> dict[str, Any]:
    """The checkpoint's variables on the devices of `shardings`, or on the first device.

    `shardings` is a tree like the variables with a jax.sharding.Sharding at each leaf; at a
    BlockScaled leaf it may hold a BlockScaled of two, otherwise its scales are replicated. Each
    process reads the matrices that its own devices need.
    """
    if name := copies_differ(checkpoint):
        raise UserError(f"{name} differs from the main model's; MTP modules share its numbers here")
    originals = {n: p for n, p in checkpoint.places.items() if not p.copy}
    targets = _targets(checkpoint, dtype)
    arrays: dict[tuple[str, ...], dict[str, _Growing]] = {}
    for path, leaf in leaves(checkpoint.config).items():
        arrays[path] = _growing(leaf, targets[path], _at(shardings, path))
    for name in in_file_order((n, checkpoint.tensors[n]) for n in originals):
        place, target = originals[name], targets[originals[name].path]
        for kind, array in arrays[place.path].items():
            tensor = name if kind == "values" else scale_name(name)
            shape = checkpoint.tensors[tensor].shape
            read = functools.partial(_rows, checkpoint, tensor, target)
            array.put(place.index, shape[0] // array.dims[0], read)
    found = {}
    for path, parts in arrays.items():
        whole = {kind: array.finish() for kind, array in parts.items()}
        found[path] = BlockScaled(**whole, tile=PER_BLOCK) if len(whole) > 1 else whole["values"]
    return _tree(found)


class _Growing:
    """A stacked array that is filled matrix by matrix on every device that holds a part of it."""

    def __init__(self, lead: tuple[int, ...], dims: tuple[int, ...], dtype: str, sharding: Any):
        self.shape, self.num_lead, self.dims = lead + dims, len(lead), dims
        self.sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        indices: dict[Any, Any] = dict(self.sharding.addressable_devices_indices_map(self.shape))
        self.bounds = {
            device: [s.indices(size)[:2] for s, size in zip(slices, self.shape)]
            for device, slices in indices.items()
        }
        self.parts = {
            device: _zeros(tuple(hi - lo for lo, hi in bounds), dtype, device)
            for device, bounds in self.bounds.items()
        }

    def put(
        self, index: tuple[int, ...], rows_a_unit: int, read: Callable[[int, int], np.ndarray]
    ) -> None:
        """Writes one matrix at `index`; read(first, last) gives its published rows.

        `rows_a_unit` published rows make up one step of our first matrix dim.
        """
        n = self.num_lead
        wanted = {
            device: bounds
            for device, bounds in self.bounds.items()
            if all(lo <= i < hi for i, (lo, hi) in zip(index, bounds))
        }
        if not wanted:
            return
        first = min(bounds[n][0] for bounds in wanted.values())
        last = max(bounds[n][1] for bounds in wanted.values())
        rows = read(first * rows_a_unit, last * rows_a_unit).reshape(last - first, *self.dims[1:])
        for device, bounds in wanted.items():
            (lo, hi), rest = bounds[n], bounds[n + 1 :]
            piece = rows[(slice(lo - first, hi - first), *(slice(*b) for b in rest))]
            start = [i - b[0] for i, b in zip(index, bounds)] + [0] * len(self.dims)
            part = self.parts[device]
            if isinstance(part, np.ndarray):
                part[tuple(start[:n])] = piece
            else:
                piece = jax.device_put(piece.reshape((1,) * n + piece.shape), device)
                self.parts[device] = _write(part, piece, np.array(start, np.int32))

    def finish(self) -> jax.Array:
        """The array; nothing can be put any more."""
        parts = [jax.device_put(part, device) for device, part in self.parts.items()]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, parts)


def _zeros(shape: tuple[int, ...], dtype: str, device: jax.Device) -> Any:
    if num_bytes(dtype, shape) <= HOST_BYTES:
        return np.zeros(shape, DTYPES[dtype])
    return jnp.zeros(shape, DTYPES[dtype], device=device)


@functools.partial(jax.jit, donate_argnums=0)
def _write(part: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(part, piece, tuple(start))


def _growing(leaf: Leaf, target: str, sharding: Any) -> dict[str, _Growing]:
    if target != FP8:
        return {"values": _Growing(leaf.lead, leaf.dims, target, sharding)}
    if not isinstance(sharding, BlockScaled):
        replicated = sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        sharding = BlockScaled(sharding, replicated, PER_BLOCK)
    return {
        "values": _Growing(leaf.lead, leaf.shape, FP8, sharding.values),
        "scales": _Growing(leaf.lead, scale_shape(leaf.shape), "F32", sharding.scales),
    }


def _targets(checkpoint: Checkpoint, dtype: LoadDType) -> dict[tuple[str, ...], str]:
    """The dtype that each leaf is loaded in; UserError where its matrices have several."""
    first: dict[tuple[str, ...], tuple[str, str]] = {}
    for name, place in checkpoint.places.items():
        if place.copy:
            continue
        target = _target(checkpoint, name, place, dtype)
        other, others = first.setdefault(place.path, (name, target))
        if target != others:
            raise UserError(
                f"{name} is {target} but {other} is {others}; they are stacked in one array, "
                "which has one dtype: load as bf16"
            )
    return {path: target for path, (_, target) in first.items()}


def _tree(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Variables from leaves by their paths."""
    variables: dict[str, Any] = {"params": {}, "router": {}}
    for path, leaf in leaves.items():
        node = variables
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return variables


def _target(checkpoint: Checkpoint, name: str, place: Place, dtype: LoadDType) -> str:
    """The dtype a weight is loaded in; router biases are f32 in our variables."""
    if place.path[0] == "router":
        return "F32"
    return specs_of(checkpoint, name, place, dtype)[name][0]


def _rows(checkpoint: Checkpoint, name: str, target: str, first: int, last: int) -> np.ndarray:
    """Rows of a weight converted to `target`, or of FP8 scales as they are."""
    tensor = checkpoint.tensors[name]
    if tensor.dtype == target or target == FP8:
        return tensor.read(first, last)
    if tensor.dtype != FP8:
        return tensor.read(first, last).astype(DTYPES[target])
    # Whole blocks, so that every row meets its own scale.
    begin, end = first // BLOCK * BLOCK, min(-(-last // BLOCK) * BLOCK, tensor.shape[0])
    scales = checkpoint.tensors[scale_name(name)].read(begin // BLOCK, -(-end // BLOCK))
    return dequantize_rows(tensor.read(begin, end), scales, target)[first - begin : last - begin]


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    """The sharding at a path; None when there is no tree."""
    return None if tree is None else functools.reduce(lambda node, key: node[key], path, tree)
