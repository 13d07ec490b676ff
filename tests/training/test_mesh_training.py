"""Training on any mesh is training on one device: the same losses, less memory, one checkpoint."""

import dataclasses
import math
from functools import cache

import jax
import numpy as np
import pytest

from dsv3_jax.config import DataConfig, ParallelConfig, PipelineConfig, ShardingConfig
from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.restore import state_sha256
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.state import TrainState, abstract_state
from dsv3_jax.training.step import jit_train_step
from tests.cases import in_every_run
from tests.helpers import random_state, tiny_config, tiny_model

# Two MoE layers in one loop, and an MTP module. A dense layer, which would be a third of a program,
# is what a shared expert is; test_adapters_on_mesh.py and test_pipelined.py have one.
MODEL = tiny_model(
    num_hidden_layers=2,
    first_k_dense_replace=0,
    num_attention_heads=4,
    vocab_size=40,
    moe_intermediate_size=16,
)
STEPS, BATCH, LENGTH = 20, 8, 8
# Document 35 is MODEL's bos: rows have several documents, which attention must not cross.
ROWS = np.random.default_rng(3).integers(0, 36, (STEPS, BATCH, LENGTH + 1)).astype(np.int32)

ONE = ({}, {}, 1)
MESHES = {
    "8 nodes": ({"node": 8}, {}, 1),
    "2 x 4": ({"node": 2, "local": 4}, {"state": "replicated"}, 1),
    "zero1, gathered context": ({"local": 2, "context": 2, "tensor": 2}, {}, 1),
    "fsdp, ring": ({"data": 2, "context": 2, "tensor": 2}, {"state": "fsdp", "context": "ring"}, 2),
    "zb1p": ({"pipe": 2, "local": 2, "tensor": 2}, {}, 4, "zb1p"),
    "1f1b": ({"pipe": 2, "context": 2, "data": 2}, {"state": "fsdp"}, 4, "1f1b"),
}
ON_MESHES = in_every_run(MESHES, "2 x 4")


class Run:
    """A compiled step on one mesh."""

    def __init__(self, sizes, sharding, micro_batches, schedule="1f1b"):
        config = tiny_config(MODEL, batch_size=BATCH, seq_len=LENGTH)
        self.config = dataclasses.replace(
            config,
            mesh=ParallelConfig(**sizes),
            pipeline=PipelineConfig(schedule=schedule),
            train=dataclasses.replace(config.train, micro_batch_size=BATCH // micro_batches),
            sharding=ShardingConfig(**sharding),
            data=DataConfig(mask_documents=True),
        ).validate()
        self.mesh = make_mesh(self.config.mesh)
        self.layout = make_layout(self.mesh, self.config.sharding, self.config.expert_parallel)
        self.abstract = abstract_state(self.config, self.layout)
        self._step = jit_train_step(self.config, self.layout, self.abstract)
        self._micro_batches = micro_batches
        values = np.float32(3e-3), np.float32(1e-3), np.float32(0.3), np.int32(micro_batches)
        self._settings = StepSettings(*values)

    def start(self) -> TrainState:
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        # Through NumPy: no two leaves may share a buffer, as the step takes them over.
        return jax.device_put(jax.tree.map(np.array, random_state(self.config)), places)

    def train(self, state, steps):
        metrics = []
        for rows in ROWS[steps.start : steps.stop]:
            rows = rows.reshape(self._micro_batches, -1, LENGTH + 1)
            rows = jax.device_put(rows, batch_sharding(self.mesh, 1))
            state, reported = self._step(state, rows, self._settings)
            metrics.append(jax.device_get(reported))
        return state, metrics


@cache
def run_on(name):
    return Run(*(MESHES[name] if name else ONE))


@cache
def whole_run(name):
    run = run_on(name)
    return run.train(run.start(), range(STEPS))


def losses(metrics):
    return np.array([m.loss for m in metrics])


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_MESHES)
def test_twenty_steps_on_a_mesh_have_the_losses_of_one_device(name):
    (want_state, want), (got_state, got) = whole_run(None), whole_run(name)
    np.testing.assert_allclose(losses(got), losses(want), rtol=1e-5)
    assert losses(want)[-1] < 0.95 * losses(want)[0], "it should have learnt something"
    # Every leaf counts once in the gradient's norm, whatever cuts or copies there are of it.
    assert got[0].grad_norm == pytest.approx(want[0].grad_norm, rel=2e-6)
    # Loads are integers, and so the bias is bit for bit that of one device, on every device.
    for of_layer, wanted in zip(
        jax.tree.leaves(got_state.router), jax.tree.leaves(want_state.router), strict=True
    ):
        for shard in of_layer.addressable_shards:
            np.testing.assert_array_equal(shard.data, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_MESHES)
def test_copies_of_one_weight_stay_equal(name):
    state, _ = whole_run(name)
    for leaf in jax.tree.leaves(state):
        by_index = {}
        for shard in leaf.addressable_shards:
            first = by_index.setdefault(str(shard.index), np.asarray(shard.data))
            np.testing.assert_array_equal(shard.data, first)


def bytes_per_device(tree):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize("state", ["zero1", "fsdp"])
def test_each_device_holds_its_share_of_the_state(state):
    """Master weights and both moments, dense ones over all devices, experts' over their copies."""
    run = Run({"data": 2, "node": 2, "context": 2}, {"state": state}, 1)
    whole = bytes_per_device(run_on(None).abstract)
    # A few norms of odd length stay whole.
    assert whole / 8 <= bytes_per_device(run.abstract) < 1.05 * whole / 8
    layer = run.abstract.opt_state[1].mu["moe_layers"]
    o_proj = layer["self_attn"]["o_proj"]
    assert o_proj.sharding.shard_shape(o_proj.shape) == (2, 3, 4, 5), "the layer dim is whole"
    experts = layer["mlp"]["experts"]["gate_up_proj"].sharding
    assert experts.spec[1] == ("node", "data", "context"), "expert parallelism, and its copies"
    assert experts.shard_shape((1, 8, 2, 16, 24)) == (1, 1, 2, 16, 24)
    replicated = Run({"data": 2, "node": 2, "context": 2}, {"state": "replicated"}, 1)
    assert bytes_per_device(replicated.abstract) > 0.5 * whole


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_another_mesh(tmp_path):
    first, second = run_on("zero1, gathered context"), run_on("2 x 4")
    state, _ = first.train(first.start(), range(10))
    digest = state_sha256(state._asdict())
    with Checkpoints(tmp_path / "checkpoints", every_steps=10, keep=1) as checkpoints:
        checkpoints.save(10, state._asdict(), {})
        checkpoints.wait()
        _, restored, _ = checkpoints.resume("auto", second.abstract._asdict())
    assert state_sha256(restored) == digest
    restored = TrainState(**restored)
    for leaf, like in zip(*map(jax.tree.leaves, (restored, second.abstract)), strict=True):
        assert leaf.sharding == like.sharding
    _, metrics = second.train(restored, range(10, STEPS))
    np.testing.assert_allclose(losses(metrics), losses(whole_run(None)[1])[10:], rtol=1e-5)


@pytest.mark.slow
def test_a_run_on_a_mesh_is_bitwise_repeatable():
    name = "fsdp, ring"
    again, metrics = run_on(name).train(run_on(name).start(), range(STEPS))
    state, first = whole_run(name)
    assert losses(metrics).tolist() == losses(first).tolist()
    assert state_sha256(again._asdict()) == state_sha256(state._asdict())
