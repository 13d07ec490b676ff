"""A LoRA step whose layers gather their base, or whose stages have their part of it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import (
    Config,
    ExpertParallelConfig,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    PipelineConfig,
    ShardingConfig,
    TrainConfig,
)
from dsv3_jax.frozen import lies_in_slices
from dsv3_jax.model.fp8_weights import to_fp8_weights
from dsv3_jax.model.placement import shardings
from dsv3_jax.model.transformer import abstract_variables
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.state import abstract_state, init_state
from dsv3_jax.training.step import eval_step, train_step
from tests.helpers import TOLERANCE, random_variables, relative_error, tiny_model

MODEL = tiny_model(
    num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4, vocab_size=38
)
TARGETS = ("o_proj", "kv_b_proj", "experts/gate_up_proj", "shared_experts/down_proj")
SETTINGS = StepSettings(np.float32(1e-2), np.float32(0), np.float32(0.3), np.int32(2))
DECAY = 0.75


def run_config(state="replicated", targets=TARGETS, **mesh) -> Config:
    return Config(
        model=MODEL,
        mesh=ParallelConfig(**mesh),
        pipeline=PipelineConfig(schedule="zb1p"),
        sharding=ShardingConfig(state=state),
        train=TrainConfig(batch_size=4, micro_batch_size=2, seq_len=8, remat="full"),
        optimizer=OptimizerConfig(average_decay=DECAY),
        lora=LoraConfig(rank=2, alpha=4.0, targets=targets),
        init_from="weights",
    ).validate()


@pytest.fixture(scope="module")
def start():
    """Adapters of which none is zero, FP8 weights, and two micro-batches."""
    state = jax.jit(partial(init_state, config=run_config()))(jax.random.key(0))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), state.params
    )
    base = jax.jit(partial(to_fp8_weights, config=MODEL))(random_variables(MODEL))
    rows = rng.integers(0, MODEL.vocab_size, (2, 2, 9)).astype(np.int32)
    return state._replace(params=drawn), base, rows


def stepped(config: Config, start, settings=SETTINGS):
    """(state, metrics) after a step, validation loss, and what the step was given."""
    state, base, rows = start
    layout = make_layout(make_mesh(config.mesh), config.sharding, config.expert_parallel)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, layout))
    state = jax.device_put(state, places)
    base = jax.device_put(base, shardings(base, layout, stored=lies_in_slices(layout)))
    step = jax.jit(partial(train_step, config=config, layout=layout))
    loss = jax.jit(partial(eval_step, config=config, layout=layout))
    measured = loss(state.params, state.router, rows[0], base=base)
    return step(state, rows, settings, base=base), measured, base


@pytest.fixture(scope="module")
def whole(start):
    return stepped(run_config(), start)


@pytest.mark.slow
@pytest.mark.parametrize(
    "state, mesh",
    [
        ("fsdp", {"data": 2, "tensor": 2}),
        ("zero1", {"pipe": 2}),
        ("fsdp", {"pipe": 2, "data": 2}),
    ],
    ids=str,
)
def test_a_step_is_that_of_one_device(start, whole, state, mesh):
    (after, metrics), loss, base = stepped(run_config(state, **mesh), start)
    (want, metrics_1), loss_1, _ = whole
    assert relative_error(metrics.loss, metrics_1.loss) < TOLERANCE["f32_model"]
    assert relative_error(loss, loss_1) < TOLERANCE["f32_model"]
    # Adam's first step is the sign of the gradient: its first moment is the gradient.
    moments = zip(*(jax.tree.leaves(s.opt_state[1].mu) for s in (after, want)), strict=True)
    assert max(relative_error(a, b) for a, b in moments) < TOLERANCE["f32_gradient"]
    for name, load in metrics_1.terms.load.items():
        np.testing.assert_array_equal(metrics.terms.load[name], load)
    head = base["params"]["lm_head"]
    assert head.addressable_shards[0].data.size < head.size


@pytest.mark.slow
def test_halves_of_a_micro_batch_travel_over_products_of_adapters(start):
    """The base has no gradient that the order of the backward pass could wait for."""
    state, base, rows = start
    config, mesh = run_config(), ParallelConfig(node=2, local=2)
    train = dataclasses.replace(config.train, batch_size=8, micro_batch_size=8)
    rows = np.concatenate([rows.reshape(1, 4, 9)] * 2, axis=1)
    got, want = (
        stepped(
            dataclasses.replace(
                config,
                mesh=mesh,
                train=train,
                expert_parallel=ExpertParallelConfig(transport="padded", overlap=overlap),
            ).validate(),
            (state, base, rows),
            SETTINGS._replace(num_micro_batches=np.int32(1)),
        )[0]
        for overlap in (True, False)
    )
    assert relative_error(got[1].loss, want[1].loss) < TOLERANCE["f32_model"]
    moments = zip(*(jax.tree.leaves(s.opt_state[1].mu) for s, _ in (got, want)), strict=True)
    assert max(relative_error(a, b) for a, b in moments) < TOLERANCE["f32_gradient"]


def test_fp8_blocks_lie_in_slices_between_tiles():
    """Values and scales alike; a dim of less than a tile for each device stays whole."""
    model = dataclasses.replace(MODEL, hidden_size=512)
    blocks = jax.eval_shape(partial(to_fp8_weights, config=model), abstract_variables(model))
    mesh = make_mesh(ParallelConfig(data=2, local=2), jax.devices()[:4])
    layout = make_layout(mesh, ShardingConfig(state="fsdp"), ExpertParallelConfig())
    for stored, rows in ((False, 512), (True, 128)):
        where = shardings(blocks, layout, stored=stored)["params"]["moe_layers"]["self_attn"]
        held = blocks["params"]["moe_layers"]["self_attn"]["o_proj"]
        columns = MODEL.num_attention_heads * MODEL.v_head_dim
        assert where["o_proj"].values.shard_shape(held.values.shape) == (1, rows, columns)
        assert where["o_proj"].scales.shard_shape(held.scales.shape) == (1, rows // 128, 1)


@pytest.mark.slow
def test_the_average_is_of_the_adapters(start, whole):
    (after, _), begun = whole[0], start[0].opt_state[-1].average
    kept = after.opt_state[-1].average
    assert jax.tree.structure(kept) == jax.tree.structure(after.params)
    for average, first, last in zip(*map(jax.tree.leaves, (kept, begun, after.params))):
        np.testing.assert_allclose(average, DECAY * first + (1 - DECAY) * last, atol=1e-6)


def test_a_stage_saves_no_frozen_weight_of_a_micro_batch(start):
    """Were a layer's base among what its pullback holds, every micro-batch in flight had a copy."""
    from dsv3_jax.model.stack import MOE
    from dsv3_jax.model.transformer import tokens_of
    from dsv3_jax.training.layer_backward import LayerBackward
    from dsv3_jax.training.loss import training_pass

    config = dataclasses.replace(run_config(pipe=2), train=TrainConfig(remat="none"))
    state, base, rows = start
    layout = make_layout(make_mesh(config.mesh), config.sharding, config.expert_parallel)
    how = training_pass(config, dataclasses.replace(layout, outer=("pipe",)))
    layer = jax.tree.map(lambda leaf: leaf[0], (state.params[MOE], {k: base[k][MOE] for k in base}))
    x = jnp.zeros((2, 8, MODEL.hidden_size))

    def saved(weights, x):
        of_tokens = tokens_of(rows[0][:, :-1], how, None)
        return LayerBackward(MOE, how, config).forward(weights, x, of_tokens)[1]

    kept = jax.eval_shape(saved, layer, x)
    weights = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(layer[1]) if leaf.ndim > 1}
    assert weights and not [leaf for leaf in kept if (leaf.shape, leaf.dtype) in weights]
