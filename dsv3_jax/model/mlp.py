"""The dense SwiGLU feed-forward: the first layers and the shared experts."""

from flax import linen as nn
from jaxtyping import Array, Float

from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.held import parameter
from dsv3_jax.model.linear import feed_forward
from dsv3_jax.quantization.block_scaled import StraightThrough


class MLP(nn.Module):
    """down(silu(gate x) * up x); gate and up are one matrix, so that they are one GEMM."""

    how: Pass
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"] | StraightThrough) -> Float[Array, "B T D"]:
        how, dim = self.how, x.shape[-1]
        init = nn.initializers.normal(how.config.initializer_range)
        gate_up_proj = parameter(self, "gate_up_proj", init, (2, self.width, dim))
        down_proj = parameter(self, "down_proj", init, (dim, self.width))
        recipes = how.recipe.gate_up_proj, how.recipe.down_proj
        x = how.layout.constrain(x, "batch", "seq")
        return feed_forward(x, gate_up_proj, down_proj, recipes, how.layout)
