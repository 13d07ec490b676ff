"""Decoding from a cache, contiguous or paged: whole prompts first, then a few tokens at a time."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.mla_decode.api import plan
from dsv3_jax.model.cache import AnyCache
from dsv3_jax.model.checks import check_tokens
from dsv3_jax.model.ends import embed_tokens, final_norm
from dsv3_jax.model.forward_pass import Pass, Tokens, as_pass
from dsv3_jax.model.stack import run_layers


class Decoded(NamedTuple):
    """What a prompt or a step gives."""

    hidden: Float[Array, "B T D"]  # after the final norm, in the order of the tokens
    cache: AnyCache  # with these tokens
    load: Int[Array, "L E"]  # entries of the counted tokens that each expert of a MoE layer got


def prefill(
    variables: dict[str, Any],
    ids: Int[Array, "B T"],
    cache: AnyCache,
    config: ModelConfig | Pass,
    counted: Bool[Array, "B T"] | None = None,
) -> Decoded:
    """Hidden states of whole prompts, and the empty cache filled with them.

    Shorter prompts are padded at the end; their rows past the end are overwritten before any later
    token sees them. The expanded form of MLA. Without `counted` all tokens count.
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
    that comes in chunks. Without `counted` all tokens count.
    """
    how = dataclasses.replace(as_pass(config), prefill=False)
    check_tokens(ids, how.config, whole_rows=False)
    positions = start[:, None] + jnp.arange(ids.shape[1])
    with how.layout.compiling():
        schedule = decode_schedule(positions, how)
        tokens = Tokens(positions, counted=counted, decode_schedule=schedule)
        return _decode(variables, ids, tokens, cache, how)


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
    no_load = jnp.zeros((0, how.config.n_routed_experts), jnp.int32)
    hidden = layout.in_natural_order(final_norm(params, x, how))
    return Decoded(hidden, new_cache, no_load if stats is None else stats.load_E)
