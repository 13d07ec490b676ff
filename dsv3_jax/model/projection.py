"""How a weight is multiplied with: each kind of weight knows it, and `linear` does not ask which.

A `Projection` is a weight [*N, K], or [E, *N, K] of experts, of which nobody but itself needs to
know how its numbers are held. `Plain` is that of an array, which arrays are given by themselves;
model/fp8_weights.py has another. A third kind, such as an adapter beside a base that may be either,
implements the same five methods; being a pytree of arrays, it goes through jit, scan and shard_map.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.model.fp8 import fp8_grouped_linear, fp8_linear
from dsv3_jax.model.plain_products import grouped_product, product, row_by_row
from dsv3_jax.model.remat import named_product
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout, in_shard_map
from dsv3_jax.quantization.block_scaled import StepWeight, StraightThrough
from dsv3_jax.quantization.recipe import LinearRecipe

Activation = Callable[[Array], Array]


class ProductLayout(NamedTuple):
    """How a product lies on a mesh, by logical dims: XLA cannot cut kernels by itself.

    `kernels.partition.Cut` cuts a kernel where nobody says how, by the shardings that arrive.
    """

    layout: Layout
    rows: tuple[str | None, ...]  # the dims of x but its last
    weight: tuple[str | None, ...]  # the last is contracted, and so also x's last


# Up to so many rows, as decoding has them, XLA:CPU copies a weight of several output dims into
# another order in every step, and reads one of a single output dim as it lies.
FEW_ROWS = 16

WHOLE = ProductLayout(ONE_DEVICE, (), (None,))


@runtime_checkable
class Projection(Protocol):
    """What products ask of a weight; `linear` and `grouped_linear` say what each returns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[*N, K], with the experts before N where it is theirs."""
        ...

    @property
    def array(self) -> Array | None:
        """The weight itself where it is an array and nothing else: what fused products read."""
        ...

    @property
    def takes_quantized_rows(self) -> bool:
        """Whether `multiply_groups` takes rows that are quantised already, as its recipe says."""
        ...

    def multiply(
        self,
        x: Float[Array, "*B K"] | StraightThrough,
        recipe: LinearRecipe | None,
        activation: Activation | None,
        where: ProductLayout,
    ) -> Float[Array, "..."]:
        """`linear`: on a mesh it cuts itself as `where` says."""
        ...

    def multiply_groups(
        self,
        rows: Float[Array, "M *J K"] | StraightThrough,
        group_sizes: Int[Array, " E"],
        alignment: int,
        recipe: LinearRecipe | None,
        activation: Activation | None,
    ) -> Float[Array, "M *N"]:
        """`grouped_linear`, on one device: inside shard_map it has this device's experts."""
        ...

    def astype(self, dtype: Any) -> Array:
        """The weight as an array, for what is not a product: absorbing kv_b_proj."""
        ...


@dataclass(frozen=True)
class Plain:
    """An array, or a StepWeight in its place, as a Projection: multiplied in x's dtype, or in FP8
    where there is a recipe."""

    array: Array
    takes_quantized_rows = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""
        return self.array.shape

    def multiply(self, x, recipe, activation, where):
        """As `Projection.multiply`; without a recipe XLA cuts the product of an array."""
        weight, of_weight = self.array, where.layout.spec(*where.weight)
        if recipe is not None:

            def of_device(x, weight):
                return fp8_linear(x, weight, recipe, activation)

            return multiply_on_mesh(of_device, x, weight, of_weight, where)
        assert not isinstance(x, StraightThrough)
        x = x if activation is None else activation(x)
        matrix_shape = math.prod(weight.shape[:-1]), weight.shape[-1]
        if isinstance(weight, StepWeight):  # on a mesh its gradient is scattered by ourselves
            y = multiply_on_mesh(product, x, weight, of_weight, where)
            return named_product(y, matrix_shape)
        on_mesh = not where.layout.one_device or in_shard_map()
        if on_mesh or math.prod(x.shape[:-1]) > FEW_ROWS:
            return named_product(product(x, weight), matrix_shape)
        rows, matrix = x.reshape(-1, x.shape[-1]), weight.reshape(matrix_shape)
        y = row_by_row(lambda rows: product(rows, matrix), rows, 1)
        return y.reshape(*x.shape[:-1], *weight.shape[:-1])

    def multiply_groups(self, rows, group_sizes, alignment, recipe, activation):
        """As `Projection.multiply_groups`."""
        if recipe is not None:
            return fp8_grouped_linear(rows, self.array, group_sizes, recipe, activation)
        assert not isinstance(rows, StraightThrough)
        rows = rows if activation is None else activation(rows)
        experts, *out_dims, contracted = self.array.shape
        weights = self.array.reshape(experts, -1, contracted)
        y = grouped_product(rows, weights, group_sizes, alignment)
        y = named_product(y, weights.shape)
        return y.reshape(-1, *out_dims)

    def astype(self, dtype):
        """The array in this dtype."""
        return self.array.astype(dtype)

    def reshape(self, *shape):
        """The same weight with dims put together; -1 may stand for one size."""
        return Plain(self.array.reshape(*shape))

    def __len__(self) -> int:
        return len(self.array)


def as_projection(weight: Any) -> Projection:
    """The weight itself, or `Plain` of an array."""
    return weight if hasattr(weight, "multiply_groups") else Plain(weight)


def multiply_on_mesh(
    of_device: Callable[[Any, Any], Array],
    x: Any,
    weight: Any,
    of_weight: PartitionSpec,
    where: ProductLayout,
) -> Array:
    """`of_device` of each device's part of x and of the weight, whose spec is of_weight.

    Where the contracted dim is cut, partial sums are added up and y lies as the residual.
    """
    layout, (*out_dims, contracted) = where.layout, where.weight
    inner = (None,) * (len(x.shape) - len(where.rows) - 1)  # SwiGLU's pair
    rows = where.rows if contracted is None else (where.rows[0], "residual")

    def product(x, weight):
        y = of_device(x, weight)
        return y if contracted is None else add_up(y, layout, contracted)

    of_x = layout.spec(*where.rows, *inner, contracted)
    return layout.shard_map(product, (of_x, of_weight), layout.spec(*rows, *out_dims))(x, weight)


def add_up(y: Array, layout: Layout, contracted: str) -> Array:
    """The sum over the devices that `contracted` is cut over, laid out as the residual."""
    axes = layout.axes(contracted)
    if not axes:
        return y
    if axes == layout.residual_axes():
        return jax.lax.psum_scatter(y, axes, scatter_dimension=1, tiled=True)
    return jax.lax.psum(y, axes)
