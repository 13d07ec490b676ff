"""Checkpoints straight into variables: a matrix is read once and put on all devices that need it.

Large arrays are not assembled on the host: they start as zeros on their devices, and published rows
are written into them in place, a piece at a time. What is read and not yet written is bounded too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.checkpoint import (
    FP8,
    Checkpoint,
    Tensor,
    open_checkpoint,
    refuse_copies_that_differ,
)
from dsv3_jax.interop.name_map import Leaf, Place, leaves, scale_name, scale_shape
from dsv3_jax.interop.safetensors import DTYPES, num_bytes
from dsv3_jax.interop.stored import common_dtype, count_non_finite
from dsv3_jax.interop.stream import (
    BLOCK,
    CHUNK_BYTES,
    dequantize_rows,
    in_file_order,
    quantize_rows,
    specs_of,
    tell_not_finite,
)
from dsv3_jax.quantization.block_scaled import PER_BLOCK, BlockScaled

# A device's part of an array is put together on the host up to this size: a transfer and a compiled
# update for every norm would take longer than the rest of a small model's load.
HOST_BYTES = 16 << 20
PIECE_BYTES = 64 << 20  # of a matrix that is read at once
# Read, and not yet written: to another device, and on CPUs, where writing is no more than copying.
ON_THE_WAY_BYTES, ON_THE_WAY_HERE = 4 * PIECE_BYTES, PIECE_BYTES
# After so many read, memory that is free goes back to the system: glibc keeps what was taken in
# pieces of less than 32 MiB, half a gigabyte of it for a model of 10 GB.
RETURNED_AFTER_BYTES = 128 << 20

# "fp8": every projection in FP8, made so as it is read where it is not stored so; the rest as
# "stored", or as "bf16" where nothing is stored in FP8.
LoadDType = Literal["stored", "fp8", "bf16", "f32"]
log = logging.getLogger(__name__)


def load_hf(
    folder: str | Path, *, dtype: LoadDType = "stored", shardings: Any = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, variables) of a Hugging Face folder or of an import.

    With "stored", FP8 weights are BlockScaled with tile (128, 128) and the published matrices'
    shapes (tiles cross heads, so heads are not apart: [L, N*(H+R), Q] rather than [L, N, H+R, Q]);
    with "bf16" or "f32" everything but the router biases (f32) has that dtype and the shapes of
    `init_variables`. With "fp8" every projection is in FP8, as stored or made so as it is read, and
    the rest is as stored, or BF16 where nothing is stored in FP8.
    The config's eos_token_id is what generation is to stop at. Raises UserError as
    `open_checkpoint` does.
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
    checkpoint: Checkpoint,
    *,
    dtype: LoadDType = "stored",
    shardings: Any = None,
    as_bytes: bool = False,
) -> dict[str, Any]:
    """The checkpoint's variables on the devices of `shardings`, or on the first device.

    `shardings` is a tree like the variables with a jax.sharding.Sharding at each leaf; at a
    BlockScaled leaf it may hold a BlockScaled of two, otherwise its scales are replicated. Each
    process reads the matrices that its own devices need. With `as_bytes` FP8 values are uint8, as
    `block_scaled.as_bytes` makes them.
    """
    refuse_copies_that_differ(checkpoint)
    originals = {n: p for n, p in checkpoint.places.items() if not p.copy}
    targets = _targets(checkpoint, dtype)
    arrays: dict[tuple[str, ...], dict[str, _Growing]] = {}
    bad: Counter[str] = Counter()
    on_the_way = _OnTheWay(returns=as_bytes)
    for path, leaf in leaves(checkpoint.config).items():
        where = _at(shardings, path)
        arrays[path] = _growing(leaf, targets[path], where, on_the_way, as_bytes)
    for name in in_file_order((n, checkpoint.tensors[n]) for n in originals):
        place, target = originals[name], targets[originals[name].path]
        for kind, array in arrays[place.path].items():
            rows = place.shape[0] if kind == "values" else scale_shape(place.shape)[0]
            read = functools.partial(_rows, checkpoint, name, kind, target, bad)
            array.put(place.index, rows // array.dims[0], read)
    _tell_of_mixed(checkpoint, dtype)
    tell_not_finite(bad, "weights loaded")
    found = {}
    for path, parts in arrays.items():
        whole = {kind: array.finish() for kind, array in parts.items()}
        found[path] = BlockScaled(**whole, tile=PER_BLOCK) if len(whole) > 1 else whole["values"]
    return _tree(found)


class _OnTheWay:
    """Pieces that are read and not yet written: as many bytes as may be.

    returns: what they took goes back to the system, on CPUs, where it is what weights lie in too.
    """

    def __init__(self, returns: bool):
        self._returns, self._read = returns, 0
        self._most = ON_THE_WAY_HERE if returns else ON_THE_WAY_BYTES
        self._pieces: deque[tuple[jax.Array, int]] = deque()
        self._bytes = 0

    def add(self, written: jax.Array, size: int) -> None:
        """Counts a piece, whose write gives `written`; waits for the oldest ones if it must."""
        self._pieces.append((written, size))
        self._bytes += size
        self._read += size
        while self._bytes > self._most:
            written, size = self._pieces.popleft()
            written.block_until_ready()
            self._bytes -= size
        if self._returns and self._read > RETURNED_AFTER_BYTES:
            return_free_memory()
            self._read = 0


def return_free_memory() -> None:
    """What glibc keeps of freed memory goes back to the system; nothing with another libc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Growing:
    """A stacked array that is filled matrix by matrix on every device that holds a part of it."""

    def __init__(
        self,
        lead: tuple[int, ...],
        dims: tuple[int, ...],
        dtype: str,
        sharding: Any,
        on_the_way: _OnTheWay,
    ):
        self.shape, self.num_lead, self.dims = lead + dims, len(lead), dims
        self.dtype = DTYPES[dtype]
        self.unit_bytes, self.on_the_way = num_bytes(dtype, dims[1:]), on_the_way
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
        begin = min(bounds[n][0] for bounds in wanted.values())
        end = max(bounds[n][1] for bounds in wanted.values())
        # Whole blocks of 128 rows where units are rows, as FP8 is read by them.
        step = max(PIECE_BYTES // self.unit_bytes, 1)
        step -= step % BLOCK if step > BLOCK else 0
        for first in range(begin, end, step):
            last = min(first + step, end)
            rows = read(first * rows_a_unit, last * rows_a_unit)
            rows = rows.reshape(last - first, *self.dims[1:])
            rows = rows.view(self.dtype) if self.dtype == np.uint8 else rows
            for device, bounds in wanted.items():
                self._put_rows(device, bounds, index, first, rows)

    def _put_rows(self, device, bounds, index, first: int, rows: np.ndarray) -> None:
        """Writes what a device has of the rows from `first` on of the matrix at `index`."""
        n = self.num_lead
        (lo, hi), rest = bounds[n], bounds[n + 1 :]
        begin, end = max(lo, first), min(hi, first + len(rows))
        if begin >= end:
            return
        piece = rows[(slice(begin - first, end - first), *(slice(*b) for b in rest))]
        start = [i - b[0] for i, b in zip(index, bounds)]
        part = self.parts[device]
        if isinstance(part, np.ndarray):
            part[(*start, slice(begin - lo, end - lo))] = piece
            return
        start += [begin - lo] + [0] * len(rest)
        piece = jax.device_put(piece.reshape((1,) * n + piece.shape), device)
        self.parts[device], written = _write(part, piece, np.array(start, np.int32))
        self.on_the_way.add(written, piece.nbytes)

    def finish(self) -> jax.Array:
        """The array; nothing can be put any more."""
        parts = [jax.device_put(part, device) for device, part in self.parts.items()]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, parts)


def _zeros(shape: tuple[int, ...], dtype: str, device: jax.Device) -> Any:
    if num_bytes(dtype, shape) <= HOST_BYTES:
        return np.zeros(shape, DTYPES[dtype])
    return jnp.zeros(shape, DTYPES[dtype], device=device)


@functools.partial(jax.jit, donate_argnums=0)
def _write(part: jax.Array, piece: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The part with the piece in it, and something that is there when that is.

    A byte a number is written as such: of float8 XLA:CPU writes all of the part anew.
    """
    dtype = part.dtype
    if dtype.itemsize == 1:
        part, piece = (jax.lax.bitcast_convert_type(x, jnp.uint8) for x in (part, piece))
    part = jax.lax.dynamic_update_slice(part, piece, tuple(start))
    return (part if part.dtype == dtype else jax.lax.bitcast_convert_type(part, dtype)), start[0]


def _growing(
    leaf: Leaf, target: str, sharding: Any, on_the_way: _OnTheWay, as_bytes: bool
) -> dict[str, _Growing]:
    if target != FP8:
        return {"values": _Growing(leaf.lead, leaf.dims, target, sharding, on_the_way)}
    if not isinstance(sharding, BlockScaled):
        replicated = sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        sharding = BlockScaled(sharding, replicated, PER_BLOCK)
    values = "U8" if as_bytes else FP8
    return {
        "values": _Growing(leaf.lead, leaf.shape, values, sharding.values, on_the_way),
        "scales": _Growing(leaf.lead, scale_shape(leaf.shape), "F32", sharding.scales, on_the_way),
    }


def _targets(checkpoint: Checkpoint, dtype: LoadDType) -> dict[tuple[str, ...], str]:
    """The dtype that each leaf is loaded in: a leaf is one array.

    FP8 beside BF16 is dequantised, or with "fp8" the rest is quantised.
    """
    projections = {place.path for place in checkpoint.places.values() if place.fp8}

    def target(path: tuple[str, ...], counts: Counter[str]) -> str:
        as_fp8 = dtype == "fp8" and (path in projections or FP8 in counts)
        return FP8 if as_fp8 else common_dtype(set(counts))

    return {path: target(path, counts) for path, counts in _stored(checkpoint, dtype).items()}


def _stored(checkpoint: Checkpoint, dtype: LoadDType) -> dict[tuple[str, ...], Counter[str]]:
    """How many matrices of each leaf would be loaded in which dtype by themselves."""
    stored: dict[tuple[str, ...], Counter[str]] = {}
    if dtype == "fp8":
        dtype = "stored" if stores_fp8(checkpoint) else "bf16"
    for name, place in checkpoint.places.items():
        if not place.copy:
            target = _target(checkpoint, name, place, dtype)
            stored.setdefault(place.path, Counter())[target] += 1
    return stored


def _tell_of_mixed(checkpoint: Checkpoint, dtype: LoadDType) -> None:
    """Logs a line for every leaf whose matrices are stored in several dtypes."""
    targets = _targets(checkpoint, dtype)
    for path, counts in _stored(checkpoint, dtype).items():
        if len(counts) > 1:
            kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            log.warning("%s: stored as %s, held as %s", ".".join(path), kinds, targets[path])


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
    """The dtype a weight is loaded in by itself; router biases are f32 in our variables."""
    if place.path[0] == "router":
        return "F32"
    return specs_of(checkpoint, name, place, dtype)[name][0]


def _rows(
    checkpoint: Checkpoint,
    name: str,
    kind: str,
    target: str,
    bad: Counter[str],
    first: int,
    last: int,
) -> np.ndarray:
    """Rows of a weight as `target`, or of its scales where `kind` says so.

    `bad` counts those of their numbers that are not finite.
    """
    tensor = checkpoint.tensors[name]
    if target == FP8 and tensor.dtype != FP8:
        return _quantized(checkpoint, name, kind, bad, first, last)
    if kind == "scales":
        rows = checkpoint.tensors[scale_name(name)].read(first, last).astype(np.float32)
    elif tensor.dtype != FP8 or target == FP8:
        rows = tensor.read(first, last).astype(DTYPES[target], copy=False)
    else:
        # Whole blocks, so that every row meets its own scale.
        begin, end = _whole_blocks(first, last, tensor)
        scales = checkpoint.tensors[scale_name(name)].read(begin // BLOCK, -(-end // BLOCK))
        rows = dequantize_rows(tensor.read(begin, end), scales, target)[
            first - begin : last - begin
        ]
    if count := count_non_finite(rows):
        bad[name if kind == "values" else scale_name(name)] += count
    return rows


def _quantized(
    checkpoint: Checkpoint, name: str, kind: str, bad: Counter[str], first: int, last: int
) -> np.ndarray:
    """Rows of FP8 values made of a weight, or of their scales, which count by blocks.

    Made of a few MiB at a time, as the numbers are widened to f32 meanwhile.
    """
    tensor, of_values = checkpoint.tensors[name], kind == "values"
    scale_format = "ue8m0" if checkpoint.scale_fmt == "ue8m0" else "f32"
    begin, end = first * BLOCK, min(last * BLOCK, tensor.shape[0])
    if of_values:
        begin, end = _whole_blocks(first, last, tensor)
    step = max(CHUNK_BYTES // num_bytes("F32", tensor.shape[1:]) // BLOCK, 1) * BLOCK
    parts = []
    for row in range(begin, end, step):
        rows = tensor.read(row, min(row + step, end))
        if of_values and (count := count_non_finite(rows)):
            bad[name] += count
        parts.append(np.asarray(getattr(quantize_rows(rows, scale_format), kind)))
    made = np.concatenate(parts)
    return made[first - begin : last - begin] if of_values else made


def _whole_blocks(first: int, last: int, tensor: Tensor) -> tuple[int, int]:
    return first // BLOCK * BLOCK, min(-(-last // BLOCK) * BLOCK, tensor.shape[0])


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    """The sharding at a path; None when there is no tree."""
    return None if tree is None else functools.reduce(lambda node, key: node[key], path, tree)
