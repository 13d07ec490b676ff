"""Grouped matmul over aligned blocks of rows: the exact form for CPUs.

XLA:CPU computes `ragged_dot` densely over all experts. Here every block of `alignment` rows belongs
to one group, so that it is one dense product with that group's weights. Blocks of many rows are
multiplied in one batch, which keeps all cores busy and affords a copy of the weights per block;
blocks of few rows (decoding) one after the other, with the weights read in place.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.quantization.block_scaled import BlockScaled, dequantize

# From this many rows a block, copying its weights costs less than a loop's products, which are too
# small for two cores: 64 rows use each weight in 128 floating-point operations.
BATCHED_FROM = 64


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
    batched = alignment >= BATCHED_FROM
    if isinstance(weights, BlockScaled) and not batched:
        scaled: Array = _looped_scaled(_plain(rows), weights, group_sizes, alignment)
        return scaled.astype(jnp.bfloat16)
    dtype = jnp.bfloat16 if isinstance(rows, BlockScaled) else rows.dtype
    product = _batched if batched else _looped
    out: Array = product(_plain(rows), _plain(weights), group_sizes, alignment)
    return out.astype(dtype)


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


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _batched(x, weights, group_sizes, alignment):
    block_group, _ = _blocks(x.shape[0], group_sizes, alignment)
    out = jnp.einsum("bmk,bnk->bmn", _split(x, alignment), _weights_of(weights, block_group))
    return out.reshape(x.shape[0], weights.shape[1])


def _batched_forward(x, weights, group_sizes, alignment):
    return _batched(x, weights, group_sizes, alignment), (x, weights, group_sizes)


def _batched_backward(alignment, residuals, d_out):
    x, weights, group_sizes = residuals
    block_group, _ = _blocks(x.shape[0], group_sizes, alignment)
    d_blocks = _split(d_out, alignment)
    d_x = jnp.einsum("bmn,bnk->bmk", d_blocks, _weights_of(weights, block_group))
    by_block = jnp.einsum(
        "bmn,bmk->bnk", d_blocks, _split(x, alignment), preferred_element_type=jnp.float32
    )
    # A product with 0 and 1, not a scatter-add: the order of the sum is fixed.
    belongs = jax.nn.one_hot(block_group, weights.shape[0], dtype=jnp.float32)
    d_weights = jnp.einsum("be,bnk->enk", belongs, by_block)
    return d_x.reshape(x.shape), d_weights.astype(weights.dtype), _no_gradient(group_sizes)


_batched.defvjp(_batched_forward, _batched_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _looped(x, weights, group_sizes, alignment):
    block_group, used = _blocks(x.shape[0], group_sizes, alignment)

    def body(i, out):
        product = _rows(x, i, alignment) @ weights[block_group[i]].T
        return jax.lax.dynamic_update_slice(out, product, (i * alignment, 0))

    # zeros_like, also below: inside shard_map zeros must vary over the same axes as their rows.
    start = jnp.zeros_like(x, shape=(x.shape[0], weights.shape[1]))
    return jax.lax.fori_loop(0, used, body, start)


def _looped_forward(x, weights, group_sizes, alignment):
    return _looped(x, weights, group_sizes, alignment), (x, weights, group_sizes)


def _looped_backward(alignment, residuals, d_out):
    x, weights, group_sizes = residuals
    block_group, used = _blocks(x.shape[0], group_sizes, alignment)

    def body(i, carry):
        d_x, d_weights = carry
        group, d_rows = block_group[i], _rows(d_out, i, alignment)
        d_x = jax.lax.dynamic_update_slice(d_x, d_rows @ weights[group], (i * alignment, 0))
        product = jnp.matmul(d_rows.T, _rows(x, i, alignment), preferred_element_type=jnp.float32)
        return d_x, d_weights.at[group].add(product)

    # f32: a group's weight gradient is a sum over its blocks.
    start = (jnp.zeros_like(x), jnp.zeros_like(weights, jnp.float32))
    d_x, d_weights = jax.lax.fori_loop(0, used, body, start)
    return d_x, d_weights.astype(weights.dtype), _no_gradient(group_sizes)


_looped.defvjp(_looped_forward, _looped_backward)


def _looped_scaled(x, weights: BlockScaled, group_sizes, alignment):
    """`_looped` that dequantises the weights of the groups in use, one at a time."""
    block_group, used = _blocks(x.shape[0], group_sizes, alignment)

    def body(i, out):
        of_group = jax.tree.map(lambda leaf: leaf[block_group[i]], weights)
        product = _rows(x, i, alignment) @ dequantize(of_group, jnp.float32).T
        return jax.lax.dynamic_update_slice(out, product, (i * alignment, 0))

    return jax.lax.fori_loop(0, used, body, jnp.zeros((x.shape[0], weights.shape[1]), x.dtype))


def _plain(x: Array | BlockScaled) -> Array:
    # f32 holds an E4M3 number times its scale to one rounding, as in the reference.
    return dequantize(x, jnp.float32) if isinstance(x, BlockScaled) else x


def _blocks(rows: int, group_sizes, alignment: int):
    """Each block's group (past the last one for a block out of use), and how many are in use."""
    ends = jnp.cumsum(group_sizes)
    first_rows = jnp.arange(rows // alignment) * alignment
    group = jnp.searchsorted(ends, first_rows, side="right", method="compare_all")
    return group, ends[-1] // alignment


def _weights_of(weights, block_group):
    """Each block's weights; zeros for a block out of use, whose group is out of range."""
    return jnp.take(weights, block_group, axis=0, mode="fill", fill_value=0)


def _split(x, alignment: int):
    return x.reshape(-1, alignment, x.shape[1])


def _rows(x, block, alignment: int):
    return jax.lax.dynamic_slice(x, (block * alignment, 0), (alignment, x.shape[1]))


def _no_gradient(group_sizes):
    return np.zeros(group_sizes.shape, jax.dtypes.float0)
