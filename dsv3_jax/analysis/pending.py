"""Bytes that a layer keeps from the gradient of its input (I) to that of its weights (W).

In a pipeline, `parallel/split_backward.py`: gradients of what products return, and what they read,
where the forward has not kept that. The formulas follow JAX's traces for GPUs (docs/log.md).
"""

from __future__ import annotations

from dsv3_jax.analysis.activations import BYTES, ffn_width, rows_of_token, uses_fp8
from dsv3_jax.config import Config

E4M3 = 33 / 32  # bytes of a number, with a scale in f32 for 128 of them
E5M6 = 1.5


def pending_bytes(config: Config, schedule: str, moe: bool) -> float:
    """A token's, in a dense layer or a MoE layer.

    Unless pipeline.experts_apart, and where a schedule takes backward passes whole, what is in a
    shard_map is made with I: all FP8 products, those of routed experts and of kv_b_proj.
    """
    apart = config.pipeline.takes_experts_apart(schedule)
    if uses_fp8(config):
        return _in_fp8(config, apart, moe)
    return BYTES[config.model.dtype] * _in_bf16(config, apart, moe)


def _in_bf16(config: Config, apart: bool, moe: bool) -> float:
    """Numbers of a token, of the model's dtype."""
    model, remat, tensor = config.model, config.train.remat, config.mesh.tensor
    D, Q, C, N = model.hidden_size, model.q_lora_rank or 0, model.kv_lora_rank, _heads(config)
    H, R, U = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    wide, rows, F = ffn_width(config, moe), _rows(config, moe), model.moe_intermediate_size / tensor
    gradients = 2 * wide + 2 * D + C + R + N * (H + R) + Q
    gradients += apart * N * (H + U) + rows * apart * (D + 2 * F)
    gradients += apart * moe * 2 * model.n_routed_experts  # the router's, in f32
    if remat == "none":
        return gradients + 2 * D + C + Q  # norms'
    read = 2 * D + Q + 2 * wide + apart * C + N * U * (remat != "v3")
    exchanged = _is_exchanged(config) and rows
    read += apart * rows * (F + D * bool(remat != "v3" or exchanged))
    if apart and exchanged:  # what further rounds begin from
        read += D + 4 * model.num_experts_per_tok
        if remat == "v3" and config.expert_parallel.dispatch_format == "fp8":  # as they arrived
            read += config.expert_parallel.capacity_factor * model.num_experts_per_tok * D / 2
    return gradients + read


def _in_fp8(config: Config, apart: bool, moe: bool) -> float:
    """Bytes of a token."""
    model, remat, tensor = config.model, config.train.remat, config.mesh.tensor
    D, Q, C, N = model.hidden_size, model.q_lora_rank or 0, model.kv_lora_rank, _heads(config)
    H, R, U = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    norms = 2 * C + 2 * D * moe if remat == "none" else 0
    if not apart:
        return norms
    wide, rows, F = ffn_width(config, moe), _rows(config, moe), model.moe_intermediate_size / tensor
    latent = -(-(C + R) // 128) * 128
    gradients = 2 * wide + 2 * D + latent + N * (H + R) + N * (H + U) + Q
    gradients = E4M3 * (gradients + rows * (D + 2 * F)) + 4 * model.n_routed_experts * moe
    exchanged = _is_exchanged(config) and rows
    if remat == "none":
        return gradients + norms + (2 * D if exchanged else 0)
    if exchanged:  # what further rounds begin from
        gradients += 4 * D + 8 * model.num_experts_per_tok
    if remat == "v3":
        read = E4M3 * (Q + C + 2 * wide + rows * (2 * F + D * bool(exchanged)))
        return gradients + 4 * D + read
    read = E4M3 * (3 * D + Q + C + 2 * wide + rows * (D + 2 * F)) + E5M6 * N * U
    return gradients + read + 2 * D * moe


def _heads(config: Config) -> float:
    return config.model.num_attention_heads / config.mesh.tensor


def _rows(config: Config, moe: bool) -> float:
    """Rows of a token that routed experts multiply, of those whose gradient waits for W."""
    mesh, expert = config.mesh, config.expert_parallel
    by_two_hops = mesh.node > 1 and mesh.local > 1 and expert.hierarchical
    if not moe or (_is_exchanged(config) and expert.overflow == "loop"):
        return 0.0
    if expert.overlap and by_two_hops:  # rows of the second hop travel over these products, in I
        return 0.0
    return rows_of_token(config)


def _is_exchanged(config: Config) -> bool:
    return config.mesh.node * config.mesh.local > 1
