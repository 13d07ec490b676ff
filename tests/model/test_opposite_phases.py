"""Two halves of a batch in opposite phases through MoE layers are each half alone, bit for bit."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ExpertParallelConfig, ParallelConfig, UserError, load_config
from dsv3_jax.model.forward_pass import Pass, Tokens
from dsv3_jax.model.micro_batches import cut, in_opposite_phases, joined
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.model.stack import run_layers
from dsv3_jax.model.transformer import init_variables
from dsv3_jax.parallel.compiler_options import compiler_options
from dsv3_jax.parallel.mesh import fill_mesh, make_mesh
from dsv3_jax.parallel.phases import tied
from dsv3_jax.parallel.sharding import Layout
from tests.helpers import TOLERANCE, relative_error, tiny_model

MODEL = tiny_model(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
BATCH, LENGTH = 8, 6


def layout_of(mesh_config, **expert):
    return Layout(make_mesh(mesh_config), expert=ExpertParallelConfig(transport="padded", **expert))


@pytest.fixture
def optimised():
    """XLA:CPU with all its passes: without them a product's bits depend on what lies around it."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def gradients(variables, x, d_y, counted, balance, how):
    """Output, statistics, and the gradients of all weights and of x."""

    def loss(variables, x):
        tokens = Tokens(jnp.arange(LENGTH)[None], counted=counted)
        y, _, stats = run_layers(variables, x, tokens, how)
        assert stats is not None
        return jnp.sum(y * d_y) + balance * stats.balance_loss.sum(), (y, stats)

    (_, (y, stats)), of_all = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables, x)
    return y, stats, *of_all


@pytest.mark.slow
@pytest.mark.parametrize(
    "capacity_factor, remat", [(4.0, "full"), pytest.param(0.3, "none", marks=pytest.mark.slow)]
)
def test_both_halves_are_what_each_is_alone(capacity_factor, remat, optimised):
    """Bit for bit: output, statistics, the gradient of x, and of weights that attention reads.
    Those of routers and experts are added up on each device first, and then once over the devices.
    With the small buffers both halves take several rounds.
    """
    layout = layout_of(ParallelConfig(node=2, local=2), capacity_factor=capacity_factor)
    variables = init_variables(jax.random.key(0), MODEL)
    rng = np.random.default_rng(0)
    x, d_y = (
        jnp.asarray(rng.normal(size=(BATCH, LENGTH, MODEL.hidden_size)), jnp.float32) for _ in "xy"
    )
    counted = jnp.arange(LENGTH) < jnp.arange(BATCH)[:, None]
    how = Pass(MODEL, layout=layout, remat=remat)
    run = jax.jit(gradients, static_argnames="how")
    both = replace(how, micro_batches=2)
    y, stats, of_weights, of_x = run(variables, x, d_y, counted, 3.0, how=both)
    halves = [
        run(variables, *each, 1.5, how=how)
        for each in zip(*(cut(a, layout) for a in (x, d_y, counted)))
    ]
    (first_y, first, weights, first_x), (second_y, second, other_weights, second_x) = halves
    np.testing.assert_array_equal(y, joined(first_y, second_y, layout))
    np.testing.assert_array_equal(of_x, joined(first_x, second_x, layout))
    np.testing.assert_array_equal(stats.load_E, first.load_E + second.load_E)
    np.testing.assert_array_equal(
        stats.experts[0], joined(first.experts[0], second.experts[0], layout)
    )
    assert float(stats.balance_loss[0]) == float(first.balance_loss[0] + second.balance_loss[0]) / 2
    assert (int(stats.rounds[0]) > 1) == (capacity_factor < 1)
    sums = jax.tree.map(jnp.add, weights, other_weights)
    of_each = jax.tree_util.tree_leaves_with_path(of_weights["params"])
    for (path, got), want in zip(of_each, jax.tree.leaves(sums["params"])):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "gate" in name.split("/") or "experts/" in name:
            assert relative_error(got, want) < TOLERANCE["f32_reordered"], name
        else:
            np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize("remat, exchanges", [("none", 16), ("full", 20), ("v3", 20)])
def test_rows_are_sent_once_for_each_pass(remat, exchanges):
    """Two halves, two hops, there and back in both passes; with remat there once more.

    What shared experts wait for is no part of what is computed again.
    """
    layout = layout_of(ParallelConfig(node=2, local=2), overflow="error")
    how = Pass(MODEL, layout=layout, remat=remat, micro_batches=2)
    variables = jax.eval_shape(lambda: init_variables(jax.random.key(0), MODEL))
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, MODEL.hidden_size), jnp.float32)
    counted = jax.ShapeDtypeStruct((BATCH, LENGTH), bool)
    run = jax.jit(partial(gradients, how=how))
    made = str(run.trace(variables, x, x, counted, 1.0).jaxpr)
    assert made.count("all_to_all[") == exchanges


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, bool])
def test_a_tie_changes_no_bit_and_is_not_compiled_away(dtype):
    held = jnp.asarray([-0.0, 1.0, jnp.nan, -jnp.inf]).astype(dtype)
    other = jnp.full((2, 3), -jnp.nan)
    compiled = jax.jit(tied).lower(held, other).compile()
    got, same = compiled(held, other)
    assert np.asarray(got).tobytes() == np.asarray(held).tobytes()
    assert np.asarray(same).tobytes() == np.asarray(other).tobytes()
    assert "popcnt" in str(compiled.as_text())


def test_gradients_wait_in_the_opposite_order():
    """The one that was held back comes first."""
    x, y = jnp.ones(3), jnp.ones((2, 2))
    pull_back = lambda d: jax.vjp(tied, x, y)[1](d)  # noqa: E731
    of_x, of_y = jax.jit(pull_back)((2 * x, 3 * y))
    assert (of_x == 2).all() and (of_y == 3).all()
    made = str(jax.make_jaxpr(pull_back)((x, y)))
    assert made.count("population_count") == 2  # forward, and backward


def test_positions_of_each_row_and_documents_are_cut_with_it():
    layout = layout_of(ParallelConfig())
    tokens = Tokens(jnp.arange(4)[:, None], segments=jnp.arange(4)[:, None] + 10)
    seen = []

    def layer(halves, of_halves, cache):
        assert cache is None
        seen.extend(of_halves)
        return halves, None, (empty_stats(), empty_stats())

    in_opposite_phases(layer, cut(jnp.zeros((4, 1, 2)), layout), tokens, layout)
    assert [half.positions[:, 0].tolist() for half in seen] == [[0, 1], [2, 3]]
    assert [half.segments[:, 0].tolist() for half in seen] == [[10, 11], [12, 13]]
    assert seen[0].counted is None


def empty_stats():
    choices = jnp.zeros((2, 1, 1))
    return MoEStats(
        jnp.zeros(8, jnp.int32), jnp.zeros(()), choices, choices, jnp.ones((), jnp.int32)
    )


MESH = ParallelConfig(node=2, local=2)
OVERLAP = ExpertParallelConfig(transport="padded", overlap=True)


@pytest.mark.parametrize(
    "mesh, expert, micro_batch, said",
    [
        (
            MESH,
            OVERLAP,
            4,
            "must be a multiple of 2 x mesh.data x mesh.node x mesh.local = 8: use ",
        ),
        (ParallelConfig(data=4), OVERLAP, 8, "mesh.node x mesh.local = 1 .* use --mesh.local 2"),
        (MESH, replace(OVERLAP, transport="pallas"), 8, "'pallas' moves .*transport padded"),
        (MESH, replace(OVERLAP, transport="auto"), 8, "may be 'pallas', which .*transport padded"),
        (MESH, replace(OVERLAP, overflow="loop"), 8, "overflow='loop' .*overflow rounds"),
    ],
)
def test_what_cannot_overlap_is_refused_with_what_can(mesh, expert, micro_batch, said):
    tiny = load_config("tiny")
    train = replace(tiny.train, batch_size=32, micro_batch_size=micro_batch)
    config = replace(tiny, mesh=mesh, expert_parallel=expert, train=train)
    with pytest.raises(UserError, match=f"overlap lays .*{said}"):
        config.validate()
    replace(config, expert_parallel=replace(expert, overlap=False, transport="padded")).validate()


def test_devices_are_filled_so_that_each_has_two_rows():
    tiny = load_config("tiny")
    train = replace(tiny.train, batch_size=16, micro_batch_size=16)
    config = replace(tiny, mesh=replace(MESH, data=0), expert_parallel=OVERLAP, train=train)
    assert fill_mesh(config, 16).mesh.data == 2
    filled = fill_mesh(replace(config, expert_parallel=ExpertParallelConfig()), 16)
    assert filled.mesh.data == 4


def test_xla_is_told_for_accelerators_that_overlap_and_else_nothing():
    def options_for(platform, overlap):
        layout: Any = SimpleNamespace(platform=platform, expert=replace(OVERLAP, overlap=overlap))
        return compiler_options(layout)

    latency_hiding = {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_experimental_parallel_collective_overlap_limit": 8,
    }
    assert options_for("gpu", True) == options_for("cuda", True) == latency_hiding
    assert options_for("tpu", True) == {
        "xla_tpu_enable_async_all_to_all": True,
        "xla_lhs_loop_fusion_latency_multiplier": 0.01,
    }
    assert options_for("gpu", False) == options_for("tpu", False) == {}
