"""Bytes per device: weights, gradients, optimizer state, activations and cache under a mesh.

Placement as in docs/design: layers over `pipe`, experts over `node` x `local`, heads and hidden
dims of the dense parts over `tensor`, tokens over everything but `pipe` and `tensor`; master
weights and moments lie as `sharding.state` says. The busiest stage counts. Constants that no config
determines are those of compiled programs (docs/scale.md), each with its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dsv3_jax.analysis.activations import (
    BYTES,
    MASTER,
    uses_fp8,
)
from dsv3_jax.analysis.model_cost import (
    attention_parameters,
    expert_parameters,
    kv_bytes_per_token,
)
from dsv3_jax.config import Config, ModelConfig, ParallelConfig
from dsv3_jax.config.weights import CUT_OVER, weights


def mesh_problems(config: Config, schedule: str) -> list[str]:
    """Each way in which the mesh does not divide the model or the batch, with a fix."""
    model, mesh, train = config.model, config.mesh, config.train
    experts = mesh.node * mesh.local
    found = []
    if not mesh.data:
        found.append("mesh.data=0 takes the devices that are there: say how many, --mesh.data N")
        return found
    if model.n_routed_experts % experts:
        found.append(
            f"mesh.node={mesh.node} x mesh.local={mesh.local} = {experts} must divide "
            f"n_routed_experts={model.n_routed_experts}"
        )
    found += mesh.indivisible(model)
    if train.seq_len % mesh.context:
        found.append(f"mesh.context={mesh.context} must divide train.seq_len={train.seq_len}")
    stages = mesh.pipe * (2 if schedule in ("dualpipev", "interleaved") else 1)
    if stages > model.num_hidden_layers:
        found.append(
            f"mesh.pipe={mesh.pipe} under {schedule} needs {stages} stages, but the model has "
            f"num_hidden_layers={model.num_hidden_layers}"
        )
    count = train.batch_size // config.micro_batch_size
    if mesh.pipe > 1 and schedule == "interleaved" and count % mesh.pipe:
        found.append(
            f"interleaved needs micro-batches in groups of mesh.pipe={mesh.pipe}, but "
            f"train.batch_size / micro_batch_size = {count}"
        )
    if mesh.pipe > 1 and schedule.startswith("dualpipe"):
        if count < 2 * mesh.pipe:
            found.append(
                f"{schedule} needs at least {2 * mesh.pipe} micro-batches for mesh.pipe="
                f"{mesh.pipe}, but train.batch_size / micro_batch_size = {count}"
            )
        elif schedule == "dualpipe" and (mesh.pipe % 2 or count % 2):
            found.append(f"dualpipe needs even mesh.pipe={mesh.pipe} and micro-batches={count}")
    return found


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds, in layers."""

    dense_layers: int
    moe_layers: int
    embedding: bool
    head: bool  # and, with it, the MTP modules

    @property
    def layers(self) -> int:
        """Main-model layers."""
        return self.dense_layers + self.moe_layers


def split_into_stages(model: ModelConfig, stages: int) -> list[Stage]:
    """Contiguous layers for each stage, so that each does about the same FLOPs.

    Head and MTP modules sit on the last stage, which gets fewer layers for it: for V3 on 16 they
    weigh 4.2 of its MoE layers, and the last stage has none of the 61. The embedding is free.
    """
    D, mtp = model.hidden_size, model.num_nextn_predict_layers
    active = model.num_experts_per_tok + model.n_shared_experts
    layer = attention_parameters(model) + active * expert_parameters(model)
    tail = mtp + (1 + mtp) * model.vocab_size * D / layer
    last = model.num_hidden_layers
    if stages > 1:
        last = max(0, round((model.num_hidden_layers + tail) / stages - tail))
    base, extra = divmod(model.num_hidden_layers - last, max(stages - 1, 1))
    counts = [base + (s < extra) for s in range(stages - 1)] + [last]
    made, start = [], 0
    for s, count in enumerate(counts):
        dense = max(0, min(model.num_dense_layers - start, count))
        made.append(Stage(dense, count - dense, s == 0, s == stages - 1))
        start += count
    return made


def stages_of_ranks(model: ModelConfig, ranks: int, schedule: str) -> list[list[Stage]]:
    """The stages each pipeline rank holds: one, or two.

    Those are from opposite ends under DualPipe(V), and `ranks` apart under interleaved 1F1B.
    """
    if ranks > 1 and schedule == "interleaved":
        stages = split_into_stages(model, 2 * ranks)
        return [[stages[rank], stages[ranks + rank]] for rank in range(ranks)]
    if ranks == 1 or not schedule.startswith("dualpipe"):
        return [[stage] for stage in split_into_stages(model, ranks)]
    stages = split_into_stages(model, 2 * ranks if schedule == "dualpipev" else ranks)
    return [[stages[rank], stages[-1 - rank]] for rank in range(ranks)]


@dataclass(frozen=True)
class Shard:
    """Parameters on one device, apart by how many replicas they have."""

    replicated: float  # over data, node, local and context
    expert: float  # over data and context

    def __add__(self, other: Shard) -> Shard:
        return Shard(self.replicated + other.replicated, self.expert + other.expert)

    @property
    def total(self) -> float:
        """All parameters of the device."""
        return self.replicated + self.expert


@lru_cache(maxsize=4096)
def stage_parameters(model: ModelConfig, mesh: ParallelConfig, stage: Stage) -> Shard:
    """Parameters of `stage` on one device, by the table of weights."""
    mtp = model.num_nextn_predict_layers if stage.head else 0
    times = {
        "layer": stage.layers + mtp,
        "dense": stage.dense_layers,
        "moe": stage.moe_layers + mtp,
        "mtp": mtp,
    }
    pieces = {"expert": mesh.node * mesh.local, "": 1}
    made = {True: 0.0, False: 0.0}
    for row in weights(model):
        if row.collection != "params":
            continue
        if row.where == "model":
            count = int(stage.embedding if row.part == "embedding" else stage.head)
        else:
            count = times[row.where]
        over = CUT_OVER.get(row.cut, "")
        made[row.of_expert] += count * row.size(model) / pieces.get(over, mesh.tensor)
    return Shard(made[False], made[True])


def rank_shards(model: ModelConfig, mesh: ParallelConfig, schedule: str) -> list[Shard]:
    """Parameters on one device of each pipeline rank, over all stages that it holds."""
    made = []
    for held in stages_of_ranks(model, mesh.pipe, schedule):
        first, *others = (stage_parameters(model, mesh, stage) for stage in held)
        made.append(sum(others, start=first))
    return made


@dataclass(frozen=True)
class Memory:
    """Bytes on the busiest device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float  # what one layer, or the head, holds while it is worked on
    cache: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def of_slices(config: Config) -> bool:
    """Whether what products read is made of a device's slices of the weights, and then gathered.

    Else ZeRO-1 gathers f32: in pipelines, and in FP8 where `tensor` cuts tiles.
    """
    mesh, state = config.mesh, config.sharding.state
    whole_tiles = mesh.tensor == 1 or not uses_fp8(config)
    return state == "fsdp" or (state == "zero1" and mesh.pipe == 1 and whole_tiles)


def gathered_width(config: Config, fp8: bool) -> int:
    """Bytes of a number that is gathered, of a weight that is multiplied in FP8 or is not.

    Where FSDP's ranks of a pipeline or parts of matrices gather, it is a copy in the model's dtype.
    """
    if not of_slices(config):
        return MASTER
    in_fp8 = fp8 and uses_fp8(config) and config.mesh.pipe == config.mesh.tensor == 1
    return 1 if in_fp8 else BYTES[config.model.dtype]


def copied_width(config: Config) -> int:
    """Bytes of a weight as products read it, where a device has all of its state."""
    return 2 if uses_fp8(config) else BYTES[config.model.dtype]


def train_micro_batches(config: Config) -> int:
    """Forward passes of a full batch."""
    return config.train.batch_size // config.micro_batch_size


def sliced_parameters(config: Config, shard: Shard) -> float:
    """Parameters of which a device holds master weight and moments, by `sharding.state`."""
    return shard.total if config.sharding.state == "replicated" else in_slices(config, shard)


def in_slices(config: Config, shard: Shard) -> float:
    """Of parameters that a rank's devices hold, those in the slice of one device."""
    mesh = config.mesh
    replicas = mesh.data * mesh.context
    return shard.replicated / (replicas * mesh.node * mesh.local) + shard.expert / replicas


def largest_weight(config: Config) -> float:
    """Numbers on one device of the layers' weight that has most of them there."""
    mesh, pieces = config.mesh, {"expert": config.mesh.node * config.mesh.local, "": 1}
    rows = [row for row in weights(config.model) if row.where != "model" and row.is_matrix]
    return max(
        row.size(config.model) / pieces.get(CUT_OVER.get(row.cut, ""), mesh.tensor) for row in rows
    )


def serving_memory(
    config: Config, batch: int, context: int, kv_bytes_per_value: float = 2
) -> Memory:
    """Bytes of decoding `batch` sequences of `context` tokens on each device of the mesh.

    The whole model is spread over `pipe` and the expert axes; the cache is MLA's latent.
    """
    model, mesh = config.model, config.mesh
    stages = split_into_stages(model, mesh.pipe)
    weights = max(stage_parameters(model, mesh, s).total for s in stages)
    cache = batch * context * kv_bytes_per_token(model, kv_bytes_per_value)
    return Memory(
        weights=weights * (1 if uses_fp8(config) else BYTES[model.dtype]),
        gradients=0.0,
        optimizer=0.0,
        activations=0.0,
        working=4.0 * batch * model.vocab_size / mesh.tensor,
        cache=cache / (mesh.pipe * mesh.context),
    )
