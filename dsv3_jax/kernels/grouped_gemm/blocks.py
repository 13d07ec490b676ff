"""Grouped matmul over aligned blocks of rows: the exact form for CPUs.

XLA:CPU computes `ragged_dot` densely over all experts. Here every block of `alignment` rows belongs
to one group, so that it is one dense product with that group's weights. Blocks in use are
multiplied one after the other, and others cost nothing.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.quantization.block_scaled import BlockScaled, dequantize

# From this many rows a block, a copy of all weights as [K, N] costs less than it saves: XLA:CPU
# multiplies 64 rows by that at 96 GFLOP/s a core, and by [N, K] at 57.
TRANSPOSED_FROM = 64
# Rows that `by_group` multiplies at a time, at least.
WINDOW = 16
# Up to so many blocks, as decoding has them, are multiplied without a loop: it would be handed all
# of a layer's weights, which XLA:CPU first copies out of the stack of layers.
UNROLLED_BLOCKS = 16


def grouped_matmul(
    rows: Float[Array, "M K"] | BlockScaled,
    weights: Float[Array, "E N K"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    *,
    alignment: int,
) -> Float[Array, "M N"]:
    """What `api.grouped_matmul` returns; M must be a multiple of alignment."""
    if rows.shape[0] % alignment:
        raise NotImplementedError(f"{rows.shape[0]} rows are no multiple of {alignment=}")
    if isinstance(weights, BlockScaled):
        scaled: Array = _looped_scaled(_plain(rows), weights, group_sizes, alignment)
        return scaled.astype(jnp.bfloat16)
    assert not isinstance(rows, BlockScaled)
    return _looped(rows, weights, group_sizes, alignment)


def grouped_dgrad(
    d_out: Float[Array, "M N"],
    weights: Float[Array, "E N K"],
    group_sizes: Int[Array, " E"],
    *,
    alignment: int,
) -> Float[Array, "M K"]:
    """What `api.grouped_dgrad` returns; M must be a multiple of alignment."""
    if d_out.shape[0] % alignment:
        raise NotImplementedError(f"{d_out.shape[0]} rows are no multiple of {alignment=}")
    block_group, used = _blocks(d_out.shape[0], group_sizes, alignment)

    def product(i):
        return _rows(d_out, i, alignment) @ weights[block_group[i]]

    return _by_block(product, d_out, weights.shape[2], used, alignment)


def grouped_wgrad(
    a: Float[Array, "N M"] | BlockScaled,
    b: Float[Array, "K M"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    *,
    accumulate: Float[Array, "E N K"] | None = None,
    alignment: int,
) -> Float[Array, "E N K"]:
    """What `api.grouped_wgrad` returns; M must be a multiple of alignment."""
    if a.shape[1] % alignment:
        raise NotImplementedError(f"{a.shape[1]} rows are no multiple of {alignment=}")
    operands = _plain(a), _plain(b)
    block_group, used = _blocks(a.shape[1], group_sizes, alignment)

    def body(i, total):
        a_block, b_block = (
            jax.lax.dynamic_slice(x, (0, i * alignment), (x.shape[0], alignment)) for x in operands
        )
        product = jnp.matmul(a_block, b_block.T, preferred_element_type=jnp.float32)
        return total.at[block_group[i]].add(product)

    if accumulate is None:
        shape = (group_sizes.shape[0], a.shape[0], b.shape[0])
        accumulate = jnp.zeros_like(operands[0], jnp.float32, shape)
    return jax.lax.fori_loop(0, used, body, accumulate)


def grouped_wgrad_into(
    a: Float[Array, "N M"] | BlockScaled,
    b: Float[Array, "K M"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    into: GradientSum,
    *,
    alignment: int,
) -> None:
    """`grouped_wgrad`, left in its place."""
    into.put(grouped_wgrad(a, b, group_sizes, alignment=alignment))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _looped(x, weights, group_sizes, alignment):
    block_group, used = _blocks(x.shape[0], group_sizes, alignment)
    transposed = alignment >= TRANSPOSED_FROM
    by_group = weights.mT if transposed else weights

    def product(i):
        of_block = by_group[block_group[i]]
        return _rows(x, i, alignment) @ (of_block if transposed else of_block.T)

    return _by_block(product, x, weights.shape[1], used, alignment)


def _looped_forward(x, weights, group_sizes, alignment):
    return _looped(x, weights, group_sizes, alignment), (x, weights, group_sizes)


def _looped_backward(alignment, residuals, d_out):
    x, weights, group_sizes = residuals
    block_group, used = _blocks(x.shape[0], group_sizes, alignment)

    def body(i, carry):
        d_x, d_transposed = carry
        group, d_rows = block_group[i], _rows(d_out, i, alignment)
        d_x = jax.lax.dynamic_update_slice(d_x, d_rows @ weights[group], (i * alignment, 0))
        # [K, N]: 92 GFLOP/s a core, and 75 for [N, K].
        product = jnp.matmul(_rows(x, i, alignment).T, d_rows, preferred_element_type=jnp.float32)
        return d_x, d_transposed.at[group].add(product)

    # f32: a group's weight gradient is a sum over its blocks.
    start = (jnp.zeros_like(x), jnp.zeros_like(weights.mT, jnp.float32))
    d_x, d_transposed = jax.lax.fori_loop(0, used, body, start)
    return d_x, d_transposed.mT.astype(weights.dtype), _no_gradient(group_sizes)


_looped.defvjp(_looped_forward, _looped_backward)


def _looped_scaled(x, weights: BlockScaled, group_sizes, alignment):
    """`_looped` that dequantises the weights of the groups in use, one at a time."""
    block_group, used = _blocks(x.shape[0], group_sizes, alignment)

    def product(i):
        of_group = jax.tree.map(lambda leaf: leaf[block_group[i]], weights)
        return _rows(x, i, alignment) @ dequantize(of_group, jnp.float32).T

    return _by_block(product, x, weights.shape[1], used, alignment)


def by_group(
    rows: Float[Array, "M K"],
    matrix_of: Callable[[Int[Array, ""]], Float[Array, "K N"]],
    columns: int,
    group_sizes: Int[Array, " E"],
    alignment: int,
) -> Float[Array, "M N"]:
    """Each row times matrix_of(its group), a group after the other, in the rows' dtype.

    Each matrix is made once, and of groups in use alone. M is a multiple of alignment, as the
    sizes are.
    """
    ends = jnp.cumsum(group_sizes)
    # A product reads all of a matrix, and takes as long for a few rows as for a window. What that
    # has of rows beyond its group, the next groups write again. f32 throughout: XLA:CPU would widen
    # all of a BF16 array to update a part of it.
    window = max(alignment, WINDOW)
    wide = jnp.pad(rows.astype(jnp.float32), ((0, window - alignment), (0, 0)))

    def of_group(group, out):
        matrix, size = matrix_of(group), group_sizes[group]

        def of_window(i, out):
            start = ends[group] - size + i * window
            of_rows = jax.lax.dynamic_slice_in_dim(wide, start, window) @ matrix
            return jax.lax.dynamic_update_slice(out, of_rows, (start, 0))

        return jax.lax.fori_loop(0, (size + window - 1) // window, of_window, out)

    def body(group, out):
        used = group_sizes[group] > 0
        return jax.lax.cond(used, of_group, lambda group, out: out, group, out)

    start = jnp.zeros_like(wide, shape=(len(wide), columns))
    out = jax.lax.fori_loop(0, len(group_sizes), body, start)[: len(rows)]
    used = jnp.arange(len(rows)) < ends[-1]
    return jnp.where(used[:, None], out, 0).astype(rows.dtype)


def _by_block(product: Callable, x, columns: int, used, alignment: int):
    """product(i) in the rows of each block i of x that is in use, and zeros in the others."""
    number = x.shape[0] // alignment
    if number <= UNROLLED_BLOCKS:
        return jnp.concatenate([jnp.where(i < used, product(i), 0) for i in range(number)])

    def body(i, out):
        return jax.lax.dynamic_update_slice(out, product(i), (i * alignment, 0))

    # zeros_like, also elsewhere: inside shard_map zeros must vary over the same axes as their rows.
    start = jnp.zeros_like(x, shape=(x.shape[0], columns))
    return jax.lax.fori_loop(0, used, body, start)


def _plain(x: Array | BlockScaled) -> Array:
    # f32 holds an E4M3 number times its scale to one rounding, as in the reference.
    return dequantize(x, jnp.float32) if isinstance(x, BlockScaled) else x


def _blocks(rows: int, group_sizes, alignment: int):
    """Each block's group (past the last one for a block out of use), and how many are in use."""
    ends = jnp.cumsum(group_sizes)
    first_rows = jnp.arange(rows // alignment) * alignment
    group = jnp.searchsorted(ends, first_rows, side="right", method="compare_all")
    return group, ends[-1] // alignment


def _rows(x, block, alignment: int):
    return jax.lax.dynamic_slice(x, (block * alignment, 0), (alignment, x.shape[1]))


def _no_gradient(group_sizes):
    return np.zeros(group_sizes.shape, jax.dtypes.float0)
