"""Dense products of block-scaled FP8 numbers on TPUs, in Pallas."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.kernels.gemm import tpu_matmul
from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.quantization.block_scaled import PER_BLOCK, BlockScaled

ROWS = 128  # of a tile; a last partial one is masked


def scaled_matmul(
    a: BlockScaled, b: BlockScaled, accumulate: Float[Array, "M N"] | None = None
) -> Float[Array, "M N"]:
    """a @ b.T; see `api.scaled_matmul`."""
    tpu_matmul.require()
    m, n = a.shape[0], b.shape[0]
    if b.tile == PER_BLOCK:
        tiles = -(-m // ROWS)
        return tpu_matmul.matmul(
            a.values,
            b.values[None],
            jnp.zeros(tiles, jnp.int32),
            jnp.full(1, tiles, jnp.int32),
            ROWS,
            a_scales=a.scales,
            b_scales=b.scales[None],
        )
    tiles = a.shape[1] // tpu_matmul.SLAB
    start = jnp.zeros((m, n), jnp.float32) if accumulate is None else accumulate
    return tpu_matmul.wgrad(
        a.values,
        b.values,
        jnp.zeros(tiles, jnp.int32),
        jnp.full(1, tiles, jnp.int32),
        start[None],
        a_scales=a.scales,
        b_scales=b.scales.mT,
    )[0]


def scaled_wgrad(a: BlockScaled, b: BlockScaled, total: GradientSum) -> None:
    """Leaves a @ b.T in its place; see `api.scaled_wgrad`."""
    total.put(scaled_matmul(a, b))
