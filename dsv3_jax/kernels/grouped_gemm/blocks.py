"""Grouped matmul as a loop over aligned blocks of rows: the exact form for CPUs.

XLA:CPU computes `ragged_dot` densely over all experts. Here every block of `alignment` rows belongs
to one group, so that it is one dense product with that group's weights; the loop runs over the
blocks in use only, forward and backward, and weights are read in place, not gathered per block.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.quantization.block_scaled import BlockScaled


def grouped_matmul(
    rows: Float[Array, "M K"],
    weights: Float[Array, "E N K"],
    group_sizes: Int[Array, " E"],
    *,
    alignment: int,
) -> Float[Array, "M N"]:
    """What `api.grouped_matmul` returns for plain operands; M must be a multiple of alignment."""
    if isinstance(rows, BlockScaled):
        raise NotImplementedError("block-scaled operands")
    if rows.shape[0] % alignment:
        raise NotImplementedError(f"{rows.shape[0]} rows are no multiple of {alignment=}")
    return _grouped_matmul(rows, weights, group_sizes, alignment)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x, weights, group_sizes, alignment):
    block_group, used = _blocks(x.shape[0], group_sizes, alignment)

    def body(i, out):
        product = _rows(x, i, alignment) @ weights[block_group[i]].T
        return jax.lax.dynamic_update_slice(out, product, (i * alignment, 0))

    return jax.lax.fori_loop(0, used, body, jnp.zeros((x.shape[0], weights.shape[1]), x.dtype))


def _forward(x, weights, group_sizes, alignment):
    return _grouped_matmul(x, weights, group_sizes, alignment), (x, weights, group_sizes)


def _backward(alignment, residuals, d_out):
    x, weights, group_sizes = residuals
    block_group, used = _blocks(x.shape[0], group_sizes, alignment)

    def body(i, carry):
        d_x, d_weights = carry
        group, d_rows = block_group[i], _rows(d_out, i, alignment)
        d_x = jax.lax.dynamic_update_slice(d_x, d_rows @ weights[group], (i * alignment, 0))
        product = jnp.matmul(d_rows.T, _rows(x, i, alignment), preferred_element_type=jnp.float32)
        return d_x, d_weights.at[group].add(product)

    # f32: a group's weight gradient is a sum over its blocks.
    start = (jnp.zeros_like(x), jnp.zeros(weights.shape, jnp.float32))
    d_x, d_weights = jax.lax.fori_loop(0, used, body, start)
    no_gradient = np.zeros(group_sizes.shape, jax.dtypes.float0)
    return d_x, d_weights.astype(weights.dtype), no_gradient


_grouped_matmul.defvjp(_forward, _backward)


def _blocks(rows: int, group_sizes, alignment: int):
    """The group of every block of rows, and how many blocks are in use."""
    ends = jnp.cumsum(group_sizes)
    first_rows = jnp.arange(rows // alignment) * alignment
    group = jnp.searchsorted(ends, first_rows, side="right", method="compare_all")
    return jnp.minimum(group, group_sizes.shape[0] - 1), ends[-1] // alignment


def _rows(x, block, alignment: int):
    return jax.lax.dynamic_slice(x, (block * alignment, 0), (alignment, x.shape[1]))
