"""Sums of rows at their slots, and their gradients, on one Hopper GPU: all rows are its own.

A token is a block's. Of rows without a slot none is read, however many there is room for.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.hopper import plgpu

LANES = 128  # threads of a warpgroup
VECTOR = 4  # numbers that a thread reads at once
WIDEST = 4096  # channels of a row that a warpgroup handles at once
WHOLE = 8192  # and where it has nothing else in registers: V3's rows are one piece


def sum_slots(
    rows: Float[Array, "M D"],
    weights: Float[Array, "T K"] | None,
    slots: Int[Array, "T K"],
    *,
    dtype: Any,
) -> Float[Array, "T D"]:
    """The weighted sum of each token's rows; see `api.sum_slots`. A block has a token's piece."""
    hopper.require()
    num_rows, dim = rows.shape
    tokens, per_token = slots.shape
    piece = piece_of(dim, WHOLE)
    layout = strided(piece)
    if weights is None:
        weights = jnp.ones(slots.shape, jnp.float32)
    rows, weights, slots = manual.vary((rows, weights.astype(jnp.float32), slots))

    def kernel(rows_ref, weights_ref, slots_ref, out):
        token = lax.axis_index("token")
        columns = pl.ds(lax.axis_index("piece") * piece, piece)
        total = plgpu.layout_cast(jnp.zeros((piece,), jnp.float32), layout)
        found = [(slots_ref[token, k], weights_ref[token, k]) for k in range(per_token)]
        for slot, weight in found:

            def add(total, slot=slot, weight=weight):
                row = plgpu.load(rows_ref.at[slot, columns], layout=layout, optimized=False)
                return total + row.astype(jnp.float32) * weight

            total = lax.cond(slot < num_rows, add, lambda total: total, total)
        out[token, columns] = total.astype(out.dtype)

    out = plgpu.kernel(
        kernel,
        out_type=manual.result((tokens, dim), dtype, rows),
        grid=(tokens, dim // piece),
        grid_names=("token", "piece"),
    )(rows, weights, slots)
    return manual.vary(out, rows)


def sum_slots_backward(
    rows: Float[Array, "M D"],
    d_sums: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    slots: Int[Array, "T K"],
    free: Int[Array, "E 2"],
) -> tuple[Float[Array, "M D"], Float[Array, "T K"]]:
    """The gradients of rows and weights; see `api.sum_slots_backward`.

    The first blocks write zeros, an expert's each; the others have a token each, whose row is read
    once from memory, and from the cache for each further slot.
    """
    hopper.require()
    num_rows, dim = rows.shape
    tokens, per_token = slots.shape
    experts, piece = free.shape[0], piece_of(dim)
    pieces, layout = [pl.ds(first, piece) for first in range(0, dim, piece)], strided(piece)
    operands = (rows, d_sums, weights.astype(jnp.float32), slots, free)
    rows, d_sums, weights, slots, free = manual.vary(operands)

    def kernel(rows_ref, d_sums_ref, weights_ref, slots_ref, free_ref, d_rows, d_weights):
        block = lax.axis_index("block")

        def zeros(dtype: Any = jnp.float32):
            return plgpu.layout_cast(jnp.zeros((piece,), dtype), layout)

        @pl.when(block < experts)
        def _():
            @pl.loop(free_ref[block, 0], free_ref[block, 1])
            def _(row):
                for columns in pieces:
                    d_rows[row, columns] = zeros(d_rows.dtype)

        @pl.when(block >= experts)
        def _():
            token = block - experts
            found = [(slots_ref[token, k], weights_ref[token, k]) for k in range(per_token)]
            for k, (slot, weight) in enumerate(found):

                def of_slot(slot=slot, weight=weight):
                    total = zeros()
                    for columns in pieces:
                        d_sum = plgpu.load(
                            d_sums_ref.at[token, columns], layout=layout, optimized=False
                        )
                        row = plgpu.load(rows_ref.at[slot, columns], layout=layout, optimized=False)
                        d_sum = d_sum.astype(jnp.float32)
                        total += d_sum * row.astype(jnp.float32)
                        d_rows[slot, columns] = (d_sum * weight).astype(d_rows.dtype)
                    return jnp.sum(total)

                d_weights[token, k] = lax.cond(slot < num_rows, of_slot, lambda: jnp.float32(0))

    out: Any = plgpu.kernel(
        kernel,
        out_type=[
            manual.result(rows.shape, rows.dtype, rows),
            manual.result(weights.shape, jnp.float32, rows),
        ],
        grid=(experts + tokens,),
        grid_names=("block",),
    )(rows, d_sums, weights, slots, free)
    return manual.vary(tuple(out), rows)


def piece_of(dim: int, widest: int = WIDEST) -> int:
    """Channels of a row that a warpgroup handles at once; NotImplementedError where none fit."""
    unit = LANES * VECTOR
    if dim % unit:
        raise NotImplementedError(f"{dim=} must be a multiple of {unit}")
    return max(c for c in range(unit, min(dim, widest) + 1, unit) if dim % c == 0)


def strided(piece: int) -> Any:
    """The layout of a piece in registers: side by side what neighbouring threads read."""
    return plgpu.Layout.WG_STRIDED((piece,), vec_size=VECTOR)
