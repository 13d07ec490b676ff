"""Products of rows grouped by expert on Hopper, in Pallas Mosaic GPU.

The loop is the dense one's (`gemm/hopper_matmul.py`). What is added is a table of row tiles, made
on the device from the group sizes: a tile never spans two experts, and the last tile of a group
stores only its own rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend, hopper
from dsv3_jax.kernels.gemm import tiles
from dsv3_jax.kernels.gemm.hopper_matmul import Tile, WorkTable, matmul
from dsv3_jax.kernels.gemm.hopper_wgrad import wgrad
from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.quantization.block_scaled import BlockScaled


def grouped_matmul(
    rows: Float[Array, "M K"] | BlockScaled,
    weights: Float[Array, "E N K"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    *,
    alignment: int = 128,
    tile: Tile | None = None,
) -> Float[Array, "M N"]:
    """Each row times its group's weights; see `api.grouped_matmul`. `tile` overrides the choice."""
    _require(rows.dtype, alignment, *weights.shape[1:])
    m = rows.shape[0]
    if m % 8:
        raise NotImplementedError(f"M={m} must be a multiple of 8")
    if not isinstance(rows, BlockScaled) or not isinstance(weights, BlockScaled):
        return _differentiable(rows, weights, group_sizes, tile or tiles.BF16)
    experts, n, k = weights.shape
    tile = tile or tiles.grouped(m, experts, n, k, hopper.multiprocessors())
    return matmul(
        rows.values,
        weights.values,
        tile,
        a_scales=rows.scales.mT,
        b_scales=weights.scales,
        work=contiguous_work(group_sizes, m, tile),
    )


def grouped_dgrad(
    d_out: Float[Array, "M N"],
    weights: Float[Array, "E N K"],
    group_sizes: Int[Array, " E"],
    *,
    alignment: int = 128,
    tile: Tile | None = None,
) -> Float[Array, "M K"]:
    """The rows' gradient; see `api.grouped_dgrad`."""
    _require(d_out.dtype, alignment, *weights.shape[1:])
    if d_out.dtype != jnp.bfloat16 or d_out.shape[0] % 8:
        raise NotImplementedError(f"{d_out.dtype} {d_out.shape} must be bfloat16, 8 rows at a time")
    tile = tile or tiles.BF16
    work = contiguous_work(group_sizes, d_out.shape[0], tile)
    return matmul(d_out, weights, tile, work=work, b_rows_first=True)


def grouped_wgrad(
    a: Float[Array, "N M"] | BlockScaled,
    b: Float[Array, "K M"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    *,
    accumulate: Float[Array, "E N K"] | None = None,
    alignment: int = 128,
    tile: Tile | None = None,
) -> Float[Array, "E N K"]:
    """Each expert's weight gradient; see `api.grouped_wgrad`."""
    _require(a.dtype, alignment, a.shape[0], b.shape[0])
    return _wgrad(a, b, group_sizes, tile, accumulate=accumulate)


def grouped_wgrad_into(
    a: Float[Array, "N M"] | BlockScaled,
    b: Float[Array, "K M"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    into: GradientSum,
    *,
    alignment: int = 128,
    tile: Tile | None = None,
) -> None:
    """`grouped_wgrad`, left in its place by the kernel."""
    _require(a.dtype, alignment, a.shape[0], b.shape[0])
    if hopper.interpreted():
        into.put(_wgrad(a, b, group_sizes, tile))
    else:
        _wgrad(a, b, group_sizes, tile, into=into)


def _wgrad(a, b, group_sizes, tile: Tile | None, **results: Any) -> Any:
    starts = jnp.cumsum(group_sizes) - group_sizes
    if isinstance(a, BlockScaled):
        scales: Any = {"a_scales": a.scales.mT, "b_scales": b.scales.mT}
        operands = a.values, b.values, starts, group_sizes
        return wgrad(*operands, tile or tiles.WGRAD, **scales, **results)
    # The tensor core reads bfloat16 with tokens first; a caller's transpose and this one cancel.
    return wgrad(a.mT, b.mT, starts, group_sizes, tile or tiles.BF16_WGRAD, **results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _differentiable(rows, weights, group_sizes, tile):
    work = contiguous_work(group_sizes, rows.shape[0], tile)
    return matmul(rows, weights, tile, work=work)


def _forward(rows, weights, group_sizes, tile):
    return _differentiable(rows, weights, group_sizes, tile), (rows, weights, group_sizes)


def _backward(tile, residuals, d_out):
    rows, weights, group_sizes = residuals
    d_rows = grouped_dgrad(d_out, weights, group_sizes, tile=tile)
    d_weights = grouped_wgrad(d_out.mT, rows.mT, group_sizes).astype(weights.dtype)
    return d_rows, d_weights, np.zeros(group_sizes.shape, jax.dtypes.float0)


backend.define_vjp(_differentiable, _forward, _backward)


def _require(dtype, alignment: int, *dims: int) -> None:
    """Raises NotImplementedError for what TMA and wgmma cannot read."""
    hopper.require()
    if dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        raise NotImplementedError(f"operands must be bfloat16 or block-scaled, and are {dtype}")
    if alignment % 128:
        raise NotImplementedError(f"{alignment=} must be a multiple of 128")
    multiple = 64 if dtype == jnp.bfloat16 else 8
    if any(dim % multiple for dim in dims):
        raise NotImplementedError(f"N and K, {dims}, must be multiples of {multiple} in {dtype}")


def masked_grouped_matmul(
    rows: Float[Array, "E M K"] | BlockScaled,
    weights: Float[Array, "E N K"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    *,
    tile: Tile | None = None,
) -> Float[Array, "E M N"]:
    """Each expert's rows times its weights; see `api.masked_grouped_matmul`."""
    experts, buffer, k = rows.shape
    _require(rows.dtype, 128, *weights.shape[1:])
    m = buffer + -buffer % 64  # a tile begins at a multiple of a wgmma's rows
    rows = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, m - buffer), (0, 0))), rows)
    tile = tile or (tiles.MASKED if m > 64 else tiles.MASKED_64)
    work = work_table(
        jnp.arange(experts, dtype=jnp.int32) * m,
        group_sizes,
        tile,
        limit=experts * -(-m // tile.m),
        used=experts * m,
    )
    if not isinstance(rows, BlockScaled):
        assert not isinstance(weights, BlockScaled)
        out = matmul(rows.reshape(experts * m, k), weights, tiles.BF16, work=work)
    else:
        assert isinstance(weights, BlockScaled)
        out = matmul(
            rows.values.reshape(experts * m, k),
            weights.values,
            tile,
            a_scales=rows.scales.reshape(experts * m, -1).mT,
            b_scales=weights.scales,
            work=work,
        )
    return out.reshape(experts, m, -1)[:, :buffer]


def contiguous_work(group_sizes: Int[Array, " E"], rows: int, tile: Tile) -> WorkTable:
    """The row tiles of groups that follow each other among `rows` rows."""
    starts = jnp.cumsum(group_sizes) - group_sizes
    limit = rows // tile.m + group_sizes.shape[0]
    return work_table(starts, group_sizes, tile, limit=limit, used=group_sizes.sum())


def work_table(
    starts: Int[Array, " E"], sizes: Int[Array, " E"], tile: Tile, limit: int, used
) -> WorkTable:
    """The row tiles of groups that begin at `starts`; `limit` is the most there can be."""
    tiles = -(-sizes // tile.m)
    ends = jnp.cumsum(tiles)
    t = jnp.arange(limit, dtype=jnp.int32)
    # How many groups end at or before tile t: E comparisons, where a binary search takes kernels.
    expert = (t[:, None] >= ends[None, :]).sum(1, dtype=jnp.int32)
    expert = jnp.minimum(expert, sizes.shape[0] - 1)
    row = starts[expert] + (t - (ends - tiles)[expert]) * tile.m
    end = (starts + sizes)[expert]
    columns = expert, row, end, ends[-1:], jnp.reshape(used, 1)
    return WorkTable(*(jnp.asarray(column, jnp.int32) for column in columns))
