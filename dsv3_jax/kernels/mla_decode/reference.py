"""Paged latent attention in plain JAX: what every other implementation is tested against.

It gathers each sequence's pages into one row of keys, so that it works for pages of any size; a
contiguous cache is one large page a sequence.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.attention.api import Bias, apply_bias, biased
from dsv3_jax.kernels.mla_decode.operands import Pages, Results, Rows
from dsv3_jax.quantization.block_scaled import BlockScaled, dequantize


def mla_decode(pages: Pages, *, scale: float, schedule: object = None) -> Results:
    """Softmax-weighted latents and log-sum-exp; see `api.mla_decode`."""
    del schedule  # one program does all the work
    q_latent, q_rope, latent, k_rope, table, lengths = pages
    numbers = jnp.clip(table, 0, k_rope.shape[0] - 1)  # a free entry may hold anything

    def rows(pool):
        return pool[numbers].reshape(numbers.shape[0], -1, pool.shape[-1])

    if isinstance(latent, BlockScaled):
        gathered = BlockScaled(rows(latent.values), rows(latent.scales), latent.tile)
        keys = dequantize(gathered, q_latent.dtype)
    else:
        keys = rows(latent)
    return mla_decode_contiguous(Rows(q_latent, q_rope, keys, rows(k_rope), lengths), scale=scale)


def mla_decode_contiguous(
    rows: Rows, *, scale: float, schedule: object = None, bias: Bias | None = None
) -> Results:
    """The same from one row of keys a sequence; see `api.mla_decode_contiguous`.

    With the bias of `attention.api.mla_attention`, too.
    """
    del schedule
    q_latent, q_rope, latent, k_rope, lengths = rows
    new = q_latent.shape[1]
    limit = lengths[:, None] - (new - 1) + jnp.arange(new, dtype=lengths.dtype)
    visible = jnp.arange(latent.shape[1]) < limit[..., None]
    logits = jnp.einsum(
        "BTNC,BSC->BNTS", q_latent, latent, preferred_element_type=jnp.float32
    ) + jnp.einsum("BTNR,BSR->BNTS", q_rope, k_rope, preferred_element_type=jnp.float32)
    # The lowest finite number, not -inf: a token that sees nothing must not become NaN.
    lowest = jnp.finfo(logits.dtype).min
    seen = visible[:, None]
    logits = logits * scale
    if bias is not None:
        sizes = {"keys": latent.shape[1], "heads": q_latent.shape[2]}
        made = jax.vmap(lambda positions: biased(bias, positions, **sizes))(limit - 1)
        logits, seen = apply_bias(logits, seen, made)
    logits = jnp.where(seen, logits, lowest)
    probs = jax.nn.softmax(logits, axis=-1).astype(latent.dtype)
    # In f32: XLA's CPU backend would add bf16 products up in bf16.
    context = jnp.einsum("BNTS,BSC->BTNC", probs.astype(jnp.float32), latent.astype(jnp.float32))
    context = jnp.where((limit > 0)[..., None, None], context, 0).astype(q_latent.dtype)
    return context, jax.nn.logsumexp(logits, axis=-1).swapaxes(1, 2)
