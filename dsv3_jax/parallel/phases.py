"""Ties between two computations that read nothing of each other: which comes first.

XLA schedules what is independent as it likes: two halves of a batch side by side, both computing
and then both sending, or as one product of both. It drops optimization barriers before it
schedules. A tie is therefore data: a zero that is made of what is waited for, and that XLA does not
know to be one, changes no bit of what waits.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, UInt

MARK = "mark"  # of what waited in the forward pass alone: every policy of remat keeps it

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.custom_vjp
def tied(held: Any, other: Any) -> tuple[Any, Any]:
    """Both as they are, bit for bit; who reads the first array of `held` waits for `other`.

    In the backward pass who reads the gradient of `other` waits for that of `held`, so that its
    order is the mirrored one. Trees of arrays; inside shard_map, or on one device, as a device's
    zero is of its own array.
    """
    return after(held, other), other


def _backward(_: None, gradients: tuple[Any, Any]) -> tuple[Any, Any]:
    d_held, d_other = gradients
    if not _with_gradient(d_held) or not _with_gradient(d_other):
        return d_held, d_other
    return d_held, after(d_other, _with_gradient(d_held))


tied.defvjp(lambda held, other: (tied(held, other), None), _backward)


def _with_gradient(tree: Any) -> list[Array]:
    """Arrays that may carry a gradient: integers and FP8 numbers carry none."""
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1]


def after(held: Any, other: Any, kept: bool = False) -> Any:
    """held, whose first array that holds anything is not there before the largest of `other` is.

    Carries no gradient. As it is where nothing of `other` holds anything, as of frozen weights.
    kept: where held is computed again for a backward pass, `other` is not; the mark is MARK.
    """
    leaves, structure = jax.tree.flatten(held)
    first = next(i for i, x in enumerate(leaves) if _holds(x))
    waited_for = list(filter(_holds, jax.tree.leaves(other)))
    if waited_for:
        mark = mark_of(max(waited_for, key=lambda x: x.size))
        mark = checkpoint_name(mark, MARK) if kept else mark
        leaves[first] = _with_zero(leaves[first], mark)
    return jax.tree.unflatten(structure, leaves)


def _holds(x: Any) -> bool:
    return x.size > 0 and x.dtype != jax.dtypes.float0


def mark_of(x: Array) -> UInt[Array, ""]:
    """0, by way of an element of x, for `after`: no number of 32 bits has 64 of them set."""
    bits = _bits(x[(0,) * x.ndim])
    return lax.population_count(bits).astype(jnp.uint32) >> 6


def _with_zero(x: Array, zero: UInt[Array, ""]) -> Array:
    if x.dtype == bool:
        return x | (zero != 0)
    bits = _bits(x)
    return lax.bitcast_convert_type(bits | zero.astype(bits.dtype), x.dtype)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(
        x.astype(jnp.uint8) if x.dtype == bool else x, _UNSIGNED[x.dtype.itemsize]
    )
