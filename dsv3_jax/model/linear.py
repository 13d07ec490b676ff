"""The linear map of every projection; the one place that decides in which format it multiplies."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.grouped_gemm.api import KERNEL_ALIGNMENT, grouped_matmul, row_alignment
from dsv3_jax.model.activation import swiglu
from dsv3_jax.model.fp8 import (
    can_fuse,
    fp8_feed_forward,
    fp8_grouped_feed_forward,
    fp8_grouped_linear,
    fp8_linear,
)
from dsv3_jax.model.held import FP8Weight, cut_dims, held_grouped_linear, held_linear
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout
from dsv3_jax.quantization.block_scaled import StraightThrough
from dsv3_jax.quantization.recipe import LinearRecipe


class ProductLayout(NamedTuple):
    """How a product lies on a mesh, by logical dims: XLA cannot cut kernels by itself.

    `kernels.partition.Cut` cuts a kernel where nobody says how, by the shardings that arrive.
    """

    layout: Layout
    rows: tuple[str | None, ...]  # the dims of x but its last
    weight: tuple[str | None, ...]  # the last is contracted, and so also x's last


WHOLE = ProductLayout(ONE_DEVICE, (), (None,))


def linear(
    x: Float[Array, "*B K"] | StraightThrough,
    weight: Float[Array, "*N K"] | FP8Weight,
    recipe: LinearRecipe | None = None,
    activation: Callable[[Array], Array] | None = None,
    where: ProductLayout = WHOLE,
) -> Float[Array, "..."]:
    """x times the transposed weight, in x's dtype: [*B, K] by [*N, K] gives [*B, *N].

    The weight keeps its leading dims, so a [N, H, D] projection yields heads without a reshape.
    A recipe says how the products are quantised; without one they are not. An activation is applied
    to x first (`fp8_linear` saves x rather than what it makes of it). An FP8Weight is multiplied in
    FP8 with or without a recipe, and has no gradient. On a mesh a product in FP8 is each device's
    own, as `where` says; a contracted dim that is cut leaves y laid out as the residual. An x that
    is quantised already needs a recipe, or such a weight.
    """
    layout = where.layout
    if isinstance(weight, FP8Weight):

        def multiply_held(x, weight):
            return held_linear(x if activation is None else activation(x), weight, recipe)

        if layout.one_device:
            return multiply_held(x, weight)
        numbers, names = weight.numbers, where.weight
        dims = cut_dims(numbers, (*names[: numbers.ndim - 1], names[-1]), layout)
        inner = [None] * (len(weight.shape) - numbers.ndim)
        return _on_mesh(
            lambda x, numbers: multiply_held(x, weight.part(numbers)),
            x,
            numbers,
            layout.spec(*dims),
            where._replace(weight=(*dims[:-1], *inner, dims[-1])),
        )
    if recipe is not None:
        multiply = partial(fp8_linear, recipe=recipe, activation=activation)
        return _on_mesh(multiply, x, weight, layout.spec(*where.weight), where)
    assert not isinstance(x, StraightThrough)
    if activation is not None:
        x = activation(x)
    contract = (((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, weight.astype(x.dtype), contract)


def _on_mesh(multiply, x, weight, of_weight: PartitionSpec, where: ProductLayout):
    layout, (*out_dims, contracted) = where.layout, where.weight
    inner = (None,) * (len(x.shape) - len(where.rows) - 1)  # SwiGLU's pair
    rows = where.rows if contracted is None else (where.rows[0], "residual")

    def of_device(x, weight):
        y = multiply(x, weight)
        return y if contracted is None else _added_up(y, layout, contracted)

    of_x = layout.spec(*where.rows, *inner, contracted)
    return layout.shard_map(of_device, (of_x, of_weight), layout.spec(*rows, *out_dims))(x, weight)


def _added_up(y: Array, layout: Layout, contracted: str) -> Array:
    """The sum over the devices that `contracted` is cut over, laid out as the residual."""
    axes = layout.axes(contracted)
    if not axes:
        return y
    if axes == layout.residual_axes():
        return jax.lax.psum_scatter(y, axes, scatter_dimension=1, tiled=True)
    return jax.lax.psum(y, axes)


Recipes = tuple[LinearRecipe | None, LinearRecipe | None]  # of gate and up, and of down


def feed_forward(
    x: Float[Array, "B T D"] | StraightThrough,
    gate_up: Float[Array, "2 F D"] | FP8Weight,
    down: Float[Array, "D F"] | FP8Weight,
    recipes: Recipes,
    layout: Layout = ONE_DEVICE,
) -> Float[Array, "B T D"]:
    """down(swiglu(gate_up(x))), with F cut over `tensor`.

    x lies as ("batch", "seq"), and the result as the residual.
    """
    rows, inner = ("batch", "seq"), (None, "mlp", None)
    if not _is_one_operation(x, gate_up, down, recipes, layout):
        widen = ProductLayout(layout, rows, inner)
        hidden = linear(x, gate_up, recipes[0], where=widen)
        hidden = layout.constrain(hidden, *rows, None, "mlp")
        narrow = ProductLayout(layout, rows, (None, "mlp"))
        return linear(hidden, down, recipes[1], swiglu, narrow)
    both: Any = fp8_feed_forward
    multiply = partial(both, recipes=recipes)
    inputs = layout.spec(*rows), layout.spec(*inner), layout.spec(None, "mlp")
    return layout.shard_map(
        lambda *operands: _added_up(multiply(*operands), layout, "mlp"),
        inputs,
        layout.spec("batch", "residual"),
    )(x, gate_up, down)


def grouped_feed_forward(
    rows: Float[Array, "M D"] | StraightThrough,
    gate_up: Float[Array, "E 2 F D"] | FP8Weight,
    down: Float[Array, "E D F"] | FP8Weight,
    group_sizes: Int[Array, " E"],
    alignment: int,
    recipes: Recipes,
) -> Float[Array, "M D"]:
    """`feed_forward` of each row with the weights of its group, as `grouped_linear`."""
    if _is_one_operation(rows, gate_up, down, recipes, ONE_DEVICE):
        both: Any = fp8_grouped_feed_forward
        return both(rows, gate_up, down, group_sizes, recipes)
    hidden = grouped_linear(rows, gate_up, group_sizes, alignment, recipes[0])
    return grouped_linear(hidden, down, group_sizes, alignment, recipes[1], swiglu)


def _is_one_operation(x, gate_up, down, recipes: Recipes, layout: Layout) -> bool:
    """Whether both products are one FP8 operation, with SwiGLU's gradient quantised inside."""
    if isinstance(gate_up, FP8Weight) or isinstance(down, FP8Weight):
        return False
    width = down.shape[-1] // layout.size("mlp")
    return can_fuse(x.dtype, (width, down.shape[-2]), *recipes)


def grouped_linear(
    rows: Float[Array, "M K"] | StraightThrough,
    weights: Float[Array, "E *N K"] | FP8Weight,
    group_sizes: Int[Array, " E"],
    alignment: int,
    recipe: LinearRecipe | None = None,
    activation: Callable[[Array], Array] | None = None,
) -> Float[Array, "M *N"]:
    """`linear` of each row with the weights of its group; sizes are multiples of `alignment`.

    Rows that are quantised already need a recipe, and weights that are not.
    """
    if isinstance(weights, FP8Weight):
        assert not isinstance(rows, StraightThrough)
        rows = rows if activation is None else activation(rows)
        return held_grouped_linear(rows, weights, group_sizes, alignment, recipe)
    if recipe is not None:
        return fp8_grouped_linear(rows, weights, group_sizes, recipe, activation)
    assert not isinstance(rows, StraightThrough)
    if activation is not None:
        rows = activation(rows)
    experts, *out_dims, _ = weights.shape
    weights = weights.reshape(experts, -1, weights.shape[-1]).astype(rows.dtype)
    y = grouped_matmul(rows, weights, group_sizes, alignment=alignment)
    return y.reshape(-1, *out_dims)


def group_alignment(entries: int, experts: int, *recipes: LinearRecipe | None) -> int:
    """The multiple that groups of rows are padded to, so that every recipe can multiply them."""
    if any(recipes):
        return KERNEL_ALIGNMENT  # a scale along tokens covers 128 of them, all of one expert
    return row_alignment(entries, experts)
