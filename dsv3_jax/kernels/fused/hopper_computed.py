"""Quantisers along tokens on Hopper whose numbers take some computing: each is computed once.

`hopper_quantize.py` would compute a number once for each direction, in two layouts. Here it is
computed by token, and waits in shared memory until its channel's 128 tokens are there. Operands
come by TMA, a tile at once, where a multiprocessor has shared memory for several tiles; otherwise
the next rows' are loaded into registers while some are computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import gpu, vector

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.fused.hopper_quantize import (
    COMPILER_PARAMS,
    Piece,
    Source,
    Split,
    channel_results,
    in_turn,
    load_parts,
    quantize_channels,
    quantized,
    where_used,
    with_used,
)
from dsv3_jax.kernels.fused.hopper_registers import (
    CHANNELS,
    TOKENS_EACH,
    tokens_layout,
    turned_array,
    turned_layout,
)
from dsv3_jax.kernels.hopper import plgpu
from dsv3_jax.kernels.hopper_integers import constant, index, plus, quotient, remainder, times
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled, ScaleFormat


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
    used: Any = None,
) -> tuple[BlockScaled, ...]:
    """The source's numbers [tokens, parts * dim], turned and quantised by channel; and by token.

    Part i lies in columns i * dim and on. tokens and dim are multiples of 128. A block's tile waits
    in shared memory, bfloat16, from one direction to the other. Of more than `used` tokens whole
    blocks are left out.
    """
    assert dim % 128 == 0 and tokens % 128 == 0 and PLACE.group % split.rows == 0
    operands = with_used(operands, used)
    column_tiles, width = dim // 128, parts * dim
    by_tma, by_load = source.pieces[: split.staged], source.pieces[split.staged :]

    def kernel(*refs):
        block = lax.axis_index("block")
        row = lax.div(block, jnp.int32(column_tiles)) * 128
        column = lax.rem(block, jnp.int32(column_tiles)) * 128
        where_used(used, refs[: len(operands)], row)(lambda: of_tile(list(refs), row, column))

    def of_tile(refs, row, column):
        *refs, tile, met, staged, arrived = refs
        sources = [refs.pop(0) for _ in operands]
        warpgroup = lax.axis_index("warpgroup")
        if by_token:
            values, scales = refs.pop(0), refs.pop(0)

        turns = 128 // (split.rows * split.warpgroups)

        columns = pl.ds(column, 128)

        def within(turn):
            return pl.ds((turn * split.warpgroups + warpgroup) * split.rows, split.rows)

        def loaded(turn):
            rows = pl.ds(row + within(turn).start, split.rows)
            at_rows = [piece.at(sources, rows, columns) for piece in by_load]
            return load_parts(by_load, at_rows, tokens_layout())

        def one_turn(turn, arrays):
            # On their way while these are computed; the last ones are loaded again, and dropped.
            following = loaded(lax.min(turn + 1, jnp.int32(turns - 1)))
            at_rows = [buffer.at[within(turn)] for buffer in staged]
            arrays = [*load_parts(by_tma, at_rows, tokens_layout()), *arrays]
            start = within(turn).start
            rows = pl.ds(row + start, split.rows)
            for part, x in enumerate(source.compute(*arrays)):
                _put(tile.at[part], start, x)
                if by_token:
                    at = part * dim + column
                    values[rows, pl.ds(at, 128)], per_token = quantized(x, scale_format)
                    scales[lax.div(at, jnp.int32(128)), rows] = per_token
            return following

        if by_tma:

            @pl.when(warpgroup == 0)
            def _():
                for piece, buffer in zip(by_tma, staged):
                    tile_of_it = piece.at(sources, pl.ds(row, 128), columns)
                    plgpu.copy_gmem_to_smem(tile_of_it, buffer, arrived)

        first = loaded(jnp.int32(0))
        if by_tma:
            plgpu.barrier_wait(arrived)
        lax.fori_loop(0, turns, one_turn, first)
        _meet(met)
        values, scales = refs
        rows, pieces, each = pl.ds(row, 128), 128 // split.turned, split.turned // CHANNELS

        @in_turn(parts * pieces // split.warpgroups)
        def _(turn):
            piece = turn * split.warpgroups + warpgroup
            part = lax.div(piece, jnp.int32(pieces))
            start = lax.rem(piece, jnp.int32(pieces)) * split.turned
            groups = pl.ds(lax.div(part * dim + column + start, jnp.int32(each)), CHANNELS)
            quantize_channels(
                _taken(tile.at[part], start, split.turned),
                None,
                values.at[groups, :, rows],
                scales.at[lax.div(row, jnp.int32(128)), groups],
                scale_format,
            )

    shapes = channel_results(width, tokens, split.turned)
    if by_token:
        by_tokens = [((tokens, width), jnp.float8_e4m3fn), ((width // 128, tokens), jnp.float32)]
        shapes = by_tokens + shapes
    out = hopper.kernel(
        kernel,
        out_type=[manual.result(shape, dtype, operands[0]) for shape, dtype in shapes],
        grid=(tokens // 128 * column_tiles,),
        grid_names=("block",),
        num_threads=split.warpgroups,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((parts, *_tile_shape()), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=split.warpgroups),
            [_buffer(piece, operands) for piece in by_tma],
            plgpu.Barrier(num_arrivals=max(len(by_tma), 1)),
        ),
        compiler_params=COMPILER_PARAMS,
    )(*operands)
    out = manual.vary(out, operands)
    out = [*out[:-2], out[-2].reshape(width, tokens), out[-1].reshape(-1, width)]
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


def _buffer(piece: Piece, operands: Sequence[Any]) -> Any:
    """Shared memory for a tile's part of a piece."""
    return plgpu.SMEM((128,) if piece.scales else (128, 128), operands[piece.operand].dtype)


def _meet(barrier: Any) -> None:
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
        token = plus(times(warp, 2), quotient(lane, 16))  # of 8
        at = plus(
            first.registers[()],
            times(token, PLACE.chunk),
            times(remainder(lane, 16), PLACE.chunk_pitch),
        )
        for eight, register in enumerate(x.registers.flat):
            place = plus(at, constant(8 * eight * PLACE.chunk))
            vector.store(register, tile, [index(place)])

    put(tile, first, x)


def _taken(tile: Any, column: Any, width: int) -> Any:
    """The transpose [width, 128] of columns of a tile, in `turned_layout`."""
    if hopper.interpreted():
        return tile[:, pl.ds(column, width)].T
    each = width // 16  # a warp has width / 4 channels, a lane `each` of them
    first = lax.div(column, jnp.int32(PLACE.chunk)) * PLACE.chunk_pitch
    splat, shape = plgpu.Layout.WG_SPLAT, (width, 128)
    result = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=turned_layout(width))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat), return_type=result)
    def take(_, tile, first):
        warp, lane = _warp_and_lane()
        channel = plus(times(warp, width // 4), times(remainder(lane, 4), each))
        at = plus(
            first.registers[()],
            times(quotient(channel, PLACE.chunk), PLACE.chunk_pitch),
            remainder(channel, PLACE.chunk),
            times(quotient(lane, 4), PLACE.group_pitch),
        )
        along_channels = ir.VectorType.get((each,), ir.BF16Type.get())
        by_token = [
            vector.load(along_channels, tile, [index(plus(at, constant(t * PLACE.chunk)))])
            for t in range(TOKENS_EACH)
        ]
        return turned_array(by_token, width)

    return take(tile, first)


def _warp_and_lane() -> tuple[Any, Any]:
    thread = utils.thread_idx()
    within = remainder(thread, 128)
    return quotient(within, 32), remainder(within, 32)
