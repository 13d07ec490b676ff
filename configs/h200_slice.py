"""V3's real layer shapes on one GPU: a dense layer, two MoE layers of 16 experts, and MTP.

    python train.py --config configs/h200_slice.py

Everything but the numbers of layers and experts is V3's, so that a layer's time means something.
On an H200, with XLA's own attention: 7,665 tokens/s, 92.5 GiB at the peak. An H100 of 80 GB holds
half the experts (--model.n-routed-experts 8 --model.n-group 4); with our kernels that is 14,870
tokens/s, and 15,690 with --quant.preset fp8_paper, at 48.8 GiB (docs/log.md).
"""

import dataclasses

from dsv3_jax.config import (
    CheckpointConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)


def get_config() -> Config:
    """About 4.9B parameters, MTP included; 54 GiB of weights and moments."""
    return Config(
        model=dataclasses.replace(
            ModelConfig(),
            num_hidden_layers=3,
            first_k_dense_replace=1,
            n_routed_experts=16,
            bos_token_id=256,  # of the byte tokenizer
            eos_token_id=257,
        ),
        train=TrainConfig(
            steps=30, batch_size=1, seq_len=4096, remat="full", log_every=5, eval_batches=2
        ),
        optimizer=OptimizerConfig(moment_dtype="bfloat16"),
        schedule=ScheduleConfig(warmup_steps=10, batch_start_ratio=1.0),
        checkpoint=CheckpointConfig(every_steps=1000, keep=1),
        run_dir="runs/h200_slice",
    )
