"""How a stack of layers is compiled: in a loop, or one by one."""

import jax
import numpy as np
import pytest

from dsv3_jax.config import ExpertParallelConfig, ModelConfig, ParallelConfig, ShardingConfig
from dsv3_jax.kernels import backend
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.stack import _layers_a_step
from dsv3_jax.parallel.mesh import AXES, make_mesh
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout, make_layout

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
