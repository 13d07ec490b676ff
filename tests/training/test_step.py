"""One training step: accumulation, the router bias, the guard against NaN, devices, compilation."""

import collections
import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import QuantConfig
from dsv3_jax.model.router import update_router_bias
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.state import TrainState, init_state
from dsv3_jax.training.step import router_bias, train_step
from tests.helpers import (
    TOLERANCE,
    random_tokens,
    random_variables,
    relative_error,
    tiny_config,
    tiny_model,
)

# A MoE layer and an MTP module: what a step does to them it does to dense layers, which would be a
# third of the program. Every kind of layer is in test_gradient_sums.py and on meshes.
MODEL = tiny_model(num_hidden_layers=1, first_k_dense_replace=0)
CONFIG = tiny_config(MODEL, batch_size=8, micro_batch_size=2)
ROWS = random_tokens(MODEL, 8, 10)
IN_FOUR = ROWS.reshape(4, 2, 10)
# Of gradients that are large enough, at any batch size. Seen: 0.11.
FP8 = 0.2
NAMES = ("moe_layers", "mtp_0")

# The only compiled step of this file: shapes tell its uses apart.
step = jax.jit(partial(train_step, config=CONFIG))


def settings(micro_batches=4, mtp_loss_weight=0.3):
    values = (np.float32(1e-2), np.float32(1e-3), np.float32(mtp_loss_weight))
    return StepSettings(*values, np.int32(micro_batches))


def fresh_state(seed=0):
    """A state with two steps' worth of moments and biases in it."""
    variables = random_variables(MODEL, seed)
    zero = jnp.zeros((), jnp.int32)
    opt_state = make_optimizer(CONFIG.optimizer).init(variables["params"])
    return TrainState(zero, variables["params"], variables["router"], opt_state, zero, zero)


@pytest.fixture(scope="module")
def accumulated():
    return step(fresh_state(), IN_FOUR, settings())


@pytest.fixture(scope="module")
def whole():
    return step(fresh_state(), ROWS[None], settings(1))


def test_accumulation_equals_one_big_batch(accumulated, whole):
    (got, got_metrics), (want, want_metrics) = accumulated, whole
    assert float(got_metrics.loss) == pytest.approx(float(want_metrics.loss), rel=2e-6)
    assert float(got_metrics.grad_norm) == pytest.approx(float(want_metrics.grad_norm), rel=1e-5)
    moments = [s.opt_state[1].mu for s in (got, want)]
    assert relative_error(*moments) < TOLERANCE["f32_gradient"]
    # Loads are integers: the biases are equal bit for bit.
    for name in NAMES:
        np.testing.assert_array_equal(got_metrics.terms.load[name], want_metrics.terms.load[name])
    jax.tree.map(np.testing.assert_array_equal, got.router, want.router)


def test_the_bias_moves_by_the_load_of_the_whole_batch(accumulated):
    """Moving it after every micro-batch would be another rule: signs do not add up."""
    before, (after, metrics) = fresh_state(), accumulated
    for name in NAMES:
        load = metrics.terms.load[name]
        want = update_router_bias(router_bias(before.router, name), load, np.float32(1e-3))
        np.testing.assert_array_equal(router_bias(after.router, name), want)
    load = metrics.terms.load["moe_layers"]
    assert int(load.sum()) == 8 * 9 * MODEL.num_experts_per_tok
    # The loads of the micro-batches one by one, each after the bias had moved by the last.
    state = before
    for micro in IN_FOUR:
        rows = np.stack([micro] * 4)  # num_micro_batches=1 reads the first alone
        moved, metrics = step(state, rows, settings(1))
        state = state._replace(router=moved.router)
    wrong = router_bias(state.router, "moe_layers")
    assert np.abs(wrong - router_bias(after.router, "moe_layers")).max() > 1e-3


def test_signs_of_micro_batch_loads_do_not_add_up():
    """Three micro-batches slightly over, one far under: per micro-batch the bias would fall."""
    loads = jnp.array([[11, 9], [11, 9], [11, 9], [2, 18]])
    right = update_router_bias(jnp.zeros(2), loads.sum(0), 1.0)
    wrong = sum(update_router_bias(jnp.zeros(2), load, 1.0) for load in loads)
    np.testing.assert_array_equal(right, [1, -1])
    np.testing.assert_array_equal(wrong, [-2, 2])


def test_rows_beyond_the_step_s_batch_are_not_read():
    """The batch-size ramp: two of four micro-batches, whatever the others hold."""
    garbage = IN_FOUR.copy()
    garbage[2:] = 0
    results = [step(fresh_state(), rows, settings(2)) for rows in (IN_FOUR, garbage)]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_train_step_compiles_once():
    """Steps, the batch-size ramp, lambda and the learning rate compile nothing anew."""
    state, _ = step(fresh_state(), IN_FOUR, settings())
    programs = step._cache_size()
    for micro_batches in (1, 2, 4):
        changing = settings(micro_batches, mtp_loss_weight=0.1 * micro_batches)
        changing = changing._replace(learning_rate=np.float32(micro_batches * 1e-3))
        state, _ = step(state, IN_FOUR, changing)
    assert step._cache_size() == programs
    assert int(state.step) == 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(value, accumulated):
    before = fresh_state()
    after, metrics = step(before, IN_FOUR, settings(mtp_loss_weight=value))
    assert not metrics.applied and not np.isfinite(metrics.loss)
    for kept in ("params", "router", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, kept), getattr(before, kept))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (1, 1, 1)
    again, _ = step(after, IN_FOUR, settings(mtp_loss_weight=value))
    assert (int(again.skipped), int(again.skipped_in_row)) == (2, 2)
    # The next good step is the one that would have been taken first.
    resumed, metrics = step(again, IN_FOUR, settings())
    assert metrics.applied
    assert (int(resumed.step), int(resumed.skipped), int(resumed.skipped_in_row)) == (3, 2, 0)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, accumulated[0].params)
    jax.tree.map(np.testing.assert_array_equal, resumed.opt_state, accumulated[0].opt_state)


def test_the_loss_falls():
    state, losses = fresh_state(), []
    for _ in range(8):
        state, metrics = step(state, IN_FOUR, settings())
        losses.append(float(metrics.terms.ce))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_fp8_keeps_gradients_that_are_small():
    """A tile's scale has a floor; gradients of a late step, here 1e-9 a token, stay well above it.

    Loud embeddings make them small: a norm's gradient is divided by what it normalises.
    """
    state = fresh_state()
    loud = state.params | {"embed_tokens": 1e8 * state.params["embed_tokens"]}
    rows = random_tokens(MODEL, 8, 65)[None]
    gradients = {}
    for preset in ("bf16", "fp8_paper"):
        config = dataclasses.replace(CONFIG, quant=QuantConfig(preset))
        after, _ = jax.jit(partial(train_step, config=config))(
            state._replace(params=loud), rows, settings(1)
        )
        gradients[preset] = after.opt_state[1].mu["moe_layers"]["self_attn"]["q_a_proj"]
    want, got = gradients["bf16"], gradients["fp8_paper"]
    assert jnp.linalg.norm(got - want) < FP8 * jnp.linalg.norm(want)


def traced_step(layers):
    """The step of a model with this many layers and no MTP, for one micro-batch, not lowered."""
    model = dataclasses.replace(MODEL, num_hidden_layers=layers, num_nextn_predict_layers=0)
    config = dataclasses.replace(CONFIG, model=model)
    state = jax.eval_shape(partial(init_state, config=config), jax.random.key(0))
    return jax.jit(partial(train_step, config=config)).trace(state, ROWS[None], settings(1))


def test_a_deeper_model_is_the_same_program():
    """Layers are scanned: 4 and 16 of them are as many equations, so compile as fast."""
    equations = [str(traced_step(layers).jaxpr).count(" = ") for layers in (4, 16)]
    assert equations[0] == equations[1] > 1000


@pytest.mark.slow
def test_a_deeper_model_compiles_to_as_many_instructions():
    # Where constants stand, in a fusion or before its loop, depends on their sizes.
    without_work = {"parameter", "constant", "broadcast"}

    def instructions(layers: int) -> dict[str, int]:
        program = traced_step(layers).lower().compile().as_text()
        counts = collections.Counter(re.findall(r" = \S+ ([a-z\-]+)\(", program))
        return {name: n for name, n in counts.items() if name not in without_work}

    assert instructions(4) == instructions(16)
