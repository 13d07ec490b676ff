"""A tiny V3 that learns to find what was planted in a row of 256 tokens (examples/needle.py).

    python examples/needle.py --out runs/needle

Its context is extended by configs/needle_1k.py, as V3's is by deepseek_v3_32k.py.
"""

from dsv3_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)


def get_config() -> Config:
    """Most of a key is in the dims that RoPE rotates, the slowest by 0.6 radian in 256 tokens."""
    return Config(
        model=ModelConfig(
            vocab_size=264,
            hidden_size=64,
            num_hidden_layers=2,
            max_position_embeddings=256,
            bos_token_id=256,
            eos_token_id=257,
            num_attention_heads=4,
            q_lora_rank=None,
            kv_lora_rank=32,
            qk_nope_head_dim=2,
            qk_rope_head_dim=16,
            v_head_dim=16,
            rope_theta=1_000.0,
            rope_scaling=None,
            intermediate_size=128,
            moe_intermediate_size=64,
            first_k_dense_replace=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            num_nextn_predict_layers=0,
            initializer_range=0.06,
            dtype="float32",
        ),
        data=DataConfig(path="runs/needle/data-256", tokenizer="byte", fim_rate=0.0),
        train=TrainConfig(steps=800, batch_size=16, seq_len=256, eval_every=100, sample_tokens=0),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=20, batch_start_ratio=1.0),
        checkpoint=CheckpointConfig(every_steps=800, keep=1),
        run_dir="runs/needle/256",
    )
