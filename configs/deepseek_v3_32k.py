"""DeepSeek-V3's context extended to 32K: phase 1 of two (V3 report, section 4.3).

    python train.py --config configs/deepseek_v3_32k.py --init-from RUN_OR_FOLDER --data.path DATA

1,000 steps of 1,920 sequences of 32,768 tokens at the rate that pre-training ended with, 7.3e-6,
and YaRN with factor 40 on the decoupled key. This file says the model in full: weights of another
architecture are refused, and those without YaRN begin with it.
"""

from dataclasses import replace

from dsv3_jax.config import Config, load_config


def get_config() -> Config:
    """Pre-training's recipe with the phase's length, batch and rate, which stays constant."""
    config = load_config("deepseek_v3")
    return replace(
        config,
        init_from="runs/deepseek_v3",
        train=replace(config.train, steps=1_000, batch_size=1_920, seq_len=32_768),
        optimizer=replace(config.optimizer, learning_rate=7.3e-6),
        schedule=replace(
            config.schedule,
            warmup_steps=0,
            decay_start=1.0,
            decay_end=1.0,
            final_start=1.0,
            batch_start_ratio=1.0,
            mtp_loss_weight=config.schedule.mtp_loss_weight_final,
            bias_update_speed=0.0,  # as at the end of pre-training
        ),
        run_dir="runs/deepseek_v3_32k",
    )
