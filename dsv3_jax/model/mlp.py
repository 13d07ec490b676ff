"""The dense SwiGLU feed-forward: the first layers and the shared experts."""

from flax import linen as nn
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.held import parameter
from dsv3_jax.model.linear import feed_forward
from dsv3_jax.parallel.sharding import Layout, constrain
from dsv3_jax.quantization.block_scaled import StraightThrough
from dsv3_jax.quantization.recipe import BF16, Recipe


class MLP(nn.Module):
    """down(silu(gate x) * up x); gate and up are one matrix, so that they are one GEMM."""

    config: ModelConfig
    width: int
    recipe: Recipe = BF16
    layout: Layout | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"] | StraightThrough) -> Float[Array, "B T D"]:
        dim, init = x.shape[-1], nn.initializers.normal(self.config.initializer_range)
        gate_up_proj = parameter(self, "gate_up_proj", init, (2, self.width, dim))
        down_proj = parameter(self, "down_proj", init, (dim, self.width))
        recipes = self.recipe.gate_up_proj, self.recipe.down_proj
        x = constrain(x, self.layout, "batch", "seq")
        return feed_forward(x, gate_up_proj, down_proj, recipes, self.layout)
