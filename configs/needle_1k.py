"""configs/needle.py's run with its context extended from 256 to 1,024 tokens (V3 report, 4.3).

    python train.py --config configs/needle_1k.py --init-from runs/needle/256

YaRN on the decoupled key and a short run of longer rows at a constant rate.
"""

from dataclasses import replace

from dsv3_jax.config import Config, RopeScaling, load_config


def get_config() -> Config:
    """The factor is 4, all else of YaRN as V3 has it."""
    config = load_config("needle")
    scaling = RopeScaling(factor=4.0, original_max_position_embeddings=256)
    return replace(
        config,
        model=replace(config.model, max_position_embeddings=1024, rope_scaling=scaling),
        init_from="runs/needle/256",
        data=replace(config.data, path="runs/needle/data-1024"),
        train=replace(config.train, steps=50, batch_size=4, seq_len=1024),
        optimizer=replace(config.optimizer, learning_rate=1e-3),
        schedule=replace(
            config.schedule, warmup_steps=0, decay_start=1.0, decay_end=1.0, final_start=1.0
        ),
        run_dir="runs/needle/1024",
    )
