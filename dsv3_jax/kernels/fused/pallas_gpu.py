"""Fused quantisers on Hopper: what each one reads, and what it computes of it in registers.

`hopper_quantize.py` and `hopper_computed.py` are the machinery. What reads otherwise than by tiles
has kernels of its own: RMSNorm (`hopper_norm.py`), weights, and the permutation of tokens, whose
destinations are data, here.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.fused import hopper_norm
from dsv3_jax.kernels.fused.hopper_computed import quantize_computed
from dsv3_jax.kernels.fused.hopper_e5m6 import PackedRows, quantize_and_keep
from dsv3_jax.kernels.fused.hopper_gather import GatheredRows
from dsv3_jax.kernels.fused.hopper_quantize import (
    COMPILER_PARAMS,
    Piece,
    Source,
    Split,
    quantize_tiles,
    quantized,
)
from dsv3_jax.kernels.fused.hopper_registers import reciprocal, tokens_layout
from dsv3_jax.kernels.fused.hopper_router import route_top_k as route_top_k
from dsv3_jax.kernels.fused.hopper_weights import quantize_blocks as quantize_blocks
from dsv3_jax.kernels.hopper import plgpu
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled, ScaleFormat, scale_of_amax
from dsv3_jax.quantization.e5m6 import E5M6, PACKET

# The fastest of a sweep on one H100; what needs more registers a number takes fewer numbers.
ALONG_CHANNELS = Split(rows=32)
TWO_FORMATS = Split(rows=32)
ALONG_TOKENS = Split(turned=128)
BOTH_WAYS = Split(warpgroups=2, rows=64, turned=64)
GATHERED = Split(rows=64, turned=64, by_columns=True)
SWIGLU = Split(rows=8)
SWIGLU_TRANSPOSED = Split(warpgroups=2, rows=16, turned=64, staged=4)
SWIGLU_BACKWARD = Split(warpgroups=2, rows=16, turned=32)

FEWEST_ROWS = 8  # that a kernel takes: of tokens_layout, and of a block of RMSNorm
FREE_ROWS = 16  # that a block looks through for those without a token


def quantize_rows(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32", *, used: Any = None
) -> BlockScaled:
    """x quantised per token; see `api.quantize_rows`."""
    rows, x = x.shape[0], _filled(x)
    tokens, dim = _require(x)
    (out,) = quantize_tiles(PLAIN, (x,), tokens, dim, scale_format, ALONG_CHANNELS, used=used)
    return BlockScaled(out.values[:rows], out.scales[:rows], PER_TOKEN)


def quantize_rows_in_two_formats(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32"
) -> tuple[BlockScaled, E5M6]:
    """x quantised per token, and as E5M6, in one read; see `api`."""
    rows, x = x.shape[0], _filled(x)
    _require(x)
    out, kept = quantize_and_keep(x, scale_format, TWO_FORMATS.rows)
    kept = E5M6(kept.words[:rows], kept.scales[:rows])
    return BlockScaled(out.values[:rows], out.scales[:rows], PER_TOKEN), kept


def quantize_both_ways(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32", *, used: Any = None
) -> tuple[BlockScaled, ...]:
    """x quantised per token, and transposed and quantised along tokens, in one read; see `api`."""
    tokens, dim = _require(x, whole_tokens=True)
    inputs = (PLAIN, (x,), tokens, dim, scale_format)
    return quantize_tiles(*inputs, BOTH_WAYS, by_channel=True, used=used)


def gather_quantize_both_ways(
    x: Float[Array, "T D"],
    tokens: Int[Array, " M"],
    weights: Float[Array, " M"],
    scale_format: ScaleFormat = "f32",
    *,
    used: Any = None,
) -> tuple[BlockScaled, ...]:
    """Rows of x times weights, quantised as by `quantize_both_ways`; see `api`."""
    _, dim = _require(x)
    (rows,) = tokens.shape
    if rows % 128:
        raise NotImplementedError(f"{rows=} must be a multiple of the 128 of a scale")
    inputs = (GatheredRows(()), (x, tokens, weights), rows, dim, scale_format)
    return quantize_tiles(*inputs, GATHERED, by_channel=True, used=used)


def quantize_transposed(
    x: Float[Array, "T D"] | BlockScaled | E5M6,
    scale_format: ScaleFormat = "f32",
    *,
    used: Any = None,
) -> BlockScaled:
    """x transposed and quantised along tokens; see `api.quantize_transposed`."""
    if isinstance(x, E5M6):
        tokens, _, packets = x.words.shape
        numbers = jax.ShapeDtypeStruct((tokens, PACKET * packets), jnp.bfloat16)
        (tokens, dim), source, operands = _require(numbers, True), PACKED, (x.words, x.scales.mT)
    else:
        kept = isinstance(x, BlockScaled)
        tokens, dim = _require(x, True, jnp.float8_e4m3fn if kept else jnp.bfloat16)
        source, operands = (KEPT, _leaves(x)) if kept else (PLAIN, (x,))
    inputs = (source, operands, tokens, dim, scale_format)
    (out,) = quantize_tiles(*inputs, ALONG_TOKENS, by_token=False, by_channel=True, used=used)
    return out


def swiglu_quantize(
    gate_up: Float[Array, "T F2"] | BlockScaled,
    scale_format: ScaleFormat = "f32",
    *,
    transposed: bool = False,
    used: Any = None,
) -> BlockScaled:
    """silu(gate) x up, quantised per token, or transposed; see `api.swiglu_quantize`."""
    tokens, width, operands = _halves_of(gate_up, transposed)

    def activate(*loaded):
        gate, up = _gate_and_up(loaded)
        return ((gate * _sigmoid(gate) * up).astype(jnp.bfloat16),)

    source = Source(_gate_and_up_pieces(gate_up), activate)
    inputs = (source, operands, tokens, width, scale_format)
    if transposed:
        (out,) = quantize_computed(*inputs, SWIGLU_TRANSPOSED, by_token=False, used=used)
    else:
        (out,) = quantize_tiles(*inputs, SWIGLU, used=used)
    return out


def swiglu_backward_quantize(
    gate_up: Float[Array, "T F2"] | BlockScaled,
    d_out: Float[Array, "T F"],
    scale_format: ScaleFormat = "f32",
    *,
    used: Any = None,
) -> tuple[BlockScaled, ...]:
    """The gradient of SwiGLU's input, quantised both ways; see `api.swiglu_backward_quantize`."""
    tokens, width, operands = _halves_of(gate_up, True)
    _require(d_out, whole_tokens=True)

    def differentiate(*loaded):
        gate, up = _gate_and_up(loaded[:-1])
        sigmoid = _sigmoid(gate)
        d_activated = loaded[-1].astype(jnp.float32) * sigmoid
        d_gate = d_activated * up * (1 + (gate - gate * sigmoid))
        return d_gate.astype(jnp.bfloat16), (d_activated * gate).astype(jnp.bfloat16)

    pieces = (*_gate_and_up_pieces(gate_up), Piece(len(operands)))
    source = Source(pieces, differentiate)
    inputs = (source, (*operands, d_out), tokens, width, scale_format)
    return quantize_computed(*inputs, SWIGLU_BACKWARD, parts=2, used=used)


def rms_norm_quantize(
    x: Float[Array, "T D"],
    weight: Float[Array, " D"],
    eps: float,
    scale_format: ScaleFormat = "f32",
) -> BlockScaled:
    """x normalised and quantised per token, in one read; see `api.rms_norm_quantize`."""
    rows, x = x.shape[0], _filled(x)
    tokens, dim = _require(x)
    x, weight = manual.vary((x, weight.astype(jnp.float32)))
    if dim > hopper_norm.NARROW:
        values, scales = hopper_norm.of_wide_tokens(x, weight, eps, scale_format)
    else:
        values, scales = hopper_norm.of_narrow_tokens(x, weight, eps, scale_format)
    values, scales = manual.vary((values.reshape(tokens, dim), scales), x)
    return BlockScaled(values[:rows], scales.mT[:rows], PER_TOKEN)


def permute_quantize(
    x: Float[Array, "T D"],
    slots: Int[Array, "T K"],
    tokens: Int[Array, " M"],
    scale_format: ScaleFormat = "f32",
) -> BlockScaled:
    """x quantised per token, each token's numbers in its K rows; see `api.permute_quantize`.

    A block has a token, which it reads once and stores K times, or looks for rows that have none.
    Scales are written by token, a thousandth of the bytes, and copied to their rows by XLA: from
    here they would be single numbers scattered over memory.
    """
    num_tokens, dim = _require(x)
    if dim % hopper_norm.WHOLE_CHANNELS:
        raise NotImplementedError(f"{dim=} must be a multiple of {hopper_norm.WHOLE_CHANNELS}")
    per_token, tiles, layout = slots.shape[1], dim // 128, tokens_layout()
    num_rows = tokens.shape[0]
    x, slots, tokens = manual.vary((x, slots, tokens))

    def kernel(x_ref, slots_ref, tokens_ref, values, scales):
        block = lax.axis_index("block")

        @pl.when(block < num_tokens)
        def _():
            numbers, per_tile = quantized(
                plgpu.load(x_ref.at[block], layout=layout, optimized=False), scale_format
            )
            scales[block] = per_tile
            for k in range(per_token):
                values[slots_ref[block, k]] = numbers

        @pl.when(block >= num_tokens)
        def _():
            first = (block - num_tokens) * FREE_ROWS

            @pl.loop(0, FREE_ROWS)
            def _(i):
                row = lax.min(first + i, jnp.int32(num_rows - 1))

                @pl.when(tokens_ref[row] >= num_tokens)
                def _():
                    zeros = plgpu.layout_cast(jnp.zeros((tiles, 128), jnp.float32), layout)
                    values[row] = zeros.astype(jnp.float8_e4m3fn)

    values, scales = hopper.kernel(
        kernel,
        out_type=[
            manual.result((num_rows, tiles, 128), jnp.float8_e4m3fn, x),
            manual.result((num_tokens, tiles), jnp.float32, x),
        ],
        grid=(num_tokens + pl.cdiv(num_rows, FREE_ROWS),),
        grid_names=("block",),
        compiler_params=COMPILER_PARAMS,
    )(x.reshape(num_tokens, tiles, 128), slots, tokens)
    values, scales = manual.vary((values, scales), x)
    of_zeros = scale_of_amax(jnp.zeros((), jnp.float32), scale_format)
    scales = jnp.where(tokens < num_tokens, scales.mT[:, tokens], of_zeros)
    return BlockScaled(values.reshape(num_rows, dim), scales.mT, PER_TOKEN)


def _dequantized(values: Any, scale: Any) -> Any:
    return values.astype(jnp.float32) * lax.broadcast_in_dim(scale, values.shape, [0])


NUMBERS, VALUES_AND_SCALES = (Piece(0),), (Piece(0), Piece(1, scales=True))
PLAIN = Source(NUMBERS)
KEPT = Source(VALUES_AND_SCALES, lambda *kept: (_dequantized(*kept),))
PACKED = PackedRows(VALUES_AND_SCALES[1:])


def _gate_and_up_pieces(gate_up: Any) -> tuple[Piece, ...]:
    """What `_gate_and_up` makes numbers of: up lies behind gate."""
    pieces = VALUES_AND_SCALES if isinstance(gate_up, BlockScaled) else NUMBERS
    return (*pieces, *(replace(piece, first=gate_up.shape[1] // 2) for piece in pieces))


def _gate_and_up(loaded: Sequence[Any]) -> list[Any]:
    """Gate and up in float32."""
    if len(loaded) == 2:
        return [x.astype(jnp.float32) for x in loaded]
    return [_dequantized(*loaded[:2]), _dequantized(*loaded[2:])]


def _halves_of(gate_up: Any, whole_tokens: bool) -> tuple[int, int, tuple[Any, ...]]:
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
    return reciprocal(1 + jnp.exp(-x))


def _filled(x: Any) -> Any:
    """x with zeros up to the rows that a block takes at least."""
    return jnp.pad(x, ((0, max(FEWEST_ROWS - x.shape[0], 0)), (0, 0)))


def _require(x: Any, whole_tokens: bool = False, dtype: Any = jnp.bfloat16) -> tuple[int, int]:
    hopper.require()
    tokens, dim = x.shape
    if x.dtype != dtype:
        raise NotImplementedError(f"the input must be {jnp.dtype(dtype)}, and is {x.dtype}")
    if tokens < FEWEST_ROWS or dim % 128:
        raise NotImplementedError(
            f"{tokens=} must be at least {FEWEST_ROWS}, and {dim=} a multiple of 128"
        )
    if whole_tokens and tokens % 128:
        raise NotImplementedError(f"{tokens=} must be a multiple of the 128 of a scale")
    return tokens, dim
