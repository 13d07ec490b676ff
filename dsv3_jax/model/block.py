"""One transformer layer: x += MLA(norm(x)); x += feed-forward(norm(x))."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.model.cache import LatentCache, PagedCache
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.memory_order import token_by_token
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.parameters import parameters
from dsv3_jax.model.quantized_inputs import norm_for
from dsv3_jax.parallel.phases import tied


class Block(nn.Module):
    """A pre-norm layer whose feed-forward is dense or a mixture of experts."""

    how: Pass
    dense: bool

    @nn.compact
    def __call__(
        self,
        x: Any,  # [B, T, D]
        tokens: Any,
        cache: Any = None,  # LatentCache or PagedCache
    ) -> tuple[Any, LatentCache | PagedCache | None, Any]:
        """The layer's output, its updated cache, and a MoE layer's statistics.

        Of a MoE layer x may be a pair of halves of a batch; tokens are a pair then, the cache one
        with the pages of each half, and so are output and statistics; the cache that is returned
        has both. They go through the layer in opposite phases (micro_batches.py).

        Of tokens that say which row is wanted the output has that row alone.
        """
        how, eps = self.how, self.how.config.rms_norm_eps
        w = parameters(self, how.config, "layer")
        mla = MLA(how, name="self_attn")

        def attend(x, tokens, cache=None):
            normed = norm_for(x, w.input_layernorm, eps, how.recipe.attention, how.layout)
            attended, cache = mla(normed, tokens, cache)
            attended = how.layout.constrain(attended, "batch", "residual")
            return tokens.of_wanted(x) + attended, cache

        norm = w.post_attention_layernorm
        if isinstance(x, tuple):
            x = tuple(token_by_token(each, how.layout) for each in x)
            first_cache, second_cache = (None, None) if cache is None else cache
            first, held = attend(x[0], tokens[0], first_cache)
            if second_cache is not None:
                assert isinstance(held, PagedCache)
                second_cache = held.with_table(second_cache.block_table)
            # The first half's rows are on their way to the experts meanwhile.
            rows = how.layout.spec("batch", "residual")
            tie = how.layout.shard_map(tied, (rows, rows), (rows, rows))
            second, first_normed = tie(x[1], rms_norm(first, norm, eps))
            second, cache = attend(second, tokens[1], second_cache)
            masks = (tuple(getattr(of, name) for of in tokens) for name in ("counted", "experts"))
            normed = first_normed, rms_norm(second, norm, eps)
            y, stats = MoE(how, name="mlp")(normed, *masks)
            return jax.tree.map(jnp.add, (first, second), y), cache, stats
        x, cache = attend(token_by_token(x, how.layout), tokens, cache)
        if self.dense:
            mlp = MLP(how, name="mlp")
            return x + mlp(norm_for(x, norm, eps, how.recipe.gate_up_proj, how.layout)), cache, None
        normed = rms_norm(x, norm, eps)  # the router reads it, too
        y, stats = MoE(how, name="mlp")(normed, tokens.counted, tokens.experts)
        return x + y, cache, stats
