"""One linear operation in FP8 and its two gradients: what is quantised, multiplied and kept.

For `model/fp8.py` and `model/fp8_feed_forward.py`, which make them differentiable.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.kernels.gemm.api import scaled_matmul, scaled_wgrad
from dsv3_jax.kernels.grouped_gemm.api import grouped_matmul, grouped_wgrad, grouped_wgrad_into
from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.model.fp8_operands import (
    TILE,
    Activation,
    keep_activation_input,
    quantize_input,
    quantize_input_and_pack,
    quantize_saved,
    quantize_weight,
)
from dsv3_jax.model.remat import named_product
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled, StepWeight, StraightThrough
from dsv3_jax.quantization.recipe import LinearRecipe


def flat(x: Any, batch: tuple[int, ...]) -> Any:
    """x, or each array of it, with its leading dims made one of tokens."""
    return jax.tree.map(lambda a: a.reshape(math.prod(batch), *a.shape[len(batch) :]), x)


def carrier_and_numbers(x: Any, activation: Activation | None) -> tuple[Array, BlockScaled | None]:
    """What carries the gradient of x, and the numbers of x where they come quantised."""
    if not isinstance(x, StraightThrough):
        return x, None
    assert activation is None and x.numbers.tile == PER_TOKEN
    return x.carrier, x.numbers


# A weight's numbers, and the same transposed; or a copy of it and None. Where its gradient is left.
Made = tuple[BlockScaled | Array, BlockScaled | None, GradientSum | None] | None


def matrix_of(weight: Any, *rows: int) -> tuple[Array, Made]:
    """What carries the gradient of the weight as [*rows, K], and its numbers if they are made."""
    if not isinstance(weight, StepWeight):
        return weight.reshape(*rows, weight.shape[-1]), None
    master, numbers = weight.master.reshape(*rows, weight.shape[-1]), weight.numbers
    if not isinstance(numbers, BlockScaled):  # a copy, which is quantised where it is multiplied
        numbers = numbers.reshape(master.shape)
    return master, (numbers, weight.transposed, weight.gradient)


def product(x, weight, group_sizes, recipe, activation, arrived=None, made: Made = None):
    """activation(x) times the weight, and what the gradients need.

    `arrived` are the numbers of x if they were quantised before; x then has their gradient.
    """
    quantized, saved = _read_and_kept(x, activation, arrived, recipe, used_rows(group_sizes))
    numbers, transposed, total = made or (weight, None, None)
    kept = (numbers, None) if transposed is None else (None, transposed)
    if not isinstance(numbers, BlockScaled):
        numbers, _ = quantize_weight(numbers, recipe.weight)
    y = _multiply(quantized, numbers, group_sizes)
    y = named_product(y[:, : weight.shape[-2]].astype(x.dtype), weight.shape)
    # dtypes and shapes travel as arrays that nobody reads: residuals are arrays.
    like, like_weight = jnp.zeros((0, *x.shape[1:]), x.dtype), jnp.zeros((), weight.dtype)
    return y, (saved, like, kept, like_weight, group_sizes, total)


def _read_and_kept(x, activation, arrived, recipe: LinearRecipe, used) -> tuple[BlockScaled, Any]:
    """What the product reads of x, and what is kept of x for the weight's gradient."""
    if arrived is not None:
        values = jnp.pad(arrived.values, [(0, 0), (0, -x.shape[1] % TILE)])
        quantized = BlockScaled(values, arrived.scales, arrived.tile)
        return quantized, quantized
    if recipe.saved_input == "e5m6":
        return quantize_input_and_pack(x, activation, recipe.input, used)
    quantized = quantize_input(x, activation, recipe.input, used)
    if recipe.saved_input == "unquantized":
        return quantized, x
    kept = quantized if activation is None else keep_activation_input(x, recipe.input, used)
    return quantized, kept


def product_gradients(
    recipe, activation, residuals, d_output: tuple[BlockScaled, BlockScaled], outputs: int
):
    """Those of activation(input) and of the weight, for the output's, quantised for both."""
    saved, like, (weight, transposed), like_weight, group_sizes, total = residuals
    by_token, by_channel = d_output
    inputs = like.shape[-1]
    # Dgrad
    if transposed is None:
        scaled = isinstance(weight, BlockScaled)
        transposed = weight.mT if scaled else quantize_weight(weight, recipe.weight)[1]
    d_input = _multiply(by_token, transposed, group_sizes)
    d_input = d_input[:, :inputs].astype(like.dtype)
    # Wgrad
    kept = quantize_saved(saved, like, activation, recipe, used_rows(group_sizes))
    whole = by_channel.shape[0], kept.shape[0]
    if total is not None and total.matrix == whole:
        if group_sizes is None:
            scaled_wgrad(by_channel, kept, total)
        else:
            grouped_wgrad_into(by_channel, kept, group_sizes, total)
        return d_input, None
    if group_sizes is None:
        d_weight = scaled_matmul(by_channel, kept)
    else:
        d_weight = grouped_wgrad(by_channel, kept, group_sizes)
    d_weight = d_weight[..., :outputs, :inputs]
    if total is None:
        return d_input, d_weight.astype(like_weight.dtype)
    total.put(d_weight)
    return d_input, None


def used_rows(group_sizes: Any) -> Array | None:
    """The rows that belong to groups, of those that there is room for; None: all."""
    return None if group_sizes is None else group_sizes.sum(dtype=jnp.int32)


def _multiply(a: BlockScaled, b: BlockScaled, group_sizes):
    if group_sizes is None:
        return scaled_matmul(a, b)
    return grouped_matmul(a, b, group_sizes)
