"""DeepSeek-V3 on 256 devices, 128 chips, of TPU7x: 64-way experts, 4 copies, FSDP.

The paper's batch of 15,360 rows, 60 a device, in 60 micro-batches.

    python -m dsv3_jax compile --config configs/scale/deepseek_v3_256_tpu7x.py \\
        --topology tpu7x:4x4x8
"""

import dataclasses
from pathlib import Path

from dsv3_jax.config import Config, ParallelConfig, QuantConfig, ShardingConfig, load_config


def get_config() -> Config:
    """What differs from configs/deepseek_v3.py."""
    config = load_config(Path(__file__).parents[1] / "deepseek_v3.py")
    return dataclasses.replace(
        config,
        mesh=ParallelConfig(data=4, node=8, local=8),
        sharding=ShardingConfig(state="fsdp"),
        quant=QuantConfig(preset="bf16"),
        train=dataclasses.replace(config.train, batch_size=15_360, micro_batch_size=256),
        # XLA for TPUs runs exchanges with nothing beside them, so that one body serves all rounds.
        expert_parallel=dataclasses.replace(
            config.expert_parallel, capacity_factor=1.0, overflow="loop"
        ),
    )
