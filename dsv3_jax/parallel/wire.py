"""What a row is while it travels: its number format, and its parts as one run of bytes.

A format belongs to a direction. Tokens on their way to experts, and in the backward pass the
gradients of what came back, are "dispatched"; the results and the gradients of what was sent are
"combined". DeepSeek-V3 dispatches FP8 in 1x128 tiles and combines BF16 (V3 report, section 3.3.3).
At D = 7168 a dispatched row is 7168 values, 56 scales of one byte, and 6 bytes for each of its 8
experts: 7,272 bytes.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from dsv3_jax.quantization import logfmt
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled, dequantize, quantize

Format = Literal["none", "bf16", "fp8", "logfmt10"]
Parts = tuple[Array, ...]
Shapes = tuple[jax.ShapeDtypeStruct, ...]

_LOGFMT_BITS = 10
_MANTISSA_BITS = 23  # of f32


def encode(x: Float[Array, "R D"], form: Format) -> Parts:
    """The parts of x's rows on the wire, each [R, ...].

    fp8: E4M3 values and a byte for each scale, which is a power of two, so that quantising what
    arrives once more changes nothing. logfmt10: packed bytes; D must be a multiple of 16.
    """
    if form == "none":
        return (x,)
    if form == "bf16":
        return (x.astype(jnp.bfloat16),)
    if form == "logfmt10":
        return (logfmt.pack(logfmt.encode(x, _LOGFMT_BITS)),)
    assert form == "fp8"
    numbers = quantize(x, PER_TOKEN, "ue8m0")
    bits = lax.bitcast_convert_type(numbers.scales, jnp.int32)
    return numbers.values, (bits >> _MANTISSA_BITS).astype(jnp.uint8)


def decode(parts: Parts, form: Format, channels: int, dtype: Any) -> Float[Array, "R D"]:
    """The rows that `parts` stand for; a row of zero bytes is a row of zeros."""
    if form in ("none", "bf16"):
        return parts[0].astype(dtype)
    if form == "logfmt10":
        return logfmt.decode(logfmt.unpack(parts[0], channels, _LOGFMT_BITS), dtype)
    return dequantize(block_scaled(parts), dtype)


def block_scaled(parts: Parts) -> BlockScaled:
    """The numbers of an fp8 row as they are, without rounding or widening."""
    values, exponents = parts
    scales = lax.bitcast_convert_type(exponents.astype(jnp.int32) << _MANTISSA_BITS, jnp.float32)
    return BlockScaled(values, scales, PER_TOKEN)


def pack(parts: Parts) -> Array:
    """The parts of each row side by side as bytes, so that one collective moves them all.

    A single part stays as it is: XLA moves its own dtypes without a change of layout.
    """
    if len(parts) == 1:
        return parts[0]
    return jnp.concatenate([_to_bytes(part) for part in parts], axis=1)


def unpack(rows: Array, like: Parts | Shapes) -> Parts:
    """The parts that `pack` put together; `like` has their shapes, but for R, and dtypes."""
    if len(like) == 1:
        return (rows,)
    parts, start = [], 0
    for part in like:
        size = math.prod(part.shape[1:]) * part.dtype.itemsize
        parts.append(_from_bytes(rows[:, start : start + size], part.shape[1:], part.dtype))
        start += size
    return tuple(parts)


def row_bytes(parts: Parts | Shapes) -> int:
    """Bytes of one packed row."""
    return sum(math.prod(part.shape[1:]) * part.dtype.itemsize for part in parts)


def _to_bytes(x: Array) -> UInt8[Array, "R bytes"]:
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(x.shape[0], -1)


def _from_bytes(rows: UInt8[Array, "R bytes"], shape: tuple[int, ...], dtype) -> Array:
    size = jnp.dtype(dtype).itemsize
    if size > 1:
        shape = (*shape, size)
    return lax.bitcast_convert_type(rows.reshape(rows.shape[0], *shape), dtype)


def shapes_of(parts: Parts) -> Shapes:
    """Shapes and dtypes of the parts, without their numbers."""
    return jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype), parts)
