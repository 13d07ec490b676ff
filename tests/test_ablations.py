"""examples/ablations.py: grouped-query attention is what its selection makes of MLA; its table."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax as ds
from dsv3_jax.model.mla import mla_expand

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ablations():
    spec = importlib.util.spec_from_file_location("ablations", ROOT / "examples/ablations.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mla_at_the_selection_is_grouped_query_attention(ablations):
    config = ablations.BASELINE.model
    N, H, R, U = 4, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    G, T = ablations.GROUPS, 7
    keys = jax.random.split(jax.random.key(0), 4)
    q_nope = jax.random.normal(keys[0], (1, T, N, H))
    q_rope = jax.random.normal(keys[1], (1, T, N, R))
    latent = jax.random.normal(keys[2], (1, T, config.kv_lora_rank))
    k_rope = jax.random.normal(keys[3], (1, T, R))
    chosen = jnp.asarray(ablations.selection(config))
    found = mla_expand(q_nope, q_rope, latent, k_rope, chosen, 0.2)

    k = latent[..., : G * H].reshape(1, T, G, H)
    v = latent[..., G * H :].reshape(1, T, G, U)
    for head in range(N):
        group = head * G // N
        scores = q_nope[0, :, head] @ k[0, :, group].T + q_rope[0, :, head] @ k_rope[0].T
        scores = np.where(np.tril(np.ones((T, T))) > 0, 0.2 * scores, -np.inf)
        expected = jax.nn.softmax(jnp.asarray(scores)) @ v[0, :, group]
        np.testing.assert_allclose(found[0, :, head], expected, atol=1e-5)


def test_variants_differ_in_one_choice_and_cache_the_same_bytes(ablations):
    variants = ablations.variants(ablations.BASELINE)
    configs = {name: variant.config for name, variant in variants.items()}
    sizes = {c.model.kv_lora_rank + c.model.qk_rope_head_dim for c in configs.values()}
    assert len(variants) == 5 and len(sizes) == 1
    assert configs["auxiliary loss 0.01"].schedule.bias_update_speed == 0
    assert [name for name, variant in variants.items() if variant.grouped] == ["GQA, same cache"]
    assert all(config.validate() for config in configs.values())


@pytest.mark.slow
def test_grouped_queries_train_all_but_the_selection(ablations):
    config = ablations.BASELINE
    shapes = ds.abstract_variables(config.model)["params"]
    fresh = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params = ablations.with_selection(fresh, config.model)
    own = ablations.holding_up_projections(config.optimizer)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = own.update(grads, own.init(params), params, learning_rate=0.1)
    still = {
        str(path[-1].key)
        for path, update in jax.tree_util.tree_leaves_with_path(updates)
        if not jnp.any(update)
    }
    assert still == {"kv_b_proj"}
    layer = params["moe_layers"]["self_attn"]["kv_b_proj"][0]
    np.testing.assert_array_equal(layer, ablations.selection(config.model))


def test_the_table_compares_seed_by_seed(ablations):
    lines = [
        {"variant": name, "seed": seed, "bits_per_byte": 2 + gap + seed, "busiest": 1.5}
        for name, gap in (("V3", 0.0), ("FP8", 0.25))
        for seed in (0, 1)
    ]
    baseline, fp8 = ablations.summary(lines)
    assert baseline[:4] == ["V3", "2.5000", "0.7071", ""]
    assert fp8[3:] == ["+0.2500", "+0.2500, +0.2500", "1.50"]
