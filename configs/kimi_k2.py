"""Kimi-K2, 1T parameters: V3's architecture with 384 experts, 64 heads and one dense layer.

For its published weights (https://huggingface.co/moonshotai/Kimi-K2-Instruct): values of its
config.json. The training settings are ours.

    python train.py --config configs/kimi_k2.py --dry-run
"""

from dsv3_jax.config import Config, ModelConfig, RopeScaling, TrainConfig


def get_config() -> Config:
    """Every field that differs from V3 is here; experts are in one group."""
    return Config(
        model=ModelConfig(
            vocab_size=163840,
            max_position_embeddings=131072,
            bos_token_id=163584,
            eos_token_id=163585,
            num_attention_heads=64,
            rope_theta=50000.0,
            rope_scaling=RopeScaling(factor=32.0, beta_fast=1.0),
            first_k_dense_replace=1,
            n_routed_experts=384,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.827,
            num_nextn_predict_layers=0,
            initializer_range=0.02,
        ),
        train=TrainConfig(batch_size=1024, seq_len=4096, remat="full"),
        run_dir="runs/kimi_k2",
    )
