"""DeepSeek-V3, 671B parameters, with the paper's pre-training recipe (V3 report, section 4.2).

14.8T tokens in 242,785 steps: the batch grows from 3,072 to 15,360 sequences of 4,096 tokens over
the first 469B. The context is 4K in pre-training, so YaRN is in the config for what comes after.

    python train.py --config configs/deepseek_v3.py --dry-run

configs/scale/ has it on meshes of 256 to 2,048 devices, pipelined as the paper's and not.
"""

from dsv3_jax.config import (
    Config,
    DataConfig,
    ExpertParallelConfig,
    OptimizerConfig,
    QuantConfig,
    TrainConfig,
)


def get_config() -> Config:
    """ModelConfig's and ScheduleConfig's defaults are V3's own."""
    return Config(
        # Once experts are spread over a mesh: FP8 to the experts, BF16 back (section 3.3.3).
        expert_parallel=ExpertParallelConfig(
            transport="padded",
            capacity_factor=1.25,
            dispatch_format="fp8",
            combine_format="bf16",
        ),
        data=DataConfig(path="data/pretraining", tokenizer="data/tokenizer.json"),
        train=TrainConfig(
            steps=242_785,
            batch_size=15_360,
            micro_batch_size=128,  # a row a device, spread over 128 of them for each pipeline rank
            seq_len=4_096,
            remat="full",
            sample_tokens=0,
        ),
        optimizer=OptimizerConfig(moment_dtype="bfloat16"),
        quant=QuantConfig(preset="fp8_paper"),  # section 3.3
        run_dir="runs/deepseek_v3",
    )
