"""Attention on a mesh: heads over `tensor`, tokens or rows of the cache over `context`.

`self_attention` is that of whole sequences, gathered or around a ring, `attention_to_cache` that of
new tokens; what a device does with its own part is a function that they are given. What travels is
MLA's latent and shared key, 576 values a token in V3 where keys and values of all heads would be
40,960; each device expands what passes by. The softmax is put together from pieces (Milakov and
Gimelshein 2018; Ring Attention, Liu et al. 2023), in f32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.parallel.collectives import Axes
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.quantization.block_scaled import StepWeight

Tree = TypeVar("Tree")

# A row with no visible key yet: finite, so that differences of two of them are 0 and not NaN.
LOWEST = -1e30


class Partial(NamedTuple):
    """Attention over some of the keys, not yet divided by the softmax's sum; all f32."""

    largest: Float[Array, "B N T"]  # logit
    total: Float[Array, "B N T"]  # of exp(logit - largest)
    values: Float[Array, "B N T U"]  # weighted by the same


def self_attention(
    attend: Callable[..., tuple[Array, Array]],
    queries: Any,
    keys: Any,
    weight: Float[Array, "N HU C"] | StepWeight,
    documents: Int[Array, "B T"] | None,
    layout: Layout,
) -> Float[Array, "B T N U"]:
    """Causal attention of sequences to themselves, tokens in the layout's order.

    queries is a tree of [B, T, N, ...] and keys one of [B, T, ...], which go from device to device:
    gathered whole, or around a ring, as layout.config.context says. weight is cut by heads, as the
    queries are. attend(queries, keys, weight, offset, documents) returns a device's output,
    [B, T, N, U], and the logarithm of its softmax's sum, [B, N, T] f32: its query t is the token of
    row offset + t of the keys. documents are those of the keys; in a ring a pair, of the queries
    and of the keys.
    """
    axes, length = layout.axes("seq"), jax.tree.leaves(queries)[0].shape[1]
    in_ring = layout.order(length) is not None

    def around_ring(queries, keys, weight, documents):
        def partly(queries, keys, causal):
            (queries, of_queries), (keys, of_keys) = queries, keys
            offset = 0 if causal else jax.tree.leaves(keys)[0].shape[1]  # all keys are seen
            pair = None if of_keys is None else (of_queries, of_keys)
            out_BTNU, lse_BNT = attend(queries, keys, weight, offset, pair)
            values = out_BTNU.astype(jnp.float32).swapaxes(1, 2)
            return Partial(lse_BNT, jnp.ones_like(lse_BNT), values)

        out_BNTU = ring_attention(partly, (queries, documents), (keys, documents), *axes)
        return out_BNTU.astype(jax.tree.leaves(queries)[0].dtype).swapaxes(1, 2)

    def gathered(queries, keys, weight, documents):
        offset = 0
        if axes:
            offset = jax.lax.axis_index(axes) * jax.tree.leaves(queries)[0].shape[1]
            keys, documents = jax.tree.map(
                lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True), (keys, documents)
            )
        return attend(queries, keys, weight, offset, documents)[0]

    of_queries, tokens = layout.spec("batch", "seq", "heads"), layout.spec("batch", "seq")
    inputs = (of_queries, tokens, layout.spec("heads"), tokens)
    of_device = around_ring if in_ring else gathered
    return layout.shard_map(of_device, inputs, of_queries)(queries, keys, weight, documents)


def attention_to_cache(
    attend: Callable[..., tuple[Array, Array]],
    queries: Any,
    cache: Any,
    lengths: Int[Array, " B"],
    weight: Float[Array, "N HU C"],
    layout: Layout,
    *,
    in_pieces: bool,
) -> Float[Array, "B T N U"]:
    """Attention of each sequence's last tokens to the lengths[b] that the cache holds of it.

    Sequences lie over the batch axes and heads over `tensor`. in_pieces: the cache's rows, dim 1,
    lie over `context`; each device attends to its own, and the partial softmaxes are put together.
    attend(queries, cache, lengths, weight) returns a device's output, [B, T, N, U], and the
    logarithm of its softmax's sum, [B, T, N].
    """
    pieces = layout.axes("cache") if in_pieces else ()

    def of_device(queries, cache, lengths, weight):
        if pieces:
            lengths -= jax.lax.axis_index(pieces) * jax.tree.leaves(cache)[0].shape[1]
        out_BTNU, lse_BTN = attend(queries, cache, lengths, weight)
        if not pieces:
            return out_BTNU
        lse, values = lse_BTN.swapaxes(1, 2), out_BTNU.astype(jnp.float32).swapaxes(1, 2)
        values = sum_attention(Partial(lse, jnp.ones_like(lse), values), pieces)
        return values.swapaxes(1, 2).astype(out_BTNU.dtype)

    q, batch = layout.spec("batch", None, "heads"), layout.spec("batch")
    of_cache = layout.spec("batch", "cache") if in_pieces else batch
    inputs = (q, of_cache, batch, layout.spec("heads"))
    # Unchecked: Hopper's kernel cannot say along which devices its results differ.
    of_devices = layout.shard_map(of_device, inputs, q, check_vma=False)
    return of_devices(queries, cache, lengths, weight)


def ring_attention(
    attend: Callable[[Tree, Tree, bool], Partial], queries: Tree, keys: Tree, axis: str
) -> Float[Array, "B N T U"]:
    """Attention of a device's queries to the keys of all devices along an axis, causal, f32.

    To be called inside shard_map, with tokens in `zigzag` order. queries and keys are pytrees of
    [B, T, ...]; `attend` gives the attention of some queries to some keys, which are theirs if its
    third argument is True and else all before them, and masks what documents forbid.

    Every step is half the work of the first, on every device. To an earlier device's keys all
    queries attend, but only to the early half; to a later device's keys only the late half of the
    queries attends, but to all. Late queries and early keys meet either way; the other quarter is
    chosen by data, not by a branch: on GPUs devices that take different branches beside a
    collective never return. Steps are computed again in the backward pass, so that memory does
    not grow with the number of devices.
    """
    devices, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    onward = [(i, (i + 1) % devices) for i in range(devices)]
    attend = jax.checkpoint(attend, static_argnums=2)
    early_queries, late_queries = _halves(queries)

    def step(carry, number):
        (early, late), keys = carry
        keys = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, onward), keys)
        # The keys that arrive are those of device me - number, around the ring.
        from_earlier = number <= me

        def choose(if_earlier, if_later):
            return jax.tree.map(
                lambda a, b: jax.lax.select(jnp.broadcast_to(from_earlier, a.shape), a, b),
                if_earlier,
                if_later,
            )

        early_keys, late_keys = _halves(keys)
        late = merge(late, attend(late_queries, early_keys, False))
        others = choose(early_queries, late_queries), choose(early_keys, late_keys)
        merged = merge(choose(early, late), attend(*others, False))
        return ((choose(merged, early), choose(late, merged)), keys), None

    own = attend(queries, keys, True)
    halves = zip(*(jnp.split(leaf, 2, axis=2) for leaf in own), strict=True)
    start = (tuple(Partial(*half) for half in halves), keys)
    (states, _), _ = jax.lax.scan(step, start, jnp.arange(1, devices))
    return jnp.concatenate([state.values / state.total[..., None] for state in states], axis=2)


def _halves(tokens: Tree) -> tuple[Tree, Tree]:
    """The early and the late half of a device's tokens."""
    leaves, tree = jax.tree.flatten(tokens)
    early, late = zip(*(jnp.split(leaf, 2, axis=1) for leaf in leaves), strict=True)
    return tree.unflatten(early), tree.unflatten(late)


def sum_attention(partial: Partial, axes: Axes) -> Float[Array, "B N T U"]:
    """Attention to the keys of all devices along `axes`, f32, from that of each to its own.

    What travels is a largest logit, a sum and a weighted value a query, however many keys there
    are (FlashDecoding's split of the keys, Dao et al. 2023, over devices). Zeros for a query that
    sees no key.
    """
    largest = jax.lax.pmax(partial.largest, axes)
    share = jnp.where(largest > LOWEST, jnp.exp(partial.largest - largest), 0)
    total, values = jax.lax.psum((partial.total * share, partial.values * share[..., None]), axes)
    return values / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both."""
    largest = jnp.maximum(a.largest, b.largest)
    of_a, of_b = jnp.exp(a.largest - largest), jnp.exp(b.largest - largest)
    return Partial(
        largest,
        a.total * of_a + b.total * of_b,
        a.values * of_a[..., None] + b.values * of_b[..., None],
    )
