"""Paged latent attention in plain JAX: what every other implementation is tested against.

It gathers each sequence's pages into one row of keys, so that it works for pages of any size; a
contiguous cache is one large page a sequence.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.quantization.block_scaled import BlockScaled, dequantize


def mla_decode(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    latent: Float[Array, "P page C"] | BlockScaled,
    k_rope: Float[Array, "P page R"],
    block_table: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    schedule: object = None,
) -> Float[Array, "B T N C"]:
    """Softmax-weighted latents; see `api.mla_decode`."""
    del schedule  # one program does all the work
    pages = jnp.clip(block_table, 0, k_rope.shape[0] - 1)  # a free entry may hold anything

    def rows(pool):
        return pool[pages].reshape(pages.shape[0], -1, pool.shape[-1])

    if isinstance(latent, BlockScaled):
        gathered = BlockScaled(rows(latent.values), rows(latent.scales), latent.tile)
        keys = dequantize(gathered, q_latent.dtype)
    else:
        keys = rows(latent)
    return mla_decode_contiguous(q_latent, q_rope, keys, rows(k_rope), lengths, scale=scale)


def mla_decode_contiguous(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    latent: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    schedule: object = None,
) -> Float[Array, "B T N C"]:
    """The same from one row of keys a sequence; see `api.mla_decode_contiguous`."""
    del schedule
    new = q_latent.shape[1]
    limit = lengths[:, None] - (new - 1) + jnp.arange(new, dtype=lengths.dtype)
    visible = jnp.arange(latent.shape[1]) < limit[..., None]
    logits = jnp.einsum(
        "BTNC,BSC->BNTS", q_latent, latent, preferred_element_type=jnp.float32
    ) + jnp.einsum("BTNR,BSR->BNTS", q_rope, k_rope, preferred_element_type=jnp.float32)
    # The lowest finite number, not -inf: a token that sees nothing must not become NaN.
    lowest = jnp.finfo(logits.dtype).min
    logits = jnp.where(visible[:, None], logits * scale, lowest)
    probs = jax.nn.softmax(logits, axis=-1).astype(latent.dtype)
    # In f32: XLA's CPU backend would add bf16 products up in bf16.
    context = jnp.einsum("BNTS,BSC->BTNC", probs.astype(jnp.float32), latent.astype(jnp.float32))
    return jnp.where((limit > 0)[..., None, None], context, 0).astype(q_latent.dtype)
