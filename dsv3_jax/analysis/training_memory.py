"""Bytes of a training step on the busiest device, at the moment when it holds most.

The state is held throughout; what else is there comes and goes from the head over the layers to the
embedding. Constants that no config determines are those of compiled programs (docs/scale.md).
"""

from __future__ import annotations

from dsv3_jax.analysis.activations import (
    BYTES,
    MASTER,
    layer_bytes,
    logits_bytes,
    scatters_beside_work,
    table_size,
    tokens_per_micro_batch,
    waiting_for_head,
    working_bytes,
    working_bytes_of,
)
from dsv3_jax.analysis.memory import (
    Memory,
    Shard,
    Stage,
    copied_width,
    gathered_width,
    largest_weight,
    rank_shards,
    sliced_parameters,
    stage_parameters,
    stages_of_ranks,
    train_micro_batches,
)
from dsv3_jax.config import Config

# Bytes of an FP8 number that is gathered for a whole step. Of one micro-batch: of some weights, XLA
# for GPUs makes the other orientation once a step as well, which the backward pass reads (V3's
# compiled program). Of several all are turned, once for all their backward passes.
FP8_FOR_STEP, FP8_TURNED = 1.59, 2.0


def training_memory(
    config: Config, schedule: str, in_flight: tuple[int, ...], platform: str | None = None
) -> Memory:
    """Bytes of a training step; `in_flight[rank]` micro-batches are held at once (simulated).

    Master weights (f32) and both moments are whole where the state is replicated, else sliced over
    the replicas. ZeRO-1 gathers what all products read for the step, and has slices of the
    gradients; FSDP has weights of one layer at a time, or the head's, and slices of what it
    gathers. A replicated state needs no copy but that in the dtype it is multiplied in. The head,
    a layer and the embedding are not worked on at the same time: what takes most counts.

    platform: as `prediction.predict` has it.
    """
    model, mesh = config.model, config.mesh
    state = 4 + 2 * BYTES[config.optimizer.moment_dtype]
    worst = None
    held_by_rank = stages_of_ranks(model, mesh.pipe, schedule)
    shards = rank_shards(model, mesh, schedule)
    whole = [sliced_parameters(config, shard) == shard.total for shard in shards]
    if mesh.pipe == train_micro_batches(config) == 1 and whole[0]:
        return _of_one_pass(config, held_by_rank[0][0], state * shards[0].total)
    for rank, (held, shard) in enumerate(zip(held_by_rank, shards)):
        kept = in_flight[rank] * tokens_per_micro_batch(config) * _kept_by(config, held)
        moments = _of_whole_weights if whole[rank] else _of_slices
        optimizer = state * sliced_parameters(config, shard)
        for part in moments(config, held, shard, kept, platform):
            made = Memory(optimizer=optimizer, **part)
            if worst is None or made.total > worst.total:
                worst = made
    assert worst is not None
    return worst


def _kept_by(config: Config, held: list[Stage]) -> float:
    """Bytes of a token that layers keep, of the stage of a rank that keeps most."""
    per_token = max(
        s.dense_layers * layer_bytes(config, moe=False)
        + s.moe_layers * layer_bytes(config, moe=True)
        for s in held
    )
    mtp = config.model.num_nextn_predict_layers if any(s.head for s in held) else 0
    return per_token + mtp * layer_bytes(config, moe=True)


def _of_whole_weights(
    config: Config, held: list[Stage], shard: Shard, kept: float, platform: str | None
) -> list[dict[str, float]]:
    """What is held beside the state where a device has all of it, in the head or in a layer."""
    tokens = tokens_per_micro_batch(config)
    in_head = logits_bytes(config, tokens) * any(s.head for s in held)
    moment = {
        "weights": shard.total * copied_width(config),
        "gradients": MASTER * shard.total,
        "activations": kept,
        "working": max(in_head, tokens * working_bytes(config, platform)),
    }
    return [moment]


def _of_slices(
    config: Config, held: list[Stage], shard: Shard, kept: float, platform: str | None
) -> list[dict[str, float]]:
    """What is held beside the state's slices: in a layer, MTP, the head, the embedding.

    Sums of gradients over micro-batches are there in all of them, what one micro-batch adds from
    the layers on. A table's gradient is whole, in f32, until it is scattered: the embedding's once
    for each look-up, and the head's with them where XLA scatters beside work.
    """
    mesh, tokens, times = config.mesh, tokens_per_micro_batch(config), train_micro_batches(config)
    sliced, table = sliced_parameters(config, shard), table_size(config)
    embedding, head = any(s.embedding for s in held), any(s.head for s in held)
    tables, plain = table * sum(s.embedding + s.head for s in held), gathered_width(config, False)
    copy, fsdp = gathered_width(config, True), config.sharding.state == "fsdp"
    if config.sharding.state == "zero1" and copy == 1:
        copy = FP8_FOR_STEP if times == 1 else FP8_TURNED
    once = copy * (shard.total - tables) + plain * tables
    weights = once * sliced / shard.total if fsdp else once
    own = MASTER * sliced
    sums = own if mesh.pipe > 1 or times > 1 else 0.0
    full = sums if mesh.pipe > 1 else sums + own
    mtp = head and config.model.num_nextn_predict_layers > 0

    def moment(gradients: float, activations: float, working: float) -> dict[str, float]:
        found = {"weights": weights, "gradients": gradients, "activations": activations}
        return found | {"working": working}

    # A weight's gradient, whole, and a copy of it in the order that is scattered.
    of_weight = 2 * MASTER * largest_weight(config)
    in_layer = of_weight + tokens * working_bytes(config, platform)
    found = [moment(full, kept, in_layer + waiting_for_head(config, platform, False) * head)]
    if mtp:
        in_mtp = of_weight + tokens * working_bytes_of(config, True, platform, in_halves=False)
        found.append(moment(sums, kept, in_mtp + waiting_for_head(config, platform, True)))
    if head:
        in_head = plain * table * fsdp + logits_bytes(config, tokens) + MASTER * table
        found.append(moment(sums, kept, in_head))
    if embedding:
        number = 1 + mtp + (head and scatters_beside_work(platform))
        found.append(moment(full, 0.0, MASTER * table * number))
    return found


def _of_one_pass(config: Config, stage: Stage, optimizer: float) -> Memory:
    """Of a step of one micro-batch whose gradients are whole, where the backward pass holds most.

    From the head to the embedding gradients come, and what a layer kept goes, with its weights in
    the dtype that they are multiplied in.
    """
    model, tokens = config.model, tokens_per_micro_batch(config)
    mtp = model.num_nextn_predict_layers
    head = max(logits_bytes(config, tokens), tokens * working_bytes_of(config, True) * (mtp > 0))
    parts = [(Stage(0, 0, False, True), mtp * layer_bytes(config, True), head)]
    for moe, count in ((True, stage.moe_layers), (False, stage.dense_layers)):
        layer = Stage(int(not moe), int(moe), False, False)
        working = tokens * working_bytes_of(config, moe)
        parts += [(layer, layer_bytes(config, moe), working)] * count
    parts.append((Stage(0, 0, True, False), 0.0, 0.0))
    sizes = [stage_parameters(model, config.mesh, part).total for part, _, _ in parts]
    moments = [
        Memory(
            weights=copied_width(config) * sum(sizes[n:]),
            gradients=MASTER * sum(sizes[: n + 1]),
            optimizer=optimizer,
            activations=tokens * sum(kept for _, kept, _ in parts[n + 1 :]),
            working=max(working, tokens * own),  # what it kept is some of that
        )
        for n, (_, own, working) in enumerate(parts)
    ]
    return max(moments, key=lambda moment: moment.total)
