"""Groups a device's tokens by expert, one row for each (token, choice), and sums them up again.

Each group is padded to a multiple of `alignment` rows, which is what grouped GEMM kernels read.
`gather_rows` and `sum_rows` are each other's adjoint, and both are gathers in both directions: no
scatter-add, hence bitwise deterministic on every backend.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.parallel.collectives import no_gradients
from dsv3_jax.quantization.block_scaled import StraightThrough

_BLOCK = 128  # entries that are compared with each other, at most
# Up to so many, as decoding has them, rows are found by comparing them with all entries.
FEW_ENTRIES = 16


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["slot_TK", "token_M"], meta_fields=["complete"]
)
@dataclass(frozen=True)
class Groups:
    """Where each (token, choice) lies among the rows, and which token each row holds.

    Fields:
        slot_TK: the row of a token's k-th expert; M for a choice that has none.
        token_M: the token of a row; T for a padding row.
        complete: static; whether every choice has a row.
    """

    slot_TK: Int[Array, "T K"]
    token_M: Int[Array, " M"]
    complete: bool = True


def num_rows(entries: int, groups: int, alignment: int) -> int:
    """Rows that always hold `entries` entries in `groups` groups padded to `alignment` rows."""
    worst = entries + min(groups, entries) * (alignment - 1)
    return -(-worst // alignment) * alignment


def plan(
    experts_TK: Int[Array, "T K"], num_experts: int, alignment: int, entries: int | None = None
) -> tuple[Groups, Int[Array, " E"], Int[Array, " E"]]:
    """The groups of a routing, the rows of each expert's padded group, and its load.

    The load counts the entries of each expert without padding. Entries keep their order within a
    group (a stable sort), so that results do not depend on the machine.

    With `entries`, experts_TK may hold num_experts for choices that get no row; at most `entries`
    others, for which there is room.
    """
    num_tokens, per_token = experts_TK.shape
    choices, complete = num_tokens * per_token, entries is None
    flat = experts_TK.reshape(-1)
    rank, load = rank_in_group(flat, num_experts)
    aligned = -(-load // alignment) * alignment
    group_start = jnp.cumsum(aligned) - aligned
    rows = num_rows(choices if entries is None else entries, num_experts, alignment)
    slot = group_start.at[flat].get(mode="fill", fill_value=rows) + rank
    own = jnp.arange(choices) // per_token
    if choices <= FEW_ENTRIES:  # without what a scatter begins with, and its turns
        token = jnp.where(jnp.arange(rows)[:, None] == slot, own, num_tokens).min(1)
    else:
        token = jnp.full(rows, num_tokens)
        mode = None if complete else "drop"
        token = token.at[slot].set(own, mode=mode, unique_indices=complete)
    if not complete:
        slot = jnp.minimum(slot, rows)
    # Made once: within a sum of rows XLA would count ranks anew for every number that it adds.
    slot = lax.optimization_barrier(slot)
    groups = Groups(slot.reshape(num_tokens, per_token), token, complete)
    return groups, aligned.astype(jnp.int32), load.astype(jnp.int32)


def rank_in_group(
    groups: Int[Array, " X"], num_groups: int
) -> tuple[Int[Array, " X"], Int[Array, " G"]]:
    """How many entries before each one are of the same group, and the entries of every group.

    Groups of num_groups or more are nobody's; the ranks there mean nothing. Counted within blocks
    and between them, in a few passes without a sort: on an accelerator a stable sort of as many
    pairs takes tens of times as long.
    """
    entries = groups.shape[0]
    size = min(_BLOCK, max(entries, 1))
    blocks = jnp.pad(groups, (0, -entries % size), constant_values=num_groups).reshape(-1, size)
    place = jnp.arange(size)
    same = (blocks[:, :, None] == blocks[:, None, :]) & (place < place[:, None])
    within = same.sum(-1, dtype=jnp.int32)
    of_block = blocks[:, :, None] == jnp.arange(num_groups, dtype=groups.dtype)
    count = of_block.sum(1, dtype=jnp.int32)
    before = jnp.cumsum(count, axis=0) - count
    block = jnp.arange(blocks.shape[0])[:, None]
    rank = within + before.at[block, blocks].get(mode="fill", fill_value=0)
    return rank.reshape(-1)[:entries], count.sum(0, dtype=jnp.int32)


def gather_rows(
    x: Float[Array, "T D"] | StraightThrough, groups: Groups
) -> Float[Array, "M D"] | StraightThrough:
    """The row of every entry: its token's x; padding rows are zero.

    Block-scaled numbers move as they are, values and scales.
    """
    if not isinstance(x, StraightThrough):
        return _gather(x, groups)
    numbers = jax.tree.map(lambda leaf: _rows_of(leaf, groups), x.numbers)
    return StraightThrough(numbers, _gather_carrier(x.carrier, groups))


@jax.custom_vjp
def _gather(x, groups):
    return _rows_of(x, groups)


def _rows_of(x, groups: Groups):
    # A padding row's token is out of range and reads the fill value.
    return jnp.take(x, groups.token_M, axis=0, mode="fill", fill_value=0)


def _gather_bwd(groups, d_rows):
    d_x = _sum_of_entries(d_rows, jnp.ones(groups.slot_TK.shape, jnp.float32), groups)
    return d_x, no_gradients(groups)


_gather.defvjp(lambda x, groups: (_gather(x, groups), groups), _gather_bwd)


@jax.custom_vjp
def _gather_carrier(carrier, groups):
    return jnp.zeros_like(carrier, shape=(groups.token_M.shape[0], *carrier.shape[1:]))


_gather_carrier.defvjp(lambda c, groups: (_gather_carrier(c, groups), groups), _gather_bwd)


@jax.custom_vjp
def sum_rows(
    rows: Float[Array, "M D"], weights: Float[Array, "T K"], groups: Groups
) -> Float[Array, "T D"]:
    """Each token's sum of its entries' rows times their weights, in f32, in the rows' dtype."""
    return _sum_of_entries(rows, weights, groups)


def _sum_rows_fwd(rows, weights, groups):
    return sum_rows(rows, weights, groups), (rows, weights, groups)


def _sum_rows_bwd(residuals, d_y):
    rows, weights, groups = residuals
    d_rows = _rows_of(d_y, groups).astype(jnp.float32) * weights_of_rows(weights, groups)[:, None]
    d_weights = gradient_of_weights(rows, d_y, groups)
    return d_rows.astype(rows.dtype), d_weights.astype(weights.dtype), no_gradients(groups)


sum_rows.defvjp(_sum_rows_fwd, _sum_rows_bwd)


def weights_of_rows(weights: Float[Array, "T K"], groups: Groups) -> Float[Array, " M"]:
    """The weight of each row's entry, zero for padding rows."""
    by_row = jnp.zeros(groups.token_M.shape[0], weights.dtype)
    mode, unique = None if groups.complete else "drop", groups.complete
    return by_row.at[groups.slot_TK].set(weights, mode=mode, unique_indices=unique)


def gradient_of_weights(
    rows: Float[Array, "M D"], d_y: Float[Array, "T D"], groups: Groups
) -> Float[Array, "T K"]:
    """That of the weights of `sum_rows`, float32."""
    d_y = d_y.astype(jnp.float32)
    of_choices = [
        jnp.sum(_entry(rows, k, groups).astype(jnp.float32) * d_y, -1)
        for k in range(groups.slot_TK.shape[1])
    ]
    return jnp.stack(of_choices, axis=1)


def _sum_of_entries(rows, weights, groups: Groups):
    total = 0.0
    for k in range(weights.shape[1]):
        entry = _entry(rows, k, groups).astype(jnp.float32)
        total = total + entry * weights[:, k, None].astype(jnp.float32)
    return jnp.asarray(total).astype(rows.dtype)


def _entry(rows, k: int, groups: Groups):
    """The row of each token's k-th choice, zeros where it has none."""
    slot_T = groups.slot_TK[:, k]
    if groups.complete:
        return rows[slot_T]
    return jnp.take(rows, slot_T, axis=0, mode="fill", fill_value=0)
