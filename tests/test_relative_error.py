"""The measure of the benchmarks: float64 of NumPy is kept, bfloat16 widened, NaN no small error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.errors import relative_error


def test_it_is_the_norm_of_the_difference_over_all_numbers():
    want = np.array([[3.0, 0.0], [0.0, 4.0]])
    error = relative_error(want + np.array([[0, 1e-12], [0, 0]]), want)
    assert error == pytest.approx(2e-13)  # float32 would lose it
    got = jax.jit(relative_error)(jnp.bfloat16([2.0, 2.0]), jnp.bfloat16([2.0, 1.0]))
    assert got.dtype == jnp.float32
    assert float(got) == pytest.approx(1 / 5**0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_an_infinite_error(bad):
    assert relative_error(np.array([1.0, bad]), np.ones(2)) == np.inf
    assert np.isinf(relative_error(jnp.array([1.0, bad]), jnp.ones(2)))
