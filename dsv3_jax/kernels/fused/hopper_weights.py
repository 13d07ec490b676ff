"""Weights quantised on Hopper: read once, written in FP8 as they are and transposed.

A warpgroup has a tile of 128 x 128 in registers, 16 rows of 8 columns in each thread. What goes out
along rows is 8 bytes a thread, of which four lanes fill a sector; along columns it is 16 bytes, and
turning the tile is a renaming of registers. Only its largest magnitude crosses threads.
"""

import math
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.fused.hopper_quantize import COMPILER_PARAMS
from dsv3_jax.kernels.fused.hopper_registers import channels_layout, turned
from dsv3_jax.kernels.hopper import plgpu
from dsv3_jax.quantization.block_scaled import (
    PER_BLOCK,
    BlockScaled,
    ScaleFormat,
    scale_of_amax,
)

TILE = 128


def quantize_blocks(
    x: Float[Array, "*E N K"], scale_format: ScaleFormat = "f32"
) -> tuple[BlockScaled, BlockScaled]:
    """x in tiles of 128 x 128, and the same numbers transposed; see `api.quantize_blocks`."""
    hopper.require()
    *lead, rows, columns = x.shape
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"numbers must be float32 or bfloat16, and are {x.dtype}")
    if rows % TILE or columns % TILE:
        raise NotImplementedError(f"{rows} x {columns} must be whole tiles of {TILE} x {TILE}")
    experts, row_tiles, column_tiles = math.prod(lead), rows // TILE, columns // TILE
    x = manual.vary(x)

    def kernel(x_ref, values, turned_values, scales):
        block = lax.axis_index("block")
        row, column = _divided(block, column_tiles)
        expert, row = _divided(row, row_tiles)
        at_rows, at_columns = pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)
        numbers, scale = _quantized(x_ref.at[expert, at_rows, at_columns], scale_format)
        values[expert, at_rows, at_columns] = numbers.astype(jnp.float8_e4m3fn)
        turned_values[expert, at_columns, at_rows] = turned(numbers).astype(jnp.float8_e4m3fn)
        scales[block] = scale

    values, turned_values, scales = hopper.kernel(
        kernel,
        out_type=[
            manual.result((experts, rows, columns), jnp.float8_e4m3fn, x),
            manual.result((experts, columns, rows), jnp.float8_e4m3fn, x),
            manual.result((experts * row_tiles * column_tiles,), jnp.float32, x),
        ],
        grid=(experts * row_tiles * column_tiles,),
        grid_names=("block",),
        compiler_params=COMPILER_PARAMS,
    )(x.reshape(experts, rows, columns))
    values, turned_values, scales = manual.vary((values, turned_values, scales), x)
    scales = scales.reshape(*lead, row_tiles, column_tiles)
    return (
        BlockScaled(values.reshape(x.shape), scales, PER_BLOCK),
        BlockScaled(turned_values.reshape(*lead, columns, rows), scales.mT, PER_BLOCK),
    )


def _quantized(tile: Any, scale_format: ScaleFormat) -> tuple[Any, Any]:
    """A tile's numbers over its scale, NaN where they are not finite, and the scale."""
    x = plgpu.load(tile, layout=channels_layout(TILE), optimized=False).astype(jnp.float32)
    magnitude = jnp.abs(x)
    finite = magnitude < jnp.inf  # NaN is not
    scale = scale_of_amax(
        jnp.max(jnp.max(jnp.where(finite, magnitude, 0.0), axis=1), axis=0), scale_format
    )
    return jnp.where(finite, x * (1.0 / scale), jnp.nan), scale


def _divided(x: Any, by: int) -> tuple[Any, Any]:
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))
