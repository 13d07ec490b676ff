"""Fused quantisers on Hopper, in Pallas Mosaic GPU.

Memory is the only limit: 2 bytes in and 1 out for each number. Tiles of 64 or 128 tokens by 128
channels stream through a ring of TMA slots, several blocks to a multiprocessor; a warpgroup holds
one tile in registers, in the layout of a wgmma operand, where a token's 128 channels are spread
over four lanes and their largest magnitude is two shuffles away.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.kernels.gemm import hopper
from dsv3_jax.kernels.gemm.hopper import WGMMA, plgpu, swizzled
from dsv3_jax.quantization.block_scaled import (
    E4M3_MAX,
    PER_TOKEN,
    BlockScaled,
    ScaleFormat,
    scale_of_amax,
)

BLOCKS_EACH = 3  # blocks a multiprocessor: their loads, arithmetic and stores overlap
LARGEST_FINITE = 3.4028235e38


def quantize_rows(x: Float[Array, "T D"], scale_format: ScaleFormat = "f32") -> BlockScaled:
    """x quantised per token; see `api.quantize_rows`."""
    tokens, dim = x.shape
    _require(x, tokens, dim)

    def body(block, values, scales):
        values[...], scales[...] = _quantized(_load(block), scale_format)

    values, scales = _stream(body, (x,), _by_row(tokens, dim), (tokens, dim // 128))
    return BlockScaled(values, scales.mT, PER_TOKEN)


def swiglu_quantize(
    gate_up: Float[Array, "T 2*F"], scale_format: ScaleFormat = "f32"
) -> BlockScaled:
    """silu(gate) x up, quantised per token; see `api.swiglu_quantize`."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    _require(gate_up, tokens, width)

    def body(gate, up, values, scales):
        gate = _load(gate)
        y = gate / (1 + jnp.exp(-gate)) * _load(up)
        y = y.astype(gate_up.dtype).astype(jnp.float32)  # what an unfused product would hold
        values[...], scales[...] = _quantized(y, scale_format)

    values, scales = _stream(
        body, (gate_up, gate_up), _by_row(tokens, width), (tokens, width // 128)
    )
    return BlockScaled(values, scales.mT, PER_TOKEN)


def rms_norm_quantize(
    x: Float[Array, "T D"],
    weight: Float[Array, " D"],
    eps: float,
    scale_format: ScaleFormat = "f32",
) -> BlockScaled:
    """x normalised and quantised per token, in one read; see `api.rms_norm_quantize`.

    A token's root mean square is the same for all its tiles, so it cancels between a number and its
    tile's largest: the values need none, and the scales are divided by it afterwards.
    """
    tokens, dim = x.shape
    _require(x, tokens, dim)
    if scale_format != "f32":
        raise NotImplementedError("a power of two divided by a root mean square is none")

    def body(block, values, scales, squares, weight):
        block = _load(block)
        squares[...] = jnp.sum(block * block, axis=1)
        weight = plgpu.load(weight, layout=WGMMA.reduce(0), optimized=False)
        weighted = block * lax.broadcast_in_dim(weight, block.shape, [1])
        values[...], scales[...] = _quantized(weighted, scale_format)

    per_tile = _Output((dim // 128, tokens), jnp.float32, (64,), lambda r, c: (c, r * 64))
    values, scales, squares = _stream(
        body,
        (x,),
        [*_by_row(tokens, dim), per_tile],
        (tokens, dim // 128),
        by_column=(weight.astype(jnp.float32),),
    )
    scales = scales * lax.rsqrt(squares.sum(0, keepdims=True) / dim + eps)
    return BlockScaled(values, scales.mT, PER_TOKEN)


def quantize_both_ways(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32"
) -> tuple[BlockScaled, BlockScaled]:
    """x quantised per token, and transposed and quantised along tokens, in one read; see `api`."""
    tokens, dim = x.shape
    _require(x, tokens, dim)
    if tokens % 128:
        raise NotImplementedError(f"{tokens=} must be a multiple of the 128 of a scale")

    def body(block, values, scales, turned, turned_scales):
        values[...], scales[...] = _quantized(_load(block), scale_format)
        for half in range(2):  # of the channels: 128 x 128 numbers twice are too many registers
            channels = pl.ds(64 * half, 64)
            columns = plgpu.load(block.T.at[channels], layout=WGMMA, optimized=False)
            turned[channels], turned_scales[channels] = _quantized(
                columns.astype(jnp.float32), scale_format
            )

    outputs = [
        *_by_row(tokens, dim, rows=128),
        _Output((dim, tokens), jnp.float8_e4m3fn, (128, 128), lambda r, c: (c * 128, r * 128)),
        _Output((tokens // 128, dim), jnp.float32, (128,), lambda r, c: (r, c * 128)),
    ]
    values, scales, turned, turned_scales = _stream(
        body, (x,), outputs, (tokens, dim // 128), rows=128
    )
    return (
        BlockScaled(values, scales.mT, PER_TOKEN),
        BlockScaled(turned, turned_scales.mT, PER_TOKEN),
    )


class _Output(NamedTuple):
    """An array that tiles are stored to: its shape, a tile's, and where tile (row, column) goes."""

    shape: tuple[int, int]
    dtype: Any
    tile: tuple[int, ...]
    start: Callable[[Any, Any], tuple[Any, Any]]

    @property
    def slots(self) -> Any:
        """Two buffers for tiles on their way to memory."""
        transforms = swizzled(self.dtype) if len(self.tile) == 2 else ()
        return plgpu.SMEM((2, *self.tile), self.dtype, transforms=transforms)

    def store(self, slot: Any, out: Any, row: Any, column: Any) -> None:
        """Sends a tile; the caller commits."""
        first, second = self.start(row, column)
        index = (pl.ds(first, self.tile[0]), pl.ds(second, self.tile[-1]))
        target = out.at[index if len(self.tile) == 2 else (first, index[1])]
        plgpu.copy_smem_to_gmem(slot, target, commit_group=False)


def _by_row(tokens: int, dim: int, rows: int = 64) -> list[_Output]:
    """Values per token and their scales, rows last."""
    return [
        _Output((tokens, dim), jnp.float8_e4m3fn, (rows, 128), lambda r, c: (r * rows, c * 128)),
        _Output((dim // 128, tokens), jnp.float32, (rows,), lambda r, c: (c, r * rows)),
    ]


def _load(block: Any) -> Any:
    return plgpu.load(block, layout=WGMMA).astype(jnp.float32)


def _quantized(x, scale_format: ScaleFormat):
    """E4M3 values and per-row scales of a tile in registers, by the rules of `quantize`."""
    finite = jnp.abs(x) <= LARGEST_FINITE
    amax = jnp.max(jnp.where(finite, jnp.abs(x), 0.0), axis=1)
    scale = scale_of_amax(amax, scale_format)
    scaled = x * lax.broadcast_in_dim(1.0 / scale, x.shape, [0])
    scaled = jnp.minimum(jnp.maximum(scaled, -E4M3_MAX), E4M3_MAX)
    return jnp.where(finite, scaled, jnp.nan).astype(jnp.float8_e4m3fn), scale


def _stream(
    body: Callable[..., None],
    operands: Sequence[Any],
    outputs: Sequence[_Output],
    grid: tuple[int, int],
    rows: int = 64,
    by_column: Sequence[Any] = (),
) -> Sequence[Any]:
    """Runs `body` on every tile of `rows` by 128 channels; `grid` is tokens, then column tiles.

    Operand i is read `i` times the width to the right, so that one array may be given twice. The
    body gets the operands' tiles, the outputs' and, of each vector in `by_column`, 128 numbers.
    """
    column_tiles = grid[1]
    total = pl.cdiv(grid[0], rows) * column_tiles
    blocks = min(BLOCKS_EACH * hopper.multiprocessors(), total)

    def kernel(*refs):
        sources, refs = refs[: len(operands)], refs[len(operands) :]
        vectors, refs = refs[: len(by_column)], refs[len(by_column) :]
        outs, slots = refs[: len(outputs)], refs[len(outputs) :]

        def tile_of(step):
            # The last step of some blocks has no tile left; they repeat one.
            index = lax.min(step * blocks + lax.axis_index("block"), jnp.int32(total - 1))
            return lax.div(index, jnp.int32(column_tiles)), lax.rem(index, jnp.int32(column_tiles))

        def source_tile(step, which):
            row, column = tile_of(step)
            return row, column + which * column_tiles

        def one_tile(indices, *blocks_):
            (step,) = indices
            buffers = [slot.at[lax.rem(step, jnp.int32(2))] for slot in slots]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            row, column = tile_of(step)
            body(*blocks_, *buffers, *(vector.at[pl.ds(column * 128, 128)] for vector in vectors))
            plgpu.commit_smem()
            for output, buffer, out in zip(outputs, buffers, outs):
                output.store(buffer, out, row, column)
            plgpu.commit_smem_to_gmem_group()

        plgpu.emit_pipeline(
            one_tile,
            grid=(pl.cdiv(total, blocks),),
            in_specs=[
                plgpu.BlockSpec(
                    (rows, 128),
                    functools.partial(source_tile, which=which),
                    transforms=swizzled(operand.dtype),
                )
                for which, operand in enumerate(operands)
            ],
            max_concurrent_steps=2,
        )(*sources)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct(output.shape, output.dtype) for output in outputs),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=tuple(output.slots for output in outputs),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands, *by_column)


def _require(x: Array, tokens: int, dim: int) -> None:
    hopper.require()
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the input must be bfloat16, and is {x.dtype}")
    if tokens % 8 or dim % 128:
        raise NotImplementedError(f"{tokens=} must be a multiple of 8, and {dim=} of 128")
