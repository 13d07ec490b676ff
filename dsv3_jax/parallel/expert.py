"""Moves tokens to the rows of their experts and back: the `local` transport, within one device.

Rows are grouped by expert, and each group is padded to a multiple of `alignment` rows, which is
what grouped GEMM kernels read. `dispatch` and `combine` are each other's adjoint, and both are
gathers in both directions: no scatter-add, hence bitwise deterministic on every backend.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Handle(NamedTuple):
    """Where each (token, choice) lies among the rows, and which token each row holds."""

    slot_TK: Int[Array, "T K"]  # the row of a token's k-th expert
    token_M: Int[Array, " M"]  # the token of a row; T for a padding row


def num_rows(entries: int, groups: int, alignment: int) -> int:
    """Rows that always hold `entries` entries in `groups` groups padded to `alignment` rows."""
    worst = entries + min(groups, entries) * (alignment - 1)
    return -(-worst // alignment) * alignment


def plan(
    experts_TK: Int[Array, "T K"], num_experts: int, alignment: int
) -> tuple[Handle, Int[Array, " E"], Int[Array, " E"]]:
    """The handle of a routing, the rows of each expert's padded group, and its load.

    The load counts the entries of each expert without padding. Entries keep their order within a
    group (a stable sort), so that results do not depend on the machine.
    """
    num_tokens, per_token = experts_TK.shape
    entries = num_tokens * per_token
    flat = experts_TK.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    load = jnp.bincount(flat, length=num_experts)
    aligned = -(-load // alignment) * alignment
    group_start = jnp.cumsum(aligned) - aligned
    first_entry = jnp.cumsum(load) - load
    slot_sorted = group_start[flat[order]] + jnp.arange(entries) - first_entry[flat[order]]
    rows = num_rows(entries, num_experts, alignment)
    token = jnp.full(rows, num_tokens).at[slot_sorted].set(order // per_token, unique_indices=True)
    slot = jnp.zeros(entries, slot_sorted.dtype).at[order].set(slot_sorted, unique_indices=True)
    handle = Handle(slot.reshape(num_tokens, per_token), token)
    return handle, aligned.astype(jnp.int32), load.astype(jnp.int32)


@jax.custom_vjp
def dispatch(x: Float[Array, "T D"], handle: Handle) -> Float[Array, "M D"]:
    """The row of every entry: its token's x; padding rows are zero."""
    # A padding row's token is out of range and reads the fill value.
    return jnp.take(x, handle.token_M, axis=0, mode="fill", fill_value=0)


def _dispatch_fwd(x, handle):
    return dispatch(x, handle), handle


def _dispatch_bwd(handle, d_rows):
    d_x = _sum_of_entries(d_rows, jnp.ones(handle.slot_TK.shape, jnp.float32), handle)
    return d_x, _no_gradient(handle)


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(
    rows: Float[Array, "M D"], weights: Float[Array, "T K"], handle: Handle
) -> Float[Array, "T D"]:
    """Each token's sum of its entries' rows times their weights, in f32, in the rows' dtype."""
    return _sum_of_entries(rows, weights, handle)


def _combine_fwd(rows, weights, handle):
    return combine(rows, weights, handle), (rows, weights, handle)


def _combine_bwd(residuals, d_y):
    rows, weights, handle = residuals
    num_rows_, per_token = rows.shape[0], weights.shape[1]
    entry_weight = jnp.zeros(num_rows_, weights.dtype)
    entry_weight = entry_weight.at[handle.slot_TK].set(weights, unique_indices=True)
    d_rows = dispatch(d_y, handle).astype(jnp.float32) * entry_weight[:, None]
    d_weights = jnp.stack(
        [
            jnp.sum(rows[handle.slot_TK[:, k]].astype(jnp.float32) * d_y.astype(jnp.float32), -1)
            for k in range(per_token)
        ],
        axis=1,
    )
    return d_rows.astype(rows.dtype), d_weights.astype(weights.dtype), _no_gradient(handle)


combine.defvjp(_combine_fwd, _combine_bwd)


def _sum_of_entries(rows, weights, handle: Handle):
    total = 0.0
    for k in range(weights.shape[1]):
        entry = rows[handle.slot_TK[:, k]].astype(jnp.float32)
        total = total + entry * weights[:, k, None].astype(jnp.float32)
    return jnp.asarray(total).astype(rows.dtype)


def _no_gradient(handle: Handle):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), handle)
