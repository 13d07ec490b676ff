"""A pipelined step against the same step on one device: losses, gradients, loads, idle ranks."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import (
    Config,
    ExpertParallelConfig,
    ParallelConfig,
    PipelineConfig,
    ShardingConfig,
    TrainConfig,
    UserError,
)
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.parallel.ticks import FORWARD, INPUT_BACKWARD, WEIGHT_BACKWARD
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.restore import restore, state_sha256
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.stages import EMBEDDING, LOSS, NO_LAYER, plan_stages
from dsv3_jax.training.state import abstract_state, init_state
from dsv3_jax.training.step import eval_step, train_step
from tests.helpers import TOLERANCE, relative_error, tiny_model

# More tokens a device than decoding has (projection.FEW_ROWS), which are summed in another order.
MICROBATCHES, ROWS, LENGTH = 4, 4, 12
# Five layers, one of them dense: no two stages are alike.
MODEL = tiny_model(
    num_hidden_layers=5, first_k_dense_replace=1, num_attention_heads=4, vocab_size=38
)


def run_config(
    schedule="1f1b",
    remat="none",
    state="replicated",
    factor=2.0,
    backward="apart",
    overlap=False,
    **mesh,
) -> Config:
    return Config(
        model=MODEL,
        mesh=ParallelConfig(**mesh),
        pipeline=PipelineConfig(schedule, backward),
        sharding=ShardingConfig(state=state),
        expert_parallel=ExpertParallelConfig(
            transport="padded", capacity_factor=factor, overlap=overlap
        ),
        train=TrainConfig(
            batch_size=MICROBATCHES * ROWS, micro_batch_size=ROWS, seq_len=LENGTH, remat=remat
        ),
    ).validate()


def settings(microbatches: int) -> StepSettings:
    rate, speed, weight = np.float32(1e-2), np.float32(1e-3), np.float32(0.3)
    return StepSettings(rate, speed, weight, np.int32(microbatches))


def drawn(length: int):
    state = jax.jit(partial(init_state, config=run_config()))(jax.random.key(0))
    shape = (MICROBATCHES, ROWS, length + 1)
    return state, jax.random.randint(jax.random.key(1), shape, 0, MODEL.vocab_size, jnp.int32)


@pytest.fixture(scope="module")
def start():
    return drawn(LENGTH)


def compiled(config: Config, start):
    layout = make_layout(make_mesh(config.mesh), config.sharding, config.expert_parallel)
    step = jax.jit(partial(train_step, config=config, layout=layout))
    return step.lower(*start, settings(MICROBATCHES)).compile()


@pytest.fixture(scope="module")
def whole(start):
    """The step of one device, for any number of micro-batches."""
    return compiled(run_config(), start)


def check_equal(got, want):
    (state, metrics), (state_1, metrics_1) = got, want
    assert relative_error(metrics.loss, metrics_1.loss) < 1e-6
    assert relative_error(metrics.grad_norm, metrics_1.grad_norm) < TOLERANCE["f32_gradient"]
    for name, load in metrics_1.terms.load.items():
        np.testing.assert_array_equal(metrics.terms.load[name], load)
    jax.tree.map(np.testing.assert_array_equal, state.router, state_1.router)
    # Adam's first step is the sign of the gradient: its first moment is the gradient.
    moments = zip(*(jax.tree.leaves(s.opt_state[1].mu) for s in (state, state_1)), strict=True)
    assert max(relative_error(a, b) for a, b in moments) < TOLERANCE["f32_gradient"]


CONFIGS = [
    run_config("zb1p", "full", "zero1", factor=1.0, pipe=2, local=2),
    run_config("1f1b", pipe=2),
    run_config("interleaved", "dots", "zero1", pipe=2, tensor=2),
    run_config("dualpipev", "none", "fsdp", factor=1.0, pipe=2, local=2),
    run_config("zb1p", "none", "fsdp", pipe=4, context=2),
    run_config("1f1b", "full", "zero1", pipe=2, node=2, local=2),
    run_config("1f1b", "none", "fsdp", backward="whole", pipe=2),
    run_config("eager_1f1b", "full", "fsdp", backward="whole", pipe=2, local=2),
    run_config("eager_1f1b", "none", pipe=4, local=2),
    run_config("interleaved", "full", backward="whole", pipe=2),
    run_config("zb1p", "full", "fsdp", overlap=True, pipe=2, local=2),
    run_config("dualpipev", "none", "zero1", factor=0.6, overlap=True, pipe=2, local=2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    CONFIGS,
    ids=lambda c: (
        f"{c.pipeline.schedule}-{c.mesh.pipe}-{c.sharding.state}-{c.train.remat}"
        + ("-whole" if c.pipeline.takes_backward_whole() else "")
        + ("-overlap" if c.expert_parallel.overlap else "")
    ),
)
def test_a_pipelined_step_is_the_step(config, start, whole):
    if config.mesh.node > 1:  # a device has few tokens of LENGTH, and sums them as decoding does
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=20))
        start = drawn(config.train.seq_len)
    step = compiled(config, start)
    # The loop over each work has its name, by which `compile` counts its turns. Where backward
    # passes are whole, one that shard_maps leave nothing for is not there.
    names = plan_stages(config).turns_of_ticks()
    absent = {name for name in names if f"/{name}/while" not in step.as_text()}
    whole_on_mesh = config.pipeline.takes_backward_whole() and config.mesh.local > 1
    assert all(whole_on_mesh and name.startswith("weight_gradients") for name in absent)
    # All devices join a collective-permute: ranks do not all turn a loop inside of a tick.
    permutes = [line for line in step.as_text().splitlines() if "collective-permute(" in line]
    assert permutes and not any(line.count("while/body") > 1 for line in permutes)
    # These meshes alone differ from one device by up to 2.2e-5: sums in other orders.
    if config.mesh.tensor > 1 or config.mesh.node > 1:
        mesh = dataclasses.replace(config.mesh, pipe=1)
        whole = compiled(dataclasses.replace(config, mesh=mesh), start)
    check_equal(step(*start, settings(MICROBATCHES)), whole(*start, settings(MICROBATCHES)))
    # The ramp's steps have fewer micro-batches, and compile nothing.
    check_equal(step(*start, settings(2)), whole(*start, settings(2)))


IN_A_V = run_config("dualpipev", "none", "fsdp", pipe=2, data=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [IN_A_V, run_config("interleaved", pipe=2)],
    ids=lambda c: c.pipeline.schedule,
)
def test_validation_passes_the_stages(config, start):
    """The loss of one device, with no layer's weights on two ranks while they work."""
    state, rows = start
    layout = make_layout(make_mesh(config.mesh), config.sharding, config.expert_parallel)
    losses = [
        jax.jit(partial(eval_step, config=each, **where))(state.params, state.router, rows[0])
        for each, where in ((config, {"layout": layout}), (run_config(), {}))
    ]
    assert relative_error(*losses) < 1e-6


@pytest.mark.slow
def test_eight_ranks_make_the_step():
    """One MoE layer a stage, but for the first, which has the dense one besides."""
    model = dataclasses.replace(MODEL, num_hidden_layers=9)
    whole, config = (
        dataclasses.replace(run_config("zb1p"), model=model, mesh=ParallelConfig(pipe=ranks))
        for ranks in (1, 8)
    )
    state = jax.jit(partial(init_state, config=whole))(jax.random.key(0))
    shape = (MICROBATCHES, ROWS, LENGTH + 1)
    rows = jax.random.randint(jax.random.key(1), shape, 0, model.vocab_size, jnp.int32)
    steps = [compiled(each.validate(), (state, rows)) for each in (config, whole)]
    got, want = (step(state, rows, settings(MICROBATCHES)) for step in steps)
    check_equal(got, want)


def test_every_layer_is_in_one_stage_in_the_models_order():
    for schedule, ranks in (("1f1b", 4), ("interleaved", 2), ("dualpipev", 2)):
        plan = plan_stages(run_config(schedule, pipe=ranks))
        numbers: dict[str, dict[int, list[int]]] = {"dense_layers": {}, "moe_layers": {}}
        for kind, layers in plan.layers.items():
            for stages, of_rank in zip(plan.stages, layers):
                for stage, slots in zip(stages, of_rank):
                    numbers[kind][int(stage)] = [n for n in slots.tolist() if n != NO_LAYER]
        assert sorted(plan.stages.ravel()) == list(range(plan.schedule.num_stages))
        in_order = [
            (kind, n)
            for stage in range(plan.schedule.num_stages)
            for kind in ("dense_layers", "moe_layers")
            for n in numbers[kind][stage]
        ]
        assert in_order == [("dense_layers", 0)] + [("moe_layers", n) for n in range(4)]


def test_a_stage_takes_each_of_its_layers_once_in_every_act():
    plan = plan_stages(run_config("dualpipev", pipe=2))
    for op in (FORWARD, INPUT_BACKWARD, WEIGHT_BACKWARD):
        layers = {what: counts for of_op, what, counts in plan.works if of_op == op}
        for kind, numbers in plan.layers.items():
            np.testing.assert_array_equal(layers[kind], (numbers != NO_LAYER).sum(-1))
            # Slots without a layer are the last, so that a count says which they are.
            assert not (np.diff((numbers != NO_LAYER).astype(int), axis=-1) > 0).any()
    ends = [(op, what, counts) for op, what, counts in plan.works if what not in plan.layers]
    assert [end[:2] for end in ends] == [
        (FORWARD, EMBEDDING),
        (INPUT_BACKWARD, LOSS),
        (INPUT_BACKWARD, EMBEDDING),
    ]
    assert all(counts.sum() == 1 for *_, counts in ends)


def test_turns_of_a_tick_are_those_of_all_layers_and_micro_batches():
    for schedule, ranks in (("1f1b", 4), ("dualpipev", 2)):
        plan = plan_stages(run_config(schedule, pipe=ranks))
        times = plan.tables.op.size / MICROBATCHES  # of all ticks and ranks
        turns = {name: often * times for name, often in plan.turns_of_ticks().items()}
        acts = ("forward", "input_gradient", "weight_gradients")
        layers = {"dense_layers": 1, "moe_layers": 4}
        want = {f"{act}_of_{kind}": n for act in acts for kind, n in layers.items()}
        ends = ("forward_of_embedding", "input_gradient_of_loss", "input_gradient_of_embedding")
        assert turns == pytest.approx(want | dict.fromkeys(ends, 1))


@pytest.mark.slow
def test_checkpoints_move_between_pipelines(start, tmp_path):
    """Saved with one rank, with four and with two: the same bits, each a slice where it trains."""
    state, _ = start
    digest = state_sha256(state)
    for step, mesh in enumerate(({"pipe": 4, "data": 2}, {"pipe": 2, "local": 2}, {"data": 1})):
        with Checkpoints(tmp_path, every_steps=1, keep=3) as checkpoints:
            checkpoints.save(step, state, {})
        config = run_config("zb1p", "none", "fsdp", **mesh)
        layout = make_layout(make_mesh(config.mesh), config.sharding, config.expert_parallel)
        state, _ = restore(tmp_path, step, abstract_state(config, layout))
        assert state_sha256(state) == digest
        of_devices = state.params["moe_layers"]["mlp"]["experts"]["down_proj"].addressable_shards
        assert len({str(shard.index) for shard in of_devices}) == math.prod(mesh.values())


@pytest.mark.slow
def test_temporary_memory_does_not_grow_with_microbatches(start):
    def temporary(microbatches: int) -> int:
        config = run_config("1f1b", pipe=2)
        train = dataclasses.replace(config.train, batch_size=microbatches * ROWS)
        config = dataclasses.replace(config, train=train)
        rows = jnp.zeros((microbatches, ROWS, LENGTH + 1), jnp.int32)
        return compiled(config, (start[0], rows)).memory_analysis().temp_size_in_bytes

    few, many = temporary(4), temporary(16)
    assert many < 1.02 * few + 16 * ROWS * (LENGTH + 1) * 4 * 8  # the rows themselves


def test_what_does_not_fit_is_told_together():
    with pytest.raises(UserError) as failed:
        run_config("dualpipev", pipe=4)
    message = str(failed.value)
    assert "mesh.pipe=4 under dualpipev needs 8 stages" in message
    assert "use mesh.pipe=3 or less" in message
    assert "at least 2 x mesh.pipe = 8 micro-batches" in message
    with pytest.raises(UserError, match=r"groups of mesh.pipe=3.*use 6"):
        run_config("interleaved", pipe=3)
    with pytest.raises(UserError, match="zb1p takes backward passes apart: use"):
        run_config("zb1p", backward="whole", pipe=2)
