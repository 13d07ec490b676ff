"""Picking a token: greedy, temperature, the nucleus, and the seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.sampling import sample

# Probabilities of 0.5, 0.25, 0.15, 0.1, not in order.
PROBS = np.array([0.15, 0.5, 0.1, 0.25])
LOGITS = jnp.asarray(np.log(PROBS) + 3.0, jnp.float32)
DRAWS = 4000

draw = jax.jit(sample)


def frequencies(temperature, top_p, seed=0):
    tokens = draw(jnp.tile(LOGITS, (DRAWS, 1)), jax.random.key(seed), temperature, top_p)
    assert tokens.dtype == jnp.int32
    return np.bincount(tokens, minlength=4) / DRAWS


def test_temperature_zero_is_greedy():
    np.testing.assert_array_equal(frequencies(0.0, 1.0), [0, 1, 0, 0])
    ties = draw(jnp.zeros((1, 4)), jax.random.key(0), 0.0, 1.0)
    assert int(ties[0]) == 0


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


def test_a_seed_draws_the_same_and_another_seed_does_not():
    np.testing.assert_array_equal(frequencies(1.0, 1.0, seed=3), frequencies(1.0, 1.0, seed=3))
    assert (frequencies(1.0, 1.0, seed=3) != frequencies(1.0, 1.0, seed=4)).any()


def test_rows_are_drawn_independently():
    """All rows draw from the same distribution, but not the same token."""
    tokens = draw(jnp.zeros((50, 4)), jax.random.key(0), 1.0, 1.0)
    assert len(set(np.asarray(tokens).tolist())) == 4
