"""Picking a token: greedy, temperature, the nucleus, the seed, and the token's number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.sampling import Settings, draw, likeliest, log_probability, nucleus

# Probabilities of 0.5, 0.25, 0.15, 0.1, not in order.
PROBS = np.array([0.15, 0.5, 0.1, 0.25])
LOGITS = jnp.asarray(np.log(PROBS) + 3.0, jnp.float32)
DRAWS = 4000

run = jax.jit(draw, static_argnames="sampled")


def settings(count, temperature=1.0, top_p=1.0, seeds=None):
    seeds = np.arange(count) if seeds is None else seeds
    return Settings(
        jnp.full(count, temperature, jnp.float32),
        jnp.full(count, top_p, jnp.float32),
        jnp.asarray(seeds, jnp.uint32),
    )


def frequencies(temperature, top_p, number=0):
    logits = jnp.tile(LOGITS, (DRAWS, 1, 1))
    tokens = run(logits, settings(DRAWS, temperature, top_p), jnp.full(DRAWS, number))
    assert tokens.dtype == jnp.int32 and tokens.shape == (DRAWS, 1)
    return np.bincount(tokens[:, 0], minlength=4) / DRAWS


def test_the_likeliest_is_the_first_of_the_largest():
    rows = np.random.default_rng(0).integers(0, 6, (5, 3, 40)).astype(np.float32)
    rows[0, 0, 7] = rows[0, 0, 30] = np.inf
    rows[1] = -np.inf
    np.testing.assert_array_equal(jax.jit(likeliest)(rows), rows.argmax(-1))
    # Of numbers that are none, an id all the same.
    assert 0 <= int(likeliest(jnp.full(40, jnp.nan))) < 40


def test_temperature_zero_is_greedy():
    np.testing.assert_array_equal(frequencies(0.0, 1.0), [0, 1, 0, 0])
    for sampled in (True, False):
        ties = run(jnp.zeros((1, 1, 4)), settings(1, 0.0), jnp.zeros(1, int), sampled=sampled)
        assert ties.tolist() == [[0]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    want = PROBS ** (1 / temperature)
    want /= want.sum()
    # Four standard deviations of a frequency of 4,000 draws.
    limit = 4 * np.sqrt(want * (1 - want) / DRAWS)
    assert (np.abs(frequencies(temperature, 1.0) - want) < limit).all()


@pytest.mark.parametrize(
    "top_p, kept",
    [
        (1.0, {0, 1, 2, 3}),
        (0.95, {0, 1, 2, 3}),
        (0.89, {0, 1, 3}),
        (0.7, {1, 3}),
        (0.4, {1}),
        (0.0, {1}),  # the likeliest always stays
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    got = frequencies(1.0, top_p)
    assert set(np.flatnonzero(got)) == kept
    want = np.where([token in kept for token in range(4)], PROBS, 0)
    want /= want.sum()
    assert (np.abs(got - want) <= 4 * np.sqrt(want * (1 - want) / DRAWS)).all()


def test_the_nucleus_without_a_sort_is_that_of_a_sort():
    """Rows of all signs and scales, -inf among them; no two logits are equal."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 301)) * np.geomspace(0.1, 30, 60)[:, None]
    rows[::3, :7] = -np.inf
    rows[:, 7:] = np.sort(rows[:, 7:], axis=1)
    rows = rng.permuted(rows, axis=1).astype(np.float32)
    top_p = rng.uniform(0.05, 0.99, 60).astype(np.float32)
    got = np.asarray(jax.jit(nucleus)(rows[:, None], top_p[:, None]))[:, 0]
    for row, limit, kept in zip(rows.astype(np.float64), top_p, got, strict=True):
        order = np.argsort(-row, kind="stable")
        probs = np.exp(row[order] - row.max())
        probs /= probs.sum()
        before = np.cumsum(probs) - probs
        # The sums' own rounding decides no case here.
        assert np.abs(before - limit).min() > 1e-6
        assert set(np.flatnonzero(kept)) == set(order[before < limit])


def test_a_token_depends_on_seed_and_number_and_on_nothing_else():
    """Row t of a call is for number + t; neither the batch nor the calls before matter."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(5, 3, 50)), jnp.float32)
    seeds = [3, 1, 4, 1, 5]
    together = run(logits, settings(5, seeds=seeds), jnp.full(5, 7))
    for row in range(5):
        for place in range(3):
            of_one = settings(1, seeds=seeds[row : row + 1])
            alone = run(logits[row : row + 1, place : place + 1], of_one, jnp.full(1, 7 + place))
            assert int(alone[0, 0]) == int(together[row, place])
    flat = jnp.zeros((2, 40, 50))
    first, second = np.asarray(run(flat, settings(2, seeds=[3, 4]), jnp.zeros(2, int)))
    assert (first != second).mean() > 0.8 and len(set(first.tolist())) > 10


def test_log_probabilities_are_the_model_s_own():
    got = log_probability(jnp.tile(LOGITS, (4, 1)), jnp.arange(4))
    np.testing.assert_allclose(got, np.log(PROBS), rtol=1e-5)
