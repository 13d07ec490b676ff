"""A third kind of weight, an adapter beside a base, needs `Projection` alone."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ExpertParallelConfig, ParallelConfig, ShardingConfig
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.fp8_weights import FP8Weight
from dsv3_jax.model.linear import grouped_linear, linear
from dsv3_jax.model.moe import MoEWeights, routed_experts
from dsv3_jax.model.projection import WHOLE, ProductLayout, as_projection
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.quantization.block_scaled import PER_BLOCK, StepWeight, quantize
from tests.cases import in_every_run
from tests.helpers import TOLERANCE, relative_error, tiny_model

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "down", "up"], meta_fields=[]
)
@dataclass(frozen=True)
class Adapted:
    """base + up down: [*E, *N, K] + [*E, *N, r] by [*E, r, K]."""

    base: Any
    down: Any
    up: Any
    array = None
    takes_quantized_rows = False

    @property
    def shape(self):
        return self.base.shape

    def multiply(self, x, recipe, activation, where):
        base = as_projection(self.base).multiply(x, recipe, activation, where)
        x = x if activation is None else activation(x)
        return base + linear(linear(x, self.down), self.up)

    def multiply_groups(self, rows, group_sizes, alignment, recipe, activation):
        base = as_projection(self.base)
        y = base.multiply_groups(rows, group_sizes, alignment, recipe, activation)
        rows = rows if activation is None else activation(rows)
        low = grouped_linear(rows, self.down, group_sizes, alignment)
        return y + grouped_linear(low, self.up, group_sizes, alignment)

    def astype(self, dtype):
        delta = jnp.einsum("nhr,rk->nhk", self.up, self.down)
        return self.base.astype(dtype) + delta.astype(dtype)

    def __len__(self):
        return len(self.base)


def adapted(*shape, experts=(), fp8=False):
    base = weight = normal(*experts, *shape)
    if fp8:
        numbers = quantize(weight.reshape(*experts, -1, shape[-1]), PER_BLOCK)
        base = FP8Weight(numbers, weight.shape)
    return Adapted(base, normal(*experts, 3, shape[-1]), normal(*experts, *shape[:-1], 3))


@pytest.mark.parametrize("fp8", [False, True])
def test_an_adapter_beside_a_base_multiplies_as_their_sum(fp8):
    weight, x = adapted(2, 24, 16, fp8=fp8), normal(3, 7, 16)
    got, want = linear(x, weight), linear(x, weight.astype(jnp.float32))
    limit = 0.2 if fp8 else TOLERANCE["f32_reordered"]  # of the worst element, in E4M3
    assert relative_error(got, want) < limit
    if not fp8:
        gradient = jax.grad(lambda w: (linear(x, w) ** 2).sum())(weight)
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_on_a_mesh_the_base_cuts_itself_and_the_adapter_is_cut_by_xla():
    layout = make_layout(
        make_mesh(ParallelConfig(data=2, tensor=2)), ShardingConfig(), ExpertParallelConfig()
    )
    weight, x = adapted(4, 128, 128, fp8=True), normal(2, 8, 128)
    run = jax.jit(lambda x, w, where: linear(x, w, where=where), static_argnums=2)
    where = ProductLayout(layout, ("batch", "seq"), ("heads", None, None))
    got = run(x, weight, where)
    assert relative_error(got, run(x, weight, WHOLE)) < TOLERANCE["f32_reordered"]
    assert got.sharding.shard_shape(got.shape)[2] == 2


@pytest.mark.parametrize("local", in_every_run([1, 2], 2))
def test_every_expert_has_its_own_adapter_where_the_expert_is(local):
    config = tiny_model()
    layout = make_layout(
        make_mesh(ParallelConfig(local=local)), ShardingConfig(), ExpertParallelConfig()
    )
    experts, width, dim = (config.n_routed_experts,), config.moe_intermediate_size, 64
    gate_up, down = adapted(2, width, dim, experts=experts), adapted(dim, width, experts=experts)
    x, gate = normal(2, 8, dim), normal(*experts, dim)
    how = Pass(config, layout=layout)
    run = jax.jit(lambda x, weights: routed_experts(x, weights, None, how)[0])
    got = run(x, MoEWeights(gate, None, gate_up, down))
    want = run(x, MoEWeights(gate, None, merged(gate_up), merged(down)))
    assert relative_error(got, want) < 10 * TOLERANCE["f32_reordered"]


def merged(weight):
    flat = weight.up.reshape(len(weight), -1, 3)
    return weight.base + jnp.einsum("enr,erk->enk", flat, weight.down).reshape(weight.shape)


@pytest.mark.parametrize("outputs, kept", [(24, True), (200, False)], ids=["narrow", "wide"])
@pytest.mark.parametrize("copied", [True, False], ids=["a step's copy", "an array"])
def test_v3_keeps_what_a_product_returns_unless_it_is_wide(outputs, kept, copied):
    master, x = normal(outputs, 16), normal(512, 16).astype(jnp.bfloat16)

    def loss(master, x):
        weight = StepWeight(master, master.astype(x.dtype)) if copied else master
        # The gradient of a sine reads what the product returned.
        return jnp.sum(jnp.sin(linear(x, weight)))

    layer = Pass(tiny_model(), remat="v3").saving(loss)
    _, pull_back = jax.eval_shape(functools.partial(jax.vjp, layer), master, x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(pull_back)]
    assert ((512, outputs) in shapes) == kept
