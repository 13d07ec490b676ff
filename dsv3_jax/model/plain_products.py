"""Linear operations in the activations' dtype, with weights that are trained in a wider one.

The one idea: a weight's gradient is a sum over all tokens of a step, and stays in the float32 that
tensor cores add it up in. JAX's own derivative of a BF16 product would round it to BF16 first, for
every micro-batch and every device anew. What is read of the weight is a copy in the activations'
dtype, made here or once a step (a StepWeight).
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend
from dsv3_jax.kernels.grouped_gemm.api import (
    grouped_dgrad,
    grouped_matmul,
    grouped_wgrad,
    grouped_wgrad_into,
)
from dsv3_jax.parallel.collectives import vary_together
from dsv3_jax.quantization.block_scaled import StepWeight


def product(
    x: Float[Array, "*B K"], weight: Float[Array, "*N K"] | StepWeight
) -> Float[Array, "..."]:
    """x times the transposed weight, [*B, *N] in x's dtype; the weight's gradient in its own."""
    if weight.dtype == x.dtype and not isinstance(weight, StepWeight):
        return times(x, weight)
    x, weight = vary_together(x, weight)
    y: Array = _product(x, *_parts(weight))
    return y


def grouped_product(
    rows: Float[Array, "M K"],
    weights: Float[Array, "E N K"] | StepWeight,
    group_sizes: Int[Array, " E"],
    alignment: int,
) -> Float[Array, "M N"]:
    """`product` of each row with its group's weights, as `kernels.grouped_gemm` has them."""
    if weights.dtype == rows.dtype and not isinstance(weights, StepWeight):
        return grouped_matmul(rows, weights, group_sizes, alignment=alignment)
    rows, weights = vary_together(rows, weights)
    y: Array = _grouped_product(rows, *_parts(weights), group_sizes, alignment)
    return y


# XLA:CPU multiplies float32. Of a narrower weight of more numbers than this it would make a copy of
# four bytes a number: so many are multiplied at a time, 16 MiB.
PIECE = 1 << 22

# Up to so many rows, XLA:CPU takes one after the other faster than it takes them together: two of
# 128 by [1024, 128] in 15 us for 27, four in 24 for 32.
ROW_BY_ROW = 4


def are_few(x: Array, leading: int) -> bool:
    """Whether these are so few rows, numbered by the first dims of x, in a program for a CPU."""
    return 0 < math.prod(x.shape[:leading]) <= ROW_BY_ROW and backend.platform() == "cpu"


def row_by_row(multiply: Callable[[Array], Array], x: Array, leading: int) -> Array:
    """multiply(x), each row by itself where there are a few and the program is for a CPU.

    The first dims of x, so many, number the rows, and stay the first of the result.
    """
    dims = x.shape[:leading]
    if math.prod(dims) == 1 or not are_few(x, leading):
        return multiply(x)
    rows = x.reshape(-1, *[1] * leading, *x.shape[leading:])
    y = jnp.concatenate([multiply(row) for row in rows])
    return y.reshape(*dims, *y.shape[leading:])


def _parts(weight):
    """The master, the copy of it that is made, and where its gradient is left."""
    if isinstance(weight, StepWeight):
        return weight.master, weight.numbers, weight.gradient
    return weight, None, None


def times(x: Float[Array, "*B K"], weight: Float[Array, "*N K"]) -> Float[Array, "..."]:
    """x times the transposed weight, [*B, *N] in their dtype."""
    if _is_widened(weight):
        y: Array = _times_in_pieces(x.reshape(-1, x.shape[-1]), weight.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], *weight.shape[:-1])
    contract = (((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract)


def times_back(dy: Float[Array, "*B N"], weight: Float[Array, "N K"]) -> Float[Array, "*B K"]:
    """The gradient of `times` with respect to x: dy times the weight, in their dtype."""
    if _is_widened(weight):
        return _back_in_pieces(dy.reshape(-1, dy.shape[-1]), weight).reshape(*dy.shape[:-1], -1)
    return jax.lax.dot_general(dy, weight, (((dy.ndim - 1,), (0,)), ((), ())))


def _is_widened(weight) -> bool:
    large = weight.size > PIECE and weight.dtype == jnp.bfloat16
    return large and backend.platform() == "cpu"


def _in_f32(weight, start, rows: int):
    """Rows of a weight in BF16."""
    # XLA:CPU slices BF16 as float32, and would make that of the whole weight before a loop. By the
    # barrier the weight is another one in each turn.
    weight, start = jax.lax.optimization_barrier((weight, start))
    return jax.lax.dynamic_slice_in_dim(weight, start, rows).astype(jnp.float32)


def _rows_a_piece(weight) -> int:
    return max(PIECE // weight.shape[1], 1)


@jax.custom_vjp
def _times_in_pieces(x, weight):
    rows, wide = _rows_a_piece(weight), x.astype(jnp.float32)
    number, left = divmod(len(weight), rows)
    y = jax.lax.map(lambda i: wide @ _in_f32(weight, i * rows, rows).T, jnp.arange(number))
    y = jnp.moveaxis(y, 0, 1).reshape(len(x), -1)
    if left:
        y = jnp.concatenate([y, wide @ _in_f32(weight, number * rows, left).T], axis=1)
    return y.astype(x.dtype)


def _back_in_pieces(dy, weight):
    rows, wide = _rows_a_piece(weight), dy.astype(jnp.float32)
    number, left = divmod(len(weight), rows)

    def product(start, rows):
        part = jax.lax.dynamic_slice_in_dim(wide, start, rows, 1)
        return part @ _in_f32(weight, start, rows)

    total = jnp.zeros_like(wide, shape=(len(dy), weight.shape[1]))
    total = jax.lax.fori_loop(0, number, lambda i, total: total + product(i * rows, rows), total)
    return (total + product(number * rows, left) if left else total).astype(dy.dtype)


def _times_backward(operands, dy):
    x, weight = operands
    d_weight = jax.lax.dot_general(dy, x, (((0,), (0,)), ((), ())))
    return _back_in_pieces(dy, weight), d_weight


backend.define_vjp(
    _times_in_pieces, lambda x, weight: (_times_in_pieces(x, weight), (x, weight)), _times_backward
)


def _in_dtype_of(x, master, copy):
    return master.astype(x.dtype) if copy is None else copy


@jax.custom_vjp
def _product(x, master, copy, total):
    del total
    return times(x, _in_dtype_of(x, master, copy))


def _product_forward(x, master, copy, total):
    # The master itself is kept, not the copy of it that is made here: it is there anyway.
    return _product(x, master, copy, total), (x, *_kept(master, copy), total)


def _product_backward(residuals, dy):
    x, master, copy, total = residuals
    weight = _in_dtype_of(x, master, copy)
    batch, outputs = tuple(range(x.ndim - 1)), weight.ndim - 1
    of_outputs = tuple(range(len(batch), dy.ndim)), tuple(range(outputs))
    dx = jax.lax.dot_general(dy, weight, (of_outputs, ((), ())))
    d_weight = jax.lax.dot_general(
        dy, x, ((batch, batch), ((), ())), preferred_element_type=master.dtype
    )
    return dx, _left(d_weight, total), None, None


_product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _grouped_product(rows, master, copy, total, group_sizes, alignment):
    del total
    weights = _in_dtype_of(rows, master, copy)
    return grouped_matmul(rows, weights, group_sizes, alignment=alignment)


def _grouped_forward(rows, master, copy, total, group_sizes, alignment):
    y = _grouped_product(rows, master, copy, total, group_sizes, alignment)
    return y, (rows, *_kept(master, copy), total, group_sizes)


def _grouped_backward(alignment, residuals, dy):
    rows, master, copy, total, group_sizes = residuals
    weights = _in_dtype_of(rows, master, copy)
    d_rows = grouped_dgrad(dy, weights, group_sizes, alignment=alignment)
    operands, d_weights = (dy.mT, rows.mT, group_sizes), None
    if total is None:
        d_weights = grouped_wgrad(*operands, alignment=alignment).astype(master.dtype)
    else:
        grouped_wgrad_into(*operands, total, alignment=alignment)
    return d_rows, d_weights, None, None, np.zeros(group_sizes.shape, jax.dtypes.float0)


backend.define_vjp(_grouped_product, _grouped_forward, _grouped_backward)


def _left(gradient, total):
    """The gradient; or None, once it is left in its place."""
    if total is None:
        return gradient
    return total.put(gradient)


def _kept(master, copy):
    """The weight for the backward pass; of a master that has a copy, its dtype alone."""
    return (master, None) if copy is None else (jnp.zeros((), master.dtype), copy)
