"""A weight that comes with a copy in BF16 is multiplied as that copy, in FP8 too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.fp8 import fp8_grouped_linear, fp8_linear
from dsv3_jax.model.fp8_feed_forward import fp8_feed_forward, fp8_grouped_feed_forward
from dsv3_jax.quantization.block_scaled import StepWeight
from dsv3_jax.quantization.recipe import RECIPES
from tests.cases import in_every_run

RECIPE = RECIPES["fp8_paper"]
GROUPS = jnp.array([128, 256], jnp.int32)


def feed_forward(x, gate_up, down, groups=None):
    recipes = RECIPE.gate_up_proj, RECIPE.down_proj
    if groups is None:
        return fp8_feed_forward(x, gate_up, down, recipes)
    return fp8_grouped_feed_forward(x, gate_up, down, groups, recipes)


CASES = {
    "linear": (partial(fp8_linear, recipe=RECIPE.attention), [(4, 40, 256)]),
    "by group": (
        lambda x, w: fp8_grouped_linear(x, w, GROUPS, RECIPE.experts_gate_up_proj),
        [(2, 2, 64, 256)],
    ),
    "feed-forward": (feed_forward, [(2, 128, 256), (256, 128)]),
    "feed-forward by group": (
        partial(feed_forward, groups=GROUPS),
        [(2, 2, 128, 256), (2, 256, 128)],
    ),
}


@pytest.mark.parametrize("name", in_every_run(CASES, "linear", "feed-forward by group"))
def test_values_are_the_copy_s_and_the_gradient_is_the_master_s(name):
    function, shapes = CASES[name]
    random = np.random.default_rng(7)
    x = jnp.asarray(random.standard_normal((384, 256)), jnp.bfloat16)
    masters = [jnp.asarray(random.standard_normal(s), jnp.float32) for s in shapes]
    copies = [master.astype(jnp.bfloat16) for master in masters]

    def loss(x, masters, made):
        y = function(x, *map(made, masters, copies))
        return jnp.sum(y.astype(jnp.float32) ** 2), y

    def of(made, weights):
        gradient = jax.value_and_grad(partial(loss, made=made), (0, 1), has_aux=True)
        return jax.jit(gradient)(x, weights)

    (_, y), (dx, d_weights) = of(StepWeight, [10 * master for master in masters])
    # Weights that are their copies in f32 already.
    exact = [copy.astype(jnp.float32) for copy in copies]
    (_, want), (want_dx, want_weights) = of(lambda master, copy: master, exact)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(want, np.float32))
    np.testing.assert_array_equal(np.asarray(dx, np.float32), np.asarray(want_dx, np.float32))
    for found, wanted in zip(d_weights, want_weights, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, wanted)
