"""Paged latent attention in plain JAX: what every other implementation is tested against.

It gathers each sequence's pages into one row of keys, so that it works for pages of any size; a
contiguous cache is one large page a sequence.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.attention.api import Bias, apply_bias, biased
from dsv3_jax.kernels.mla_decode.operands import Pages, Results, Rows, rotated_keys
from dsv3_jax.quantization.block_scaled import BlockScaled, dequantize


def mla_decode(pages: Pages, *, scale: float, schedule: object = None) -> Results:
    """Softmax-weighted latents and log-sum-exp; see `api.mla_decode`."""
    del schedule  # one program does all the work
    q_latent, q_rope, latent, k_rope, table, lengths = pages
    numbers = jnp.clip(table, 0, k_rope.shape[0] - 1)  # a free entry may hold anything

    def rows(pool):
        return pool[numbers].reshape(numbers.shape[0], -1, pool.shape[-1])

    latent, k_rope = jax.tree.map(rows, (latent, k_rope))
    k_rope = rotated_keys(latent, k_rope)
    if isinstance(latent, BlockScaled):
        latent = dequantize(latent, q_latent.dtype)
    return mla_decode_contiguous(Rows(q_latent, q_rope, latent, k_rope, lengths), scale=scale)


def mla_decode_contiguous(
    rows: Rows, *, scale: float, schedule: object = None, bias: Bias | None = None
) -> Results:
    """The same from one row of keys a sequence; see `api.mla_decode_contiguous`.

    With the bias of `attention.api.mla_attention`, too.
    """
    del schedule

    def attend(*of_sequence):
        return _of_sequence(Rows(*of_sequence), scale, bias)

    if len(rows.lengths) > 1:
        return jax.vmap(attend)(*rows)
    # Without a dim for one sequence: XLA:CPU would transpose its keys for every product.
    context_TNC, lse_TN = attend(*(x[0] for x in rows))
    return context_TNC[None], lse_TN[None]


def _of_sequence(rows: Rows, scale: float, bias: Bias | None) -> Results:
    """`mla_decode_contiguous` of one sequence; no array has B."""
    q_latent, q_rope, latent, k_rope, length = rows
    new, heads, _ = q_latent.shape
    limit = length - (new - 1) + jnp.arange(new, dtype=length.dtype)
    seen = jnp.arange(latent.shape[0]) < limit[:, None]
    # Keys first: XLA:CPU would copy them for the other order.
    of_latent = jnp.einsum("SC,TNC->STN", latent, q_latent, preferred_element_type=jnp.float32)
    of_rope = jnp.einsum("SR,TNR->STN", k_rope, q_rope, preferred_element_type=jnp.float32)
    logits = jnp.moveaxis(of_latent + of_rope, 0, 2)
    # The lowest finite number, not -inf: a token that sees nothing must not become NaN.
    lowest = jnp.finfo(logits.dtype).min
    logits, seen_TNS = logits * scale, seen[:, None]
    if bias is not None:
        made_NTS = biased(bias, limit - 1, keys=latent.shape[0], heads=heads)
        by_head = apply_bias(logits.swapaxes(0, 1)[None], seen[None, None], made_NTS[None])
        logits, seen_TNS = (x[0].swapaxes(0, 1) for x in by_head)
    logits = jnp.where(seen_TNS, logits, lowest)
    probs = jax.nn.softmax(logits, axis=-1).astype(latent.dtype)
    # In f32: XLA's CPU backend would add bf16 products up in bf16.
    context = jnp.einsum("TNS,SC->TNC", probs.astype(jnp.float32), latent.astype(jnp.float32))
    context = jnp.where((limit > 0)[:, None, None], context, 0).astype(q_latent.dtype)
    return context, jax.nn.logsumexp(logits, axis=-1)
