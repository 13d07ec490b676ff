"""The ends of the model, which its stack of layers lies between: embedding, final norm, head."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.linear import linear
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.parallel.vocab import embed

Params = dict[str, Any]


def gathered_ends(params: Params, how: Pass) -> Params:
    """The parameters with the embedding and the head, which MTP reads again, gathered (FSDP)."""
    return params | {
        name: how.gathered({name: params[name]})[name] for name in ("embed_tokens", "lm_head")
    }


def embed_tokens(
    params: Params, ids: Int[Array | np.ndarray, "B T"], how: Pass
) -> Float[Array, "B T D"]:
    """The tokens' rows of the embedding, in the model's dtype, laid out as the residual."""
    return embed(params["embed_tokens"], ids, how.config.dtype, how.layout)


def final_norm(params: Params, x: Float[Array, "B T D"], how: Pass) -> Float[Array, "B T D"]:
    """The last layer's output after the norm that head and MTP modules read it through."""
    norm = how.gathered({"norm": params["norm"]})["norm"]
    return rms_norm(x, norm, how.config.rms_norm_eps)


def head(params: Params, hidden: Float[Array, "B T D"], how: Pass) -> Float[Array, "B T V"]:
    """f32 logits of hidden states after their final norm, cut over the vocabulary."""
    hidden = how.layout.constrain(hidden, "batch", "seq")
    return how.layout.constrain(logits_of(params, hidden), "batch", "seq", "vocab")


def logits_of(params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """`head` of hidden states of any shape, wherever they lie."""
    return linear(hidden, params["lm_head"]).astype(jnp.float32)
