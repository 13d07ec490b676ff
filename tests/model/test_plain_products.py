"""Products in BF16 of weights that are trained in float32: gradients are the sums themselves."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ParallelConfig, QuantConfig
from dsv3_jax.model.plain_products import grouped_product, product
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.quantization.block_scaled import StepWeight
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.step import gradients
from tests.cases import in_every_run
from tests.helpers import (
    TOLERANCE,
    random_state,
    random_tokens,
    relative_error,
    tiny_config,
    tiny_model,
)

RNG = np.random.default_rng(0)
SIZES = np.array([16, 0, 24], np.int32)
HELD = ["master", "copied before"]


def normal(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def held(weight, how):
    return weight if how == "master" else StepWeight(weight, weight.astype(jnp.bfloat16))


def exact(*operands):
    return [np.asarray(x.astype(jnp.bfloat16), np.float64) for x in operands]


@pytest.mark.parametrize("how", HELD)
def test_the_gradient_of_a_weight_is_not_rounded(how):
    x, weight, dy = normal(2, 24, 32), normal(3, 8, 32, dtype=jnp.float32), normal(2, 24, 3, 8)
    y, pull = jax.vjp(lambda x, w: product(x, held(w, how)), x, weight)
    dx, d_weight = pull(dy)
    xs, ws, dys = exact(x, weight, dy)
    assert y.dtype == dx.dtype == jnp.bfloat16 and d_weight.dtype == jnp.float32
    assert relative_error(y, np.einsum("btk,nhk->btnh", xs, ws)) < TOLERANCE["bf16_op"]
    assert relative_error(dx, np.einsum("btnh,nhk->btk", dys, ws)) < TOLERANCE["bf16_op"]
    assert relative_error(d_weight, np.einsum("btnh,btk->nhk", dys, xs)) < TOLERANCE["f32_op"]


@pytest.mark.parametrize("how", HELD)
def test_nor_is_that_of_an_expert_s(how):
    rows, weights = normal(48, 32), normal(3, 16, 32, dtype=jnp.float32)
    dy = normal(48, 16)

    def multiply(rows, weights):
        return grouped_product(rows, held(weights, how), jnp.asarray(SIZES), 8)

    y, pull = jax.vjp(multiply, rows, weights)
    d_rows, d_weights = pull(dy)
    assert d_weights.dtype == jnp.float32
    xs, ws, dys = exact(rows, weights, dy)
    start = 0
    for expert, size in enumerate(SIZES):
        group = slice(start, start + size)
        start += size
        if size:
            assert relative_error(y[group], xs[group] @ ws[expert].T) < TOLERANCE["bf16_op"]
            assert relative_error(d_rows[group], dys[group] @ ws[expert]) < TOLERANCE["bf16_op"]
        want = dys[group].T @ xs[group]
        assert relative_error(d_weights[expert], want) < TOLERANCE["f32_op"]
    assert not np.asarray(d_rows[start:], np.float32).any()


def test_nor_is_the_sum_over_devices():
    mesh = make_mesh(ParallelConfig(data=2))
    over_rows = NamedSharding(mesh, PartitionSpec("data"))
    x, dy = (jax.device_put(normal(4, 24, n), over_rows) for n in (32, 16))
    weight = normal(16, 32, dtype=jnp.float32)
    d_weight = jax.jit(lambda x, w, dy: jax.vjp(product, x, w)[1](dy)[1])(x, weight, dy)
    xs, dys = exact(x, dy)
    assert relative_error(d_weight, np.einsum("btn,btk->nk", dys, xs)) < TOLERANCE["f32_op"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", in_every_run(["bf16", "fp8_paper"], "bf16"))
def test_no_matrix_of_a_step_has_a_gradient_of_bf16_numbers(preset):
    """One rounding of a sum over all tokens to BF16 is 2e-3 of it, as much as a product's own."""
    # Its shared expert is what a dense layer is.
    model = tiny_model(num_hidden_layers=1, first_k_dense_replace=0, dtype="bfloat16")
    config = tiny_config(model, batch_size=2, micro_batch_size=2)
    config = dataclasses.replace(config, quant=QuantConfig(preset=preset))
    state = random_state(config)
    rows = random_tokens(config.model, 2, 10)[None]
    grads = jax.jit(partial(gradients, config=config))(state, rows, Schedule(config).settings(0))[2]
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if g.ndim < 2 or "norm" in path[-1].key or path[-1].key == "embed_tokens":
            continue
        some = np.asarray(g)[np.asarray(g) != 0]
        in_bf16 = np.mean(some == np.asarray(some.astype(jnp.bfloat16), np.float32))
        assert in_bf16 < 0.1, (jax.tree_util.keystr(path), in_bf16)
