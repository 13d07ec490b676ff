"""Reading peers' rows by XLA's collectives: right on every backend, with more moved than needed."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Axes = tuple[str, ...]


def gather_rows(
    x: Array,
    slots: Int[Array, "NR K"],
    free: Int[Array, "E 2"],
    *,
    num_rows: int,
    axes: Axes,
    multiprocessors: int,
) -> Array:
    """The rows of all peers at their slots, zeros elsewhere; see `api.gather_rows`."""
    del free, multiprocessors
    everyone = slots.shape[0]
    row = jnp.broadcast_to(jnp.arange(everyone, dtype=jnp.int32)[:, None], slots.shape)
    source = jnp.full(num_rows, everyone, jnp.int32).at[slots].set(row, mode="drop")
    everyones = lax.all_gather(x, axes, tiled=True)
    return jnp.take(everyones, source, axis=0, mode="fill", fill_value=0)


def return_rows(
    rows: Float[Array, "M D"],
    weights: Float[Array, "NR K"] | None,
    slots: Int[Array, "NR K"],
    needed: Bool[Array, "R N"],
    *,
    sent_as: Any,
    axes: Axes,
    multiprocessors: int,
) -> Float[Array, "R D"]:
    """What peers have for each row, summed; see `api.return_rows`."""
    del multiprocessors
    num_rows, peers = needed.shape
    partial = sum_slots(rows, weights, slots, dtype=sent_as).reshape(peers, num_rows, -1)
    returned = lax.all_to_all(partial, axes, split_axis=0, concat_axis=0)
    total = jnp.zeros_like(returned[0], jnp.float32)
    for peer in range(peers):
        total += jnp.where(needed[:, peer, None], returned[peer].astype(jnp.float32), 0)
    return total.astype(rows.dtype)


def sum_slots(
    rows: Float[Array, "M D"],
    weights: Float[Array, "T K"] | None,
    slots: Int[Array, "T K"],
    *,
    dtype: Any,
) -> Float[Array, "T D"]:
    """The weighted sum of each token's rows; see `api.sum_slots`."""

    def entry(k):
        of_k = jnp.take(rows, slots[:, k], axis=0, mode="fill", fill_value=0).astype(jnp.float32)
        return of_k if weights is None else of_k * weights[:, k, None].astype(jnp.float32)

    total = entry(0)
    for k in range(1, slots.shape[1]):
        total += entry(k)
    return total.astype(dtype)


def sum_slots_backward(
    rows: Float[Array, "M D"],
    d_sums: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    slots: Int[Array, "T K"],
    free: Int[Array, "E 2"],
) -> tuple[Float[Array, "M D"], Float[Array, "T K"]]:
    """The gradients of rows, zeros where no slot is, and weights; see `api.sum_slots_backward`."""
    del free
    num_rows, tokens = rows.shape[0], slots.shape[0]
    token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], slots.shape)
    source = jnp.full(num_rows, tokens, jnp.int32).at[slots].set(token, mode="drop")
    weight = jnp.zeros_like(weights, jnp.float32, shape=num_rows)
    weight = weight.at[slots].set(weights.astype(jnp.float32), mode="drop")
    d_sum = jnp.take(d_sums, source, axis=0, mode="fill", fill_value=0).astype(jnp.float32)
    d_weight = jnp.sum(rows.astype(jnp.float32) * d_sum, axis=1)
    d_weights = d_weight.at[slots].get(mode="fill", fill_value=0)
    return (d_sum * weight[:, None]).astype(rows.dtype), d_weights
