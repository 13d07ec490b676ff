"""Causal attention in plain JAX: products and softmaxes of blocks of queries, logits in memory.

It is what runs on CPUs, where the shapes are small; its gradients are JAX's own.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from dsv3_jax.kernels.attention.api import Documents, apply_bias, visible

# Queries are cut into blocks of at least so many, up to four, and none meets the keys after its
# block: 3/4 of the work at 128 tokens, 5/8 at 256 or more. Smaller products are slower ones.
BLOCK = 64
MAX_BLOCKS = 4


def attention(
    q: Float[Array, "B T N P"],
    kv: tuple[Array, ...],
    k_shared: Float[Array, "B S R"] | None,
    *,
    value_dim: int,
    scale: float,
    offset: int | Int[Array, ""],
    documents: Documents | None,
    bias: Shaped[Array, "1 #N T S"] | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N T"]]:
    """Output and log-sum-exp; see `api.attention`. kv: keys and values, or one array of both."""
    k, v = kv[0][..., : kv[0].shape[-1] - (value_dim if len(kv) == 1 else 0)], kv[-1]
    v = v[..., v.shape[-1] - value_dim :]
    if k_shared is not None:
        # One product over all dims: two would write and read the T x S logits once more each way.
        shared = jnp.broadcast_to(k_shared[:, :, None], (*k.shape[:-1], k_shared.shape[-1]))
        k = jnp.concatenate([k, shared], axis=-1)
    # Heads first, as batched products want them: XLA:CPU would transpose number by number.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    mask = visible(queries, keys, offset, documents)
    block = -(-queries // min(MAX_BLOCKS, max(queries // BLOCK, 1)))
    blocks = []
    for start in range(0, queries, block):
        end = min(start + block, queries)
        seen = min(offset + end, keys) if isinstance(offset, int) else keys
        of_block = mask[:, start:end, :seen]
        parts = (q[:, :, start:end], k[:, :, :seen], v[:, :, :seen])
        of_bias = None if bias is None else bias[:, :, start:end, :seen]
        blocks.append(_attend(*parts, of_block, scale, of_bias))
    out, lse = (jnp.concatenate(parts, axis=2) for parts in zip(*blocks))
    return out.swapaxes(1, 2), lse


def _attend(
    q: Float[Array, "B N T P"],
    k: Float[Array, "B N S P"],
    v: Float[Array, "B N S U"],
    mask: Bool[Array, "#B T S"],
    scale: float,
    bias: Shaped[Array, "1 #N T S"] | None = None,
) -> tuple[Float[Array, "B N T U"], Float[Array, "B N T"]]:
    # Keys by queries: reductions over a dim that is not the last one are vectorised.
    logits_BNST = _multiply(k, q, 3, 3, jnp.float32) * scale
    # The lowest finite number, not -inf: nothing may become NaN.
    lowest = jnp.finfo(logits_BNST.dtype).min
    seen_BNST = mask.swapaxes(1, 2)[:, None]
    if bias is not None:
        logits_BNST, seen_BNST = apply_bias(logits_BNST, seen_BNST, bias.swapaxes(2, 3))
    logits_BNST = jnp.where(seen_BNST, logits_BNST, lowest)
    probs_BNST = jax.nn.softmax(logits_BNST, axis=2).astype(v.dtype)
    return _multiply(probs_BNST, v, 2, 2), jax.nn.logsumexp(logits_BNST, axis=2)


def _multiply(a: Array, b: Array, a_dim: int, b_dim: int, dtype=None) -> Array:
    """The product over a_dim of a and b_dim of b, for each batch row and head."""
    dims = (((a_dim,), (b_dim,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=dtype)
