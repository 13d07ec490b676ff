"""Gradients that products leave in their places are those that JAX would have returned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import QuantConfig
from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.training.loss import training_loss
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import for_products, gradients
from tests.helpers import (
    TOLERANCE,
    random_tokens,
    random_variables,
    relative_error,
    tiny_config,
    tiny_model,
)

MODEL = tiny_model(num_hidden_layers=3, dtype="bfloat16")


def by_jax(state, rows, settings, config):
    """Sums over micro-batches of what JAX returns, and means."""
    weights = for_products(state.params, config)

    def loss_of(params, micro):
        variables = {"params": weights.held(params), "router": state.router}
        return training_loss(variables, micro, settings.mtp_loss_weight, config)[0] * 64

    grads = [jax.grad(loss_of)(state.params, micro) for micro in rows]
    return jax.tree.map(lambda *g: sum(g) / (64 * len(g)), *grads)


@pytest.mark.parametrize(
    "preset, micro, remat",
    [
        ("bf16", 1, "v3"),
        ("bf16", 2, "none"),
        ("fp8_paper", 2, "none"),
        ("fp8_paper", 1, "full"),
    ],
)
@pytest.mark.slow
def test_every_gradient_of_a_step(preset, micro, remat):
    """Layers in a stack and MTP's, dense, shared and routed; one micro-batch, and two added up."""
    config = tiny_config(MODEL, batch_size=2, micro_batch_size=micro, remat=remat)
    config = dataclasses.replace(config, quant=QuantConfig(preset=preset))
    variables, zero = random_variables(MODEL), jnp.zeros((), jnp.int32)
    state = TrainState(zero, variables["params"], variables["router"], None, zero, zero)
    rows = random_tokens(MODEL, 2, 10).reshape(2 // micro, micro, 10)
    settings = Schedule(config).settings(0)._replace(num_micro_batches=np.int32(len(rows)))
    summing = for_products(state.params, config)
    places = jax.eval_shape(lambda: jax.tree.map(jnp.zeros_like, summing.summing(True).trained))
    assert len(jax.tree.leaves(places)) < len(jax.tree.leaves(state.params)) / 2, "nothing is left"

    operands = state, rows, settings
    got = jax.jit(lambda *operands: gradients(*operands, config)[2])(*operands)
    want = jax.jit(lambda *operands: by_jax(*operands, config))(*operands)
    # The same products on the same numbers; sums over micro-batches may begin elsewhere. XLA:CPU
    # leaves out other roundings to BF16 in another program.
    limit = TOLERANCE["bf16_op"] if preset == "bf16" else TOLERANCE["bf16_model"]
    for (path, of_step), of_jax in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
    ):
        assert relative_error(of_step, of_jax) < limit, jax.tree_util.keystr(path)


def test_matrices_of_one_shape_lie_in_one_array():
    """Dense layers, MoE layers and MTP: one kernel writes the gradients of all of them."""
    found = {}

    def look(params):
        sums = for_products(params, config).summing(False, squares=True).sums
        for path, place in jax.tree_util.tree_leaves_with_path(
            sums, is_leaf=lambda x: isinstance(x, GradientSum)
        ):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found[name] = id(place.total), place.total.shape, int(place.number)
        return 0.0

    config = dataclasses.replace(tiny_config(MODEL), quant=QuantConfig(preset="fp8_paper"))
    jax.eval_shape(look, random_variables(MODEL)["params"])
    places = [found[f"{layers}/self_attn/o_proj"] for layers in ("dense_layers", "moe_layers")]
    places.append(found["mtp_0/block/self_attn/o_proj"])
    assert len({array for array, *_ in places}) == 1
    dense, moe = MODEL.first_k_dense_replace, MODEL.num_hidden_layers
    assert [first for *_, first in places] == [0, dense, moe] and places[0][1][0] == moe + 1
