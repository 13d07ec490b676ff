"""Moonlight-16B-A3B on 64 H200s: experts within a host, 8 copies, FSDP.

python -m dsv3_jax compile --config configs/scale/moonlight_16b_64_h200.py --topology h200:8x8
"""

import dataclasses
from pathlib import Path

from dsv3_jax.config import (
    Config,
    ExpertParallelConfig,
    ParallelConfig,
    ShardingConfig,
    load_config,
)


def get_config() -> Config:
    """What differs from configs/moonlight_16b.py."""
    config = load_config(Path(__file__).parents[1] / "moonlight_16b.py")
    return dataclasses.replace(
        config,
        mesh=ParallelConfig(data=8, local=8),
        sharding=ShardingConfig(state="fsdp"),
        expert_parallel=ExpertParallelConfig(
            transport="padded", capacity_factor=1.0, dispatch_format="fp8", combine_format="bf16"
        ),
        train=dataclasses.replace(config.train, batch_size=2_048, micro_batch_size=256),
        schedule=dataclasses.replace(config.schedule, batch_start_ratio=0.25),
    )
