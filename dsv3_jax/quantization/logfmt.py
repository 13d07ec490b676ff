"""LogFMT-n: 128 channels share a range of magnitudes, cut into equal steps of the logarithm.

The one idea: of n bits one is the sign, the others count steps of log|x| between the group's
smallest and largest magnitude, so that few bits keep a constant relative error wherever a group's
numbers lie. The paper proposes it for the MoE combine, at 10 bits about as good as BF16's 16
("Insights into DeepSeek-V3", section 3.2). Choices it leaves open follow DeepEP
(csrc/kernels/internode_ll.cu): BF16 metadata, and the order of bits on the wire.

Left out: DeepEP sends a chunk as BF16 when a magnitude in it reaches 1. The format does not ask for
that, and the size of a message is static here.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

GROUP = 128  # channels that share a range
# A group spans at most 2^32, about what five exponent bits do; what lies below becomes zero.
MAX_LOG2_RANGE = 32
PACKET = 16  # codes packed together: their magnitudes first, then their signs
_TINY = float(jnp.finfo(jnp.float32).tiny)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "amax", "amin"],
    meta_fields=["bits", "group"],
)
@dataclass(frozen=True)
class LogFMT:
    """Numbers as codes of `bits` bits and the range of each group of channels.

    Fields:
        codes: uint8 (up to 8 bits) or uint16 [..., K]; the sign above bits - 1 bits of magnitude.
            Magnitude 0 is zero, 1 the group's smallest, 2^(bits-1) - 1 its largest.
        amax, amin: bfloat16 [..., ceil(K / group)], largest and smallest magnitude of a group
            (amin 0 when it holds a zero). A group with a NaN or an infinity has amax NaN.
        bits, group: static.
    """

    codes: Any
    amax: Any
    amin: Any
    bits: int
    group: int = GROUP


def encode(x: Float[Array, "*batch K"], bits: int = 10, group: int = GROUP) -> LogFMT:
    """`x` as LogFMT codes, each the nearest representable number in linear space.

    Nearest in the logarithm would favour the upper neighbour and bias sums upwards; the paper asks
    for linear rounding. Between neighbours a and a 2^step the boundary is their mean, so
    code = floor(log2(|x| / lo) / step + r) with r = 2 - log2((1 + 2^step) / 2) / step does it
    without a search (DeepEP's closed form). There is no code for NaN or infinity: such a group
    decodes to NaN throughout.

    Raises ValueError for bits outside 3 to 16 or a group below 1.
    """
    if not 3 <= bits <= 16:
        raise ValueError(f"{bits=} must lie in 3 to 16")
    if group < 1:
        raise ValueError(f"{group=} must be positive")
    x = x.astype(jnp.float32)
    magnitude = _cut(jnp.abs(x), group)
    amax = jnp.max(magnitude, -1).astype(jnp.bfloat16)
    amin = jnp.min(magnitude, -1).astype(jnp.bfloat16)
    amax = jnp.where(jnp.isfinite(amax), amax, jnp.nan)
    lo, step = _grid(amax, amin, bits)
    # expm1 and log1p: at the smallest steps 2^step is 1 to five digits.
    rounding = 2 - jnp.log1p(jnp.expm1(step * math.log(2)) / 2) / (step * math.log(2))
    position = jnp.log2(magnitude / lo[..., None]) / step[..., None] + rounding[..., None]
    # Clipped above because BF16 may round amax down; NaN groups are zeroed, amax tells them.
    code = jnp.floor(jnp.clip(jnp.nan_to_num(position, nan=0.0), 0, 2 ** (bits - 1) - 1))
    dtype = jnp.uint8 if bits <= 8 else jnp.uint16
    sign = jnp.signbit(x).astype(dtype) << (bits - 1)
    return LogFMT(_join(code, x.shape).astype(dtype) | sign, amax, amin, bits, group)


def decode(x: LogFMT, dtype: Any = jnp.bfloat16) -> Float[Array, "*batch K"]:
    """The numbers of `x` in `dtype`, computed in f32."""
    lo, step = _grid(x.amax, x.amin, x.bits)
    code = _cut((x.codes & (2 ** (x.bits - 1) - 1)).astype(jnp.float32), x.group)
    magnitude = lo[..., None] * jnp.exp2((code - 1) * step[..., None])
    magnitude = jnp.where(code == 0, 0, magnitude)
    magnitude = jnp.where(jnp.isnan(x.amax)[..., None], jnp.nan, magnitude)
    magnitude = _join(magnitude, x.codes.shape)
    return jnp.where(x.codes >> (x.bits - 1), -magnitude, magnitude).astype(dtype)


def pack(x: LogFMT) -> UInt8[Array, "*batch bytes"]:
    """The bytes that go on the wire: `packed_bytes` of them for each row.

    First (amax, amin) of every group, little-endian BF16. Then for every 16 codes their bits - 1
    magnitude bits one after the other, lowest first, then their 16 signs. At 10 bits these are
    DeepEP's five 32-bit words.

    Raises ValueError when the channels are no multiple of 16.
    """
    channels = x.codes.shape[-1]
    batch = x.codes.shape[:-1]
    packed_bytes(channels, x.bits, x.group)
    ranges = jax.lax.bitcast_convert_type(jnp.stack([x.amax, x.amin], -1), jnp.uint8)
    codes = x.codes.reshape(*batch, channels // PACKET, PACKET)
    bits = (codes[..., None] >> jnp.arange(x.bits, dtype=codes.dtype)) & 1
    magnitudes = bits[..., :-1].reshape(*bits.shape[:-2], PACKET * (x.bits - 1))
    stream = jnp.concatenate([magnitudes, bits[..., -1]], -1)
    octets = stream.reshape(*batch, channels * x.bits // 8, 8).astype(jnp.uint8)
    payload = jnp.sum(octets << jnp.arange(8, dtype=jnp.uint8), -1, dtype=jnp.uint8)
    return jnp.concatenate([ranges.reshape(*batch, -1), payload], -1)


def unpack(
    packed: UInt8[Array, "*batch bytes"], channels: int, bits: int = 10, group: int = GROUP
) -> LogFMT:
    """The LogFMT whose `pack` is `packed`.

    Raises ValueError when `packed` has not the bytes of that many channels.
    """
    if packed.shape[-1] != packed_bytes(channels, bits, group):
        raise ValueError(
            f"{channels=} at {bits=} take {packed_bytes(channels, bits, group)} bytes, "
            f"not {packed.shape[-1]}"
        )
    batch, groups = packed.shape[:-1], -(-channels // group)
    ranges = packed[..., : 4 * groups].reshape(*batch, groups, 2, 2)
    ranges = jax.lax.bitcast_convert_type(ranges, jnp.bfloat16)
    payload = packed[..., 4 * groups :]
    stream = (payload[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    stream = stream.reshape(*batch, channels // PACKET, PACKET * bits)
    dtype = jnp.uint8 if bits <= 8 else jnp.uint16
    split = PACKET * (bits - 1)
    magnitudes = stream[..., :split].reshape(*stream.shape[:-1], PACKET, bits - 1).astype(dtype)
    signs = stream[..., split:].astype(dtype) << (bits - 1)
    codes = jnp.sum(magnitudes << jnp.arange(bits - 1, dtype=dtype), -1, dtype=dtype) | signs
    return LogFMT(codes.reshape(*batch, channels), ranges[..., 0], ranges[..., 1], bits, group)


def packed_bytes(channels: int, bits: int = 10, group: int = GROUP) -> int:
    """Bytes that a row of `channels` numbers takes: 9,184 for 7,168 at 10 bits, 14,336 as BF16."""
    if channels % PACKET:
        raise ValueError(f"{channels=} must be a multiple of {PACKET} to be packed")
    return 4 * -(-channels // group) + channels * bits // 8


def _grid(amax: Array, amin: Array, bits: int) -> tuple[Array, Array]:
    """Each group's smallest nonzero magnitude, and log2 of the ratio of neighbours; f32."""
    amax, amin = amax.astype(jnp.float32), amin.astype(jnp.float32)
    lo = jnp.maximum(jnp.maximum(amin, amax * 2.0**-MAX_LOG2_RANGE), _TINY)
    # One magnitude, or none: any step will do, code 1 is `lo`.
    step = jnp.where(amax > lo, jnp.log2(amax / lo) / (2 ** (bits - 1) - 2), 1)
    return lo, step


def _cut(x: Array, group: int) -> Array:
    """[..., K] as [..., groups, group]; a partial group repeats its last number."""
    short = -x.shape[-1] % group
    if short:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)], mode="edge")
    return x.reshape(*x.shape[:-1], -1, group)


def _join(groups: Array, shape: tuple[int, ...]) -> Array:
    return groups.reshape(*groups.shape[:-2], -1)[..., : shape[-1]]
