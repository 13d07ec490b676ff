"""Context parallelism: the order of a sequence's tokens over devices, attention as a ring or a sum.

What travels is MLA's latent and shared key, 576 values a token in V3 where keys and values of all
heads would be 40,960; each device expands what passes by. The softmax is put together from pieces
(Milakov and Gimelshein 2018; Ring Attention, Liu et al. 2023), in f32.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.parallel.collectives import Axes

Tree = TypeVar("Tree")

# A row with no visible key yet: finite, so that differences of two of them are 0 and not NaN.
LOWEST = -1e30


class Partial(NamedTuple):
    """Attention over some of the keys, not yet divided by the softmax's sum; all f32."""

    largest: Float[Array, "B N T"]  # logit
    total: Float[Array, "B N T"]  # of exp(logit - largest)
    values: Float[Array, "B N T U"]  # weighted by the same


def zigzag(length: int, devices: int) -> Int[np.ndarray, " T"]:
    """The position at each place of a sequence spread over devices for equal causal work.

    Cut into 2 n pieces, device i has pieces i and 2n - 1 - i: the work of a query grows with its
    position (Brandon et al. 2023; the Llama 3 report, section 3.3.2). length must be a multiple of
    2 n.
    """
    if length % (2 * devices):
        raise ValueError(f"{length=} must be a multiple of 2 x {devices=}")
    pieces = np.arange(length).reshape(2 * devices, -1)
    order = [piece for i in range(devices) for piece in (i, 2 * devices - 1 - i)]
    return pieces[order].reshape(-1)


def ring_attention(
    attend: Callable[[Tree, Tree], Partial], queries: Tree, keys: Tree, axis: str
) -> Float[Array, "B N T U"]:
    """Attention of a device's queries to the keys of all devices along an axis, causal, f32.

    To be called inside shard_map, with tokens in `zigzag` order. queries and keys are pytrees of
    [B, T, ...]; `attend` gives the attention of some queries to some keys and masks what its
    positions and documents forbid. Every step is half the work of the first, on every device: to
    an earlier device's keys all queries attend, but only to the early half, and to a later
    device's keys only the late half of the queries attends. Steps are computed again in the
    backward pass, so that memory does not grow with the number of devices.
    """
    devices, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    onward = [(i, (i + 1) % devices) for i in range(devices)]
    attend = jax.checkpoint(attend)

    def to_earlier(state, keys):
        return merge(state, attend(queries, _half(keys, 0)))

    def to_later(state, keys):
        early, late = _split(state)
        return _join(early, merge(late, attend(_half(queries, 1), keys)))

    def step(carry, number):
        state, keys = carry
        keys = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, onward), keys)
        # The keys that arrive are those of device me - number, around the ring.
        return (jax.lax.cond(number <= me, to_earlier, to_later, state, keys), keys), None

    start = (attend(queries, keys), keys)
    (state, _), _ = jax.lax.scan(step, start, jnp.arange(1, devices))
    return state.values / state.total[..., None]


def _half(tokens: Tree, which: int) -> Tree:
    """The early (0) or late (1) half of a device's tokens."""
    return jax.tree.map(lambda leaf: jnp.split(leaf, 2, axis=1)[which], tokens)


def _split(state: Partial) -> tuple[Partial, Partial]:
    early, late = zip(*(jnp.split(leaf, 2, axis=2) for leaf in state), strict=True)
    return Partial(*early), Partial(*late)


def _join(early: Partial, late: Partial) -> Partial:
    return Partial(*(jnp.concatenate(pair, axis=2) for pair in zip(early, late, strict=True)))


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
