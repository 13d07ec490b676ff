"""The two forms of MLA against each other; the module itself is held against the oracle in
test_transformer.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, ParallelConfig
from dsv3_jax.kernels.mla_decode.operands import rotated_keys
from dsv3_jax.model.cache import (
    LatentCache,
    append,
    init_cache,
    init_paged_cache,
    of_layer,
)
from dsv3_jax.model.mla import mla_absorb, mla_expand
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import RULES, Layout
from dsv3_jax.quantization.block_scaled import dequantize, quantize
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


def absorb(q_nope, q_rope, latent, k_rope, kv_b_proj, lengths=(7, 7)):
    cache = LatentCache(latent, k_rope)
    return mla_absorb(q_nope, q_rope, cache, jnp.array(lengths), kv_b_proj, 0.2)


@pytest.mark.parametrize("dtype, limit", [("float32", "f32_op"), ("bfloat16", "bf16_op")])
def test_absorbed_equals_expanded(dtype, limit):
    """Values, and in f32 the gradients of all five inputs."""
    arrays = inputs(dtype)

    def expand(*arrays):
        return mla_expand(*arrays, 0.2, offset=2)

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


@pytest.mark.parametrize(
    "axes", [dict(data=2, tensor=3), dict(context=2)], ids=["sequences, heads", "rows of the cache"]
)
def test_absorbed_on_a_mesh_equals_one_device(axes):
    q_nope, q_rope, latent, k_rope, kv_b_proj = inputs("float32", keys=8)
    layout = Layout(make_mesh(ParallelConfig(**axes)), RULES["decode"])
    attend_to = (q_nope, q_rope, LatentCache(latent, k_rope), jnp.array([8, 6]), kv_b_proj, 0.2)
    got = jax.jit(partial(mla_absorb, scale=0.2, layout=layout))(*attend_to[:5])
    assert relative_error(got, mla_absorb(*attend_to)) < TOLERANCE["f32_op"]


def test_a_query_that_sees_nothing_is_finite():
    """Padding rows of a ragged batch: their result is of no use, but must not be NaN."""
    out = absorb(*inputs("float32"), lengths=(3, 0))
    assert not out[0, :2].any() and not out[1].any() and out[0, 2:].all()


def test_append_writes_each_sequence_at_its_own_row():
    config = tiny_model()
    cache = jax.tree.map(lambda x: x[0], init_cache(config, 2, 6, layers=1))
    latent, rope = jnp.ones((2, 2, config.kv_lora_rank)), 2 * jnp.ones((2, 2, 4))
    cache = append(cache, latent, rope, jnp.array([0, 3]))
    filled = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(cache.latent, np.repeat(filled[..., None], 12, -1))
    np.testing.assert_array_equal(cache.k_rope, 2 * np.repeat(filled[..., None], 4, -1))


def test_append_writes_into_the_pages_a_sequence_holds():
    """Two layers, pages of 2 rows. Sequence 0 holds pages 2 and 0; sequence 1 holds page 1 only, so
    that its row 2 is dropped; of the other layer nothing changes."""
    config = tiny_model(num_hidden_layers=2)
    pool = init_paged_cache(config, jnp.array([[2, 0], [1, -1]]), pages=3, page=2)
    latent, rope = jnp.ones((2, 2, config.kv_lora_rank)), 2 * jnp.ones((2, 2, 4))
    cache = append(of_layer(pool, jnp.int32(1)), latent, rope, jnp.array([2, 1]))
    filled = np.zeros((6, 2))
    filled[3 + 0] = filled[3 + 1, 1] = 1
    np.testing.assert_array_equal(cache.latent, np.repeat(filled[..., None], 12, -1))
    np.testing.assert_array_equal(cache.k_rope, 2 * np.repeat(filled[..., None], 4, -1))


def test_an_fp8_pool_holds_what_was_appended_rounded_once():
    config, table = tiny_model(num_hidden_layers=1), jnp.array([[2, 0], [1, -1]])
    rng = np.random.default_rng(0)
    latent, rope = (jnp.asarray(rng.normal(size=(2, 3, n)), "float32") for n in (12, 4))
    plain, fp8 = (
        append(
            init_paged_cache(config, table, pages=3, page=2, fp8=fp8),
            latent,
            rope,
            jnp.array([1, 0]),
        )
        for fp8 in (False, True)
    )
    rounded = quantize(plain.latent, (1, plain.latent.shape[-1]), "ue8m0")
    of_fp8, of_plain = (dequantize(x, jnp.float32) for x in (fp8.latent, rounded))
    np.testing.assert_array_equal(of_fp8, of_plain)
    np.testing.assert_array_equal(fp8.k_rope, plain.k_rope / rounded.scales)
    np.testing.assert_array_equal(rotated_keys(fp8.latent, fp8.k_rope), plain.k_rope)
    bytes_of_a_token = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(
            jax.eval_shape(lambda: init_paged_cache(ModelConfig(), table[:0], 1, 1, fp8=True))
        )
    )
    assert bytes_of_a_token == 61 * 644


def test_cache_holds_576_values_a_token_and_layer():
    """70,272 bytes a token over V3's 61 layers in BF16 (the paper's Table 1)."""
    cache = jax.eval_shape(lambda: init_cache(ModelConfig(), 1, 1, layers=61))
    assert isinstance(cache, LatentCache)
    assert sum(x.size * x.dtype.itemsize for x in cache) == 70_272


@pytest.mark.parametrize("length, start", [(6, 0), (6, 3), (6, 5), (1, 0)])
def test_one_row_of_one_sequence_is_written_where_it_belongs(length, start):
    """With its neighbour, which stays as it is."""
    rng = np.random.default_rng(5)
    held, new = (
        LatentCache(*(jnp.asarray(rng.normal(size=(1, n, d)), jnp.float32) for d in (8, 4)))
        for n in (length, 1)
    )
    found = jax.jit(append)(held, *new, jnp.array([start]))
    for before, row, after in zip(held, new, found, strict=True):
        np.testing.assert_array_equal(after, np.asarray(before.at[0, start].set(row[0, 0])))
