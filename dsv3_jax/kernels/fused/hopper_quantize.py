"""Quantisers on Hopper, in Pallas Mosaic GPU: each number read once from memory, and written once.

Memory is the only limit, so the form is the plain one that keeps it busy: many small blocks without
shared memory, 16 bytes a load, up to nine blocks a multiprocessor. A block has one tile of 128
channels. Sixteen lanes hold a token's 128 channels, eight each, and find their largest magnitude in
four shuffles.

Along tokens (`by_channel`) a block has 128 tokens as well. It reads the tile a second time, from
the L1 cache, so that a thread holds 16 consecutive tokens of a few channels: turning them is then a
renaming of registers, the largest of 128 tokens is three shuffles away, and eight lanes store a
channel's 128 values.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

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
    parts: int = 1,
    by_token: bool = True,
    by_channel: bool = False,
) -> tuple[BlockScaled, ...]:
    """The source's numbers [tokens, parts * dim] quantised by token, and turned by channel.

    Part i lies in columns i * dim and on. `by_channel` gives [parts * dim, tokens] in tiles of
    128 tokens, of which there must be whole ones. `dim` is a multiple of 128, tokens at least 8.
    """
    assert dim % 128 == 0 and tokens >= 8 and not (by_channel and tokens % 128)
    operands = manual.vary(tuple(operands))
    column_tiles, width = dim // 128, parts * dim
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

            @_in_turn(height // (rows_each * split.warpgroups))
            def _(turn):
                start = row + (turn * split.warpgroups + warpgroup) * rows_each
                # The last rows may be quantised by two, to the same values.
                rows = pl.ds(lax.min(start, jnp.int32(tokens - rows_each)), rows_each)
                numbers = source(sources, rows, pl.ds(column, 128), tokens_layout())
                for part, x in enumerate(numbers):
                    at = part * dim + column
                    values[rows, pl.ds(at, 128)], per_token = quantized(x, scale_format)
                    scales[lax.div(at, jnp.int32(128)), rows] = per_token

        if by_channel:
            values, scales = refs
            layout, rows = _channels_layouts(split.turned)[0], pl.ds(row, 128)

            @_in_turn(128 // (split.turned * split.warpgroups))
            def _(turn):
                start = column + (turn * split.warpgroups + warpgroup) * split.turned
                numbers = source(sources, rows, pl.ds(start, split.turned), layout)
                for part, x in enumerate(numbers):
                    columns = pl.ds(part * dim + start, split.turned)
                    values[columns, rows], per_channel = quantized(_turned(x), scale_format)
                    scales[lax.div(row, jnp.int32(128)), columns] = per_channel

    shapes = []
    if by_token:
        shapes += [((tokens, width), jnp.float8_e4m3fn), ((width // 128, tokens), jnp.float32)]
    if by_channel:
        shapes += [((width, tokens), jnp.float8_e4m3fn), ((tokens // 128, width), jnp.float32)]
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


def quantize_computed(
    source: Source,
    operands: Sequence[Any],
    tokens: int,
    dim: int,
    scale_format: ScaleFormat,
    split: Split,
    *,
    parts: int = 1,
    by_token: bool = True,
) -> tuple[BlockScaled, ...]:
    """`quantize_tiles` along tokens, for a source that computes: it is called once for a number.

    A block's tile waits in shared memory, bfloat16, from one direction to the other. tokens and dim
    are multiples of 128.
    """
    assert dim % 128 == 0 and tokens % 128 == 0 and PLACE.group % split.rows == 0
    operands = manual.vary(tuple(operands))
    column_tiles, width = dim // 128, parts * dim

    def kernel(*refs):
        *refs, tile, met = refs
        refs = list(refs)
        sources = [refs.pop(0) for _ in operands]
        block = lax.axis_index("block")
        warpgroup = lax.axis_index("warpgroup")
        row = lax.div(block, jnp.int32(column_tiles)) * 128
        column = lax.rem(block, jnp.int32(column_tiles)) * 128
        if by_token:
            values, scales = refs.pop(0), refs.pop(0)

        turns = 128 // (split.rows * split.warpgroups)

        def loaded(turn):
            start = row + (turn * split.warpgroups + warpgroup) * split.rows
            rows = pl.ds(start, split.rows)
            return source.load(sources, rows, pl.ds(column, 128), tokens_layout())

        def one_turn(turn, arrays):
            # On their way while these are computed; the last ones are loaded again, and dropped.
            following = loaded(lax.min(turn + 1, jnp.int32(turns - 1)))
            within = (turn * split.warpgroups + warpgroup) * split.rows
            rows = pl.ds(row + within, split.rows)
            for part, x in enumerate(source.compute(*arrays)):
                _put(tile.at[part], within, x)
                if by_token:
                    at = part * dim + column
                    values[rows, pl.ds(at, 128)], per_token = quantized(x, scale_format)
                    scales[lax.div(at, jnp.int32(128)), rows] = per_token
            return following

        lax.fori_loop(0, turns, one_turn, loaded(0))
        meet(met)
        values, scales = refs
        rows, pieces = pl.ds(row, 128), 128 // split.turned

        @_in_turn(parts * pieces // split.warpgroups)
        def _(turn):
            piece = turn * split.warpgroups + warpgroup
            part = lax.div(piece, jnp.int32(pieces))
            start = lax.rem(piece, jnp.int32(pieces)) * split.turned
            x = _taken(tile.at[part], start, split.turned)
            columns = pl.ds(part * dim + column + start, split.turned)
            values[columns, rows], per_channel = quantized(x, scale_format)
            scales[lax.div(row, jnp.int32(128)), columns] = per_channel

    shapes = [((width, tokens), jnp.float8_e4m3fn), ((tokens // 128, width), jnp.float32)]
    if by_token:
        by_tokens = [((tokens, width), jnp.float8_e4m3fn), ((width // 128, tokens), jnp.float32)]
        shapes = by_tokens + shapes
    out = plgpu.kernel(
        kernel,
        out_type=[manual.result(shape, dtype, operands[0]) for shape, dtype in shapes],
        grid=(tokens // 128 * column_tiles,),
        grid_names=("block",),
        num_threads=split.warpgroups,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((parts, *_tile_shape()), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=split.warpgroups),
        ),
        compiler_params=COMPILER_PARAMS,
    )(*operands)
    out = manual.vary(out, operands)
    return tuple(
        BlockScaled(values, scales.mT, PER_TOKEN) for values, scales in zip(out[::2], out[1::2])
    )


@dataclass(frozen=True)
class Place:
    """Where a tile of 128 x 128 lies in shared memory: 8 channels of 16 tokens side by side.

    Gaps keep lanes that read or write at one time in different banks: those that write have the
    chunks of 8 channels of a token, those that read have the groups of 16 tokens of a chunk.
    """

    chunk: int = 8  # channels side by side, 16 bytes
    group: int = 16  # tokens of them, one after the other
    group_pitch: int = 17 * 8
    chunk_pitch: int = 8 * 17 * 8 + 8

    @property
    def size(self) -> int:
        """Numbers of a whole tile, with its gaps."""
        return 128 // self.chunk * self.chunk_pitch


PLACE = Place()


def _tile_shape() -> tuple[int, ...]:
    return (128, 128) if hopper.interpreted() else (PLACE.size,)


def meet(barrier: Any) -> None:
    """Waits for all threads of the block; what they wrote to shared memory can then be read.

    The barrier is for the interpreter: an arrival there stands for a warpgroup, whose threads are
    not of one step.
    """
    if hopper.interpreted():
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        return

    @plgpu.inline_mgpu()
    def wait(_):
        gpu.barrier()

    wait()


def _put(tile: Any, row: Any, x: Any) -> None:
    """Writes x, tokens from `row` on that are of one group, in `tokens_layout`, to a tile."""
    if hopper.interpreted():
        tile[pl.ds(row, x.shape[0]), :] = x
        return
    first = lax.div(row, jnp.int32(PLACE.group)) * PLACE.group_pitch
    first += lax.rem(row, jnp.int32(PLACE.group)) * PLACE.chunk
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, tokens_layout()))
    def put(_, tile, first, x):
        warp, lane = _warp_and_lane()
        token = _sum(_times(warp, 2), _quotient(lane, 16))  # of 8
        at = _sum(
            first.registers[()],
            _times(token, PLACE.chunk),
            _times(_remainder(lane, 16), PLACE.chunk_pitch),
        )
        for eight, register in enumerate(x.registers.flat):
            place = _sum(at, _constant(8 * eight * PLACE.chunk))
            vector.store(register, tile, [_index(place)])

    put(tile, first, x)


def _taken(tile: Any, column: Any, width: int) -> Any:
    """The transpose [width, 128] of columns of a tile, in the layout that `_turned` gives."""
    if hopper.interpreted():
        return tile[:, pl.ds(column, width)].T
    each = width // 16  # a warp has width / 4 channels, a lane `each` of them
    first = lax.div(column, jnp.int32(PLACE.chunk)) * PLACE.chunk_pitch
    splat, shape = plgpu.Layout.WG_SPLAT, (width, 128)
    turned = plgpu.Layout.TILED(*_turned_tiling(width))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), splat),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=turned),
    )
    def take(_, tile, first):
        warp, lane = _warp_and_lane()
        channel = _sum(_times(warp, width // 4), _times(_remainder(lane, 4), each))
        at = _sum(
            first.registers[()],
            _times(_quotient(channel, PLACE.chunk), PLACE.chunk_pitch),
            _remainder(channel, PLACE.chunk),
            _times(_quotient(lane, 4), PLACE.group_pitch),
        )
        along_channels = ir.VectorType.get((each,), ir.BF16Type.get())
        by_token = [
            vector.load(along_channels, tile, [_index(_sum(at, _constant(t * PLACE.chunk)))])
            for t in range(TOKENS_EACH)
        ]
        return _turned_array(by_token, width)

    return take(tile, first)


def _warp_and_lane() -> tuple[Any, Any]:
    thread = utils.thread_idx()
    within = _remainder(thread, 128)
    return _quotient(within, 32), _remainder(within, 32)


def _constant(x: int) -> Any:
    return utils.c(x, ir.IntegerType.get_signless(32))


def _sum(*terms: Any) -> Any:
    return functools.reduce(arith.addi, terms)


def _times(x: Any, factor: int) -> Any:
    return arith.muli(x, _constant(factor))


def _quotient(x: Any, divisor: int) -> Any:
    return arith.divui(x, _constant(divisor))


def _remainder(x: Any, divisor: int) -> Any:
    return arith.remui(x, _constant(divisor))


def _index(x: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), x)


# No thread reads what another has written: Pallas's barriers around every access are not needed.
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


def _in_turn(times: int) -> Callable[[Callable[[Any], None]], None]:
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
    return straight, plgpu.Layout.TILED(*_turned_tiling(width))


def _turned_tiling(width: int) -> tuple[Any, ...]:
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
        return _turned_array(list(x.registers.flat), width)

    return turn(x)


def _turned_array(by_token: list[Any], width: int) -> Any:
    """The turned array of a thread's vectors along channels, one for each of its tokens."""
    along_tokens = ir.VectorType.get((TOKENS_EACH,), ir.VectorType(by_token[0].type).element_type)
    registers = np.empty(width // 16, dtype=object)
    for channel in range(len(registers)):
        tokens: Any = llvm.mlir_undef(along_tokens)
        for token in range(TOKENS_EACH):
            number = vector.extract(by_token[token], [], [channel])
            tokens = vector.insert(number, tokens, [], [token])
        registers[channel] = tokens
    layout = fragmented_array.TiledLayout(*_turned_tiling(width))
    return fragmented_array.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape((width, 128))),
        _layout=layout,
        _is_signed=None,
    )
