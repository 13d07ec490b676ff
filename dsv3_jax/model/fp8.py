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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.fused.api import (
    quantize_both_ways,
    quantize_rows,
    quantize_transposed,
    swiglu_backward_quantize,
    swiglu_quantize,
)
from dsv3_jax.kernels.gemm.api import scaled_matmul
from dsv3_jax.kernels.grouped_gemm.api import grouped_matmul, grouped_wgrad
from dsv3_jax.model.activation import swiglu
from dsv3_jax.model.remat import named_product
from dsv3_jax.parallel.collectives import vary
from dsv3_jax.quantization import e5m6
from dsv3_jax.quantization.block_scaled import (
    PER_CHANNEL,
    PER_TOKEN,
    BlockScaled,
    StepWeight,
    StraightThrough,
    dequantize,
    quantize,
    split_tiles,
)
from dsv3_jax.quantization.e5m6 import E5M6
from dsv3_jax.quantization.recipe import LinearRecipe, TileFormat

Activation = Callable[[Array], Array]

# The contracted dim must fill whole tiles of 128, and a kernel's N whole vectors of 8. Zeros do.
_TILE = 128


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
    x_T, weight = _together(_flat(x, batch), weight)
    x_T, arrived = _carrier_and_numbers(x_T, activation)
    weight_NK, made = _matrix(weight, -1)
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
    weights_ENK, made = _matrix(weights, experts, -1)
    x, arrived = _carrier_and_numbers(rows, activation)
    y: Array = _linear(x, weights_ENK, group_sizes, recipe, activation, arrived, made)
    return y.reshape(-1, *out_dims)


def can_fuse(
    dtype: Any, widths: tuple[int, ...], gate_up: LinearRecipe | None, down: LinearRecipe | None
) -> bool:
    """Whether `fp8_feed_forward` may stand for the two operations: BF16, whole tiles, 1x128."""
    if gate_up is None or down is None or down.saved_input != "quantized":
        return False
    by_token = (gate_up.input, gate_up.dgrad, down.input)
    return (
        dtype == jnp.bfloat16
        and not any(width % _TILE for width in widths)
        and all(form.tile == PER_TOKEN for form in by_token)
        and gate_up.wgrad == TileFormat(PER_CHANNEL, gate_up.dgrad.scale_format)
        and down.wgrad.tile == PER_CHANNEL
    )


def fp8_feed_forward(
    x: Float[Array, "*B D"] | StraightThrough,
    gate_up: Float[Array, "2 F D"] | StepWeight,
    down: Float[Array, "D F"] | StepWeight,
    recipes: tuple[LinearRecipe, LinearRecipe],
) -> Float[Array, "*B D"]:
    """`fp8_linear` by `gate_up`, then by `down` with SwiGLU, for recipes that `can_fuse`.

    The same products and saved arrays; in the backward pass SwiGLU's gradient is quantised both
    ways where it is computed, and is never an array of its own.
    """
    batch = (x.carrier if isinstance(x, StraightThrough) else x).shape[:-1]
    x_T, gate_up, down = _together(_flat(x, batch), gate_up, down)
    x_T, arrived = _carrier_and_numbers(x_T, None)
    (gate_up, wide), (down, narrow) = _matrix(gate_up, -1), _matrix(down, -1)
    y: Array = _feed_forward(x_T, gate_up, down, None, recipes, arrived, (wide, narrow))
    return y.reshape(*batch, -1)


def fp8_grouped_feed_forward(
    rows: Float[Array, "M D"] | StraightThrough,
    gate_up: Float[Array, "E 2 F D"] | StepWeight,
    down: Float[Array, "E D F"] | StepWeight,
    group_sizes: Int[Array, " E"],
    recipes: tuple[LinearRecipe, LinearRecipe],
) -> Float[Array, "M D"]:
    """`fp8_feed_forward` of each row by its group's weights, as `fp8_grouped_linear`."""
    x, arrived = _carrier_and_numbers(rows, None)
    experts = len(gate_up)
    (gate_up, wide), (down, narrow) = _matrix(gate_up, experts, -1), _matrix(down, experts, -1)
    return _feed_forward(x, gate_up, down, group_sizes, recipes, arrived, (wide, narrow))


def _flat(x: Any, batch: tuple[int, ...]) -> Any:
    """x, or each array of it, with its leading dims made one of tokens."""
    return jax.tree.map(lambda a: a.reshape(math.prod(batch), *a.shape[len(batch) :]), x)


def _together(*operands: Any) -> tuple[Any, ...]:
    """The operands, inside a shard_map marked as differing along the axes that any one does.

    The gradient of one is then added up over the devices that the others differ between.
    """
    leaves = jax.tree.leaves(operands)
    return vary(operands, [a for leaf in leaves for a in jax.typeof(leaf).manual_axis_type.varying])


def _carrier_and_numbers(x: Any, activation: Activation | None) -> tuple[Array, BlockScaled | None]:
    """What carries the gradient of x, and the numbers of x where they come quantised."""
    if not isinstance(x, StraightThrough):
        return x, None
    assert activation is None and x.numbers.tile == PER_TOKEN
    return x.carrier, x.numbers


# A weight's numbers, and the same transposed; or a copy of it and None.
Made = tuple[BlockScaled, BlockScaled] | tuple[Array, None] | None


def _matrix(weight: Any, *rows: int) -> tuple[Array, Made]:
    """What carries the gradient of the weight as [*rows, K], and its numbers if they are made."""
    if not isinstance(weight, StepWeight):
        return weight.reshape(*rows, weight.shape[-1]), None
    master, numbers = weight.master.reshape(*rows, weight.shape[-1]), weight.numbers
    if not isinstance(numbers, BlockScaled):  # a copy, which is quantised where it is multiplied
        return master, (numbers.reshape(master.shape), None)
    return master, (numbers, weight.transposed)


def _input_dims(activation: Activation | None) -> int:
    """Trailing dims of one token's input: SwiGLU takes [2, F], the plain operation [K]."""
    return 1 if activation is None else 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(x, weight, group_sizes, recipe, activation, arrived=None, made=None):
    return _forward(x, weight, group_sizes, recipe, activation, arrived, made)[0]


def _forward(x, weight, group_sizes, recipe, activation, arrived=None, made: Made = None):
    """`arrived` are the numbers of x if they were quantised before; x then has their gradient."""
    if arrived is None:
        quantized = _quantize_input(x, activation, recipe.input)
    else:
        values = jnp.pad(arrived.values, [(0, 0), (0, -x.shape[1] % _TILE)])
        quantized = BlockScaled(values, arrived.scales, arrived.tile)
    numbers, transposed = made or (weight, None)
    kept = numbers if transposed is None else transposed
    if not isinstance(numbers, BlockScaled):
        numbers = _quantize(numbers, recipe.weight)
    y = _multiply(quantized, numbers, group_sizes)
    y = named_product(y[:, : weight.shape[-2]].astype(x.dtype), weight.shape)
    saved = x if arrived is None else quantized
    if recipe.saved_input == "quantized":
        saved = quantized if activation is None else _keep(x, recipe.input)
    elif recipe.saved_input == "e5m6" and arrived is None:
        saved = e5m6.encode(_filled(x.reshape(len(x), -1), 1, e5m6.PACKET))
    # dtypes and shapes travel as arrays that nobody reads: residuals are arrays.
    like, like_weight = jnp.zeros((0, *x.shape[1:]), x.dtype), jnp.zeros((), weight.dtype)
    return y, (saved, like, kept, like_weight, group_sizes)


def _backward(recipe, activation, residuals, dy):
    saved, like, *_, group_sizes = residuals
    outputs = dy.shape[1]
    d_input, d_weight = _gradients(
        recipe, activation, residuals, _quantize_gradient(dy, recipe), outputs
    )
    d_input = d_input[: dy.shape[0]]
    if activation is not None:
        d_input = jax.vjp(activation, _unpacked(saved, like, like.dtype))[1](d_input)[0]
    return d_input, d_weight, _no_gradient(group_sizes), None, None


def _gradients(
    recipe, activation, residuals, d_output: tuple[BlockScaled, BlockScaled], outputs: int
):
    """Those of activation(input) and of the weight, for the output's, quantised for both."""
    saved, like, weight, like_weight, group_sizes = residuals
    by_token, by_channel = d_output
    inputs = like.shape[-1]
    # Dgrad
    if not isinstance(weight, BlockScaled):
        weight = _quantize(weight, recipe.weight).mT
    d_input = _multiply(by_token, weight, group_sizes)
    d_input = d_input[:, :inputs].astype(like.dtype)
    # Wgrad
    kept = _quantize_saved(saved, like, activation, recipe)
    if group_sizes is None:
        d_weight = scaled_matmul(by_channel, kept)
    else:
        d_weight = grouped_wgrad(by_channel, kept, group_sizes)
    return d_input, d_weight[..., :outputs, :inputs].astype(like_weight.dtype)


def _no_gradient(group_sizes: Any) -> Any:
    return None if group_sizes is None else np.zeros(group_sizes.shape, jax.dtypes.float0)


_linear.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _feed_forward(x, gate_up, down, group_sizes, recipes, arrived=None, made=(None, None)):
    return _feed_forward_fwd(x, gate_up, down, group_sizes, recipes, arrived, made)[0]


def _feed_forward_fwd(x, gate_up, down, group_sizes, recipes, arrived=None, made=(None, None)):
    hidden, wide = _forward(x, gate_up, group_sizes, recipes[0], None, arrived, made[0])
    hidden = hidden.reshape(len(hidden), 2, -1)
    y, narrow = _forward(hidden, down, group_sizes, recipes[1], swiglu, made=made[1])
    return y, (wide, narrow)


def _feed_forward_bwd(recipes, residuals, dy):
    wide, narrow = residuals
    kept, like, *_, group_sizes = narrow
    d_activated, d_down = _gradients(
        recipes[1], swiglu, narrow, _quantize_gradient(dy, recipes[1]), dy.shape[1]
    )
    # Rows that filled dy up to whole tiles are zeros, and fill the gradient of SwiGLU as well.
    kept = _filled(kept, _TILE, 1)
    d_hidden = swiglu_backward_quantize(
        kept, _filled(d_activated, _TILE, 1), recipes[0].dgrad.scale_format
    )
    width = 2 * like.shape[-1]
    dx, d_gate_up = _gradients(recipes[0], None, wide, d_hidden, width)
    return dx[: dy.shape[0]], d_gate_up, d_down, _no_gradient(group_sizes), None, None


_feed_forward.defvjp(_feed_forward_fwd, _feed_forward_bwd)


def _quantize_input(x, activation: Activation | None, form: TileFormat) -> BlockScaled:
    """What Fprop reads: activation(x) quantised."""
    if form.tile == PER_TOKEN:
        if activation is None:
            return quantize_rows(_filled(x, 1, _TILE), form.scale_format)
        if _halves_are_whole(x, activation):
            return swiglu_quantize(x.reshape(len(x), -1), form.scale_format)
    return _quantize(x if activation is None else activation(x), form)


def _keep(x, form: TileFormat) -> BlockScaled:
    """An activation's input [T, 2, F], kept in FP8 from the forward to the backward pass."""
    if form.tile == PER_TOKEN and x.shape[-1] % _TILE == 0:
        return quantize_rows(x.reshape(len(x), -1), form.scale_format)
    return quantize(x, *astuple(form))


def _unpacked(saved: Any, like: Array, dtype: Any) -> Any:
    """The product's or activation's input, in its own shape, of what was kept of it."""
    if isinstance(saved, E5M6):
        width = math.prod(like.shape[1:])
        return e5m6.decode(saved, dtype)[:, :width].reshape(-1, *like.shape[1:])
    if not isinstance(saved, BlockScaled):
        return saved
    x = dequantize(saved, dtype)
    if x.ndim < like.ndim:
        return x.reshape(len(x), *like.shape[1:])
    return x[..., : like.shape[-1]]


def _quantize_gradient(dy, recipe: LinearRecipe) -> tuple[BlockScaled, BlockScaled]:
    """The output's gradient for Dgrad, quantised along channels, and for Wgrad, along tokens."""
    dgrad, wgrad = recipe.dgrad, recipe.wgrad
    one_read = (dgrad.tile, wgrad.tile) == (PER_TOKEN, PER_CHANNEL)
    if one_read and dgrad.scale_format == wgrad.scale_format:
        return quantize_both_ways(_filled(dy, _TILE, _TILE), dgrad.scale_format)
    by_channel = split_tiles(_quantize(dy, dgrad), PER_TOKEN)
    return by_channel, _quantize(dy, wgrad, columns=8).mT


def _quantize_saved(
    saved: Any, like: Array, activation: Activation | None, recipe: LinearRecipe
) -> BlockScaled:
    """The product's input for Wgrad, transposed and quantised along tokens."""
    form = recipe.wgrad
    if isinstance(saved, E5M6):  # bfloat16 and float32 hold its numbers exactly
        saved = _unpacked(saved, like, like.dtype)
    if form.tile == PER_CHANNEL:
        kept = isinstance(saved, BlockScaled)
        if activation is None and not (kept and saved.tile != PER_TOKEN):
            return quantize_transposed(_filled(saved, _TILE, _TILE), form.scale_format)
        # A block-scaled SwiGLU input is taken for bfloat16 numbers.
        in_bf16 = like.dtype == jnp.bfloat16 and _halves_are_whole(like, activation)
        if kept and saved.ndim == 2 and in_bf16:
            saved = _filled(saved, _TILE, 1)
            return swiglu_quantize(saved, form.scale_format, transposed=True)
    # f32 is the exact form for quantising again; an activation is computed in the model's dtype.
    x = _unpacked(saved, like, jnp.float32 if activation is None else like.dtype)
    return _quantize(x if activation is None else activation(x), form, columns=8).mT


def _halves_are_whole(x, activation: Activation | None) -> bool:
    """Whether gate and up, laid side by side, are whole tiles that the fused SwiGLU can read."""
    return activation is swiglu and x.shape[-1] % _TILE == 0


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
    return quantize(_filled(x, rows, columns), form.tile, form.scale_format)


def _filled(x: Any, rows: int, columns: int) -> Any:
    """x with zeros up to multiples in its last two dims; a BlockScaled's rows may be filled."""
    if isinstance(x, BlockScaled):
        values, scales = _filled(x.values, rows, columns), _filled(x.scales, rows, 1)
        return BlockScaled(values, scales, x.tile)
    fill = -x.shape[-2] % rows, -x.shape[-1] % columns
    if not any(fill):
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra) for extra in fill])
