"""Fused quantisers on Hopper: what each one reads, and what it computes of it in registers.

`hopper_quantize.py` is the machinery; only RMSNorm, whose token is more than one tile, has a kernel
of its own here, and so has the permutation of tokens, whose destinations are data.
"""

import math
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import manual
from dsv3_jax.kernels.fused.hopper_quantize import (
    COMPILER_PARAMS,
    Split,
    quantize_tiles,
    quantized,
    tokens_layout,
)
from dsv3_jax.kernels.fused.hopper_router import route_top_k as route_top_k
from dsv3_jax.kernels.gemm import hopper
from dsv3_jax.kernels.gemm.hopper import plgpu
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled, ScaleFormat

NORM_TOKENS = 8  # of a block of RMSNorm
# The fastest of a sweep on one H100; what needs more registers a number takes fewer numbers.
ALONG_CHANNELS = Split(rows=32)
ALONG_TOKENS = Split(turned=64)
BOTH_WAYS = Split(warpgroups=2, rows=32, turned=64)
SWIGLU = Split(rows=16)
SWIGLU_BACKWARD = Split(turned=64)

NORM_WARPGROUPS = 2  # that share a token's channels
NORM_TILES = 2  # of a warpgroup that are loaded while as many are quantised

PERMUTED_CHANNELS = 1024  # that the threads of a block read at a time


def quantize_rows(x: Float[Array, "T D"], scale_format: ScaleFormat = "f32") -> BlockScaled:
    """x quantised per token; see `api.quantize_rows`."""
    rows = x.shape[0]
    x = jnp.pad(x, ((0, max(8 - rows, 0)), (0, 0)))
    tokens, dim = _require(x)
    (out,) = quantize_tiles(_plain, (x,), tokens, dim, scale_format, ALONG_CHANNELS)
    return BlockScaled(out.values[:rows], out.scales[:rows], PER_TOKEN)


def quantize_both_ways(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32"
) -> tuple[BlockScaled, ...]:
    """x quantised per token, and transposed and quantised along tokens, in one read; see `api`."""
    tokens, dim = _require(x, whole_tokens=True)
    return quantize_tiles(_plain, (x,), tokens, dim, scale_format, BOTH_WAYS, by_channel=True)


def quantize_transposed(
    x: Float[Array, "T D"] | BlockScaled, scale_format: ScaleFormat = "f32"
) -> BlockScaled:
    """x transposed and quantised along tokens; see `api.quantize_transposed`."""
    scaled = isinstance(x, BlockScaled)
    tokens, dim = _require(x, True, jnp.float8_e4m3fn if scaled else jnp.bfloat16)

    operands = _leaves(x) if scaled else (x,)

    def source(refs, rows, columns, layout):
        if scaled:
            return (_dequantized(refs, rows, columns, layout),)
        return _plain(refs, rows, columns, layout)

    (out,) = quantize_tiles(
        source, operands, tokens, dim, scale_format, ALONG_TOKENS, by_token=False, by_channel=True
    )
    return out


def swiglu_quantize(
    gate_up: Float[Array, "T 2*F"] | BlockScaled,
    scale_format: ScaleFormat = "f32",
    *,
    transposed: bool = False,
) -> BlockScaled:
    """silu(gate) x up, quantised per token, or transposed; see `api.swiglu_quantize`."""
    tokens, width, operands = _gate_and_up(gate_up, transposed)

    def source(refs, rows, columns, layout):
        gate, up = _load_gate_and_up(refs, rows, columns, layout, width)
        return ((gate * _sigmoid(gate) * up).astype(jnp.bfloat16),)

    (out,) = quantize_tiles(
        source,
        operands,
        tokens,
        width,
        scale_format,
        ALONG_TOKENS if transposed else SWIGLU,
        by_token=not transposed,
        by_channel=transposed,
    )
    return out


def swiglu_backward_quantize(
    gate_up: Float[Array, "T 2*F"] | BlockScaled,
    d_out: Float[Array, "T F"],
    scale_format: ScaleFormat = "f32",
) -> tuple[BlockScaled, ...]:
    """The gradient of SwiGLU's input, quantised both ways; see `api.swiglu_backward_quantize`."""
    tokens, width, operands = _gate_and_up(gate_up, True)
    _require(d_out, whole_tokens=True)

    def source(refs, rows, columns, layout):
        *refs, d_ref = refs
        gate, up = _load_gate_and_up(refs, rows, columns, layout, width)
        d_out = _load(d_ref, rows, columns, layout)
        sigmoid = _sigmoid(gate)
        d_gate = d_out * up * sigmoid * (1 + gate * (1 - sigmoid))
        return d_gate.astype(jnp.bfloat16), (d_out * gate * sigmoid).astype(jnp.bfloat16)

    return quantize_tiles(
        source,
        (*operands, d_out),
        tokens,
        width,
        scale_format,
        SWIGLU_BACKWARD,
        parts=2,
        by_channel=True,
    )


def rms_norm_quantize(
    x: Float[Array, "T D"],
    weight: Float[Array, " D"],
    eps: float,
    scale_format: ScaleFormat = "f32",
) -> BlockScaled:
    """x normalised and quantised per token, in one read; see `api.rms_norm_quantize`.

    A token's root mean square is the same for all its tiles, so it cancels between a number and its
    tile's largest: the values need none, and the scales are divided by it at the token's end.
    """
    tokens, dim = _require(x)
    if scale_format != "f32":
        raise NotImplementedError("a power of two divided by a root mean square is none")
    x, weight = manual.vary((x, weight))
    tiles, layout = dim // 128, tokens_layout()
    warpgroups = math.gcd(tiles, NORM_WARPGROUPS)
    each = tiles // warpgroups
    batch = math.gcd(each, NORM_TILES)

    def kernel(x_ref, weight_ref, values, scales, token_scales, sums, summed):
        warpgroup = lax.axis_index("warpgroup")
        row = lax.min(lax.axis_index("block") * NORM_TOKENS, jnp.int32(tokens - NORM_TOKENS))
        rows = pl.ds(row, NORM_TOKENS)

        def columns_of(group):
            """The tiles of a group and their columns."""
            first = warpgroup * each + group * batch
            return [(first + i, pl.ds((first + i) * 128, 128)) for i in range(batch)]

        def loaded(group):
            return tuple(
                plgpu.load(x_ref.at[rows, columns], layout=layout, optimized=False)
                for _, columns in columns_of(group)
            )

        def quantize_group(group, blocks, squares):
            for (tile, columns), block in zip(columns_of(group), blocks):
                block = block.astype(jnp.float32)
                squares += block * block
                weights = weight_ref.at[columns]
                weights = plgpu.load(weights, layout=layout.reduce(0), optimized=False)
                weighted = block * lax.broadcast_in_dim(weights, block.shape, [1])
                values[rows, columns], token_scales[tile, :] = quantized(weighted, "f32")
            return squares

        def one_group(group, carry):
            blocks, squares = carry
            following = loaded(group + 1)  # on their way while these are quantised
            return following, quantize_group(group, blocks, squares)

        squares = plgpu.layout_cast(jnp.zeros((NORM_TOKENS, 128), jnp.float32), layout)
        last = each // batch - 1
        blocks, squares = lax.fori_loop(0, last, one_group, (loaded(0), squares))
        squares = quantize_group(last, blocks, squares)
        sums[warpgroup, :] = jnp.sum(squares, axis=1)
        plgpu.barrier_arrive(summed)
        plgpu.barrier_wait(summed)
        by_token = layout.reduce(1)
        total = sum(
            plgpu.load(sums.at[i], layout=by_token, optimized=False) for i in range(warpgroups)
        )
        inverse_rms = lax.rsqrt(total / dim + eps)

        @pl.loop(0, each)
        def _(i):
            # A thread reads back what it has written itself.
            tile = warpgroup * each + i
            scale = plgpu.load(token_scales.at[tile], layout=by_token, optimized=False)
            scales[tile, rows] = scale * inverse_rms

    values, scales = plgpu.kernel(
        kernel,
        out_type=[
            manual.result((tokens, dim), jnp.float8_e4m3fn, x),
            manual.result((tiles, tokens), jnp.float32, x),
        ],
        grid=(pl.cdiv(tokens, NORM_TOKENS),),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((tiles, NORM_TOKENS), jnp.float32),
            plgpu.SMEM((warpgroups, NORM_TOKENS), jnp.float32),
            plgpu.Barrier(num_arrivals=warpgroups),
        ),
        compiler_params=COMPILER_PARAMS,
    )(x, weight.astype(jnp.float32))
    values, scales = manual.vary((values, scales), x)
    return BlockScaled(values, scales.mT, PER_TOKEN)


def permute_quantize(
    x: Float[Array, "T D"],
    slots: Int[Array, "T K"],
    num_rows: int,
    scale_format: ScaleFormat = "f32",
) -> BlockScaled:
    """x quantised per token, each token's numbers in its K rows; see `api.permute_quantize`.

    A block has a token, which it reads once and stores K times, or a row that no token is sent to.
    """
    tokens, dim = _require(x)
    if dim % PERMUTED_CHANNELS:
        raise NotImplementedError(f"{dim=} must be a multiple of {PERMUTED_CHANNELS}")
    per_token, tiles, layout = slots.shape[1], dim // 128, tokens_layout()
    num_free = num_rows - tokens * per_token
    x, slots = manual.vary((x, slots))
    taken = jnp.zeros(num_rows, bool).at[slots.reshape(-1)].set(True, unique_indices=True)
    free = jnp.nonzero(~taken, size=max(num_free, 1), fill_value=0)[0].astype(jnp.int32)

    def kernel(x_ref, slots_ref, free_ref, values, scales):
        block = lax.axis_index("block")

        def store(row, numbers, per_tile):
            values[row] = numbers
            scales[:, row] = per_tile

        @pl.when(block < tokens)
        def _():
            out = quantized(
                plgpu.load(x_ref.at[block], layout=layout, optimized=False), scale_format
            )
            for k in range(per_token):
                store(slots_ref[block, k], *out)

        @pl.when(block >= tokens)
        def _():
            zeros = plgpu.layout_cast(jnp.zeros((tiles, 128), jnp.float32), layout)
            store(free_ref[block - tokens], *quantized(zeros, scale_format))

    values, scales = plgpu.kernel(
        kernel,
        out_type=[
            manual.result((num_rows, tiles, 128), jnp.float8_e4m3fn, x),
            manual.result((tiles, num_rows), jnp.float32, x),
        ],
        grid=(tokens + num_free,),
        grid_names=("block",),
        compiler_params=COMPILER_PARAMS,
    )(x.reshape(tokens, tiles, 128), slots, free)
    values, scales = manual.vary((values, scales), x)
    return BlockScaled(values.reshape(num_rows, dim), scales.mT, PER_TOKEN)


def _plain(refs, rows, columns, layout):
    return (plgpu.load(refs[0].at[rows, columns], layout=layout, optimized=False),)


def _load(ref: Any, rows: Any, columns: Any, layout: Any) -> Any:
    return plgpu.load(ref.at[rows, columns], layout=layout, optimized=False).astype(jnp.float32)


def _dequantized(refs: Any, rows: Any, columns: Any, layout: Any) -> Any:
    """Numbers of a BlockScaled in 1x128 tiles, of which `refs` are values and scales."""
    values, scales = refs
    x = _load(values, rows, columns, layout)
    tile = lax.div(columns.start, jnp.int32(128))
    scale = plgpu.load(scales.at[tile, rows], layout=layout.reduce(1), optimized=False)
    return x * lax.broadcast_in_dim(scale, x.shape, [0])


def _load_gate_and_up(refs, rows, columns, layout, width: int):
    spans = [pl.ds(columns.start + first, columns.size) for first in (0, width)]
    if len(refs) == 1:
        return [_load(refs[0], rows, span, layout) for span in spans]
    # What a bfloat16 array between the two operations would hold.
    numbers = [_dequantized(refs, rows, span, layout) for span in spans]
    return [x.astype(jnp.bfloat16).astype(jnp.float32) for x in numbers]


def _gate_and_up(gate_up: Any, whole_tokens: bool) -> tuple[int, int, tuple[Any, ...]]:
    """Tokens, width of each half and the arrays of SwiGLU's input, after checks."""
    scaled = isinstance(gate_up, BlockScaled)
    dtype = jnp.float8_e4m3fn if scaled else jnp.bfloat16
    tokens, width = _require(gate_up, whole_tokens, dtype)
    if width % 256:
        raise NotImplementedError(f"half of {width} channels must be a multiple of 128")
    return tokens, width // 2, _leaves(gate_up) if scaled else (gate_up,)


def _leaves(x: BlockScaled) -> tuple[Any, Any]:
    return x.values, x.scales.mT


def _sigmoid(x: Any) -> Any:
    """The square of 1 / sqrt(1 + exp(-x)): two fast instructions, where a division takes ten."""
    return jnp.square(lax.rsqrt(1 + jnp.exp(-x)))


def _require(x: Any, whole_tokens: bool = False, dtype: Any = jnp.bfloat16) -> tuple[int, int]:
    hopper.require()
    tokens, dim = x.shape
    if x.dtype != dtype:
        raise NotImplementedError(f"the input must be {jnp.dtype(dtype)}, and is {x.dtype}")
    if tokens < 8 or dim % 128:
        raise NotImplementedError(f"{tokens=} must be at least 8, and {dim=} a multiple of 128")
    if whole_tokens and tokens % 128:
        raise NotImplementedError(f"{tokens=} must be a multiple of the 128 of a scale")
    return tokens, dim
