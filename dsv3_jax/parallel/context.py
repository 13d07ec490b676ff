"""Context parallelism: the order of a sequence's tokens over devices, and attention as a ring.

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
    attend: Callable[[Tree], Partial], keys: Tree, axis: str
) -> Float[Array, "B N T U"]:
    """Attention of a device's queries to the keys of all devices along an axis, f32.

    `attend` gives a device's queries' attention to one device's keys; `keys` are this device's, any
    pytree. To be called inside shard_map. Steps are computed again in the backward pass, so that
    memory does not grow with the number of devices.
    """
    devices = jax.lax.axis_size(axis)
    onward = [(i, (i + 1) % devices) for i in range(devices)]
    # The first step needs nothing from others and fixes the shapes.
    attend = jax.checkpoint(attend)
    state = attend(keys)

    def step(carry, _):
        state, keys = carry
        keys = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, onward), keys)
        return (merge(state, attend(keys)), keys), None

    (state, _), _ = jax.lax.scan(step, (state, keys), None, length=devices - 1)
    return state.values / state.total[..., None]


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both."""
    largest = jnp.maximum(a.largest, b.largest)
    of_a, of_b = jnp.exp(a.largest - largest), jnp.exp(b.largest - largest)
    return Partial(
        largest,
        a.total * of_a + b.total * of_b,
        a.values * of_a[..., None] + b.values * of_b[..., None],
    )
