"""What the products of one optimizer step read of the weights, made once before the first of them.

The master weights do not change within a step, but every layer multiplies by them in the forward
pass, in its recomputation and in the backward pass, of every micro-batch. What is made here lives
that long: FP8 weights in both orientations (2 bytes a number), and copies in the model's dtype.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.config.weights import Weight, find_weight
from dsv3_jax.kernels.fused.api import quantize_blocks
from dsv3_jax.kernels.sums import GradientSum, new_sum
from dsv3_jax.model.quantized_slices import as_matrices, matrix_dims_of, quantize_slices
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.quantization.block_scaled import PER_BLOCK, BlockScaled, StepWeight
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
        matrices = as_matrices(leaf, matrix_dims_of(weight, leaf.ndim))
        return quantize_blocks(matrices, of_weight.weight.scale_format)

    return jax.tree_util.tree_map_with_path(make, params)


def made_of_slices(params: Any, stored: Any, recipe: Recipe, dtype: Any, layout: Layout) -> Any:
    """`made_for_step` of weights in slices, made and left in slices: what is gathered.

    stored: the NamedSharding of each. FP8 values are shaped as the weight, with the scales of whole
    matrices. Where `tensor` cuts matrices, so that each device has tiles of its own, a weight is
    copied to `dtype` instead.
    """

    def make(path, leaf, stored):
        weight = _weight(path)
        if weight is None or not weight.is_matrix or weight.part == "router":
            return None
        of_weight = recipe_of(weight, recipe)
        in_parts = layout.mesh.shape["tensor"] > 1
        if of_weight is None or of_weight.weight.tile != PER_BLOCK or in_parts:
            return layout.place(leaf.astype(dtype), stored.spec), None
        dims = matrix_dims_of(weight, leaf.ndim)
        scale_format = of_weight.weight.scale_format
        return quantize_slices(leaf, dims, stored.spec, scale_format, layout), None

    return jax.tree_util.tree_map_with_path(make, params, stored)


def new_sums(params: Any, made: Any, adds: bool, squares: bool = False) -> Any:
    """A GradientSum for each parameter of a layer that something was made of; None elsewhere.

    They belong to the program that is being traced. Without `adds` a gradient takes the place of
    what is there: a loss then may run each layer only once. `squares` as in `new_sum`.

    Where kernels leave gradients, all matrices of one shape, of whatever layers, lie in one array:
    each array of another length would be a kernel of its own, which takes a second to compile.
    """
    shapes: dict[Any, list[Any]] = {}

    def collect(path, master, numbers):
        weight = _weight(path)
        if numbers is None or weight is None or weight.where == "model":
            return
        layers, *matrices = _matrices(weight, master.shape)
        by_kernel = weight.of_expert or isinstance(numbers[0], BlockScaled)
        key = (*matrices, None if by_kernel else path)
        shapes.setdefault(key, []).append((path, layers))

    jax.tree_util.tree_map_with_path(collect, params, made)
    places: dict[Any, GradientSum] = {}
    for (*matrices, _), stacks in shapes.items():
        together = new_sum((sum(n for _, n in stacks), *matrices), adds, squares)
        first = 0
        for path, layers in stacks:
            places[path] = replace(together, number=np.int32(first))
            first += layers
    return jax.tree_util.tree_map_with_path(lambda path, _: places.get(path), params)


def with_made(params: Any, made: Any, sums: Any = None) -> Any:
    """The parameters as StepWeights, where `made_for_step` made something of them.

    Where there are sums, gradients are left there.
    """

    def join(master, numbers, total):
        return master if numbers is None else StepWeight(master, *numbers, gradient=total)

    sums = jax.tree.map(lambda _: None, params) if sums is None else sums
    return jax.tree.map(join, params, made, sums)


class StepWeights(NamedTuple):
    """The weights of one step: what its products read, and where they leave gradients.

    Fields:
        params: the masters.
        made: `made_for_step` of them.
        sums: `new_sums` of them, or None for each: JAX then returns all gradients.
    """

    params: Any
    made: Any
    sums: Any

    @property
    def trained(self) -> Any:
        """The masters that JAX differentiates with respect to; None for those that have a sum."""
        return self.of_trained(self.params)

    def of_trained(self, tree: Any) -> Any:
        """A tree like the parameters' without what belongs to those that have a sum."""
        return jax.tree.map(lambda x, total: x if total is None else None, tree, self.sums)

    def summing(self, adds: bool, squares: bool = False) -> "StepWeights":
        """The same with sums, in the program that is being traced; see `new_sums`."""
        return self._replace(sums=new_sums(self.params, self.made, adds, squares))

    def held(self, trained: Any) -> Any:
        """The parameters as the model reads them, with `trained` for its part of the masters."""
        masters = self._filled(trained, lambda _, master: master)
        return with_made(masters, self.made, self.sums)

    def gradients(self, of_trained: Any, scale: float = 1.0) -> Any:
        """All gradients: those of `trained`, and the sums times scale, which are read only once."""

        arrays = _Frozen()

        def read(total, master):
            return arrays.of(total, total.total, master).reshape(master.shape) * scale

        return self._filled(of_trained, read)

    def squares(self, scale: float = 1.0) -> Any:
        """The sums of squares that products left of what `gradients` returns for this scale; None
        for other gradients. They are read only once, too."""
        arrays = _Frozen()

        def read(total, master):
            if total.squares is None:
                return None
            return arrays.of(total, total.squares, master).sum() * scale**2

        return self._filled(jax.tree.map(lambda _: None, self.params), read)

    def _filled(self, of_trained, leave: Callable[[GradientSum, Any], Any]):
        def fill(total, master, own):
            return own if total is None else leave(total, master)

        def is_place(x):
            return x is None or isinstance(x, GradientSum)

        return jax.tree.map(fill, self.sums, self.params, of_trained, is_leaf=is_place)


class _Frozen:
    """Refs that are read, each of them once, whatever number of stacks lie in it."""

    def __init__(self):
        self._arrays: dict[int, Any] = {}

    def of(self, place: GradientSum, ref: Any, master: Any) -> Any:
        """What a Ref of the place has for the layers of its master's stack."""
        if id(ref) not in self._arrays:
            self._arrays[id(ref)] = jax.freeze(ref)
        first, layers = int(place.number), master.size // math.prod(place.total.shape[1:])
        return self._arrays[id(ref)][first : first + layers]


def as_they_are(params: Any) -> StepWeights:
    """The parameters with nothing made of them: JAX returns all of their gradients."""
    nothing = jax.tree.map(lambda _: None, params)
    return StepWeights(params, nothing, nothing)


def _matrices(weight: Weight, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(layers, experts, N, K) of a weight's shape: its stack of matrices, gate's over up's."""
    lead, rows, _ = matrix_dims_of(weight, len(shape))
    experts = shape[lead - 1] if weight.of_expert else 1
    layers = math.prod(shape[: lead - weight.of_expert])
    inner = shape[lead : lead + rows]
    return layers, experts, math.prod(inner), math.prod(shape[lead + rows :])


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
