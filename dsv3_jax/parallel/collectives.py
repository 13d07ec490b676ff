"""Collectives over rows: what moves between devices, and what stands in where a backend lacks it.

Everything here runs inside `jax.shard_map` and takes the names of mesh axes; several axes act as
one, the first being the slowest.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

Axes = tuple[str, ...]


def vary(tree: Any, axes: Sequence[str]) -> Any:
    """The same values, typed as different on every device along `axes`.

    The transpose of this cast is a psum: the gradient of a replicated array is added up here, once.
    """

    def one(x):
        missing = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def vary_together(*operands: Any) -> tuple[Any, ...]:
    """The operands, inside a shard_map typed as different along the axes that any one of them is.

    The gradient of one is then added up over the devices that the others differ between.
    """
    leaves = jax.tree.leaves(operands)
    return vary(operands, [a for leaf in leaves for a in jax.typeof(leaf).manual_axis_type.varying])


def no_gradients(tree: Any) -> Any:
    """The cotangents of integers, such as a plan of what is sent where."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), tree)


def total(x: Array, axes: Sequence[str]) -> Array:
    """The sum over the devices along `axes`; x itself for none."""
    return lax.psum(x, tuple(axes)) if axes else x


# The dims along which devices hold slices of an array, and over which axes.
Cuts = tuple[tuple[int, Axes], ...]


def gather_slices(piece: Array, cuts: Cuts) -> Array:
    """The whole of an array of which each device holds a slice: a dim at a time, the same on all.

    XLA's own resharding gathers what is cut along several dims by all-reduces on TPUs.
    """
    for dim, axes in cuts:
        piece = lax.all_gather(piece, axes, axis=dim, tiled=True, to="invarying")
    return piece


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def carrier_of_slices(piece: Array, cuts: Cuts) -> Array:
    """What carries the gradient of a weight of which a device holds a slice: zeros, of its size.

    The gradient, of which each device has a part, is added up and scattered to the slices, a dim at
    a time.
    """
    shape = list(piece.shape)
    for dim, axes in cuts:
        shape[dim] *= math.prod(lax.axis_size(axis) for axis in axes)
    return vary(jnp.zeros(shape, piece.dtype), tuple(jax.typeof(piece).manual_axis_type.varying))


def _carrier_backward(cuts, _, d_whole):
    for dim, axes in cuts:
        d_whole = lax.psum_scatter(d_whole, axes, scatter_dimension=dim, tiled=True)
    return (d_whole,)


carrier_of_slices.defvjp(
    lambda piece, cuts: (carrier_of_slices(piece, cuts), None), _carrier_backward
)


def exchange(blocks: Array, axes: Axes) -> Array:
    """Block d of [N, ...] goes to peer d; what comes back holds peer d's block at d."""
    return lax.all_to_all(blocks, axes, split_axis=0, concat_axis=0)


def ragged_all_to_all(
    operand: Array,
    output: Array,
    input_offsets: Int[Array, " N"],
    send_sizes: Int[Array, " N"],
    output_offsets: Int[Array, " N"],
    recv_sizes: Int[Array, " N"],
    *,
    axes: Axes,
) -> Array:
    """`jax.lax.ragged_all_to_all`; on CPU, which lacks it, the same by an all-gather.

    send_sizes[d] rows from input_offsets[d] go to peer d, into its output from output_offsets[d];
    recv_sizes[d] rows come from peer d. Rows that nobody writes keep those of `output`.
    """

    def compiled(*args):
        return lax.ragged_all_to_all(*args, axis_name=axes)

    def emulated(*args):
        return _emulated_ragged_all_to_all(*args, axes=axes)

    # Chosen when lowered, so that a program made on one machine for another gets the right one.
    return lax.platform_dependent(
        operand,
        output,
        input_offsets,
        send_sizes,
        output_offsets,
        recv_sizes,
        cpu=emulated,
        default=compiled,
    )


def _emulated_ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axes: Axes
):
    """Every row of the output fetches its own: a gather, with nothing written twice."""
    rows = operand.shape[0]
    me = lax.axis_index(axes)
    everyone = lax.all_gather(operand, axes, tiled=True)
    # [peer, what it says about me]
    start, size, place = (
        lax.all_gather(a, axes)[:, me] for a in (input_offsets, send_sizes, output_offsets)
    )
    size = jnp.minimum(size, recv_sizes)
    row = jnp.arange(output.shape[0], dtype=place.dtype)[:, None]
    written = (row >= place) & (row < place + size)
    peer = jnp.argmax(written, axis=1)
    source = peer * rows + (start[peer] + row[:, 0] - place[peer])
    received = everyone[jnp.where(written.any(1), source, 0)]
    mask = written.any(1).reshape(-1, *[1] * (output.ndim - 1))
    return jnp.where(mask, received, output)
