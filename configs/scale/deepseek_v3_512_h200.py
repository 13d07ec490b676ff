"""DeepSeek-V3 on 512 H200s without a pipeline: experts over 8 hosts, 8 copies, FSDP.

The paper's batch of 15,360 rows, 30 a device, in 10 micro-batches.

    python -m dsv3_jax compile --config configs/scale/deepseek_v3_512_h200.py --topology h200:64x8
"""

import dataclasses
from pathlib import Path

from dsv3_jax.config import Config, ParallelConfig, ShardingConfig, load_config


def get_config() -> Config:
    """What differs from configs/deepseek_v3.py."""
    config = load_config(Path(__file__).parents[1] / "deepseek_v3.py")
    return dataclasses.replace(
        config,
        mesh=ParallelConfig(data=8, node=8, local=8),
        sharding=ShardingConfig(state="fsdp"),
        train=dataclasses.replace(config.train, batch_size=15_360, micro_batch_size=1_536),
        expert_parallel=dataclasses.replace(config.expert_parallel, capacity_factor=1.0),
    )
