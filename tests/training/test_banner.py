"""What a run says of itself before it begins."""

from functools import partial

import jax
import pytest

from dsv3_jax.config import Config, ParallelConfig, QuantConfig, ShardingConfig
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
