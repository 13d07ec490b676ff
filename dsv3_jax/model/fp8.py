"""Linear operations with all three products in FP8, forward and backward (V3 report, section 3.3).

The one idea: a linear operation is three matrix products that contract over different dims, and
each operand is quantised along the dim that its product contracts: the input and the output
gradient along channels for Fprop and Dgrad, both along tokens for Wgrad. Between forward and
backward only the quantised input is kept. How each operand is cut and scaled is the
`LinearRecipe`'s to say; multiplying is the kernels' work. Dense and grouped-by-expert operations
are the same code.
"""

import functools

import jax
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend
from dsv3_jax.model.fp8_operands import Activation, quantize_gradient, unpacked
from dsv3_jax.model.fp8_products import (
    carrier_and_numbers,
    flat,
    matrix_of,
    product,
    product_gradients,
    used_rows,
)
from dsv3_jax.parallel.collectives import no_gradients, vary_together
from dsv3_jax.quantization.block_scaled import StepWeight, StraightThrough
from dsv3_jax.quantization.recipe import LinearRecipe


def fp8_linear(
    x: Float[Array, "*B K"] | StraightThrough,
    weight: Float[Array, "*N K"] | StepWeight,
    recipe: LinearRecipe,
    activation: Activation | None = None,
) -> Float[Array, "..."]:
    """activation(x) times the transposed weight: [*B, K] by [*N, K] gives [*B, *N] in x's dtype.

    Fprop and Dgrad sum in f32 and round to BF16; the weight's gradient stays f32 up to the weight's
    own dtype. With an activation (SwiGLU) x is [*B, ...], what activation makes [*B, K] of; x is
    what is saved, quantised, and the activation is computed again in the backward pass. An x that
    comes quantised (1x128) is multiplied as it is, and takes no activation. So is a weight that
    comes so, with gradients for its master; else it is quantised forward and backward.
    """
    carrier = x.carrier if isinstance(x, StraightThrough) else x
    batch = carrier.shape[: -_input_dims(activation)]
    x_T, weight = vary_together(flat(x, batch), weight)
    x_T, arrived = carrier_and_numbers(x_T, activation)
    weight_NK, made = matrix_of(weight, -1)
    y: Array = _linear(x_T, weight_NK, None, recipe, activation, arrived, made)
    return y.reshape(*batch, *weight.shape[:-1])


def fp8_grouped_linear(
    rows: Float[Array, "M *J K"] | StraightThrough,
    weights: Float[Array, "E *N K"] | StepWeight,
    group_sizes: Int[Array, " E"],
    recipe: LinearRecipe,
    activation: Activation | None = None,
) -> Float[Array, "M *N"]:
    """Each row of `activation(rows)` times its group's weights; `fp8_linear` for routed experts.

    group_sizes are multiples of 128, so that no scale along tokens spans two experts; rows beyond
    the last group give zero. Rows that come quantised (1x128) are multiplied as they are, whatever
    the recipe says of the input; they take no activation. `J` is what an activation takes away.
    """
    experts, *out_dims, _ = weights.shape
    weights_ENK, made = matrix_of(weights, experts, -1)
    x, arrived = carrier_and_numbers(rows, activation)
    y: Array = _linear(x, weights_ENK, group_sizes, recipe, activation, arrived, made)
    return y.reshape(-1, *out_dims)


def _input_dims(activation: Activation | None) -> int:
    """Trailing dims of one token's input: SwiGLU takes [2, F], the plain operation [K]."""
    return 1 if activation is None else 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(x, weight, group_sizes, recipe, activation, arrived=None, made=None):
    return product(x, weight, group_sizes, recipe, activation, arrived, made)[0]


def _backward(recipe, activation, residuals, dy):
    saved, like, *_, group_sizes, _ = residuals
    d_output = quantize_gradient(dy, recipe, used_rows(group_sizes))
    d_input, d_weight = product_gradients(recipe, activation, residuals, d_output, dy.shape[1])
    d_input = d_input[: dy.shape[0]]
    if activation is not None:
        d_input = jax.vjp(activation, unpacked(saved, like, like.dtype))[1](d_input)[0]
    return d_input, d_weight, no_gradients(group_sizes), None, None


backend.define_vjp(_linear, product, _backward)
