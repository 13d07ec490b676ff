"""Fine-tuning on conversations: give it --init-from MODEL and --data.path PREPARED.

    python train.py --config configs/finetune.py --init-from MODEL --data.path chat --run-dir RUN

The model is that of MODEL. A constant rate after a short warm-up, no batch-size ramp, and router
biases that keep moving slowly, so that experts stay balanced on the new data.
"""

from dsv3_jax.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)


def get_config() -> Config:
    """What differs from pre-training; sizes are small, and meant to be set."""
    return Config(
        data=DataConfig(fim_rate=0.0),
        train=TrainConfig(
            steps=200, batch_size=8, seq_len=1024, eval_every=50, eval_batches=4, sample_tokens=0
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5, weight_decay=0.0),
        schedule=ScheduleConfig(
            warmup_steps=10,
            decay_start=1.0,
            decay_end=1.0,
            final_start=1.0,
            batch_start_ratio=1.0,
            bias_update_speed=1e-4,
        ),
        run_dir="runs/finetune",
    )
