"""Products of rows grouped by expert on TPUs, in Pallas."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend
from dsv3_jax.kernels.gemm import tpu_matmul
from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.quantization.block_scaled import BlockScaled

ROWS = 128  # of a tile, which never spans two groups


def grouped_matmul(
    rows: Float[Array, "M K"] | BlockScaled,
    weights: Float[Array, "E N K"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    *,
    alignment: int = ROWS,
) -> Float[Array, "M N"]:
    """Each row times its group's weights; see `api.grouped_matmul`."""
    _require(alignment, rows, weights)
    if isinstance(rows, BlockScaled):
        assert isinstance(weights, BlockScaled)
        work = tpu_matmul.expert_of_tile(group_sizes, -(-rows.shape[0] // ROWS), ROWS)
        return tpu_matmul.matmul(
            rows.values,
            weights.values,
            *work,
            ROWS,
            a_scales=rows.scales,
            b_scales=weights.scales,
        )
    assert not isinstance(weights, BlockScaled)
    return _differentiable(rows, weights, group_sizes)


def masked_grouped_matmul(
    rows: Float[Array, "E M K"] | BlockScaled,
    weights: Float[Array, "E N K"] | BlockScaled,
    group_sizes: Int[Array, " E"],
) -> Float[Array, "E M N"]:
    """Each expert's rows times its weights; see `api.masked_grouped_matmul`."""
    del group_sizes  # reading the weights is nearly all of the time
    experts, m, k = rows.shape
    _require(ROWS, rows, weights)
    height = min(m, ROWS)
    if m % height or height % 8:
        raise NotImplementedError(f"M={m} must be a multiple of {ROWS}, or of 8 below it")
    tiles = m // height
    tile_expert = jnp.repeat(jnp.arange(experts, dtype=jnp.int32), tiles)
    work = tile_expert, jnp.full(1, experts * tiles, jnp.int32), height
    if isinstance(rows, BlockScaled):
        assert isinstance(weights, BlockScaled)
        out = tpu_matmul.matmul(
            rows.values.reshape(experts * m, k),
            weights.values,
            *work,
            a_scales=rows.scales.reshape(experts * m, -1),
            b_scales=weights.scales,
        )
    else:
        assert not isinstance(weights, BlockScaled)
        out = tpu_matmul.matmul(rows.reshape(experts * m, k), weights, *work)
    return out.reshape(experts, m, -1)


def grouped_dgrad(
    d_out: Float[Array, "M N"],
    weights: Float[Array, "E N K"],
    group_sizes: Int[Array, " E"],
    *,
    alignment: int = ROWS,
) -> Float[Array, "M K"]:
    """The rows' gradient; see `api.grouped_dgrad`."""
    _require(alignment, d_out, weights)
    work = tpu_matmul.expert_of_tile(group_sizes, -(-d_out.shape[0] // ROWS), ROWS)
    return tpu_matmul.matmul(d_out, weights, *work, ROWS, b_rows_first=True)


def grouped_wgrad(
    a: Float[Array, "N M"] | BlockScaled,
    b: Float[Array, "K M"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    *,
    accumulate: Float[Array, "E N K"] | None = None,
    alignment: int = ROWS,
) -> Float[Array, "E N K"]:
    """Each expert's weight gradient; see `api.grouped_wgrad`."""
    _require(alignment, a, b)
    tokens = a.shape[1]
    if tokens % ROWS:
        raise NotImplementedError(f"M={tokens} must be a multiple of {ROWS}")
    work = tpu_matmul.expert_of_tile(group_sizes, tokens // ROWS, ROWS)
    start = accumulate
    if start is None:
        start = jnp.zeros((group_sizes.shape[0], a.shape[0], b.shape[0]), jnp.float32)
    if isinstance(a, BlockScaled):
        assert isinstance(b, BlockScaled)
        return tpu_matmul.wgrad(
            a.values, b.values, *work, start, a_scales=a.scales, b_scales=b.scales.mT
        )
    assert not isinstance(b, BlockScaled)
    return tpu_matmul.wgrad(a, b, *work, start)


def grouped_wgrad_into(
    a: Float[Array, "N M"] | BlockScaled,
    b: Float[Array, "K M"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    into: GradientSum,
    *,
    alignment: int = ROWS,
) -> None:
    """`grouped_wgrad`, left in its place."""
    into.put(grouped_wgrad(a, b, group_sizes, alignment=alignment))


@jax.custom_vjp
def _differentiable(rows, weights, group_sizes):
    work = tpu_matmul.expert_of_tile(group_sizes, -(-rows.shape[0] // ROWS), ROWS)
    return tpu_matmul.matmul(rows, weights, *work, ROWS)


def _forward(rows, weights, group_sizes):
    return _differentiable(rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(residuals, d_out):
    rows, weights, group_sizes = residuals
    d_rows = grouped_dgrad(d_out, weights, group_sizes)
    extra = -rows.shape[0] % ROWS
    d_out, rows = (jnp.pad(x, ((0, extra), (0, 0))) for x in (d_out, rows))
    d_weights = grouped_wgrad(d_out.mT, rows.mT, group_sizes).astype(weights.dtype)
    return d_rows, d_weights, np.zeros(group_sizes.shape, jax.dtypes.float0)


backend.define_vjp(_differentiable, _forward, _backward)


def _require(alignment: int, *operands: Array | BlockScaled) -> None:
    """Raises NotImplementedError for what these kernels cannot multiply."""
    tpu_matmul.require(*(x.dtype for x in operands))
    if alignment % ROWS:
        raise NotImplementedError(f"{alignment=} must be a multiple of {ROWS}")
