"""DeepSeek-V2-Lite, 16B parameters: MLA and DeepSeekMoE before V3's router and MTP.

For its published weights (https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite): values of its
config.json. A softmax router without a bias, two shared experts, no query compression.

    python train.py --config configs/deepseek_v2_lite.py --dry-run
"""

from dsv3_jax.config import Config, ModelConfig, RopeScaling, TrainConfig


def get_config() -> Config:
    """Every field that differs from V3 is here. The training settings are ours."""
    return Config(
        model=ModelConfig(
            vocab_size=102400,
            hidden_size=2048,
            num_hidden_layers=27,
            bos_token_id=100000,
            eos_token_id=100001,
            num_attention_heads=16,
            q_lora_rank=None,
            rope_scaling=RopeScaling(mscale=0.707, mscale_all_dim=0.707),
            intermediate_size=10944,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            scoring_func="softmax",
            topk_method="greedy",
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
            num_nextn_predict_layers=0,
            initializer_range=0.02,
        ),
        train=TrainConfig(batch_size=64, seq_len=4096, remat="full"),
        run_dir="runs/deepseek_v2_lite",
    )
