"""DeepSeek-V3 on 2,048 H200s without a pipeline: experts over 8 hosts, 32 copies, FSDP.

A batch of 16,384 rows for the paper's 15,360, as 2,048 devices divide it: 8 rows a device.

    python -m dsv3_jax compile --config configs/scale/deepseek_v3_2048_h200.py --topology h200:256x8
"""

import dataclasses
from pathlib import Path

from dsv3_jax.config import Config, ParallelConfig, ShardingConfig, load_config


def get_config() -> Config:
    """What differs from configs/deepseek_v3.py."""
    config = load_config(Path(__file__).parents[1] / "deepseek_v3.py")
    return dataclasses.replace(
        config,
        mesh=ParallelConfig(data=32, node=8, local=8),
        sharding=ShardingConfig(state="fsdp"),
        train=dataclasses.replace(config.train, batch_size=16_384, micro_batch_size=4_096),
        # From 4,096 rows to the full batch, in micro-batches that the mesh divides.
        schedule=dataclasses.replace(config.schedule, batch_start_ratio=0.25),
        expert_parallel=dataclasses.replace(config.expert_parallel, capacity_factor=1.0),
    )
