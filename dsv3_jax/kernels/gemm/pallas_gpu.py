"""Dense products of block-scaled FP8 numbers on Hopper, in Pallas Mosaic GPU.

The kernels want A's scales with rows last, so that one slab's scales of a tile are contiguous. The
quantising kernels write them so and hand out the transpose; XLA drops the two transposes.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.gemm import tiles
from dsv3_jax.kernels.gemm.hopper_matmul import Tile, matmul
from dsv3_jax.kernels.gemm.hopper_wgrad import wgrad
from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.quantization.block_scaled import PER_BLOCK, BlockScaled


def scaled_matmul(
    a: BlockScaled,
    b: BlockScaled,
    accumulate: Float[Array, "M N"] | None = None,
    *,
    tile: Tile | None = None,
) -> Float[Array, "M N"]:
    """a @ b.T; see `api.scaled_matmul`. `tile` overrides the heuristic."""
    hopper.require()
    rows = a.shape[0]
    a = pad_rows(a)
    if b.tile != PER_BLOCK:
        start, size = _one_group(a)
        if accumulate is not None and a.shape[0] != rows:
            accumulate = jnp.pad(accumulate, ((0, a.shape[0] - rows), (0, 0)))
        out = wgrad(
            a.values,
            b.values,
            start,
            size,
            tile or tiles.WGRAD,
            a_scales=a.scales.mT,
            b_scales=b.scales.mT,
            accumulate=None if accumulate is None else accumulate[None],
        )
        return out[0, :rows]
    tile = tile or tiles.dense(a.shape[0], b.shape[0], b.shape[1], hopper.multiprocessors())
    out = matmul(a.values, b.values[None], tile, a_scales=a.scales.mT, b_scales=b.scales[None])
    return out[:rows]


def scaled_wgrad(
    a: BlockScaled, b: BlockScaled, total: GradientSum, *, tile: Tile | None = None
) -> None:
    """Leaves a @ b.T in its place; see `api.scaled_wgrad`."""
    hopper.require()
    if a.shape[0] % 8 or hopper.interpreted():
        total.put(scaled_matmul(a, b, tile=tile))
        return
    scales: Any = {"a_scales": a.scales.mT, "b_scales": b.scales.mT}
    wgrad(a.values, b.values, *_one_group(a), tile or tiles.WGRAD, **scales, into=total)


def _one_group(a: BlockScaled) -> tuple[Int[Array, " 1"], Int[Array, " 1"]]:
    """Start and size of all tokens as one group."""
    return jnp.zeros(1, jnp.int32), jnp.full(1, a.shape[1], jnp.int32)


def pad_rows(x: BlockScaled, multiple: int = 8) -> BlockScaled:
    """`x` with rows of zeros up to a multiple, because TMA reads 8 rows at a time."""
    extra = -x.shape[0] % multiple
    if not extra:
        return x
    values, scales = (jnp.pad(leaf, ((0, extra), (0, 0))) for leaf in (x.values, x.scales))
    return BlockScaled(values, scales, x.tile)
