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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend
from dsv3_jax.kernels.beside import beside
from dsv3_jax.kernels.fused.api import swiglu_backward_quantize
from dsv3_jax.kernels.gemm.api import scaled_matmul, scaled_wgrad
from dsv3_jax.kernels.grouped_gemm.api import grouped_matmul, grouped_wgrad, grouped_wgrad_into
from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.model.activation import swiglu
from dsv3_jax.model.fp8_operands import (
    TILE,
    Activation,
    filled,
    keep_activation_input,
    quantize_gradient,
    quantize_input,
    quantize_saved,
    quantize_weight,
    unpacked,
)
from dsv3_jax.model.remat import named_product
from dsv3_jax.parallel.collectives import vary_together
from dsv3_jax.parallel.phases import mark_of
from dsv3_jax.quantization import e5m6
from dsv3_jax.quantization.block_scaled import (
    PER_CHANNEL,
    PER_TOKEN,
    BlockScaled,
    StepWeight,
    StraightThrough,
)
from dsv3_jax.quantization.recipe import LinearRecipe, TileFormat


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
    x_T, weight = vary_together(_flat(x, batch), weight)
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
    x_T, gate_up, down = vary_together(_flat(x, batch), gate_up, down)
    x_T, arrived = _carrier_and_numbers(x_T, None)
    (gate_up, wide), (down, narrow) = _matrix(gate_up, -1), _matrix(down, -1)
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
) -> Any:
    """`fp8_feed_forward` of each row by its group's weights, as `fp8_grouped_linear`.

    marked: a pair of that and of `phases.mark_of` what gate_up gives.
    """
    x, arrived = _carrier_and_numbers(rows, None)
    experts = len(gate_up)
    (gate_up, wide), (down, narrow) = _matrix(gate_up, experts, -1), _matrix(down, experts, -1)
    operands = x, gate_up, down, group_sizes
    return _feed_forward(*operands, recipes, None, marked, arrived, (wide, narrow))


def _flat(x: Any, batch: tuple[int, ...]) -> Any:
    """x, or each array of it, with its leading dims made one of tokens."""
    return jax.tree.map(lambda a: a.reshape(math.prod(batch), *a.shape[len(batch) :]), x)


def _carrier_and_numbers(x: Any, activation: Activation | None) -> tuple[Array, BlockScaled | None]:
    """What carries the gradient of x, and the numbers of x where they come quantised."""
    if not isinstance(x, StraightThrough):
        return x, None
    assert activation is None and x.numbers.tile == PER_TOKEN
    return x.carrier, x.numbers


# A weight's numbers, and the same transposed; or a copy of it and None. Where its gradient is left.
Made = tuple[BlockScaled | Array, BlockScaled | None, GradientSum | None] | None


def _matrix(weight: Any, *rows: int) -> tuple[Array, Made]:
    """What carries the gradient of the weight as [*rows, K], and its numbers if they are made."""
    if not isinstance(weight, StepWeight):
        return weight.reshape(*rows, weight.shape[-1]), None
    master, numbers = weight.master.reshape(*rows, weight.shape[-1]), weight.numbers
    if not isinstance(numbers, BlockScaled):  # a copy, which is quantised where it is multiplied
        numbers = numbers.reshape(master.shape)
    return master, (numbers, weight.transposed, weight.gradient)


def _input_dims(activation: Activation | None) -> int:
    """Trailing dims of one token's input: SwiGLU takes [2, F], the plain operation [K]."""
    return 1 if activation is None else 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(x, weight, group_sizes, recipe, activation, arrived=None, made=None):
    return _forward(x, weight, group_sizes, recipe, activation, arrived, made)[0]


def _forward(x, weight, group_sizes, recipe, activation, arrived=None, made: Made = None):
    """`arrived` are the numbers of x if they were quantised before; x then has their gradient."""
    used = _used(group_sizes)
    if arrived is None:
        quantized = quantize_input(x, activation, recipe.input, used)
    else:
        values = jnp.pad(arrived.values, [(0, 0), (0, -x.shape[1] % TILE)])
        quantized = BlockScaled(values, arrived.scales, arrived.tile)
    numbers, transposed, total = made or (weight, None, None)
    kept = (numbers, None) if transposed is None else (None, transposed)
    if not isinstance(numbers, BlockScaled):
        numbers, _ = quantize_weight(numbers, recipe.weight)
    y = _multiply(quantized, numbers, group_sizes)
    y = named_product(y[:, : weight.shape[-2]].astype(x.dtype), weight.shape)
    saved = x if arrived is None else quantized
    if recipe.saved_input == "quantized":
        saved = quantized if activation is None else keep_activation_input(x, recipe.input, used)
    elif recipe.saved_input == "e5m6" and arrived is None:
        saved = e5m6.encode(filled(x.reshape(len(x), -1), 1, e5m6.PACKET))
    # dtypes and shapes travel as arrays that nobody reads: residuals are arrays.
    like, like_weight = jnp.zeros((0, *x.shape[1:]), x.dtype), jnp.zeros((), weight.dtype)
    return y, (saved, like, kept, like_weight, group_sizes, total)


def _backward(recipe, activation, residuals, dy):
    saved, like, *_, group_sizes, _ = residuals
    d_output = quantize_gradient(dy, recipe, _used(group_sizes))
    d_input, d_weight = _gradients(recipe, activation, residuals, d_output, dy.shape[1])
    d_input = d_input[: dy.shape[0]]
    if activation is not None:
        d_input = jax.vjp(activation, unpacked(saved, like, like.dtype))[1](d_input)[0]
    return d_input, d_weight, _no_gradient(group_sizes), None, None


def _gradients(
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
    kept = quantize_saved(saved, like, activation, recipe, _used(group_sizes))
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


def _used(group_sizes: Any) -> Array | None:
    """The rows that belong to groups, of those that there is room for; None: all."""
    return None if group_sizes is None else group_sizes.sum(dtype=jnp.int32)


def _no_gradient(group_sizes: Any) -> Any:
    return None if group_sizes is None else np.zeros(group_sizes.shape, jax.dtypes.float0)


backend.define_vjp(_linear, _forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _feed_forward(
    x, gate_up, down, group_sizes, recipes, leaving, marked, arrived=None, made=(None, None)
):
    def forward(*operands):
        return _both_products(recipes, marked, *operands)[0]

    return beside(forward, leaving)(x, gate_up, down, group_sizes, arrived, made)


def _feed_forward_fwd(
    x, gate_up, down, group_sizes, recipes, leaving, marked, arrived=None, made=None
):
    forward = functools.partial(_both_products, recipes, marked)
    return beside(forward, leaving)(x, gate_up, down, group_sizes, arrived, made or (None, None))


def _both_products(recipes, marked, x, gate_up, down, group_sizes, arrived, made):
    hidden, wide = _forward(x, gate_up, group_sizes, recipes[0], None, arrived, made[0])
    mark = mark_of(hidden) if marked else None
    hidden = hidden.reshape(len(hidden), 2, -1)
    y, narrow = _forward(hidden, down, group_sizes, recipes[1], swiglu, made=made[1])
    return (y, mark) if marked else y, (wide, narrow)


def _feed_forward_bwd(recipes, leaving, marked, residuals, dy):
    del leaving  # of the forward pass alone
    dy = dy[0] if marked else dy
    wide, narrow = residuals
    kept, like, *_, group_sizes, _ = narrow
    used = _used(group_sizes)
    d_output = quantize_gradient(dy, recipes[1], used)
    d_activated, d_down = _gradients(recipes[1], swiglu, narrow, d_output, dy.shape[1])
    # Rows that filled dy up to whole tiles are zeros, and fill the gradient of SwiGLU as well.
    kept = filled(kept, TILE, 1)
    d_hidden = swiglu_backward_quantize(
        kept, filled(d_activated, TILE, 1), recipes[0].dgrad.scale_format, used=used
    )
    width = 2 * like.shape[-1]
    dx, d_gate_up = _gradients(recipes[0], None, wide, d_hidden, width)
    return dx[: dy.shape[0]], d_gate_up, d_down, _no_gradient(group_sizes), None, None


backend.define_vjp(_feed_forward, _feed_forward_fwd, _feed_forward_bwd)


def _multiply(a: BlockScaled, b: BlockScaled, group_sizes):
    if group_sizes is None:
        return scaled_matmul(a, b)
    return grouped_matmul(a, b, group_sizes)
