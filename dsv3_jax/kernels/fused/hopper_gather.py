"""Rows that a quantiser reads in an order that is data, each times a weight: never an array.

Every thread finds the rows of its numbers itself, instead of a block that has neighbours in memory.
Blocks go along all rows of a few columns before the next ones: these columns of the operand then
stay in the L2 cache, from which a token's numbers are read once for each of its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.fused.hopper_quantize import Source
from dsv3_jax.kernels.fused.hopper_registers import array, numbers_of
from dsv3_jax.kernels.fused.reference import weighted_rows
from dsv3_jax.kernels.hopper import plgpu
from dsv3_jax.kernels.hopper_integers import constant, index


@dataclass(frozen=True)
class GatheredRows(Source):
    """Row m of the source is row tokens[m] of bfloat16 numbers [T, D] times weights[m].

    In bfloat16; zeros where tokens[m] is T. The first operands are the numbers, tokens, weights.
    """

    def load(
        self, refs: Sequence[Any], rows: Any, columns: Any, layout: Any, of_scales: Any = None
    ) -> list[Any]:
        """As `Source.load`; of_scales is the layout of what each row has one of."""
        numbers, *of_rows = refs[:3]
        of_row = of_scales or layout.reduce(1)
        tokens, weights = (
            plgpu.load(ref.at[rows], layout=of_row, optimized=False) for ref in of_rows
        )
        if hopper.interpreted():
            return [weighted_rows(numbers[:, columns], tokens, weights)]
        return [_weighted(numbers, tokens, weights, columns, layout, of_row)]


def _weighted(numbers: Any, tokens: Any, weights: Any, columns: Any, layout: Any, of_row: Any):
    """Numbers [tokens, columns] times weights in a layout whose vectors lie along a row."""
    num_tokens, shape = numbers.shape[0], (tokens.shape[0], columns.size)
    result = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=layout)
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), of_row, of_row, splat), return_type=result)
    def gather(_, numbers, tokens, weights, first):
        tiled = layout.to_mgpu()
        size = tiled.vector_length
        kind = ir.VectorType.get((size,), ir.BF16Type.get())
        in_f32 = ir.VectorType.get((size,), ir.F32Type.get())
        zeros = vector.broadcast(kind, utils.c(0, ir.BF16Type.get()))
        _, column = next(iter(tiled.thread_idxs(shape)))
        column = arith.addi(index(first.registers[()]), column)
        by_row = []
        for token, weight in zip(numbers_of(tokens), numbers_of(weights), strict=True):
            row = index(arith.minsi(token, constant(num_tokens - 1)))
            found = vector.load(kind, numbers, [row, column])
            below = arith.cmpi(arith.CmpIPredicate.slt, token, constant(num_tokens))
            found = arith.select(below, found, zeros)
            product = arith.mulf(arith.extf(in_f32, found), vector.broadcast(in_f32, weight))
            by_row.append(arith.truncf(kind, product))
        return array(by_row, shape, tiled)

    return gather(numbers, tokens, weights, columns.start)
