"""AdamW against its textbook form and optax's, clipping, moments' dtypes, the decay mask."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.model.transformer import init_variables
from dsv3_jax.training.optimizer import decayed, make_optimizer
from tests.helpers import TOLERANCE, relative_error, tiny_model

CONFIG = OptimizerConfig(learning_rate=0.1, clip_norm=1.0)
STEPS = 4


def problem(seed=0):
    """Parameters with a matrix and a norm, and gradients whose norm lies above and below 1."""
    rng = np.random.default_rng(seed)
    draw = lambda: {  # noqa: E731
        "q_proj": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "enorm": jnp.asarray(rng.normal(size=4), jnp.float32),
    }
    gradients = [jax.tree.map(lambda g, s=s: s * g, draw()) for s in (3.0, 0.05, 0.1, 1.0)]
    return draw(), gradients


def train(optimizer, params, gradients, rate):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return params, state


def adamw_in_numpy(params, gradients, config: OptimizerConfig):
    """Kingma & Ba (2015) with decoupled decay (Loshchilov & Hutter 2019), clipped, in f64."""
    params = {name: np.float64(p) for name, p in params.items()}
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, start=1):
        norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in gradient.values()))
        for name, p in params.items():
            g = np.float64(gradient[name]) * min(1.0, config.clip_norm / norm)
            m[name] = config.b1 * m[name] + (1 - config.b1) * g
            v[name] = config.b2 * v[name] + (1 - config.b2) * g * g
            m_hat, v_hat = m[name] / (1 - config.b1**t), v[name] / (1 - config.b2**t)
            decay = 0 if name == "enorm" else config.weight_decay
            step = m_hat / (np.sqrt(v_hat) + config.eps) + decay * p
            params[name] = p - config.learning_rate * step
    return params


def test_adamw_equals_the_textbook():
    params, gradients = problem()
    got, _ = train(make_optimizer(CONFIG), params, gradients, CONFIG.learning_rate)
    want = adamw_in_numpy(params, gradients, CONFIG)
    assert relative_error(got, want) < 5 * TOLERANCE["f32_op"]
    unclipped = dataclasses.replace(CONFIG, clip_norm=1e9)
    assert relative_error(got, adamw_in_numpy(params, gradients, unclipped)) > 1e-2


def test_adamw_equals_optax():
    params, gradients = problem()
    got, _ = train(make_optimizer(CONFIG), params, gradients, CONFIG.learning_rate)
    theirs = optax.chain(
        optax.clip_by_global_norm(CONFIG.clip_norm),
        optax.adamw(1.0, CONFIG.b1, CONFIG.b2, CONFIG.eps, weight_decay=0.1, mask=decayed),
    )
    with jax.numpy_dtype_promotion("standard"):  # optax's own mixes ints and floats
        want, _ = train(theirs, params, gradients, -CONFIG.learning_rate)
    assert relative_error(got, want) < TOLERANCE["f32_op"]


def test_both_moments_are_bf16_when_asked():
    """Held in bf16, computed in f32: after one step the direction is that of f32 moments."""
    params, gradients = problem()
    half = make_optimizer(dataclasses.replace(CONFIG, moment_dtype="bfloat16"))
    got, state = train(half, params, gradients[:1], CONFIG.learning_rate)
    want, full_state = train(make_optimizer(CONFIG), params, gradients[:1], CONFIG.learning_rate)
    assert relative_error(got, want) == 0
    moments = [(s[1].mu, s[1].nu) for s in (state, full_state)]
    assert {leaf.dtype for leaf in jax.tree.leaves(moments[0])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(moments[1])} == {jnp.dtype("float32")}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), moments[1])
    assert relative_error(moments[0], rounded) == 0
    got, _ = train(half, params, gradients, CONFIG.learning_rate)
    want, _ = train(make_optimizer(CONFIG), params, gradients, CONFIG.learning_rate)
    assert 0 < relative_error(got, want) < TOLERANCE["bf16_op"]


def test_every_matrix_decays_and_no_norm_does():
    shapes = jax.eval_shape(partial(init_variables, config=tiny_model()), jax.random.key(0))
    flags = jax.tree_util.tree_leaves_with_path(decayed(shapes["params"]))
    left_out = {path[-1].key for path, flag in flags if not flag}
    assert left_out == {
        *("input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm"),
        *("norm", "enorm", "hnorm"),
    }
    included = {path[-1].key for path, flag in flags if flag}
    assert included.isdisjoint(left_out)
    assert {"embed_tokens", "lm_head", "gate", "eh_proj", "kv_b_proj"} <= included


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_gradients_are_clipped_by_their_global_norm(scale):
    params, gradients = problem()
    gradient = jax.tree.map(lambda g: g * scale, gradients[3])
    # With b1 = b2 = 0 the direction g / (|g| + 1) tells g.
    no_decay = dataclasses.replace(CONFIG, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0)
    optimizer = make_optimizer(no_decay)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    clipped = jax.tree.map(lambda u: u / (1 - jnp.abs(u)), updates)
    norm = float(optax.tree.norm(gradient))
    assert float(optax.tree.norm(clipped)) == pytest.approx(min(norm, 1.0), rel=1e-4)


def test_a_step_that_is_not_applied_leaves_the_state_as_it_was():
    params, gradients = problem()
    optimizer = make_optimizer(CONFIG)
    _, state = optimizer.update(gradients[0], optimizer.init(params), params)
    bad = jax.tree.map(lambda g: g * jnp.nan, gradients[1])
    _, after = optimizer.update(bad, state, params, norm=jnp.float32(jnp.nan), applied=False)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_the_average_follows_the_weights_and_stays_when_a_step_is_not_applied():
    config = OptimizerConfig(average_decay=0.75, clip_norm=1e9)
    optimizer, params = make_optimizer(config), {"lm_head": jnp.arange(6.0).reshape(2, 3)}
    state, average = optimizer.init(params), np.arange(6.0).reshape(2, 3)
    for step in range(3):
        grads = {"lm_head": jnp.full((2, 3), step + 1.0)}
        applied = step != 1
        updates, state = optimizer.update(
            grads, state, params, applied=jnp.bool_(applied), learning_rate=jnp.float32(0.1)
        )
        if applied:
            params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
            average = 0.75 * average + 0.25 * np.asarray(params["lm_head"])
        np.testing.assert_allclose(state[-1].average["lm_head"], average, rtol=1e-6)
    assert len(make_optimizer(OptimizerConfig()).init(params)) == 3
