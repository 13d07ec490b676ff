"""Paged latent attention for TPUs, in Pallas: one page a step, softmax kept as it goes.

The grid walks each sequence's pages; the block table, fetched ahead of the steps, tells the
pipeline which page comes next. Steps past a sequence's last page name that page again, so that
nothing is fetched, and do nothing. Compiled ahead of time and run in Pallas's TPU interpreter;
it has not been timed on a TPU.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dsv3_jax.kernels import tpu
from dsv3_jax.kernels.mla_decode.operands import Pages, Results, Rows
from dsv3_jax.kernels.tpu import LOWEST, pltpu
from dsv3_jax.quantization.block_scaled import BlockScaled

LANES = 128
MAX_PAGE = 256  # rows of a contiguous cache that are read in one step


def mla_decode(pages: Pages, *, scale: float, schedule: object = None) -> Results:
    """Softmax-weighted latents and log-sum-exp; see `api.mla_decode`."""
    q_latent, q_rope, latent, k_rope, block_table, lengths = pages
    del schedule  # a TPU core walks all sequences
    tpu.require()
    if isinstance(latent, BlockScaled):
        raise NotImplementedError("an FP8 cache has no TPU kernel")
    batch, new, heads, width = q_latent.shape
    page = latent.shape[1]
    if width % LANES or page % 8:
        raise NotImplementedError(
            f"latents of {width} must be a multiple of {LANES}, pages of {page} tokens of 8"
        )
    rows = new * heads
    rope_width = q_rope.shape[-1]

    def this_page(b, s, table, lengths):
        last = jax.lax.max(jax.lax.div(lengths[b] + (page - 1), page) - 1, 0)
        return table[b, jax.lax.min(s, last)], 0, 0

    def this_sequence(b, s, table, lengths):
        return b, 0, 0

    out, lse = pl.pallas_call(
        functools.partial(_step, scale=scale, new=new, heads=heads, page=page),
        out_shape=(
            jax.ShapeDtypeStruct((batch, rows, width), q_latent.dtype),
            jax.ShapeDtypeStruct((batch, rows, LANES), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, block_table.shape[1]),
            in_specs=[
                pl.BlockSpec((1, rows, width), this_sequence),
                pl.BlockSpec((1, rows, rope_width), this_sequence),
                pl.BlockSpec((1, page, width), this_page),
                pl.BlockSpec((1, page, rope_width), this_page),
            ],
            out_specs=(
                pl.BlockSpec((1, rows, width), this_sequence),
                pl.BlockSpec((1, rows, LANES), this_sequence),
            ),
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, width), jnp.float32),
            ],
        ),
    )(
        block_table.astype(jnp.int32),
        lengths.astype(jnp.int32),
        q_latent.reshape(batch, rows, width),
        q_rope.reshape(batch, rows, rope_width),
        latent,
        k_rope,
    )
    return out.reshape(batch, new, heads, width), lse[..., 0].reshape(batch, new, heads)


def mla_decode_contiguous(rows: Rows, *, scale: float, schedule: object = None) -> Results:
    """The same for contiguous rows, which are pages in order."""
    page = math.gcd(rows.latent.shape[1], MAX_PAGE)
    return mla_decode(rows.in_pages(page), scale=scale, schedule=schedule)


def _step(
    table, lengths, q_latent, q_rope, latent, k_rope, out, lse, top, total, sums,
    *, scale: float, new: int, heads: int, page: int,
):  # fmt: skip
    """Adds one page to one sequence's running maximum, sum of weights and weighted latents."""
    sequence, s = pl.program_id(0), pl.program_id(1)
    length = lengths[sequence]

    @pl.when(s == 0)
    def _():
        top[...] = jnp.full(top.shape, LOWEST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    @pl.when(s * page < length)
    def _():
        keys = latent[0]
        dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        over_last = (((1,), (1,)), ((), ()))
        scores = dot(q_latent[0], keys, over_last) + dot(q_rope[0], k_rope[0], over_last)
        token = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) // heads
        column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        visible = s * page + column < length - (new - 1) + token
        scores = jnp.where(visible, scores * jnp.float32(scale), LOWEST)
        before = top[:, :1]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        # The mask once more: a row that sees nothing yet has LOWEST everywhere, and exp(0) is 1.
        weights = jnp.where(visible, jnp.exp(scores - now), 0.0)
        decay = jnp.exp(before - now)
        top[...] = jnp.broadcast_to(now, top.shape)
        summed = total[:, :1] * decay + jnp.sum(weights, axis=1, keepdims=True)
        total[...] = jnp.broadcast_to(summed, total.shape)
        product = dot(weights.astype(keys.dtype), keys, (((1,), (0,)), ((), ())))
        sums[...] = sums[...] * decay + product

    @pl.when(s == pl.num_programs(1) - 1)
    def _():
        weight = total[:, :1]
        some = weight > 0
        result = jnp.where(some, sums[...] / jnp.where(some, weight, 1.0), 0.0)
        out[0] = result.astype(out.dtype)
        lse[0] = jnp.where(some, top[...] + jnp.log(jnp.where(some, total[...], 1.0)), LOWEST)
