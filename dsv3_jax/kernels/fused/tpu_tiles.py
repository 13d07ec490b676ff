"""The loop that the quantisers of this room share on TPUs, in Pallas: tiles of 128 x 128.

A block of some tiles is in VMEM, and a loop goes through them. Tiles are turned while they are
float32, as a TPU turns no bytes. Scales leave a kernel as rows of tokens or channels,
[tiles, 1, length]: a TPU writes no single columns, and the transpose after it is small.

XLA makes E4M3 of float32 by some forty operations a number, in every fusion that ends in one: V3's
step took most of its compile time for these.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import manual, tpu
from dsv3_jax.kernels.tpu import pltpu
from dsv3_jax.quantization.block_scaled import (
    PER_BLOCK,
    PER_TOKEN,
    BlockScaled,
    ScaleFormat,
    over_scale,
    scale_of_amax,
)

TILE = 128
FP8 = jnp.float8_e4m3fn
ROWS, COLUMNS = 4, 8  # tiles of a block, at most


class Operand(NamedTuple):
    """An array that a kernel reads, a block at a time, and of a block a tile's part at a time.

    Fields:
        array: what is read.
        first: the tile of its columns that is the result's first.
        block: (rows, columns), in tiles of a block -> its shape.
        place: (row, column) of a block, in blocks -> its place in the array, in blocks.
        load: (ref, row, column), in tiles of the block -> what `compute` is given, float32.
    """

    array: Any
    first: int
    block: Callable[[int, int], tuple[int, ...]]
    place: Callable[[Any, Any], tuple[Any, ...]]
    load: Callable[[Any, Any, Any], Any]

    def spec(self, rows: int, columns: int) -> Any:
        """Its blocks of so many tiles, by the grid's row, column and part."""
        blocks = self.first // columns
        return pl.BlockSpec(
            self.block(rows, columns), lambda i, j, part, used: self.place(i, j + blocks)
        )


def matrix(array: Any, first: int = 0) -> Operand:
    """Of [T, W]: [128 tokens, 128 channels]."""
    return Operand(
        array,
        first,
        lambda rows, columns: (rows * TILE, columns * TILE),
        lambda i, j: (i, j),
        lambda ref, i, j: ref[_at(i), _at(j)].astype(jnp.float32),
    )


def of_tiles(array: Any, first: int = 0) -> Operand:
    """Of a number for each token and 128 channels, [W / 128, 1, T]: [1, 128 tokens]."""
    return Operand(
        array,
        first,
        lambda rows, columns: (columns, 1, rows * TILE),
        lambda i, j: (j, 0, i),
        lambda ref, i, j: ref[j, :, _at(i)],
    )


def of_tokens(array: Any) -> Operand:
    """Of a number for each token, [1, T]: [1, 128 tokens]."""
    return Operand(
        array,
        0,
        lambda rows, columns: (1, rows * TILE),
        lambda i, j: (0, i),
        lambda ref, i, j: ref[:, _at(i)],
    )


def of_channels(array: Any) -> Operand:
    """Of a number for each channel, [1, D]: [1, 128 channels]."""
    return Operand(
        array,
        0,
        lambda rows, columns: (1, columns * TILE),
        lambda i, j: (0, j),
        lambda ref, i, j: ref[:, _at(j)],
    )


def quantize_tiles(
    operands: Sequence[Operand],
    compute: Callable[..., Any],
    tokens: int,
    channels: int,
    scale_format: ScaleFormat,
    *,
    parts: int = 1,
    by_token: bool = True,
    by_channel: bool = False,
    used: Int[Array, ""] | None = None,
) -> tuple[BlockScaled, ...]:
    """What `compute` makes of the operands' tiles, quantised per token, along tokens, or both.

    compute(part, *loaded) is a tile [128, 128] f32 of part `part` of the result, whose `channels`
    follow those of the part before. Tokens and channels are whole tiles. Blocks of rows from `used`
    on are left as they are.
    """
    tpu.require()
    in_use = jnp.reshape(jnp.int32(tokens) if used is None else used, 1).astype(jnp.int32)
    in_use, *arrays = manual.vary((in_use, *(operand.array for operand in operands)))
    rows = min(ROWS, tokens // TILE)
    columns = _columns(channels // TILE, parts, operands)
    blocks = channels // TILE // columns if parts > 1 else 0
    like = arrays[0]
    out_shape, out_specs = [], []
    if by_token:
        out_shape += [_fp8(tokens, parts * channels, like), _row(parts * channels, tokens, like)]
        out_specs += [
            pl.BlockSpec(
                (rows * TILE, columns * TILE), lambda i, j, part, used: (i, part * blocks + j)
            ),
            pl.BlockSpec(
                (columns, 1, rows * TILE), lambda i, j, part, used: (part * blocks + j, 0, i)
            ),
        ]
    if by_channel:
        out_shape += [_fp8(parts * channels, tokens, like), _row(tokens, parts * channels, like)]
        out_specs += [
            pl.BlockSpec(
                (columns * TILE, rows * TILE), lambda i, j, part, used: (part * blocks + j, i)
            ),
            pl.BlockSpec(
                (rows, 1, columns * TILE), lambda i, j, part, used: (i, 0, part * blocks + j)
            ),
        ]

    def kernel(used, *refs):
        loaded, out = refs[: len(operands)], refs[len(operands) :]
        part = pl.program_id(2)

        @pl.when(pl.program_id(0) * rows * TILE < used[0])
        def _():
            @pl.loop(0, rows)
            def _(i):
                @pl.loop(0, columns)
                def _(j):
                    at = [o.load(ref, i, j) for o, ref in zip(operands, loaded, strict=True)]
                    tile = compute(part, *at)
                    if by_token:
                        out[0][_at(i), _at(j)], out[1][j, :, _at(i)] = _by_token(tile, scale_format)
                    if by_channel:
                        values, scales = _by_channel(tile, scale_format)
                        out[-2][_at(j), _at(i)], out[-1][i, :, _at(j)] = values, scales

    results = pl.pallas_call(
        kernel,
        name="quantize_tiles",
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(tokens // TILE, rows), pl.cdiv(channels // TILE, columns), parts),
            in_specs=[operand.spec(rows, columns) for operand in operands],
            out_specs=out_specs,
        ),
    )(in_use, *arrays)
    return tuple(
        BlockScaled(values, jnp.squeeze(scales, 1).mT, PER_TOKEN)
        for values, scales in zip(results[::2], results[1::2], strict=True)
    )


def quantize_blocks(
    x: Float[Array, "E N K"], scale_format: ScaleFormat
) -> tuple[BlockScaled, BlockScaled]:
    """A stack of weights in tiles of 128 x 128, and the same numbers transposed; whole tiles."""
    tpu.require()
    stack, n, k = x.shape
    rows, columns = min(ROWS, n // TILE), min(COLUMNS, k // TILE)

    def kernel(x_ref, values, turned, scales):
        @pl.loop(0, rows)
        def _(i):
            @pl.loop(0, columns)
            def _(j):
                tile = x_ref[0, _at(i), _at(j)].astype(jnp.float32)
                largest = jnp.max(_magnitude(tile), axis=0, keepdims=True)
                largest = jnp.max(largest, axis=1, keepdims=True)
                scale = scale_of_amax(jnp.broadcast_to(largest, (1, TILE)), scale_format)
                numbers = over_scale(tile, scale)
                values[0, _at(i), _at(j)] = numbers.astype(FP8)
                turned[0, _at(j), _at(i)] = numbers.T.astype(FP8)
                scales[0, i, :, _at(j)] = scale

    values, turned, scales = pl.pallas_call(
        kernel,
        name="quantize_blocks",
        out_shape=[
            manual.result((stack, n, k), FP8, x),
            manual.result((stack, k, n), FP8, x),
            manual.result((stack, n // TILE, 1, k), jnp.float32, x),
        ],
        grid=(stack, pl.cdiv(n // TILE, rows), pl.cdiv(k // TILE, columns)),
        in_specs=[pl.BlockSpec((1, rows * TILE, columns * TILE), lambda e, i, j: (e, i, j))],
        out_specs=[
            pl.BlockSpec((1, rows * TILE, columns * TILE), lambda e, i, j: (e, i, j)),
            pl.BlockSpec((1, columns * TILE, rows * TILE), lambda e, i, j: (e, j, i)),
            pl.BlockSpec((1, rows, 1, columns * TILE), lambda e, i, j: (e, i, 0, j)),
        ],
    )(x)
    of_tiles = scales[:, :, 0, ::TILE]
    return (
        BlockScaled(values, of_tiles, PER_BLOCK),
        BlockScaled(turned, of_tiles.mT, PER_BLOCK),
    )


def turned_row(row: Any, tile: Any) -> Any:
    """tile [tokens, channels] times a number for each token, which lie in a row [1, tokens]."""
    return (tile.T * row).T


def _by_token(tile: Any, scale_format: ScaleFormat) -> tuple[Any, Any]:
    """Values [tokens, channels] and scales [1, tokens] of a tile."""
    scale = scale_of_amax(jnp.max(_magnitude(tile), axis=1, keepdims=True), scale_format)
    return over_scale(tile, scale).astype(FP8), jnp.broadcast_to(scale, tile.shape).T[:1]


def _by_channel(tile: Any, scale_format: ScaleFormat) -> tuple[Any, Any]:
    """Values [channels, tokens] and scales [1, channels] of a tile."""
    scale = scale_of_amax(jnp.max(_magnitude(tile), axis=0, keepdims=True), scale_format)
    return over_scale(tile, scale).T.astype(FP8), scale  # a TPU turns no bytes


def _magnitude(tile: Any) -> Any:
    return jnp.where(jnp.isfinite(tile), jnp.abs(tile), 0.0)


def _columns(tiles: int, parts: int, operands: Sequence[Operand]) -> int:
    """Tiles of a block's columns: what comes in parts, or begins within an operand, divides."""
    inside = parts > 1 or any(operand.first for operand in operands)
    return max(c for c in range(1, COLUMNS + 1) if c <= tiles and not (inside and tiles % c))


def _at(tile: Any) -> Any:
    return pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)


def _fp8(rows: int, columns: int, like: Any) -> Any:
    return manual.result((rows, columns), FP8, like)


def _row(numbers: int, length: int, like: Any) -> Any:
    """Scales of `length` rows of so many numbers."""
    return manual.result((numbers // TILE, 1, length), jnp.float32, like)
