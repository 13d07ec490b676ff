"""Fused quantisers on TPUs: what each one reads, and what it computes of a tile.

`tpu_tiles.py` is the machinery. RMSNorm's root is XLA's, which reads the tokens once for it; a
permutation quantises tokens once and then moves bytes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import tpu
from dsv3_jax.kernels.fused import tpu_tiles
from dsv3_jax.kernels.fused.reference import rounded_to, swiglu_gradients, weighted_rows
from dsv3_jax.kernels.fused.tpu_tiles import (
    TILE,
    Operand,
    matrix,
    of_channels,
    of_tiles,
    of_tokens,
    quantize_tiles,
    turned_row,
)
from dsv3_jax.quantization import e5m6
from dsv3_jax.quantization.block_scaled import (
    PER_TOKEN,
    BlockScaled,
    ScaleFormat,
    scale_of_amax,
)
from dsv3_jax.quantization.e5m6 import E5M6


def quantize_rows(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32", *, used: Any = None
) -> BlockScaled:
    """x quantised per token; see `api.quantize_rows`."""
    return _per_token([matrix(_filled(x))], _as_it_is, x.shape, scale_format, used)


def quantize_rows_in_two_formats(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32"
) -> tuple[BlockScaled, E5M6]:
    """x quantised per token, and as E5M6, which XLA makes; see `api`."""
    return quantize_rows(x, scale_format), e5m6.encode(x)


def quantize_both_ways(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32", *, used: Any = None
) -> tuple[BlockScaled, ...]:
    """x quantised per token, and transposed and quantised along tokens, in one read; see `api`."""
    _require(x)
    inputs = ([matrix(x)], _as_it_is, x.shape[0], x.shape[1], scale_format)
    return quantize_tiles(*inputs, by_channel=True, used=used)


def gather_quantize_both_ways(
    x: Float[Array, "T D"],
    tokens: Int[Array, " M"],
    weights: Float[Array, " M"],
    scale_format: ScaleFormat = "f32",
    *,
    used: Any = None,
) -> tuple[BlockScaled, ...]:
    """Rows of x times weights, which XLA gathers, quantised both ways; see `api`."""
    return quantize_both_ways(weighted_rows(x, tokens, weights), scale_format, used=used)


def quantize_blocks(
    x: Float[Array, "E N K"], scale_format: ScaleFormat = "f32"
) -> tuple[BlockScaled, BlockScaled]:
    """A stack of weights in tiles of 128 x 128, and transposed; see `api.quantize_blocks`."""
    if x.shape[1] % TILE or x.shape[2] % TILE:
        raise NotImplementedError(f"matrices {x.shape[1:]} must be whole tiles of {TILE}")
    return tpu_tiles.quantize_blocks(x, scale_format)


def quantize_transposed(
    x: Float[Array, "T D"] | BlockScaled | E5M6,
    scale_format: ScaleFormat = "f32",
    *,
    used: Any = None,
) -> BlockScaled:
    """x transposed and quantised along tokens; see `api.quantize_transposed`."""
    if isinstance(x, E5M6):
        x = e5m6.decode(x)  # by XLA
    _require(x)
    compute = _dequantized if isinstance(x, BlockScaled) else _as_it_is
    inputs = (_operands(x), compute, x.shape[0], x.shape[1], scale_format)
    (out,) = quantize_tiles(*inputs, by_token=False, by_channel=True, used=used)
    return out


def swiglu_quantize(
    gate_up: Float[Array, "T F2"] | BlockScaled,
    scale_format: ScaleFormat = "f32",
    *,
    transposed: bool = False,
    used: Any = None,
) -> BlockScaled:
    """silu(gate) x up, quantised per token, or transposed; see `api.swiglu_quantize`."""
    if transposed:
        _require(gate_up)
    shape, operands = _halves(gate_up)
    dtype = rounded_to(gate_up)

    def activate(part, *loaded):
        gate, up = _gate_and_up(loaded)
        return (jax.nn.silu(gate) * up).astype(dtype).astype(jnp.float32)

    if not transposed:
        return _per_token(operands, activate, shape, scale_format, used)
    inputs = (operands, activate, *shape, scale_format)
    (out,) = quantize_tiles(*inputs, by_token=False, by_channel=True, used=used)
    return out


def swiglu_backward_quantize(
    gate_up: Float[Array, "T F2"] | BlockScaled,
    d_out: Float[Array, "T F"],
    scale_format: ScaleFormat = "f32",
    *,
    used: Any = None,
) -> tuple[BlockScaled, ...]:
    """The gradient of SwiGLU's input, quantised both ways; see `api.swiglu_backward_quantize`."""
    _require(gate_up)
    shape, operands = _halves(gate_up)
    dtype = rounded_to(gate_up)

    def differentiate(part, *loaded):
        *halves, d_out = loaded
        gate, up = _gate_and_up(halves)
        d_gate, d_up = swiglu_gradients(gate, up, d_out)
        either = jnp.where(part == 0, d_gate, d_up)
        return either.astype(dtype).astype(jnp.float32)

    inputs = ([*operands, matrix(d_out)], differentiate, *shape, scale_format)
    return quantize_tiles(*inputs, parts=2, by_channel=True, used=used)


def rms_norm_quantize(
    x: Float[Array, "T D"],
    weight: Float[Array, " D"],
    eps: float,
    scale_format: ScaleFormat = "f32",
) -> BlockScaled:
    """x over its root mean square, times weight, quantised per token; see `api`."""
    wide = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1) + eps)
    tokens, channels = (_filled(row[None], rows=1) for row in (inverse_rms, weight))
    operands = [
        matrix(_filled(x)),
        of_tokens(tokens),
        of_channels(channels.astype(jnp.float32)),
    ]

    def normalized(part, tile, inverse_rms, weight):
        return turned_row(inverse_rms, tile) * weight

    return _per_token(operands, normalized, x.shape, scale_format)


def permute_quantize(
    x: Float[Array, "T D"],
    slots: Int[Array, "T K"],
    tokens: Int[Array, " M"],
    scale_format: ScaleFormat = "f32",
) -> BlockScaled:
    """x quantised per token, each token's numbers in its K rows; see `api.permute_quantize`."""
    del slots  # the same as tokens, seen from the other side
    once = quantize_rows(x, scale_format)
    values = jnp.take(once.values, tokens, axis=0, mode="fill", fill_value=0)
    scales = jnp.take(once.scales, tokens, axis=0, mode="clip")
    of_zeros = scale_of_amax(jnp.zeros_like(scales), scale_format)
    return BlockScaled(values, jnp.where(tokens[:, None] < len(x), scales, of_zeros), PER_TOKEN)


def _as_it_is(part: Any, tile: Any) -> Any:
    return tile


def _dequantized(part: Any, tile: Any, scales: Any) -> Any:
    return turned_row(scales, tile)


def _gate_and_up(loaded: Any) -> list[Any]:
    """Gate and up of a tile: each plain, or FP8 numbers and their scales."""
    if len(loaded) == 2:
        return list(loaded)
    return [turned_row(scales, tile) for tile, scales in (loaded[:2], loaded[2:])]


def _operands(x: Any, first: int = 0) -> list[Operand]:
    """x as operands from tile `first` of its channels on."""
    if not isinstance(x, BlockScaled):
        return [matrix(x, first)]
    return [matrix(x.values, first), of_tiles(x.scales.mT[:, None], first)]


def _halves(gate_up: Any) -> tuple[tuple[int, int], list[Operand]]:
    """Tokens and channels of gate or of up, and both as operands of whole tiles."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    if width % TILE:
        raise NotImplementedError(f"halves of {width} channels must be whole tiles of {TILE}")
    filled = jax.tree.map(partial(_filled, channels=1), gate_up)
    return (tokens, width), [*_operands(filled), *_operands(filled, width // TILE)]


def _per_token(
    operands: list[Operand], compute: Any, shape: Any, scale_format: ScaleFormat, used: Any = None
) -> BlockScaled:
    """`quantize_tiles` per token of whole tiles, cut to this many tokens and channels."""
    tokens, channels = shape
    rows, scales = -(-tokens // TILE), -(-channels // TILE)
    size = rows * TILE, scales * TILE
    (out,) = quantize_tiles(operands, compute, size[0], size[1], scale_format, used=used)
    return BlockScaled(out.values[:tokens, :channels], out.scales[:tokens, :scales], PER_TOKEN)


def _filled(x: Any, rows: int = TILE, channels: int = TILE) -> Any:
    """x with zeros up to whole tiles of so many rows and channels."""
    short = [(0, -size % tile) for size, tile in zip(x.shape, (rows, channels))]
    return jnp.pad(x, short) if any(size for _, size in short) else x


def _require(x: Any) -> None:
    """Raises NotImplementedError unless x is whole tiles, and for a TPU."""
    tpu.require()
    if x.shape[0] % TILE or x.shape[1] % TILE:
        raise NotImplementedError(f"an input {x.shape} must be whole tiles of {TILE}")
