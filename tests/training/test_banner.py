"""What a run says of itself before it begins."""

from functools import partial

import jax
import pytest

from dsv3_jax.config import (
    Config,
    ExpertParallelConfig,
    OptimizerConfig,
    ParallelConfig,
    QuantConfig,
    ShardingConfig,
    TrainConfig,
)
from dsv3_jax.training.banner import banner
from dsv3_jax.training.state import init_state
from tests.helpers import tiny_model


@pytest.mark.parametrize(
    "state, preset, tensor",
    [
        ("fsdp", "fp8_paper", 2),
        ("fsdp", "fp8_paper", 1),
        ("fsdp", "bf16", 2),
        ("zero1", "fp8_paper", 2),
    ],
)
def test_fp8_weights_from_gathered_copies_are_told(state, preset, tensor):
    config = Config(
        model=tiny_model(),
        sharding=ShardingConfig(state=state),
        mesh=ParallelConfig(tensor=tensor),
        quant=QuantConfig(preset=preset),
    )
    abstract = jax.eval_shape(partial(init_state, config=config), jax.random.key(0))
    told = any("FP8 products quantise that copy" in line for line in banner(config, abstract))
    assert told == (state == "fsdp" and preset != "bf16" and tensor > 1)


@pytest.mark.parametrize("steps, told", [(2000, False), (1000, True)])
def test_a_warm_up_that_outlasts_the_run_is_told(steps, told):
    optimizer, plan = OptimizerConfig(learning_rate=1e-3), TrainConfig(steps=steps)
    config = Config(model=tiny_model(), train=plan, optimizer=optimizer)
    abstract = jax.eval_shape(partial(init_state, config=config), jax.random.key(0))
    line = "the learning rate comes to 0.0005 at most, not to 0.001"
    assert any(line in said for said in banner(config, abstract)) == told


@pytest.mark.parametrize(
    "backend, ends",
    [
        (
            "gpu",
            "XLA is told xla_gpu_enable_latency_hiding_scheduler=True, "
            "xla_gpu_experimental_parallel_collective_overlap_limit=8",
        ),
        (
            "tpu",
            "XLA is told xla_tpu_enable_async_all_to_all=True, "
            "xla_lhs_loop_fusion_latency_multiplier=0.01",
        ),
        ("cpu", "in opposite phases"),
    ],
)
def test_halves_in_opposite_phases_are_told_with_what_xla_is(backend, ends, monkeypatch):
    config = Config(model=tiny_model(), expert_parallel=ExpertParallelConfig(overlap=True))
    abstract = jax.eval_shape(partial(init_state, config=config), jax.random.key(0))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    (line,) = [line for line in banner(config, abstract) if line.startswith("overlap")]
    assert line.endswith(ends)
