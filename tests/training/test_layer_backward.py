"""A MoE layer's backward pass in two parts on a mesh whose devices exchange tokens."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import (
    Config,
    ExpertParallelConfig,
    ParallelConfig,
    PipelineConfig,
    QuantConfig,
    TrainConfig,
)
from dsv3_jax.model.stack import MOE
from dsv3_jax.model.transformer import tokens_of
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.training.layer_backward import LayerBackward
from dsv3_jax.training.loss import training_pass
from dsv3_jax.training.state import init_state
from tests.helpers import TOLERANCE, relative_error, tiny_model

ROWS, LENGTH = 4, 20
# Weight gradients of routed experts as a CPU multiplies them; those of others have other dims.
EXPERTS = {(24, 36), (18, 24)}


def layer_of(preset="bf16", experts_apart=True, **exchange) -> SimpleNamespace:
    """The layer, with shapes of all that its parts are given and hand on."""
    dtype = "bfloat16" if preset == "fp8_paper" else "float32"
    config = Config(
        model=tiny_model(
            num_hidden_layers=2, num_attention_heads=4, moe_intermediate_size=18, dtype=dtype
        ),
        mesh=ParallelConfig(node=2, local=2),
        quant=QuantConfig(preset=preset),
        pipeline=PipelineConfig("1f1b", "apart", experts_apart),
        expert_parallel=ExpertParallelConfig(**{"transport": "padded"} | exchange),
        train=TrainConfig(batch_size=ROWS, micro_batch_size=ROWS, seq_len=LENGTH),
    ).validate()
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    layout = make_layout(mesh, config.sharding, config.expert_parallel)
    how = training_pass(config, layout)
    state = jax.eval_shape(partial(init_state, config=config), jax.random.key(0))
    weights = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),
        (state.params[MOE], {"router": state.router[MOE]}),
    )
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, config.model.hidden_size), config.model.dtype)
    layer, ids = LayerBackward(MOE, how, config), jnp.zeros((ROWS, LENGTH), jnp.int32)
    of_tokens = tokens_of(ids, how, None)
    forward = partial(layer.forward, of_tokens=of_tokens)
    _, saved, stats = jax.eval_shape(forward, weights, x)
    first, given = layer.first, (weights, saved, x, stats.balance)
    _, early, pending = jax.eval_shape(first, *given)
    later = (weights, saved, pending)
    return SimpleNamespace(
        **{"layer": layer, "forward": forward, "of_tokens": of_tokens, "how": how},
        **{"first": jax.make_jaxpr(first)(*given), "early": early, "weights": weights, "x": x},
        **{"second": jax.make_jaxpr(layer.second)(*later), "pending": pending},
    )


def products(program) -> list[tuple[int, ...]]:
    """The shapes of what matrix products give, also inside of calls, loops and shard_maps."""
    found = []
    for eqn in program.eqns:
        if "dot_general" in eqn.primitive.name:
            found.append(eqn.outvars[0].aval.shape)
        for body in jax.extend.core.jaxprs_in_params(eqn.params):
            found += products(body)
    return found


def of_experts(weights, places) -> set[str]:
    """The routed experts' weights among these places."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(weights[0])]
    return {path.split("'")[-2] for i in places if "['experts']" in (path := paths[i])}


@pytest.mark.parametrize("overflow", ["rounds", "error"])
@pytest.mark.parametrize("preset", ["bf16", "fp8_paper"])
def test_experts_weight_gradients_are_in_the_second_part(preset, overflow):
    parts = layer_of(preset, overflow=overflow, capacity_factor=1.0)
    assert not of_experts(parts.weights, parts.early)
    first, second = products(parts.first.jaxpr), products(parts.second.jaxpr)
    if preset == "bf16":  # in FP8 all are of whole tiles
        assert not EXPERTS & set(first) and set(second) >= EXPERTS
    # By this `compile` knows the loop of further rounds, and profiles whose products these are.
    names = [str(eqn.source_info.name_stack) for eqn in parts.second.eqns]
    assert any(name.endswith("mlp/experts") for name in names)
    if overflow == "error":  # with further rounds, these are in both parts
        whole = layer_of(preset, False, overflow=overflow, capacity_factor=1.0)
        together = len(products(whole.first.jaxpr)) + len(products(whole.second.jaxpr))
        assert len(first) + len(second) == together
        assert of_experts(whole.weights, whole.early) == {"gate_up_proj", "down_proj"}


def test_one_loop_of_all_rounds_stays_in_the_first_part():
    """It would be computed twice."""
    parts = layer_of(overflow="loop", capacity_factor=1.0)
    assert of_experts(parts.weights, parts.early) == {"gate_up_proj", "down_proj"}
    assert set(products(parts.first.jaxpr)) >= EXPERTS
    assert not EXPERTS & set(products(parts.second.jaxpr))


def test_both_parts_make_the_layers_gradients():
    """With further rounds, which are a loop of their own in each part."""
    parts = layer_of(capacity_factor=1.0)
    keys = iter(jax.random.split(jax.random.key(0), 99))

    def drawn(shape):
        return jax.random.normal(next(keys), shape.shape).astype(shape.dtype) / 4

    weights, x, dy = jax.tree.map(drawn, (parts.weights, parts.x, parts.x))
    d_balance = jnp.float32(0.1)

    @jax.jit
    def in_parts(weights, x, dy):
        _, saved, stats = parts.forward(weights, x)
        dx, early, pending = parts.layer.first(weights, saved, dy, d_balance)
        late = parts.layer.second(weights, saved, pending)
        return [dx, *(value for _, value in sorted((early | late).items()))], stats.rounds

    @jax.jit
    def in_one(weights, x, dy):
        def apply(params, x):
            y, stats = parts.layer.output((params, weights[1]), x, parts.of_tokens)
            return y, stats.balance

        d_params, dx = jax.vjp(apply, weights[0], x)[1]((dy, d_balance))
        return [dx, *jax.tree.leaves(d_params)]

    got, rounds = in_parts(weights, x, dy)
    assert rounds > 1
    for a, b in zip(got, in_one(weights, x, dy), strict=True):
        assert relative_error(a, b) < TOLERANCE["f32_reordered"]
