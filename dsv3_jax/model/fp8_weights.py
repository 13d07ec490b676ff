"""Weights held as FP8 for inference: a byte a number, and a scale for each block of 128 x 128.

The one idea: a weight's format says how it is multiplied. Where variables hold a projection as
BlockScaled, in the published matrix's shape, modules are handed an `FP8Weight`, whose products
quantise their input per token and multiply in FP8, as DeepSeek-V3's inference/model.py does for
weights of one byte. Nothing is dequantised but kv_b_proj, a layer at a time: absorbing it
multiplies its two parts apart. Such weights have no gradient.

Embedding, head, norms, router and eh_proj stay as they are (V3 report, section 3.3.1).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.weights import Weight, find_weight
from dsv3_jax.kernels.gemm.api import scaled_matmul
from dsv3_jax.kernels.grouped_gemm.api import grouped_matmul
from dsv3_jax.model.projection import WHOLE, multiply_on_mesh
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.quantization.block_scaled import (
    PER_BLOCK,
    BlockScaled,
    StraightThrough,
    dequantize,
    quantize,
)
from dsv3_jax.quantization.recipe import LinearRecipe


@functools.partial(jax.tree_util.register_dataclass, data_fields=["numbers"], meta_fields=["shape"])
@dataclass(frozen=True)
class FP8Weight:
    """A layer's weight as checkpoints hold it, and the shape that it has among our parameters.

    Fields:
        numbers: BlockScaled [*lead, rows, K] in tiles of 128 x 128; lead are experts and the pair
            of gate and up, whose blocks do not meet.
        shape: [*N, K], or [*N, *K] where K counts heads and their dims.
    """

    numbers: BlockScaled
    shape: tuple[int, ...]
    array = None
    takes_quantized_rows = False

    def multiply(self, x, recipe=None, activation=None, where=WHOLE):
        """As `Projection.multiply`; x is quantised as the recipe says, 1x128 without one."""
        layout, numbers = where.layout, self.numbers

        def of_device(x, numbers):
            return _product(x if activation is None else activation(x), self.part(numbers), recipe)

        if layout.one_device:
            return of_device(x, numbers)
        dims = cut_dims(numbers, (*where.weight[: numbers.ndim - 1], where.weight[-1]), layout)
        inner = [None] * (len(self.shape) - numbers.ndim)
        where = where._replace(weight=(*dims[:-1], *inner, dims[-1]))
        return multiply_on_mesh(of_device, x, numbers, layout.spec(*dims), where)

    def multiply_groups(self, rows, group_sizes, alignment, recipe=None, activation=None):
        """As `Projection.multiply_groups`, for rows in the model's dtype."""
        assert not isinstance(rows, StraightThrough)
        rows = rows if activation is None else activation(rows)
        matrices, num_rows = _one_matrix(self.numbers, experts=1)
        quantized = _quantize_rows(rows, matrices, recipe)
        y = grouped_matmul(quantized, matrices, group_sizes, alignment=alignment)
        return _split(y, num_rows).astype(rows.dtype).reshape(-1, *self.shape[1:-1])

    def __len__(self) -> int:
        return self.shape[0]

    def astype(self, dtype: Any) -> Array:
        """The dequantised weight."""
        return dequantize(self.numbers, dtype).reshape(self.shape)

    def reshape(self, *shape: int) -> "FP8Weight":
        """The same numbers known by another shape, in which -1 may stand for one size."""
        size = math.prod(self.shape) // math.prod(abs(s) for s in shape)
        return FP8Weight(self.numbers, tuple(size if s == -1 else s for s in shape))

    def part(self, numbers: BlockScaled) -> "FP8Weight":
        """The weight of a device that holds these of the numbers; K is one dim."""
        lead, inner = numbers.shape[:-2], self.shape[numbers.ndim - 1 : -1]
        outer = numbers.shape[-2] // math.prod(inner)
        return FP8Weight(numbers, (*lead, outer, *inner, numbers.shape[-1]))


def to_fp8_weights(variables: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The variables with every projection that the paper multiplies in FP8 as BlockScaled.

    Blocks of 128 x 128 of the matrices as published, scales in f32: what `export-hf --dtype fp8`
    writes. What is BlockScaled already stays. Embedding, head and eh_proj are in config.dtype;
    norms, gates and router biases stay.
    """

    def convert(path, leaf):
        weight = find_weight([entry.key for entry in path])
        if isinstance(leaf, BlockScaled) or weight is None:
            return leaf
        if weight.fp8:
            return _to_blocks(leaf, *map(len, weight.matrix))
        # The router's scores are computed in f32.
        widened = not weight.is_matrix or weight.part == "router"
        return leaf if widened else leaf.astype(config.dtype)

    return jax.tree_util.tree_map_with_path(
        convert, variables, is_leaf=lambda node: isinstance(node, BlockScaled)
    )


def matrix_dims(weight: Weight) -> tuple[str | None, ...]:
    """The logical dims of a weight's numbers where it is held so: lead, rows and columns."""
    rows, columns = map(len, weight.matrix)
    return (*weight.dims[: len(weight.lead)], weight.dims[-rows - columns], weight.dims[-columns])


def cut_dims(
    numbers: BlockScaled, dims: Sequence[str | None], layout: Layout
) -> tuple[str | None, ...]:
    """The dims that a mesh cuts the numbers along: those of `dims` whose pieces are whole tiles."""
    tiles = (1,) * (numbers.ndim - 2) + numbers.tile
    return tuple(
        dim if dim is not None and size % (layout.size(dim) * tile) == 0 else None
        for size, dim, tile in zip(numbers.shape, dims, tiles, strict=True)
    )


def describe_weights(variables: Any) -> str:
    """One line: how many bytes the weights take, and how many of them are FP8 with its scales."""
    nodes = jax.tree.leaves(variables, is_leaf=lambda node: isinstance(node, BlockScaled))
    total = sum(node.nbytes for node in nodes)
    fp8 = sum(node.nbytes for node in nodes if isinstance(node, BlockScaled))
    numbers = sum(math.prod(node.shape) for node in nodes)
    return (
        f"weights     {total / 1e6:,.1f} MB, {fp8 / 1e6:,.1f} MB of them FP8 with scales; "
        f"{total / numbers:.2f} bytes a number"
    )


def _product(x: Any, weight: FP8Weight, recipe: LinearRecipe | None) -> Array:
    """x times the transposed weight in x's dtype, on one device."""
    matrix, rows = _one_matrix(weight.numbers, experts=0)
    if isinstance(x, StraightThrough):
        quantized = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), x.numbers)
    else:
        quantized = _quantize_rows(x.reshape(-1, x.shape[-1]), matrix, recipe)
    y = scaled_matmul(quantized, matrix)
    return _split(y, rows).astype(x.dtype).reshape(*x.shape[:-1], *weight.shape[:-1])


def _to_blocks(leaf: Array, rows: int, columns: int) -> BlockScaled:
    lead = leaf.shape[: leaf.ndim - rows - columns]
    matrix = (math.prod(leaf.shape[len(lead) : len(lead) + rows]), -1)
    return _quantize_blocks(leaf.reshape(*lead, *matrix))


@jax.jit
def _quantize_blocks(matrices: Array) -> BlockScaled:
    return quantize(matrices, PER_BLOCK)


def _one_matrix(x: BlockScaled, experts: int) -> tuple[BlockScaled, tuple[int, int]]:
    """x [*experts, *pair, rows, K] as one matrix, whole tiles throughout; (pairs, rows) of it.

    Zeros fill partial blocks, which have scales of their own already.
    """
    *lead, rows, columns = x.shape
    tile_rows, tile_columns = x.tile
    fill = [(0, 0)] * len(lead) + [(0, -rows % tile_rows), (0, -columns % tile_columns)]
    values = jnp.pad(x.values, fill) if any(right for _, right in fill) else x.values
    kept = tuple(lead[:experts])
    merged = BlockScaled(
        values.reshape(*kept, -1, values.shape[-1]),
        x.scales.reshape(*kept, -1, x.scales.shape[-1]),
        x.tile,
    )
    return merged, (math.prod(lead[experts:]), rows)


def _quantize_rows(x: Array, matrix: BlockScaled, recipe: LinearRecipe | None) -> BlockScaled:
    form = (recipe or LinearRecipe()).input
    x = jnp.pad(x, [(0, 0), (0, matrix.shape[-1] - x.shape[-1])])
    return quantize(x, form.tile, form.scale_format)


def _split(y: Array, pairs_and_rows: tuple[int, int]) -> Array:
    """The columns of y [T, pairs * padded rows] that belong to the weight's own rows."""
    pairs, rows = pairs_and_rows
    return y.reshape(y.shape[0], pairs, -1)[..., :rows]
