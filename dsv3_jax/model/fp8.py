"""Linear operations with all three products in FP8, forward and backward (V3 report, section 3.3).

The one idea: a linear operation is three matrix products that contract over different dims, and
each operand is quantised along the dim that its product contracts: the input and the output
gradient along channels for Fprop and Dgrad, both along tokens for Wgrad. Between forward and
backward only the quantised input is kept. How each operand is cut and scaled is the
`LinearRecipe`'s to say; multiplying is the kernels' work. Dense and grouped-by-expert operations
are the same code.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import astuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.gemm.api import scaled_matmul
from dsv3_jax.kernels.grouped_gemm.api import grouped_matmul, grouped_wgrad
from dsv3_jax.parallel.collectives import vary
from dsv3_jax.quantization.block_scaled import (
    PER_TOKEN,
    BlockScaled,
    StraightThrough,
    dequantize,
    quantize,
    split_tiles,
)
from dsv3_jax.quantization.recipe import LinearRecipe, TileFormat

Activation = Callable[[Array], Array]

# The contracted dim must fill whole tiles of 128, and a kernel's N whole vectors of 8. Zeros do.
_TILE = 128


def fp8_linear(
    x: Float[Array, "*B K"],
    weight: Float[Array, "*N K"],
    recipe: LinearRecipe,
    activation: Activation | None = None,
) -> Float[Array, "..."]:
    """activation(x) times the transposed weight: [*B, K] by [*N, K] gives [*B, *N] in x's dtype.

    Fprop and Dgrad sum in f32 and round to BF16; the weight's gradient stays f32 up to the weight's
    own dtype. With an activation (SwiGLU) x is [*B, ...], what activation makes [*B, K] of; x is
    what is saved, quantised, and the activation is computed again in the backward pass.
    """
    batch = x.shape[: -_input_dims(activation)]
    x_T = x.reshape(math.prod(batch), *x.shape[len(batch) :])
    # Inside a shard_map: the gradient of one is added up over the devices that the other differs
    # between.
    axes = [a for operand in (x_T, weight) for a in jax.typeof(operand).manual_axis_type.varying]
    x_T, weight = vary((x_T, weight), axes)
    weight_NK = weight.reshape(-1, weight.shape[-1])
    y: Array = _linear(x_T, weight_NK, None, recipe, activation)
    return y.reshape(*batch, *weight.shape[:-1])


def fp8_grouped_linear(
    rows: Float[Array, "M K"] | StraightThrough,
    weights: Float[Array, "E *N K"],
    group_sizes: Int[Array, " E"],
    recipe: LinearRecipe,
    activation: Activation | None = None,
) -> Float[Array, "M *N"]:
    """Each row of `activation(rows)` times its group's weights; `fp8_linear` for routed experts.

    group_sizes are multiples of 128, so that no scale along tokens spans two experts; rows beyond
    the last group give zero. Rows that come quantised (1x128) are multiplied as they are, whatever
    the recipe says of the input; they take no activation.
    """
    experts, *out_dims, _ = weights.shape
    weights_ENK = weights.reshape(experts, -1, weights.shape[-1])
    arrived = None
    if isinstance(rows, StraightThrough):
        assert activation is None and rows.numbers.tile == PER_TOKEN
        rows, arrived = rows.carrier, rows.numbers
    y: Array = _linear(rows, weights_ENK, group_sizes, recipe, activation, arrived)
    return y.reshape(-1, *out_dims)


def _input_dims(activation: Activation | None) -> int:
    """Trailing dims of one token's input: SwiGLU takes [2, F], the plain operation [K]."""
    return 1 if activation is None else 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(x, weight, group_sizes, recipe, activation, arrived=None):
    return _forward(x, weight, group_sizes, recipe, activation, arrived)[0]


def _forward(x, weight, group_sizes, recipe, activation, arrived=None):
    """`arrived` are the numbers of x if they were quantised before; x then has their gradient."""
    if arrived is None:
        quantized = _quantize(x if activation is None else activation(x), recipe.input)
    else:
        values = jnp.pad(arrived.values, [(0, 0), (0, -x.shape[1] % _TILE)])
        quantized = BlockScaled(values, arrived.scales, arrived.tile)
    y = _multiply(quantized, _quantize(weight, recipe.weight), group_sizes)
    y = y[:, : weight.shape[-2]].astype(x.dtype)
    saved = x if arrived is None else quantized
    if recipe.saved_input == "quantized":
        saved = quantized if activation is None else quantize(x, *astuple(recipe.input))
    # x's dtype and shape travel as an empty array: residuals are arrays.
    like = jnp.zeros((0, *x.shape[1:]), x.dtype)
    return y, (saved, like, weight, group_sizes)


def _backward(recipe, activation, residuals, dy):
    saved, like, weight, group_sizes = residuals
    x = saved
    if isinstance(saved, BlockScaled):
        # f32 is the exact form for requantising; an activation is computed in the model's dtype.
        dtype = jnp.float32 if activation is None else like.dtype
        x = dequantize(saved, dtype)[..., : like.shape[-1]]
    product_input, pull_back = jax.vjp(activation or (lambda x: x), x)
    # Dgrad
    dy_quantized = split_tiles(_quantize(dy, recipe.dgrad), PER_TOKEN)
    d_input = _multiply(dy_quantized, _quantize(weight, recipe.weight).mT, group_sizes)
    rows, columns = product_input.shape
    d_input = d_input[:rows, :columns].astype(product_input.dtype)
    (dx,) = pull_back(d_input)
    # Wgrad
    dy_by_token = _quantize(dy, recipe.wgrad, columns=8).mT
    input_by_token = _quantize(product_input, recipe.wgrad, columns=8).mT
    if group_sizes is None:
        d_weight = scaled_matmul(dy_by_token, input_by_token)
    else:
        d_weight = grouped_wgrad(dy_by_token, input_by_token, group_sizes)
    d_weight = d_weight[..., : weight.shape[-2], : weight.shape[-1]].astype(weight.dtype)
    no_gradient = None
    if group_sizes is not None:
        no_gradient = np.zeros(group_sizes.shape, jax.dtypes.float0)
    return dx.astype(like.dtype), d_weight, no_gradient, None


_linear.defvjp(_forward, _backward)


def _multiply(a: BlockScaled, b: BlockScaled, group_sizes):
    if group_sizes is None:
        return scaled_matmul(a, b)
    return grouped_matmul(a, b, group_sizes)


def _quantize(x, form: TileFormat, columns: int = _TILE) -> BlockScaled:
    """x quantised, after zeros have filled its last two dims up to what kernels read.

    Columns are what the product contracts, or its N. Rows need whole tiles where the tile spans
    rows: those are contracted once transposed, except a 1x128 operand's, which are free.
    """
    rows = 1 if form.tile[0] == 1 else _TILE
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % rows), (0, -x.shape[-1] % columns)]
    return quantize(jnp.pad(x, padding), form.tile, form.scale_format)
