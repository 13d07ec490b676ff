"""The two forms of MLA against each other; the module itself is held against the oracle in
test_transformer.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.cache import LatentCache, append, init_cache
from dsv3_jax.model.mla import causal_mask, mla_absorb, mla_expand
from tests.helpers import TOLERANCE, relative_error, tiny_model


def inputs(dtype, queries=5, keys=7, seed=0):
    rng = np.random.default_rng(seed)
    batch, heads, nope, rope, value, latent = 2, 3, 6, 4, 5, 12
    shapes = (
        (batch, queries, heads, nope),
        (batch, queries, heads, rope),
        (batch, keys, latent),
        (batch, keys, rope),
        (heads, nope + value, latent),
    )
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype, limit", [("float32", "f32_op"), ("bfloat16", "bf16_op")])
def test_absorbed_equals_expanded(dtype, limit):
    """Values, and in f32 the gradients of all five inputs."""
    arrays = inputs(dtype)
    mask = causal_mask(jnp.array([[2, 3, 4, 5, 6]]), jnp.arange(7)[None])

    def expand(*arrays):
        return mla_expand(*arrays, 0.2, offset=2)

    def absorb(*arrays):
        return mla_absorb(*arrays, mask, 0.2)

    def run(attend):
        def total(*arrays):
            out = attend(*arrays)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        gradient = jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4), has_aux=True)
        (_, out), gradients = jax.jit(gradient)(*arrays)
        return out, list(gradients)

    (got, got_gradients), (want, want_gradients) = run(absorb), run(expand)
    assert got.dtype == want.dtype == dtype
    assert relative_error(got, want) < 2 * TOLERANCE[limit]  # both round
    if dtype == "float32":
        assert relative_error(got_gradients, want_gradients) < TOLERANCE["f32_gradient"]


def test_a_query_that_sees_nothing_is_finite():
    """Padding rows of a ragged batch: their result is of no use, but must not be NaN."""
    mask = jnp.zeros((1, 5, 7), bool).at[:, 1:].set(True)
    assert jnp.isfinite(mla_absorb(*inputs("float32"), mask, 0.2)).all()


def test_mask_sees_rows_up_to_the_position_in_the_same_document():
    positions, rows = jnp.array([[1, 2], [3, 4]]), jnp.arange(4)[None]
    want = np.array([[[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 1, 1, 1], [1, 1, 1, 1]]], bool)
    np.testing.assert_array_equal(causal_mask(positions, rows), want)
    documents = (jnp.array([[0, 1], [1, 1]]), jnp.array([[0, 0, 1, 1], [0, 1, 1, 2]]))
    same = np.array([[[1, 1, 0, 0], [0, 0, 1, 1]], [[0, 1, 1, 0], [0, 1, 1, 0]]], bool)
    np.testing.assert_array_equal(causal_mask(positions, rows, documents), want & same)


def test_append_writes_each_sequence_at_its_own_row():
    config = tiny_model()
    cache = jax.tree.map(lambda x: x[0], init_cache(config, 2, 6, layers=1))
    latent, rope = jnp.ones((2, 2, config.kv_lora_rank)), 2 * jnp.ones((2, 2, 4))
    cache = append(cache, latent, rope, jnp.array([0, 3]))
    filled = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(cache.latent, np.repeat(filled[..., None], 12, -1))
    np.testing.assert_array_equal(cache.k_rope, 2 * np.repeat(filled[..., None], 4, -1))


def test_cache_holds_576_values_a_token_and_layer():
    """70,272 bytes a token over V3's 61 layers in BF16 (the paper's Table 1)."""
    cache = jax.eval_shape(lambda: init_cache(ModelConfig(), 1, 1, layers=61))
    assert isinstance(cache, LatentCache)
    assert sum(x.size * x.dtype.itemsize for x in cache) == 70_272
