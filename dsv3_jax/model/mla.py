"""Multi-head latent attention (V3 report, section 2.1.1, eqs. 1-11), in its two forms.

`mla_expand` up-projects the latent to keys and values of every head: few FLOPs per pair of tokens,
right for training and prefill. `mla_absorb` moves the up-projections to the query and the output,
so that it reads only the 576 cached values a token: right for decoding. They are the same function.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.attention.api import Bias, ascending, documents_between, mla_attention
from dsv3_jax.kernels.mla_decode.api import Pages, Rows, mla_decode, mla_decode_contiguous
from dsv3_jax.kernels.mla_decode.kv_splits import KVSplits
from dsv3_jax.model.cache import LatentCache, PagedCache, append, as_cached
from dsv3_jax.model.forward_pass import Pass, Tokens
from dsv3_jax.model.linear import linear
from dsv3_jax.model.norm import LATENT_NORM_EPS
from dsv3_jax.model.parameters import parameters
from dsv3_jax.model.plain_products import are_few, row_by_row
from dsv3_jax.model.projection import ProductLayout, as_projection
from dsv3_jax.model.quantized_inputs import norm_for
from dsv3_jax.model.rope import apply_rope, rope_tables, rotate_heads, softmax_scale
from dsv3_jax.parallel.context import attention_to_cache, self_attention
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout
from dsv3_jax.quantization.block_scaled import StepWeight, StraightThrough
from dsv3_jax.quantization.recipe import LinearRecipe


def mla_expand(
    q_nope_BTNH: Float[Array, "B T N H"],
    q_rope_BTNR: Float[Array, "B T N R"],
    latent_BSC: Float[Array, "B S C"] | StraightThrough,
    k_rope_BSR: Float[Array, "B S R"],
    kv_b_proj: Float[Array, "N HU C"] | StepWeight,
    scale: float,
    *,
    offset: int | Int[Array, ""] = 0,
    segments: Int[Array, "B S"] | None = None,
    recipe: LinearRecipe | None = None,
    layout: Layout = ONE_DEVICE,
    bias: Bias | None = None,
) -> Float[Array, "B T N U"]:
    """Causal attention of every head with keys and values expanded from the latent; softmax in f32.

    Query t is the token of row offset + t (0 on a mesh, where S = T). segments holds the document
    number of each row, a document being one run of equal numbers; None lets attention cross
    documents of a packed row, as V3 was trained (section 4.1). kv_b_proj holds, per head, H rows of
    W^UK and then U rows of W^UV; the recipe is for its product. kernels/attention says what runs
    where; on a mesh latents travel, not keys and values, and tokens lie in the layout's order. The
    bias is that of `mla_attention`; ValueError where a ring spreads the sequence. Raises ValueError
    where S is shorter than the query or not its length on a mesh. Source: V3 report, section 2.1.1,
    eqs. 1-11.

    >>> import jax.numpy as jnp, dsv3_jax as ds
    >>> q, rope, latent = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2, 2)), jnp.ones((1, 3, 8))
    >>> ds.mla_expand(q, rope, latent, rope[:, :, 0], jnp.ones((2, 4 + 5, 8)), scale=0.4).shape
    (1, 3, 2, 5)
    """
    q_BTNI = jnp.concatenate([q_nope_BTNH, q_rope_BTNR], axis=-1)
    keys = latent_BSC, k_rope_BSR
    return _expanded(q_BTNI, keys, kv_b_proj, scale, offset, segments, recipe, layout, bias)


def _expanded(
    q_BTNI: Array,
    keys: tuple[Any, Array],
    kv_b_proj: Any,
    scale: float,
    offset: Any,
    segments: Array | None,
    recipe: LinearRecipe | None,
    layout: Layout,
    bias: Bias | None,
) -> Array:
    """`mla_expand` of whole queries, I = H + R; keys are latents and shared rope keys."""
    if bias is not None and layout.order(keys[1].shape[1]) is not None:
        raise ValueError(
            "an attention bias needs whole sequences of keys, which a ring does not have: use "
            "sharding.context='allgather'"
        )

    def attend(q, keys, weight, further, documents):
        """A device's part; `documents` as mla_attention has them, or a pair to be made so."""
        latent, k_rope = keys
        if isinstance(documents, tuple):
            documents = documents_between(*documents)
        kv = linear(latent, weight, recipe)
        first = offset + further
        return mla_attention(
            q, kv, k_rope, scale=scale, offset=first, segments=documents, bias=bias
        )

    if segments is not None and layout.order(segments.shape[1]) is not None:
        # Pieces of a ring meet out of order: numbers must ascend along the sequence.
        numbers = ascending(layout.in_natural_order(segments))
        segments = layout.constrain(layout.in_order(numbers), "batch", "seq")
    return self_attention(attend, q_BTNI, keys, kv_b_proj, segments, layout)


def mla_absorb(
    q_nope_BTNH: Float[Array, "B T N H"],
    q_rope_BTNR: Float[Array, "B T N R"],
    cache: LatentCache | PagedCache,
    lengths: Int[Array, " B"],
    kv_b_proj: Float[Array, "N HU C"],
    scale: float,
    schedule: KVSplits | None = None,
    layout: Layout = ONE_DEVICE,
    bias: Bias | None = None,
) -> Float[Array, "B T N U"]:
    """What `mla_expand` returns for the last T of lengths[b] cached tokens, each seeing itself and
    those before it, with W^UK absorbed into the query and W^UV into the output.

    All heads attend to one shared key of C + R dims whose first C dims are also the value
    (DeepSeek-V3:inference/model.py, `attn_impl="absorb"`). The schedule is `plan`'s for lengths, on
    one device. On a mesh a contiguous cache's rows may lie over `context`; pages are whole on all
    devices of a `context` group. The bias is that of `mla_attention`; ValueError with pages, and
    where a cache's rows lie over `context`.

    >>> import jax.numpy as jnp, dsv3_jax as ds
    >>> cache = ds.init_model_cache(ds.load_config("tiny").model, batch=1, length=8).dense
    >>> layer = type(cache)(cache.latent[0], cache.k_rope[0])
    >>> q, rope, lengths = jnp.ones((1, 1, 4, 32)), jnp.ones((1, 1, 4, 16)), jnp.array([5])
    >>> ds.mla_absorb(q, rope, layer, lengths, jnp.ones((4, 64, 32)), scale=0.1).shape
    (1, 1, 4, 32)
    """
    in_pieces = isinstance(cache, LatentCache) and layout.size("cache") > 1
    if bias is not None and (in_pieces or isinstance(cache, PagedCache)):
        raise ValueError(
            "an attention bias reads a contiguous cache (paged=False) that is whole on its device "
            "(mesh.context=1)"
        )

    def attend(queries, cache, lengths, weight):
        q_nope, q_rope = queries
        nope_dim, value_dim = q_nope.shape[-1], weight.shape[1] - q_nope.shape[-1]
        w_uk_NHC, w_uv_NUC = weight[:, :nope_dim], weight[:, nope_dim:]
        if are_few(q_nope, 2):  # what is cut of a weight XLA:CPU copies, in every step
            w_uk_NHC = w_uv_NUC = weight
            q_nope = jnp.pad(q_nope, ((0, 0),) * 3 + ((0, value_dim),))
        new: dict[str, Any] = {
            "q_latent": _by_head("BTNH,NHC->BTNC", q_nope, w_uk_NHC),
            "q_rope": q_rope,
            "latent": cache.latent,
            "k_rope": cache.k_rope,
            "lengths": lengths,
        }
        if isinstance(cache, PagedCache):
            # Padding at the end of a chunk may lie past a sequence's pages: any page will do.
            pages = Pages(**new, block_table=jnp.maximum(cache.block_table, 0))
            context_BTNC, lse_BTN = mla_decode(pages, scale=scale, schedule=schedule)
        else:
            context_BTNC, lse_BTN = mla_decode_contiguous(
                Rows(**new), scale=scale, schedule=schedule, bias=bias
            )
        # W^UV here: of pieces of a cache U numbers a head travel, not C.
        out_BTNU = _by_head("BTNC,NUC->BTNU", context_BTNC, w_uv_NUC)
        return out_BTNU[..., -value_dim:], lse_BTN

    queries = (q_nope_BTNH, q_rope_BTNR)
    return attention_to_cache(
        attend, queries, cache, lengths, kv_b_proj, layout, in_pieces=in_pieces
    )


def _by_head(spec: str, x_BTNI: Array, weight: Array) -> Array:
    """Each head's product with its own matrix, in x's dtype."""
    weight = weight.astype(x_BTNI.dtype)
    return row_by_row(lambda x: jnp.einsum(spec, x, weight), x_BTNI, 2)


class MLA(nn.Module):
    """Projections, latent norms and RoPE around `mla_expand` or `mla_absorb`."""

    how: Pass

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"] | StraightThrough,
        tokens: Tokens,
        cache: LatentCache | PagedCache | None = None,
    ) -> tuple[Float[Array, "B #T D"], LatentCache | PagedCache | None]:
        """Attention output, and the cache with these T tokens appended at their positions.

        Without a cache, or to fill an empty one, the T tokens attend to each other in the expanded
        form; otherwise they attend to all the cache holds in the absorbed form, which knows no
        segments. Where tokens say which row is wanted, queries and output are of that row alone.
        """
        config, recipe, layout = self.how.config, self.how.recipe, self.how.layout
        rows, positions = ("batch", "seq"), tokens.positions
        to_heads = ProductLayout(layout, rows, ("heads", None, None))
        to_latent = ProductLayout(layout, ("batch", "residual"), (None, None))
        from_heads = ProductLayout(layout, rows, (None, "heads"))
        w, latent_dim = parameters(self, config, "layer", "self_attn"), config.kv_lora_rank

        asking: Any = tokens.of_wanted(x)
        if config.q_lora_rank is None:
            q = linear(layout.constrain(asking, *rows), w.q_proj, recipe.attention, where=to_heads)
        else:
            q_latent = linear(asking, w.q_a_proj, recipe.attention, where=to_latent)
            # A projection to a latent is made where the rows are; then the narrow latent moves.
            normed = norm_for(q_latent, w.q_a_layernorm, LATENT_NORM_EPS, recipe.attention, layout)
            q_latent = layout.constrain(normed, *rows)
            q = linear(q_latent, w.q_b_proj, recipe.attention, where=to_heads)
        q = layout.constrain(q, "batch", "seq", "heads")

        latent_and_rope = linear(x, w.kv_a_proj_with_mqa, recipe.attention, where=to_latent)
        latent_and_rope = layout.constrain(latent_and_rope, *rows)
        latent: Any = latent_and_rope[..., :latent_dim]
        # On one device nothing but kv_b_proj reads it; on a mesh it travels in the model's dtype.
        only_product = cache is None and layout.one_device
        of_product = recipe.attention if only_product else None
        latent = norm_for(latent, w.kv_a_layernorm, LATENT_NORM_EPS, of_product)
        cos, sin = rope_tables(positions, config)
        k_rope = apply_rope(latent_and_rope[..., latent_dim:], cos, sin)

        kv_b_proj, scale = w.kv_b_proj, softmax_scale(config)
        # In FP8 the master itself is quantised; else an array is read in x's dtype.
        other = as_projection(kv_b_proj).array is None  # FP8, or with an adapter
        if cache is not None or recipe.attention is None or other:
            kv_b_proj = kv_b_proj.astype(x.dtype)
        if cache is not None:
            # A prompt may lie in another order over devices; the cache's rows are in order.
            new = (layout.in_natural_order(latent), layout.in_natural_order(k_rope))
            filling = self.how.prefill
            cache = append(cache, *new, positions[:, 0], layout, whole_prompt=filling)
            if filling:
                latent = as_cached(latent, cache)
        bias, of_queries = self.how.attention_bias, tuple(map(tokens.of_wanted, (cos, sin)))
        if cache is None or self.how.prefill:
            q, keys = rotate_heads(q, *of_queries), (latent, k_rope)
            others: Any = (tokens.segments, recipe.attention, layout, bias)
            out = _expanded(q, keys, kv_b_proj, scale, 0, *others)
        else:
            q_nope, q_rope = q[..., : config.qk_nope_head_dim], q[..., config.qk_nope_head_dim :]
            q_rope = apply_rope(q_rope, *of_queries)
            lengths = tokens.of_wanted(positions)[:, -1] + 1
            schedule = tokens.decode_schedule
            shared: Any = (kv_b_proj, scale, schedule, layout, bias)
            out = mla_absorb(q_nope, q_rope, cache, lengths, *shared)
        o_proj = w.o_proj.reshape(config.hidden_size, -1)
        out = out.reshape(*out.shape[:2], -1)
        return linear(out, o_proj, recipe.o_proj, where=from_heads), cache
