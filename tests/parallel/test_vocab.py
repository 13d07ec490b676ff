"""The embedding's gradient by the rows that tokens read, as on GPUs, is the plain one."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import backend
from dsv3_jax.parallel.sharding import ONE_DEVICE
from dsv3_jax.parallel.vocab import embed

V, D = 64, 8
GPU = SimpleNamespace(platform="gpu")


def gradient(tokens, d_rows, device):
    """Of a table, for rows' gradients."""

    def product(table):
        with backend.compiling_for(device):
            return jnp.sum(embed(table, tokens, "float32", ONE_DEVICE) * d_rows)

    return jax.jit(jax.grad(product))(jnp.zeros((V, D)))


@pytest.mark.parametrize("ids", ["all different", "one", "the ends", "drawn"])
def test_the_gradient_by_rows_is_the_plain_one(ids):
    rng = np.random.default_rng(0)
    tokens = {
        "all different": np.arange(V)[::-1][: V - 1],
        "one": np.full(20, 7),
        "the ends": np.array([V - 1, 0, 0, V - 1]),
        "drawn": rng.integers(0, 9, 40),
    }[ids][None]
    # Whole numbers, whose sums are exact in any order.
    d_rows = rng.integers(-9, 9, (*tokens.shape, D)).astype(np.float32)
    plain = np.zeros((V, D), np.float32)
    np.add.at(plain, tokens, d_rows)
    for device in (GPU, None):
        np.testing.assert_array_equal(gradient(tokens, d_rows, device), plain)


def test_many_tokens_have_a_table_of_sums():
    """As many tokens as rows: nothing is gained by looking sums up."""

    def sorts(count, device):
        tokens = np.zeros((1, count), np.int32)
        rows = jnp.ones((1, count, D))
        traced = jax.make_jaxpr(lambda: gradient(tokens, rows, device))()
        return " sort[" in str(traced)

    assert sorts(V - 1, GPU)
    assert not sorts(V, GPU)
    assert not sorts(V - 1, None)
