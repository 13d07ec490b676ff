"""Work on a second stream: the same results, and what it passes on is not written anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.beside import beside

OLD = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11)
pytestmark = pytest.mark.skipif(OLD, reason="compute_on has this form from jax 0.11 on")

SEEN = []


def work(pair, unread):
    x, weight = pair
    SEEN.append(hopper.multiprocessors())
    y = jax.jit(jnp.dot)(x, weight)
    return {"y": y, "weight": weight, "shape": jnp.zeros((0, unread.shape[1])), "one": 1.0}


def test_results_are_those_of_the_function():
    operands = (jnp.arange(12.0).reshape(3, 4), jnp.ones((4, 5))), jnp.zeros((7, 2))
    want = work(*operands)
    got = jax.jit(beside(work, 20))(*operands)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert SEEN[-1] == SEEN[0] - 20


def test_the_stream_has_what_is_computed_and_nothing_else():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 4), (4, 5), (7, 2))]
    program = jax.jit(lambda x, w, unread: beside(work, 20)((x, w), unread))
    text = program.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "_xla_stream_annotation" in line]
    assert len(calls) == 1, "a function called inside is not put there again"
    types = calls[0].rsplit(" : ", 1)[1]
    assert types.startswith("(tensor<3x4xf32>, tensor<4x5xf32>) -> ")
    assert "7x2" not in types and types.count("4x5") == 1
