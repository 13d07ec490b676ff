"""The fused quantisers in plain JAX: compute in float32, round once, quantise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled, ScaleFormat, quantize


def quantize_rows(x: Float[Array, "T D"], scale_format: ScaleFormat = "f32") -> BlockScaled:
    """x quantised per token."""
    return quantize(x, PER_TOKEN, scale_format)


def quantize_both_ways(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32"
) -> tuple[BlockScaled, BlockScaled]:
    """x quantised per token, and x.T quantised along tokens."""
    return quantize(x, PER_TOKEN, scale_format), quantize(x.mT, PER_TOKEN, scale_format)


def swiglu_quantize(
    gate_up: Float[Array, "T 2*F"], scale_format: ScaleFormat = "f32"
) -> BlockScaled:
    """silu(gate) x up, quantised per token."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return quantize((jax.nn.silu(gate) * up).astype(gate_up.dtype), PER_TOKEN, scale_format)


def rms_norm_quantize(
    x: Float[Array, "T D"],
    weight: Float[Array, " D"],
    eps: float,
    scale_format: ScaleFormat = "f32",
) -> BlockScaled:
    """x over its root mean square, times weight, quantised per token."""
    x = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return quantize(x * inverse_rms * weight.astype(jnp.float32), PER_TOKEN, scale_format)
