"""What a pipelined step's program holds and sends on a device, from the config alone.

All ranks run one program (parallel/pipeline.py): each has room for the most layers of a kind that
any stage has, for as many micro-batches as the fullest rank holds, and for both ends of the model.
Numbers of a step are the mean of the ranks, which take different parts of it. Of states that
`sharding.state` replicates or slices by ZeRO-1; where layers are gathered one by one (FSDP), or cut
by `tensor`, no compiled program was compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_jax.analysis.activations import (
    BYTES,
    MASTER,
    layer_bytes,
    logits_bytes,
    tokens_per_micro_batch,
    working_bytes,
)
from dsv3_jax.analysis.memory import (
    Memory,
    Shard,
    Stage,
    in_slices,
    largest_weight,
    split_into_stages,
    stage_parameters,
    train_micro_batches,
)
from dsv3_jax.analysis.pending import pending_bytes
from dsv3_jax.config import Config
from dsv3_jax.config.mesh import APART
from dsv3_jax.config.weights import weights

MAIL = 4  # messages that wait to be read; 3 and 4 in the compiled programs


@dataclass(frozen=True)
class Slots:
    """Layers of each kind that a rank has room for, in each of its stages."""

    stages: int
    dense: int
    moe: int


def slots_of(config: Config, schedule: str) -> Slots:
    """The room of every rank under a schedule."""
    each = 2 if schedule in ("dualpipe", "dualpipev", "interleaved") else 1
    count = config.mesh.pipe * (1 if schedule == "dualpipe" else each)
    stages = split_into_stages(config.model, count)
    return Slots(each, max(s.dense_layers for s in stages), max(s.moe_layers for s in stages))


def held_parameters(config: Config, schedule: str) -> tuple[Shard, Shard]:
    """Parameters on a device while ranks work: of the stages' slots, and of both ends with MTP."""
    model, mesh, slots = config.model, config.mesh, slots_of(config, schedule)
    stage = stage_parameters(model, mesh, Stage(slots.dense, slots.moe, False, False))
    layers = Shard(slots.stages * stage.replicated, slots.stages * stage.expert)
    return layers, stage_parameters(model, mesh, Stage(0, 0, True, True))


def pipelined_memory(config: Config, schedule: str, in_flight: tuple[int, ...]) -> Memory:
    """Bytes of a pipelined training step; `in_flight[rank]` micro-batches are held at once.

    Weights are whole, in f32, on the devices of their rank, and gradients in the slices that a
    device applies, or whole where `tensor` cuts them. FSDP has slices of weights, and of whole ones
    a layer's in the model's dtype.
    """
    model, mesh = config.model, config.mesh
    layers, ends = held_parameters(config, schedule)
    held, slots = layers + ends, slots_of(config, schedule)
    tokens, width = tokens_per_micro_batch(config), BYTES[model.dtype]
    saved = pending = of_layer = 0.0
    for moe, count in ((False, slots.dense), (True, slots.moe)):
        saved += count * layer_bytes(config, moe)
        left = pending_bytes(config, schedule, moe)
        pending += count * left
        of_layer = max(of_layer, left * bool(count))
    waiting = mesh.pipe if schedule in APART else 1  # for as many acts as there are ranks
    message = width * model.hidden_size
    table = model.vocab_size * model.hidden_size / mesh.tensor
    # The head's gradient, and the embedding's where MTP looks up in it.
    tables = 1 + (model.num_nextn_predict_layers > 0)
    in_head = logits_bytes(config, tokens) + tables * MASTER * table
    in_layer = 2 * MASTER * largest_weight(config)
    in_layer += tokens * working_bytes(config)
    if mesh.node * mesh.local > 1 and config.pipeline.takes_experts_apart(schedule):
        # A further round works beside what the first has left for W, which is put away and read.
        in_layer += tokens * (working_bytes(config) + 2 * of_layer)
        in_layer += MASTER * stage_parameters(model, mesh, Stage(0, 1, False, False)).expert
    state = MASTER + 2 * BYTES[config.optimizer.moment_dtype]
    whole = mesh.tensor > 1 or config.sharding.state == "replicated"
    weights_held = MASTER * held.total
    if config.sharding.state == "fsdp":
        layer = stage_parameters(model, mesh, Stage(0, 1, False, False))
        weights_held = MASTER * in_slices(config, held) + width * layer.total
    return Memory(
        weights=weights_held,
        gradients=MASTER * (held.total if whole else in_slices(config, held)),
        optimizer=state * _of_state(config, stage_parameters(model, mesh, _all_layers(config))),
        activations=tokens * (max(in_flight) * saved + waiting * pending + MAIL * message),
        working=max(in_head, in_layer),
    )


def _of_state(config: Config, every: Shard) -> float:
    """Parameters of which a device holds master weight and moments: slices lie over `pipe`, too."""
    if config.sharding.state == "replicated":
        return every.total
    return in_slices(config, every) / config.mesh.pipe


def hand_over_traffic(config: Config, ticks: int) -> float:
    """Bytes that a device sends to the next ranks, after each tick, in both directions of a ring.

    Of two ranks both directions are one.
    """
    message = BYTES[config.model.dtype] * tokens_per_micro_batch(config) * config.model.hidden_size
    return ticks * message * (1 if config.mesh.pipe == 2 else 2)


def stages_traffic(config: Config, schedule: str) -> float:
    """Bytes that a device sends over `pipe` for stages to get layers, and to give gradients back.

    Each sends its slice of every rank's slots, those without a layer included.
    """
    layers, _ = held_parameters(config, schedule)
    return 2 * MASTER * in_slices(config, layers) * (config.mesh.pipe - 1) / config.mesh.pipe


def pipelined_weight_traffic(config: Config, schedule: str) -> tuple[float, float]:
    """(bytes sent to gather weights, bytes sent to add up gradients) by a device in a step.

    f32 is gathered once a step, on each rank that of all its slots and of both ends. Gradients are
    scattered where they are made, in each micro-batch: of the embedding, twice where MTP looks up
    in it as well. XLA adds up a weight whole, and then cuts it, which is twice the bytes, where the
    slices are cut from more than one of its dims.
    """
    model, mesh = config.model, config.mesh
    layers, ends = held_parameters(config, schedule)
    gathered = layers.total - in_slices(config, layers)
    gathered += ends.total - in_slices(config, ends) / mesh.pipe
    every = stage_parameters(model, mesh, _all_layers(config))
    reduced = every.total - in_slices(config, every)
    devices = mesh.data * mesh.context * mesh.node * mesh.local
    for row in weights(model):
        if not row.is_matrix or row.of_expert or row.copy:
            continue
        whole = int(_cut_dims(config, row.dims_of(model)) > 1)
        looked_up = row.part == "embedding" and model.num_nextn_predict_layers > 0
        times = (whole + looked_up) * sum(row.count(model))
        reduced += times * row.size(model) * (devices - 1) / devices
    return MASTER * gathered, MASTER * reduced * train_micro_batches(config) / mesh.pipe


def _all_layers(config: Config) -> Stage:
    model = config.model
    return Stage(model.num_dense_layers, model.num_moe_layers, True, True)


def _cut_dims(config: Config, dims: tuple[int, ...]) -> int:
    """Dims that the slices of a rank's devices are cut from (`Layout.stored_spec`)."""
    mesh, cut = config.mesh, [1] * len(dims)
    for size in (mesh.data, mesh.node, mesh.local, mesh.context):
        fits = (d for d, of_dim in enumerate(dims) if of_dim % (cut[d] * size) == 0)
        if (dim := next(fits, None)) is not None:
            cut[dim] *= size
    return sum(size > 1 for size in cut)
