"""What a training step's compiled program takes on each device, predicted from its config alone.

The same quantities that `compile` reads from the program, so that the two stand side by side:
memory, FLOPs, bytes of the exchange by mesh axis, of gathers of weights and reductions of their
gradients. Of a pipeline's ranks FLOPs and bytes are the mean. Transports other than "padded" have
no exchange here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv3_jax.analysis.activations import (
    BYTES,
    MASTER,
    TILE,
    experts_rows,
    is_tpu,
    tokens_per_micro_batch,
)
from dsv3_jax.analysis.memory import (
    gathered_width,
    of_slices,
    train_micro_batches,
)
from dsv3_jax.analysis.pipeline_program import (
    hand_over_traffic,
    pipelined_memory,
    pipelined_weight_traffic,
    stages_traffic,
)
from dsv3_jax.analysis.training_memory import training_memory
from dsv3_jax.config import Config
from dsv3_jax.config.weights import Weight, weights
from dsv3_jax.parallel.schedules import make_schedule
from dsv3_jax.parallel.ticks import tick_tables

TPU_ATTENTION_TILE = 512  # rows of queries and of keys


@dataclass(frozen=True)
class Prediction:
    """Of one step, on each device; bytes and FLOPs.

    Fields:
        arguments: the state.
        peak: memory, arguments included.
        flops: of all matrix products, those in kernels and those computed twice included.
        exchange: sent by all-to-alls, by mesh axis.
        gathers: sent to gather weights.
        reductions: sent to add up weights' gradients.
        hand_overs: sent to the next ranks of a pipeline.
        stages: sent for a pipeline's ranks to get their layers, and to give gradients back.
    """

    arguments: float
    peak: float
    flops: float
    exchange: dict[str, float]
    gathers: float
    reductions: float
    hand_overs: float = 0.0
    stages: float = 0.0


def predict(config: Config, platform: str | None = None) -> Prediction | None:
    """The prediction for a training step.

    None for LoRA, and for a pipeline whose ranks gather layer by layer (FSDP) or are cut by
    `tensor`, of which no compiled program was compared.

    platform: whose programs, "tpu" or "gpu", or a device by its name in analysis/hardware.py, of
        which "tpu-7x" scatters gradients beside other work; None, as for others: those for GPUs.
    """
    if config.lora.rank:
        return None
    if config.mesh.pipe > 1:
        compared = config.sharding.state != "fsdp" and config.mesh.tensor == 1
        return _of_pipeline(config, platform) if compared else None
    memory = training_memory(config, "1f1b", (1,), platform)
    gathers, reductions = weight_traffic(config)
    return Prediction(
        arguments=memory.optimizer,
        peak=memory.total,
        flops=step_flops(config, platform),
        exchange=exchange_traffic(config),
        gathers=gathers,
        reductions=reductions,
    )


def _of_pipeline(config: Config, platform: str | None) -> Prediction:
    ranks, schedule = config.mesh.pipe, config.pipeline.schedule
    made = make_schedule(schedule, ranks, train_micro_batches(config))
    tables = tick_tables(made, config.pipeline.takes_backward_whole())
    memory = pipelined_memory(config, schedule, (tables.num_saved,) * ranks)
    gathers, reductions = pipelined_weight_traffic(config, schedule)
    return Prediction(
        arguments=memory.optimizer,
        peak=memory.total,
        flops=step_flops(config, platform) / ranks,
        exchange={axes: size / ranks for axes, size in exchange_traffic(config).items()},
        gathers=gathers,
        reductions=reductions,
        hand_overs=hand_over_traffic(config, len(tables.op)),
        stages=stages_traffic(config, schedule),
    )


def step_flops(config: Config, platform: str | None = None) -> float:
    """FLOPs of a device's matrix products in a step, as they run.

    What rematerialisation computes again counts again, and so do rows that fill experts' groups.
    Attention is causal: of the square of scores the kernels compute the lower tiles. On TPUs those
    are larger, and each of two backward kernels makes the scores and their gradient.
    """
    model, mesh, train = config.model, config.mesh, config.train
    tokens = tokens_per_micro_batch(config)
    again = {"none": 0, "dots": 0, "v3": 0, "full": 1}[train.remat]
    every = 0.0  # multiplications of a micro-batch, by all products of one forward pass
    head = last = 0.0
    wide = 0.0  # those of MLA's up-projections, which "v3" computes again
    here = model.n_routed_experts / (mesh.node * mesh.local)
    rows = experts_rows(config, tokens, here)
    for row in weights(model):
        if not row.is_matrix or row.part == "embedding":
            continue
        count = sum(row.count(model))
        size = row.size(model)
        if row.part == "head":
            head += (1 + model.num_nextn_predict_layers) * tokens * size / mesh.tensor
            continue
        if row.of_expert:
            every += count * rows * size / model.n_routed_experts / mesh.tensor
            continue
        cut = mesh.tensor if row.cut else 1
        every += count * tokens * size / cut
        if row.name == "down_proj":  # what a layer's last product returns, no gradient needs
            last += row.count(model)[0] * tokens * size / cut
        if row.part == "attention" and row.name in ("q_b_proj", "kv_b_proj"):
            wide += count * tokens * size / cut
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    qk, v = model.qk_head_dim, model.v_head_dim
    tile, backward = TILE, 3 * qk + 2 * v
    if is_tpu(platform):
        tile, backward = min(TPU_ATTENTION_TILE, train.seq_len), 4 * qk + 3 * v
    scores = tokens * train.seq_len / 2 * (1 + tile / train.seq_len)
    scores *= layers * model.num_attention_heads / mesh.tensor
    core = scores * ((1 + again) * (qk + v) + backward)
    experts = 3 * model.hidden_size * model.moe_intermediate_size / mesh.tensor
    every_again = _made_in_loop(config) * rows * experts
    products = every_again + (
        (3 + again) * every - again * last + 3 * head + (wide if train.remat == "v3" else 0.0)
    )
    return 2 * (products + core) * train_micro_batches(config)


def _made_in_loop(config: Config) -> int:
    """MoE layers whose exchange the backward pass runs forward once more, as it stands in a loop.

    Of layers computed again whole, that is the time they are: but not of MTP modules, whose result
    the backward pass reads.
    """
    model = config.model
    if config.expert_parallel.overflow != "loop":
        return 0
    again = model.num_moe_layers if config.train.remat != "full" else 0
    return again + model.num_nextn_predict_layers


def exchange_traffic(config: Config) -> dict[str, float]:
    """Bytes that a device sends in all-to-alls of a step, by mesh axis; {} where none run.

    Each layer dispatches in the forward pass, again when it is computed again, and (the gradient of
    combining) in the backward pass; it combines forward and backward. Ids, weights and their
    gradients travel with the rows (parallel/wire.py).
    """
    model, mesh, expert = config.model, config.mesh, config.expert_parallel
    axes = {axis: size for axis in ("node", "local") if (size := getattr(mesh, axis)) > 1}
    if not axes or expert.transport not in ("padded", "auto"):
        return {}
    tokens = tokens_per_micro_batch(config) / mesh.tensor
    K, D = model.num_experts_per_tok, model.hidden_size
    plain = BYTES[model.dtype] * D
    formats = {
        "none": plain,
        "bf16": 2 * D,
        "fp8": D + math.ceil(D / TILE),
        "logfmt10": D * 41 / 32,
    }
    sent, back = formats[expert.dispatch_format], formats[expert.combine_format]
    passes = 2 if config.train.remat != "none" else 1
    row = passes * (sent + 6 * K) + sent + back + (back + 4 * K)
    layers = model.num_moe_layers + model.num_nextn_predict_layers
    found: dict[str, float] = {}
    reached = 1
    steps = (
        list(axes.items()) if expert.hierarchical else [("+".join(axes), math.prod(axes.values()))]
    )
    for hop, (name, size) in enumerate(steps):
        reached *= size
        spread = min(K, reached)
        limited = model.topk_method != "greedy" and model.n_group % mesh.node == 0
        if limited and hop == 0 and name == "node":
            spread = min(spread, model.topk_group)
        capacity = math.ceil(expert.capacity_factor * tokens * spread / size)
        if hop == 0:
            capacity = min(capacity, tokens)
        often = train_micro_batches(config) * (size - 1) * capacity
        found[name] = often * (layers * row + _made_in_loop(config) * (sent + 6 * K + back))
    return found


def weight_traffic(config: Config) -> tuple[float, float]:
    """(bytes sent to gather weights, bytes sent to add up gradients) by a device in a step.

    What is gathered was made of slices, in FP8 or the model's dtype: by FSDP in the forward and in
    the backward pass of every micro-batch, the embedding and the head once; by ZeRO-1 once a step.
    Gradients are reduced in f32 where they are made. See `of_slices` for where ZeRO-1 gathers f32;
    it then adds gradients up whole, as replicas do.
    """
    times = train_micro_batches(config)
    state = config.sharding.state
    # An all-reduce sends twice what a reduce-scatter does.
    whole = 1 if of_slices(config) else 2
    gathered = reduced = 0.0
    for row in weights(config.model):
        copies = replicas(config, row)
        if copies == 1 or not row.is_matrix:
            continue
        size = sum(row.count(config.model)) * row.size(config.model)
        size /= (config.mesh.node * config.mesh.local) if row.of_expert else 1
        size /= config.mesh.tensor if row.cut and not row.of_expert else 1
        share = (copies - 1) / copies
        once = row.part in ("embedding", "head")
        often = {"replicated": 0, "zero1": 1, "fsdp": (1 if once else 2) * times}[state]
        width = MASTER if row.part == "router" else gathered_width(config, row.fp8)
        gathered += size * width * share * often
        reduced += size * MASTER * share * whole * times
    return gathered, reduced


def replicas(config: Config, row: Weight) -> int:
    """Devices that compute with the same part of a weight."""
    mesh = config.mesh
    outer = mesh.data * mesh.context
    if row.of_expert:
        return outer * mesh.tensor
    return outer * mesh.node * mesh.local * (1 if row.cut else mesh.tensor)
