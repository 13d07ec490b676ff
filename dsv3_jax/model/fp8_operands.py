"""The operands of a linear operation's three products, quantised as its `LinearRecipe` says.

The input for Fprop, the output's gradient for Dgrad and Wgrad, and for Wgrad what was kept of the
input. Fused kernels where the recipe is one that they have, `quantize` in plain JAX elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.kernels.fused.api import (
    gather_quantize_both_ways,
    quantize_blocks,
    quantize_both_ways,
    quantize_rows,
    quantize_rows_in_two_formats,
    quantize_transposed,
    swiglu_quantize,
)
from dsv3_jax.model.activation import swiglu
from dsv3_jax.parallel.grouping import Groups, sum_rows, weights_of_rows
from dsv3_jax.quantization import e5m6
from dsv3_jax.quantization.block_scaled import (
    PER_BLOCK,
    PER_CHANNEL,
    PER_TOKEN,
    BlockScaled,
    dequantize,
    quantize,
    split_tiles,
)
from dsv3_jax.quantization.e5m6 import E5M6
from dsv3_jax.quantization.recipe import LinearRecipe, TileFormat

Activation = Callable[[Array], Array]

# The contracted dim must fill whole tiles of 128, and a kernel's N whole vectors of 8. Zeros do.
TILE = 128


def quantize_input(
    x, activation: Activation | None, form: TileFormat, used: Array | None = None
) -> BlockScaled:
    """What Fprop reads: activation(x) quantised, of the first `used` rows at least."""
    if form.tile == PER_TOKEN:
        if activation is None:
            return quantize_rows(filled(x, 1, TILE), form.scale_format, used=used)
        if _halves_are_whole(x, activation):
            return swiglu_quantize(x.reshape(len(x), -1), form.scale_format, used=used)
    return quantize_filled(x if activation is None else activation(x), form)


def quantize_input_and_pack(
    x, activation: Activation | None, form: TileFormat, used: Array | None = None
) -> tuple[BlockScaled, E5M6]:
    """What Fprop reads, and x [T, ...] in E5M6; from one read where x itself is multiplied."""
    flat = x.reshape(len(x), -1)
    if activation is None and form.tile == PER_TOKEN and flat.shape[-1] % TILE == 0:
        return quantize_rows_in_two_formats(flat, form.scale_format)
    packed = e5m6.encode(filled(flat, 1, e5m6.PACKET))
    return quantize_input(x, activation, form, used), packed


def keep_activation_input(x, form: TileFormat, used: Array | None = None) -> BlockScaled:
    """An activation's input [T, 2, F], kept in FP8 from the forward to the backward pass."""
    if form.tile == PER_TOKEN and x.shape[-1] % TILE == 0:
        return quantize_rows(x.reshape(len(x), -1), form.scale_format, used=used)
    return quantize(x, *astuple(form))


def unpacked(saved: Any, like: Array, dtype: Any) -> Any:
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


def quantize_gradient(
    dy, recipe: LinearRecipe, used: Array | None = None
) -> tuple[BlockScaled, BlockScaled]:
    """The output's gradient for Dgrad, quantised along channels, and for Wgrad, along tokens."""
    dgrad, wgrad = recipe.dgrad, recipe.wgrad
    if _is_one_read(recipe):
        return quantize_both_ways(filled(dy, TILE, TILE), dgrad.scale_format, used=used)
    by_channel = split_tiles(quantize_filled(dy, dgrad), PER_TOKEN)
    return by_channel, quantize_filled(dy, wgrad, columns=8).mT


def quantize_gradient_of_rows(
    d_sums: Array,
    rows: Array,
    summed: tuple[Array, Groups],
    recipe: LinearRecipe,
    used: Array | None,
) -> tuple[BlockScaled, BlockScaled]:
    """`quantize_gradient` of the rows that `sum_rows(rows, *summed)` adds up, for that of sums."""
    weights, groups = summed
    if _is_one_read(recipe):
        of_rows = groups.token_M, weights_of_rows(weights.astype(jnp.float32), groups)
        form = recipe.dgrad.scale_format
        return gather_quantize_both_ways(d_sums, *of_rows, form, used=used)
    (d_rows,) = jax.vjp(lambda rows: sum_rows(rows, *summed), rows)[1](d_sums)
    return quantize_gradient(d_rows, recipe, used)


def _is_one_read(recipe: LinearRecipe) -> bool:
    """Whether Dgrad and Wgrad take one array in the two directions of one kernel."""
    dgrad, wgrad = recipe.dgrad, recipe.wgrad
    one_read = (dgrad.tile, wgrad.tile) == (PER_TOKEN, PER_CHANNEL)
    return one_read and dgrad.scale_format == wgrad.scale_format


def quantize_saved(
    saved: Any,
    like: Array,
    activation: Activation | None,
    recipe: LinearRecipe,
    used: Array | None = None,
) -> BlockScaled:
    """The product's input for Wgrad, transposed and quantised along tokens."""
    form = recipe.wgrad
    if isinstance(saved, E5M6):
        whole = len(saved.words) % TILE == like.shape[-1] % TILE == 0
        if whole and form.tile == PER_CHANNEL and activation is None:
            return quantize_transposed(saved, form.scale_format)
        saved = unpacked(saved, like, like.dtype)  # which holds its numbers exactly
    if form.tile == PER_CHANNEL:
        kept = isinstance(saved, BlockScaled)
        if activation is None and not (kept and saved.tile != PER_TOKEN):
            return quantize_transposed(filled(saved, TILE, TILE), form.scale_format, used=used)
        # A block-scaled SwiGLU input is taken for bfloat16 numbers.
        in_bf16 = like.dtype == jnp.bfloat16 and _halves_are_whole(like, activation)
        if kept and saved.ndim == 2 and in_bf16:
            saved = filled(saved, TILE, 1)
            return swiglu_quantize(saved, form.scale_format, transposed=True, used=used)
    # f32 is the exact form for quantising again; an activation is computed in the model's dtype.
    x = unpacked(saved, like, jnp.float32 if activation is None else like.dtype)
    return quantize_filled(x if activation is None else activation(x), form, columns=8).mT


def _halves_are_whole(x, activation: Activation | None) -> bool:
    """Whether gate and up, laid side by side, are whole tiles that the fused SwiGLU can read."""
    return activation is swiglu and x.shape[-1] % TILE == 0


def quantize_weight(weight: Any, form: TileFormat) -> tuple[BlockScaled, BlockScaled]:
    """What Fprop reads of a weight, and what Dgrad does, from one read of it."""
    if form.tile == PER_BLOCK:
        return quantize_blocks(filled(weight, TILE, TILE), form.scale_format)
    numbers = quantize_filled(weight, form)
    return numbers, numbers.mT


def quantize_filled(x, form: TileFormat, columns: int = TILE) -> BlockScaled:
    """x quantised, after zeros have filled its last two dims up to what kernels read.

    Columns are what the product contracts, or its N. Rows need whole tiles where the tile spans
    rows: those are contracted once transposed, except a 1x128 operand's, which are free.
    """
    rows = 1 if form.tile[0] == 1 else TILE
    return quantize(filled(x, rows, columns), form.tile, form.scale_format)


def filled(x: Any, rows: int, columns: int) -> Any:
    """x with zeros up to multiples in its last two dims; a BlockScaled's rows may be filled."""
    if isinstance(x, BlockScaled):
        values, scales = filled(x.values, rows, columns), filled(x.scales, rows, 1)
        return BlockScaled(values, scales, x.tile)
    fill = -x.shape[-2] % rows, -x.shape[-1] % columns
    if not any(fill):
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra) for extra in fill])
