"""Multi-head latent attention (V3 report, section 2.1.1, eqs. 1-11), in its two forms.

`mla_expand` up-projects the latent to keys and values of every head: few FLOPs per pair of tokens,
right for training and prefill. `mla_absorb` moves the up-projections to the query and the output,
so that it reads only the 576 cached values a token: right for decoding. They are the same function.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.attention.api import ascending, documents_between, mla_attention
from dsv3_jax.kernels.mla_decode.api import Pages, Rows, mla_decode, mla_decode_contiguous
from dsv3_jax.kernels.mla_decode.schedule import Schedule
from dsv3_jax.model.cache import LatentCache, PagedCache, append, append_on_mesh, append_paged
from dsv3_jax.model.fused import norm_for
from dsv3_jax.model.held import parameter
from dsv3_jax.model.linear import Spread, linear
from dsv3_jax.model.norm import LATENT_NORM_EPS, rms_norm
from dsv3_jax.model.rope import apply_rope, rope_tables, softmax_scale
from dsv3_jax.parallel.collectives import Axes
from dsv3_jax.parallel.context import Partial, ring_attention, sum_attention
from dsv3_jax.parallel.sharding import Layout, constrain, in_layout_order, in_natural_order
from dsv3_jax.quantization.block_scaled import StraightThrough
from dsv3_jax.quantization.recipe import BF16, LinearRecipe, Recipe


def mla_expand(
    q_nope_BTNH: Float[Array, "B T N H"],
    q_rope_BTNR: Float[Array, "B T N R"],
    latent_BSC: Float[Array, "B S C"] | StraightThrough,
    k_rope_BSR: Float[Array, "B S R"],
    kv_b_proj: Float[Array, "N HU C"],
    scale: float,
    *,
    offset: int | Int[Array, ""] = 0,
    segments: Int[Array, "B S"] | None = None,
    recipe: LinearRecipe | None = None,
) -> Float[Array, "B T N U"]:
    """Causal attention of every head with keys and values expanded from the latent; softmax in f32.

    Query t is the token of row offset + t. segments holds the document number of each row, a
    document being one run of equal numbers; None lets attention cross documents of a packed row, as
    V3 was trained (section 4.1). kv_b_proj holds, per head, H rows of W^UK and then U rows of W^UV;
    the recipe is for its product. kernels/attention says what runs where.
    """
    inputs = (q_nope_BTNH, q_rope_BTNR, latent_BSC, k_rope_BSR, kv_b_proj)
    return _attend(*inputs, scale, offset, segments, recipe)[0]


def _attend(q_nope, q_rope, latent, k_rope, kv_b_proj, scale, offset, segments, recipe):
    """`mla_expand` and the logarithm of the softmax's sum, [B, N, T] in f32.

    segments may be the Documents of queries and of keys of which no query is one.
    """
    kv = linear(latent, kv_b_proj, recipe)
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    return mla_attention(q, kv, k_rope, scale=scale, offset=offset, segments=segments)


def mla_expand_on_mesh(
    q_nope_BTNH: Float[Array, "B T N H"],
    q_rope_BTNR: Float[Array, "B T N R"],
    latent_BTC: Float[Array, "B T C"],
    k_rope_BTR: Float[Array, "B T R"],
    kv_b_proj: Float[Array, "N HU C"],
    segments: Int[Array, "B T"] | None,
    scale: float,
    recipe: LinearRecipe | None,
    layout: Layout,
) -> Float[Array, "B T N U"]:
    """`mla_expand` of a sequence to itself: heads over `tensor`, tokens over `context`.

    Latents, not keys and values, go from device to device: gathered whole, or around a ring, as
    layout.config.context says. Tokens lie in the layout's order.
    """
    axes, length = layout.axes("seq"), latent_BTC.shape[1]
    in_ring = layout.order(length) is not None
    if in_ring and segments is not None:
        numbers = ascending(in_natural_order(segments, layout))
        segments = constrain(in_layout_order(numbers, layout), layout, "batch", "seq")

    def attend(q_nope, q_rope, latent, k_rope, kv_b, segments):
        if in_ring:

            def partly(queries, keys):
                q_nope, q_rope, of_queries = queries
                latent, k_rope, of_keys = keys
                # Only a device's own keys are as many as the queries, and in their order.
                own = q_nope.shape[1] == latent.shape[1]
                offset = 0 if own else latent.shape[1]  # from there on all keys are seen
                documents = None if segments is None else documents_between(of_queries, of_keys)
                inputs = (q_nope, q_rope, latent, k_rope, kv_b)
                out, lse = _attend(*inputs, scale, offset, documents, recipe)
                values = out.astype(jnp.float32).swapaxes(1, 2)
                return Partial(lse, jnp.ones_like(lse), values)

            queries, keys = (q_nope, q_rope, segments), (latent, k_rope, segments)
            out_BNTU = ring_attention(partly, queries, keys, *axes)
            return out_BNTU.astype(q_nope.dtype).swapaxes(1, 2)
        keys, offset = (latent, k_rope, segments), 0
        if layout.size("seq") > 1:
            offset = jax.lax.axis_index(axes) * q_nope.shape[1]
            keys = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True), keys)
        latent, k_rope, segments = keys
        return mla_expand(
            q_nope,
            q_rope,
            latent,
            k_rope,
            kv_b,
            scale,
            offset=offset,
            segments=segments,
            recipe=recipe,
        )

    q, tokens = layout.spec("batch", "seq", "heads", None), layout.spec("batch", "seq")
    of_segments = None if segments is None else tokens
    weight = layout.spec("heads", None, None)
    inputs = (q, q, tokens, tokens, weight, of_segments)
    return layout.shard_map(attend, inputs, q)(
        q_nope_BTNH, q_rope_BTNR, latent_BTC, k_rope_BTR, kv_b_proj, segments
    )


def mla_absorb(
    q_nope_BTNH: Float[Array, "B T N H"],
    q_rope_BTNR: Float[Array, "B T N R"],
    cache: LatentCache | PagedCache,
    lengths: Int[Array, " B"],
    kv_b_proj: Float[Array, "N HU C"],
    scale: float,
    schedule: Schedule | None = None,
    pieces: Axes = (),
) -> Float[Array, "B T N U"]:
    """What `mla_expand` returns for the last T of lengths[b] cached tokens, each seeing itself and
    those before it, with W^UK absorbed into the query and W^UV into the output.

    All heads attend to one shared key of C + R dims whose first C dims are also the value
    (DeepSeek-V3:inference/model.py, `attn_impl="absorb"`). The schedule is `plan`'s for lengths.
    Inside a shard_map the cache may be the device's piece of rows cut over the mesh axes `pieces`.
    """
    q_latent_BTNC, w_uv_NUC = _absorbed(q_nope_BTNH, kv_b_proj)
    if pieces:
        lengths = lengths - jax.lax.axis_index(pieces) * cache.latent.shape[1]
    queries = (q_latent_BTNC, q_rope_BTNR)
    if isinstance(cache, PagedCache):
        results = mla_decode(Pages(*queries, *cache, lengths), scale=scale, schedule=schedule)
    else:
        rows = Rows(*queries, *cache, lengths)
        results = mla_decode_contiguous(rows, scale=scale, schedule=schedule)
    context_BTNC, lse_BTN = results
    dtype = context_BTNC.dtype
    values_BTNU = jnp.einsum("BTNC,NUC->BTNU", context_BTNC, w_uv_NUC.astype(dtype))
    if pieces:
        # After W^UV: U numbers a head travel, not C.
        values, lse = values_BTNU.astype(jnp.float32).swapaxes(1, 2), lse_BTN.swapaxes(1, 2)
        values = sum_attention(Partial(lse, jnp.ones_like(lse), values), pieces)
        values_BTNU = values.swapaxes(1, 2).astype(dtype)
    return values_BTNU


def _absorbed(q_nope_BTNH, kv_b_proj):
    """Queries for latents, [B, T, N, C], and W^UV."""
    nope_dim = q_nope_BTNH.shape[-1]
    w_uk_NHC, w_uv_NUC = kv_b_proj[:, :nope_dim], kv_b_proj[:, nope_dim:]
    dtype = q_nope_BTNH.dtype
    return jnp.einsum("BTNH,NHC->BTNC", q_nope_BTNH, w_uk_NHC.astype(dtype)), w_uv_NUC


def mla_absorb_on_mesh(
    q_nope_BTNH: Float[Array, "B T N H"],
    q_rope_BTNR: Float[Array, "B T N R"],
    cache: LatentCache | PagedCache,
    lengths: Int[Array, " B"],
    kv_b_proj: Float[Array, "N HU C"],
    scale: float,
    layout: Layout,
) -> Float[Array, "B T N U"]:
    """`mla_absorb` with sequences over the batch axes, heads over `tensor`, cache over `context`.

    Where a contiguous cache's rows lie over `context`, each device attends to its own, and the
    partial softmaxes are put together. Pages are whole on all devices of a `context` group.
    """
    q, weight = layout.spec("batch", None, "heads", None), layout.spec("heads")
    over_context = isinstance(cache, LatentCache) and layout.size("cache") > 1
    of_cache: Any = layout.spec("batch", "cache") if over_context else layout.spec("batch")
    pieces = layout.axes("cache") if over_context else ()
    specs = (q, q, jax.tree.map(lambda _: of_cache, cache), layout.spec("batch"), weight)
    # Unchecked: Hopper's kernel cannot say along which devices its results differ.
    attend = partial(mla_absorb, scale=scale, pieces=pieces)
    attend = layout.shard_map(attend, specs, q, check_vma=False)
    return attend(q_nope_BTNH, q_rope_BTNR, cache, lengths, kv_b_proj)


class MLA(nn.Module):
    """Projections, latent norms and RoPE around `mla_expand` or `mla_absorb`."""

    config: ModelConfig
    recipe: Recipe = BF16
    layout: Layout | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"] | StraightThrough,
        positions: Int[Array, "#B T"],
        segments: Int[Array, "B T"] | None = None,
        cache: LatentCache | PagedCache | None = None,
        prefill: bool = False,
        schedule: Schedule | None = None,
    ) -> tuple[Float[Array, "B T D"], LatentCache | PagedCache | None]:
        """Attention output, and the cache with these T tokens appended at their positions.

        Without a cache, or with prefill=True (the cache is still empty), the T tokens attend to
        each other in the expanded form; otherwise they attend to all the cache holds in the
        absorbed form, which `segments` does not apply to and `schedule` may be planned for.
        """
        config, recipe, layout = self.config, self.recipe, self.layout
        rows = ("batch", "seq")
        to_heads = Spread(layout, rows, ("heads", None, None))
        to_latent = Spread(layout, ("batch", "residual"), (None, None))
        from_heads = Spread(layout, rows, (None, "heads"))
        init, ones = nn.initializers.normal(config.initializer_range), nn.initializers.ones
        dim, heads = config.hidden_size, config.num_attention_heads
        latent_dim, rope_dim = config.kv_lora_rank, config.qk_rope_head_dim

        if config.q_lora_rank is None:
            q_proj = parameter(self, "q_proj", init, (heads, config.qk_head_dim, dim))
            q = linear(constrain(x, layout, *rows), q_proj, recipe.attention, spread=to_heads)
        else:
            rank = config.q_lora_rank
            q_a_proj = parameter(self, "q_a_proj", init, (rank, dim))
            q_latent = linear(x, q_a_proj, recipe.attention, spread=to_latent)
            norm = self.param("q_a_layernorm", ones, (rank,))
            # A projection to a latent is made where the rows are; then the narrow latent moves.
            normed = norm_for(q_latent, norm, LATENT_NORM_EPS, recipe.attention, layout)
            q_latent = constrain(normed, layout, *rows)
            q_b_proj = parameter(self, "q_b_proj", init, (heads, config.qk_head_dim, rank))
            q = linear(q_latent, q_b_proj, recipe.attention, spread=to_heads)
        q = constrain(q, layout, "batch", "seq", "heads")
        q_nope, q_rope = q[..., : config.qk_nope_head_dim], q[..., config.qk_nope_head_dim :]

        kv_a_proj = parameter(self, "kv_a_proj_with_mqa", init, (latent_dim + rope_dim, dim))
        latent_and_rope = linear(x, kv_a_proj, recipe.attention, spread=to_latent)
        latent_and_rope = constrain(latent_and_rope, layout, "batch", "seq")
        norm = self.param("kv_a_layernorm", ones, (latent_dim,))
        latent: Any = latent_and_rope[..., :latent_dim]
        if cache is None and layout is None:  # nothing but kv_b_proj reads it
            latent = norm_for(latent, norm, LATENT_NORM_EPS, recipe.attention)
        else:
            latent = rms_norm(latent, norm, LATENT_NORM_EPS)
        cos, sin = rope_tables(positions, config)
        q_rope = apply_rope(q_rope, cos, sin)
        k_rope = apply_rope(latent_and_rope[..., latent_dim:], cos, sin)

        value_dim = config.v_head_dim
        kv_b_proj = parameter(
            self, "kv_b_proj", init, (heads, config.qk_nope_head_dim + value_dim, latent_dim)
        ).astype(x.dtype)
        scale = softmax_scale(config)
        if cache is not None:
            # A prompt may lie in another order over devices; the cache's rows are in order.
            new = (in_natural_order(latent, layout), in_natural_order(k_rope, layout))
            if layout is not None:
                cache = append_on_mesh(cache, *new, positions[:, 0], layout, prefill)
            else:
                write: Any = append_paged if isinstance(cache, PagedCache) else append
                cache = write(cache, *new, positions[:, 0])
        if cache is None or prefill:
            attend_to = (q_nope, q_rope, latent, k_rope, kv_b_proj)
            if layout is None:
                out = mla_expand(*attend_to, scale, segments=segments, recipe=recipe.attention)
            else:
                out = mla_expand_on_mesh(*attend_to, segments, scale, recipe.attention, layout)
        else:
            lengths = positions[:, -1] + 1
            attend_to = (q_nope, q_rope, cache, lengths, kv_b_proj, scale)
            if layout is None:
                out = mla_absorb(*attend_to, schedule)
            else:
                out = mla_absorb_on_mesh(*attend_to, layout)
        o_proj = parameter(self, "o_proj", init, (dim, heads, value_dim)).reshape(dim, -1)
        out = out.reshape(*out.shape[:2], -1)
        return linear(out, o_proj, recipe.o_proj, spread=from_heads), cache
