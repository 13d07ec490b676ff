"""Inputs of FP8 products, quantised where they are made: by RMSNorm and by gathering tokens.

The normalised or gathered numbers are never an array in the model's dtype. What comes out is
`StraightThrough`: the FP8 numbers, and a carrier that the gradient comes back through. On a mesh
RMSNorm is each device's own.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.kernels.fused.api import permute_quantize, rms_norm_quantize
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.parallel.collectives import vary
from dsv3_jax.parallel.grouping import Groups, gather_rows
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout
from dsv3_jax.quantization.block_scaled import (
    PER_TOKEN,
    BlockScaled,
    ScaleFormat,
    StraightThrough,
)
from dsv3_jax.quantization.recipe import LinearRecipe


def norm_for(
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    eps: float,
    recipe: LinearRecipe | None,
    layout: Layout = ONE_DEVICE,
) -> Float[Array, "*B D"] | StraightThrough:
    """`rms_norm` for products by this recipe alone: its numbers as they read them, if they do.

    On a mesh x lies as the residual, and so does the result.
    """
    if not _can_arrive_quantized(x, recipe):
        return rms_norm(x, weight, eps)
    assert recipe is not None
    of_device: Any = partial(_quantized_norm, eps=eps, scale_format=recipe.input.scale_format)
    rows = layout.spec("batch", "residual")
    return layout.shard_map(of_device, (rows, layout.spec()), rows)(x, weight)


def gather_for(
    x: Float[Array, "T D"] | StraightThrough, groups: Groups, recipe: LinearRecipe | None
) -> Float[Array, "M D"] | StraightThrough:
    """`gather_rows` for products by this recipe, quantised before the numbers are copied."""
    if isinstance(x, StraightThrough) or not groups.complete:
        return gather_rows(x, groups)
    if not _can_arrive_quantized(x, recipe):
        return gather_rows(x, groups)
    assert recipe is not None
    return _gathered(x, groups, recipe.input.scale_format)


def _can_arrive_quantized(x: Array, recipe: LinearRecipe | None) -> bool:
    """Whether the product reads 1x128 tiles, keeps nothing else, and the kernels have this form."""
    if recipe is None or recipe.input.tile != PER_TOKEN or recipe.saved_input != "quantized":
        return False
    return x.dtype == jnp.bfloat16 and x.shape[-1] % 128 == 0


def _quantized_norm(x, weight, *, eps: float, scale_format: ScaleFormat) -> StraightThrough:
    # The weight's gradient is added up over the devices that x differs between.
    weight = vary(weight, tuple(jax.typeof(x).manual_axis_type.varying))
    return _norm(x, weight, eps, scale_format)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _norm(x, weight, eps, scale_format):
    flat = rms_norm_quantize(x.reshape(-1, x.shape[-1]), weight, eps, scale_format)
    values, scales = (a.reshape(*x.shape[:-1], -1) for a in (flat.values, flat.scales))
    return StraightThrough(BlockScaled(values, scales, flat.tile), jnp.zeros_like(x))


def _norm_backward(eps, scale_format, operands, d_normed):
    return jax.vjp(lambda x, weight: rms_norm(x, weight, eps), *operands)[1](d_normed.carrier)


_norm.defvjp(lambda x, weight, *form: (_norm(x, weight, *form), (x, weight)), _norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gathered(x, groups, scale_format):
    numbers = permute_quantize(x, groups.slot_TK, groups.token_M, scale_format)
    return StraightThrough(numbers, jnp.zeros_like(x, shape=numbers.shape))


def _gathered_forward(x, groups, scale_format):
    # The dtype and shape of x travel as an array that nobody reads.
    return _gathered(x, groups, scale_format), (jnp.zeros_like(x), groups)


def _gathered_backward(scale_format, residuals, d_rows):
    like, groups = residuals
    return jax.vjp(gather_rows, like, groups)[1](d_rows.carrier)


_gathered.defvjp(_gathered_forward, _gathered_backward)
