"""Fused quantisers on TPUs: what each one reads, and what it computes of a tile.

`tpu_tiles.py` is the machinery. RMSNorm's root is XLA's, which reads the tokens once for it; a
permutation quantises tokens once and then moves bytes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import tpu
from dsv3_jax.kernels.fused import tpu_tiles
from dsv3_jax.kernels.fused.tpu_tiles import (
    TILE,
    Matrix,
    OfChannels,
    OfTiles,
    OfTokens,
    Operand,
    quantize_tiles,
    turned_row,
)
from dsv3_jax.quantization.block_scaled import (
    PER_TOKEN,
    BlockScaled,
    ScaleFormat,
    scale_of_amax,
)


def quantize_rows(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32", *, used: Any = None
) -> BlockScaled:
    """x quantised per token; see `api.quantize_rows`."""
    (rows, channels), x = _require(x, whole_tokens=False)
    tokens, width = x.shape
    (out,) = quantize_tiles([Matrix(x)], _as_it_is, tokens, width, scale_format, used=used)
    scales = -(-channels // TILE)
    return BlockScaled(out.values[:rows, :channels], out.scales[:rows, :scales], PER_TOKEN)


def quantize_both_ways(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32", *, used: Any = None
) -> tuple[BlockScaled, ...]:
    """x quantised per token, and transposed and quantised along tokens, in one read; see `api`."""
    (tokens, channels), x = _require(x)
    inputs = ([Matrix(x)], _as_it_is, tokens, channels, scale_format)
    return quantize_tiles(*inputs, by_channel=True, used=used)


def quantize_blocks(
    x: Float[Array, "E N K"], scale_format: ScaleFormat = "f32"
) -> tuple[BlockScaled, BlockScaled]:
    """A stack of weights in tiles of 128 x 128, and transposed; see `api.quantize_blocks`."""
    if x.shape[1] % TILE or x.shape[2] % TILE:
        raise NotImplementedError(f"matrices {x.shape[1:]} must be whole tiles of {TILE}")
    return tpu_tiles.quantize_blocks(x, scale_format)


def quantize_transposed(
    x: Float[Array, "T D"] | BlockScaled, scale_format: ScaleFormat = "f32", *, used: Any = None
) -> BlockScaled:
    """x transposed and quantised along tokens; see `api.quantize_transposed`."""
    (tokens, channels), plain = _require(x)
    operands = _operands(plain)
    compute = _dequantized if isinstance(x, BlockScaled) else _as_it_is
    inputs = (operands, compute, tokens, channels, scale_format)
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
    tokens, width, gate_up, operands = _halves(gate_up, transposed)
    dtype = _rounded_to(gate_up)

    def activate(part, *loaded):
        gate, up = _gate_and_up(loaded)
        return (jax.nn.silu(gate) * up).astype(dtype).astype(jnp.float32)

    inputs = (operands, activate, -(-tokens // TILE) * TILE, width, scale_format)
    (out,) = quantize_tiles(*inputs, by_token=not transposed, by_channel=transposed, used=used)
    if transposed:
        return out
    return BlockScaled(out.values[:tokens], out.scales[:tokens], PER_TOKEN)


def swiglu_backward_quantize(
    gate_up: Float[Array, "T F2"] | BlockScaled,
    d_out: Float[Array, "T F"],
    scale_format: ScaleFormat = "f32",
    *,
    used: Any = None,
) -> tuple[BlockScaled, ...]:
    """The gradient of SwiGLU's input, quantised both ways; see `api.swiglu_backward_quantize`."""
    tokens, width, gate_up, operands = _halves(gate_up, True)
    dtype = _rounded_to(gate_up)

    def differentiate(part, *loaded):
        *halves, d_out = loaded
        gate, up = _gate_and_up(halves)
        sigmoid = jax.nn.sigmoid(gate)
        d_gate = d_out * up * sigmoid * (1 + gate * (1 - sigmoid))
        either = jnp.where(part == 0, d_gate, d_out * gate * sigmoid)
        return either.astype(dtype).astype(jnp.float32)

    inputs = ([*operands, Matrix(d_out)], differentiate, tokens, width, scale_format)
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
    (rows, channels), x = _require(x, whole_tokens=False)
    padded = [(0, size - was) for size, was in zip(x.shape, (rows, channels))]
    operands = [
        Matrix(x),
        OfTokens(jnp.pad(inverse_rms, padded[0])[None]),
        OfChannels(jnp.pad(weight.astype(jnp.float32), padded[1])[None]),
    ]

    def normalized(part, tile, inverse_rms, weight):
        return turned_row(inverse_rms, tile) * weight

    tokens, width = x.shape
    (out,) = quantize_tiles(operands, normalized, tokens, width, scale_format)
    scales = -(-channels // TILE)
    return BlockScaled(out.values[:rows, :channels], out.scales[:rows, :scales], PER_TOKEN)


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
        return [Matrix(x, first)]
    return [Matrix(x.values, first), OfTiles(x.scales.mT[:, None], first)]


def _rounded_to(gate_up: Any) -> Any:
    return jnp.bfloat16 if isinstance(gate_up, BlockScaled) else gate_up.dtype


def _halves(gate_up: Any, whole_tokens: bool) -> tuple[int, int, Any, list[Operand]]:
    """Tokens, channels of gate or of up, both as they came, and as operands of whole tiles."""
    width = gate_up.shape[1] // 2
    if width % TILE:
        raise NotImplementedError(f"halves of {width} channels must be whole tiles of {TILE}")
    (tokens, _), padded = _require(gate_up, whole_tokens)
    operands = [*_operands(padded), *_operands(padded, width // TILE)]
    return tokens, width, gate_up, operands


def _require(x: Any, whole_tokens: bool = True) -> tuple[tuple[int, int], Any]:
    """The shape of x, and x with zeros up to whole tiles, where a partial one may be."""
    tpu.require()
    rows, channels = x.shape
    short = (-rows % TILE, -channels % TILE)
    if whole_tokens and any(short):
        raise NotImplementedError(f"an input {x.shape} must be whole tiles of {TILE}")
    if not any(short):
        return (rows, channels), x
    if isinstance(x, BlockScaled):
        values = jnp.pad(x.values, ((0, short[0]), (0, short[1])))
        return (rows, channels), BlockScaled(
            values, jnp.pad(x.scales, ((0, short[0]), (0, 0))), x.tile
        )
    return (rows, channels), jnp.pad(x, ((0, short[0]), (0, short[1])))
