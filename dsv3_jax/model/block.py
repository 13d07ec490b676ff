"""One transformer layer: x += MLA(norm(x)); x += feed-forward(norm(x))."""

from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.mla_decode.schedule import Schedule
from dsv3_jax.model.cache import LatentCache, PagedCache
from dsv3_jax.model.fused import norm_for
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.moe import MoE, MoEStats
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.parallel.sharding import Layout, constrain
from dsv3_jax.quantization.recipe import BF16, Recipe


class Block(nn.Module):
    """A pre-norm layer whose feed-forward is dense or a mixture of experts."""

    config: ModelConfig
    dense: bool
    recipe: Recipe = BF16
    layout: Layout | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        cache: LatentCache | PagedCache | None = None,
        prefill: bool = False,
        schedule: Schedule | None = None,
    ) -> tuple[Float[Array, "B T D"], LatentCache | PagedCache | None, MoEStats | None]:
        """The layer's output, its updated cache, and a MoE layer's statistics.

        segments, cache, prefill and schedule as in `MLA`; mask as in `MoE`.
        """
        config, ones = self.config, nn.initializers.ones
        dim, eps = config.hidden_size, config.rms_norm_eps
        norm = self.param("input_layernorm", ones, (dim,))
        normed = norm_for(x, norm, eps, self.recipe.attention, self.layout)
        attention = MLA(config, self.recipe, self.layout, name="self_attn")
        attended, cache = attention(normed, positions, segments, cache, prefill, schedule)
        x = x + constrain(attended, self.layout, "batch", "residual")
        norm = self.param("post_attention_layernorm", ones, (dim,))
        if self.dense:
            mlp = MLP(config, config.intermediate_size, self.recipe, self.layout, name="mlp")
            normed = norm_for(x, norm, eps, self.recipe.gate_up_proj, self.layout)
            return x + mlp(normed), cache, None
        normed = rms_norm(x, norm, eps)  # the router reads it, too
        y, stats = MoE(config, self.recipe, self.layout, name="mlp")(normed, mask)
        return x + y, cache, stats
