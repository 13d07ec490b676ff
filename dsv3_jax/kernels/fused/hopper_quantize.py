"""Quantisers on Hopper, in Pallas Mosaic GPU: each number read once from memory, and written once.

Memory is the only limit, so the form is the plain one that keeps it busy: many small blocks without
shared memory, 16 bytes a load, as many blocks a multiprocessor as registers allow. A block has one
tile of 128 channels. Sixteen lanes hold a token's 128 channels, eight each, and find their largest
magnitude in four shuffles.

Along tokens (`by_channel`) a block has 128 tokens as well. It reads the tile a second time, from
the L1 cache, so that a thread holds 16 consecutive tokens of a few channels: turning them is then a
renaming of registers, the largest of 128 tokens is three shuffles away, and eight lanes store a
channel's 128 values. What was read waits as it was, in few registers, for a loop that takes one
channel of each thread at a time. `hopper_computed.py` has the sources that compute.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.fused.hopper_registers import (
    CHANNELS,
    channels_layout,
    measured,
    next_channels,
    tokens_layout,
    turned,
    turned_layout,
)
from dsv3_jax.kernels.hopper import plgpu
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled, ScaleFormat, scale_of_amax


@dataclass(frozen=True)
class Piece:
    """What a tile reads of one operand: numbers [T, D], or scales of tokens, [D / 128, T]."""

    operand: int
    first: int = 0  # column of the operand that the first of the tiles begins at
    scales: bool = False

    def at(self, refs: Sequence[Any], rows: Any, columns: Any) -> Any:
        """The part that belongs to the numbers [rows, columns]."""
        start = columns.start + self.first
        if self.scales:
            return refs[self.operand].at[lax.div(start, jnp.int32(128)), rows]
        return refs[self.operand].at[rows, pl.ds(start, columns.size)]


@dataclass(frozen=True)
class Source:
    """Makes numbers of pieces of operands.

    `compute(*arrays)` makes of the pieces' arrays one array for each part of the result, bfloat16
    where that holds them. Along tokens, pieces are quantised uncomputed: numbers, or values and
    the scale of each row.
    """

    pieces: tuple[Piece, ...]
    compute: Callable[..., tuple[Any, ...]] = lambda x: (x,)

    def load(
        self, refs: Sequence[Any], rows: Any, columns: Any, layout: Any, of_scales: Any = None
    ) -> list[Any]:
        """The pieces' arrays for numbers [rows, columns], in a layout, or another for scales."""
        parts = [piece.at(refs, rows, columns) for piece in self.pieces]
        return load_parts(self.pieces, parts, layout, of_scales)


def load_parts(
    pieces: Sequence[Piece], parts: Sequence[Any], layout: Any, of_scales: Any = None
) -> list[Any]:
    """The arrays of what refs to parts of pieces hold, in a layout; or another one for scales."""
    of_scales = of_scales or layout.reduce(1)
    return [
        plgpu.load(part, layout=of_scales if piece.scales else layout, optimized=False)
        for piece, part in zip(pieces, parts, strict=True)
    ]


@dataclass(frozen=True)
class Split:
    """How a block's warpgroups share a tile: what each has in registers at a time."""

    warpgroups: int = 1
    rows: int = 32  # tokens of 128 channels
    turned: int = 64  # channels of 128 tokens
    staged: int = 0  # the first so many pieces come by TMA, where numbers are computed
    by_columns: bool = False  # all rows of some columns before the next ones


def quantized(x: Any, scale_format: ScaleFormat) -> tuple[Any, Any]:
    """E4M3 values and per-row scales of numbers in `tokens_layout`, by the rules of `quantize`."""
    return scaled(*measured(x), scale_format)


def scaled(x: Any, largest: Any, scale_format: ScaleFormat) -> tuple[Any, Any]:
    """E4M3 values and scales of rows whose largest finite magnitudes are known; NaN stays NaN."""
    scale = scale_of_amax(largest, scale_format)
    x *= lax.broadcast_in_dim(1.0 / scale, x.shape, [0])
    return x.astype(jnp.float8_e4m3fn), scale


def quantize_channels(
    ring: Any,
    scale: Any,
    values: Any,
    scales: Any,
    scale_format: ScaleFormat,
) -> None:
    """Quantises turned numbers [width, 128] by row, and writes them to [16, width / 16, 128].

    `scale` has the scales of their 128 tokens, or is None; `scales` is [16, width / 16].
    """

    def one_of_each_thread(channel, ring):
        x, largest, ring = next_channels(ring, scale)
        values[:, channel], scales[:, channel] = scaled(x, largest, scale_format)
        return ring

    lax.fori_loop(0, ring.shape[0] // CHANNELS, one_of_each_thread, ring)


def channel_results(dim: int, tokens: int, width: int) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of [dim, tokens] quantised along tokens, for `quantize_channels`."""
    each = width // CHANNELS
    return [
        ((dim // each, each, tokens), jnp.float8_e4m3fn),
        ((tokens // 128, dim // each, each), jnp.float32),
    ]


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
    used: Any = None,
) -> tuple[BlockScaled, ...]:
    """The source's numbers [tokens, dim], one part, quantised by token, and turned by channel.

    `by_channel` gives [dim, tokens] in tiles of 128 tokens, of which there must be whole ones.
    `dim` is a multiple of 128, tokens at least 8. Of more than `used` tokens whole blocks are left
    out.
    """
    assert dim % 128 == 0 and tokens >= 8 and not (by_channel and tokens % 128)
    operands = with_used(operands, used)
    width = 128 if by_token else split.turned * split.warpgroups
    column_tiles = dim // width
    rows_each = min(split.rows, tokens // 8 * 8)
    height = 128 if by_channel else rows_each * split.warpgroups
    row_tiles = pl.cdiv(tokens, height)

    def kernel(*refs):
        sources, refs = refs[: len(operands)], refs[len(operands) :]
        block = lax.axis_index("block")
        inner = jnp.int32(row_tiles if split.by_columns else column_tiles)
        row, column = lax.div(block, inner), lax.rem(block, inner)
        if split.by_columns:
            row, column = column, row
        row, column = row * height, column * width
        where_used(used, sources, row)(lambda: tile(sources, refs, row, column))

    def tile(sources, results, row, column):
        results = list(results)
        warpgroup = lax.axis_index("warpgroup") if split.warpgroups > 1 else 0
        if by_token:
            values, scales = results.pop(0), results.pop(0)

            @in_turn(height // (rows_each * split.warpgroups))
            def _(turn):
                start = row + (turn * split.warpgroups + warpgroup) * rows_each
                # The last rows may be quantised by two, to the same values.
                rows = pl.ds(lax.min(start, jnp.int32(tokens - rows_each)), rows_each)
                loaded = source.load(sources, rows, pl.ds(column, 128), tokens_layout())
                (x,) = source.compute(*loaded)
                values[rows, pl.ds(column, 128)], per_token = quantized(x, scale_format)
                scales[lax.div(column, jnp.int32(128)), rows] = per_token

        if by_channel:
            values, scales = results
            rows, each = pl.ds(row, 128), split.turned // CHANNELS

            @in_turn(width // (split.turned * split.warpgroups))
            def _(turn):
                start = column + (turn * split.warpgroups + warpgroup) * split.turned
                columns = pl.ds(start, split.turned)
                layout, of_scales = channels_layout(split.turned), turned_layout(CHANNELS).reduce(0)
                x, *scale = source.load(sources, rows, columns, layout, of_scales)
                groups = pl.ds(lax.div(start, jnp.int32(each)), CHANNELS)
                quantize_channels(
                    turned(x),
                    scale[0] if scale else None,
                    values.at[groups, :, rows],
                    scales.at[lax.div(row, jnp.int32(128)), groups],
                    scale_format,
                )

    shapes = []
    if by_token:
        shapes += [((tokens, dim), jnp.float8_e4m3fn), ((dim // 128, tokens), jnp.float32)]
    if by_channel:
        shapes += channel_results(dim, tokens, split.turned)
    several: Any = {}
    if split.warpgroups > 1:
        several = dict(num_threads=split.warpgroups, thread_name="warpgroup")
    out = hopper.kernel(
        kernel,
        out_type=[manual.result(shape, dtype, operands[0]) for shape, dtype in shapes],
        grid=(row_tiles * column_tiles,),
        grid_names=("block",),
        compiler_params=COMPILER_PARAMS,
        **several,
    )(*operands)
    out = manual.vary(out, operands)
    if by_channel:
        out = [*out[:-2], out[-2].reshape(dim, tokens), out[-1].reshape(-1, dim)]
    return tuple(
        BlockScaled(values, scales.mT, PER_TOKEN) for values, scales in zip(out[::2], out[1::2])
    )


# No thread reads what another has written: Pallas's barriers around every access are not needed.
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


def with_used(operands: Sequence[Any], used: Any) -> tuple[Any, ...]:
    """The operands of a kernel, the last being the number of rows in use if there is one."""
    last = () if used is None else (jnp.asarray(used, jnp.int32).reshape(1),)
    return manual.vary((*operands, *last))


def where_used(used: Any, sources: Sequence[Any], row: Any) -> Callable[[Callable[[], None]], None]:
    """Runs a block that begins at a row, unless no row from there on is in use."""
    return (lambda body: body()) if used is None else pl.when(row < sources[-1][0])


def in_turn(times: int) -> Callable[[Callable[[Any], None]], None]:
    """A loop that is not unrolled: ptxas would take 255 registers to run its turns together."""
    return pl.loop(0, times) if times > 1 else lambda body: body(jnp.int32(0))
