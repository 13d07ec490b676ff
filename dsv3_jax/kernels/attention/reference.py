"""Causal attention in plain JAX: two products and a softmax, the logits in memory.

It is what runs on CPUs, where the shapes are small; its gradients are JAX's own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.attention.api import Documents, visible


def attention(
    q: Float[Array, "B T N P"],
    kv: tuple[Array, ...],
    k_shared: Float[Array, "B S R"] | None,
    *,
    value_dim: int,
    scale: float,
    offset: int | Int[Array, ""],
    documents: Documents | None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N T"]]:
    """Output and log-sum-exp; see `api.attention`. kv: keys and values, or one array of both."""
    k, v = kv[0][..., : kv[0].shape[-1] - (value_dim if len(kv) == 1 else 0)], kv[-1]
    v = v[..., v.shape[-1] - value_dim :]
    if k_shared is not None:
        # One product over all dims: two would write and read the T x S logits once more each way.
        shared = jnp.broadcast_to(k_shared[:, :, None], (*k.shape[:-1], k_shared.shape[-1]))
        k = jnp.concatenate([k, shared], axis=-1)
    logits = jnp.einsum("BTNP,BSNP->BNTS", q, k, preferred_element_type=jnp.float32) * scale
    mask = visible(q.shape[1], k.shape[1], offset, documents)
    # The lowest finite number, not -inf: nothing may become NaN.
    logits = jnp.where(mask[:, None], logits, jnp.finfo(logits.dtype).min)
    probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("BNTS,BSNU->BTNU", probs, v), jax.nn.logsumexp(logits, axis=-1)
