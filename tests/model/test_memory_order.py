"""The residual's order in memory is told to XLA for GPUs and TPUs, on each device."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import ExpertParallelConfig, ParallelConfig, ShardingConfig
from dsv3_jax.kernels import backend
from dsv3_jax.model.memory_order import token_by_token
from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
from dsv3_jax.parallel.sharding import ONE_DEVICE, make_layout


def lowered(platform, layout, sharding=None, tokens=16):
    """The program of the residual's gradient, for a platform."""
    x = jax.ShapeDtypeStruct((8, tokens, 32), jnp.bfloat16, sharding=sharding)

    def product(x):
        with backend.compiling_for(SimpleNamespace(platform=platform)):
            return jnp.sum(jnp.sin(token_by_token(jnp.cos(x), layout)).astype(jnp.float32))

    return jax.jit(jax.value_and_grad(product)).lower(x)


@pytest.mark.parametrize(
    "platform, tokens, times",
    [("gpu", 16, 2), ("gpu", 1, 2), ("tpu", 16, 2), ("tpu", 1, 0), ("cpu", 16, 0)],
)
def test_gpus_and_tpus_are_told_of_the_residual_and_its_gradient(platform, tokens, times):
    """Of one token a sequence, as in decoding, TPUs are not: it would fill an eighth of tiles."""
    program = lowered(platform, ONE_DEVICE, tokens=tokens).as_text()
    assert program.count("@LayoutConstraint") == times


def test_nothing_is_gathered_for_it_on_a_mesh():
    mesh = make_mesh(ParallelConfig(data=4, tensor=2))
    layout = make_layout(mesh, ShardingConfig(), ExpertParallelConfig())
    sharding = batch_sharding(mesh, 0)
    program = partial(lowered, layout=layout, sharding=sharding)
    assert program("gpu").as_text().count("@LayoutConstraint") == 2
    plain, told = (program(platform).compile().as_text() for platform in ("cpu", "gpu"))
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert told.count(collective) == plain.count(collective)
