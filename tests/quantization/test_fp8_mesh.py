"""FP8 products on a mesh: each device's kernel multiplies its own part."""

import jax
import numpy as np

from dsv3_jax.config import ExpertParallelConfig, ParallelConfig, ShardingConfig
from dsv3_jax.model.fp8_weights import FP8Weight
from dsv3_jax.model.linear import linear
from dsv3_jax.model.projection import WHOLE, ProductLayout
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.quantization.block_scaled import PER_BLOCK, quantize
from dsv3_jax.quantization.recipe import RECIPES
from tests.helpers import TOLERANCE

LAYOUT = make_layout(
    make_mesh(ParallelConfig(data=2, context=2, tensor=2)),
    ShardingConfig(),
    ExpertParallelConfig(),
)
RECIPE = RECIPES["fp8_paper"].attention
RNG = np.random.default_rng(0)
# Tokens of a device fill whole tiles of 128, and so does its part of a contracted dim of 256.
X, WIDE = (RNG.normal(size=(2, 256, k)).astype(np.float32) for k in (128, 256))
ROWS = ("batch", "seq")


def both(x, weight, dims):
    """Value and gradients on one device and on the mesh."""

    def loss(x, weight, where):
        y = linear(x, weight, RECIPE, where=where)
        return (y * np.cos(np.arange(y.size)).reshape(y.shape)).sum(), y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    return run(x, weight, WHOLE), run(x, weight, ProductLayout(LAYOUT, ROWS, dims))


def both_held(x, weight, dims):
    """Value on one device and on the mesh, of a weight held as FP8."""
    weight = FP8Weight(quantize(weight.reshape(-1, weight.shape[-1]), PER_BLOCK), weight.shape)
    run = jax.jit(
        lambda x, numbers, where: linear(x, weight.part(numbers), where=where), static_argnums=2
    )
    places = WHOLE, ProductLayout(LAYOUT, ROWS, dims)
    return [run(x, weight.numbers, where) for where in places]


def norm_error(got, want):
    """The worst leaf's; products are rounded to BF16 before they are added up between devices."""
    return max(
        float(np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b))
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True)
    )


def test_outputs_cut_over_tensor_equal_one_device():
    weight = RNG.normal(size=(4, 64, 128)).astype(np.float32)
    want, got = both(X, weight, ("heads", None, None))
    assert norm_error(got, want) < TOLERANCE["bf16_op"]
    y = got[0][1]
    assert y.sharding.shard_shape(y.shape) == (1, 128, 2, 64)


def test_a_contracted_dim_cut_over_tensor_is_added_up():
    weight = RNG.normal(size=(128, 256)).astype(np.float32)
    want, got = both(WIDE, weight, (None, "heads"))
    assert norm_error(got, want) < TOLERANCE["bf16_op"]
    y = got[0][1]
    assert y.sharding.shard_shape(y.shape) == (1, 64, 128), "laid out as the residual"


def test_a_held_weight_cut_over_tensor_multiplies_as_on_one_device():
    weight = RNG.normal(size=(4, 64, 128)).astype(np.float32)
    want, got = both_held(X, weight, ("heads", None, None))
    np.testing.assert_array_equal(got, want)
    assert got.sharding.shard_shape(got.shape) == (1, 128, 2, 64)


def test_a_held_weight_s_contracted_dim_is_added_up():
    weight = RNG.normal(size=(128, 256)).astype(np.float32)
    want, got = both_held(WIDE, weight, (None, "heads"))
    assert 0 < norm_error(got, want) < TOLERANCE["bf16_op"]


def test_a_held_weight_of_less_than_a_tile_is_whole_on_every_device():
    weight = RNG.normal(size=(96, 96)).astype(np.float32)
    want, got = both_held(X[..., :96], weight, (None, "heads"))
    np.testing.assert_array_equal(got, want)
