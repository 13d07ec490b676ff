"""DeepSeek-V3's context extended to 128K: phase 2 of two (V3 report, section 4.3).

    python train.py --config configs/deepseek_v3_128k.py --init-from runs/deepseek_v3_32k

1,000 steps of 480 sequences of 131,072 tokens at 7.3e-6; the rest is phase 1's.
"""

from dataclasses import replace

from dsv3_jax.config import Config, load_config


def get_config() -> Config:
    """Phase 1 with longer rows and fewer of them."""
    config = load_config("deepseek_v3_32k")
    return replace(
        config,
        init_from="runs/deepseek_v3_32k",
        train=replace(config.train, batch_size=480, seq_len=131_072, micro_batch_size=32),
        run_dir="runs/deepseek_v3_128k",
    )
