"""Quantisers on Hopper, in Pallas Mosaic GPU: each number read once from memory, and written once.

Memory is the only limit, so the form is the plain one that keeps it busy: many small blocks without
shared memory, 16 bytes a load, up to nine blocks a multiprocessor. A block has one tile of 128
channels. Sixteen lanes hold a token's 128 channels, eight each, and find their largest magnitude in
four shuffles.

Along tokens (`by_channel`) a block has 128 tokens as well. It reads the tile a second time, from
the L1 cache, so that a thread holds 16 consecutive tokens of a few channels: turning them is then a
renaming of registers, the largest of 128 tokens is three shuffles away, and eight lanes store a
channel's 128 values. That is for sources that compute little; `hopper_computed.py` has the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from dsv3_jax.kernels import manual
from dsv3_jax.kernels.gemm import hopper
from dsv3_jax.kernels.gemm.hopper import plgpu
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled, ScaleFormat, scale_of_amax


@dataclass(frozen=True)
class Source:
    """Makes numbers of operands.

    `load(refs, rows, columns, layout)` has the arrays of a piece [rows, columns] in that layout,
    and `compute(*arrays)` makes of them one array for each part of the result, in that layout,
    bfloat16 where that holds them.
    """

    load: Callable[[Sequence[Any], Any, Any, Any], tuple[Any, ...]]
    compute: Callable[..., tuple[Any, ...]] = lambda x: (x,)

    def __call__(
        self, refs: Sequence[Any], rows: Any, columns: Any, layout: Any
    ) -> tuple[Any, ...]:
        return self.compute(*self.load(refs, rows, columns, layout))


TOKENS_EACH = 16  # consecutive tokens of a channel in one thread


@dataclass(frozen=True)
class Split:
    """How a block's warpgroups share a tile: what each has in registers at a time."""

    warpgroups: int = 1
    rows: int = 32  # tokens of 128 channels
    turned: int = 64  # channels of 128 tokens


ONE_EXPONENT = np.uint32(1 << 24)  # a float32's exponent field, the sign shifted out


def quantized(x: Any, scale_format: ScaleFormat) -> tuple[Any, Any]:
    """E4M3 values and per-row scales of numbers in registers, by the rules of `quantize`.

    The largest finite magnitude is found on the bits: with the sign shifted out, one more exponent
    step wraps infinities and NaN around to below every finite number. That is two instructions a
    number where comparing, selecting and taking the maximum are three of a slower kind.
    """
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    largest = jnp.max((bits << np.uint32(1)) + ONE_EXPONENT, axis=1)
    largest = (jnp.maximum(largest, ONE_EXPONENT) - ONE_EXPONENT) >> np.uint32(1)
    scale = scale_of_amax(lax.bitcast_convert_type(largest, jnp.float32), scale_format)
    # x * 0 is NaN for what is not finite, and the conversion saturates by itself.
    scaled = x * lax.broadcast_in_dim(1.0 / scale, x.shape, [0]) + x * 0.0
    return scaled.astype(jnp.float8_e4m3fn), scale


def quantize_tiles(
    source: Source,
    operands: Sequence[Any],
    tokens: int,
    dim: int,
    scale_format: ScaleFormat,
    split: Split,
    *,
    by_token: bool = True,
    by_channel: bool = False,
) -> tuple[BlockScaled, ...]:
    """The source's numbers [tokens, dim], one part, quantised by token, and turned by channel.

    `by_channel` gives [dim, tokens] in tiles of 128 tokens, of which there must be whole ones.
    `dim` is a multiple of 128, tokens at least 8.
    """
    assert dim % 128 == 0 and tokens >= 8 and not (by_channel and tokens % 128)
    operands = manual.vary(tuple(operands))
    column_tiles = dim // 128
    rows_each = min(split.rows, tokens // 8 * 8)
    height = 128 if by_channel else rows_each * split.warpgroups

    def kernel(*refs):
        refs = list(refs)
        sources = [refs.pop(0) for _ in operands]
        block = lax.axis_index("block")
        warpgroup = lax.axis_index("warpgroup") if split.warpgroups > 1 else 0
        row = lax.div(block, jnp.int32(column_tiles)) * height
        column = lax.rem(block, jnp.int32(column_tiles)) * 128
        if by_token:
            values, scales = refs.pop(0), refs.pop(0)

            @in_turn(height // (rows_each * split.warpgroups))
            def _(turn):
                start = row + (turn * split.warpgroups + warpgroup) * rows_each
                # The last rows may be quantised by two, to the same values.
                rows = pl.ds(lax.min(start, jnp.int32(tokens - rows_each)), rows_each)
                (x,) = source(sources, rows, pl.ds(column, 128), tokens_layout())
                values[rows, pl.ds(column, 128)], per_token = quantized(x, scale_format)
                scales[lax.div(column, jnp.int32(128)), rows] = per_token

        if by_channel:
            values, scales = refs
            layout, rows = _channels_layouts(split.turned)[0], pl.ds(row, 128)

            @in_turn(128 // (split.turned * split.warpgroups))
            def _(turn):
                start = column + (turn * split.warpgroups + warpgroup) * split.turned
                columns = pl.ds(start, split.turned)
                (x,) = source(sources, rows, columns, layout)
                values[columns, rows], per_channel = quantized(_turned(x), scale_format)
                scales[lax.div(row, jnp.int32(128)), columns] = per_channel

    shapes = []
    if by_token:
        shapes += [((tokens, dim), jnp.float8_e4m3fn), ((dim // 128, tokens), jnp.float32)]
    if by_channel:
        shapes += [((dim, tokens), jnp.float8_e4m3fn), ((tokens // 128, dim), jnp.float32)]
    several: Any = {}
    if split.warpgroups > 1:
        several = dict(num_threads=split.warpgroups, thread_name="warpgroup")
    out = plgpu.kernel(
        kernel,
        out_type=[manual.result(shape, dtype, operands[0]) for shape, dtype in shapes],
        grid=(pl.cdiv(tokens, height) * column_tiles,),
        grid_names=("block",),
        compiler_params=COMPILER_PARAMS,
        **several,
    )(*operands)
    out = manual.vary(out, operands)
    return tuple(
        BlockScaled(values, scales.mT, PER_TOKEN) for values, scales in zip(out[::2], out[1::2])
    )


# No thread reads what another has written: Pallas's barriers around every access are not needed.
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


def in_turn(times: int) -> Callable[[Callable[[Any], None]], None]:
    """A loop that is not unrolled: ptxas would take 255 registers to run its turns together."""
    return pl.loop(0, times) if times > 1 else lambda body: body(jnp.int32(0))


def tokens_layout() -> Any:
    """8 rows of 128 channels: a warp has two rows, a lane 8 channels of one."""
    return plgpu.Layout.TILED(plgpu.Tiling(((8, 128), (2, 128), (8,))), (-5,), (-3, -2), -1)


def _channels_layouts(width: int) -> tuple[Any, Any]:
    """128 tokens of `width` channels, a thread with 16 tokens of a few; and the same turned."""
    each = width // 16  # four warps of four lanes
    straight = plgpu.Layout.TILED(
        plgpu.Tiling(((128, width), (128, width // 4), (TOKENS_EACH, each))), (-5,), (-4, -3), -1
    )
    return straight, plgpu.Layout.TILED(*turned_tiling(width))


def turned_tiling(width: int) -> tuple[Any, ...]:
    """What a tiled layout of [width, 128] is made of whose threads hold those of [128, width]."""
    tiles = ((width, 128), (width // 4, 128), (width // 16, TOKENS_EACH))
    return plgpu.Tiling(tiles), (-6,), (-3, -4), -1


def _turned(x: Any) -> Any:
    """The transpose of [128, width] numbers, each of which stays in the thread that has it."""
    if hopper._interpreting.get():
        return x.T
    width = x.shape[1]
    straight, turned = _channels_layouts(width)

    @plgpu.inline_mgpu(
        arg_types=(straight,),
        return_type=plgpu.ShapeDtypeStruct((width, 128), x.dtype, layout=turned),
    )
    def turn(_, x):
        return turned_array(list(x.registers.flat), width)

    return turn(x)


def turned_array(by_token: list[Any], width: int) -> Any:
    """The turned array of a thread's vectors along channels, one for each of its tokens."""
    along_tokens = ir.VectorType.get((TOKENS_EACH,), ir.VectorType(by_token[0].type).element_type)
    registers = np.empty(width // 16, dtype=object)
    for channel in range(len(registers)):
        tokens: Any = llvm.mlir_undef(along_tokens)
        for token in range(TOKENS_EACH):
            number = vector.extract(by_token[token], [], [channel])
            tokens = vector.insert(number, tokens, [], [token])
        registers[channel] = tokens
    layout = fragmented_array.TiledLayout(*turned_tiling(width))
    return fragmented_array.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape((width, 128))),
        _layout=layout,
        _is_signed=None,
    )
