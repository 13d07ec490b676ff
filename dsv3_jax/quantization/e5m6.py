"""E5M6: 12 bits of a float16, eight numbers in three words, with a power-of-two scale for 128.

DeepSeek-V3 keeps the input of the projection after attention in it from the forward to the backward
pass (V3 report, section 3.3.3). The encoding is that of deepseek-ai/TileKernels
(tile_kernels/torch/cast_e5m6.py): a sign, five exponent bits of bias 15, six fraction bits, so the
upper 12 bits of a float16; largest number 65,024; codes packed from the upper bits of a word down.
Scales there are one a token; here one for 128 channels of it, as the report's tiles are. And all
first words of eight numbers lie together, then all second ones, as threads of a GPU write them.

Numbers are rounded to nearest even also where float16 is subnormal, below 2^-29 of a group's
largest; TileKernels, which cuts before it rounds, is there up to one step smaller. Scales are
powers of two, so that numbers coded twice are rounded once.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16, UInt32

GROUP = 128  # channels that share a scale
PACKET = 8  # numbers in three words
MAX = 65024.0
AMAX_FLOOR = 1e-4  # as for E4M3: scales stay far from float32's ends
_SMALLEST_NORMAL = 2.0**-14
_SUBNORMAL_STEP = 2.0**-20


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["words", "scales"], meta_fields=[]
)
@dataclass(frozen=True)
class E5M6:
    """Numbers in 12 bits each.

    Fields:
        words: uint32 [..., 3, K / 8], the words of each eight
        scales: float32 [..., ceil(K / 128)], powers of two; number = code's value x scale
    """

    words: Any
    scales: Any


def encode(x: Float[Array, "*batch K"]) -> E5M6:
    """`x` in E5M6, each number the nearest after division by its group's scale.

    The scale is 2^ceil(log2(amax / 65,024)), amax floored at 1e-4. NaN and infinities stay what
    they are and do not count for amax. Raises ValueError unless K is a multiple of 8.
    """
    if x.shape[-1] % PACKET:
        raise ValueError(f"K={x.shape[-1]} must be a multiple of {PACKET}")
    groups = _cut(x.astype(jnp.float32))
    magnitude = jnp.where(jnp.isfinite(groups), jnp.abs(groups), 0)
    scales = scale_of_amax(jnp.max(magnitude, -1))
    scaled = groups * (1 / scales)[..., None]
    codes = to_codes(scaled.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]])
    return E5M6(pack(codes), scales)


def decode(x: E5M6, dtype: Any = jnp.bfloat16) -> Float[Array, "*batch K"]:
    """The numbers of `x`; bfloat16 and float32 hold them exactly."""
    values = from_codes(unpack(x.words))
    groups = _cut(values) * x.scales[..., None]
    return groups.reshape(*values.shape[:-1], -1)[..., : values.shape[-1]].astype(dtype)


def to_codes(x: Float[Array, "*dims"]) -> UInt16[Array, "*dims"]:
    """The 12-bit codes of the nearest numbers, ties to even; beyond the largest: infinity."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # Of 23 fraction bits six stay: add half a step less one, and one more where the last is odd.
    rounded = bits + 0xFFFF + ((bits >> 17) & 1)
    normal = jax.lax.bitcast_convert_type(rounded & jnp.uint32(0xFFFE0000), jnp.float32)
    small = jnp.round(x.astype(jnp.float32) / _SUBNORMAL_STEP) * _SUBNORMAL_STEP
    exact = jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, small, normal)
    exact = jnp.where(jnp.abs(exact) > MAX, jnp.copysign(jnp.inf, x), exact)
    half = jax.lax.bitcast_convert_type(exact.astype(jnp.float16), jnp.uint16)
    return jnp.where(jnp.isnan(x), jnp.uint16(0x7E0), half >> 4)


def from_codes(codes: UInt16[Array, "*dims"]) -> Float[Array, "*dims"]:
    """What 12-bit codes stand for, in float32."""
    return jax.lax.bitcast_convert_type(codes << 4, jnp.float16).astype(jnp.float32)


def scale_of_amax(amax: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """2^ceil(log2(amax / 65,024)), exactly, float32; `amax` is floored at 1e-4.

    On the bits: 65,024 is 1.984375 x 2^15, and a fraction above that carries into the exponent.
    """
    bits = jax.lax.bitcast_convert_type(jnp.maximum(amax, AMAX_FLOOR), jnp.int32)
    exponent = ((bits + (0x7FFFFF - 0x7E0000)) >> 23) - 15
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def pack(codes: UInt16[Array, "*batch K"]) -> UInt32[Array, "*batch 3 packets"]:
    """Eight codes in three words, from the upper bits down; all first words, then the others."""
    c = codes.astype(jnp.uint32).reshape(*codes.shape[:-1], -1, PACKET)
    c = [c[..., i] for i in range(PACKET)]
    words = (
        c[0] << 20 | c[1] << 8 | c[2] >> 4,
        c[2] << 28 | c[3] << 16 | c[4] << 4 | c[5] >> 8,
        c[5] << 24 | c[6] << 12 | c[7],
    )
    return jnp.stack(words, -2)


def unpack(words: UInt32[Array, "*batch 3 packets"]) -> UInt16[Array, "*batch K"]:
    """The codes of `pack`."""
    a, b, c = (words[..., i, :] for i in range(3))
    codes = (
        a >> 20, a >> 8, a << 4 | b >> 28, b >> 16, b >> 4, b << 8 | c >> 24, c >> 12, c,
    )  # fmt: skip
    together = (jnp.stack(codes, -1) & 0xFFF).astype(jnp.uint16)
    return together.reshape(*words.shape[:-2], -1)


def _cut(x: Array) -> Array:
    """[..., K] as [..., groups, 128], zeros added."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % GROUP)])
    return x.reshape(*x.shape[:-1], -1, GROUP)
