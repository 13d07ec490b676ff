"""The dense products in plain JAX: what every other implementation is tested against.

It multiplies the dequantised numbers in float32, which holds an E4M3 number times its scale to one
rounding; that agrees with a float64 product to about 1e-7 before the result is rounded.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.quantization.block_scaled import PER_BLOCK, BlockScaled, dequantize


def scaled_matmul(
    a: BlockScaled, b: BlockScaled, accumulate: Float[Array, "M N"] | None = None
) -> Float[Array, "M N"]:
    """a @ b.T of the dequantised operands; see `api.scaled_matmul`."""
    out = jax.lax.dot_general(
        dequantize(a, jnp.float32),
        dequantize(b, jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    if b.tile == PER_BLOCK:
        return out.astype(jnp.bfloat16)
    return out if accumulate is None else accumulate + out


def scaled_wgrad(a: BlockScaled, b: BlockScaled, total: GradientSum) -> None:
    """Leaves a @ b.T in its place; see `api.scaled_wgrad`."""
    total.put(scaled_matmul(a, b))
