"""What the products of one optimizer step read of the weights, made once before the first of them.

The master weights do not change within a step, but every layer multiplies by them in the forward
pass, in its recomputation and in the backward pass, of every micro-batch. What is made here lives
that long: FP8 weights in both orientations (2 bytes a number), and copies in the model's dtype.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config.weights import Weight, find_weight
from dsv3_jax.kernels.fused.api import quantize_blocks
from dsv3_jax.quantization.block_scaled import PER_BLOCK, StepWeight
from dsv3_jax.quantization.recipe import LinearRecipe, Recipe

# Looked up in; multiplied in f32.
NOT_COPIED = ("embedding", "router")


def made_for_step(params: Any, recipe: Recipe, dtype: Any) -> Any:
    """(numbers, transposed) of a StepWeight for each parameter that is to be one; None elsewhere.

    Those that the recipe quantises in tiles of 128 x 128; other matrices are copied to `dtype`,
    where they are not in it.
    """

    def make(path, leaf):
        weight = _weight(path)
        if weight is None or not weight.is_matrix or weight.part in NOT_COPIED:
            return None
        of_weight = recipe_of(weight, recipe)
        if of_weight is None:
            return None if leaf.dtype == dtype else (leaf.astype(dtype), None)
        if of_weight.weight.tile != PER_BLOCK:
            return None
        rows, columns = map(len, weight.matrix)
        rows += weight.lead[-1:] == ("2",)  # gate's rows, and up's
        lead = leaf.ndim - rows - columns
        matrix = leaf.reshape(*leaf.shape[:lead], math.prod(leaf.shape[lead : lead + rows]), -1)
        fill = [(0, -size % 128) for size in matrix.shape[-2:]]
        if fill != [(0, 0), (0, 0)]:
            matrix = jnp.pad(matrix, [(0, 0)] * lead + fill)
        return quantize_blocks(matrix, of_weight.weight.scale_format)

    return jax.tree_util.tree_map_with_path(make, params)


def with_made(params: Any, made: Any) -> Any:
    """The parameters as StepWeights, where `made_for_step` made something of them."""

    def join(master, numbers):
        return master if numbers is None else StepWeight(master, *numbers)

    return jax.tree.map(join, params, made)


def recipe_of(weight: Weight, recipe: Recipe) -> LinearRecipe | None:
    """How a weight is multiplied; None in the model's dtype, or not at all."""
    if not weight.is_matrix:
        return None
    if weight.part == "attention" and weight.name != "o_proj":
        return recipe.attention
    name = f"experts_{weight.name}" if weight.of_expert else weight.name
    return getattr(recipe, name, None)


def _weight(path: tuple[Any, ...]) -> Weight | None:
    return find_weight([entry.key for entry in path])
