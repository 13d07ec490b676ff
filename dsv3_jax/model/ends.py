"""The ends of the model, which its stack of layers lies between: embedding, final norm, head."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.linear import linear
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.projection import ProductLayout
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
    """The tokens' rows of the embedding, in the model's dtype, laid out as the residual.

    Raises nothing of its own: check ids before. Source: DeepSeek-V3:inference/model.py,
    ParallelEmbedding.

    >>> import jax.numpy as jnp, dsv3_jax as ds
    >>> table = {"embed_tokens": jnp.eye(1024, 128)}
    >>> ds.embed_tokens(table, jnp.array([[3]]), ds.Pass(ds.load_config("tiny").model)).argmax(-1)
    Array([[3]], dtype=int32)
    """
    return embed(params["embed_tokens"], ids, how.config.dtype, how.layout)


def final_norm(params: Params, x: Float[Array, "B T D"], how: Pass) -> Float[Array, "B T D"]:
    """The last layer's output after the norm that head and MTP modules read it through.

    f32 inside, x's dtype out. Raises nothing of its own. Source: DeepSeek-V3:inference/model.py,
    RMSNorm.

    >>> import jax.numpy as jnp, dsv3_jax as ds
    >>> x, how = jnp.full((1, 1, 128), 4.0), ds.Pass(ds.load_config("tiny").model)
    >>> float(ds.final_norm({"norm": jnp.ones(128)}, x, how)[0, 0, 0].round(3))
    1.0
    """
    norm = how.gathered({"norm": params["norm"]})["norm"]
    return rms_norm(x, norm, how.config.rms_norm_eps)


def head(params: Params, hidden: Float[Array, "B T D"], how: Pass) -> Float[Array, "B T V"]:
    """f32 logits of hidden states after their final norm, cut over the vocabulary.

    Raises nothing of its own. Source: DeepSeek-V3:inference/model.py, Transformer.head.

    >>> import jax.numpy as jnp, dsv3_jax as ds
    >>> x, how = jnp.ones((1, 1, 128)), ds.Pass(ds.load_config("tiny").model)
    >>> ds.head({"lm_head": jnp.ones((1024, 128))}, x, how)[0, 0, :2]
    Array([128., 128.], dtype=float32)
    """
    hidden = how.layout.constrain(hidden, "batch", "seq")
    where = ProductLayout(how.layout, ("batch", "seq"), ("vocab", None))
    logits = linear(hidden, params["lm_head"], how.recipe.lm_head, where=where)
    return how.layout.constrain(logits.astype(jnp.float32), "batch", "seq", "vocab")


def logits_of(params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """`head` of hidden states of any shape, wherever they lie, by the head as it is."""
    return linear(hidden, params["lm_head"]).astype(jnp.float32)
