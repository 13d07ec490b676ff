"""Decoding from a cache, contiguous or paged: whole prompts first, then a few tokens at a time.

An MTP module decodes beside the model, from a cache of its own, and so drafts what comes next.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.mla_decode.api import plan
from dsv3_jax.model.cache import AnyCache, LatentCache, PagedCache
from dsv3_jax.model.checks import check_tokens
from dsv3_jax.model.ends import embed_tokens, final_norm
from dsv3_jax.model.forward_pass import Pass, Tokens, as_pass
from dsv3_jax.model.mtp import run_mtp
from dsv3_jax.model.stack import run_layers


class Decoded(NamedTuple):
    """What `prefill` and `decode_step` return.

    Fields:
        hidden: after the final norm, in the order of the tokens, in the model's dtype.
        cache: the one given, with these tokens in it.
        load: how often each expert of each MoE layer was chosen, by the tokens that count.
        experts: those of each token in each MoE layer.

    Source: V3 report, section 2.1.1.
    """

    hidden: Float[Array, "B T D"]
    cache: AnyCache
    load: Int[Array, "L E"]
    experts: Int[Array, "L B T K"]


def prefill(
    variables: dict[str, Any],
    ids: Int[Array, "B T"],
    cache: AnyCache,
    config: ModelConfig | Pass,
    counted: Bool[Array, "B T"] | None = None,
) -> Decoded:
    """Hidden states of whole prompts, and the empty cache filled with them.

    Shorter prompts are padded at the end; their rows past the end are overwritten before any later
    token sees them. The expanded form of MLA. Without `counted` all tokens count. Hidden states are
    in the model's dtype. Raises ValueError for tokens that are no integers [B, T] or too many.
    Source: V3 report, section 2.1.1; DeepSeek-V3:inference/model.py, `attn_impl="naive"`.

    >>> from functools import partial
    >>> import jax, numpy as np, dsv3_jax as ds
    >>> tiny, ids = ds.load_config("tiny").model, np.ones((2, 8), np.int32)
    >>> shapes = ds.abstract_variables(tiny), ids, ds.init_model_cache(tiny, 2, 16)
    >>> jax.eval_shape(partial(ds.prefill, config=tiny), *shapes).hidden.shape
    (2, 8, 128)
    """
    how = dataclasses.replace(as_pass(config), prefill=True)
    check_tokens(ids, how.config)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    with how.layout.compiling():
        return _decode(variables, ids, Tokens(positions, counted=counted), cache, how)


def decode_step(
    variables: dict[str, Any],
    ids: Int[Array, "B T"],
    start: Int[Array, " B"],
    cache: AnyCache,
    config: ModelConfig | Pass,
    counted: Bool[Array, "B T"] | None = None,
) -> Decoded:
    """Hidden states of T new tokens at rows start[b].. of the cache, and the cache with them.

    The absorbed form of MLA; T = 1 when decoding, a few when verifying drafts, more for a prompt
    that comes in chunks. Without `counted` all tokens count. Raises ValueError for tokens that are
    no integers [B, T]. Source: V3 report, section 2.1.1; DeepSeek-V3:inference/model.py,
    `attn_impl="absorb"`.

    >>> from functools import partial
    >>> import jax, numpy as np, dsv3_jax as ds
    >>> tiny, ids = ds.load_config("tiny").model, np.ones((2, 1), np.int32)
    >>> shapes = ds.abstract_variables(tiny), ids, np.full(2, 8, np.int32)
    >>> step = partial(ds.decode_step, config=tiny)
    >>> jax.eval_shape(step, *shapes, ds.init_model_cache(tiny, 2, 16)).hidden.shape
    (2, 1, 128)
    """
    how = dataclasses.replace(as_pass(config), prefill=False)
    check_tokens(ids, how.config, whole_rows=False)
    positions = start[:, None] + jnp.arange(ids.shape[1])
    with how.layout.compiling():
        schedule = decode_schedule(positions, how)
        tokens = Tokens(positions, counted=counted, decode_schedule=schedule)
        return _decode(variables, ids, tokens, cache, how)


def decode_mtp(
    variables: dict[str, Any],
    depth: int,
    hidden: Float[Array, "B T D"],
    ids: Int[Array, "B T"],
    start: Int[Array, " B"],
    cache: LatentCache | PagedCache,
    how: Pass,
    wanted: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B #T D"], LatentCache | PagedCache]:
    """The hidden states of MTP module depth + 1 at rows start[b].., and its own cache with them.

    hidden is h^depth of these rows after its norm (depth 0: the model's), and ids the token
    depth + 1 after each. A Pass with `prefill` fills an empty cache from row 0 on, in the expanded
    form; else the rows attend to what the cache holds. Of a row that is wanted of each sequence
    alone, [B, 1, D], no more is computed of the others than the cache holds; not in a `prefill`.
    """
    layout = how.layout
    positions = start[:, None] + jnp.arange(ids.shape[1], dtype=start.dtype)
    with layout.compiling():
        tokens = Tokens(layout.in_order(positions), wanted=wanted)
        if not how.prefill:
            schedule = decode_schedule(tokens.of_wanted(positions), how)
            tokens = tokens._replace(decode_schedule=schedule)
        embedding = embed_tokens(variables["params"], layout.in_order(ids), how)
        x = layout.constrain(layout.in_order(hidden), "batch", "residual")
        x, new_cache, _ = run_mtp(variables, depth, x, embedding, tokens, how, cache)
    assert new_cache is not None
    return layout.in_natural_order(x), new_cache


def decode_schedule(positions: Int[Array, "B T"], how: Pass) -> Any:
    """The kernel's schedule for new tokens at these positions, shared by all layers.

    None where no kernel asks for one. On a mesh each device has sequences of its own, and plans for
    them in every layer.
    """
    if not how.layout.one_device:
        return None
    return plan(positions[:, -1] + 1, positions.shape[1] * how.config.num_attention_heads)


def _decode(variables, ids, tokens: Tokens, cache: AnyCache, how: Pass) -> Decoded:
    layout, params = how.layout, variables["params"]
    counted = None if tokens.counted is None else layout.in_order(tokens.counted)
    tokens = tokens._replace(positions=layout.in_order(tokens.positions), counted=counted)
    x = embed_tokens(params, layout.in_order(ids), how)
    x, new_cache, stats = run_layers(variables, x, tokens, how, cache)
    assert new_cache is not None
    hidden = layout.in_natural_order(final_norm(params, x, how))
    if stats is None:
        load = jnp.zeros((0, how.config.n_routed_experts), jnp.int32)
        experts = jnp.zeros((0, *ids.shape, how.config.num_experts_per_tok), jnp.int32)
    else:
        load, experts = stats.load_E, jax.vmap(layout.in_natural_order)(stats.experts)
    return Decoded(hidden, new_cache, load, experts)
