"""Kimi-K2 on 1,024 H200s: 6 of 384 experts on each of 64 devices, 16 copies, FSDP, fp8_paper.

python -m dsv3_jax compile --config configs/scale/kimi_k2_1024_h200.py --topology h200:128x8
"""

import dataclasses
from pathlib import Path

from dsv3_jax.config import (
    Config,
    ExpertParallelConfig,
    OptimizerConfig,
    ParallelConfig,
    QuantConfig,
    ShardingConfig,
    load_config,
)


def get_config() -> Config:
    """What differs from configs/kimi_k2.py."""
    config = load_config(Path(__file__).parents[1] / "kimi_k2.py")
    return dataclasses.replace(
        config,
        mesh=ParallelConfig(data=16, node=8, local=8),
        sharding=ShardingConfig(state="fsdp"),
        quant=QuantConfig(preset="fp8_paper"),
        optimizer=OptimizerConfig(moment_dtype="bfloat16"),
        expert_parallel=ExpertParallelConfig(
            transport="padded", capacity_factor=1.0, dispatch_format="fp8", combine_format="bf16"
        ),
        train=dataclasses.replace(config.train, batch_size=8_192, micro_batch_size=2_048),
        schedule=dataclasses.replace(config.schedule, batch_start_ratio=0.25),
    )
