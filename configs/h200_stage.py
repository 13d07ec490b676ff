"""What one GPU of the paper's run does between its exchanges: four MoE layers at V3's widths.

    python -m benchmarks.bench_step

No embedding, no head, no MTP: the benchmark runs the layers alone. The GPU holds 8 experts, and
each token goes to all of them and to the shared one, the rows that V3's tokens need. A step is 8
micro-batches of one row of 4,096 tokens, whose weights' gradients are added up.
"""

import dataclasses

from dsv3_jax.config import Config, ModelConfig, QuantConfig, TrainConfig


def get_config() -> Config:
    """About 2.3B parameters in the four layers."""
    return Config(
        model=dataclasses.replace(
            ModelConfig(),
            num_hidden_layers=4,
            first_k_dense_replace=0,
            num_nextn_predict_layers=0,
            n_routed_experts=8,
            n_group=1,
            topk_group=1,
            bos_token_id=256,  # of the byte tokenizer
            eos_token_id=257,
        ),
        train=TrainConfig(batch_size=8, micro_batch_size=1, seq_len=4096, remat="v3"),
        quant=QuantConfig(preset="fp8_paper"),
        run_dir="runs/h200_stage",
    )
