"""SwiGLU feed-forwards in FP8 as one operation, dense and by expert (V3 report, section 3.3).

Both products and their gradients are those of `fp8_linear`; being one operation, SwiGLU's gradient
is quantised where it is computed, and so is that of experts' rows where tokens' sums are taken.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend
from dsv3_jax.kernels.beside import beside
from dsv3_jax.kernels.fused.api import swiglu_backward_quantize
from dsv3_jax.model.activation import swiglu
from dsv3_jax.model.fp8_operands import (
    TILE,
    filled,
    quantize_gradient,
    quantize_gradient_of_rows,
)
from dsv3_jax.model.fp8_products import (
    carrier_and_numbers,
    flat,
    matrix_of,
    product,
    product_gradients,
    used_rows,
)
from dsv3_jax.parallel.collectives import no_gradients, vary_together
from dsv3_jax.parallel.grouping import Groups, gradient_of_weights, sum_rows
from dsv3_jax.parallel.phases import mark_of
from dsv3_jax.quantization.block_scaled import PER_CHANNEL, PER_TOKEN, StepWeight, StraightThrough
from dsv3_jax.quantization.recipe import LinearRecipe, TileFormat


def can_fuse(
    dtype: Any, widths: tuple[int, ...], gate_up: LinearRecipe | None, down: LinearRecipe | None
) -> bool:
    """Whether `fp8_feed_forward` may stand for the two operations: BF16, whole tiles, 1x128."""
    if gate_up is None or down is None or down.saved_input != "quantized":
        return False
    by_token = (gate_up.input, gate_up.dgrad, down.input)
    return (
        dtype == jnp.bfloat16
        and not any(width % TILE for width in widths)
        and all(form.tile == PER_TOKEN for form in by_token)
        and gate_up.wgrad == TileFormat(PER_CHANNEL, gate_up.dgrad.scale_format)
        and down.wgrad.tile == PER_CHANNEL
    )


def fp8_feed_forward(
    x: Float[Array, "*B D"] | StraightThrough,
    gate_up: Float[Array, "2 F D"] | StepWeight,
    down: Float[Array, "D F"] | StepWeight,
    recipes: tuple[LinearRecipe, LinearRecipe],
    leaving: int | None = None,
) -> Float[Array, "*B D"]:
    """`fp8_linear` by `gate_up`, then by `down` with SwiGLU, for recipes that `can_fuse`.

    The same products and saved arrays; in the backward pass SwiGLU's gradient is quantised both
    ways where it is computed, and is never an array of its own. leaving: the forward pass runs
    beside other work on a GPU, to which it leaves so many multiprocessors (kernels/beside.py).
    """
    batch = (x.carrier if isinstance(x, StraightThrough) else x).shape[:-1]
    x_T, gate_up, down = vary_together(flat(x, batch), gate_up, down)
    x_T, arrived = carrier_and_numbers(x_T, None)
    (gate_up, wide), (down, narrow) = matrix_of(gate_up, -1), matrix_of(down, -1)
    operands = x_T, gate_up, down, None
    y: Array = _feed_forward(*operands, recipes, leaving, False, arrived, (wide, narrow))
    return y.reshape(*batch, -1)


def fp8_grouped_feed_forward(
    rows: Float[Array, "M D"] | StraightThrough,
    gate_up: Float[Array, "E 2 F D"] | StepWeight,
    down: Float[Array, "E D F"] | StepWeight,
    group_sizes: Int[Array, " E"],
    recipes: tuple[LinearRecipe, LinearRecipe],
    marked: bool = False,
    summed: tuple[Float[Array, "T K"], Groups] | None = None,
) -> Any:
    """`fp8_feed_forward` of each row by its group's weights, as `fp8_grouped_linear`.

    summed: `sum_rows` of that, by these weights, [T, D]; the gradient of rows is then never an
    array. marked: a pair of what is returned and of `phases.mark_of` what each product gives.
    """
    x, arrived = carrier_and_numbers(rows, None)
    experts = len(gate_up)
    (gate_up, wide), (down, narrow) = matrix_of(gate_up, experts, -1), matrix_of(down, experts, -1)
    operands = x, gate_up, down, group_sizes
    return _feed_forward(*operands, recipes, None, marked, arrived, (wide, narrow), summed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _feed_forward(
    x,
    gate_up,
    down,
    group_sizes,
    recipes,
    leaving,
    marked,
    arrived=None,
    made=(None, None),
    summed=None,
):
    def forward(*operands):
        return _both_products(recipes, marked, *operands)[0]

    return beside(forward, leaving)(x, gate_up, down, group_sizes, arrived, made, summed)


def _feed_forward_fwd(
    x, gate_up, down, group_sizes, recipes, leaving, marked, arrived=None, made=None, summed=None
):
    forward = functools.partial(_both_products, recipes, marked)
    operands = x, gate_up, down, group_sizes, arrived, made or (None, None), summed
    return beside(forward, leaving)(*operands)


def _both_products(recipes, marked, x, gate_up, down, group_sizes, arrived, made, summed):
    hidden, wide = product(x, gate_up, group_sizes, recipes[0], None, arrived, made[0])
    mark = mark_of(hidden) if marked else None
    hidden = hidden.reshape(len(hidden), 2, -1)
    rows, narrow = product(hidden, down, group_sizes, recipes[1], swiglu, made=made[1])
    y, marks = rows, (mark, mark_of(rows)) if marked else None
    if summed is not None:
        y, summed = sum_rows(rows, *summed), (rows, *summed)
    return (y, marks) if marked else y, (wide, narrow, summed)


def _feed_forward_bwd(recipes, leaving, marked, residuals, dy):
    del leaving  # of the forward pass alone
    dy = dy[0] if marked else dy
    wide, narrow, summed = residuals
    kept, like, *_, group_sizes, _ = narrow
    used, count, d_summed = used_rows(group_sizes), len(dy), None
    if summed is None:
        d_output = quantize_gradient(dy, recipes[1], used)
    else:
        rows, weights, groups = summed
        d_output = quantize_gradient_of_rows(dy, rows, (weights, groups), recipes[1], used)
        d_weights = gradient_of_weights(rows, dy, groups).astype(weights.dtype)
        count, d_summed = len(rows), (d_weights, no_gradients(groups))
    d_activated, d_down = product_gradients(recipes[1], swiglu, narrow, d_output, dy.shape[1])
    # Rows that filled dy up to whole tiles are zeros, and fill the gradient of SwiGLU as well.
    kept = filled(kept, TILE, 1)
    d_hidden = swiglu_backward_quantize(
        kept, filled(d_activated, TILE, 1), recipes[0].dgrad.scale_format, used=used
    )
    width = 2 * like.shape[-1]
    dx, d_gate_up = product_gradients(recipes[0], None, wide, d_hidden, width)
    others = no_gradients(group_sizes), None, None, d_summed
    return dx[:count], d_gate_up, d_down, *others


backend.define_vjp(_feed_forward, _feed_forward_fwd, _feed_forward_bwd)
