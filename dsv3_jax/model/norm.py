"""RMSNorm, in f32 whatever the activations are in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The norms of the two compressed latents keep this epsilon whatever `rms_norm_eps` says, as in
# DeepSeek's and transformers' modelling code. It differs for Moonlight, whose rms_norm_eps is 1e-5.
LATENT_NORM_EPS = 1e-6


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """x over its root mean square, times weight; in x's dtype.

    The mean and the division are f32; the result is rounded to x's dtype before the weight is
    applied, the order of the published modelling code.
    """
    x_f32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (x_f32 * inverse_rms).astype(x.dtype) * weight.astype(x.dtype)
