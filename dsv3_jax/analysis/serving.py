"""Decoding: time per output token from weights and cache read, matmuls, and the expert exchange.

Attention is data-parallel and its latent cache stays on its device; experts are spread over the
mesh's `node` x `local` devices, as DeepSeek serves V3 (report, section 3.4.2). Two micro-batches
overlap: one computes while the other is on the wire (ISCA paper, section 2.3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_jax.analysis import latency
from dsv3_jax.analysis.activations import uses_fp8
from dsv3_jax.analysis.estimate import DEFAULT_EFFICIENCY, Efficiency, leaves_domain
from dsv3_jax.analysis.hardware import Accelerator
from dsv3_jax.analysis.memory import Memory, mesh_problems, serving_memory
from dsv3_jax.analysis.model_cost import (
    attention_parameters,
    expected_groups_hit,
    expert_parameters,
    kv_bytes_per_token,
    kv_values_per_token,
)
from dsv3_jax.config import Config, UserError


@dataclass(frozen=True)
class DecodeEstimate:
    """One decode step of `batch` requests a device; `parts` add up to `tpot` seconds."""

    tpot: float
    parts: dict[str, float]
    tokens_per_second: float  # of the whole mesh
    tokens_per_second_per_request: float
    kv_bytes_per_token: float
    memory: Memory
    devices: int
    dollars_per_million_tokens: float | None

    @property
    def bottleneck(self) -> str:
        """The largest part of the step."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class Wire:
    """How tokens travel between experts' devices; what-ifs change one field at a time."""

    dispatch_bytes: float | None = None  # of one token; None: FP8 message, or BF16 without FP8
    combine_bytes: float | None = None  # None: BF16
    network: latency.NetworkLatency = latency.INFINIBAND
    switches: int = 3


def exchange_seconds(
    config: Config, device: Accelerator, tokens: float, wire: Wire = Wire()
) -> float:
    """Dispatch and combine of `tokens` tokens a device, each straight to the devices it needs.

    As the low-latency kernels: a copy for each distinct device, those of the own node over
    scale-up, the others over scale-out, at the same time.
    """
    model, mesh = config.model, config.mesh
    ranks = mesh.node * mesh.local
    if ranks == 1:
        return 0.0
    D = model.hidden_size
    sent = latency.fp8_message_bytes(D) if uses_fp8(config) else 2 * D
    row = (wire.dispatch_bytes or sent) + (wire.combine_bytes or 2 * D)
    copies = expected_groups_hit(model.n_routed_experts, ranks, model.num_experts_per_tok)
    if not leaves_domain(mesh, device) or mesh.node == 1:
        within = tokens * copies * (ranks - 1) / ranks * row / device.bandwidth(scale_out=False)
        return within + 2 * latency.NVLINK_SECONDS
    across = tokens * copies * (mesh.node - 1) / mesh.node * row / device.bandwidth(scale_out=True)
    within = tokens * copies * (mesh.local - 1) / ranks * row / device.bandwidth(scale_out=False)
    return max(across, within) + 2 * wire.network.over(wire.switches)


def decode_parts(
    config: Config, device: Accelerator, batch: float, context: int, efficiency: Efficiency
) -> dict[str, float]:
    """Compute seconds of one MoE layer for `batch` tokens on a device: attention, cache, experts.

    A matmul takes the longer of its FLOPs and of reading its weights. Absorbed attention reads the
    latent once for all heads and does 2 N (2C + R) FLOPs a cached token.
    """
    model, mesh, fp8 = config.model, config.mesh, uses_fp8(config)
    width = 1 if fp8 else 2
    memory_rate = device.hbm_bandwidth * efficiency.memory
    flops_rate = device.peak_flops(fp8) * efficiency.matmul

    def matmul(weights: float, tokens: float, read: float) -> float:
        return max(2 * weights * tokens / flops_rate, read * width / memory_rate)

    attention = attention_parameters(model) / mesh.tensor
    expert = expert_parameters(model)
    ranks = mesh.node * mesh.local
    held = model.n_routed_experts / ranks
    # An expert's weights are read if any token of the whole expert group chose it.
    idle = (1 - model.num_experts_per_tok / model.n_routed_experts) ** (batch * ranks)
    routed = matmul(model.num_experts_per_tok * expert, batch, held * (1 - idle) * expert)
    shared = model.n_shared_experts * expert / mesh.tensor
    latent = model.kv_lora_rank + model.qk_rope_head_dim
    heads = model.num_attention_heads / mesh.tensor
    core = 2 * heads * (latent + model.kv_lora_rank) * context * batch / mesh.context
    cache = batch * context / mesh.context * kv_values_per_token(model) * 2
    return {
        "attention weights": matmul(attention, batch, attention),
        "cache": max(core / (device.bf16_flops * efficiency.attention), cache / memory_rate),
        "experts": routed + matmul(shared, batch, shared),
    }


def estimate_decode(
    config: Config,
    device: Accelerator,
    batch: int,
    context: int,
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
    wire: Wire = Wire(),
    mtp_acceptance: float | None = None,
) -> DecodeEstimate:
    """Time per output token for `batch` requests of `context` cached tokens on every device.

    With two or more requests, two half batches overlap compute and wire; what of the wire is not
    hidden is shown as a part. `mtp_acceptance` turns on speculative decoding with one MTP module:
    its layer and head are added and the accepted tokens counted. UserError for a mesh that does not
    fit.
    """
    problems = mesh_problems(config, "1f1b")
    if batch < 1 or context < 1:
        problems.append(f"batch={batch} and context={context} must be positive")
    if mtp_acceptance is not None and not config.model.num_nextn_predict_layers:
        problems.append("mtp_acceptance needs a model with num_nextn_predict_layers > 0")
    if leaves_domain(config.mesh, device) and device.scale_out_bandwidth is None:
        problems.append(f"{config.mesh.num_devices} devices leave {device.name}'s scale-up domain")
    if problems:
        raise UserError("mesh, model and batch do not fit:\n  - " + "\n  - ".join(problems))
    model, mesh = config.model, config.mesh
    drafts = 0 if mtp_acceptance is None else 1
    width = batch * (1 + drafts)  # tokens verified together
    halves = 2 if batch > 1 else 1
    compute = decode_parts(config, device, width / halves, context, efficiency)
    exchange = exchange_seconds(config, device, width / halves, wire)
    moe_layers = model.num_moe_layers + drafts
    exposed = max(0.0, exchange - sum(compute.values())) if halves == 2 else exchange
    dense = 3 * model.hidden_size * model.intermediate_size / mesh.tensor
    head = model.hidden_size * model.vocab_size / mesh.tensor
    memory_rate = device.hbm_bandwidth * efficiency.memory
    element = 1 if uses_fp8(config) else 2
    parts = {name: halves * moe_layers * seconds for name, seconds in compute.items()}
    for name in ("attention weights", "cache"):
        parts[name] *= (model.num_hidden_layers + drafts) / moe_layers
    parts["dense layers and head"] = (
        model.num_dense_layers * dense * element + (1 + drafts) * head * 2
    ) / memory_rate
    parts["exchange on the wire"] = halves * moe_layers * exposed
    gain = 1.0 if mtp_acceptance is None else latency.mtp_speedup(mtp_acceptance)
    parts = {name: seconds / gain for name, seconds in parts.items()}
    tpot = sum(parts.values())
    rate = batch * mesh.num_devices / (mesh.tensor * mesh.context * mesh.pipe) / tpot
    price = device.price_per_hour
    return DecodeEstimate(
        tpot=tpot,
        parts=parts,
        tokens_per_second=rate,
        tokens_per_second_per_request=1 / tpot,
        kv_bytes_per_token=kv_bytes_per_token(model),
        memory=serving_memory(config, batch, context),
        devices=mesh.num_devices,
        dollars_per_million_tokens=(
            None if price is None else price * mesh.num_devices / 3600 / rate * 1e6
        ),
    )
