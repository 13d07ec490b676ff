"""The latent cache of one layer: the state that decoding carries.

MLA caches the normed kv latent (kv_lora_rank) and the rotated shared key (qk_rope_head_dim):
576 values a token and layer for V3, 70,272 bytes a token over 61 layers in BF16. Which memory the
rows live in (paging) is policy and belongs to `inference`.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels import backend
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE
from dsv3_jax.kernels.mla_decode.operands import fp8_latents, scaled_keys
from dsv3_jax.model.unstacked import Unstacked
from dsv3_jax.parallel.collectives import Axes
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout
from dsv3_jax.quantization.block_scaled import BlockScaled, dequantize


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


class ModelCache(NamedTuple):
    """The latent caches of all layers, per kind stacked or Unstacked; None where there are none.

    In the model's dtype. Source: V3 report, section 2.1.1.
    """

    dense: LatentCache | Unstacked | None
    moe: LatentCache | Unstacked | None


def init_model_cache(config: ModelConfig, batch: int, length: int) -> ModelCache:
    """Empty caches for `batch` sequences of up to `length` tokens.

    Zeros in the model's dtype: C + R values a token and layer. Raises nothing of its own. Source:
    V3 report, section 2.1.1 (boxed vectors of eqs. 1-5).

    >>> import dsv3_jax as ds
    >>> ds.init_model_cache(ds.load_config("tiny").model, batch=2, length=8).moe.latent.shape
    (2, 2, 8, 32)
    """
    dense, moe = config.num_dense_layers, config.num_moe_layers
    return ModelCache(
        init_cache(config, batch, length, dense) if dense else None,
        init_cache(config, batch, length, moe) if moe else None,
    )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["latent", "k_rope", "block_table"],
    meta_fields=["layers"],
)
@dataclass(frozen=True)
class PagedCache:
    """Pages of rows, which sequences hold by number; all layers' pages lie in one pool.

    Row i of sequence b is row i % page of page block_table[b, i // page], in each layer: layer l
    owns pages l P to (l + 1) P. An entry of -1 holds no page, and rows that fall there are dropped.
    One pool for all layers, so that a scan over layers carries it and writes it in place: caches
    that it takes apart and stacks again are read and written whole in every step.

    On a mesh that spreads sequences over devices the pool is all devices' pools one after the
    other, and each one's sequences hold pages of its own, numbered from 0.
    """

    latent: Float[Array, "LP page C"] | BlockScaled
    k_rope: Float[Array, "LP page R"]
    block_table: Int[Array, "B S"]
    layers: int = 1  # L, static

    def with_table(self, block_table: Int[Array | np.ndarray, "B S"]) -> "PagedCache":
        """The same pool, and other pages of it."""
        return dataclasses.replace(self, block_table=block_table)


AnyCache = ModelCache | PagedCache


def as_cached(
    latent: Float[Array, "B T C"], cache: LatentCache | PagedCache
) -> Float[Array, "B T C"]:
    """New latents as reading the cache would give them back: rounded where it holds FP8.

    A prompt that attends to its own latents then computes what it would from the cache, so that
    whole or in chunks it gives the same.
    """
    if not isinstance(cache.latent, BlockScaled):
        return latent
    return dequantize(fp8_latents(latent), latent.dtype)


def init_paged_cache(
    config: ModelConfig,
    block_table: Int[Array | np.ndarray, "B S"],
    pages: int,
    page: int = PAGE,
    fp8: bool = False,
    layers: int | None = None,
) -> PagedCache:
    """An all-zero pool of so many pages for each layer, in the model's dtype.

    With `fp8` the latents are E4M3, a scale for each token, and the rotated key is over that scale:
    644 bytes a token and layer of V3 where 1152 are. Without `layers` it has the main model's.
    """
    layers = config.num_hidden_layers if layers is None else layers
    shape = (layers * pages, page)
    latent: Any = jnp.zeros((*shape, config.kv_lora_rank), config.dtype)
    return PagedCache(
        latent=fp8_latents(latent) if fp8 else latent,
        k_rope=jnp.zeros((*shape, config.qk_rope_head_dim), config.dtype),
        block_table=jnp.asarray(block_table, jnp.int32),
        layers=layers,
    )


def of_layer(cache: PagedCache, layer: Int[Array, ""], layout: Layout = ONE_DEVICE) -> PagedCache:
    """The cache as one of its layers sees it: the same pool, and a table of its own pages."""
    pages = cache.latent.shape[0] // (cache.layers * layout.size("batch"))
    table = cache.block_table
    return cache.with_table(jnp.where(table < 0, -1, table + layer * pages))


def append(
    cache: LatentCache | PagedCache,
    latent: Float[Array, "B T C"],
    k_rope: Float[Array, "B T R"],
    start: Int[Array, " B"],
    layout: Layout = ONE_DEVICE,
    *,
    whole_prompt: bool = False,
) -> LatentCache | PagedCache:
    """The cache of one layer with T new rows written from row start[b] on in each sequence.

    Rows past the sequence's own end (padding of a ragged batch) are overwritten by later tokens
    before any query can see them. The caller keeps start + T within a contiguous cache; pages are
    as `of_layer` returned them, and quantise what they are given where they hold FP8.

    On a mesh each device writes the rows that it holds: those of its sequences, and of a contiguous
    cache its share of "cache". A whole prompt's rows lie over "seq" and go where the cache wants
    them.
    """
    tokens, of_cache = layout.spec("batch"), layout.spec("batch", "cache")
    write: Any = _append_rows
    if isinstance(cache, PagedCache):
        write, of_cache = _append_to_pages, tokens
    elif whole_prompt:
        return layout.constrain(_append_rows(cache, latent, k_rope, start), "batch", "cache")
    elif pieces := layout.axes("cache"):
        write = partial(_append_to_piece, axes=pieces)
    inputs = (of_cache, tokens, tokens, tokens)
    return layout.shard_map(write, inputs, of_cache)(cache, latent, k_rope, start)


def _append_rows(cache: LatentCache, latent, k_rope, start) -> LatentCache:
    def write(rows, new, at):
        return jax.lax.dynamic_update_slice(rows, new.astype(rows.dtype), (at, 0))

    if len(start) == 1 and backend.platform() == "cpu":
        write_only = partial(_write_only, start=start[0])
        return LatentCache(write_only(cache.latent, latent), write_only(cache.k_rope, k_rope))
    return LatentCache(
        jax.vmap(write)(cache.latent, latent, start), jax.vmap(write)(cache.k_rope, k_rope, start)
    )


def _write_only(rows: Float[Array, "1 S C"], new: Float[Array, "1 T C"], start: Int[Array, ""]):
    """The rows of the only sequence with new ones from `start` on, in place."""
    new = new.astype(rows.dtype)
    if new.shape[1] == 1 < rows.shape[1]:
        # With the row beside it: to write a single one XLA:CPU makes four copies of all.
        at = jnp.clip(start, 0, rows.shape[1] - 1)
        start = jnp.minimum(at, rows.shape[1] - 2)
        both = jax.lax.dynamic_slice_in_dim(rows, start, 2, axis=1)
        new = jnp.where((start + jnp.arange(2) == at)[:, None], new, both)
    return jax.lax.dynamic_update_slice_in_dim(rows, new, start, axis=1)


def _append_to_piece(cache: LatentCache, latent, k_rope, start, axes: Axes) -> LatentCache:
    """`_append_rows` where each device along `axes` has a part of a sequence's rows, in order."""
    held = cache.latent.shape[1]
    rows = start[:, None] + jnp.arange(latent.shape[1], dtype=start.dtype)
    rows -= jax.lax.axis_index(axes) * held
    rows = jnp.where(rows < 0, held, rows)  # a negative index would count from the end
    sequence = jnp.arange(len(start))[:, None]

    def write(rows_held, new):
        return rows_held.at[sequence, rows].set(new.astype(rows_held.dtype), mode="drop")

    return LatentCache(write(cache.latent, latent), write(cache.k_rope, k_rope))


def _append_to_pages(cache: PagedCache, latent, k_rope, start) -> PagedCache:
    page, slots = cache.latent.shape[1], cache.block_table.shape[1]
    rows = start[:, None] + jnp.arange(latent.shape[1], dtype=start.dtype)
    slot = jnp.minimum(rows // page, slots - 1)
    number = jnp.take_along_axis(cache.block_table, slot, axis=1)
    none = (number < 0) | (rows < 0) | (rows >= slots * page)
    number = jnp.where(none, cache.latent.shape[0], number)

    def write(pool, new):
        return pool.at[number, rows % page].set(new.astype(pool.dtype), mode="drop")

    rows_held = fp8_latents(latent) if isinstance(cache.latent, BlockScaled) else latent
    return dataclasses.replace(
        cache,
        latent=jax.tree.map(write, cache.latent, rows_held),
        k_rope=write(cache.k_rope, scaled_keys(rows_held, k_rope)),
    )
