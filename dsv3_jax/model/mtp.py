"""Multi-token prediction (V3 report, section 2.2, eqs. 21-25): one module of the causal chain.

Module k turns the hidden state h^{k-1}_i, which has seen tokens up to i + k - 1, and token
i + k into h^k_i, from which the shared head predicts token i + k + 1. Embedding and head belong to
the main model.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.block import Block
from dsv3_jax.model.cache import LatentCache, PagedCache
from dsv3_jax.model.linear import linear
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.quantization.recipe import BF16, Recipe


class MTPModule(nn.Module):
    """eh_proj([enorm(embedding); hnorm(hidden)]), one MoE block, and a final norm.

    The embedding comes first, the order of the published weights (vLLM, Megatron-LM and
    transformers agree) and the opposite of how eq. 21 prints it.
    """

    config: ModelConfig
    recipe: Recipe = BF16
    layout: Layout | None = None

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedding: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        cache: LatentCache | PagedCache | None = None,
        prefill: bool = False,
    ) -> tuple[Float[Array, "B T D"], LatentCache | PagedCache | None, MoEStats]:
        """h^k after its final norm: what the head and the next module read.

        hidden is h^{k-1} after its final norm (the paper does not say; the runtimes that load the
        published weights agree on it). embedding holds that of token i + k.
        """
        config, ones, dim = self.config, nn.initializers.ones, self.config.hidden_size
        eps = config.rms_norm_eps
        embedding = rms_norm(embedding, self.param("enorm", ones, (dim,)), eps)
        hidden = rms_norm(hidden, self.param("hnorm", ones, (dim,)), eps)
        init = nn.initializers.normal(config.initializer_range)
        eh_proj = self.param("eh_proj", init, (dim, 2 * dim))
        x = linear(jnp.concatenate([embedding, hidden], axis=-1), eh_proj, self.recipe.eh_proj)
        x, cache, stats = Block(config, False, self.recipe, self.layout, name="block")(
            x, positions, segments=segments, mask=mask, cache=cache, prefill=prefill
        )
        assert stats is not None
        return rms_norm(x, self.param("norm", ones, (dim,)), eps), cache, stats
