"""The linear map of every projection, alone and in SwiGLU feed-forwards, dense and by expert.

In which format it multiplies is said by the recipe and by the weight (model/projection.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.grouped_gemm.api import KERNEL_ALIGNMENT, row_alignment
from dsv3_jax.model.activation import swiglu
from dsv3_jax.model.fp8_feed_forward import (
    can_fuse,
    fp8_feed_forward,
    fp8_grouped_feed_forward,
)
from dsv3_jax.model.projection import WHOLE, ProductLayout, Projection, add_up, as_projection
from dsv3_jax.parallel.grouping import Groups, sum_rows
from dsv3_jax.parallel.phases import mark_of
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout
from dsv3_jax.quantization.block_scaled import StepWeight, StraightThrough
from dsv3_jax.quantization.recipe import LinearRecipe


def linear(
    x: Float[Array, "*B K"] | StraightThrough,
    weight: Float[Array, "*N K"] | Projection | StepWeight,
    recipe: LinearRecipe | None = None,
    activation: Callable[[Array], Array] | None = None,
    where: ProductLayout = WHOLE,
) -> Float[Array, "..."]:
    """x times the transposed weight, in x's dtype: [*B, K] by [*N, K] gives [*B, *N].

    The weight keeps its leading dims, so a [N, H, D] projection yields heads without a reshape.
    A recipe says how the products are quantised; without one they are not. An activation is applied
    to x first (`fp8_linear` saves x rather than what it makes of it). A weight that is no array
    multiplies in its own way (model/projection.py): an FP8Weight in FP8, with or without a recipe.
    On a mesh a product in FP8 is each device's own, as `where` says; a contracted dim that is cut
    leaves y laid out as the residual. An x that is quantised already needs a recipe, or an
    FP8Weight.
    """
    return as_projection(weight).multiply(x, recipe, activation, where)


Recipes = tuple[LinearRecipe | None, LinearRecipe | None]  # of gate and up, and of down


def feed_forward(
    x: Float[Array, "*B D"] | StraightThrough,
    gate_up: Float[Array, "2 F D"] | Projection | StepWeight,
    down: Float[Array, "D F"] | Projection | StepWeight,
    recipes: Recipes,
    layout: Layout = ONE_DEVICE,
    leaving: int | None = None,
) -> Float[Array, "*B D"]:
    """down(swiglu(gate_up(x))), with F cut over `tensor`.

    x lies as ("batch", "seq"), and the result as the residual. leaving: where this is one FP8
    operation, it runs beside others on a GPU, to which it leaves so many multiprocessors.
    """
    rows, inner = ("batch", "seq"), (None, "mlp", None)
    if not _is_one_operation(x, gate_up, down, recipes, layout):
        widen = ProductLayout(layout, rows, inner)
        hidden = linear(x, gate_up, recipes[0], where=widen)
        hidden = layout.constrain(hidden, *rows, None, "mlp")
        narrow = ProductLayout(layout, rows, (None, "mlp"))
        return linear(hidden, down, recipes[1], swiglu, narrow)
    both: Any = fp8_feed_forward
    multiply = partial(both, recipes=recipes, leaving=leaving)
    inputs = layout.spec(*rows), layout.spec(*inner), layout.spec(None, "mlp")
    return layout.shard_map(
        lambda *operands: add_up(multiply(*operands), layout, "mlp"),
        inputs,
        layout.spec("batch", "residual"),
    )(x, gate_up, down)


def grouped_feed_forward(
    rows: Float[Array, "M D"] | StraightThrough,
    gate_up: Float[Array, "E 2 F D"] | Projection | StepWeight,
    down: Float[Array, "E D F"] | Projection | StepWeight,
    group_sizes: Int[Array, " E"],
    alignment: int,
    recipes: Recipes,
    marked: bool = False,
    summed: tuple[Float[Array, "T K"], Groups] | None = None,
) -> Any:
    """`feed_forward` of each row with the weights of its group, as `grouped_linear`: [M, D].

    summed: `sum_rows` of that, by these weights: [T, D]. marked: a pair of what is returned and
    of `phases.mark_of` what each product gives, for what comes after it and before the next.
    """
    if _is_one_operation(rows, gate_up, down, recipes, ONE_DEVICE):
        both: Any = fp8_grouped_feed_forward
        return both(rows, gate_up, down, group_sizes, recipes, marked, summed)
    hidden = grouped_linear(rows, gate_up, group_sizes, alignment, recipes[0])
    y = grouped_linear(hidden, down, group_sizes, alignment, recipes[1], swiglu)
    marks = (mark_of(hidden), mark_of(y)) if marked else None
    y = y if summed is None else sum_rows(y, *summed)
    return (y, marks) if marked else y


def _is_one_operation(x, gate_up, down, recipes: Recipes, layout: Layout) -> bool:
    """Whether both products are one FP8 operation, with SwiGLU's gradient quantised inside."""
    down = as_projection(down).array
    if as_projection(gate_up).array is None or down is None:
        return False
    width = down.shape[-1] // layout.size("mlp")
    return can_fuse(x.dtype, (width, down.shape[-2]), *recipes)


def grouped_linear(
    rows: Float[Array, "M *J K"] | StraightThrough,
    weights: Float[Array, "E *N K"] | Projection | StepWeight,
    group_sizes: Int[Array, " E"],
    alignment: int,
    recipe: LinearRecipe | None = None,
    activation: Callable[[Array], Array] | None = None,
) -> Float[Array, "M *N"]:
    """`linear` of each row with the weights of its group; sizes are multiples of `alignment`.

    `J` is what an activation takes away: gate and up. Rows that are quantised already need a
    recipe, and weights that take them.
    """
    weights = as_projection(weights)
    return weights.multiply_groups(rows, group_sizes, alignment, recipe, activation)


def group_alignment(entries: int, experts: int, *recipes: LinearRecipe | None) -> int:
    """The multiple that groups of rows are padded to, so that every recipe can multiply them."""
    if any(recipes):
        return KERNEL_ALIGNMENT  # a scale along tokens covers 128 of them, all of one expert
    return row_alignment(entries, experts)
