"""Moonlight-16B-A3B: V3's architecture at 16B parameters, without query compression or groups.

For its published weights (https://huggingface.co/moonshotai/Moonlight-16B-A3B), or to train one
like it: values of its config.json. The training settings are ours.

    python train.py --config configs/moonlight_16b.py --dry-run
"""

from dsv3_jax.config import Config, ModelConfig, TrainConfig


def get_config() -> Config:
    """27 layers, 64 experts in one group, no YaRN, no MTP."""
    return Config(
        model=ModelConfig(
            vocab_size=163840,
            hidden_size=2048,
            num_hidden_layers=27,
            max_position_embeddings=8192,
            bos_token_id=163584,
            eos_token_id=163586,
            num_attention_heads=16,
            q_lora_rank=None,
            rope_theta=50000.0,
            rope_scaling=None,
            intermediate_size=11264,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.446,
            num_nextn_predict_layers=0,
            rms_norm_eps=1e-5,
            initializer_range=0.02,
        ),
        train=TrainConfig(batch_size=64, seq_len=4096, remat="full"),
        run_dir="runs/moonlight_16b",
    )
