"""Bytes of a training step's activations on a device: kept by layers, worked on, and logits.

Constants that no config determines are those of compiled programs (docs/scale.md).
"""

from __future__ import annotations

from dsv3_jax.config import Config, ModelConfig

BYTES = {"bfloat16": 2, "float32": 4}
# What the backward pass of one layer holds at once, over what the layer would keep without
# rematerialisation, in BF16: its inputs, rows on their way to experts and back, and gradients of
# both, as XLA's buffer assignment has them for V3 (1.1 MB a token).
AT_ONCE = 2.47
# Logits that the head has at a time (training/cross_entropy.py), and bytes of each: BF16, whose
# place the gradient takes.
LOGITS_AT_ONCE, LOGIT_BYTES = 1 << 30, 2


def uses_fp8(config: Config) -> bool:
    """Whether the matmuls of this run are FP8; every preset that is, is named so."""
    return config.quant.preset.startswith("fp8")


def activation_bytes_per_token(
    model: ModelConfig, moe: bool, remat: str, fp8: bool, tensor: int = 1
) -> float:
    """Bytes a layer keeps per token from its forward to its backward.

    remat "none" keeps the input of every matmul, norm and SwiGLU; "dots" the matmul outputs; "v3"
    those but the heads' queries, keys and values, and attention's result; "full" only the layer's
    input. With `fp8`, matmul inputs are kept as E4M3 and SwiGLU's too, as V3 does
    (section 3.3.3); the residual stream stays BF16. Softmax statistics and router scores are f32.
    """
    D, N, K = model.hidden_size, model.num_attention_heads, model.num_experts_per_tok
    Q, C, R = model.q_lora_rank or 0, model.kv_lora_rank, model.qk_rope_head_dim
    H, U = model.qk_nope_head_dim, model.v_head_dim
    stream = 2 * 2 * D  # the two inputs of the residual blocks, BF16
    if remat == "full":
        return 2 * D
    narrow = 1 if fp8 else 2
    attention = N / tensor * (2 * (2 * (H + R) + U) + narrow * U + 4)  # q, k, v; o; statistics
    latents = 2 * (Q + C + R)
    wide, routed = model.intermediate_size / tensor, K + model.n_shared_experts
    if moe:
        wide = routed * model.moe_intermediate_size / tensor
        rows = narrow * routed * D + 4 * model.n_routed_experts
    else:
        rows = narrow * D
    if remat == "v3":
        kept = 2 * (routed if moe else 1) * D  # what down projections return
        return stream + N / tensor * (2 * U + 4) + latents + 2 * 2 * wide + kept
    if remat == "dots":
        return stream + attention + latents + narrow * 2 * wide + 2 * D
    normed = narrow * (D + Q + C)
    return stream + attention + latents + normed + rows + narrow * 3 * wide


def working_bytes(config: Config) -> float:
    """A token's, while the backward pass works on a layer; of the kind of layer that takes most."""
    model = config.model
    kinds = [False] * (model.num_dense_layers > 0) + [True] * (model.num_moe_layers > 0)
    return max(working_bytes_of(config, moe) for moe in kinds)


def working_bytes_of(config: Config, moe: bool) -> float:
    """A token's, while the backward pass works on a dense layer, or a MoE layer."""
    kept = activation_bytes_per_token(config.model, moe, "none", False, config.mesh.tensor)
    return AT_ONCE * BYTES[config.model.dtype] / 2 * kept


def layer_bytes(config: Config, moe: bool) -> float:
    """Bytes that a layer keeps of a token from its forward to its backward, in BF16."""
    return activation_bytes_per_token(
        config.model, moe, config.train.remat, uses_fp8(config), config.mesh.tensor
    )


def logits_bytes(config: Config, tokens: float) -> float:
    """Of the main head and each MTP depth, a piece at a time, with their gradient."""
    model = config.model
    logits = tokens * (1 + model.num_nextn_predict_layers) * model.vocab_size / config.mesh.tensor
    return LOGIT_BYTES * min(logits, LOGITS_AT_ONCE)
