"""Time of a training step: a roofline for each layer, a wire, and the pipeline simulated.

Every matmul runs at a fraction of the peak, everything else at a fraction of the memory bandwidth,
every exchange at the achievable rate of the network it crosses. Those fractions are `Efficiency`:
the default is what public kernels reach alone, so it bounds a step from below; `calibrate` replaces
it by what your machine did. Kernel launches, stragglers and the data pipeline are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_jax.analysis import latency, pipeline_cost
from dsv3_jax.analysis.activations import tokens_per_micro_batch, uses_fp8
from dsv3_jax.analysis.hardware import Accelerator
from dsv3_jax.analysis.memory import (
    Memory,
    Stage,
    gathered_width,
    mesh_problems,
    rank_shards,
    stage_parameters,
    stages_of_ranks,
    train_micro_batches,
)
from dsv3_jax.analysis.model_cost import (
    attention_core_flops,
    attention_parameters,
    expected_groups_hit,
    expert_parameters,
    training_flops_per_token,
)
from dsv3_jax.analysis.pipeline_program import pipelined_memory
from dsv3_jax.analysis.stage_times import StageTimes, mean_of_stages
from dsv3_jax.analysis.training_memory import training_memory
from dsv3_jax.config import Config, ModelConfig, ParallelConfig, UserError


@dataclass(frozen=True)
class Efficiency:
    """Fractions of peak that compute and memory reach; networks have theirs in `Accelerator`."""

    matmul: float = 0.65
    attention: float = 0.6
    memory: float = 0.8
    # Of the compute units, taken by all-to-all kernels while experts are on several devices: 20 of
    # 132 SMs (V3 report, section 3.2.2).
    exchange_units: float = 20 / 132
    source: str = (
        "assumed, after public kernels alone: DeepGEMM about 1,300 of 1,979 FP8 TFLOPS, "
        "FlashAttention-3 about 600 of 989 BF16, memory copies about 80 %"
    )

    def scaled(self, factor: float, source: str) -> Efficiency:
        """The fractions of peak times `factor`, at most 1 each."""
        matmul, attention, memory = (
            min(1.0, factor * v) for v in (self.matmul, self.attention, self.memory)
        )
        return Efficiency(matmul, attention, memory, self.exchange_units, source)


DEFAULT_EFFICIENCY = Efficiency()


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one micro-batch in one layer's forward on a device."""

    matmul: float
    attention: float
    elementwise: float
    experts: float  # dispatch and combine on the wire
    others: float  # tensor and context parallelism on the wire
    up_projections: float  # the part of matmul from latents to heads

    @property
    def compute(self) -> float:
        """What keeps the compute units busy."""
        return self.matmul + self.attention + self.elementwise

    @property
    def wire(self) -> float:
        """What keeps the networks busy."""
        return self.experts + self.others


@dataclass(frozen=True)
class StepEstimate:
    """A training step: seconds, `parts` of the busiest rank; bytes; dollars (docs/codesign.md)."""

    seconds: float
    parts: dict[str, float]
    tokens_per_second: float
    flops_per_token: float
    mfu: float  # causal, against the BF16 peak, MTP's FLOPs left out: as the paper counts
    memory: Memory
    devices: int
    dollars_per_million_tokens: float | None
    # Seconds where ranks meet after each F, I and W, as in this project's executor; None without a
    # pipeline, for dualpipe, which it does not run, and by the formulas.
    in_ticks: float | None = None

    @property
    def bottleneck(self) -> str:
        """The largest part of the step."""
        return max(self.parts, key=lambda name: self.parts[name])


def node_copies(model: ModelConfig, nodes: int) -> float:
    """Mean number of *other* nodes a token goes to under the model's routing, uniform experts."""
    limited = model.topk_method != "greedy" and model.n_group > 1
    limit = model.topk_group if limited and model.n_group == nodes else None
    hit = expected_groups_hit(model.n_routed_experts, nodes, model.num_experts_per_tok, limit)
    if limited:
        hit = min(hit, float(model.topk_group))
    return hit * (nodes - 1) / nodes


def exchange_seconds(
    model: ModelConfig,
    mesh: ParallelConfig,
    device: Accelerator,
    tokens: float,
    dispatch_bytes: float,
    combine_bytes: float,
) -> float:
    """One dispatch and one combine of a MoE layer; bytes are of one token.

    Hierarchical: once to each node over scale-out, then to each GPU over scale-up, both at the same
    time on their own wires, so the slower one counts. A mesh within one scale-up domain has no
    first hop.
    """
    ranks = mesh.node * mesh.local
    if ranks == 1:
        return 0.0
    row = tokens * (dispatch_bytes + combine_bytes)
    copies = expected_groups_hit(model.n_routed_experts, ranks, model.num_experts_per_tok)
    if not leaves_domain(mesh, device) or mesh.node == 1:
        within = row * copies * (ranks - 1) / ranks / device.bandwidth(scale_out=False)
        return within + 2 * latency.NVLINK_SECONDS
    across = row * node_copies(model, mesh.node) / device.bandwidth(scale_out=True)
    within = row * copies * (mesh.local - 1) / mesh.local / device.bandwidth(scale_out=False)
    return max(across, within) + 2 * latency.INFINIBAND.over(3)


def leaves_domain(mesh: ParallelConfig, device: Accelerator) -> bool:
    """Whether the mesh is larger than one scale-up domain, so that some axes use scale-out."""
    return mesh.num_devices > device.scale_up_domain


def layer_times(
    config: Config, device: Accelerator, efficiency: Efficiency, moe: bool
) -> LayerTimes:
    """Forward times of one layer for one micro-batch on one device."""
    model, mesh, fp8 = config.model, config.mesh, uses_fp8(config)
    tokens = tokens_per_micro_batch(config)
    D, F = model.hidden_size, model.moe_intermediate_size
    active = model.num_experts_per_tok + model.n_shared_experts
    ffn = active * expert_parameters(model) if moe else 3 * D * model.intermediate_size
    weights = (attention_parameters(model) + ffn) / mesh.tensor
    stage = Stage(0, 1, False, False) if moe else Stage(1, 0, False, False)
    resident = stage_parameters(model, mesh, stage).total * (1 if fp8 else 2)
    memory_rate = device.hbm_bandwidth * efficiency.memory
    units = 1 - efficiency.exchange_units if mesh.node * mesh.local > 1 else 1.0
    # A matmul over few tokens is bound by reading its weights.
    rate = device.peak_flops(fp8) * efficiency.matmul * units
    matmul = max(2 * tokens * weights / rate, resident / memory_rate)
    core = attention_core_flops(model, config.train.seq_len) * tokens / mesh.tensor
    attention = core / (device.bf16_flops * efficiency.attention * units)
    # Norms, rotations, SwiGLU, residuals, casts and, with experts, permutations: each value read
    # once and written once in BF16.
    values = 8 * D + 3 * model.num_attention_heads * model.qk_head_dim / mesh.tensor
    values += (
        active * (2 * D + 3 * F / mesh.tensor) if moe else 3 * model.intermediate_size / mesh.tensor
    )
    elementwise = 2 * 2 * tokens * values / memory_rate
    experts = 0.0
    if moe:
        sent = latency.fp8_message_bytes(D) if fp8 else 2 * D
        experts = exchange_seconds(model, mesh, device, tokens, sent, 2 * D)
    others, link = 0.0, device.bandwidth(scale_out=False)
    if mesh.tensor > 1:  # two all-reduces of the residual stream
        others += 2 * 2 * (mesh.tensor - 1) / mesh.tensor * tokens * D * 2 / link
    if mesh.context > 1:  # every shard's latent goes round
        latent = 2 * (model.kv_lora_rank + model.qk_rope_head_dim)
        others += (mesh.context - 1) * tokens * latent / link
    per_head = (model.q_lora_rank or 0) * model.qk_head_dim
    per_head += model.kv_lora_rank * (model.qk_nope_head_dim + model.v_head_dim)
    up = matmul * per_head * model.num_attention_heads / mesh.tensor / weights
    return LayerTimes(matmul, attention, elementwise, experts, others, up)


def stage_times(
    config: Config, device: Accelerator, efficiency: Efficiency, stage: Stage
) -> StageTimes:
    """Times of `stage`: its layers, and head and MTP where it holds them.

    A matmul's input and weight gradients cost its forward each; attention's backward recomputes the
    scores, five matmuls for two; elementwise work doubles. remat "dots" repeats the elementwise
    forward, "v3" MLA's up-projections and the dispatch as well (taken for half of the exchange),
    "full" everything, the exchange included.
    """
    model, train = config.model, config.train
    dense = layer_times(config, device, efficiency, moe=False)
    moe = layer_times(config, device, efficiency, moe=True)
    mtp = model.num_nextn_predict_layers if stage.head else 0
    layers = [(stage.dense_layers, dense), (stage.moe_layers + mtp, moe)]

    def total(part: str) -> float:
        return sum(count * getattr(layer, part) for count, layer in layers)

    tokens = tokens_per_micro_batch(config)
    logits = 2 * tokens * model.hidden_size * model.vocab_size / config.mesh.tensor
    logits_seconds = logits / (device.bf16_flops * efficiency.matmul)
    matmul = total("matmul") + (1 + mtp) * logits_seconds * stage.head
    attention, elementwise, wire = total("attention"), total("elementwise"), total("wire")
    forward = total("compute")
    v3 = elementwise + total("up_projections")
    again = {"none": 0.0, "dots": elementwise, "v3": v3, "full": forward}[train.remat]
    again_wire = {"full": wire, "v3": total("experts") / 2}.get(train.remat, 0.0)
    parts = {
        "matmul": 3 * matmul,
        "attention": 3.5 * attention,
        "elementwise": 3 * elementwise,
        "recomputation": again,
    }
    everything = sum(parts.values())
    return StageTimes(
        compute={
            "F": matmul + attention + elementwise,
            "I": matmul + 2.5 * attention + 2 * elementwise + again,
            "W": matmul,
        },
        wire={"F": wire, "I": wire + again_wire, "W": 0.0},
        shares={name: value / everything for name, value in parts.items()},
    )


def estimate_step(
    config: Config,
    device: Accelerator,
    schedule: str = "1f1b",
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
    simulated: bool = True,
) -> StepEstimate:
    """The training step of `config` on `device`s laid out by config.mesh.

    Every rank is as slow as the slowest, with the mean of its two stages where it holds two.
    DualPipe and DualPipeV hide the wire of a pair's two micro-batches behind their compute, the
    other schedules expose it. UserError lists every way in which mesh, model and network do not
    fit. Memory is reported, not enforced. Without `simulated` the pipeline is the published
    formulas, a hundred times faster and within a few per cent: for searches. Source: ISCA paper,
    table 2 and section 2.3.2; constants as `efficiency.source` says.

    >>> import dsv3_jax as ds
    >>> v3 = ds.load_config("scale/deepseek_v3_2048_h200")
    >>> ds.estimate(v3, ds.accelerator("h200"), simulated=False).devices
    2048
    """
    problems = mesh_problems(config, schedule) + _network_problems(config.mesh, device)
    if problems:
        raise UserError("mesh and model do not fit:\n  - " + "\n  - ".join(problems))
    model, mesh, train = config.model, config.mesh, config.train
    ranks = stages_of_ranks(model, mesh.pipe, schedule)
    each = {s: stage_times(config, device, efficiency, s) for held in ranks for s in held}
    times = max(
        (mean_of_stages([each[s] for s in held]) for held in ranks),
        key=lambda t: sum(t.compute.values()) + sum(t.wire.values()),
    )
    transfer = 0.0
    if mesh.pipe > 1:
        sent = 2 * tokens_per_micro_batch(config) * model.hidden_size / mesh.tensor
        transfer = sent / device.bandwidth(leaves_domain(mesh, device))
    paired = schedule.startswith("dualpipe") and mesh.pipe > 1
    count = train.batch_size // config.micro_batch_size
    run = pipeline_cost.run if simulated else pipeline_cost.from_formulas
    pipeline = run(
        schedule if mesh.pipe > 1 else "1f1b", mesh.pipe, count, times.durations(paired, transfer)
    )

    compute, wire = sum(times.compute.values()), sum(times.wire.values())
    busy_compute = pipeline.pairs * compute
    busy_compute += sum(n * times.compute[op] for op, n in pipeline.alone.items())
    exposed = pipeline.pairs * (max(0.0, wire - compute) if paired else wire)
    exposed += sum(n * times.wire[op] for op, n in pipeline.alone.items())
    parts = {name: busy_compute * share for name, share in times.shares.items()}
    parts["exchange on the wire"] = exposed
    parts["pipeline bubble"] = pipeline.bubble
    needs = pipelined_memory if mesh.pipe > 1 else training_memory
    memory = needs(config, schedule, pipeline.peak_activations)
    parts |= _optimizer_parts(config, device, efficiency, schedule, memory, busy_compute)
    seconds, in_ticks = sum(parts.values()), None
    if simulated and mesh.pipe > 1 and schedule != "dualpipe":
        durations = times.durations(False, transfer)
        in_ticks = seconds - busy_compute - exposed - pipeline.bubble
        whole = config.pipeline.takes_backward_whole(schedule)
        in_ticks += pipeline_cost.seconds_in_ticks(schedule, mesh.pipe, count, durations, whole)

    rate = train.batch_size * train.seq_len / seconds
    flops = training_flops_per_token(model, train.seq_len)
    price = device.price_per_hour
    dollars = None if price is None else price * mesh.num_devices / 3600 / rate * 1e6
    used = latency.mfu(rate, flops, mesh.num_devices, device.bf16_flops)
    return StepEstimate(
        seconds, parts, rate, flops, used, memory, mesh.num_devices, dollars, in_ticks
    )


def _network_problems(mesh: ParallelConfig, device: Accelerator) -> list[str]:
    """Axes that need scale-up bandwidth but do not fit a domain, and networks without a number."""
    inner = mesh.local * mesh.context * mesh.tensor
    found = []
    if inner > device.scale_up_domain:
        found.append(
            f"mesh.local x mesh.context x mesh.tensor = {inner} exceeds the "
            f"{device.scale_up_domain} devices of {device.name}'s scale-up domain: use mesh.node "
            "for the rest"
        )
    if leaves_domain(mesh, device) and device.scale_out_bandwidth is None:
        found.append(
            f"{mesh.num_devices} devices leave {device.name}'s scale-up domain of "
            f"{device.scale_up_domain}, and its scale_out_bandwidth has no source: describe it in "
            "a JSON file"
        )
    return found


def _optimizer_parts(
    config: Config,
    device: Accelerator,
    efficiency: Efficiency,
    schedule: str,
    memory: Memory,
    compute: float,
) -> dict[str, float]:
    """Weights and gradients between replicas, and the AdamW update.

    FSDP's run beside compute: what takes longer than `compute`, in seconds, is left.
    """
    exposed = weights_on_the_wire(config, device, schedule)
    if config.sharding.state == "fsdp":
        exposed = max(0.0, exposed - compute)
    # Gradients' shares and states are read once, states written once, and the weights.
    touched = 3 * memory.optimizer + memory.weights
    update = touched / (device.hbm_bandwidth * efficiency.memory)
    return {"weights and gradients on the wire": exposed, "optimizer": update}


def weights_on_the_wire(config: Config, device: Accelerator, schedule: str = "1f1b") -> float:
    """Seconds that weights and their gradients travel between replicas in a step.

    ZeRO-1 gathers weights and reduces gradients once a step, without a pipeline the latter in every
    micro-batch; FSDP gathers each layer twice a micro-batch. Both in FP8 or the model's dtype.
    Gradients are f32. Hierarchical: replicas of one scale-up domain first, then, on a share of the
    bytes as small as there are of those, the domains among each other.
    """
    mesh, state = config.mesh, config.sharding.state
    out = leaves_domain(mesh, device)
    up = device.bandwidth(scale_out=False)
    times = 1 if mesh.pipe > 1 else train_micro_batches(config)
    # Bytes a parameter; an all-reduce is a reduction and a gather.
    copy = gathered_width(config, fp8=True)
    width = 4 * times + {"replicated": 4 * times, "zero1": copy, "fsdp": 2 * copy * times}[state]

    def between(parameters: float, inner: int, outer: int) -> float:
        if not out:
            inner, outer = inner * outer, 1
        seconds = parameters * width * (inner - 1) / inner / up
        if outer > 1:
            moved = parameters * width / inner * (outer - 1) / outer
            seconds += moved / device.bandwidth(scale_out=True)
        return seconds

    return max(
        between(shard.replicated, mesh.local * mesh.context, mesh.data * mesh.node)
        + between(shard.expert, mesh.context, mesh.data)
        for shard in rank_shards(config.model, mesh, schedule)
    )
