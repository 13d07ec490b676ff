"""Multi-token prediction (V3 report, section 2.2, eqs. 21-25): one module of the causal chain.

Module k turns the hidden state h^{k-1}_i, which has seen tokens up to i + k - 1, and token
i + k into h^k_i, from which the shared head predicts token i + k + 1. Embedding and head belong to
the main model.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dsv3_jax.model.block import Block
from dsv3_jax.model.cache import LatentCache, PagedCache
from dsv3_jax.model.forward_pass import Pass, Tokens, of_part
from dsv3_jax.model.linear import linear
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.parameters import parameters
from dsv3_jax.model.projection import ProductLayout


class MTPModule(nn.Module):
    """eh_proj([enorm(embedding); hnorm(hidden)]), one MoE block, and a final norm.

    The embedding comes first, the order of the published weights (vLLM, Megatron-LM and
    transformers agree) and the opposite of how eq. 21 prints it.
    """

    how: Pass

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedding: Float[Array, "B T D"],
        tokens: Tokens,
        cache: LatentCache | PagedCache | None = None,
    ) -> tuple[Float[Array, "B #T D"], LatentCache | PagedCache | None, MoEStats]:
        """As `run_mtp`."""
        w, eps = parameters(self, self.how.config, "mtp"), self.how.config.rms_norm_eps
        embedding, hidden = rms_norm(embedding, w.enorm, eps), rms_norm(hidden, w.hnorm, eps)
        x = jnp.concatenate([embedding, hidden], axis=-1)
        where = ProductLayout(self.how.layout, ("batch", "residual"), (None, None))
        x = linear(x, w.eh_proj, self.how.recipe.eh_proj, where=where)
        x, cache, stats = Block(self.how, False, name="block")(x, tokens, cache)
        assert stats is not None
        return rms_norm(x, w.norm, eps), cache, stats


def run_mtp(
    variables: dict[str, Any],
    depth: int,
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "B T D"],
    tokens: Tokens,
    how: Pass,
    cache: LatentCache | PagedCache | None = None,
) -> tuple[Float[Array, "B #T D"], LatentCache | PagedCache | None, MoEStats]:
    """h^k of module k = depth + 1 after its final norm, which head and next module read.

    hidden is h^{k-1} after its final norm (the paper does not say; the runtimes that load the
    published weights agree on it). Row i of embedding is that of token i + k; tokens are those of
    row i, not of that token. The cache, where there is one, is the module's own: a single layer's.
    Hidden states are in the model's dtype. Raises nothing of its own. Source: V3 report, section
    2.2, eqs. 21-23; layer 61 of deepseek-ai/DeepSeek-V3.

    >>> import jax, jax.numpy as jnp, dsv3_jax as ds
    >>> how = ds.Pass(ds.load_config("tiny").model)
    >>> x = jax.ShapeDtypeStruct((2, 8, 128), jnp.float32)
    >>> run = lambda v, x: ds.run_mtp(v, 0, x, x, ds.Tokens(jnp.zeros((2, 8), int)), how)[0]
    >>> jax.eval_shape(run, ds.abstract_variables(how.config), x).shape
    (2, 8, 128)
    """

    def apply(module, *inputs):
        return MTPModule(how).apply(how.gathered(module), *inputs)

    module = of_part(variables, f"mtp_{depth}")
    return how.saving(apply)(module, hidden, embedding, tokens, cache)
