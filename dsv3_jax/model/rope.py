"""Rotary positions on the decoupled dims, with YaRN (V3 report, section 4.3).

The rotation is interleaved: dims (2j, 2j+1) are one complex number, as the published weights
expect. Tables are f32: bf16 rounds position 257 to 256.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels import backend


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angles per position of the R/2 pairs, f32; YaRN slows the low frequencies by `factor`.

    Pairs that turn more than `beta_fast` times within the original length keep their frequency,
    those that turn less than `beta_slow` times are interpolated, and a linear ramp lies between.
    """
    dim, theta, scaling = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    frequencies = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling is None:
        return frequencies.astype(np.float32)
    low = max(math.floor(_pair_of(scaling.beta_fast, config)), 0)
    high = min(math.ceil(_pair_of(scaling.beta_slow, config)), dim - 1)
    width = high - low if high > low else 0.001
    interpolated = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    frequencies = frequencies * (1 - interpolated) + frequencies / scaling.factor * interpolated
    return frequencies.astype(np.float32)


def rope_tables(
    positions: Int[Array | np.ndarray, "B T"], config: ModelConfig
) -> tuple[Float[Array, "B T R2"], Float[Array, "B T R2"]]:
    """Cosines and sines of every position's angles, f32; R2 is half of qk_rope_head_dim.

    Raises nothing of its own. Source: YaRN (arXiv 2309.00071), V3 report, section 4.3;
    DeepSeek-V3:inference/model.py, precompute_freqs_cis.

    >>> import numpy as np, dsv3_jax as ds
    >>> cos, sin = ds.rope_tables(np.arange(6)[None], ds.load_config("tiny").model)
    >>> cos.shape, float(cos[0, 0, 0])
    ((1, 6, 8), 1.0)
    """
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    scaling = config.rope_scaling
    ratio = 1.0
    if scaling is not None:
        ratio = _mscale(scaling.factor, scaling.mscale) / _mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    return jnp.cos(angles) * ratio, jnp.sin(angles) * ratio


def apply_rope(
    x: Float[Array, "B T *N R"], cos: Float[Array, "#B T R2"], sin: Float[Array, "#B T R2"]
) -> Float[Array, "B T *N R"]:
    """x with every pair (2j, 2j+1) turned by its position's angle; f32 inside, x's dtype out.

    Raises nothing of its own. Source: arXiv 2104.09864; pairs lie as in
    DeepSeek-V3:inference/model.py, apply_rotary_emb.

    >>> import jax.numpy as jnp, dsv3_jax as ds
    >>> quarter = jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))  # cosine and sine of 90 degrees
    >>> ds.apply_rope(jnp.array([[[1.0, 0.0]]]), *quarter)[0, 0].tolist()
    [0.0, 1.0]
    """
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_heads(
    q: Float[Array, "B T N I"], cos: Float[Array, "#B T R2"], sin: Float[Array, "#B T R2"]
) -> Float[Array, "B T N I"]:
    """q with the last R numbers of every head turned as by `apply_rope`; the others stay."""
    if backend.platform() == "cpu":
        first = q.shape[-1] - 2 * cos.shape[-1]
        return jnp.concatenate([q[..., :first], apply_rope(q[..., first:], cos, sin)], axis=-1)
    return _rotate_in_place(q, cos, sin)


@jax.custom_vjp
def _rotate_in_place(q, cos, sin):
    """`rotate_heads`, so written, and its gradient too, that XLA changes R numbers where they lie.

    Put together from two parts, a GPU reads and writes all of q, and of its gradient twice.
    """
    first = q.shape[-1] - 2 * cos.shape[-1]
    turned = apply_rope(q[..., first:], cos, sin)
    return jax.lax.dynamic_update_slice_in_dim(q, turned, first, axis=-1)


def _rotate_back(tables, d_q):
    cos, sin = tables
    return _rotate_in_place(d_q, cos, -sin), jnp.zeros_like(cos), jnp.zeros_like(sin)


_rotate_in_place.defvjp(lambda q, *tables: (_rotate_in_place(q, *tables), tables), _rotate_back)


def softmax_scale(config: ModelConfig) -> float:
    """What attention logits are multiplied by: 1/sqrt(H + R), times YaRN's correction squared.

    0.0721688 for V3 without YaRN and 0.1352338 with it. The correction holds at every length, as in
    the published modelling code. Raises nothing of its own. Source: DeepSeek-V3:inference/model.py,
    MLA.softmax_scale.

    >>> import dsv3_jax as ds
    >>> round(ds.softmax_scale(ds.ModelConfig()), 7)
    0.1352338
    """
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None:
        scale *= _mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _pair_of(turns: float, config: ModelConfig) -> float:
    """The (fractional) index of the pair that turns this often within the original length."""
    assert config.rope_scaling is not None
    length = config.rope_scaling.original_max_position_embeddings
    return (
        config.qk_rope_head_dim
        * math.log(length / (2 * math.pi * turns))
        / (2 * math.log(config.rope_theta))
    )
