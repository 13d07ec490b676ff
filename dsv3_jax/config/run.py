"""A whole run: Config, its checks across groups, and its forms as JSON, a dict and a file."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv3_jax.config.files import build, read_config
from dsv3_jax.config.mesh import (
    DistributedConfig,
    ExpertParallelConfig,
    ParallelConfig,
    PipelineConfig,
    ShardingConfig,
)
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.rules import UserError, round_up
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


@dataclass(frozen=True)
class Config:
    """A whole run: what `configs/*.py` return and `train.py` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    mesh: ParallelConfig = field(default_factory=ParallelConfig)
    expert_parallel: ExpertParallelConfig = field(default_factory=ExpertParallelConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    # A Hugging Face folder, an import or a run, with whose weights and model a new run begins.
    init_from: str | None = None
    run_dir: str = "runs/default"
    seed: int = 0
    resume: str = "auto"  # "auto": the newest valid checkpoint; "never": start anew; or a step
    devices: int | None = None  # run on this many virtual CPU devices
    dry_run: bool = False  # print shapes, parameters and memory per device, and stop
    tensorboard: bool = False  # also write the numbers of metrics.jsonl to tensorboard/
    # Also to Weights & Biases: "offline" into wandb/, for `wandb sync`, or "online".
    wandb: Literal["off", "offline", "online"] = "off"

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one forward pass: train.micro_batch_size, or what the batch-size ramp needs.

        A step reads whole micro-batches. Under a ramp theirs is the largest size that divides the
        batch and the mesh, and with which the first step is within a tenth of what is asked; where
        there is none, that which comes nearest. Without a ramp it is the whole batch.
        """
        batch, ratio = self.train.batch_size, self.schedule.batch_start_ratio
        if self.train.micro_batch_size is not None:
            return self.train.micro_batch_size
        if ratio >= 1 or self.schedule.batch_ramp_end <= 0:
            return batch
        shards = max(self.mesh.data, 1) * self.mesh.node * self.mesh.local
        halves = [d for d in range(1, math.isqrt(batch) + 1) if batch % d == 0]
        sizes = [d for half in halves for d in (half, batch // half) if d % shards == 0]

        def miss(size: int) -> float:
            return abs(max(round(ratio * batch / size), 1) * size - ratio * batch)

        near = [size for size in sizes if miss(size) <= 0.1 * ratio * batch]
        return max(near) if near else min(sizes, key=lambda s: (miss(s), -s), default=batch)

    def problems(self) -> list[str]:
        """Every inconsistency of the run, each prefixed with its group, with the rule and a fix."""
        # The rules of training divide by fields.
        return self._wrong_fields() or [*self._not_to_train(), *self._not_on_the_mesh()]

    def _wrong_fields(self) -> list[str]:
        """What is wrong with values by themselves, or within their group."""
        found = _unknown_choices(self)
        for group in dataclasses.fields(self):
            value = getattr(self, group.name)
            wrong = _unknown_choices(value) + _not_finite(value)
            found += [f"{group.name}.{problem}" for problem in wrong]
            if hasattr(value, "problems"):
                found += [f"{group.name}.{problem}" for problem in value.problems()]
        if self.resume not in ("auto", "never") and not self.resume.isdecimal():
            found.append(f"resume={self.resume!r} must be auto, never or a step number")
        if not self.run_dir.strip():
            found.append("run_dir is empty: name a folder, '.' for this one")
        if not 0 <= self.seed < 1 << 32:  # JAX's keys take the lowest 32 bits
            found.append(f"seed={self.seed} must lie in 0 to {(1 << 32) - 1}")
        if self.devices is not None and self.devices <= 0:
            found.append(f"devices={self.devices} must be positive")
        return found

    def _not_to_train(self) -> list[str]:
        """What the rows, the model and the mesh do not have of what training wants."""
        found = []
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
        if self.lora.rank and not self.init_from:
            found.append("lora.rank needs init_from: adapters change weights that are there")
        pieces = self.mesh.context * self.mesh.tensor
        if self.sharding.context == "ring":  # two pieces of a sequence on each device
            pieces = math.lcm(pieces, 2 * self.mesh.context)
        if self.train.seq_len % pieces:
            found.append(
                f"train.seq_len={self.train.seq_len} must be a multiple of {pieces}, as "
                f"mesh.context={self.mesh.context}, mesh.tensor={self.mesh.tensor} and "
                f"sharding.context={self.sharding.context} cut it into so many pieces: use "
                f"{round_up(self.train.seq_len, pieces)}"
            )
        token_shards = max(self.mesh.data, 1) * self.mesh.node * self.mesh.local
        micro = self.micro_batch_size
        if micro % token_shards:
            found.append(
                f"a micro-batch of {micro} sequences must be a multiple of mesh.data x mesh.node x "
                f"mesh.local = {token_shards}: use {round_up(micro, token_shards)}"
            )
        if self.expert_parallel.transport == "pallas" and self.mesh.pipe > 1 < self.mesh.local:
            found.append(
                "expert_parallel.transport='pallas' holds all devices at a barrier, which ranks of "
                f"mesh.pipe={self.mesh.pipe} reach at other times: use 'padded' or 'auto'"
            )
        found += self.expert_parallel.not_overlapped(self.mesh, micro, self.model.num_moe_layers)
        count, layers = self.train.batch_size // micro, self.model.num_hidden_layers
        return found + self.pipeline.misfits(self.mesh.pipe, count, layers)

    def _not_on_the_mesh(self, redundant_experts: int = 0) -> list[str]:
        """What of the model the mesh cannot hold or send."""
        found = []
        expert_shards = self.mesh.node * self.mesh.local
        if self.expert_parallel.transport == "local" and expert_shards > 1:
            found.append(
                "expert_parallel.transport='local' moves nothing, but the experts are spread over "
                f"mesh.node x mesh.local = {expert_shards} devices: use 'allgather'"
            )
        found += self.mesh.indivisible(self.model, redundant_experts)
        packed = self.expert_parallel.combine_format == "logfmt10"
        if packed and self.model.hidden_size % 16:
            found.append(
                f"model.hidden_size={self.model.hidden_size} must be a multiple of 16 for "
                "expert_parallel.combine_format='logfmt10', which packs 16 channels together"
            )
        return found

    def validate(self) -> Config:
        """This config, or a UserError that lists every problem."""
        return self._without(self.problems())

    def validate_to_serve(self, redundant_experts: int = 0) -> Config:
        """This config, or a UserError that lists what prefill and decoding could not have."""
        return self._without(self._wrong_fields() or self._not_on_the_mesh(redundant_experts))

    def _without(self, problems: list[str]) -> Config:
        if problems:
            text = "\n  - ".join(problems)
            raise UserError(f"the configuration does not fit together:\n  - {text}")
        return self


def _unknown_choices(group: Any) -> list[str]:
    """What is wrong with fields that have a few choices, which Python does not check."""
    found = []
    for name, hint in typing.get_type_hints(type(group)).items():
        choices = [hint, *typing.get_args(hint)]
        literals = [choice for choice in choices if typing.get_origin(choice) is Literal]
        allowed = [value for literal in literals for value in typing.get_args(literal)]
        value = getattr(group, name, None)
        if allowed and value not in allowed and not (value is None and type(None) in choices):
            found.append(f"{name}={value!r} must be one of {', '.join(map(str, allowed))}")
    return found


def _not_finite(group: Any) -> list[str]:
    """The numbers of a group that are none: NaN passes every comparison."""
    values = vars(group) if dataclasses.is_dataclass(group) else {}
    return [
        f"{name}={value} must be a finite number"
        for name, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]


def to_json(config: Any) -> str:
    """A config as JSON text, the form saved with every run and checkpoint."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def by_name(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested dicts, such as those of `dataclasses.asdict(Config)`."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= by_name(value, f"{prefix}.{name}" if prefix else name)
    return found


def config_from_dict(values: Any, where: str | Path = "the configuration") -> Config:
    """The Config that `dataclasses.asdict` made `values` from, as read back from JSON.

    UserError, which begins with `where`, names a field that is unknown or of another type, and an
    architecture that does not fit together or is larger than any there is.
    """
    config = build(Config, values, where)
    if found := config.model.problems():
        raise UserError(f"{where}: model.{'; model.'.join(found)}")
    return config


def config_of_run(run_dir: Path) -> Config:
    """The Config that a run's config.json holds; UserError as `config_from_dict`, OSError."""
    return config_from_dict(read_config(run_dir), run_dir / "config.json")


def shipped_configs() -> dict[str, Path]:
    """The files of the configs that ship, by name: the repository's, or an installed package's."""
    package = Path(__file__).parents[1]
    folders = [package / "configs", package.parent / "configs"]
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in folders
        for path in sorted([*folder.glob("[a-z]*.py"), *folder.glob("scale/[a-z]*.py")])
    }


def load_config(path: str | Path) -> Config:
    """The Config that the `get_config()` of a Python file returns.

    A bare name, such as "tiny" or "scale/kimi_k2_1024_h200", is that of a config that ships. Raises
    UserError when the file is missing, fails, or returns something else. Source: this project
    (docs/architecture.md); fields are those of Hugging Face's config.json.

    >>> import dsv3_jax as ds
    >>> ds.load_config("tiny").model.n_routed_experts
    8
    """
    path, shipped = Path(path), shipped_configs()
    if not path.is_file() and str(path) in shipped:
        path = shipped[str(path)]
    if not path.is_file():
        raise UserError(
            f"--config {path}: no such file; by name there are {', '.join(sorted(shipped))}"
        )
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
