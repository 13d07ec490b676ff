"""DeepSeek-V3 on 2,048 TPU v5p, in BF16 as they have no faster FP8: 64-way experts, FSDP.

python -m dsv3_jax compile --config configs/scale/deepseek_v3_2048_v5p.py --topology v5p:8x16x16
"""

import dataclasses
from pathlib import Path

from dsv3_jax.config import Config, ParallelConfig, QuantConfig, ShardingConfig, load_config


def get_config() -> Config:
    """What differs from configs/deepseek_v3.py."""
    config = load_config(Path(__file__).parents[1] / "deepseek_v3.py")
    return dataclasses.replace(
        config,
        mesh=ParallelConfig(data=32, node=8, local=8),
        sharding=ShardingConfig(state="fsdp"),
        quant=QuantConfig(preset="bf16"),
        train=dataclasses.replace(config.train, batch_size=16_384, micro_batch_size=4_096),
        # From 4,096 rows to the full batch, in micro-batches that the mesh divides.
        schedule=dataclasses.replace(config.schedule, batch_start_ratio=0.25),
        # XLA for TPUs runs exchanges with nothing beside them, so that one body serves all rounds.
        expert_parallel=dataclasses.replace(
            config.expert_parallel, capacity_factor=1.0, overflow="loop"
        ),
    )
