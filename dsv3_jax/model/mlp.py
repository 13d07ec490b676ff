"""The dense SwiGLU feed-forward: the first layers and the shared experts."""

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.linear import feed_forward
from dsv3_jax.model.parameters import parameters
from dsv3_jax.quantization.block_scaled import StraightThrough


class MLP(nn.Module):
    """down(silu(gate x) * up x); gate and up are one matrix, so that they are one GEMM."""

    how: Pass
    shared: bool = False  # the shared experts, all as one
    leaving: int | None = None  # see `feed_forward`

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"] | StraightThrough | None) -> Any:
        """The feed-forward of x, [B, T, D]; of None both weights, for who multiplies elsewhere."""
        how = self.how
        if self.shared:
            w = parameters(self, how.config, "moe", "mlp/shared_experts")
        else:
            w = parameters(self, how.config, "dense", "mlp")
        if x is None:
            return w.gate_up_proj, w.down_proj
        recipes = how.recipe.gate_up_proj, how.recipe.down_proj
        rows: Any = how.layout.constrain(x, "batch", "seq")
        return feed_forward(rows, w.gate_up_proj, w.down_proj, recipes, how.layout, self.leaving)
