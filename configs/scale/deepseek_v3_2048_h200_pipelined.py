"""DeepSeek-V3 on 2,048 H200s as the paper trained it: 16 pipeline ranks, experts over 8 hosts.

The paper's batch of 15,360 rows in 120 micro-batches, each one row on a device (section 3.2).

    python -m dsv3_jax compile --config configs/scale/deepseek_v3_2048_h200_pipelined.py \\
        --topology h200:256x8
"""

import dataclasses
from pathlib import Path

from dsv3_jax.config import Config, ParallelConfig, PipelineConfig, load_config


def get_config() -> Config:
    """What differs from configs/deepseek_v3.py."""
    config = load_config(Path(__file__).parents[1] / "deepseek_v3.py")
    return dataclasses.replace(
        config,
        mesh=ParallelConfig(pipe=16, data=2, node=8, local=8),
        # With experts_apart it takes 143 GB of 141 (docs/log.md).
        pipeline=PipelineConfig(schedule="dualpipev", experts_apart=False),
        train=dataclasses.replace(config.train, batch_size=15_360, micro_batch_size=128),
        expert_parallel=dataclasses.replace(config.expert_parallel, capacity_factor=1.0),
    )
