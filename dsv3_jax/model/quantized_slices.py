"""FP8 numbers of a weight of which every device holds a slice, as FSDP stores it.

A device quantises its own slice of the float32 master, so that FP8 is what is gathered. Slices need
not end where tiles of 128 x 128 do: the largest magnitude of a tile is found over the devices that
hold parts of it, and its scale is on all of them. The numbers are those of the whole weight,
quantised on one device, bit for bit.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.config.weights import Weight
from dsv3_jax.parallel.collectives import vary
from dsv3_jax.parallel.sharding import Layout, axes_of
from dsv3_jax.quantization.block_scaled import (
    PER_BLOCK,
    BlockScaled,
    ScaleFormat,
    round_to_e4m3,
    scale_of_amax,
)

TILE = PER_BLOCK[0]


class MatrixDims(NamedTuple):
    """How many of a weight's dims make a stack of matrices, their rows together, and columns."""

    lead: int
    rows: int
    columns: int


def matrix_dims_of(weight: Weight, ndim: int) -> MatrixDims:
    """The dims of a weight's array of `ndim` dims, those of layers among its lead."""
    rows, columns = map(len, weight.matrix)
    rows += weight.lead[-1:] == ("2",)  # gate's rows, and up's
    return MatrixDims(ndim - rows - columns, rows, columns)


def quantize_slices(
    master: Float[Array, "..."],
    dims: MatrixDims,
    stored: PartitionSpec,
    scale_format: ScaleFormat,
    layout: Layout,
) -> BlockScaled:
    """The weight in tiles of 128 x 128 of its matrices: values shaped and cut as `stored` says, and
    scales [*lead, tiles of rows, tiles of columns], of whole matrices on every device.

    master: float32, cut as `stored` says; inside jit.
    """
    cut = [*stored, *[None] * (master.ndim - len(stored))]
    lead = PartitionSpec(*cut[: dims.lead])
    quantize = partial(
        _of_slice, shape=master.shape, dims=dims, cut=tuple(cut), scale_format=scale_format
    )
    values, scales = jax.shard_map(
        quantize, mesh=layout.mesh, in_specs=stored, out_specs=(stored, lead)
    )(master)
    return BlockScaled(values, scales, PER_BLOCK)


def as_matrices(values: Float[Array, "..."], dims: MatrixDims) -> Float[Array, "*lead N K"]:
    """Whole values as the products read them: zeros fill their matrices up to whole tiles."""
    middle = dims.lead + dims.rows
    lead, rows, columns = (
        values.shape[: dims.lead],
        values.shape[dims.lead : middle],
        values.shape[middle:],
    )
    matrix = values.reshape(*lead, math.prod(rows), math.prod(columns))
    fill = [(0, -size % TILE) for size in matrix.shape[-2:]]
    return jnp.pad(matrix, [(0, 0)] * dims.lead + fill) if fill != [(0, 0), (0, 0)] else matrix


def _of_slice(piece, *, shape: tuple[int, ...], dims: MatrixDims, cut, scale_format: ScaleFormat):
    """The values of a device's slice, and the scales of the matrices that it is part of.

    Numbers that lie side by side and are in one tile for certain are a run, whose largest magnitude
    is found before those of runs are put together to tiles.
    """
    lead, middle = piece.shape[: dims.lead], dims.lead + dims.rows
    row, high, row_tiles = _runs(piece.shape, shape, cut, range(dims.lead, middle))
    column, wide, column_tiles = _runs(piece.shape, shape, cut, range(middle, piece.ndim))
    where = (..., row[:, None], column)
    runs = piece.reshape(*lead, len(row), high, len(column), wide)
    largest = jnp.where(jnp.isfinite(runs), jnp.abs(runs), 0).max((-3, -1))
    amax = jnp.zeros((*lead, row_tiles, column_tiles), piece.dtype)
    amax = vary(amax, jax.typeof(piece).manual_axis_type.varying).at[where].max(largest)
    if axes := tuple(axis for entry in cut[dims.lead :] for axis in axes_of(entry)):
        amax = lax.pmax(amax, axes)
    scales = scale_of_amax(amax, scale_format)
    values = round_to_e4m3(runs, scales[where][..., :, None, :, None])
    return values.reshape(piece.shape), scales


def _runs(
    here: tuple[int, ...], whole: tuple[int, ...], cut, which: range
) -> tuple[Int[Array, " runs"], int, int]:
    """(the tile of each run of a slice, numbers of a run, tiles of the matrix) of rows or columns.

    which: the dims that are put together to them. A run is as long as divides both a tile and the
    slice's last of these dims, in which it lies.
    """
    place = jnp.zeros((), jnp.int32)
    for d in which:
        axes = axes_of(cut[d])
        first = lax.axis_index(axes) * here[d] if axes else 0
        place = place[..., None] * whole[d] + first + jnp.arange(here[d])
    length = math.gcd(here[which[-1]], TILE)
    tiles = -(-math.prod(whole[d] for d in which) // TILE)
    return place.reshape(-1)[::length] // TILE, length, tiles
