"""Every option of a run, as frozen dataclasses; the only configuration there is.

`ModelConfig` is the architecture and nothing else: its fields are those of the Hugging Face
`config.json`, so one loads published models by fields alone. `Config` is a whole run. Both know
nothing of JAX. `Config.problems()` collects every inconsistency at once, each with its fix.
"""

from dsv3_jax.config.mesh import (
    DistributedConfig,
    ExpertParallelConfig,
    ParallelConfig,
    PipelineConfig,
    ShardingConfig,
)
from dsv3_jax.config.model import LIMITS, ModelConfig, RopeScaling
from dsv3_jax.config.rules import DType, RunError, UserError
from dsv3_jax.config.run import (
    Config,
    by_name,
    config_from_dict,
    load_config,
    shipped_configs,
    to_json,
)
from dsv3_jax.config.training import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    OptimizerConfig,
    QuantConfig,
    ScheduleConfig,
    TrainConfig,
    WatchdogConfig,
)

__all__ = [
    "LIMITS",
    "CheckpointConfig",
    "Config",
    "DType",
    "DataConfig",
    "DistributedConfig",
    "ExpertParallelConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PipelineConfig",
    "QuantConfig",
    "RopeScaling",
    "RunError",
    "ScheduleConfig",
    "ShardingConfig",
    "TrainConfig",
    "UserError",
    "WatchdogConfig",
    "by_name",
    "config_from_dict",
    "load_config",
    "shipped_configs",
    "to_json",
]
