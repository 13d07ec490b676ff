"""The router, the balance loss, the bias update and the experts, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.expert_ffn import expert_ffn
from dsv3_jax.model.router import Routing, balance_loss, route, update_router_bias
from tests import oracle
from tests.helpers import TOLERANCE, relative_error, tiny_model

ROUTERS = {
    "v3": tiny_model(),
    "v3_without_groups": tiny_model(n_group=1, topk_group=1),
    "v2": tiny_model(
        scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False
    ),
    "v2_lite": tiny_model(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False),
}


def router_inputs(config, tokens=33, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, config.hidden_size)).astype(np.float32)
    gate = 0.3 * rng.normal(size=(config.n_routed_experts, config.hidden_size)).astype(np.float32)
    bias = 0.3 * rng.normal(size=config.n_routed_experts).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(gate), jnp.asarray(bias) if config.has_router_bias else None


@pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS)
def test_route_equals_brute_force(config):
    x, gate, bias = router_inputs(config)
    got = route(x, gate, bias, config)
    want = oracle.route(
        np.float64(x), np.float64(gate), None if bias is None else np.float64(bias), config
    )
    np.testing.assert_array_equal(got.experts_TK, want.experts)
    assert got.weights_TK.dtype == got.scores_TE.dtype == jnp.float32
    assert relative_error(got.weights_TK, want.weights) < 5 * TOLERANCE["f32_op"]
    assert relative_error(got.scores_TE, want.scores) < 5 * TOLERANCE["f32_op"]


def test_every_token_stays_within_its_best_groups():
    config = tiny_model()
    experts = np.asarray(route(*router_inputs(config, tokens=200), config).experts_TK)
    size = config.n_routed_experts // config.n_group
    groups = [len(set(row // size)) for row in experts]
    assert max(groups) == config.topk_group
    assert all(len(set(row)) == config.num_experts_per_tok for row in experts)


def test_losing_groups_lose_even_to_negative_scores():
    """A bias below -1 makes the winners' scores negative. Losers masked with 0.0, as some code has
    it, would then be chosen; with -inf they cannot be."""
    config = tiny_model()
    x, gate, _ = router_inputs(config)
    # Every biased score is negative; groups 2 and 3 are the least bad by far.
    bias = jnp.array([-9.0, -9, -9, -9, -3, -3, -3, -3])
    got = np.asarray(route(x, gate, bias, config).experts_TK)
    assert set(got.ravel()) <= {4, 5, 6, 7}
    biased = np.asarray(jax.nn.sigmoid(x @ gate.T) + bias)
    zero_masked = np.where(np.arange(8) >= 4, biased, 0.0)
    wrong = np.argsort(-zero_masked, axis=1, kind="stable")[:, : config.num_experts_per_tok]
    assert (wrong < 4).all()


def test_the_bias_steers_the_choice_and_nothing_else():
    """Two biases with the same choice give the same weights; gradients do not see the bias."""
    config = tiny_model(n_group=1, topk_group=1)
    x, gate, _ = router_inputs(config)
    bias = jnp.zeros(8).at[5].set(10.0)
    got = route(x, gate, bias, config)
    assert (np.asarray(got.experts_TK) == 5).any(axis=1).all()
    assert not (np.asarray(route(x, gate, jnp.zeros(8), config).experts_TK) == 5).any(1).all()
    raw = jnp.take_along_axis(jax.nn.sigmoid(x @ gate.T), got.experts_TK, axis=1)
    want = raw / raw.sum(1, keepdims=True) * config.routed_scaling_factor
    assert relative_error(got.weights_TK, want) < 5 * TOLERANCE["f32_op"]
    more = route(x, gate, bias.at[5].set(20.0), config)
    np.testing.assert_array_equal(more.weights_TK, got.weights_TK)
    d_bias = jax.grad(lambda b: jnp.sum(jnp.square(route(x, gate, b, config).weights_TK)))(bias)
    np.testing.assert_array_equal(d_bias, 0)


def test_normalised_weights_sum_to_the_scaling_factor():
    config = tiny_model(routed_scaling_factor=2.5)
    weights = np.asarray(route(*router_inputs(config), config).weights_TK)
    assert weights.sum(1) == pytest.approx(2.5, rel=1e-6)
    assert (weights > 0).all()


def test_scores_are_f32_for_bf16_activations():
    config = tiny_model()
    x, gate, bias = router_inputs(config)
    x = x.astype(jnp.bfloat16)
    got = route(x, gate, bias, config)
    want = oracle.route(
        np.float64(x.astype(jnp.float32)), np.float64(gate), np.float64(bias), config
    )
    np.testing.assert_array_equal(got.experts_TK, want.experts)
    assert relative_error(got.weights_TK, want.weights) < 5 * TOLERANCE["f32_op"]


def test_balance_loss_equals_the_paper():
    scores = np.random.default_rng(0).uniform(0.01, 1, (3, 13, 8)).astype(np.float32)
    want = np.mean([oracle.balance_loss(np.float64(s), 3) for s in scores])
    assert float(balance_loss(jnp.asarray(scores), 3)) == pytest.approx(want, rel=1e-6)
    # Perfect balance scores 1: K/E of the tokens and 1/E of the scores an expert, E times.
    even = jnp.asarray(np.eye(8, dtype=np.float32)[None] + 0.01)
    assert float(balance_loss(even, 1)) == pytest.approx(1.0, rel=1e-6)


def test_balance_loss_leaves_masked_tokens_out():
    scores = np.random.default_rng(1).uniform(0.01, 1, (2, 9, 8)).astype(np.float32)
    mask = jnp.arange(9)[None] < jnp.array([[9], [6]])
    want = [oracle.balance_loss(np.float64(s), 3) for s in (scores[0], scores[1, :6])]
    got = float(balance_loss(jnp.asarray(scores), 3, mask))
    assert got == pytest.approx(np.mean(want), rel=1e-6)


def test_balance_loss_gradient_by_finite_differences():
    """f is a count and has no gradient; P's is what the difference quotient sees."""
    scores = np.random.default_rng(2).uniform(0.1, 1, (1, 5, 8))
    got = jax.grad(lambda s: balance_loss(s, 3))(jnp.asarray(scores, jnp.float32))
    want, h = np.zeros(scores.shape), 1e-5  # far below the gaps between scores: no choice flips
    for index in np.ndindex(scores.shape):
        step = np.zeros(scores.shape)
        step[index] = h
        pair = [oracle.balance_loss((scores + sign * step)[0], 3) for sign in (1, -1)]
        want[index] = (pair[0] - pair[1]) / (2 * h)
    assert relative_error(got, want) < TOLERANCE["finite_difference"]


def test_bias_moves_towards_balance():
    bias = jnp.arange(4.0)
    got = update_router_bias(bias, jnp.array([10, 0, 6, 4]), 0.5)  # mean 5
    np.testing.assert_array_equal(got - bias, [-0.5, 0.5, -0.5, 0.5])


def test_bias_stays_at_exact_balance():
    got = update_router_bias(jnp.zeros((2, 4)), jnp.array([[5, 5, 5, 5], [5, 4, 5, 6]]), 0.5)
    np.testing.assert_array_equal(got, [[0, 0, 0, 0], [0, 0.5, 0, -0.5]])
    # A mean of 1.25: nobody is at it.
    np.testing.assert_array_equal(
        update_router_bias(jnp.zeros(4), jnp.array([1, 1, 1, 2]), 1.0), [1, 1, 1, -1]
    )


def test_bias_update_is_exact_at_the_paper_s_load():
    """A step of V3 makes 62,914,560 tokens x 8 = 503 million entries a layer: mean 1,966,080.

    In f32 the sum would be rounded, and a load times 256 would not fit an int32.
    """
    load = jnp.full(256, 1_966_080, jnp.int32).at[0].add(1).at[1].add(-1)
    want = np.zeros(256)
    want[:2] = -1, 1
    np.testing.assert_array_equal(update_router_bias(jnp.zeros(256), load, 1.0), want)
    # The extreme: every token to the same 8 experts.
    load = jnp.zeros(256, jnp.int32).at[:8].set(62_914_560)
    want = np.where(np.arange(256) < 8, -1, 1)
    np.testing.assert_array_equal(update_router_bias(jnp.zeros(256), load, 1.0), want)


def expert_inputs(experts_TK, num_experts=8, dim=12, width=10, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    tokens, per_token = experts_TK.shape
    arrays = (
        rng.normal(size=(tokens, dim)),
        rng.uniform(0.1, 1, (tokens, per_token)),
        rng.normal(size=(num_experts, 2, width, dim)) / np.sqrt(dim),
        rng.normal(size=(num_experts, dim, width)) / np.sqrt(width),
    )
    x, weights, gate_up, down = (jnp.asarray(a, jnp.float32) for a in arrays)
    return x.astype(dtype), weights, gate_up, down


def all_experts(x, weights, gate_up, down, experts_TK):
    """Every expert on every token, weighted by 0 where it was not chosen."""
    gate_TE = (jax.nn.one_hot(experts_TK, gate_up.shape[0]) * weights[..., None]).sum(1)
    h = jnp.einsum("td,ecfd->tecf", x, gate_up, precision="highest")
    h = jax.nn.silu(h[:, :, 0]) * h[:, :, 1]
    return jnp.einsum("tef,edf,te->td", h, down, gate_TE, precision="highest")


ROUTINGS = {
    "even": np.stack([np.random.default_rng(t).permutation(8)[:3] for t in range(21)]),
    "all_tokens_to_the_same_experts": np.tile([7, 0, 3], (21, 1)),
    "one_token": np.array([[2, 5, 6]]),
}


@pytest.mark.parametrize("experts_TK", ROUTINGS.values(), ids=ROUTINGS)
def test_expert_ffn_equals_all_experts(experts_TK):
    """No token is dropped, however uneven the load: values and the gradients of all inputs."""
    experts_TK = jnp.asarray(experts_TK, jnp.int32)
    arrays = expert_inputs(experts_TK)

    def run(function):
        def total(*arrays):
            out = function(*arrays)
            return jnp.sum(jnp.sin(out)), out

        gradient = jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)
        (_, out), gradients = jax.jit(gradient)(*arrays)
        return out, list(gradients)

    def grouped(x, weights, gate_up, down):
        return expert_ffn(x, Routing(experts_TK, weights, weights), gate_up, down)

    got, got_gradients = run(grouped)
    want, want_gradients = run(lambda *arrays: all_experts(*arrays, experts_TK))
    assert relative_error(got, want) < 3 * TOLERANCE["f32_op"]
    assert (np.abs(got).sum(axis=1) > 0).all()
    assert relative_error(got_gradients, want_gradients) < TOLERANCE["f32_gradient"]


@pytest.mark.slow
def test_expert_ffn_in_bf16_rounds_and_no_more():
    experts_TK = jnp.asarray(ROUTINGS["even"], jnp.int32)
    x, weights, gate_up, down = expert_inputs(experts_TK, dtype=jnp.bfloat16)
    got = expert_ffn(x, Routing(experts_TK, weights, weights), gate_up, down)
    assert got.dtype == jnp.bfloat16
    want = all_experts(x.astype(jnp.float32), weights, gate_up, down, experts_TK)
    assert relative_error(got, want) < 2 * TOLERANCE["bf16_op"]
