"""The grouped products in plain JAX: what every other implementation is tested against.

`jax.lax.ragged_dot` says exactly what is meant. How fast it is depends on the backend: XLA's CPU
and GPU multiply every row by every expert's weights and mask, and one H200 reached 25 TFLOP/s where
750 is ordinary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.quantization.block_scaled import BlockScaled, dequantize

# [N, M] x [K, M] -> [E, N, K]: the contracted dimension is the ragged one.
_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())),
    lhs_ragged_dimensions=[1],
    rhs_group_dimensions=[],
)


def grouped_matmul(
    rows: Float[Array, "M K"] | BlockScaled,
    weights: Float[Array, "E N K"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    *,
    alignment: int = 1,
) -> Float[Array, "M N"]:
    """Each row times its group's weights; see `api.grouped_matmul`. Any sizes, aligned or not."""
    del alignment
    dtype = _result_dtype(rows)
    out = jax.lax.ragged_dot(
        _plain(rows),
        _plain(weights).mT,
        group_sizes,
        precision=_precision(rows),
        preferred_element_type=jnp.float32,
    )
    return out.astype(dtype)


def grouped_dgrad(
    d_out: Float[Array, "M N"],
    weights: Float[Array, "E N K"],
    group_sizes: Int[Array, " E"],
    *,
    alignment: int = 1,
) -> Float[Array, "M K"]:
    """The rows' gradient; see `api.grouped_dgrad`. Any sizes, aligned or not."""
    return grouped_matmul(d_out, weights.mT, group_sizes, alignment=alignment)


def masked_grouped_matmul(
    rows: Float[Array, "E M K"] | BlockScaled,
    weights: Float[Array, "E N K"] | BlockScaled,
    group_sizes: Int[Array, " E"],
) -> Float[Array, "E M N"]:
    """Each expert's rows times its weights; rows beyond an expert's size are zero here."""
    out = jnp.einsum(
        "emk,enk->emn",
        _plain(rows),
        _plain(weights),
        precision=_precision(rows),
        preferred_element_type=jnp.float32,
    )
    used = jnp.arange(out.shape[1])[None, :] < group_sizes[:, None]
    return jnp.where(used[..., None], out, 0).astype(_result_dtype(rows))


def grouped_wgrad(
    a: Float[Array, "N M"] | BlockScaled,
    b: Float[Array, "K M"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    *,
    accumulate: Float[Array, "E N K"] | None = None,
    alignment: int = 1,
) -> Float[Array, "E N K"]:
    """Each expert's weight gradient in float32; see `api.grouped_wgrad`."""
    del alignment
    out = jax.lax.ragged_dot_general(
        _plain(a),
        _plain(b),
        group_sizes,
        _OVER_ROWS,
        precision=_precision(a),
        preferred_element_type=jnp.float32,
    )
    return out if accumulate is None else accumulate + out


def grouped_wgrad_into(
    a: Float[Array, "N M"] | BlockScaled,
    b: Float[Array, "K M"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    into: GradientSum,
    *,
    alignment: int = 1,
) -> None:
    """`grouped_wgrad`, left in its place."""
    into.put(grouped_wgrad(a, b, group_sizes, alignment=alignment))


def _plain(x: Array | BlockScaled) -> Array:
    return dequantize(x, jnp.float32) if isinstance(x, BlockScaled) else x


def _result_dtype(rows: Array | BlockScaled):
    return jnp.bfloat16 if isinstance(rows, BlockScaled) else rows.dtype


def _precision(x: Array | BlockScaled):
    exact = isinstance(x, BlockScaled) or x.dtype == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else None
