"""The public surface of dsv3_jax by subject: the one list of it, which __init__.py reads, too."""

__version__: str
__all__: list[str]

# Configuration
from dsv3_jax.config import (
    load_config as load_config,
    Config as Config,
    ModelConfig as ModelConfig,
    RopeScaling as RopeScaling,
    TrainConfig as TrainConfig,
    OptimizerConfig as OptimizerConfig,
    ScheduleConfig as ScheduleConfig,
    DataConfig as DataConfig,
    QuantConfig as QuantConfig,
    CheckpointConfig as CheckpointConfig,
    ParallelConfig as ParallelConfig,
    ShardingConfig as ShardingConfig,
    ExpertParallelConfig as ExpertParallelConfig,
    PipelineConfig as PipelineConfig,
    UserError as UserError,
    RunError as RunError,
)

# The model
from dsv3_jax.model.transformer import (
    init_variables as init,
    abstract_variables as abstract_variables,
    forward as forward,
    Outputs as Outputs,
    Variables as Variables,
)
from dsv3_jax.model.forward_pass import Pass as Pass, Tokens as Tokens
from dsv3_jax.model.moe import MoEStats as MoEStats
from dsv3_jax.model.decode import prefill as prefill, decode_step as decode_step, Decoded as Decoded
from dsv3_jax.model.cache import init_model_cache as init_model_cache, ModelCache as ModelCache

# Its parts
from dsv3_jax.model.ends import embed_tokens as embed_tokens, final_norm as final_norm, head as head
from dsv3_jax.model.stack import run_layers as run_layers
from dsv3_jax.model.mtp import run_mtp as run_mtp
from dsv3_jax.model.mla import mla_expand as mla_expand, mla_absorb as mla_absorb
from dsv3_jax.model.rope import (
    rope_tables as rope_tables,
    apply_rope as apply_rope,
    softmax_scale as softmax_scale,
)
from dsv3_jax.model.router import (
    route as route,
    Routing as Routing,
    balance_loss as balance_loss,
    update_router_bias as update_router_bias,
)

# Devices
from dsv3_jax.cli import use_virtual_devices as use_virtual_devices
from dsv3_jax.parallel.mesh import make_mesh as make_mesh
from dsv3_jax.parallel.sharding import (
    make_layout as make_layout,
    Layout as Layout,
    ONE_DEVICE as ONE_DEVICE,
)
from dsv3_jax.model.placement import shardings as shardings

# Training
from dsv3_jax.running import train as train
from dsv3_jax.training.state import init_state as init_state, TrainState as TrainState
from dsv3_jax.training.step import (
    train_step as train_step,
    jit_train_step as jit_train_step,
    StepMetrics as StepMetrics,
)
from dsv3_jax.training.loss import training_loss as training_loss, LossTerms as LossTerms
from dsv3_jax.training.optimizer import make_optimizer as make_optimizer
from dsv3_jax.training.extensions import Extensions as Extensions
from dsv3_jax.training.schedule import Schedule as Schedule, StepSettings as StepSettings
from dsv3_jax.training.feed import batches as batches
from dsv3_jax.data.corpus import open_corpus as open_corpus, Corpus as Corpus

# Weights in and out
from dsv3_jax.loading import load as load, Model as Model
from dsv3_jax.saving import save as save, export as export
from dsv3_jax.interop.importing import import_hf as import_hf
from dsv3_jax.data.tokenizer import load_tokenizer as load_tokenizer
from dsv3_jax.inference.generate import generate as generate

# Number formats
from dsv3_jax.quantization.block_scaled import (
    quantize as quantize,
    dequantize as dequantize,
    BlockScaled as BlockScaled,
    PER_TOKEN as PER_TOKEN,
    PER_BLOCK as PER_BLOCK,
)
from dsv3_jax.quantization.recipe import RECIPES as RECIPES, BF16 as BF16, Recipe as Recipe

# Costs
from dsv3_jax.analysis.estimate import estimate_step as estimate, StepEstimate as StepEstimate
from dsv3_jax.analysis.hardware import accelerator as accelerator, Accelerator as Accelerator
from dsv3_jax.analysis.model_cost import (
    parameters as parameters,
    kv_bytes_per_token as kv_bytes_per_token,
    training_flops_per_token as training_flops_per_token,
)
from dsv3_jax.parallel.schedules import make_schedule as make_schedule
from dsv3_jax.parallel.timeline import simulate as simulate
