"""One transformer layer: x += MLA(norm(x)); x += feed-forward(norm(x))."""

from collections.abc import Callable

from flax import linen as nn
from jaxtyping import Array, Float

from dsv3_jax.model.cache import LatentCache, PagedCache
from dsv3_jax.model.forward_pass import Pass, Tokens
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.moe import MoE, MoEStats
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.parameters import parameters
from dsv3_jax.model.quantized_inputs import norm_for


class Block(nn.Module):
    """A pre-norm layer whose feed-forward is dense or a mixture of experts."""

    how: Pass
    dense: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        cache: LatentCache | PagedCache | None = None,
        between: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], LatentCache | PagedCache | None, MoEStats | None]:
        """The layer's output, its updated cache, and a MoE layer's statistics.

        `between` is given x after attention and returns it; see micro_batches.py.
        """
        how, eps = self.how, self.how.config.rms_norm_eps
        w = parameters(self, how.config, "layer")
        normed = norm_for(x, w.input_layernorm, eps, how.recipe.attention, how.layout)
        attended, cache = MLA(how, name="self_attn")(normed, tokens, cache)
        x = x + how.layout.constrain(attended, "batch", "residual")
        x = x if between is None else between(x)
        norm = w.post_attention_layernorm
        if self.dense:
            mlp = MLP(how, name="mlp")
            return x + mlp(norm_for(x, norm, eps, how.recipe.gate_up_proj, how.layout)), cache, None
        normed = rms_norm(x, norm, eps)  # the router reads it, too
        y, stats = MoE(how, name="mlp")(normed, tokens.counted, tokens.experts)
        return x + y, cache, stats
