"""A 0.5B-parameter DeepSeek-V3, 0.1B of them at work on a token: the FP8 runs on one GPU.

    python -m dsv3_jax prepare FOLDERS --out data/python --train-tokenizer 8192
    python examples/fp8_loss_gap.py --config configs/half_billion.py --steps 2000

The learning rate suits 4,096 tokens a step: at 4e-4 runs that only round differently end up to half
a percent of loss apart, which hides what FP8 does (docs/numerics.md).

V3's kinds of layers at a width of 1024, all dims multiples of 128 as FP8 tiles like them: MLA with
V3's heads, one dense layer, four layers of 64 experts in 8 groups, one shared expert, and MTP.
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
    """562M parameters, of which the MTP module has 108M."""
    return Config(
        model=ModelConfig(
            vocab_size=8192,
            hidden_size=1024,
            num_hidden_layers=5,
            max_position_embeddings=4096,
            num_attention_heads=8,
            q_lora_rank=512,
            kv_lora_rank=256,
            rope_scaling=None,
            intermediate_size=4096,
            moe_intermediate_size=512,
            first_k_dense_replace=1,
            n_routed_experts=64,
            num_experts_per_tok=4,
            initializer_range=0.02,
        ),
        data=DataConfig(path="data/python", tokenizer="bpe:8192"),
        train=TrainConfig(steps=2000, batch_size=8, seq_len=512, eval_every=500),
        optimizer=OptimizerConfig(learning_rate=1e-4, moment_dtype="bfloat16"),
        schedule=ScheduleConfig(warmup_steps=100, batch_start_ratio=1.0),
        checkpoint=CheckpointConfig(every_steps=1000, keep=1),
        run_dir="runs/half_billion",
    )
