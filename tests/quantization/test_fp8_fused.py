"""FP8 operations that hand each other quantised numbers: equal to the operations one by one."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ExpertParallelConfig, ModelConfig, ParallelConfig, ShardingConfig
from dsv3_jax.kernels import backend, hopper
from dsv3_jax.model.activation import swiglu
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.linear import (
    feed_forward,
    grouped_feed_forward,
    grouped_linear,
    linear,
)
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.quantized_inputs import gather_for, norm_for
from dsv3_jax.model.router import route
from dsv3_jax.model.transformer import forward, init_variables
from dsv3_jax.parallel.grouping import gather_rows, plan, sum_rows
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import ONE_DEVICE, make_layout
from dsv3_jax.quantization.recipe import RECIPES
from tests.kernels.conftest import INTERPRETER_IS_NEWER

RECIPE = RECIPES["fp8_paper"]
DENSE = RECIPE.gate_up_proj, RECIPE.down_proj
ROUTED = RECIPE.experts_gate_up_proj, RECIPE.experts_down_proj
# Errors of numbers that fall on the other side of an E4M3 rounding, 1/8 of themselves. Sums in
# another order tip few; BF16 roundings of 2^-9 tip 3 in 100, and 1/8 x sqrt(0.03) is 0.02.
BY_SUMS, BY_BF16 = 5e-3, 0.025


def normal(*shape, seed=0, scale=1.0, dtype=jnp.bfloat16):
    numbers = np.random.default_rng((seed, *shape)).normal(size=shape) * scale
    return jnp.asarray(numbers, dtype)


def value_and_gradients(function, *operands):
    y, pull_back = jax.vjp(function, *operands)
    return y, pull_back(normal(*y.shape, seed=1, dtype=y.dtype))


compiled = jax.jit(value_and_gradients, static_argnums=0)


def worst(got, want) -> float:
    """The largest relative error of a leaf."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in pairs]
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs if b.size)


def one_by_one(x, gate_up, down):
    return linear(linear(x, gate_up, DENSE[0]), down, DENSE[1], swiglu)


@pytest.fixture
def weights():
    return normal(2, 128, 256, dtype=jnp.float32), normal(256, 128, dtype=jnp.float32, scale=0.1)


def test_a_feed_forward_is_its_two_products(weights):
    """200 tokens: the last tile of 128 is partial."""
    x = normal(2, 100, 256)
    got = compiled(lambda *o: feed_forward(*o, DENSE), x, *weights)
    want = compiled(one_by_one, x, *weights)
    np.testing.assert_array_equal(*(np.asarray(y[0], np.float32) for y in (got, want)))
    assert worst(got, want) < BY_BF16


def test_a_grouped_feed_forward_is_its_two_products():
    """An empty group, rows that belong to nobody, and rows that fill a group."""
    sizes = jnp.asarray([128, 0, 256], jnp.int32)
    x = normal(512, 128).at[100:128].set(0).at[384:].set(0)
    gate_up = normal(3, 2, 128, 128, dtype=jnp.float32)
    down = normal(3, 128, 128, dtype=jnp.float32, scale=0.1)

    def separate(x, gate_up, down):
        hidden = grouped_linear(x, gate_up, sizes, 128, ROUTED[0])
        return grouped_linear(hidden, down, sizes, 128, ROUTED[1], swiglu)

    got = compiled(lambda *o: grouped_feed_forward(*o, sizes, 128, ROUTED), x, gate_up, down)
    assert worst(got, compiled(separate, x, gate_up, down)) < BY_BF16


@pytest.mark.parametrize("dgrad_scales", ["ue8m0", "f32"])
def test_rows_are_summed_as_by_themselves(dgrad_scales):
    """Gradients of rows are gathered as they are quantised; both ways in one read, or apart."""
    recipes = (
        ROUTED[0],
        dataclasses.replace(
            ROUTED[1], dgrad=dataclasses.replace(ROUTED[1].dgrad, scale_format=dgrad_scales)
        ),
    )
    experts = jnp.asarray(np.random.default_rng(0).permuted([[0, 1, 2]] * 50, axis=1)[:, :2])
    groups, sizes, _ = plan(experts, 3, 128)
    x, weights = normal(50, 128), normal(50, 2, dtype=jnp.float32)
    gate_up = normal(3, 2, 128, 128, dtype=jnp.float32)
    down = normal(3, 128, 128, dtype=jnp.float32, scale=0.1)

    def apart(x, weights, *of_experts):
        rows = gather_for(x, groups, recipes[0])
        rows = grouped_feed_forward(rows, *of_experts, sizes, 128, recipes)
        return sum_rows(rows, weights, groups)

    def together(x, weights, *of_experts):
        rows = gather_for(x, groups, recipes[0])
        summed = weights, groups
        return grouped_feed_forward(rows, *of_experts, sizes, 128, recipes, summed=summed)

    results = [compiled(f, x, weights, gate_up, down) for f in (together, apart)]
    assert any(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(results[0][1]))
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_a_norm_is_quantised_where_it_is_computed():
    """The unfused form rounds the normalised numbers to BF16, twice."""
    x, gain = normal(2, 9, 256, scale=3), 1 + normal(256, scale=0.1, dtype=jnp.float32)
    weight = normal(64, 256, dtype=jnp.float32)
    recipe = RECIPE.attention
    fused = compiled(
        lambda x, g, w: linear(norm_for(x, g, 1e-6, recipe), w, recipe), x, gain, weight
    )
    separate = compiled(lambda x, g, w: linear(rms_norm(x, g, 1e-6), w, recipe), x, gain, weight)
    assert worst(fused, separate) < BY_BF16


def test_a_norm_whose_numbers_are_needed_stays_as_it_was():
    x, gain = normal(1, 8, 256), jnp.ones(256)
    unquantized = dataclasses.replace(RECIPE.attention, saved_input="unquantized")
    for recipe, numbers in ((None, x), (unquantized, x), (RECIPE.attention, x.astype("float32"))):
        assert isinstance(norm_for(numbers, gain, 1e-6, recipe), jax.Array)


def test_gathered_tokens_are_quantised_before_they_are_copied():
    x = normal(9, 256)
    experts = jnp.asarray(np.random.default_rng(0).permuted([[0, 1, 2]] * 9, axis=1)[:, :2])
    groups, sizes, _ = plan(experts, 3, 128)
    weights = normal(3, 128, 256, dtype=jnp.float32)

    def through(gather):
        return compiled(
            lambda x, w: grouped_linear(gather(x), w, sizes, 128, ROUTED[0]), x, weights
        )

    got = through(lambda x: gather_for(x, groups, ROUTED[0]))
    want = through(lambda x: gather_rows(x, groups))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_on_a_mesh_each_device_has_its_part(weights):
    """Gate and up are cut alike over `tensor`, norms over tokens; gradients are added up."""
    layout = make_layout(
        make_mesh(ParallelConfig(data=2, context=2, tensor=2)),
        ShardingConfig(),
        ExpertParallelConfig(),
    )
    gate_up, down = normal(2, 256, 128, dtype=jnp.float32), normal(128, 256, dtype=jnp.float32)
    x, gain = normal(2, 256, 128), 1 + normal(128, scale=0.1, dtype=jnp.float32)

    def loss(x, gain, gate_up, down, layout):
        normed = norm_for(x, gain, 1e-6, DENSE[0], layout)
        normed = layout.constrain(normed, "batch", "seq")
        y = feed_forward(normed, gate_up, down, DENSE, layout).astype(jnp.float32)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True), static_argnums=4)
    operands = x, gain, gate_up, down
    assert worst(run(*operands, layout), run(*operands, ONE_DEVICE)) < BY_BF16


@INTERPRETER_IS_NEWER
class TestKernels:
    """The same numbers by the Hopper kernels, interpreted, as by their references.

    The interpreter fills what nobody has written with NaN: none may reach a result.
    """

    @pytest.fixture
    def compare(self, monkeypatch):
        monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)
        monkeypatch.setattr(backend, "_choices", {})

        def both(function, *operands):
            want = compiled(function, *operands)
            with backend.use("pallas_gpu"), hopper.interpreting():
                # Not compiled as one: an interpreted kernel cannot be within custom_partitioning.
                got = value_and_gradients(function, *operands)
                jax.block_until_ready(got)
            return worst(got, want), {c.op for c in backend.choices() if "gpu" in c.implementation}

        return both

    def test_of_a_feed_forward(self, compare):
        x, gate_up = normal(136, 128), normal(2, 128, 128, dtype=jnp.float32)
        down = normal(128, 128, dtype=jnp.float32, scale=0.1)
        error, ops = compare(lambda *o: feed_forward(*o, DENSE), x, gate_up, down)
        assert error < BY_SUMS
        assert {"swiglu_backward_quantize", "swiglu_quantize", "scaled_matmul"} <= ops

    @pytest.mark.slow
    def test_of_grouped_feed_forwards_with_tiny_gradients(self, compare):
        sizes = jnp.asarray([128, 0, 128], jnp.int32)
        x = normal(384, 128).at[100:128].set(0).at[256:].set(0)
        gate_up = normal(3, 2, 128, 128, dtype=jnp.float32)
        down = normal(3, 128, 128, dtype=jnp.float32, scale=0.1)

        def small(*operands):
            return grouped_feed_forward(*operands, sizes, 128, ROUTED) * 1e-5

        error, ops = compare(small, x, gate_up, down)
        assert error < BY_SUMS
        assert {"swiglu_backward_quantize", "grouped_matmul", "grouped_wgrad"} <= ops

    def test_of_a_norm_and_its_product(self, compare):
        x, gain = normal(9, 256), 1 + normal(256, scale=0.1, dtype=jnp.float32)
        weight, recipe = normal(64, 256, dtype=jnp.float32), RECIPE.attention
        error, ops = compare(
            lambda x, g, w: linear(norm_for(x, g, 1e-6, recipe), w, recipe), x, gain, weight
        )
        assert error < BY_SUMS and "rms_norm_quantize" in ops


def test_a_gpus_step_is_made_of_these_kernels(monkeypatch):
    """Traced as for a GPU, not run: what `backend.choices()` names of an FP8 model's gradients."""
    if not hasattr(hopper.plgpu, "InterpretGPUParams"):
        pytest.skip("the Hopper kernels need jax 0.11")
    config = ModelConfig(
        vocab_size=256,
        hidden_size=1024,
        num_hidden_layers=2,
        max_position_embeddings=256,
        num_attention_heads=2,
        q_lora_rank=128,
        kv_lora_rank=128,
        rope_scaling=None,
        intermediate_size=128,
        moe_intermediate_size=128,
        first_k_dense_replace=1,
        n_routed_experts=32,
        num_experts_per_tok=2,
        dtype="bfloat16",
    )
    variables = jax.eval_shape(lambda key: init_variables(key, config), jax.random.key(0))
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    monkeypatch.setattr(backend, "_choices", {})
    tokens = jnp.zeros((1, 128), jnp.int32)

    def loss(params, rest):
        out = forward({**rest, "params": params}, tokens, Pass(config, RECIPE))
        return out.logits.astype(jnp.float32).sum()

    rest = {name: value for name, value in variables.items() if name != "params"}
    with hopper.interpreting(), warnings.catch_warnings():
        warnings.simplefilter("error", backend.KernelFallbackWarning)
        jax.eval_shape(jax.grad(loss), variables["params"], rest)
    chosen = {c.op for c in backend.choices() if c.implementation == "pallas_gpu"}
    assert chosen == {
        "attention",
        "gather_quantize_both_ways",
        "grouped_matmul",
        "grouped_wgrad",
        "permute_quantize",
        "quantize_blocks",
        "quantize_both_ways",
        "quantize_rows",
        "quantize_rows_in_two_formats",
        "quantize_transposed",
        "rms_norm_quantize",
        "route_top_k",
        "scaled_matmul",
        "swiglu_backward_quantize",
        "swiglu_quantize",
    }


@INTERPRETER_IS_NEWER
def test_the_routers_kernel_chooses_and_learns_as_plain_jax():
    config = ModelConfig(
        hidden_size=64, n_routed_experts=32, n_group=8, topk_group=4, num_experts_per_tok=4
    )
    x, gate = normal(11, 64, dtype=jnp.float32), normal(32, 64, dtype=jnp.float32)
    bias = normal(32, scale=0.1, dtype=jnp.float32)

    def scored(x, gate):
        routing = route(x, gate, bias, config)
        return routing.weights_TK.sum() + (routing.scores_TE**2).sum(), routing

    run = jax.value_and_grad(scored, argnums=(0, 1), has_aux=True)
    want = run(x, gate)
    with backend.use("pallas_gpu"), hopper.interpreting():
        got = jax.block_until_ready(run(x, gate))
    np.testing.assert_array_equal(got[0][1].experts_TK, want[0][1].experts_TK)
    assert worst(got, want) < 1e-6
