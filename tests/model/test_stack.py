"""How a stack of layers is compiled: in a loop, or one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import (
    ExpertParallelConfig,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
    ShardingConfig,
)
from dsv3_jax.kernels import backend
from dsv3_jax.model import stack
from dsv3_jax.model.forward_pass import Pass, Tokens
from dsv3_jax.model.stack import _layers_a_step, run_layers
from dsv3_jax.parallel.mesh import AXES, make_mesh
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout, make_layout
from dsv3_jax.training.loss import training_pass
from dsv3_jax.training.step import for_products
from tests.helpers import (
    TOLERANCE,
    random_variables,
    relative_error,
    tiny_config,
    tiny_model,
)

GPU = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


def layers(number: int):
    return {"params": {"norm": np.ones((number, 8), np.float32)}}


@pytest.mark.parametrize("number, a_step", [(1, 1), (2, 2), (4, 4), (5, 1), (61, 1)])
def test_a_gpu_has_no_loop_of_few_layers(number, a_step):
    how = Pass(ModelConfig(), layout=ONE_DEVICE)
    with backend.compiling_for(GPU):
        assert _layers_a_step(layers(number), how) == a_step


def test_elsewhere_there_is_a_loop():
    cpus = make_mesh(ParallelConfig(data=2), jax.devices()[:2])
    of_cpus = make_layout(cpus, ShardingConfig(), ExpertParallelConfig())
    assert _layers_a_step(layers(4), Pass(ModelConfig(), layout=of_cpus)) == 2
    assert _layers_a_step(layers(4), Pass(ModelConfig())) == 1  # nobody says which device
    sizes = [2 if axis == "data" else 1 for axis in AXES]
    of_gpus = Layout(jax.sharding.AbstractMesh(tuple(sizes), AXES))
    with backend.compiling_for(GPU):
        assert _layers_a_step(layers(4), Pass(ModelConfig(), layout=of_gpus)) == 1


@pytest.mark.slow
def test_layers_in_turn_are_those_of_a_scan(monkeypatch):
    """Numbers that a step made of the weights are taken from their stacks inside of a layer."""
    model = tiny_model(num_hidden_layers=3, num_nextn_predict_layers=0)
    config = dataclasses.replace(tiny_config(model), quant=QuantConfig("fp8_paper"))
    variables = random_variables(model)
    how = dataclasses.replace(training_pass(config), remat="v3")
    x = jax.random.normal(jax.random.key(1), (1, 8, model.hidden_size))
    tokens = Tokens(jnp.arange(8)[None])

    def run(variables):
        weights = for_products(variables["params"], config)
        layers = {**variables, "params": weights.held(weights.trained)}
        x_after, _, stats = run_layers(layers, x, tokens, how)
        assert stats is not None
        return x_after, stats.load_E

    scanned = jax.jit(run)(variables)
    turns = []
    in_turn = stack._in_turn
    monkeypatch.setattr(stack, "_one_gpu", lambda _: True)
    monkeypatch.setattr(stack, "_in_turn", lambda *args: turns.append(1) or in_turn(*args))
    one_by_one = jax.jit(lambda variables: run(variables))(variables)
    assert turns, "nothing was run in turn"
    assert relative_error(one_by_one[0], scanned[0]) < TOLERANCE["f32_model"]
    np.testing.assert_array_equal(one_by_one[1], scanned[1])
