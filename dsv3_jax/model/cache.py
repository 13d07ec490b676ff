"""The latent cache of one layer: the state that decoding carries.

MLA caches the normed kv latent (kv_lora_rank) and the rotated shared key (qk_rope_head_dim):
576 values a token and layer for V3, 70,272 bytes a token over 61 layers in BF16. Which memory the
rows live in (paging) is policy and belongs to `inference`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig


class LatentCache(NamedTuple):
    """Rows [0, position) of each sequence are valid; a layer dim leads when stacked for a scan."""

    latent: Float[Array, "*L B S C"]
    k_rope: Float[Array, "*L B S R"]


def init_cache(config: ModelConfig, batch: int, length: int, layers: int) -> LatentCache:
    """An all-zero cache for `layers` stacked layers, in the model's dtype."""
    shape = (layers, batch, length)
    return LatentCache(
        jnp.zeros((*shape, config.kv_lora_rank), config.dtype),
        jnp.zeros((*shape, config.qk_rope_head_dim), config.dtype),
    )


def append(
    cache: LatentCache,
    latent: Float[Array, "B T C"],
    k_rope: Float[Array, "B T R"],
    start: Int[Array, " B"],
) -> LatentCache:
    """The cache of one layer with T new rows written from row start[b] on in each sequence.

    Rows past the sequence's own end (padding of a ragged batch) are overwritten by later tokens
    before any query can see them. The caller keeps start + T within the cache.
    """

    def write(rows, new, at):
        return jax.lax.dynamic_update_slice(rows, new.astype(rows.dtype), (at, 0))

    return LatentCache(
        jax.vmap(write)(cache.latent, latent, start), jax.vmap(write)(cache.k_rope, k_rope, start)
    )
