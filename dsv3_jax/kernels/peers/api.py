"""Rows that devices read from each other: tokens on their way to experts, and their results back.

For devices that can read each other's memory (GPUs over NVLink). Everything runs inside
`jax.shard_map`; the N peers are the devices along mesh axes, the first axis being the slowest, and
every device has R rows, NR in all. Letters: K choices of a row, M grouped rows of a device's
experts, E of its experts, D channels.

`gather_rows` and `return_rows` are told by `slots` [N*R, K] where the results of every peer's rows
lie on this device: row p * R + r is row r of peer p, and a slot of M or more stands for none.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.kernels import backend

PACKAGE = "dsv3_jax.kernels.peers"
ORDER = {**backend.DEFAULT_ORDER, "tpu": ("reference",)}

Axes = tuple[str, ...]


def gather_rows(
    x: Array,
    slots: Int[Array, "NR K"],
    free: Int[Array, "E 2"],
    num_rows: int,
    *,
    axes: Axes,
    multiprocessors: int,
    implementation: str | None = None,
) -> Array:
    """The rows [R, ...] of all peers at their slots, [M, ...] with M = num_rows.

    A row comes once from its device, however many slots it has here, and not at all if it has
    none. Rows from free[e, 0] to free[e, 1] are zeros, those of no slot that are not free
    unspecified.
    """
    return backend.run(
        PACKAGE,
        "gather_rows",
        x,
        slots,
        free,
        num_rows=num_rows,
        order=ORDER,
        implementation=implementation,
        axes=axes,
        multiprocessors=multiprocessors,
    )


def return_rows(
    rows: Float[Array, "M D"],
    weights: Float[Array, "NR K"] | None,
    slots: Int[Array, "NR K"],
    needed: Bool[Array, "R N"],
    *,
    sent_as: Any,
    axes: Axes,
    multiprocessors: int,
    implementation: str | None = None,
) -> Float[Array, "R D"]:
    """The sum over peers of the weighted sum of what each of them has at a row's slots.

    Without `weights` every slot counts once. Sums are float32, over a peer's slots and then over
    the peers in their order; between the two a sum is rounded to `sent_as`, the dtype in which it
    travels. The result has the rows' dtype. needed[r, p] says whether peer p may have slots for
    row r; where it is False, p's are not read. Without weights it is the adjoint of `gather_rows`.
    """
    return backend.run(
        PACKAGE,
        "return_rows",
        rows,
        weights,
        slots,
        needed,
        order=ORDER,
        implementation=implementation,
        sent_as=jnp.dtype(sent_as),
        axes=axes,
        multiprocessors=multiprocessors,
    )


def sum_slots(
    rows: Float[Array, "M D"],
    weights: Float[Array, "T K"] | None,
    slots: Int[Array, "T K"],
    *,
    dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """The weighted sum of the rows at each token's slots, in float32, as `dtype` (the rows')."""
    return backend.run(
        PACKAGE,
        "sum_slots",
        rows,
        weights,
        slots,
        order=ORDER,
        implementation=implementation,
        dtype=jnp.dtype(dtype or rows.dtype),
    )


def sum_slots_backward(
    rows: Float[Array, "M D"],
    d_sums: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    slots: Int[Array, "T K"],
    free: Int[Array, "E 2"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "M D"], Float[Array, "T K"]]:
    """The gradients of `sum_slots` for its rows, in their dtype, and for its weights, in float32.

    d_sums of a token without slots is not read. Rows from free[e, 0] to free[e, 1] are zeros, those
    of no slot that are not free unspecified.
    """
    return backend.run(
        PACKAGE,
        "sum_slots_backward",
        rows,
        d_sums,
        weights,
        slots,
        free,
        order=ORDER,
        implementation=implementation,
    )
