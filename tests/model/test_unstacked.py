"""Layers one by one are the model of their stacks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import unstacked
from dsv3_jax.model.cache import ModelCache, init_model_cache, init_paged_cache
from dsv3_jax.model.decode import decode_step, prefill
from dsv3_jax.model.unstacked import is_unstacked, layer_at, unstack, unstack_variables
from tests.helpers import random_tokens, random_variables, tiny_model

MODEL = tiny_model(num_hidden_layers=4, num_nextn_predict_layers=0)
VARIABLES, IDS = random_variables(MODEL), random_tokens(MODEL, 2, 6)


def decoded(variables, cache):
    """A prompt of four tokens, then two: hidden states, the cache and the experts of both."""
    first = jax.jit(partial(prefill, config=MODEL))(variables, IDS[:, :4], cache)
    step = jax.jit(partial(decode_step, config=MODEL))
    last = step(variables, IDS[:, 4:], jnp.full(2, 4), first.cache)
    return (first.hidden, last.hidden), last.cache, (first.experts, last.experts, last.load)


@pytest.mark.parametrize("paged", [False, True])
def test_layers_one_by_one_decode_as_a_stack(paged):
    apart = unstack_variables(VARIABLES)
    assert all(map(is_unstacked, (apart["params"]["dense_layers"], apart["params"]["moe_layers"])))
    if paged:
        cache = cache_apart = init_paged_cache(MODEL, np.arange(4).reshape(2, 2), 4, page=4)
    else:
        cache = init_model_cache(MODEL, 2, 8)
        cache_apart = ModelCache(*(rows and unstack(rows) for rows in cache))
    want, want_cache, want_experts = decoded(VARIABLES, cache)
    got, got_cache, got_experts = decoded(apart, cache_apart)
    jax.tree.map(np.testing.assert_array_equal, got_experts, want_experts)
    for one, other in zip(got, want):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    if not paged:
        assert isinstance(got_cache, ModelCache) and is_unstacked(got_cache.moe)
        want_cache = ModelCache(*(rows and unstack(rows) for rows in want_cache))
    for one, other in zip(jax.tree.leaves(got_cache), jax.tree.leaves(want_cache), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_step_cuts_no_weight_out_of_a_stack():
    """What the layers are for: XLA would copy it."""

    def slices(variables, cache):
        step = jax.jit(partial(decode_step, config=MODEL))
        text = step.lower(variables, IDS[:, :1], jnp.zeros(2, jnp.int32), cache).as_text()
        stack = f"tensor<{MODEL.num_moe_layers}x{MODEL.n_routed_experts}x"
        return sum(stack in line for line in text.splitlines() if "slice" in line)

    cache = init_model_cache(MODEL, 2, 8)
    cache_apart = ModelCache(*(rows and unstack(rows) for rows in cache))
    assert slices(unstack_variables(VARIABLES), cache_apart) == 0 < slices(VARIABLES, cache)


def test_deep_or_large_or_frozen_models_stay_stacked(monkeypatch):
    deep = jax.tree.map(lambda x: jnp.concatenate([x, x]), VARIABLES["params"]["moe_layers"])
    frozen = jax.tree.map(lambda x: x.astype(jnp.uint8), VARIABLES["params"]["moe_layers"])
    for other in (deep, frozen):
        variables = {"params": {**VARIABLES["params"], "moe_layers": other}}
        assert not is_unstacked(unstack_variables(variables)["params"]["moe_layers"])
    monkeypatch.setattr(unstacked, "MOST_BYTES", 1000)
    large = unstack_variables.__wrapped__(VARIABLES)
    assert large is VARIABLES


def test_a_layer_is_its_part_of_every_stack():
    layers = {"params": {"w": jnp.arange(6).reshape(3, 2)}, "state": {"b": jnp.arange(3)}}
    assert layer_at(1, unstack(layers))["params"]["w"].tolist() == [2, 3]
    assert layer_at(2, layers)["state"]["b"] == layer_at(2, unstack(layers))["state"]["b"] == 2
