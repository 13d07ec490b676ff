"""Products with frozen weights held as bytes of FP8, on CPUs: a piece of a weight at a time.

The one idea: XLA:CPU multiplies float32, so that what it reads of a weight it first widens to four
bytes a number. A loop over pieces dequantises one of them, multiplies by it and goes on, in the
forward pass and again for the input's gradient; the weight has none. The pieces are cut from the
stack of all layers as it lies, of which no layer is an array of its own.

The plain form is `dequantize` and the product: `model/adapters.py` multiplies so what is no bytes.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend
from dsv3_jax.kernels.grouped_gemm.blocks import by_group
from dsv3_jax.model.plain_products import PIECE, row_by_row
from dsv3_jax.model.remat import named_product
from dsv3_jax.parallel.collectives import vary_together
from dsv3_jax.quantization.block_scaled import BlockScaled, dequantize


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stack", "layer"], meta_fields=[])
@dataclass(frozen=True)
class InStack:
    """One layer's weight where it lies.

    Fields:
        stack: BlockScaled [L, *lead, rows, K] of bytes; lead are experts and the pair of gate, up.
        layer: int32 [], its number in the stack.
    """

    stack: BlockScaled
    layer: Int[Array, ""] | int

    @property
    def shape(self) -> tuple[int, ...]:
        """[*lead, rows, K]."""
        return self.stack.shape[1:]

    @property
    def dtype(self) -> Any:
        """The dtype of the values, uint8."""
        return self.stack.dtype

    def cut(self) -> BlockScaled:
        """The layer's numbers as an array of their own."""
        at = functools.partial(jax.lax.dynamic_index_in_dim, index=self.layer, keepdims=False)
        return jax.tree.map(at, self.stack)


@dataclass(frozen=True)
class HeldAsBytes:
    """Such a weight as a `Projection`, on one device and without a recipe.

    Fields:
        base: its numbers.
        shape: that it has among our parameters.
    """

    base: InStack
    shape: tuple[int, ...]
    array = None
    takes_quantized_rows = False

    def multiply(self, x, recipe, activation, where):
        """As `Projection.multiply`."""
        assert recipe is None and where.layout.one_device
        x = x if activation is None else activation(x)
        y = frozen_product(*vary_together(x, self.base))
        y = named_product(y, (y.shape[-1], x.shape[-1]))
        return y.reshape(*x.shape[:-1], *self.shape[:-1])

    def multiply_groups(self, rows, group_sizes, alignment, recipe, activation):
        """As `Projection.multiply_groups`."""
        assert recipe is None
        rows = rows if activation is None else activation(rows)
        y: Array = frozen_grouped_product(*vary_together(rows, self.base), group_sizes, alignment)
        return named_product(y, (y.shape[-1], rows.shape[-1])).reshape(-1, *self.shape[1:-1])

    def astype(self, dtype):
        """The dequantised weight."""
        return dequantize(self.base.cut(), dtype).reshape(self.shape)


def is_held_as_bytes(weight: Any) -> bool:
    """Whether these products are for it."""
    return isinstance(weight, BlockScaled) and weight.dtype == jnp.uint8


def as_in_stack(weight: BlockScaled | InStack) -> InStack:
    """A layer's numbers as a stack of one."""
    if isinstance(weight, InStack):
        return weight
    return InStack(jax.tree.map(lambda leaf: leaf[None], weight), 0)


def without_bytes(layers: Any) -> tuple[Any, dict[Any, BlockScaled]]:
    """A stack of layers without what is held as bytes, and that, by path: no scan cuts it then."""
    leaves = jax.tree_util.tree_leaves_with_path(layers, is_leaf=is_held_as_bytes)
    held = {path: leaf for path, leaf in leaves if is_held_as_bytes(leaf)}
    return _replaced(layers, dict.fromkeys(held), is_held_as_bytes), held


def with_bytes(layer: Any, held: dict[Any, BlockScaled], number: Any) -> Any:
    """One layer's weights, with its own of what `without_bytes` took as they lie."""
    stacks = {path: InStack(stack, number) for path, stack in held.items()}
    return _replaced(layer, stacks, lambda node: node is None)


def _replaced(tree: Any, leaves: dict[Any, Any], is_leaf: Callable[[Any], bool]) -> Any:
    def put(path, leaf):
        return leaves.get(path, leaf)

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=is_leaf)


@jax.custom_vjp
def frozen_product(x: Float[Array, "*B K"], weight: InStack) -> Float[Array, "*B N"]:
    """x times the transposed weight [*lead, rows, K], in x's dtype; N are all dims but the last.

    The numbers are rounded to x's dtype, sums are float32. The weight has no gradient.
    """
    rows, pieces = _wide(x), _Pieces(weight, x.dtype)

    def product(number):
        piece = pieces[number].mT
        return row_by_row(lambda rows: rows @ piece, rows, 1)

    if pieces.number == 1:
        y = product(0)
    else:
        y = jnp.moveaxis(jax.lax.map(product, jnp.arange(pieces.number)), 0, 1)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _product_backward(residuals, dy):
    weight = residuals
    d_rows, pieces = _wide(dy), _Pieces(weight, dy.dtype)
    of_piece = d_rows.reshape(len(d_rows), pieces.number, -1)

    def product(number):
        part = jax.lax.dynamic_index_in_dim(of_piece, number, 1, keepdims=False)
        return part @ pieces[number]

    dx = product(0)
    if pieces.number > 1:
        body = lambda number, total: total + product(number)  # noqa: E731
        dx = jax.lax.fori_loop(1, pieces.number, body, dx)
    return dx.astype(dy.dtype).reshape(*dy.shape[:-1], -1), None


def _wide(x):
    """Rows in float32, which XLA:CPU multiplies: in a loop it would widen BF16 in every turn."""
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


backend.define_vjp(
    frozen_product, lambda x, weight: (frozen_product(x, weight), weight), _product_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def frozen_grouped_product(
    rows: Float[Array, "M K"], weights: InStack, group_sizes: Int[Array, " E"], alignment: int
) -> Float[Array, "M N"]:
    """Each row times the weights of its group [E, *pair, rows, K], one expert's at a time.

    As `frozen_product`, and as `kernels.grouped_gemm.grouped_matmul` of dequantised weights.
    """
    matrices = _Pieces(weights, rows.dtype, lead=1)
    columns = math.prod(weights.shape[1:-1])
    return by_group(rows, lambda g: matrices[g].mT, columns, group_sizes, alignment)


def _grouped_forward(rows, weights, group_sizes, alignment):
    y = frozen_grouped_product(rows, weights, group_sizes, alignment)
    return y, (weights, group_sizes)


def _grouped_backward(alignment, residuals, dy):
    weights, group_sizes = residuals
    matrices = _Pieces(weights, dy.dtype, lead=1)
    d_rows = by_group(dy, matrices.__getitem__, weights.shape[-1], group_sizes, alignment)
    return d_rows, None, np.zeros(group_sizes.shape, jax.dtypes.float0)


backend.define_vjp(frozen_grouped_product, _grouped_forward, _grouped_backward)


class _Pieces:
    """A layer's weight as matrices [rows, K], rounded to a dtype and held in float32.

    Each is made when it is asked for. With `lead` there is one for each index of so many first
    dims, and the other dims are rows of it; without, one of about PIECE numbers, in whole tiles.
    """

    def __init__(self, weight: InStack, dtype: Any, lead: int | None = None):
        stack, self._dtype = weight.stack, dtype
        layers, *dims, rows, columns = stack.shape
        if lead is None and math.prod(weight.shape) <= PIECE:
            lead = 0
        cut = _number_of_cuts(rows, columns, stack.tile[0]) if lead is None else 1
        kept = [] if lead is None else dims[lead:]
        self.number = math.prod(dims) // math.prod(kept) * cut
        of_scales = stack.scales.shape[-2:]
        self._stack = BlockScaled(
            stack.values.reshape(layers * self.number, *kept, rows // cut, columns),
            stack.scales.reshape(layers * self.number, *kept, of_scales[0] // cut, of_scales[1]),
            stack.tile,
        )
        self._first = weight.layer * self.number

    def __getitem__(self, number: Any) -> Float[Array, "N K"]:
        piece = InStack(self._stack, self._first + number).cut()
        rounded = dequantize(piece, self._dtype).reshape(-1, piece.shape[-1])
        return rounded.astype(jnp.float32)


def _number_of_cuts(rows: int, columns: int, tile_rows: int) -> int:
    """Into how many equal pieces of whole tiles a matrix is cut so that none is above PIECE."""
    if rows % tile_rows:
        return 1
    tiles = rows // tile_rows
    of_cuts = (cuts for cuts in range(1, tiles + 1) if tiles % cuts == 0)
    return next((cuts for cuts in of_cuts if rows * columns <= cuts * PIECE), tiles)
