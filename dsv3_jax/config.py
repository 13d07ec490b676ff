"""Every option of a run, as frozen dataclasses; the only configuration there is.

`ModelConfig` is the architecture and nothing else: its fields are those of the Hugging Face
`config.json`, so one loads published models by fields alone. `Config` is a whole run. Both know
nothing of JAX. `Config.problems()` collects every inconsistency at once, each with its fix.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class UserError(ValueError):
    """The user's mistake: command lines show it in one message and exit with code 2."""


class RunError(RuntimeError):
    """The run or its environment failed: command lines show it in one message, exit code 1."""


# The dtypes by name, as config.json spells them.
DType = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class RopeScaling:
    """YaRN context extension (V3 report, section 4.3); field names as in `rope_scaling`."""

    type: Literal["yarn"] = "yarn"
    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; field names and meanings are those of the Hugging Face config.json."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    max_position_embeddings: int = 163840
    bos_token_id: int = 0
    eos_token_id: int = 1

    # MLA
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536  # None: queries are projected straight from the hidden state
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)

    # Feed-forward
    intermediate_size: int = 18432  # of the dense layers
    moe_intermediate_size: int = 2048  # of one expert
    first_k_dense_replace: int = 3  # this many layers at the start are dense
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8

    # Router
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5

    # MTP
    num_nextn_predict_layers: int = 1

    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006  # V3 report, section 4.2; the published config.json says 0.02
    dtype: DType = "bfloat16"  # of activations and matmuls; parameters are held in f32 to train

    @property
    def qk_head_dim(self) -> int:
        """Dims of one head's query and key: the nope part, then the rope part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense feed-forward."""
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        """Main-model layers with experts; MTP layers are not counted."""
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def has_router_bias(self) -> bool:
        """Whether a bias steers the choice of experts (auxiliary-loss-free balancing)."""
        return self.topk_method == "noaux_tc"

    def problems(self) -> list[str]:
        """Every inconsistency of the architecture, each with the rule and a fix."""
        found: list[str] = []
        _require_positive(
            found,
            self,
            [
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "max_position_embeddings",
                "num_attention_heads",
                "kv_lora_rank",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
                "intermediate_size",
                "moe_intermediate_size",
                "n_routed_experts",
                "num_experts_per_tok",
                "n_group",
                "topk_group",
                "rope_theta",
                "rms_norm_eps",
            ],
        )
        for name in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"):
            if getattr(self, name) < 0:
                found.append(f"{name}={getattr(self, name)} must not be negative")
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            found.append(
                f"q_lora_rank={self.q_lora_rank} must be positive, or None for no query compression"
            )
        if found:
            return found  # the rules below divide by these
        if self.qk_rope_head_dim % 2:
            found.append(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even (RoPE rotates pairs): "
                f"use {self.qk_rope_head_dim + 1}"
            )
        experts, per_tok = self.n_routed_experts, self.num_experts_per_tok
        if per_tok > experts:
            found.append(
                f"num_experts_per_tok={per_tok} exceeds n_routed_experts={experts}: "
                f"use at most {experts}"
            )
        grouped = self.topk_method != "greedy"
        if grouped and experts % self.n_group:
            found.append(
                f"n_routed_experts={experts} must be a multiple of n_group={self.n_group}: "
                f"use n_routed_experts={_round_up(experts, self.n_group)}"
            )
        elif grouped:
            group_size = experts // self.n_group
            if self.topk_group > self.n_group:
                found.append(
                    f"topk_group={self.topk_group} exceeds n_group={self.n_group}: "
                    f"use at most {self.n_group}"
                )
            elif per_tok > self.topk_group * group_size:
                found.append(
                    f"num_experts_per_tok={per_tok} exceeds the "
                    f"{self.topk_group * group_size} experts "
                    f"of topk_group={self.topk_group} groups of {group_size}: "
                    f"use topk_group={math.ceil(per_tok / group_size)} or more"
                )
            if self.has_router_bias and self.n_group > 1 and group_size < 2:
                found.append(
                    f"groups are scored by their 2 best experts, but n_group={self.n_group} leaves "
                    f"{group_size} a group: use n_group={max(experts // 2, 1)} or fewer"
                )
        for name in ("bos_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                found.append(
                    f"{name}={getattr(self, name)} is outside vocab_size={self.vocab_size}"
                )
        if self.num_nextn_predict_layers and not self.num_moe_layers:
            found.append(
                "MTP modules are MoE blocks, but first_k_dense_replace="
                f"{self.first_k_dense_replace} makes all {self.num_hidden_layers} layers dense: "
                "use a smaller first_k_dense_replace or num_nextn_predict_layers=0"
            )
        return found


@dataclass(frozen=True)
class QuantConfig:
    """What is computed in fewer bits; `dsv3_jax/quantization/recipe.py` spells the presets out."""

    preset: Literal["bf16", "fp8_paper", "fp8_blockwise_dgrad"] = "bf16"


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes, slowest link first; the product is the number of devices used."""

    pipe: int = 1
    data: int = 1  # 0: as many as the other axes leave and as divide the batch
    node: int = 1
    local: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def num_devices(self) -> int:
        """Devices the mesh takes, with data=0 counted as 1."""
        return math.prod(max(size, 1) for size in dataclasses.astuple(self))

    def problems(self) -> list[str]:
        """Axis sizes that make no mesh."""
        found: list[str] = []
        if self.data < 0:
            found.append(f"data={self.data} must be positive, or 0 for all devices that are left")
        others = [f.name for f in dataclasses.fields(self) if f.name != "data"]
        _require_positive(found, self, others)
        return found

    def check_model(self, model: ModelConfig) -> None:
        """UserError, with all reasons, when this mesh cannot hold the model."""
        if found := [f"mesh.{p}" for p in self.problems()] or self.indivisible(model):
            raise UserError("the mesh does not fit the model:\n  - " + "\n  - ".join(found))

    def indivisible(self, model: ModelConfig) -> list[str]:
        """Dims of the model that their mesh axes do not divide."""
        found: list[str] = []
        sizes = {"num_attention_heads": model.num_attention_heads, "vocab_size": model.vocab_size}
        if model.num_dense_layers:
            sizes["intermediate_size"] = model.intermediate_size
        if model.n_shared_experts:
            width = model.n_shared_experts * model.moe_intermediate_size
            sizes["n_shared_experts x moe_intermediate_size"] = width
        for name, size in sizes.items():
            if size % self.tensor:
                found.append(
                    f"model.{name}={size} must be a multiple of mesh.tensor={self.tensor}: use "
                    f"mesh.tensor={math.gcd(size, self.tensor)} or {_round_up(size, self.tensor)}"
                )
        expert_shards = self.node * self.local
        if model.n_routed_experts % expert_shards:
            found.append(
                f"model.n_routed_experts={model.n_routed_experts} must be a multiple of "
                f"mesh.node x mesh.local = {expert_shards}: use mesh.node x mesh.local = "
                f"{math.gcd(model.n_routed_experts, expert_shards)}"
            )
        return found


@dataclass(frozen=True)
class ShardingConfig:
    """How the state and the sequence are spread over a mesh, beyond the sizes of its axes."""

    # What devices that compute with the same weight hold between steps. zero1: a slice each of the
    # master weight and its moments; weights are gathered once a step. fsdp: the same slices, but
    # each layer is gathered when it runs and its gradient goes back at once. replicated: all of it.
    state: Literal["zero1", "fsdp", "replicated"] = "zero1"
    # Over mesh.context. allgather: every device gets the latents of the whole sequence. ring: they
    # travel around, and a device has an early and a late piece of the sequence for equal work.
    context: Literal["allgather", "ring"] = "allgather"


@dataclass(frozen=True)
class ExpertParallelConfig:
    """How tokens reach experts on other devices and come back (docs/parallelism.md)."""

    # local: every device holds all experts. allgather: everybody sees all tokens. padded: buffers
    # of a fixed size for each peer. ragged: as padded, but only the rows in use are sent.
    transport: Literal["local", "allgather", "padded", "ragged"] = "allgather"
    # True: a token goes to each node once and is handed on there; False: straight to each device.
    hierarchical: bool = True
    capacity_factor: float = 2.0  # rows that buffers hold, over those of an even load
    # What happens to rows that do not fit. rounds: they are sent in further rounds; error: the
    # output is NaN, so that the step is not applied. None is ever left out.
    overflow: Literal["rounds", "error"] = "rounds"
    # On the wire: tokens to experts (forward) and their gradients (backward), and the way back.
    dispatch_format: Literal["none", "fp8"] = "none"
    combine_format: Literal["none", "bf16", "logfmt10"] = "none"

    def problems(self) -> list[str]:
        """Buffers that hold nothing."""
        found: list[str] = []
        _require_positive(found, self, ["capacity_factor"])
        return found


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how documents become rows."""

    path: str = "stdlib"  # "stdlib", a text file, a folder of text files, or a `prepare`d folder
    tokenizer: str = "byte"  # "byte", "bpe:N" (trained on the corpus), or a tokenizer.json's path
    val_fraction: float = 0.02  # of the documents, chosen by a hash of each
    fim_rate: float = 0.1  # fraction of training documents in fill-in-the-middle (PSM) order
    mask_documents: bool = False  # True: no attention across documents of a row (V3: False)

    def problems(self) -> list[str]:
        """Fractions outside their range."""
        found = []
        if not 0 < self.val_fraction < 1:
            found.append(f"val_fraction={self.val_fraction} must lie between 0 and 1, exclusive")
        if not 0 <= self.fim_rate <= 1:
            found.append(f"fim_rate={self.fim_rate} must lie in [0, 1]")
        return found


@dataclass(frozen=True)
class TrainConfig:
    """Length and shape of a run, and what is looked at on the way."""

    steps: int = 1000
    batch_size: int = 16  # sequences a step, once the batch-size ramp is over
    micro_batch_size: int | None = None  # sequences a forward pass; None: all of them
    seq_len: int = 256
    remat: Literal["none", "dots", "full"] = "none"
    log_every: int = 10
    eval_every: int = 200  # validation also runs after the last step
    eval_batches: int = 8
    max_nonfinite_steps: int = 10  # skipped steps in a row before the run stops
    sample_tokens: int = 160  # length of the text written when the run ends; 0: none
    profile_steps: int = 0  # this many steps, from the tenth on, are traced into profile/

    def problems(self) -> list[str]:
        """Sizes that cannot make a step."""
        found: list[str] = []
        names = "steps batch_size seq_len log_every eval_every eval_batches max_nonfinite_steps"
        _require_positive(found, self, names.split())
        micro = self.micro_batch_size
        if micro is not None and (micro <= 0 or self.batch_size % micro):
            found.append(
                f"batch_size={self.batch_size} must be a multiple of micro_batch_size={micro}: "
                f"use batch_size={_round_up(self.batch_size, max(micro, 1))}"
            )
        return found


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the V3 report, section 4.2. Its epsilon and decay mask are not published:
    1e-8, and decay of matrices only."""

    learning_rate: float = 2.2e-4  # the peak
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: DType = "float32"  # of both moments; the paper holds them in bfloat16

    def problems(self) -> list[str]:
        """Values AdamW cannot work with."""
        found: list[str] = []
        _require_positive(found, self, ["learning_rate", "eps", "clip_norm"])
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name}={getattr(self, name)} must lie in [0, 1)")
        return found


@dataclass(frozen=True)
class ScheduleConfig:
    """The paper's schedules (V3 report, section 4.2) in fractions of the run's tokens.

    They are of 14.8T there; a run of any length goes through the same phases.
    """

    warmup_steps: int = 2000
    decay_start: float = 10.0 / 14.8  # the peak rate until here,
    decay_end: float = 14.3 / 14.8  # then a cosine down to `decay_ratio` of it until here,
    decay_ratio: float = 0.1
    final_start: float = 14.633 / 14.8  # and from here on `final_ratio` of the peak
    final_ratio: float = 7.3e-6 / 2.2e-4
    batch_start_ratio: float = 0.2  # first batch size over the full one (3072 / 15360);
    batch_ramp_end: float = 0.469 / 14.8  # it grows linearly in tokens until here
    bias_update_speed: float = 1e-3  # gamma of the router bias,
    bias_update_end: float = 14.3 / 14.8  # zero from here on
    balance_loss_weight: float = 1e-4  # alpha, of the sequence-wise balance loss
    mtp_loss_weight: float = 0.3  # lambda,
    mtp_switch: float = 10.0 / 14.8  # which from here on is
    mtp_loss_weight_final: float = 0.1

    def problems(self) -> list[str]:
        """Phases out of order."""
        found = []
        if self.warmup_steps < 0:
            found.append(f"warmup_steps={self.warmup_steps} must not be negative")
        if not 0 <= self.decay_start <= self.decay_end <= self.final_start <= 1:
            found.append(
                f"phases must come in order: 0 <= decay_start={self.decay_start} <= "
                f"decay_end={self.decay_end} <= final_start={self.final_start} <= 1"
            )
        if not 0 < self.batch_start_ratio <= 1:
            found.append(f"batch_start_ratio={self.batch_start_ratio} must lie in (0, 1]")
        return found


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and how much is kept."""

    every_steps: int = 500  # also after the last step and on SIGTERM
    keep: int = 3

    def problems(self) -> list[str]:
        """Counts that would save nothing."""
        found: list[str] = []
        _require_positive(found, self, ["every_steps", "keep"])
        return found


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run on several hosts, one on each, find and watch each other.

    Under SLURM's srun everything is found out; under Kubernetes JobSet everything but the number of
    processes is (launch/). What is given here goes before what is found.
    """

    coordinator: str | None = None  # HOST:PORT of process 0, reachable from all
    num_processes: int | None = None
    process_id: int | None = None  # 0 to num_processes - 1
    start_timeout: int = 300  # seconds until all processes must have started
    heartbeat_timeout: int = 100  # seconds without a sign of life until the others end

    def problems(self) -> list[str]:
        """Numbers that no set of processes has."""
        found: list[str] = []
        _require_positive(found, self, ["start_timeout", "heartbeat_timeout"])
        if self.num_processes is not None and self.num_processes <= 0:
            found.append(f"num_processes={self.num_processes} must be positive")
        if self.process_id is not None and self.process_id < 0:
            found.append(f"process_id={self.process_id} must not be negative")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            found.append(f"coordinator={self.coordinator!r} must be HOST:PORT")
        return found


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run counts as stuck: its stacks are then written to stacks.txt."""

    min_seconds: float = 600.0  # no step for this long,
    median_steps: float = 20.0  # and for this many times the median step; 0 seconds: never
    exit: bool = False  # then also end the process, with exit code 124

    def problems(self) -> list[str]:
        """Limits that every run would pass."""
        found = []
        for name in ("min_seconds", "median_steps"):
            if getattr(self, name) < 0:
                found.append(f"{name}={getattr(self, name)} must not be negative")
        return found


@dataclass(frozen=True)
class Config:
    """A whole run: what `configs/*.py` return and `train.py` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    mesh: ParallelConfig = field(default_factory=ParallelConfig)
    expert_parallel: ExpertParallelConfig = field(default_factory=ExpertParallelConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    run_dir: str = "runs/default"
    seed: int = 0
    resume: str = "auto"  # "auto": the newest valid checkpoint; "never": start anew; or a step
    devices: int | None = None  # run on this many virtual CPU devices
    dry_run: bool = False  # print shapes, parameters and memory per device, and stop

    def problems(self) -> list[str]:
        """Every inconsistency of the run, each prefixed with its group, with the rule and a fix."""
        found = []
        for group in dataclasses.fields(self):
            value = getattr(self, group.name)
            if hasattr(value, "problems"):
                found += [f"{group.name}.{problem}" for problem in value.problems()]
        if self.resume not in ("auto", "never") and not self.resume.isdigit():
            found.append(f"resume={self.resume!r} must be auto, never or a step number")
        if self.devices is not None and self.devices <= 0:
            found.append(f"devices={self.devices} must be positive")
        if found:
            return found  # the rules below divide by these
        if self.train.seq_len > self.model.max_position_embeddings:
            found.append(
                f"train.seq_len={self.train.seq_len} exceeds "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        if self.train.seq_len <= self.model.num_nextn_predict_layers:
            found.append(
                f"train.seq_len={self.train.seq_len} leaves nothing to predict at MTP depth "
                f"{self.model.num_nextn_predict_layers}"
            )
        expert_shards = self.mesh.node * self.mesh.local
        if self.expert_parallel.transport == "local" and expert_shards > 1:
            found.append(
                "expert_parallel.transport='local' moves nothing, but the experts are spread over "
                f"mesh.node x mesh.local = {expert_shards} devices: use 'allgather'"
            )
        found += self.mesh.indivisible(self.model)
        pieces = self.mesh.context * self.mesh.tensor
        if self.sharding.context == "ring":  # two pieces of a sequence on each device
            pieces = math.lcm(pieces, 2 * self.mesh.context)
        if self.train.seq_len % pieces:
            found.append(
                f"train.seq_len={self.train.seq_len} must be a multiple of {pieces}, as "
                f"mesh.context={self.mesh.context}, mesh.tensor={self.mesh.tensor} and "
                f"sharding.context={self.sharding.context} cut it into so many pieces: use "
                f"{_round_up(self.train.seq_len, pieces)}"
            )
        packed = self.expert_parallel.combine_format == "logfmt10"
        if packed and self.model.hidden_size % 16:
            found.append(
                f"model.hidden_size={self.model.hidden_size} must be a multiple of 16 for "
                "expert_parallel.combine_format='logfmt10', which packs 16 channels together"
            )
        token_shards = max(self.mesh.data, 1) * self.mesh.node * self.mesh.local
        micro = self.train.micro_batch_size or self.train.batch_size
        if micro % token_shards:
            found.append(
                f"a micro-batch of {micro} sequences must be a multiple of mesh.data x mesh.node x "
                f"mesh.local = {token_shards}: use {_round_up(micro, token_shards)}"
            )
        return found

    def validate(self) -> Config:
        """This config, or a UserError that lists every problem."""
        if found := self.problems():
            raise UserError("the configuration does not fit together:\n  - " + "\n  - ".join(found))
        return self


def to_json(config: Any) -> str:
    """A config as JSON text, the form saved with every run and checkpoint."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def config_from_dict(values: dict[str, Any]) -> Config:
    """The Config that `dataclasses.asdict` made `values` from; UserError names unknown fields."""
    groups = {f.name: f for f in dataclasses.fields(Config)}
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in groups:
            raise UserError(f"unknown configuration field {name!r}")
        kind = _GROUPS.get(name)
        made[name] = _group_from_dict(kind, value, name) if kind else value
    return Config(**made)


def load_config(path: str | Path) -> Config:
    """The Config that the `get_config()` of a Python file returns.

    Raises UserError when the file is missing, fails, or returns something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": path.stem}
    try:
        exec(compile(path.read_text(), str(path), "exec"), namespace)
    except Exception as error:
        raise UserError(f"--config {path}: {type(error).__name__}: {error}") from error
    if not callable(namespace.get("get_config")):
        raise UserError(f"--config {path}: defines no get_config()")
    config = namespace["get_config"]()
    if not isinstance(config, Config):
        raise UserError(
            f"--config {path}: get_config() returned {type(config).__name__}, not Config"
        )
    return config


def _group_from_dict(kind: type, values: dict[str, Any], prefix: str) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"unknown configuration field {prefix}.{unknown[0]}")
    values = dict(values)
    if isinstance(values.get("rope_scaling"), dict):
        values["rope_scaling"] = _group_from_dict(
            RopeScaling, values["rope_scaling"], "rope_scaling"
        )
    return kind(**values)


def _require_positive(found: list[str], group: Any, names: Sequence[str]) -> None:
    found += [f"{n}={getattr(group, n)} must be positive" for n in names if getattr(group, n) <= 0]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


_GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "quant": QuantConfig,
    "mesh": ParallelConfig,
    "expert_parallel": ExpertParallelConfig,
    "sharding": ShardingConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "checkpoint": CheckpointConfig,
    "distributed": DistributedConfig,
    "watchdog": WatchdogConfig,
}
